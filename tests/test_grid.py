"""core.grid: which runs a small YAML means, what they are called, what they share, and what is refused before anything runs."""
import importlib
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from stage_runs import BEFORE, NOTEBOOKS

from recgen.core.errors import InputError
from recgen.core.grid import Grid, comparable, compared_runs, expand_grid, last_steps, plan_grid, plan_text, read_grid, value_names
from recgen.core.params import Params, check_values, read_declarations
from recgen.evaluation.comparison import seeds_label
from recgen.stages.compare import split_label

PIPELINE = {"00_data": {"data_path": "beauty"}, "01_hgt": {"epochs": 3}, "03_tokenizer": {"mode": "kmeans", "n_clusters": 256}, "04_tiger": {"preset": "small", "epochs": 20, "learning_rate": 1e-3}}
WITH_GRAPH = {**PIPELINE, "03_tokenizer": {"mode": "kmeans", "embedding_column": "embedding+{01_hgt}:embedding"}}


def declared(stage: str) -> dict:
    cells = nbformat.read(NOTEBOOKS / f"{stage}.ipynb", 4).cells
    return read_declarations(next(c.source for c in cells if "parameters" in c.metadata.get("tags", [])))


@pytest.fixture(scope="module")
def known():
    return {stage: declared(stage) for stage in BEFORE}


def refused(source, *words, **given):
    with pytest.raises(InputError) as e:
        grid = expand_grid(source, **given)
        plan_grid(grid, PIPELINE, BEFORE)
    assert all(w in str(e.value) for w in words), str(e.value)


def names(grid: dict, **given) -> list:
    return [n for n, _ in expand_grid({"base": "demo", **grid}, **given)]


# --- which runs


def test_a_grid_is_every_combination_with_the_last_key_fastest():
    grid = expand_grid({"base": "demo", "grid": {"03_tokenizer.mode": ["kmeans", "tiger"], "04_tiger.seed": [0, 1]}})
    assert grid.base == "demo" and len(grid) == 4 and grid.axes == {"03_tokenizer.mode": ["kmeans", "tiger"], "04_tiger.seed": [0, 1]}
    assert list(grid) == [("mode-kmeans_seed-0", {"03_tokenizer.mode": "kmeans", "04_tiger.seed": 0}), ("mode-kmeans_seed-1", {"03_tokenizer.mode": "kmeans", "04_tiger.seed": 1}),
                          ("mode-tiger_seed-0", {"03_tokenizer.mode": "tiger", "04_tiger.seed": 0}), ("mode-tiger_seed-1", {"03_tokenizer.mode": "tiger", "04_tiger.seed": 1})]


def test_named_runs_are_made_at_every_point_and_one_value_is_no_axis():
    found = dict(expand_grid({"base": "demo", "grid": {"04_tiger.epochs": [5], "04_tiger.seed": [0, 1]}, "runs": [{"name": "A"}, {"name": "B", "04_tiger.n_layers": 12}]}))
    assert list(found) == ["A_seed-0", "A_seed-1", "B_seed-0", "B_seed-1"]
    assert found["A_seed-1"] == {"04_tiger.epochs": 5, "04_tiger.seed": 1} and found["B_seed-0"] == {"04_tiger.n_layers": 12, "04_tiger.epochs": 5, "04_tiger.seed": 0}
    assert names({"runs": [{"name": "A"}]}) == ["A"] and names({"grid": {"04_tiger.epochs": [5]}}) == ["base"]


def test_a_file_says_the_same_as_a_dict(tmp_path):
    text = "base: demo\ngrid: {04_tiger.learning_rate: [1e-3, 3e-3]}\nruns: [{name: A}, {name: B, 04_tiger.n_layers: 12}]\n"
    (tmp_path / "grid.yaml").write_text(text)
    assert list(expand_grid(tmp_path / "grid.yaml")) == list(expand_grid(yaml.safe_load(text)))


def test_aliases_are_their_parameters(known):
    aliases = {"04_tiger": {"n_epoch": "epochs"}}
    assert list(expand_grid({"base": "demo", "grid": {"04_tiger.n_epoch": [1, 2]}}, known, aliases)) == [("epochs-1", {"04_tiger.epochs": 1}), ("epochs-2", {"04_tiger.epochs": 2})]
    refused({"base": "demo", "grid": {"04_tiger.n_epoch": [1], "04_tiger.epochs": [2]}}, "two names", "04_tiger.epochs", aliases=aliases)
    refused({"base": "demo", "runs": [{"name": "A", "04_tiger.n_epoch": 1, "04_tiger.epochs": 2}]}, "two names", aliases=aliases)


