"""Run folders: one writer, whole files, equal manifests of equal runs, nothing overwritten unasked."""
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from recgen.core.errors import InputError, RunError
from recgen.core.files import TEMPORARY, atomic_write, read_json, write_json
from recgen.core.run import Run, acquire, hash_input, hash_manifest, release, verify_file

BASE = {"epochs": 5, "seed": 0, "overwrite": False, "resume": True, "log_level": "INFO", "output_dir": ""}


@pytest.fixture(autouse=True)
def fresh_runs(tmp_path, monkeypatch):
    "Runs go to a folder of this test."
    monkeypatch.setenv("RECGEN_RUNS", str(tmp_path / "runs"))


def open_run(folder="", inputs=None, stage="99_toy", **changes):
    return Run(stage, {**BASE, **changes}, inputs, "toy", str(folder))


def make(folder="", inputs=None, answer=42, **changes):
    "A finished run with one output."
    run = open_run(folder, inputs, **changes)
    if not run.finished:
        write_json(run.path("result.json"), {"answer": answer})
        run.start_log().info("done")
        run.finish({"test/score": 0.5})
    return run


def start_python(code: str, *arguments):
    "Another Python process; its first line of output is awaited."
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "ready", process.communicate()[1]
    return process


HOLD = """
    import sys, time
    from pathlib import Path
    from recgen.core.run import Run
    run = Run("99_toy", {"epochs": 5}, output_dir=sys.argv[1])
    run.path(".partial-left").write_text("half of a fi")
    print("ready", flush=True)
    time.sleep(60)
"""


# --- hashes and manifests


def test_equal_parameters_are_one_run_and_others_are_not():
    a, b = open_run(), None
    release(a.folder)
    same = {"overwrite": True, "resume": False, "log_level": "DEBUG"}
    for name, value in same.items():
        b = open_run(**{name: value})
        assert b.hash == a.hash and b.folder == a.folder, f"{name} does not change a result"
        release(b.folder)
    for name, value in {"epochs": 6, "seed": 1, "further": 1}.items():
        c = open_run(**{name: value})
        assert c.hash != a.hash and c.folder != a.folder, name
        release(c.folder)
    d = open_run(stage="98_toy")
    assert d.hash != a.hash
    release(d.folder)


def test_an_inputs_content_counts_and_its_path_does_not(tmp_path):
    for name, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.txt").write_text(text)
    hashes = {}
    for name in "abc":
        run = open_run(inputs={"data_path": str(tmp_path / name)}, data_path=str(tmp_path / name))
        hashes[name] = run.hash
        assert "data_path" not in run.identity["parameters"]
        release(run.folder)
    assert hashes["a"] == hashes["b"] != hashes["c"]
    (tmp_path / "a" / "data.txt").write_text("changed")
    assert hash_input(tmp_path / "a") != hash_input(tmp_path / "b")


def test_equal_runs_have_equal_manifests_apart_from_the_environment(tmp_path):
    source = make(tmp_path / "source")
    a, b = (make(tmp_path / name, {"data_path": source.folder}, data_path=str(source.folder)) for name in "ab")
    assert hash_manifest(a.manifest) == hash_manifest(b.manifest)
    plain = {k: v for k, v in a.manifest.items() if k != "environment"}
    assert plain == {k: v for k, v in b.manifest.items() if k != "environment"}
    text = json.dumps(plain)
    assert str(tmp_path) not in text and os.uname().nodename not in text and "seconds" not in text
    assert plain["inputs"] == {"data_path": hash_manifest(source.manifest)}
    assert list(plain["outputs"]) == ["result.json"] and plain["outputs"]["result.json"]["bytes"] == (tmp_path / "a" / "result.json").stat().st_size
    for key in ("stage", "format_version", "hash", "parameters", "parameters_hash", "metrics", "seed", "git", "versions", "device"):
        assert key in plain


