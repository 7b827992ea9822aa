"""The conventions of the notebooks, checked mechanically over all of them."""
import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from recgen.core.params import check_values, read_declarations

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and "_proc" not in p.parts)
FLOORS = [["core"], ["formats"], ["evaluation", "quantization"], ["sources", "graph", "tokens", "retrieval", "clicks"], ["stages"], ["commands"], ["cli"]]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}

# Classes that are longer than an exported cell should be. The list may shrink; nothing may join it.
LONG_CLASSES = {"Ragged": 64, "Run": 140, "Trainer": 180, "Dataset": 72, "Trie": 66, "SemanticIDs": 108, "Tiger": 69, "Recommender": 84, "RQKMeans": 68}


# Built from pieces, so that this file does not hold what it looks for.
FORBIDDEN = {
    "a path of a machine": "|".join(rf"(?<![\w.{{}}$-])/{name}/" for name in ("work", "root", "home", "tmp", "Users")) + r"|\b[A-Z]:" + r"\\(?!n)",
    "a memory address": "0" + r"x[0-9a-f]{6,}",
    "a registry's host": "|".join(host.replace("*", r"\.") for host in ("pypi*org", "pythonhosted*org", "anaconda*com", "arti" + "factory")),
}


def name_of(path) -> str:
    return path.relative_to(ROOT).as_posix()


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=[name_of(p) for p in paths])


def load(path):
    return nbformat.read(path, 4)


