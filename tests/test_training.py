"""The training loop: what is interrupted and resumed, split into parts or over processes, ends where one quiet run ends."""
import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from toy_tasks import RQVAES, Curve, ring_world, settings, train_everything, train_slowly

from recgen.core.errors import InputError, ParameterError, RunError
from recgen.core.files import read_torch
from recgen.core.processes import launch, shard
from recgen.core.training import Best, TrainSettings, fit, learning_rate_factor, log_records
from recgen.retrieval.sequences import PrefixSamples, token_table
from recgen.retrieval.training import train_tiger
from recgen.retrieval.transformer import Tiger, TigerConfig

BATCH_SIZES = (16, 7, 3)  # the last batch of 70: 6, 7 and 1 sample


def equal(a, b) -> bool:
    "Whether two checkpoints hold the same numbers, bit for bit."
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def same_run(a: Path, b: Path):
    "Assert that two folders hold the same training."
    for name in ("checkpoints/last.pt", "checkpoints/best.pt"):
        assert equal(read_torch(a / name), read_torch(b / name)), name
        assert (a / name).read_bytes() == (b / name).read_bytes(), f"{name}: equal numbers, other bytes"
    assert (a / "metrics.jsonl").read_text() == (b / "metrics.jsonl").read_text()
    assert sorted(p.name for p in (a / "checkpoints").iterdir()) == sorted(p.name for p in (b / "checkpoints").iterdir())


# --- resume