# --- names


def test_names_stay_when_the_file_grows():
    small = {"grid": {"04_tiger.learning_rate": [1e-3, "3e-4"], "04_tiger.seed": [0, 1]}}
    large = {"grid": {"04_tiger.learning_rate": [1e-2, 1e-3, 3e-4], "04_tiger.seed": [2, 1, 0]}}
    assert set(names(small)) < set(names(large)) and "learning_rate-0.0003_seed-1" in names(small)


def test_seeds_stand_last_so_that_the_comparison_can_leave_them_out():
    found = names({"grid": {"04_tiger.seed": [0, 1], "04_tiger.n_layers": [6, 8]}})
    assert found == ["n_layers-6_seed-0", "n_layers-8_seed-0", "n_layers-6_seed-1", "n_layers-8_seed-1"]
    assert seeds_label([n for n in found if "-6_" in n]) == "n_layers-6"


def test_two_parameters_of_one_name_say_their_stage():
    assert names({"grid": {"03_tokenizer.epochs": [1, 2], "04_tiger.epochs": [3, 4]}})[0] == "tokenizer.epochs-1_tiger.epochs-3"


@pytest.mark.parametrize("values, expected", [
    ([1e-3, "3e-4", 2.0, 128], ["0.001", "0.0003", "2", "128"]), ([True, False], ["true", "false"]), ([[64, 32], [128]], ["64-32", "128"]), (["../data/mine", "beauty"], ["mine", "beauty"]),
    (["embedding", "embedding+{01_hgt}:embedding"], ["embedding", "embedding+01_hgt-embedding"]), (["", "x"], ["empty", "x"]),
])
def test_values_in_names(values, expected):
    assert value_names(values) == expected


def test_values_that_would_be_called_alike_are_told_apart():
    found = value_names(["a:b", "a b", "a-b", "x" * 100, "x" * 99, "c"])
    assert len(set(found)) == 6 and found[-1] == "c" and max(map(len, found)) <= 32
    assert all(re.fullmatch(r"[\w.+-]+", n) for n in found)


def test_names_are_never_too_long_for_a_file_system():
    keys = {f"04_tiger.a_rather_long_parameter_{i}": [1, 2] for i in range(8)}
    found = names({"grid": keys})
    assert len(set(found)) == 256 and max(map(len, found)) <= 120
    assert max(len(Path(s.folder).name) for s in plan_grid(expand_grid({"base": "demo", "grid": keys}), PIPELINE, BEFORE)) <= 120


# --- what is refused


@pytest.mark.parametrize("text, words", [
    ("base: demo\ngrid:\n  04_tiger.seed: [0]\n  04_tiger.seed: [1]\n", ["stands twice", "04_tiger.seed", "line 4"]), ("base: demo\nbase: beauty\n", ["stands twice", "line 2"]),
    ("base: demo\nruns:\n  - {name: A, 04_tiger.seed: 1, 04_tiger.seed: 2}\n", ["stands twice", "04_tiger.seed"]), ("base: [demo\n", ["cannot be read as YAML", "rows"]), ("- a\n", ["not a mapping", "list"]), ("", ["not a mapping"]),
])
def test_a_file_that_is_none(tmp_path, text, words):
    (tmp_path / "grid.yaml").write_text(text)
    refused(tmp_path / "grid.yaml", "grid.yaml", *words)


def test_a_file_that_is_not_there(tmp_path):
    refused(tmp_path / "grid.yaml", "there is no such grid")
    with pytest.raises(InputError, match="no such grid"):
        read_grid(tmp_path)


