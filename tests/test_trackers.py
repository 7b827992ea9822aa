"""Experiment trackers: what they hold is what was trained, and nothing they do reaches the training."""
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from toy_tasks import Curve, settings

from recgen.core import trackers as module
from recgen.core.errors import ParameterError
from recgen.core.processes import launch
from recgen.core.run import Run
from recgen.core.trackers import Tracker, Trackers, hyperparameters, tracker_names
from recgen.core.training import TrainSettings, fit, learning_rate_factor

PER_EPOCH = 5  # optimizer steps of Curve: 70 samples in batches of 16


@pytest.fixture(autouse=True)
def no_servers(monkeypatch):
    "No tracker is told of a server, and none reports home."
    for name in [n for n in os.environ if n.startswith(("WANDB_", "MLFLOW_"))]:
        if name != "WANDB_SERVICE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def train(folder, task=None, report_to="tensorboard", log=None, **changes):
    return fit(task or Curve(), settings(**{"report_to": report_to, "log_interval": 1, **changes}), folder, None, log)


def events(folder: Path) -> dict:
    "{name: {step: value}} of a run's TensorBoard files; a step that stands twice fails."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "trackers" / "tensorboard" / "recgen"), size_guidance={"scalars": 0}).Reload()
    out = {}
    for tag in read.Tags()["scalars"]:
        points = [(e.step, e.value) for e in read.Scalars(tag)]
        out[tag] = dict(points)
        assert len(out[tag]) == len(points), f"{tag}: a step stands twice"
    return out


def event_files(folder: Path) -> list:
    return sorted(p.name for p in (folder / "trackers" / "tensorboard" / "recgen").glob("events*"))


# --- what a tracker holds


def test_tensorboard_holds_steps_epochs_and_settings(tmp_path):
    task = Curve()
    trainer = train(tmp_path, task)
    found, steps = events(tmp_path), trainer.position.step
    assert steps == 4 * PER_EPOCH and list(found["train/loss"]) == list(range(1, steps + 1))
    weights = [16, 16, 16, 16, 6]
    for record in trainer.position.records:
        for name in ("loss", "learning_rate", "valid/error", "epoch"):
            assert found[name][record["step"]] == pytest.approx(record[name], rel=1e-6)
        last = record["step"]
        mean = sum(w * found["train/loss"][last - PER_EPOCH + 1 + i] for i, w in enumerate(weights)) / 70
        assert mean == pytest.approx(record["loss"], rel=1e-5), "the steps' losses are those of which the epoch's is the mean"
    for step, rate in found["train/learning_rate"].items():
        assert rate == pytest.approx(0.02 * learning_rate_factor(step - 1, steps, 3, "cosine"), rel=1e-5)
    assert len(found["loss"]) == 4 and not {"step", "name"} - {"step"} & set(found)
    told = "".join(p.read_text() for p in (tmp_path / "trackers").rglob("hparams.yml"))
    assert "learning_rate: 0.02" in told and "epochs: 4" in told


@pytest.mark.parametrize("interval, expected", [(3, [3, 6, 9, 12, 15, 18]), (20, [20]), (21, [])])
def test_steps_are_reported_at_the_interval(interval, expected, tmp_path):
    train(tmp_path, log_interval=interval)
    found = events(tmp_path)
    assert list(found.get("train/loss", {})) == expected and len(found["loss"]) == 4


def test_parts_of_a_loss_are_reported(tmp_path):
    class Halves(Curve):
        parts = ("left", "right")

        def loss(self, model, index):
            whole = super().loss(model, index)
            return torch.stack([whole, 0.25 * whole, 0.75 * whole])

    train(tmp_path, Halves())
    found = events(tmp_path)
    for step, loss in found["train/loss"].items():
        assert found["train/left"][step] == pytest.approx(0.25 * loss) and found["train/right"][step] == pytest.approx(0.75 * loss)


def test_the_tasks_shape_is_told():
    task = Curve()
    task.config = {"sizes": [4, 6], "inner": {"width": 3}, "none": None}
    told = hyperparameters(TrainSettings(epochs=3), task)
    assert told["epochs"] == 3 and told["config.sizes"] == "[4, 6]" and told["config.inner.width"] == 3 and told["config.none"] == "None"
    assert all(isinstance(v, (bool, int, float, str)) for v in told.values())


# --- a training that is interrupted


@pytest.mark.parametrize("call", [2, 8, 11, 14])
def test_after_a_resume_the_curves_go_on(call, tmp_path):
    train(tmp_path / "whole")
    task = Curve()
    task.breaks_at = call
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "cut", task)
    assert len(events(tmp_path / "cut")["train/loss"]) == call - 1, "steps behind the last checkpoint were reported too"
    train(tmp_path / "cut")
    whole, cut = events(tmp_path / "whole"), events(tmp_path / "cut")
    assert whole == cut
    sessions = list((tmp_path / "cut" / "trackers").rglob("hparams.yml"))
    assert len(sessions) == (1 if call > PER_EPOCH else 2), "a resumed run is the same run; one without a checkpoint starts afresh"