HOW = {"epochs": 6, "gradient_accumulate_every": 2, "early_stop_patience": 2, "early_stop_min_delta": 10.0, "save_every": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "Five batches in three optimizer steps an epoch; stops early after three epochs."
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer = fit(Curve(), settings(**HOW), folder)
    assert trainer.position.stopped and trainer.position.epoch == 3
    return folder


@pytest.mark.parametrize("save_minutes", [0.0, 5.0])
@pytest.mark.parametrize("call", range(1, 16))
def test_interrupted_anywhere_and_resumed_is_the_undisturbed_run(call, save_minutes, undisturbed, tmp_path):
    task = Curve()
    task.breaks_at = call
    with pytest.raises(ZeroDivisionError):
        fit(task, settings(**HOW, save_minutes=save_minutes), tmp_path)
    if save_minutes == 0 and call > 2:
        assert (tmp_path / "checkpoints" / "last.pt").exists(), "a checkpoint after every step"
    resumed = fit(Curve(), settings(**HOW, save_minutes=save_minutes), tmp_path)
    done = (call - 1) // 5 if save_minutes else None
    assert resumed.resumed_from == ((done, 0) if done else None) or not save_minutes
    same_run(undisturbed, tmp_path)


def test_interrupted_again_and_again(undisturbed, tmp_path):
    for _ in range(20):
        task = Curve()
        task.breaks_at = 3  # one optimizer step gets through
        try:
            fit(task, settings(**HOW, save_minutes=0.0), tmp_path)
        except ZeroDivisionError:
            continue
        break
    else:
        raise AssertionError("no step was ever kept")
    same_run(undisturbed, tmp_path)


def test_lines_that_a_killed_process_wrote_beyond_its_checkpoint_are_dropped(undisturbed, tmp_path):
    task = Curve()
    task.breaks_at = 8
    with pytest.raises(ZeroDivisionError):
        fit(task, settings(**HOW), tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"epoch": 2, "loss": 1.0}\n{"epoch": 3, "lo')
    fit(Curve(), settings(**HOW), tmp_path)
    same_run(undisturbed, tmp_path)


def test_a_finished_training_is_not_trained_again(undisturbed):
    before = (undisturbed / "checkpoints" / "last.pt").stat().st_mtime_ns
    task = Curve()
    again = fit(task, settings(**HOW), undisturbed)
    assert task.calls == 0 and again.trained == 0
    assert (undisturbed / "checkpoints" / "last.pt").stat().st_mtime_ns == before
    best = read_torch(undisturbed / "checkpoints" / "best.pt")
    assert equal(best["model"], dict(again.load_best().state_dict()))


def test_resume_false_starts_afresh(tmp_path):
    a = fit(Curve(), settings(), tmp_path)
    b = fit(Curve(), settings(resume=False), tmp_path)
    assert b.resumed_from is None and b.position.records == a.position.records and b.trained == a.trained > 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_leaves(number, tmp_path):
    script = Path(__file__).with_name("toy_tasks.py")
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "a")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "a" / "checkpoints" / "last.pt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.03)
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -number
    position = read_torch(tmp_path / "a" / "checkpoints" / "last.pt")["position"]
    assert 1 <= position["epoch"] < 8
    resumed = train_slowly(tmp_path / "a")
    assert resumed.resumed_from == (position["epoch"], position["group"])
    train_slowly(tmp_path / "b")
    same_run(tmp_path / "a", tmp_path / "b")


# --- checkpoints that must not be used


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_torn_checkpoint_is_refused(damage, undisturbed, tmp_path):
    whole = (undisturbed / "checkpoints" / "last.pt").read_bytes()
    torn = {"cut": whole[: len(whole) // 2], "empty": b"", "noise": b"PK\x03\x04" + b"\x00\xff" * 500}[damage]
    path = tmp_path / "checkpoints" / "last.pt"
    path.parent.mkdir()
    path.write_bytes(torn)
    task = Curve()
    with pytest.raises(InputError, match="last.pt"):
        fit(task, settings(**HOW), tmp_path)
    assert task.calls == 0 and path.read_bytes() == torn


def test_another_runs_checkpoint_is_refused_with_the_differences(tmp_path):
    fit(Curve(), settings(), tmp_path, {"inputs": {"data_path": "aaa"}})
    before = (tmp_path / "checkpoints" / "last.pt").read_bytes()
    with pytest.raises(RunError, match="learning_rate: 0.02 → 0.05") as e:
        fit(Curve(), settings(learning_rate=0.05), tmp_path, {"inputs": {"data_path": "bbb"}})
    assert "inputs.data_path: aaa → bbb" in str(e.value) and "mend" in str(e.value)
    assert (tmp_path / "checkpoints" / "last.pt").read_bytes() == before


# --- one step in parts


@pytest.mark.parametrize("n", [128, 150, 65])  # 150: a last group of two batches; 65: of one sample
def test_accumulated_gradients_are_the_large_batch(n):
    whole = fit(Curve(64, 0.0, n), settings())
    parts = fit(Curve(16, 0.0, n), settings(gradient_accumulate_every=4))
    for a, b in zip(whole.module.parameters(), parts.module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=0)
    for a, b in zip(whole.position.records, parts.position.records, strict=True):
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) < 1e-6 for k in a)
    assert whole.position.step == parts.position.step == 4 * -(-n // 64)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shards_average_to_the_mean_of_the_batch(size, world):
    batch = torch.randn(size, generator=torch.Generator().manual_seed(size)).double()
    parts = [shard(batch, rank, world) for rank in range(world)]
    assert sum(w * p.mean() for p, w in parts) / world == pytest.approx(float(batch.mean()))
    assert sum(len(p) for p, w in parts if w) == size


# --- several processes


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    "The same trainings in this process and in two gloo processes."
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    train_everything(one, BATCH_SIZES)
    launch(train_everything, (two, BATCH_SIZES), 2)
    return one, two


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"curve{size}" for size in BATCH_SIZES), "often", "tiger", *RQVAES])
def test_two_processes_are_one(name, one_and_two):
    a, b = (read_torch(folder / name / "checkpoints" / "last.pt") for folder in one_and_two)
    for key in a["model"]:
        assert torch.allclose(a["model"][key], b["model"][key], atol=1e-5, rtol=1e-5), key
    records = [[json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()] for folder in one_and_two]
    assert len(records[0]) == len(records[1]) == a["position"]["epoch"] > 0
    for x, y in zip(*records, strict=True):
        assert x.keys() == y.keys() and any(k.startswith("valid/") for k in x)
        assert all(x[k] == pytest.approx(y[k], abs=1e-5) for k in x)
    assert a["position"]["samples"] == b["position"]["samples"] and a["position"]["step"] == b["position"]["step"]
    assert len(a["rng"]) == 1 and len(b["rng"]) == 2
    files = [sorted(p.relative_to(folder / name).as_posix() for p in (folder / name).rglob("*")) for folder in one_and_two]
    assert files[0] == files[1], "one writer, whatever the number of processes"


