"""Stages killed with SIGKILL at chosen moments: never a folder that looks finished, and the rerun ends where an undisturbed run does."""
import json
import os
import signal
from pathlib import Path

import pytest
from stage_runs import finish, joined, manifest_of, start, tiny, wait_for

pytestmark = pytest.mark.slow


def kernel_of(folder: Path) -> int:
    "Process id of the kernel that writes to the folder."
    return json.loads((folder / ".holder.json").read_text())["pid"]


def kill_when(moment: str, stage: str, place: Path, **params) -> Path:
    "Start a stage, kill its kernel as soon as the file is there, and see that the folder does not look finished."
    folder = place / "out"
    process = start(stage, place, **params, output_dir="out")
    try:
        wait_for((folder / moment).exists, process)
        wait_for((folder / ".holder.json").exists, process)
        os.kill(kernel_of(folder), signal.SIGKILL)
        printed = finish(process, ok=False)
    finally:
        process.kill()
    assert not (folder / "manifest.json").exists(), "killed too late, or finished too early"
    assert (folder / ".run.json").exists() and "died" in printed.lower()
    return folder


def rerun(stage: str, place: Path, **params) -> str:
    "Run the stage again in the same place, to its end."
    return finish(start(stage, place, **params, output_dir="out"))


def nothing_left_over(folder: Path):
    "No marker, holder or half-written file."
    left = [p.name for p in folder.rglob(".*") if p.is_file() and p.name != ".lock"]
    assert not left


def test_training_killed_three_times_ends_as_if_undisturbed(tmp_path):
    params = joined("04_tiger")
    folder = kill_when(".run.json", "04_tiger", tmp_path, **params)  # before anything is trained
    kill_when("checkpoints/last.pt", "04_tiger", tmp_path, **params)  # while it trains
    assert (folder / "checkpoints" / "last.pt").exists()
    kill_when("model.pt", "04_tiger", tmp_path, **params)  # trained, not yet evaluated
    kill_when("sasrec/checkpoints/last.pt", "04_tiger", tmp_path, **params)  # while the dense model trains
    printed = rerun("04_tiger", tmp_path, **params)
    assert "error" not in printed.lower()
    assert manifest_of(folder) == manifest_of(tiny("04_tiger"))
    nothing_left_over(folder)


@pytest.mark.parametrize("stage, moment", [("00_data", "oracle.json"), ("03_tokenizer", "final_model.pt")])
def test_a_stage_killed_while_it_writes_ends_as_if_undisturbed(stage, moment, tmp_path):
    folder = kill_when(moment, stage, tmp_path, **joined(stage))
    rerun(stage, tmp_path, **joined(stage))
    assert manifest_of(folder) == manifest_of(tiny(stage))
    nothing_left_over(folder)


def test_a_second_run_in_the_same_folder_is_refused_by_name(tmp_path):
    params, folder = joined("03_tokenizer"), tmp_path / "out"
    first = start("03_tokenizer", tmp_path, **params, output_dir="out")
    kernel = None
    try:
        wait_for((folder / ".holder.json").exists, first)
        kernel = kernel_of(folder)
        os.kill(kernel, signal.SIGSTOP)  # it holds the folder for as long as we like
        printed = finish(start("03_tokenizer", tmp_path / "second", **params, output_dir=folder), ok=False)
        assert f"process {kernel} " in printed and "another run is writing" in printed
        os.kill(kernel, signal.SIGCONT)
        finish(first)
    finally:
        if kernel and first.poll() is None:
            os.kill(kernel, signal.SIGKILL)
        first.kill()
    assert manifest_of(folder) == manifest_of(tiny("03_tokenizer"))