def test_started_afresh_the_old_curves_are_gone(tmp_path):
    train(tmp_path, epochs=6)
    train(tmp_path, epochs=2, resume=False)
    assert list(events(tmp_path)["train/loss"]) == list(range(1, 2 * PER_EPOCH + 1))


def test_a_finished_training_opens_nothing(tmp_path):
    train(tmp_path)
    before = event_files(tmp_path)
    train(tmp_path)
    assert len(before) == 1 and event_files(tmp_path) == before


def test_a_resume_may_choose_other_trackers(tmp_path):
    task = Curve()
    task.breaks_at = 8
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, task, report_to="none")
    assert not (tmp_path / "trackers").exists()
    resumed = train(tmp_path, project="recgen", log_interval=2)
    assert resumed.resumed_from == (1, 0) and list(events(tmp_path)["train/loss"]) == [6, 8, 10, 12, 14, 16, 18, 20]


# --- it changes nothing


def test_training_is_the_same_with_and_without(tmp_path):
    train(tmp_path / "with")
    train(tmp_path / "without", report_to="none")
    for name in ("checkpoints/last.pt", "checkpoints/best.pt", "metrics.jsonl"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name


def test_tracker_files_are_no_outputs_of_a_run(runs):
    how = {"epochs": 4, "overwrite": False}
    with Run("99_toy", how) as run:
        train(run.folder)
    assert list((run.folder / "trackers").rglob("events*"))
    with Run("99_toy", how) as run:  # an unfinished folder: trackers are in nobody's way
        train(run.folder)
        outputs = run.finish()["outputs"]
    assert outputs and not [n for n in outputs if n.startswith("trackers")]
    next(iter((run.folder / "trackers").rglob("events*"))).unlink()
    assert Run("99_toy", how).finished, "who tidies up the curves does not damage the run"


def train_tracked(folder):
    "For several processes."
    fit(Curve(16, 0.0), settings(report_to="tensorboard", log_interval=2, gradient_accumulate_every=2), folder)


@pytest.mark.slow
def test_one_of_two_processes_reports_for_both(tmp_path):
    train_tracked(tmp_path / "one")
    launch(train_tracked, (tmp_path / "two",), 2)
    one, two = events(tmp_path / "one"), events(tmp_path / "two")
    assert one.keys() == two.keys() and len(event_files(tmp_path / "two")) == 1
    for name in one:
        assert list(one[name]) == list(two[name]) and list(one[name].values()) == pytest.approx(list(two[name].values()), abs=1e-5), name


# --- trackers that fail


class Fake:
    "A tool's adapter that fails where it is told to."

    fails, calls = "", None

    def __init__(self, project, *args, **options):
        type(self).calls = []
        self.note("init")

    def note(self, name):
        self.calls.append(name)
        if self.fails == name and (name != "log" or self.calls.count("log") == 3):
            raise OSError(28, "No space left on device")

    def start(self):
        self.note("start")

    def store_init_configuration(self, values):
        self.note("config")

    def log(self, values, step):
        self.note("log")

    def finish(self):
        self.note("finish")


@pytest.fixture
def fake(monkeypatch):
    "accelerate's tensorboard adapter replaced by one that fails at a given call."
    from accelerate import tracking

    def put(fails, name="tensorboard"):
        kind = type("Fake", (Fake,), {"fails": fails})
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, kind)
        return kind

    return put


@pytest.mark.parametrize("fails, calls", [("init", 1), ("start", 2), ("config", 3), ("log", 7), ("finish", 28)])
def test_a_tracker_that_fails_does_not_end_the_training(fails, calls, fake, tmp_path, caplog):
    import logging

    kind = fake(fails)
    trainer = train(tmp_path, log=logging.getLogger("test.trackers"))
    assert trainer.position.records == fit(Curve(), settings()).position.records
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == 1 and "tensorboard failed" in said[0] and "No space left" in said[0]
    assert len(kind.calls) == calls and (kind.calls[-1] == "finish") == (fails in ("log", "finish")), kind.calls


def test_without_a_log_the_warning_is_pythons(fake, tmp_path):
    fake("log")
    with pytest.warns(UserWarning, match="tensorboard failed.*goes on without it"):
        train(tmp_path)


def test_one_that_fails_does_not_silence_the_others(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "installed", lambda name: True)
    fake("log", "mlflow")
    with pytest.warns(UserWarning, match="mlflow failed"):
        train(tmp_path, report_to="mlflow,tensorboard")
    assert len(events(tmp_path)["train/loss"]) == 4 * PER_EPOCH


def test_a_training_that_fails_closes_its_trackers(fake, tmp_path):
    kind, task = fake(""), Curve()
    task.breaks_at = 7
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, task)
    assert kind.calls[-1] == "finish" and kind.calls.count("log") == 7