@pytest.mark.slow
def test_a_training_in_two_processes_is_finished_for_one(one_and_two):
    task = Curve(16, 0.0)
    trainer = fit(task, settings(gradient_accumulate_every=2), one_and_two[1] / "curve16")
    assert task.calls == 0 and trainer.position.epoch == 4


def test_a_notebooks_function_is_refused_in_several_processes():
    def local():
        pass

    local.__module__ = "__main__"
    with pytest.raises(ParameterError, match="module"):
        launch(local, (), 2)


# --- choosing and stopping


class Scripted(Curve):
    "A task whose evaluations are given."

    def __init__(self, values):
        super().__init__(dropout=0.0)
        self.values, self.seen = values, []

    def evaluate(self, model):
        self.seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"valid/score": self.values[len(self.seen) - 1]}


@pytest.mark.parametrize("mode, values, best, epochs", [
    ("max", [0.1, 0.3, 0.2, 0.25, 0.9], 2, 4),  # two without improvement: stop before the 0.9
    ("min", [0.9, 0.3, 0.4, 0.2, 0.5, 0.6, 0.1], 4, 6),
    ("max", [0.5, 0.5, 0.5, 0.9], 1, 3),  # equal is no improvement
    ("max", [0.1, 0.2, 0.3, 0.4], 4, 4),
])
def test_early_stop_and_the_best_checkpoint(mode, values, best, epochs, tmp_path):
    task = Scripted(values)
    trainer = fit(task, settings(epochs=len(values), best_metric="valid/score", best_mode=mode, early_stop_patience=2), tmp_path)
    assert trainer.best.epoch == best and trainer.position.epoch == epochs and trainer.best.value == values[best - 1]
    chosen = trainer.load_best().state_dict()
    assert all(chosen[k].equal(v) for k, v in task.seen[best - 1].items())
    assert read_torch(tmp_path / "checkpoints" / "best.pt")["position"]["epoch"] == best


def test_improvements_below_min_delta_do_not_count():
    best = Best("min", 0.1)
    assert [best.update(v, e) for e, v in enumerate([1.0, 0.95, 0.85, 0.8, 0.74])] == [True, False, True, False, True]


def test_evaluation_every_few_epochs_and_at_the_end():
    task = Scripted([0.1] * 9)
    trainer = fit(task, settings(epochs=5, eval_every=2, best_metric="valid/score"))
    assert [r["epoch"] for r in trainer.position.records if "valid/score" in r] == [2, 4, 5]


def test_a_metric_that_the_evaluation_does_not_have_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="valid/scor"):
        fit(Scripted([0.1]), settings(best_metric="valid/scor"), tmp_path)


def test_an_evaluation_that_draws_numbers_changes_nothing():
    class Draws(Curve):
        def evaluate(self, model):
            torch.rand(17)
            return super().evaluate(model)

    assert fit(Draws(), settings()).position.records == fit(Curve(), settings()).position.records


# --- schedules, clipping, precision


