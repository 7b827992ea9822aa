"""The recgen command running stages: a toy stage stands for the real ones, but for one that is run for real."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from stage_runs import REPO, TINY, environment, manifest_of, tiny

from recgen.cli import cli
from recgen.commands import execution, notebooks, pipelines

def call(*words, ok=0):
    "The command in this process: its output. AssertionError for another exit status."
    done = CliRunner().invoke(cli, [str(w) for w in words], prog_name="recgen")
    assert done.exit_code == ok, (done.exit_code, done.output, done.exception)
    assert "Traceback" not in done.output
    return done.output


# --- running, by a toy stage


CELLS = {
    "parameters": 'n: int = 1  # how many\noutput_dir: str = ""  # where\noverwrite: bool = False  # replace',
    "run": "from recgen.core.run import Run\nrun = Run('88_toy', {'n': n, 'output_dir': output_dir, 'overwrite': overwrite}, dataset='toy')\nprint('reusing' if run.finished else 'new')",
    "refuse": "if n == 2:\n    from recgen.core.errors import InputError\n    raise InputError('two is too many', found=n, expected='one', mend='-p n 1')",
    "work": "import os, time\nif not run.finished:\n    for i in range(600 if n == 3 else 2):\n        print(f'Epoch {i}: Loss=1')\n        run.path('checkpoint').write_text(str(i))\n        if n == 3: time.sleep(0.1)\n"
            "if n == 4: os.kill(os.getpid(), 9)\nif n == 5: 1 / 0",
    "end": "if not run.finished: run.finish({'figure': n})",
}
SIDE = """
import sys
from pathlib import Path
from recgen import cli
from recgen.commands import execution, notebooks
place = Path(sys.argv[1])
notebooks.notebooks_dir = execution.notebooks_dir = lambda: place
cli.main(sys.argv[2:])
"""


@pytest.fixture
def toy(tmp_path, runs, monkeypatch):
    "A folder of one stage, 88_toy, in place of the real ones."
    place = tmp_path / "stages"
    place.mkdir()
    cells = [new_code_cell(source, metadata={"tags": ["parameters"]} if name == "parameters" else {}) for name, source in CELLS.items()]
    notebook = new_notebook(cells=[new_markdown_cell("# stages.toy\n\n> 88_toy: nothing at all."), new_code_cell("print('an example')"), *cells])
    notebook.metadata["kernelspec"] = {"name": "a-kernel-that-is-not-there", "display_name": "x", "language": "python"}
    nbformat.write(notebook, place / "88_toy.ipynb")
    for module in (notebooks, execution):
        monkeypatch.setattr(module, "notebooks_dir", lambda: place)
    return place


def test_a_run_says_where_it_is_and_keeps_its_notebook_beside(toy, runs, tmp_path, monkeypatch):
    other = tmp_path / "jupyter" / "kernels" / "python3"  # another Python's kernel of that name, which this machine would take
    other.mkdir(parents=True)
    (other / "kernel.json").write_text(json.dumps({"argv": ["false", "{connection_file}"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    printed = call("run", "toy", "-p", "n", "7")
    (folder,) = runs.glob("toy/88_toy/*/")
    assert str(folder) in printed and f"{folder}.ipynb" in printed and "finished" in printed
    notebook = nbformat.read(f"{folder}.ipynb", 4)
    assert any("n = 7" in c.source for c in notebook.cells) and not list(runs.rglob(".88_toy*"))
    before = Path(f"{folder}.ipynb").read_bytes()
    assert call("run", "88", "-p", "n", "7", "-q") == f"{folder}\n" and Path(f"{folder}.ipynb").read_bytes() == before, "the notebook that made the run stays"
    assert "finished before" in call("run", "toy", "-p", "n", "7", "--out", "kept") and Path("kept/88_toy.ipynb").exists()


def test_where_the_notebook_goes(runs):
    here = Path.cwd()
    wanted = [execution.notebook_wanted("88_toy", values, out) for values, out in (({}, None), ({"output_dir": "own/place"}, None), ({"output_dir": "x"}, "kept"), ({}, "kept/mine.ipynb"))]
    assert wanted == [None, here / "own" / "place.ipynb", here / "kept" / "88_toy.ipynb", here / "kept" / "mine.ipynb"]


def test_a_refusal_is_the_stages_own_message(toy, runs):
    said = call("run", "toy", "-p", "n", "2", ok=1)
    assert "88_toy failed: two is too many\n  found:    2\n  expected: one\n  mend:     -p n 1\n  notebook: " in said and "InputError" not in said
    notebook = Path(re.search(r"notebook: (.*)", said)[1])
    assert any(o.output_type == "error" for c in nbformat.read(notebook, 4).cells for o in c.get("outputs", []))


def test_a_stage_that_breaks_names_error_and_line(toy, runs):
    said = call("run", "toy", "-p", "n", "5", ok=1)
    assert "ZeroDivisionError: division by zero" in said and "1 / 0" in said and len(said.splitlines()) < 8


def test_a_killed_kernel_is_told(toy, runs):
    said = call("run", "toy", "-p", "n", "4", ok=1)
    assert "process ended" in said and "out of memory" in said and "notebook: " in said


def test_another_run_in_the_same_place_is_refused_unless_overwritten(toy, runs):
    call("run", "toy", "-p", "output_dir", "mine")
    before = Path("mine.ipynb").read_bytes()
    said = call("run", "toy", "-p", "output_dir", "mine", "-p", "n", "8", ok=1)
    assert Path("mine.ipynb").read_bytes() == before and str(runs / "failed" / "88_toy.ipynb") in said
    assert "n: 1 → 8" in said and json.loads(Path("mine/manifest.json").read_text())["metrics"] == {"figure": 1}
    call("run", "toy", "-p", "output_dir", "mine", "-p", "n", "8", "--overwrite")
    assert json.loads(Path("mine/manifest.json").read_text())["metrics"] == {"figure": 8}


def side(toy, *words):
    "The command in a process of its own, on the toy stage."
    return subprocess.Popen([sys.executable, "-c", SIDE, str(toy), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPO)})


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_cell_and_leaves_what_it_wrote(number, code, toy, runs):
    process = side(toy, "run", "toy", "-p", "n", "3", "-p", "output_dir", "mine")
    deadline = time.monotonic() + 60
    while not Path("mine/checkpoint").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "was stopped" in said and "Traceback" not in said and not printed
    errors = [o.ename for c in nbformat.read("mine.ipynb", 4).cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert errors == ["KeyboardInterrupt"] and Path("mine/checkpoint").exists() and not Path("mine/manifest.json").exists()


def test_progress_is_plain_in_a_pipe_and_all_of_it_with_verbose(toy, runs):
    printed, said = side(toy, "run", "toy", "-v").communicate(timeout=60)
    assert said == "88_toy: begun\n  new\n  Epoch 0: Loss=1\n  Epoch 1: Loss=1\n" and printed.startswith("88_toy: finished in ")



def test_finished_steps_are_left_alone_and_changed_ones_are_not(toy, runs, monkeypatch):
    monkeypatch.setattr(pipelines, "READS", {"88_toy": {}})
    step, said, work = pipelines.Step("88_toy", {"output_dir": str(runs / "p" / "88_toy"), "n": 1}), [], []
    run = execution.execute_stage
    monkeypatch.setattr(execution, "execute_stage", lambda *a: (work.append(a[0]), run(*a))[1])

    def take(**values):
        said.clear(), work.clear()
        return pipelines.take_steps([pipelines.Step("88_toy", {**step.values, **values})], None, said.append, lambda n: execution.Progress(n, mode="quiet"))

    assert take() == {"88_toy": runs / "p" / "88_toy.ipynb"} and work and "finished" in said[0]
    assert take() and not work and "reused" in said[0]
    assert take(overwrite=True) and not work, "overwriting is for other runs"
    (runs / "p" / "88_toy" / "checkpoint").write_text("torn")
    assert not pipelines.is_unchanged(step)
    assert take(overwrite=True) and work
    assert pipelines.is_unchanged(step) and not pipelines.is_unchanged(pipelines.Step("88_toy", {**step.values, "n": 6}))
    pipelines.notebook_beside(step.folder).unlink()
    assert not pipelines.is_unchanged(step), "the report needs it"


# --- the real thing, once


@pytest.mark.slow
def test_a_real_stage_is_the_same_run_as_papermills(tmp_path):
    given = [w for k, v in TINY["00_data"].items() for w in ("-p", k, str(v))]
    done = subprocess.run([sys.executable, "-m", "recgen.cli", "run", "data", *given, "-p", "output_dir", "out"], cwd=tmp_path, env={**environment(tmp_path), "PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert manifest_of(tmp_path / "out") == manifest_of(tiny("00_data")) and "run       out" in done.stdout and (tmp_path / "out.ipynb").exists()
    refused = subprocess.run([sys.executable, "-m", "recgen.cli", "run", "data", "-p", "data_path", "nowhere.csv"], cwd=tmp_path, env={**environment(tmp_path), "PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    assert refused.returncode == 1 and "nowhere.csv" in refused.stderr and "Traceback" not in refused.stderr
    assert (tmp_path / "runs" / "failed" / "00_data.ipynb").exists() and f"notebook: {Path('runs/failed/00_data.ipynb')}" in refused.stderr


@pytest.mark.parametrize("given, expected", [({}, execution.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)])
def test_threads_that_wait_leave_the_cores_to_others(given, expected, toy, runs, monkeypatch):
    "What the kernel is told, unless the user has told it."
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what the command sets is undone
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    call("run", "toy", "-p", "n", "7")
    assert os.environ.get("GOMP_SPINCOUNT") == expected