def test_a_memory_that_is_damaged_means_new_runs(tmp_path):
    for text in ("", "[", '{"tensorboard": '):
        (tmp_path / "trackers").mkdir(exist_ok=True)
        (tmp_path / "trackers" / "runs.json").write_text(text)
        with Trackers("tensorboard", folder=tmp_path) as trackers:
            trackers.open(3, {}, fresh=False)
            assert [t.tool is not None for t in trackers.running] == [True]
        assert json.loads((tmp_path / "trackers" / "runs.json").read_text()) == {"tensorboard": "recgen"}


# --- what is refused


@pytest.mark.parametrize("report_to, words", [("tensorbord", "tensorbord"), ("tensorboard,comet", "comet"), ("TensorBoard", "tensorboard")])
def test_an_unknown_tracker_is_refused(report_to, words, tmp_path):
    task = Curve()
    with pytest.raises(ParameterError, match=words):
        train(tmp_path, task, report_to=report_to)
    assert task.calls == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    task = Curve()
    with pytest.raises(ParameterError, match=r"recgen\[track\]") as e:
        train(tmp_path, task, report_to=name)
    assert name in str(e.value) and task.calls == 0 and not list(tmp_path.iterdir())


def test_a_folder_of_a_trackers_name_is_not_the_tracker(monkeypatch, tmp_path):
    (tmp_path / "aim_of_nobody").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not module.installed("aim_of_nobody") and module.installed("json")


def test_other_settings_that_are_refused(tmp_path):
    with pytest.raises(ParameterError, match="run folder"):
        train(None)
    with pytest.raises(ParameterError, match="log_interval"):
        train(tmp_path, log_interval=0)
    assert tracker_names("none") == tracker_names("") == [] and tracker_names(" tensorboard ,none,tensorboard") == ["tensorboard"]


# --- the others, where they are installed


def wandb_records(path: Path):
    "The records of an offline run's file: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB; chunks of checksum, length, kind, bytes)."
    data, place, held = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        held += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield held
            held = b""


def wandb_history(folder: Path) -> list:
    "[(run id, {name: value})] of the offline runs in a folder, in order of time."
    from wandb.proto import wandb_internal_pb2

    out = []
    for path in sorted((folder / "trackers" / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        for data in wandb_records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                out.append((path.stem, {"_step": record.history.step.num, **row}))
    return out


def test_wandb_works_offline(tmp_path):
    wandb = pytest.importorskip("wandb")
    train(tmp_path / "whole", report_to="wandb")
    task = Curve()
    task.breaks_at = 8
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "cut", task, report_to="wandb")
    trainer = train(tmp_path / "cut", report_to="wandb")
    wandb.teardown()  # its service writes the last bytes some 20 ms after finish() has returned
    whole, cut = wandb_history(tmp_path / "whole"), wandb_history(tmp_path / "cut")
    assert len({run for run, _ in cut}) == 1, "a resumed run keeps its id"
    for history in (whole, cut):
        points = {row["_step"]: row for _, row in history}  # the later of two, as after a sync
        assert sorted(points) == list(range(1, 4 * PER_EPOCH + 1))
        for record in trainer.position.records:
            assert points[record["step"]]["valid/error"] == pytest.approx(record["valid/error"])
            assert points[record["step"]]["loss"] == pytest.approx(record["loss"]) and "train/loss" in points[record["step"]]
    steps = [row["_step"] for _, row in cut]
    assert steps == [*range(1, 8), *range(6, 21)], "the second part begins behind the checkpoint"


def test_mlflow_keeps_a_store_in_the_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    task = Curve()
    task.breaks_at = 8
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "a", task, report_to="mlflow")
    trainer = train(tmp_path / "a", report_to="mlflow")
    train(tmp_path / "b", report_to="mlflow")
    assert [n for n in os.environ if n.startswith("MLFLOW_")] == ["MLFLOW_DISABLE_TELEMETRY"] and mlflow.active_run() is None
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for folder in ("a", "b"):
        client = mlflow.MlflowClient((tmp_path / folder / "trackers" / "mlflow").as_uri())
        found = [e for e in client.search_experiments() if e.name == "recgen"]
        runs = client.search_runs([found[0].experiment_id])
        assert len(found) == len(runs) == 1 and runs[0].data.params["learning_rate"] == "0.02" and runs[0].info.run_name == folder
        points = {name: {m.step: m.value for m in client.get_metric_history(runs[0].info.run_id, name)} for name in ("train/loss", "valid/error")}
        assert sorted(points["train/loss"]) == list(range(1, 4 * PER_EPOCH + 1))
        assert points["valid/error"] == pytest.approx({r["step"]: r["valid/error"] for r in trainer.position.records})


def test_a_server_that_is_named_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "somewhere")
    assert module.mlflow_environment(tmp_path) == {}
    pytest.importorskip("wandb")
    assert module.wandb_options(tmp_path)["mode"] == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert module.wandb_options(tmp_path)["mode"] is None


def test_a_tracker_is_silent_after_its_first_error():
    tracker = Tracker("tensorboard")
    with pytest.warns(UserWarning) as said:
        for _ in range(3):
            assert tracker.guarded(lambda: 1 / 0) is None
    assert len(said) == 1