def test_learning_rates():
    assert [learning_rate_factor(s, 10, 4, "constant") for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [learning_rate_factor(s, 12, 2, "linear") for s in (2, 7, 12, 99)] == pytest.approx([1, 0.5, 0, 0])
    assert [learning_rate_factor(s, 12, 2, "cosine") for s in (2, 7, 12)] == pytest.approx([1, 0.5, 0])
    assert [learning_rate_factor(s, 0, 4, "inverse_sqrt") for s in (3, 4, 16, 64)] == pytest.approx([1, 1, 0.5, 0.25])
    trainer = fit(Curve(35), settings(epochs=5, scheduler="linear", warmup_steps=0, learning_rate=1.0))
    assert [r["learning_rate"] for r in trainer.position.records] == pytest.approx([0.9, 0.7, 0.5, 0.3, 0.1])


def gradient_norms(**changes):
    "The gradient's norm at every optimizer step."
    from recgen.core.training import Trainer

    trainer, norms = Trainer(Curve(dropout=0.0), settings(**changes)), []

    def look(*_):
        norms.append(float(torch.cat([p.grad.flatten() for p in trainer.module.parameters()]).norm()))

    trainer.optimizer.optimizer.register_step_pre_hook(look)
    trainer.run()
    return norms


def test_gradients_are_clipped():
    assert max(gradient_norms(grad_clip=0.0)) > 0.5
    clipped = gradient_norms(grad_clip=0.05)
    assert max(clipped) <= 0.05 * (1 + 1e-4) and clipped[0] == pytest.approx(0.05, rel=1e-3)


def test_bf16_trains_on_the_cpu():
    trainer = fit(Curve(dropout=0.0), settings(epochs=12, precision="bf16"))
    losses = [r["loss"] for r in trainer.position.records]
    assert losses[-1] < 0.5 * losses[0] and all(p.dtype == torch.float32 for p in trainer.module.parameters())
    assert losses != [r["loss"] for r in fit(Curve(dropout=0.0), settings(epochs=12)).position.records]


@pytest.mark.parametrize("wrong, name", [({"precision": "fp16"}, "fp16"), ({"scheduler": "cosinus"}, "cosinus"), ({"epochs": 0}, "epochs"), ({"precision": "fp8"}, "fp8")])
def test_settings_that_are_refused(wrong, name, tmp_path):
    with pytest.raises(ParameterError, match=name):
        fit(Curve(), settings(**wrong), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_a_number_ends_the_run(tmp_path):
    class Breaks(Curve):
        def loss(self, model, index):
            return super().loss(model, index) * (float("nan") if self.calls > 6 else 1)

    with pytest.raises(RunError, match="epoch 2"):
        fit(Breaks(), settings(), tmp_path)
    kept = read_torch(tmp_path / "checkpoints" / "last.pt")
    assert kept["position"]["epoch"] == 1 and all(v.isfinite().all() for v in kept["model"].values())


def test_a_validation_metric_that_is_not_a_number_ends_the_run(tmp_path):
    with pytest.raises(RunError, match="NaN"):
        fit(Scripted([0.1, float("nan")]), settings(best_metric="valid/score"), tmp_path)


def test_every_setting_can_be_stored():
    assert TrainSettings(**json.loads(json.dumps(asdict(settings())))) == settings()


def test_records_of_other_processes_are_logged_as_the_tasks_words_them(tmp_path):
    class Log(list):
        info = list.append

    trainer, seen, plain = fit(Curve(), settings(), tmp_path), Log(), Log()
    log_records(trainer.position.records, seen, lambda record: f"{record['epoch']} of 4")
    log_records(trainer.position.records, plain)
    assert seen == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"] and plain[2].startswith("Epoch 3: Loss=")


# --- TIGER in several processes

TIGERS = {  # name: (shape, settings, path, augmentation)
    "whole": ({}, {"gradient_accumulate_every": 1}, "exact", "prefix"),
    "in_parts": ({}, {"gradient_accumulate_every": 2}, "beam", "prefix"),
    "users": ({"separator": True, "num_user_embeddings": 7}, {"gradient_accumulate_every": 2, "batch_size": 7}, "exact", "subsample"),
}


def train_tigers(folder):
    "In one process or several: a few steps of small models, without dropout. Batches of 13 and of 7 leave parts of unequal size."
    for name, (shape, how, path, augmentation) in TIGERS.items():
        sequences, _, trie, valid, ids = ring_world()
        config = TigerConfig(sizes=ids.sizes, embedding_dim=16, attn_dim=16, num_heads=2, ff_dim=32, encoder_layers=1, decoder_layers=1, dropout=0.0, **shape)
        chosen = TrainSettings(**{"epochs": 2, "batch_size": 13, "learning_rate": 1e-3, "warmup_steps": 4, "best_metric": "valid/item/filtered/ndcg@10", "device": "cpu", **how})
        table = token_table(ids, 24, separator=config.separator)
        train_tiger(config, chosen, sequences, table, trie, valid, path, 20, folder / name, augmentation=augmentation)


@pytest.fixture(scope="module")
def tigers(tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    train_tigers(one)
    launch(train_tigers, (two,), 2)
    return one, two


@pytest.mark.slow
@pytest.mark.parametrize("name", TIGERS)
def test_tiger_in_two_processes_is_tiger_in_one(name, tigers):
    a, b = (read_torch(folder / name / "checkpoints" / "last.pt") for folder in tigers)
    assert a["position"]["step"] == b["position"]["step"] >= 10 and len(a["rng"]) == 1 and len(b["rng"]) == 2
    assert a["model"].keys() == b["model"].keys()
    for key in a["model"]:
        assert torch.allclose(a["model"][key], b["model"][key], atol=1e-5, rtol=1e-5), key
    assert len(a["position"]["records"]) == len(b["position"]["records"]) == 2
    for x, y in zip(a["position"]["records"], b["position"]["records"], strict=True):
        assert x.keys() == y.keys() and {"loss", "valid/item/filtered/recall@10", "valid/item/filtered/ndcg@10"} <= x.keys()
        assert all(x[k] == pytest.approx(y[k], abs=1e-5) for k in x)
    first, last = (a["position"]["records"][i]["loss"] for i in (0, -1))
    assert last < first, "it learns, so that equal is not equal for want of steps"


# --- compiled


@pytest.fixture
def graphs(monkeypatch):
    "torch.compile with a backend that runs each graph as it stands, and keeps it: what is tested is ours and dynamo's part, without minutes of C++."
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_module(self, backend=backend, **how))
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


def test_a_compiled_tiger_trains_as_a_plain_one(graphs, tmp_path):
    def run(folder, epochs=2, **changes):
        sequences, table, trie, valid, ids = ring_world()
        config = TigerConfig(sizes=ids.sizes, embedding_dim=16, attn_dim=16, num_heads=2, ff_dim=32, encoder_layers=1, decoder_layers=1, dropout=0.0)
        how = TrainSettings(epochs=epochs, batch_size=13, learning_rate=1e-3, scheduler="constant", best_metric="valid/item/filtered/ndcg@10", device="cpu", **changes)
        lengths = {int(b.numel()) for b in PrefixSamples.from_sequences(sequences).batches(13, torch.Generator().manual_seed(0))}
        assert len(lengths) > 1, "the last batch is smaller"
        return train_tiger(config, how, sequences, table, trie, valid, "exact", 20, folder)

    plain = run(tmp_path / "plain", compile="no")
    assert not graphs
    compiled = run(tmp_path / "compiled", compile="yes")
    assert 1 <= len(graphs) <= 3, "one graph for training and one for evaluation, whatever the batches' lengths"
    for a, b in zip(plain.position.records, compiled.position.records, strict=True):
        assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], abs=1e-5) for k in a)
    states = [read_torch(tmp_path / name / "checkpoints" / "last.pt")["model"] for name in ("plain", "compiled")]
    assert states[0].keys() == states[1].keys() and all(torch.allclose(states[0][k], states[1][k], atol=1e-5) for k in states[0])
    best = compiled.load_best()
    assert best.encode(torch.ones(2, 4, dtype=torch.long))[0].isfinite().all() and Tiger(best.config).load_state_dict(best.state_dict())


