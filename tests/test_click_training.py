"""Training and predicting clicks: the optimizer's rows, resume, order and bounds of prediction, what is refused."""
import json

import pandas as pd
import pytest
import torch
from toy_clicks import HOW, N, log, shape, table, train_in_shares

from recgen.clicks.data import Clicks
from recgen.clicks.din import Din, DinConfig
from recgen.clicks.features import features_of, item_table
from recgen.clicks.training import ClickTask, RowAdam, predict, predict_logits, train_din
from recgen.core.errors import InputError, RunError
from recgen.core.files import read_torch
from recgen.core.processes import launch
from recgen.core.ragged import Ragged
from recgen.core.training import Trainer, TrainSettings
from recgen.evaluation.classification import binary_metrics

# --- the optimizer


def sparse_and_dense(steps, clip=0.0, decay=0.0, rows=lambda s: torch.arange(12)):
    "The same table trained with sparse and with dense gradients."
    ends = []
    start = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    for sparse in (True, False):
        emb = torch.nn.Embedding(12, 3, sparse=sparse)
        emb.weight.data.copy_(start)
        bias = torch.nn.Parameter(torch.zeros(3))
        optimizer = RowAdam([{"params": [emb.weight], "weight_decay": decay}, {"params": [bias], "weight_decay": 0.0}], 0.05, clip)
        for s in range(steps):
            ((emb(rows(s)) - bias - 1).pow(3).abs().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append((emb.weight.detach(), bias.detach(), optimizer))
    return start, *ends


@pytest.mark.parametrize("clip", [0.0, 0.7])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lazy_is_dense_where_every_row_is_touched(clip, decay):
    _, (a, bias_a, _), (b, bias_b, _) = sparse_and_dense(5, clip, decay)
    assert torch.allclose(a, b, atol=1e-5) and torch.allclose(bias_a, bias_b, atol=1e-5)


def test_repeated_rows_count_once_with_their_summed_gradient():
    _, (a, *_), (b, *_) = sparse_and_dense(4, rows=lambda s: torch.arange(12).repeat(2))
    assert torch.allclose(a, b, atol=1e-5)


def test_untouched_rows_rest_and_late_rows_step_as_far_as_early_ones():
    start, (a, *_), _ = sparse_and_dense(6, rows=lambda s: torch.tensor([0, 1] if s < 5 else [7]))
    assert torch.equal(a[[3, 11]], start[[3, 11]]) and not torch.equal(a[0], start[0])
    assert torch.allclose((a[7] - start[7]).abs(), torch.full((3,), 0.05), atol=1e-4)  # the first Adam step is the learning rate, whenever it comes


def test_clipping_takes_sparse_and_dense_gradients_together():
    emb, bias = torch.nn.Embedding(4, 1, sparse=True), torch.nn.Parameter(torch.zeros(1))
    optimizer = RowAdam([{"params": [emb.weight, bias], "weight_decay": 0.0}], 0.1, clip=5.0)
    (30 * emb(torch.tensor([2])).sum() + 40 * bias.sum()).backward()
    optimizer.step()
    assert torch.allclose(bias.grad, torch.tensor([4.0]), atol=1e-4) and torch.allclose(optimizer.state[emb.weight]["exp_avg"][2], torch.tensor([0.3]), atol=1e-5)


def test_a_model_with_lazy_tables_trains_near_one_without():
    ends = [train_din(shape(lazy_rows=n, dropout=0.0, unknown_rate=0.0), TrainSettings(**{**HOW, "batch_size": 300, "epochs": 1}), log()).module for n in (10, 20_000)]
    assert ends[0].encoder.ids.table.sparse and not ends[1].encoder.ids.table.sparse
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True))  # one step from the same start is the same


def test_gradient_accumulation_is_one_large_batch():
    ends = [train_din(shape(lazy_rows=10, dropout=0.0, unknown_rate=0.0), TrainSettings(**{**HOW, "epochs": 1, "batch_size": size, "gradient_accumulate_every": n}), log()).module
            for size, n in ((300, 1), (150, 2))]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True))


# --- resume