def test_an_input_that_is_not_finished_is_refused(tmp_path):
    run = open_run(tmp_path / "a")
    with pytest.raises(InputError, match="not finished"):
        hash_input(run.folder)
    release(run.folder)
    with pytest.raises(InputError, match="does not exist"):
        open_run(tmp_path / "b", {"data_path": str(tmp_path / "nothing")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        open_run(tmp_path / "b", {"data_path": str(tmp_path / "empty")})
    assert not (tmp_path / "b").exists(), "refused before a folder was made"


# --- reuse, refuse, overwrite, resume


def test_finished_work_is_reused():
    first = make()
    before = first.path("manifest.json").stat().st_mtime_ns
    again = open_run()
    assert again.finished and again.folder == first.folder
    assert open_run(overwrite=True).finished, "overwrite replaces other runs, not the very same one"
    assert first.path("manifest.json").stat().st_mtime_ns == before


def test_another_run_in_a_finished_folder_is_refused_unless_overwritten(tmp_path):
    run = make(tmp_path / "a")
    before = run.path("manifest.json").read_bytes()
    with pytest.raises(RunError, match="parameters.epochs: 5 → 6") as e:
        open_run(tmp_path / "a", epochs=6)
    assert "overwrite=True" in str(e.value) and str(run.folder) in str(e.value)
    assert run.path("manifest.json").read_bytes() == before and read_json(run.path("result.json")) == {"answer": 42}
    replaced = open_run(tmp_path / "a", epochs=6, overwrite=True)
    assert not replaced.finished and not run.path("manifest.json").exists() and not run.path("result.json").exists()
    write_json(replaced.path("other.json"), {})
    assert list(replaced.finish()["outputs"]) == ["other.json"]


def test_an_unfinished_folder_is_resumed_or_refused(tmp_path):
    run = open_run(tmp_path / "a")
    write_json(run.path("checkpoints/last.pt"), {"half": "way"})
    release(run.folder)
    with pytest.raises(RunError, match="unfinished run with other parameters") as e:
        open_run(tmp_path / "a", epochs=6)
    assert "epochs: 5 → 6" in str(e.value) and run.path("checkpoints/last.pt").exists()
    resumed = open_run(tmp_path / "a")
    assert not resumed.finished and resumed.path("checkpoints/last.pt").exists()
    release(resumed.folder)
    afresh = open_run(tmp_path / "a", resume=False)
    assert not afresh.path("checkpoints/last.pt").exists()
    write_json(afresh.path("checkpoints/last.pt"), {"half": "way"})
    release(afresh.folder)
    other = open_run(tmp_path / "a", epochs=6, overwrite=True)
    assert not other.path("checkpoints/last.pt").exists()
    release(other.folder)


def test_files_of_others_are_kept_and_are_no_outputs(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="notes.txt"):
        open_run(folder)
    assert not (folder / ".run.json").exists()
    run = make(folder, overwrite=True)
    assert list(run.manifest["outputs"]) == ["result.json"]
    make(folder, epochs=6, overwrite=True)
    unfinished = open_run(folder, epochs=7, overwrite=True)
    release(unfinished.folder)
    replaced = make(folder, epochs=8, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine" and list(replaced.manifest["outputs"]) == ["result.json"]


def test_a_changed_or_lost_output_is_detected(tmp_path):
    run = make(tmp_path / "a")
    run.path("result.json").write_text('{"answer": 41}')
    with pytest.raises(RunError, match="damaged.*result.json"):
        open_run(tmp_path / "a")
    with pytest.raises(InputError, match="result.json"):
        verify_file(run.path("result.json"))
    run.path("result.json").unlink()
    with pytest.raises(RunError, match="damaged.*result.json"):
        open_run(tmp_path / "a")
    mended = make(tmp_path / "a", overwrite=True)
    assert verify_file(mended.path("result.json")) and open_run(tmp_path / "a").finished


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom the file system can refuse")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "a").mkdir(mode=0o500)
    with pytest.raises(RunError, match="cannot"):
        open_run(tmp_path / "a")


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(RunError, match="output_dir"):
        open_run(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "a file"


# --- the lock


def test_a_second_writer_is_refused_by_name_and_a_dead_one_is_taken_over(tmp_path):
    holder = start_python(HOLD, tmp_path / "a")
    try:
        with pytest.raises(RunError, match=f"process {holder.pid} "):
            open_run(tmp_path / "a")
        with pytest.raises(RunError, match=f"process {holder.pid} "):
            open_run(tmp_path / "a", overwrite=True)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / "a" / ".holder.json").exists() and not (tmp_path / "a" / "manifest.json").exists()
    assert (tmp_path / "a" / ".partial-left").exists()
    run = Run("99_toy", {"epochs": 5}, output_dir=str(tmp_path / "a"))
    assert read_json(run.path(".holder.json"))["pid"] == os.getpid()
    assert not list(run.folder.glob(TEMPORARY + "*")), "what the dead process was writing is gone"
    release(run.folder)
    assert not run.path(".holder.json").exists()


def test_one_process_may_reenter_and_exit_releases(tmp_path):
    acquire(tmp_path)
    acquire(tmp_path)
    release(tmp_path)
    release(tmp_path)
    ends = start_python(HOLD.replace("time.sleep(60)", "pass"), tmp_path / "b")
    assert ends.wait(30) == 0 and not (tmp_path / "b" / ".holder.json").exists()
    raises = start_python(HOLD.replace("time.sleep(60)", "raise ValueError"), tmp_path / "b")
    assert raises.wait(30) == 1 and not (tmp_path / "b" / ".holder.json").exists()


NOTEBOOK = """
    import sys
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell.instance()
    shell.run_cell("from recgen.core.run import Run", store_history=True)
    shell.run_cell(f"run = Run('99_toy', {{'epochs': 5}}, output_dir={sys.argv[1]!r})", store_history=True)
    shell.run_cell("1 + 1", store_history=True)
    print("ready", flush=True)
    sys.stdin.readline()
    shell.run_cell("raise ValueError('in a cell')", store_history=True)
    print("failed", flush=True)
    sys.stdin.readline()
"""


def test_a_failing_cell_gives_the_lock_back_while_its_kernel_lives(tmp_path):
    code = textwrap.dedent(NOTEBOOK)
    kernel = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        while kernel.stdout.readline().strip() != "ready":
            assert kernel.poll() is None
        with pytest.raises(RunError, match=f"process {kernel.pid} "):
            Run("99_toy", {"epochs": 5}, output_dir=str(tmp_path / "a"))
        kernel.stdin.write("\n")
        kernel.stdin.flush()
        while kernel.stdout.readline().strip() != "failed":
            assert kernel.poll() is None
        run = Run("99_toy", {"epochs": 5}, output_dir=str(tmp_path / "a"))
        assert kernel.poll() is None and not run.finished
        release(run.folder)
    finally:
        kernel.kill()
        kernel.communicate()


def test_an_exception_in_a_with_block_gives_the_lock_back(tmp_path):
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "a") as run:
        raise ZeroDivisionError
    assert not run.path(".holder.json").exists() and not run.path("manifest.json").exists()


# --- whole files


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"new": float("nan")})
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a.json", "w") as f:
        f.write("{")
        raise KeyboardInterrupt
    assert read_json(tmp_path / "a.json") == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