def code_cells(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def directives(cell) -> list:
    "Names of the `#|` lines of a cell."
    return [line[2:].split()[0] for line in cell.source.splitlines() if line.startswith("#|") and line[2:].split()]


def exported(notebook):
    return [c for c in code_cells(notebook) if "export" in directives(c)]


def module_of(notebook) -> str:
    "What `#| default_exp` says, or ''."
    found = [m[1] for c in code_cells(notebook) for m in re.finditer(r"^#\|\s*default_exp\s+(\S+)", c.source, re.M)]
    assert len(found) <= 1, found
    return found[0] if found else ""


def is_import(node) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def python_of(cell) -> ast.Module:
    return ast.parse("\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in cell.source.splitlines()))


def is_stage(path) -> bool:
    return path.parent == NBS and path.stem not in ("index", "cli")


PARTS = [p for p in NOTEBOOKS if p.stem != "index"]
STAGES = [p for p in NOTEBOOKS if is_stage(p)]
MODULES = sorted(p for p in (ROOT / "recgen").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py") and "notebooks" not in p.parts)


def test_there_are_notebooks_modules_and_stages():
    assert len(PARTS) > 30 and len(MODULES) > 30 and len(STAGES) >= 3


# --- every notebook


@each(PARTS)
def test_begins_with_its_name_and_one_line(path):
    notebook = load(path)
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    title, blank, line = (first.source.split("\n") + ["", ""])[:3]
    assert title == f"# {module_of(notebook)}" and not blank and line.startswith("> ") and len(first.source.strip().split("\n")) == 3


@each(PARTS)
def test_its_module_fits_its_place(path):
    module = module_of(load(path))
    folder, _, last = module.rpartition(".")
    short = re.sub(r"^\d\d_", "", path.stem)
    assert last == short
    assert folder == ("stages" if is_stage(path) else "" if path.parent == NBS else path.parent.name)
    assert (ROOT / "recgen" / (module.replace(".", "/") + ".py")).exists()


@each(PARTS)
def test_exported_cells_are_small_and_imports_stand_alone(path):
    for cell in exported(load(path)):
        lines = [line for line in cell.source.strip().split("\n") if not line.startswith("#|")]
        body = python_of(cell).body
        allowed = LONG_CLASSES.get(body[0].name, 60) if len(body) == 1 and isinstance(body[0], ast.ClassDef) else 60
        assert len(lines) <= allowed, f"{len(lines)} lines: {lines[0]}"
        kinds = {is_import(n) for n in body}
        assert kinds <= {True} or kinds <= {False}, f"imports beside other code: {cell.source[:80]}"


@each(PARTS)
def test_imports_come_from_below_and_never_from_itself(path):
    notebook = load(path)
    own = f"recgen.{module_of(notebook)}"
    floor = FLOOR[own.split(".")[1]]
    for cell in code_cells(notebook):
        for node in ast.walk(python_of(cell)):
            if isinstance(node, ast.ImportFrom):
                assert all(a.name != "*" for a in node.names), f"star import: {cell.source[:80]}"
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in (n for n in names if n.startswith("recgen.")):
                package = name.split(".")[1]
                assert name != own, "a notebook imports its own module"
                assert FLOOR[package] < floor or own.split(".")[1] == package != "stages", f"{own} imports {name}, which is not below it"


@each(NOTEBOOKS)
def test_is_small_and_was_executed(path):
    assert path.stat().st_size < 500_000
    notebook = load(path)
    outputs = [o for c in code_cells(notebook) for o in c.get("outputs", [])]
    errors = [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr" and "Traceback" in o.get("text", "")]
    assert not errors, errors[0]
    if path.stem != "index":
        assert outputs, "no cell has an output: execute the notebook before committing it"


@each(PARTS)
def test_every_print_has_its_output(path):
    for cell in code_cells(load(path)):
        prints = [n for n in python_of(cell).body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call) and getattr(n.value.func, "id", "") == "print"]
        assert not prints or cell.get("outputs"), f"this cell prints, but has no output: {cell.source[:120]}"


def texts_of(path):
    "(where, text) of everything in a file that a reader may see."
    if path.suffix != ".ipynb":
        return [("text", path.read_text(encoding="utf-8"))]
    found = []
    for i, cell in enumerate(load(path).cells):
        found.append((f"cell {i}", cell.source))
        for o in cell.get("outputs", []):
            shown = [o.get("text", "")] + [v for k, v in o.get("data", {}).items() if k.startswith("text/") or k.endswith("json")]
            found += [(f"output of cell {i}", t if isinstance(t, str) else str(t)) for t in shown]
    return found


CLEAN = [*NOTEBOOKS, *MODULES, *sorted((NBS / "params").rglob("*.yaml")), *sorted((ROOT / "tests").rglob("*.py")),
         *(p for p in (ROOT / n for n in ("README.md", "Makefile", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt")) if p.exists())]


@each(CLEAN)
def test_names_no_machine_no_address_no_registry(path):
    for where, text in texts_of(path):
        for what, pattern in FORBIDDEN.items():
            found = re.search(pattern, text)
            assert not found, f"{what} in {where}: …{text[max(0, found.start() - 40):found.end() + 40]}…"


@pytest.mark.parametrize("text", ["see /" + "work/main/x", "open('/" + "tmp/a')", "C:" + "\\Users", "<object at 0" + "x7f006cdf0790>"])
def test_the_patterns_find_what_they_are_for(text):
    assert any(re.search(p, text) for p in FORBIDDEN.values())


# --- stages


def parameter_cells(notebook):
    return [i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", [])]


@each(PARTS)
def test_only_stages_have_parameters(path):
    assert len(parameter_cells(load(path))) == int(is_stage(path))


@each(STAGES)
def test_parameters_cell_declares_and_the_next_one_checks(path):
    cells = load(path).cells
    (at,) = parameter_cells(load(path))
    declared = read_declarations(cells[at].source)
    for node in ast.parse(cells[at].source).body:
        assert isinstance(node, ast.AnnAssign) and node.value is not None, ast.unparse(node)
        assert isinstance(node.annotation, ast.Name), f"{ast.unparse(node.annotation)}: papermill's help loses such a type"
    for d in declared.values():
        assert d.help, f"{d.name} is not explained"
        assert type(d.default) is d.kind, f"{d.name}: {d.kind.__name__} = {d.default!r}"
    following = next(c for c in cells[at + 1 :] if c.cell_type == "code")
    assert "params_from(globals()" in following.source and "export" not in directives(following)


def stage_of(path):
    "(module, declared parameters) of a stage notebook."
    notebook = load(path)
    (at,) = parameter_cells(notebook)
    return importlib.import_module(f"recgen.{module_of(notebook)}"), read_declarations(notebook.cells[at].source), notebook


@each(STAGES)
def test_rules_and_aliases_speak_of_declared_parameters(path):
    module, declared, notebook = stage_of(path)
    rules, aliases = getattr(module, "RULES", {}), getattr(module, "ALIASES", {})
    assert rules and not set(rules) - set(declared)
    assert not set(aliases.values()) - set(declared) and not set(aliases) & set(declared)
    assert check_values({}, declared, rules, aliases)  # the defaults themselves are allowed


@each(STAGES)
def test_papermill_finds_every_parameter(path):
    import papermill

    _, declared, _ = stage_of(path)
    found = papermill.inspect_notebook(str(path))
    assert list(found) == list(declared)
    for name, d in declared.items():
        assert found[name]["inferred_type_name"] == d.kind.__name__ and found[name]["help"].strip() == d.help
        assert ast.literal_eval(found[name]["default"]) == d.default


PARAMS = sorted((NBS / "params").rglob("*.y*ml"))


@each(PARAMS)
def test_parameter_files_fit_their_stage(path):
    notebook = NBS / f"{path.stem}.ipynb"
    assert path.suffix == ".yaml" and path.parent.parent == NBS / "params" and notebook in STAGES
    module, declared, cells = stage_of(notebook)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(values, dict) and values, "a file without parameters"
    aliases = dict(getattr(module, "ALIASES", {}))
    for cell in code_cells(cells):  # aliases that the cell itself hands in
        for call in (n for n in ast.walk(python_of(cell)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "params_from"):
            aliases |= next((ast.literal_eval(a) for a in call.args[2:3] if isinstance(a, ast.Dict)), {})
    check_values(values, declared, module.RULES, aliases)


def test_there_are_parameter_files():
    assert PARAMS


# --- modules


@each(MODULES)
def test_modules_come_from_notebooks(path):
    text = path.read_text(encoding="utf-8")
    named = re.search(r"^# AUTOGENERATED! DO NOT EDIT! File to edit: (\S+\.ipynb)\.$", text, re.M)
    assert named, "not made by nbdev_export"
    notebook = (path.parent / named[1]).resolve()
    assert notebook.exists(), f"{named[1]} is gone"
    assert "recgen/" + module_of(load(notebook)).replace(".", "/") + ".py" == name_of(path)
    assert len(text.splitlines()) <= 420, "a module of more than about 400 lines is two modules"


@each(MODULES)
def test_public_names_are_explained(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    nodes = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    bare = [n.name for n in nodes if not n.name.startswith("_") and not ast.get_docstring(n)]
    assert not bare, f"without a docstring: {', '.join(bare)}"


@each(PARTS)
def test_module_is_what_the_notebook_exports(path):
    "Every exported cell's code stands in the module: notebook and library have not drifted apart."
    notebook = load(path)
    module = module_of(notebook)
    text = (ROOT / "recgen" / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    there = [ast.dump(n) for n in ast.parse(text).body if not is_import(n)]
    for cell in exported(notebook):
        for node in python_of(cell).body:
            assert is_import(node) or ast.dump(node) in there, f"not in recgen/{module}: {ast.unparse(node)[:80]}"


def test_floors_hold():
    tool = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_is_quick_and_light():
    code = "import sys, time; t = time.process_time(); import recgen; print(time.process_time() - t, any(m in sys.modules for m in ('torch', 'pandas', 'pyarrow')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    seconds, heavy = done.stdout.split()
    assert float(seconds) < 0.3 and heavy == "False"


def test_floors_of_the_house_are_the_linters():
    "FLOORS above and the layers in pyproject.toml are one list."
    import tomllib

    layers = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"][0]["layers"]
    written = [sorted(re.findall(r"recgen\.(\w+)", layer)) for layer in reversed(layers)]
    assert written == [sorted(floor) for floor in FLOORS]