@pytest.mark.parametrize("lazy_rows", [10, 20_000], ids=["sparse", "dense"])
@pytest.mark.parametrize("call", [1, 5, 7, 11])
def test_stopped_and_resumed_is_the_undisturbed_run(call, lazy_rows, tmp_path, monkeypatch):
    how, config = TrainSettings(**HOW, save_minutes=0.0), shape(lazy_rows, embedding_l2=1e-4, activation="dice", attention_activation="dice", batch_norm=True)
    train_din(config, how, log(), log(seed=1), table(), tmp_path / "quiet")
    loss, calls = ClickTask.loss, iter(range(1, 100))

    def breaking(self, model, index):
        if next(calls) == call:
            raise ZeroDivisionError("the power went out")
        return loss(self, model, index)

    monkeypatch.setattr(ClickTask, "loss", breaking)
    with pytest.raises(ZeroDivisionError):
        train_din(config, how, log(), log(seed=1), table(), tmp_path / "torn")
    monkeypatch.undo()
    train_din(config, how, log(), log(seed=1), table(), tmp_path / "torn")
    for name in ("metrics.jsonl", "checkpoints/last.pt", "checkpoints/best.pt"):
        assert (tmp_path / "quiet" / name).read_bytes() == (tmp_path / "torn" / name).read_bytes(), name


def test_a_checkpoint_of_other_rows_features_or_shape_is_not_resumed(tmp_path):
    how, vectors = TrainSettings(**{**HOW, "epochs": 1}), torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
    config = DinConfig(features_of(table(vectors=vectors), log(), width=4), attention=[8], mlp=[8])
    rows = log()

    def run(config=config, train=rows, features=vectors):
        train_din(config, how, train, log(seed=1), table(vectors=features), tmp_path)

    run()
    run()
    changed = log()
    changed.labels[7] = 1 - changed.labels[7]
    for other in (dict(train=changed), dict(features=-vectors), dict(config=DinConfig(config.features, attention=[8], mlp=[9]))):
        with pytest.raises(RunError, match="another run"):
            run(**other)


# --- learning, and what must not be learned from


def test_the_history_is_learned_and_early_stop_keeps_the_best():
    found = {}
    for history in ("none", "attention"):
        config = shape(history=history, width=8, attention=[16], mlp=[16], dropout=0.0, unknown_rate=0.0)
        trainer = train_din(config, TrainSettings(**{**HOW, "epochs": 8, "scheduler": "constant", "early_stop_patience": 3}), log(1500), log(400, seed=1), table())
        found[history] = trainer.best.value
        best = binary_metrics(predict_logits(trainer.load_best(), log(400, seed=1)), log(400, seed=1).labels)["roc"]
        assert best == pytest.approx(max(r["valid/auc"] for r in trainer.position.records), abs=1e-12) == trainer.best.value
    assert found["attention"] > 0.85 and found["none"] < 0.62  # a sixth of the rows have no history: .92 is what can be reached


def test_labels_of_validation_never_enter():
    turned = log(seed=1)
    turned.labels = 1 - turned.labels
    how = TrainSettings(**{**HOW, "best_metric": ""})
    a, b = (train_din(shape(), how, log(), valid, table()).module.state_dict() for valid in (log(seed=1), turned))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_ids_of_validation_are_not_marked_as_known():
    model = train_din(shape(), TrainSettings(**{**HOW, "epochs": 1}), log(top=10), log(seed=1), table()).module
    assert not bool(model.encoder.ids.seen[11:].any()) and bool(model.encoder.ids.seen[1:11].all())