@pytest.mark.parametrize("grid, words", [
    ({}, ["nothing to run"]), ({"base": ""}, ["of which pipeline"]), ({"base": None}, ["of which pipeline"]), ({"lr": [1]}, ["unknown key", "lr"]), ({"grid": [1]}, ["not a mapping"]), ({"runs": {"A": 1}}, ["not a list"]), ({"runs": ["A"]}, ["not a list"]),
    ({"grid": {"04_tiger.n_layer": [6]}}, ["no such parameter", "04_tiger.n_layer", "perhaps", "04_tiger.n_layers"]), ({"grid": {"05_tiger.epochs": [6]}}, ["no such stage", "05_tiger.epochs"]), ({"grid": {"epochs": [6]}}, ["names a stage", "epochs"]),
    ({"grid": {"04_tiger.epochs": 6}}, ["list of values", "[6, …]"]), ({"grid": {"04_tiger.epochs": []}}, ["list of values"]), ({"grid": {"04_tiger.epochs": [None]}}, ["no value", "04_tiger.epochs"]), ({"grid": {"04_tiger.epochs": [{"a": 1}]}}, ["no value"]),
    ({"grid": {"04_tiger.epochs": [6, "many"]}}, ["no value", "'many'", "int"]), ({"grid": {"04_tiger.learning_rate": [1e-3, "1e-3"]}}, ["a value stands twice", "04_tiger.learning_rate"]), ({"grid": {"04_tiger.epochs": [8, 8.0]}}, ["a value stands twice"]),
    ({"grid": {"04_tiger.output_dir": ["a", "b"]}}, ["a folder of its own"]), ({"runs": [{"04_tiger.epochs": 6}]}, ["needs a name", "runs 1: name"]), ({"runs": [{"name": "A"}, {"name": "A", "04_tiger.epochs": 6}]}, ["one name", "runs 2: name"]),
    ({"runs": [{"name": "A", "04_tiger.epochs": 6}, {"name": "B", "04_tiger.epochs": "6"}]}, ["two runs are the same", "A and B"]), ({"runs": [{"name": "A", "04_tiger.epoch": 6}]}, ["no such parameter"]),
    ({"grid": {"04_tiger.epochs": [6, 8]}, "runs": [{"name": "A", "04_tiger.epochs": 5}]}, ["both set", "A: 04_tiger.epochs"]),
    ({"grid": {"06_compare.metric": ["auc", "gauc"]}}, ["no such stage"]), ({"grid": {"02_graphsage.epochs": [1, 2]}}, ["the pipeline has no such stage", "02_graphsage.epochs"]),
], ids=str)
def test_wrong_grids(known, grid, words):
    refused({"base": "demo", **grid}, *words, known=known)


@pytest.mark.parametrize("name", ["a/b", "../x", "a,b", "a=b", ".", "", "A.", "{x}", "-a", 'a"b', "a\nb"])
def test_names_that_could_not_be_folders_or_labels(name):
    refused({"base": "demo", "runs": [{"name": name}]}, "needs a name")


@pytest.mark.parametrize("value", [1e-3, "1e-3", "0.001"])
def test_equal_values_are_found_however_they_are_written(value):
    assert comparable(value) == comparable(0.001) and comparable([value, "a"]) == comparable((0.001, "a"))
    assert comparable(True) != comparable(1) and comparable("kmeans") != comparable("tiger") and comparable("true") == comparable(True)


# --- what is shared


def planned(grid: dict, pipeline=PIPELINE):
    return plan_grid(expand_grid({"base": "demo", **grid}), pipeline, BEFORE)


def test_a_stage_is_shared_up_to_where_runs_differ():
    steps = planned({"grid": {"03_tokenizer.mode": ["kmeans", "tiger"], "04_tiger.seed": [0, 1, 2]}})
    assert [s.folder for s in steps] == ["00_data/base", "01_hgt/base", "03_tokenizer/mode-kmeans", "03_tokenizer/mode-tiger", *(f"04_tiger/mode-{m}_seed-{i}" for m in ("kmeans", "tiger") for i in range(3))]
    assert [len(s.runs) for s in steps] == [6, 6, 3, 3, 1, 1, 1, 1, 1, 1]
    assert steps[-1].values == {"preset": "small", "epochs": 20, "learning_rate": 1e-3, "seed": 2} and steps[3].values == {"mode": "tiger", "n_clusters": 256}
    assert {s: steps[i].folder for s, i in steps[-1].before.items()} == {"00_data": "00_data/base", "03_tokenizer": "03_tokenizer/mode-tiger"}
    assert all(i < at for at, s in enumerate(steps) for i in s.before.values())
    assert "6 runs, 10 stages to run instead of 24" in plan_text(steps)


def test_what_a_change_reaches_follows_the_folders_that_are_read():
    change = {"grid": {"01_hgt.epochs": [3, 6], "04_tiger.seed": [0, 1]}}
    steps = planned(change, WITH_GRAPH)
    assert [s.folder for s in steps if s.stage == "03_tokenizer"] == ["03_tokenizer/epochs-3", "03_tokenizer/epochs-6"] and len(steps) == 1 + 2 + 2 + 4
    refused({"base": "demo", **change}, "end in the same run")  # the tokenizer of PIPELINE does not read the graph
    listed = {**WITH_GRAPH, "03_tokenizer": {"columns": ["embedding", "{01_hgt}:embedding"]}}
    assert len([s for s in planned(change, listed) if s.stage == "03_tokenizer"]) == 2