REWRITE = """
    import sys
    from recgen.core.files import write_json
    data = {str(i): i for i in range(60_000)}
    for i in range(10**9):
        write_json(sys.argv[1], {"i": i, "data": data, "again": i})
        if not i:
            print("ready", flush=True)
"""


def test_a_reader_never_sees_half_a_file_while_writers_are_killed(tmp_path):
    path, chance, seen = tmp_path / "big.json", random.Random(0), set()
    for _ in range(10):
        writer = start_python(REWRITE, path)
        try:
            end = time.monotonic() + chance.uniform(0.0, 0.25)
            while time.monotonic() < end:
                found = read_json(path)
                assert found["i"] == found["again"] and len(found["data"]) == 60_000
                seen.add(found["i"])
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        found = json.loads(path.read_text())
        assert found["i"] == found["again"] and len(found["data"]) == 60_000
    assert len(seen) > 1, "the file was read while it changed"
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(TEMPORARY)} <= {"big.json", "runs"}


def test_log_files_are_named_after_the_run(tmp_path):
    run = open_run(tmp_path / "a")
    run.start_log("kmeans", 5, 256).info("Epoch 5: Loss=0.1234")
    logs = list(run.path("logs").iterdir())
    assert len(logs) == 1 and logs[0].name.endswith("_toy_kmeans_ep5_bs256.log")
    assert logs[0].read_text().rstrip().endswith("INFO - Epoch 5: Loss=0.1234")
    assert not run.finish()["outputs"], "logs are no outputs"
    assert Path(run.folder).name == "a"


def test_a_run_refused_before_it_wrote_is_in_nobodys_way(tmp_path):
    first = open_run(tmp_path / "out")
    release(first.folder)  # it failed before its first output
    second = open_run(tmp_path / "out", epochs=6)
    assert not second.finished and second.hash != first.hash
    write_json(second.path("result.json"), {"answer": 1})
    release(second.folder)
    with pytest.raises(RunError, match="epochs: 6 → 7"):
        open_run(tmp_path / "out", epochs=7)


def test_a_kill_while_a_finished_run_is_cleared_leaves_a_folder_that_can_be_used(tmp_path, monkeypatch):
    done = make(tmp_path / "out")
    write_json(done.folder / "checkpoints" / "last.pt", {"of": "the old run"})
    (done.folder / "mine.txt").write_text("a stranger")

    def killed(folder, outputs):
        (folder / "manifest.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("recgen.core.run.clear_run", killed)
        with pytest.raises(KeyboardInterrupt):
            open_run(done.folder, epochs=6, overwrite=True)
    assert not (done.folder / "manifest.json").exists()
    again = open_run(done.folder, epochs=6)
    assert not again.finished and not again.path("result.json").exists() and not again.path("checkpoints/last.pt").exists()
    assert again.path("mine.txt").read_text() == "a stranger"
    again.finish()


def test_work_after_a_failed_cell_takes_the_lock_again(tmp_path):
    run = open_run(tmp_path / "out")
    release(run.folder)  # what a failed cell does
    run.start_log()
    script = "import sys; from pathlib import Path; from recgen.core.run import acquire; acquire(Path(sys.argv[1]))"
    refused = subprocess.run([sys.executable, "-c", script, str(run.folder)], capture_output=True, text=True)
    assert refused.returncode != 0 and f"process {os.getpid()}" in refused.stderr
    run.finish()