class Named(Curve):
    "The curve's network in a module with a forward of its own: dynamo leaves those of torch.nn itself alone."

    class Net(torch.nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return self.layers(x)

    def __init__(self):
        super().__init__()
        self.model = self.Net(self.model)


def test_a_checkpoint_of_a_compiled_training_is_resumed_by_a_plain_one(graphs, tmp_path):
    how = {"gradient_accumulate_every": 2}
    fit(Named(), settings(**how), tmp_path / "plain")
    task = Named()
    task.breaks_at = 12
    with pytest.raises(ZeroDivisionError):
        fit(task, settings(compile="yes", **how), tmp_path / "cut")
    assert graphs
    resumed = fit(Named(), settings(compile="no", **how), tmp_path / "cut")
    assert resumed.resumed_from == (2, 0)
    same_run(tmp_path / "plain", tmp_path / "cut")


def test_on_a_cpu_nothing_is_compiled_unasked(graphs):
    fit(Named(), settings(compile="auto"))
    assert not graphs
    with pytest.raises(ParameterError, match="compile"):
        fit(Curve(), settings(compile="maybe"))


def test_the_best_weights_are_kept_without_a_folder_too(tmp_path):
    states = []
    for folder in (None, tmp_path):
        trainer = fit(Curve(), settings(epochs=6, best_mode="max"), folder)  # the worst epoch is chosen: an early one
        assert trainer.best.epoch < trainer.position.epoch
        last = {k: v.clone() for k, v in trainer.module.state_dict().items()}
        states.append({k: v.clone() for k, v in trainer.load_best().state_dict().items()})
        assert not equal(states[-1], last)
    assert equal(*states)