def test_a_change_to_what_the_pipeline_has_already_is_none():
    steps = planned({"grid": {"03_tokenizer.n_clusters": [128, "256"]}, "runs": [{"name": "A"}, {"name": "B", "03_tokenizer.mode": "kmeans", "04_tiger.epochs": 30}]})
    assert [s.runs for s in steps if s.stage == "03_tokenizer"] == [("A_n_clusters-128", "B_n_clusters-128"), ("A_n_clusters-256", "B_n_clusters-256")]
    for same in ({"04_tiger.epochs": "20"}, {"04_tiger.epochs": 20.0}, {"04_tiger.learning_rate": "1e-3"}):
        refused({"base": "demo", "runs": [{"name": "A"}, {"name": "B", **same}]}, "end in the same run", "A, B")


def test_a_named_runs_step_is_called_after_it_only_where_it_matters():
    steps = planned({"grid": {"04_tiger.seed": [0, 1]}, "runs": [{"name": "base", "04_tiger.epochs": 21}, {"name": "tiger", "03_tokenizer.mode": "tiger"}]})
    assert [s.folder for s in steps] == ["00_data/base", "01_hgt/base", "03_tokenizer/base", "03_tokenizer/tiger", "04_tiger/base_seed-0", "04_tiger/base_seed-1", "04_tiger/tiger_seed-0", "04_tiger/tiger_seed-1"]
    with pytest.raises(InputError, match="one name"):
        planned({"runs": [{"name": "base", "03_tokenizer.mode": "tiger"}, {"name": "other", "04_tiger.epochs": 4}]})


def test_the_end_of_every_run_is_what_is_compared():
    steps = planned({"grid": {"04_tiger.learning_rate": [1e-3, 3e-3]}}, {**PIPELINE, "06_compare": {"runs": "TIGER={04_tiger}"}})
    assert "06_compare" not in {s.stage for s in steps} and set(last_steps(steps)) == {"learning_rate-0.001", "learning_rate-0.003"}
    assert [split_label(part) for part in compared_runs(steps, "runs/lr=1").split(",")] == [(n, f"runs/lr=1/04_tiger/{n}") for n in last_steps(steps)]


def test_two_runs_never_write_to_one_folder():
    steps = planned({"grid": {"03_tokenizer.mode": ["kmeans", "tiger"], "03_tokenizer.seed": [0, 1], "04_tiger.seed": [0, 1]}, "runs": [{"name": "A"}, {"name": "B", "00_data.k_core": 5}, {"name": "C", "03_tokenizer.n_clusters": 16}]})
    folders = [s.folder for s in steps]
    assert len(set(folders)) == len(folders) and not any(a != b and b.startswith(f"{a}/") for a in folders for b in folders)
    assert sum(len(s.runs) for s in steps) == 24 * 4


# --- the files that come with recgen


FILES = sorted((NOTEBOOKS / "grids").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=[p.stem for p in FILES])
def test_grids_fit_their_pipeline_and_stages(path, known):
    grid = expand_grid(path, known)
    pipeline = {p.stem: yaml.safe_load(p.read_text()) for p in sorted((NOTEBOOKS / "params" / grid.base).glob("*.yaml"))}
    modules = {stage: importlib.import_module(f"recgen.stages.{stage[3:]}") for stage in pipeline}
    for step in plan_grid(grid, pipeline, BEFORE):
        module = modules[step.stage]
        values = check_values(step.values, known[step.stage], module.RULES, getattr(module, "ALIASES", {}))
        if step.stage == "04_tiger":
            module.model_config(Params(values, known[step.stage]), [256, 256, 256])  # heads and widths that fit


def test_the_guides_experiments_are_all_there():
    search, tests = (expand_grid(NOTEBOOKS / "grids" / f"tiger-{name}.yaml") for name in ("search", "architectures"))
    assert isinstance(search, Grid) and search.axes == {"04_tiger.learning_rate": [1e-4, 3e-4, 1e-3], "04_tiger.batch_size": [128, 256, 512]}
    text = (NOTEBOOKS / "grids" / "tiger-search.yaml").read_text()
    whole = expand_grid(yaml.safe_load(re.sub(r"(?m)^  # (04)", r"  \1", text)))  # with the other two ranges
    assert len(whole) == 81 and whole.axes["04_tiger.embedding_dim"] == [128, 256, 512] and whole.axes["04_tiger.n_layers"] == [6, 8, 12]
    arms = {r.arm: {k.partition(".")[2]: v for k, v in r.values.items() if not k.endswith("seed")} for r in tests.runs}
    assert arms == {"standard": {"n_layers": 8, "num_heads": 8}, "deeper": {"n_layers": 12, "num_heads": 16}, "wider": {"n_layers": 8, "num_heads": 8, "embedding_dim": 256, "attn_dim": 1024}}
