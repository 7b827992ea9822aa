"""Stages run as a user runs them: by papermill, from another folder. What several tests need is made once a session."""
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat

REPO = Path(__file__).parent.parent
NOTEBOOKS = REPO / "nbs"
TINY = {
    "00_data": {"n_users": 300, "n_items": 200, "name": "tiny"},
    "03_tokenizer": {"mode": "kmeans", "n_layers": 3, "n_clusters": 16},
    "04_tiger": {"epochs": 3, "batch_size": 64, "valid_users": 100, "eval_every": 1, "embedding_dim": 32, "attn_dim": 32, "num_heads": 2, "ff_dim": 64},
}
GRAPH_TINY = {  # beside TINY, which is a pipeline that a test runs whole
    "01_hgt": {"objective": "link", "epochs": 5, "hidden": 32, "n_heads": 2, "learned": 8, "negatives": 64, "hide": 0.5, "valid_users": 100, "lightgcn_epochs": 2, "device": "cpu"},
    "02_graphsage": {"item_item": 1, "epochs": 8, "batch_size": 128, "pairs_per_epoch": 2048, "walk_length": 8, "walks_per_node": 4, "window": 2, "hidden_dim": 16,
                     "output_dim": 16, "lightgcn_epochs": 2, "device": "cpu"},
}
BEFORE = {  # {stage: {its parameter: the stage whose folder it is}}
    "00_data": {}, "01_hgt": {"data_path": "00_data"}, "02_graphsage": {"data_path": "00_data"}, "03_tokenizer": {"data_path": "00_data"},
    "04_tiger": {"data_path": "00_data", "semantic_ids": "03_tokenizer"},
}


def environment(folder: Path) -> dict:
    "The environment of a stage: fresh runs below `folder`, one thread, so that two may run at once."
    return {**os.environ, "RECGEN_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def start(stage: str, cwd: Path, **params) -> subprocess.Popen:
    "papermill on a stage's notebook, started in `cwd`; the executed notebook is cwd/<stage>.ipynb."
    cwd.mkdir(parents=True, exist_ok=True)
    given = [word for k, v in params.items() for word in ("-p", k, str(v))]
    command = [sys.executable, "-m", "papermill", str(NOTEBOOKS / f"{stage}.ipynb"), f"{stage}.ipynb", "--no-progress-bar", *given]
    return subprocess.Popen(command, cwd=cwd, env=environment(cwd), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, ok: bool = True, timeout: float = 240) -> str:
    "Wait for it; returns what it printed. AssertionError where it fails and should not, or the other way round."
    printed = process.communicate(timeout=timeout)[0]
    assert (process.returncode == 0) == ok, printed[-6000:]
    return printed


def run(stage: str, cwd: Path, **params) -> Path:
    "Run a stage to its end. Returns its folder, which is `output_dir` where that is given."
    finish(start(stage, cwd, **params))
    if params.get("output_dir"):
        return cwd / params["output_dir"]
    (manifest,) = cwd.glob(f"runs/*/{stage}/*/manifest.json")
    return manifest.parent


def manifest_of(folder: Path) -> dict:
    "A manifest without its environment."
    return {k: v for k, v in json.loads((folder / "manifest.json").read_text()).items() if k != "environment"}


def outputs_of(notebook: Path) -> str:
    "All text that an executed notebook shows."
    found = []
    for cell in nbformat.read(notebook, 4).cells:
        for output in cell.get("outputs", []):
            found += [output.get("text", ""), *(str(v) for k, v in output.get("data", {}).items() if k.startswith("text/"))]
    return "\n".join(found)


def wait_for(condition, process: subprocess.Popen, timeout: float = 120):
    "Until `condition()` holds, looked at every few milliseconds while the process lives."
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


@functools.cache
def workplace() -> Path:
    "A folder for what the session's tests share."
    folder = tempfile.TemporaryDirectory(prefix="recgen-tests-")
    _kept.append(folder)
    return Path(folder.name)


_kept = []  # temporary folders that live as long as the process


@functools.cache
def tiny(stage: str) -> Path:
    "The folder of a tiny finished stage; those before it are run first."
    folders = {name: f"../{tiny(other).relative_to(workplace())}" for name, other in BEFORE[stage].items()}
    return run(stage, workplace() / stage, **(TINY | GRAPH_TINY)[stage], **folders, output_dir="out")


def joined(stage: str) -> dict:
    "The tiny parameters with the folders before it."
    return (TINY | GRAPH_TINY)[stage] | {name: tiny(other) for name, other in BEFORE[stage].items()}


def run_stage(stage: str, whole: bool = False, **params) -> dict:
    "The code cells of a stage notebook in this process, up to the end of the run, or `whole`, with what it shows. Returns the notebook's names."
    cells = [c for c in nbformat.read(NOTEBOOKS / f"{stage}.ipynb", 4).cells if c.cell_type == "code"]
    at = next(i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", []))
    names = {"__name__": "__main__", "display": lambda *a, **k: None}
    for i, cell in enumerate(cells):
        if i < at and not cell.source.startswith("#| export") and "import params_from" not in cell.source:
            continue  # examples
        exec(compile(cell.source, f"{stage}, cell {i}", "exec"), names)
        if i == at:
            unknown = set(params) - set(names["__annotations__"])
            assert not unknown, unknown
            names.update(params)
        if not whole and getattr(names.get("run"), "finished", False):
            break
    plt.close("all")
    return names