def test_the_same_seed_is_the_same_model():
    states = [train_din(shape(), TrainSettings(**{**HOW, "seed": s}), log(), None, table()).module.state_dict() for s in (3, 3, 4)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0]) and any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_the_record_of_an_epoch(tmp_path):
    train_din(shape(), TrainSettings(**HOW), log(), log(seed=1), table(), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and {"loss", "valid/auc", "valid/logloss"} <= set(lines[0])


# --- prediction


def trained(**config):
    torch.manual_seed(0)
    return Din(shape(**config)).see(log(), table())


@pytest.mark.parametrize("config", [dict(), dict(softmax=True), dict(history="mean"), dict(history="none"), dict(batch_norm=True, activation="dice", attention_activation="dice")], ids=str)
def test_rows_keep_their_order_whatever_the_batch(config):
    model, rows = trained(**config), log(200, seed=2)
    whole = predict(model, rows)
    assert whole.shape == (200,) and bool(((whole > 0) & (whole < 1)).all())
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(predict(model, rows.select(order)), whole[order], atol=1e-6)
    for size in (1, 7, 1000):
        assert torch.allclose(predict(model, rows, batch_size=size), whole, atol=1e-6)
    assert torch.allclose(predict_logits(model, rows, cache_bytes=0), torch.logit(whole), atol=1e-5)  # without the encoded catalogue


def test_prediction_leaves_the_model_as_it_was():
    model = trained(batch_norm=True, activation="dice", attention_activation="dice").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    predict(model, log(seed=2))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_prediction_asks_for_bounded_rows(monkeypatch):
    asked, forward = [], Din.forward
    monkeypatch.setattr(Din, "forward", lambda self, clicks, cache=None: (asked.append((len(clicks), cache is not None)), forward(self, clicks, cache))[1])
    model = trained()
    predict(model, log(300, seed=2), batch_size=64)
    assert [n for n, _ in asked] == [64, 64, 64, 64, 44] and all(cached for _, cached in asked)
    asked.clear()
    predict_logits(model, log(300, seed=2), cells=2400)  # histories of up to 5 items, 8 hidden numbers each
    assert max(n for n, _ in asked) == 60


def test_unknown_users_cold_items_empty_histories_and_no_rows():
    model, n = trained(), 4
    rows = Clicks(torch.tensor([10**9, 1, 5, 2**40]), torch.tensor([N, N, 1, 2]), torch.full((n,), torch.nan), Ragged.from_lists([[], [N, N], [], [1]]), torch.arange(n))
    assert bool(predict(model, rows).isfinite().all())
    assert predict(model, rows.select(torch.arange(0))).shape == (0,)
    for items, history in (([N + 1], [[]]), ([1], [[N + 1]]), ([0], [[]])):
        with pytest.raises(InputError, match="catalogue"):
            predict(model, Clicks(torch.tensor([1]), torch.tensor(items), torch.tensor([0.0]), Ragged.from_lists(history), torch.arange(1)))


# --- what is refused


def changed(**columns):
    rows = log()
    for name, value in columns.items():
        setattr(rows, name, value)
    return rows


REFUSED = {
    "one class to learn": dict(train=changed(labels=torch.ones(300))),
    "one class to choose by": dict(valid=changed(labels=torch.zeros(300))),
    "labels that are missing": dict(train=changed(labels=torch.full((300,), torch.nan))),
    "an unknown item": dict(train=changed(items=torch.full((300,), N + 1))),
    "an unknown item in a history": dict(valid=changed(histories=Ragged.from_lists([[N + 1]] + [[]] * 299))),
    "no rows": dict(train=log().select(torch.arange(0))),
    "features of another catalogue": dict(table=item_table(pd.DataFrame(dict(item_id=range(1, 4))))),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case, tmp_path):
    what = {"train": log(), "valid": log(seed=1), "table": table(), **REFUSED[case]}
    with pytest.raises(InputError):
        train_din(shape(), TrainSettings(**HOW), folder=tmp_path / "run", **what)
    assert not (tmp_path / "run").exists()


def test_features_other_than_the_models_are_refused():
    with pytest.raises(InputError, match="features"):
        train_din(shape(), TrainSettings(**HOW), log(), table=table(vectors=torch.randn(N, 3)))
    config = DinConfig(features_of(table(vectors=torch.randn(N, 3)), log(), width=4))
    for other in (None, table(), table(vectors=torch.randn(N, 4))):
        with pytest.raises(InputError, match="features"):
            train_din(config, TrainSettings(**HOW), log(), table=other)


def test_the_loop_is_the_cores():
    trainer = train_din(shape(), TrainSettings(**HOW, grad_clip=0.5), log())
    assert type(trainer) is Trainer and trainer.optimizer.optimizer.clip == 0.5 and trainer.settings.grad_clip == 0


# --- several processes


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    train_in_shares(tmp_path / "one")
    launch(train_in_shares, (tmp_path / "two",), num_processes=2, device="cpu")
    for name in ("dense", "lazy", "features"):
        one, two = (read_torch(tmp_path / n / name / "checkpoints" / "last.pt")["model"] for n in ("one", "two"))
        assert one.keys() == two.keys() and all(torch.allclose(one[k].float(), two[k].float(), atol=1e-4) for k in one), name
        first, second = ([json.loads(line) for line in (tmp_path / n / name / "metrics.jsonl").read_text().splitlines()] for n in ("one", "two"))
        assert [r["valid/auc"] for r in first] == pytest.approx([r["valid/auc"] for r in second], abs=1e-3) and len(first) == 3
