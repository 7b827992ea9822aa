"""SASRec: what may depend on what, the loss against its definition, every target once, and a training that can be interrupted."""
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from recgen.core.errors import InputError, RunError
from recgen.core.files import read_torch, write_torch
from recgen.core.processes import launch
from recgen.core.ragged import Ragged
from recgen.core.training import TrainSettings, fit
from recgen.evaluation.evaluator import evaluate_scores
from recgen.evaluation.protocol import Cases
from recgen.retrieval.sasrec import CatalogueCrossEntropy, SasRec, SasRecConfig, SasRecTask, TrainingWindows, attention_blocks, train_sasrec
from recgen.retrieval.transformer import Tiger, TigerConfig

N = 23  # items


def small_model(seed=0, **changes):
    "A model whose vectors are large enough for every item to matter."
    torch.manual_seed(seed)
    model = SasRec(SasRecConfig(**{"n_items": N, "d_model": 16, "n_layers": 2, "num_heads": 2, "ff_dim": 24, "max_history": 6, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3 * (p.ndim > 1))
        model.items.weight[0] = 0
    return model


def outputs(model, rows):
    "Outputs of each history as (length, d) tensors."
    history = Ragged.from_lists(rows)
    with torch.no_grad():
        return model.encode(history).split(history.lengths.tolist())


item = st.integers(1, N)
histories = st.lists(st.lists(item, min_size=1, max_size=6), min_size=1, max_size=70)


# --- the encoder


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.lists(item, min_size=2, max_size=6), st.data())
def test_an_output_depends_on_its_item_and_all_before_it_and_on_none_behind(row, data):
    model = small_model()
    place = data.draw(st.integers(0, len(row) - 1))
    other = list(row)
    other[place] = row[place] % N + 1
    a, b = (outputs(model, [r])[0] for r in (row, other))
    assert a[:place].equal(b[:place])
    assert ((a - b).abs().amax(1)[place:] > 1e-6).all(), "every later output sees the change"


@settings(derandomize=True, max_examples=30, deadline=None)
@given(histories)
def test_an_output_does_not_depend_on_what_else_is_in_the_batch(rows):
    model = small_model()
    for row, found in zip(rows, outputs(model, rows), strict=True):
        assert torch.allclose(found, outputs(model, [row])[0], atol=1e-5)


def plain_outputs(model, row):
    "The encoder's definition for one history, an explicit mask and one head at a time."
    d, heads, n = model.config.d_model, model.config.num_heads, len(row)
    places = torch.arange(n).flip(0)
    x = model.norm(model.items(torch.tensor(row)) + model.places(places))
    for layer in model.layers:
        q, k, v = layer.qkv(x).split(d, 1)
        parts = []
        for h in range(heads):
            s = slice(h * d // heads, (h + 1) * d // heads)
            weights = (q[:, s] @ k[:, s].T / (d // heads) ** 0.5).masked_fill(torch.ones(n, n).triu(1) > 0, -torch.inf).softmax(1)
            parts.append(weights @ v[:, s])
        x = layer.norm1(x + layer.out(torch.cat(parts, 1)))
        x = layer.norm2(x + layer.down(F.gelu(layer.up(x))))
    return x


@pytest.mark.parametrize("row", [[3], [3, 3, 1], [5, 4, 3, 2, 1, 9]])
def test_the_encoder_is_its_definition(row):
    model = small_model()
    with torch.no_grad():
        assert torch.allclose(outputs(model, [[7, 8], row])[1], plain_outputs(model, row), atol=1e-5)


def test_blocks_hold_every_item_once_and_are_as_wide_as_their_longest():
    lengths = torch.tensor([1, 3, 2, 5, 1])
    column = torch.cat([torch.arange(n) for n in lengths.tolist()])
    blocks = attention_blocks(lengths, column, rows=2)
    assert [shape for _, shape in blocks] == [(2, 3), (2, 5), (1, 1)]
    assert [cells.tolist() for cells, _ in blocks] == [[0, 3, 4, 5], [0, 1, 5, 6, 7, 8, 9], [0]]


# --- the loss


@pytest.mark.parametrize("cells", [1, 64 * N, 1 << 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_and_its_gradients_are_autograds(dtype, cells):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=g, dtype=dtype).requires_grad_() for n in (200, N))
    targets = torch.randint(0, N, (200,), generator=g)
    found = CatalogueCrossEntropy.apply(hidden, weight, targets, dtype, cells) * 0.7
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="sum") * 0.7
    assert torch.allclose(found.double(), plain.double(), rtol=1e-6)
    for a, b in zip(torch.autograd.grad(found, [hidden, weight]), torch.autograd.grad(plain, [hidden, weight]), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_largest_matrix_is_a_chunk_of_logits(monkeypatch):
    seen, softmax = [], torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, *a: (seen.append(x.shape), softmax(x, *a))[1])
    hidden, weight = torch.randn(500, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    CatalogueCrossEntropy.apply(hidden, weight, torch.zeros(500, dtype=torch.long), torch.float32, 100_000).backward()
    assert [tuple(s) for s in seen] == [(100, 1000)] * 5 and hidden.grad.abs().sum() > 0


def test_a_hopeless_target_has_a_finite_loss_and_a_gradient():
    hidden, weight = torch.tensor([[1000.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    loss = CatalogueCrossEntropy.apply(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.isfinite() and hidden.grad.item() == pytest.approx(2.0)


@pytest.mark.parametrize("batch", [[0, 1, 2, 3, 4], [3], [4, 0]])
def test_the_task_loss_is_the_sum_over_targets_position_by_position(batch):
    sequences = Ragged.from_lists([[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12], [13, 14], [15, 1], []])
    model = small_model(max_history=4)
    samples = TrainingWindows.from_sequences(sequences, 4)
    task, index = SasRecTask(model, samples, 2), torch.tensor(batch)
    assert len(samples) == 6
    expected = 0.0
    for w in batch:
        start, length, learned = (int(x[w]) for x in (samples.starts, samples.lengths, samples.learned))
        row = samples.items[start : start + length + 1].tolist()
        with torch.no_grad():
            logits = plain_outputs(model, row[:-1]) @ model.items.weight.T
        for place in range(length - learned, length):
            expected -= logits[place, 1:].log_softmax(0)[row[place + 1] - 1].item()
    mean_targets = (2 + 8 + 1 + 1) / 6
    assert task.loss(model, index).item() == pytest.approx(expected / (len(batch) * mean_targets), rel=1e-5)


def test_bfloat16_gradients_point_where_those_of_float32_do():
    model, gradients = small_model(), []
    task = SasRecTask(model, TrainingWindows.from_sequences(Ragged.from_lists([[1, 2, 3, 4], [5, 6], [7, 8, 9]]), 6), 3)
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            task.loss(model, torch.arange(3)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert not gradients[0].equal(gradients[1])
    assert F.cosine_similarity(*gradients, dim=0) > 0.999


# --- training windows


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 9))
def test_every_next_item_is_learned_once_behind_its_own_past(lengths, max_history):
    values = torch.arange(1, 1 + sum(lengths))  # every item once, so that an item names its place
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    sequences = Ragged(values, offsets)
    samples = TrainingWindows.from_sequences(sequences, max_history)
    index = torch.arange(len(samples))
    history, targets = samples.histories(index), samples.targets(index)
    learned = targets > 0
    expected = [i for row in sequences.tolist() for i in row[1:]]
    assert sorted(targets[learned].tolist()) == expected
    assert (targets[learned] == history.values[learned] + 1).all(), "the target follows the item that predicts it"
    row_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    context = torch.arange(len(targets)) - history.offsets[history.rows] + 1
    for target, row, seen in zip(targets[learned].tolist(), history.rows[learned].tolist(), context[learned].tolist(), strict=True):
        place = target - 1 - int(offsets[row_of[target - 1]])
        assert history[row][0] > offsets[row_of[target - 1]], "no window reaches into another user's items"
        assert seen == place if place <= max_history else seen >= max_history - (max_history + 1) // 2 + 1
    assert len(samples) == 0 or history.lengths.max() <= max_history


def test_an_epoch_holds_every_training_target_once_and_no_held_out_one():
    g = torch.Generator().manual_seed(1)
    whole = [list(range(100 * u + 1, 100 * u + 1 + int(n))) for u, n in enumerate(torch.randint(3, 30, (50,), generator=g))]
    samples = TrainingWindows.from_sequences(Ragged.from_lists([row[:-2] for row in whole]), 7)
    task = SasRecTask(small_model(), samples, 8)
    for seed in (0, 1):
        batches = task.batches(torch.Generator().manual_seed(seed))
        targets = torch.cat([samples.targets(b) for b in batches])
        assert sorted(t for t in targets.tolist() if t) == [i for row in whole for i in row[1:-2]]
        held_out = {i for row in whole for i in row[-2:]}
        assert not held_out & set(targets.tolist()) and not held_out & set(torch.cat([samples.histories(b).values for b in batches]).tolist())
        assert max(map(len, batches)) == 8 and all(samples.lengths[b].diff().ge(0).all() for b in batches)
    first, again, other = (task.batches(torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True)) and not all(a.equal(b) for a, b in zip(first, other, strict=True))


# --- scores


def test_scores_are_products_with_the_item_vectors_and_read_the_last_items_alone():
    model = small_model()
    row = [3, 9, 1, 1, 4, 22, 23, 5]
    scores = model.scores(Ragged.from_lists([row, row[-6:], row[-5:]]))
    assert scores.shape == (3, N + 1) and scores.dtype == torch.float32 and (scores[:, 0] == -torch.inf).all()
    with torch.no_grad():
        assert torch.allclose(scores[0, 1:], model.items.weight[1:] @ plain_outputs(model, row[-6:])[-1], atol=1e-4)
    assert scores[0].equal(scores[1]) and not torch.allclose(scores[0, 1:], scores[2, 1:], atol=1e-3)


def test_permuting_the_batch_permutes_the_scores():
    model, g = small_model(), torch.Generator().manual_seed(0)
    rows = [torch.randint(1, N + 1, (int(n),), generator=g).tolist() for n in torch.randint(0, 12, (100,), generator=g)]
    order = torch.randperm(100, generator=g)
    a, b = model.scores(Ragged.from_lists(rows)), model.scores(Ragged.from_lists([rows[i] for i in order]))
    assert torch.allclose(a[order][:, 1:], b[:, 1:], atol=1e-4)


@pytest.mark.parametrize("rows", [[[]], [[], [3, 4], []]])
def test_an_empty_history_is_answered_with_popularity(rows):
    model = small_model()
    model.counts[[7, 9]] = torch.tensor([5.0, 2.0])
    scores = model.scores(Ragged.from_lists(rows))
    for row in (i for i, r in enumerate(rows) if not r):
        assert scores[row, 1:].isfinite().all() and scores[row, 0] == -torch.inf
        assert scores[row].topk(2).indices.tolist() == [7, 9] and scores[row, 7].item() == pytest.approx(torch.tensor(6.0).log().item())
    if len(rows) > 1:
        assert torch.allclose(scores[1, 1:], model.scores(Ragged.from_lists([[3, 4]]))[0, 1:], atol=1e-5)


def test_no_users_no_scores():
    model = small_model()
    assert model.scores(Ragged.from_lists([])).shape == (0, N + 1)


@pytest.mark.parametrize("bad", [0, N + 1, -1])
def test_items_outside_the_catalogue_are_refused(bad):
    with pytest.raises(InputError, match="outside the catalogue"):
        small_model().scores(Ragged.from_lists([[1, bad]]))
    with pytest.raises(InputError, match="outside the catalogue"):
        train_sasrec(SasRecConfig(N), TrainSettings(device="cpu"), Ragged.from_lists([[1, 2, bad]]))


def test_top_lists_leave_out_what_was_seen_if_asked_to():
    model = small_model()
    history = Ragged.from_lists([[1, 2, 3], [], list(range(1, N))])
    scores = model.scores(history)
    free, values = model.top(history, 5, exclude_seen=False, block=2)
    assert free.equal(scores.topk(5).indices) and torch.allclose(values, scores.topk(5).values, atol=1e-5)
    items, _ = model.top(history, 5)
    assert not {1, 2, 3} & set(items[0].tolist()) and items[2].tolist() == [N, 0, 0, 0, 0]
    assert items[0].tolist() == [i for i in scores[0].argsort(descending=True).tolist() if i not in (0, 1, 2, 3)][:5]


# --- checkpoints


def test_a_checkpoint_gives_the_same_model_back(tmp_path):
    model = small_model()
    model.counts[4] = 3
    write_torch(tmp_path / "model.pt", model.state())
    loaded = SasRec.load_from_checkpoint(tmp_path / "model.pt")
    history = Ragged.from_lists([[1, 2], [], [9] * 8])
    assert loaded.config == model.config and not loaded.training and loaded.scores(history).equal(model.scores(history))


def test_another_checkpoint_is_refused(tmp_path):
    tiger = Tiger(TigerConfig([3, 3], 8, 8, 2, 8, 1, 1)).state()
    mine = small_model().state()
    torn = {**mine, "model": {k: v for k, v in mine["model"].items() if "places" not in k}}
    wider = {**mine, "config": {**mine["config"], "d_model": 32}}
    headless = {**mine, "config": {**mine["config"], "num_heads": 3}}
    for i, (state, words) in enumerate([(tiger, "another model"), (torn, "another model"), (wider, "another model"), (headless, "no such model"),
                                        ({"weights": torch.zeros(2)}, "not a checkpoint of a SASRec"), ([1, 2], "not a checkpoint of a SASRec")]):
        path = tmp_path / f"{i}.pt"
        write_torch(path, state)
        with pytest.raises(InputError, match=words):
            SasRec.load_from_checkpoint(path)


@pytest.mark.parametrize("changes", [{"n_items": 0}, {"num_heads": 3}, {"num_heads": 0}])
def test_impossible_shapes_are_refused(changes):
    with pytest.raises(InputError, match="no such model"):
        small_model(**changes)


# --- training


def ring(users=60, n=N, seed=0):
    "Walks around a ring: their last item is the validation target."
    g = torch.Generator().manual_seed(seed)
    starts, lengths = torch.randint(0, n, (users,), generator=g).tolist(), torch.randint(3, 14, (users,), generator=g).tolist()
    walks = [[(s + i) % n + 1 for i in range(length)] for s, length in zip(starts, lengths, strict=True)]
    valid = Cases(torch.arange(1, users + 1), Ragged.from_lists([w[:-1] for w in walks]), torch.tensor([w[-1] for w in walks]), torch.ones(users, dtype=torch.long), "valid")
    return Ragged.from_lists([w[:-1] for w in walks]), valid


SHAPE = SasRecConfig(N, d_model=16, n_layers=1, ff_dim=24, dropout=0.2, max_history=5)
HOW = {"epochs": 3, "batch_size": 16, "learning_rate": 5e-3, "warmup_steps": 3, "best_metric": "valid/item/filtered/ndcg@10", "device": "cpu"}


def task_of(shape=SHAPE):
    "What train_sasrec trains, as a task that can be broken."
    sequences, valid = ring()
    torch.manual_seed(0)
    return SasRecTask(SasRec(shape), TrainingWindows.from_sequences(sequences, shape.max_history), HOW["batch_size"], valid)


@pytest.mark.parametrize("call", [1, 2, 5, 9])
def test_stopped_and_resumed_is_the_undisturbed_run(call, tmp_path):
    how = TrainSettings(**HOW, save_minutes=0.0)
    fit(task_of(), how, tmp_path / "quiet")
    task, loss, calls = task_of(), SasRecTask.loss, iter(range(1, 100))

    def breaking(model, index):
        if next(calls) == call:
            raise ZeroDivisionError("the power went out")
        return loss(task, model, index)

    task.loss = breaking
    with pytest.raises(ZeroDivisionError):
        fit(task, how, tmp_path / "torn")
    fit(task_of(), how, tmp_path / "torn")
    for name in ("metrics.jsonl", "checkpoints/last.pt", "checkpoints/best.pt"):
        assert (tmp_path / "quiet" / name).read_bytes() == (tmp_path / "torn" / name).read_bytes(), name


def test_a_checkpoint_of_another_shape_or_other_data_is_not_resumed(tmp_path):
    sequences, valid = ring()
    train_sasrec(SHAPE, TrainSettings(**{**HOW, "epochs": 1}), sequences, valid, tmp_path, {"train_hash": "a"})
    for shape, fingerprint in [(SasRecConfig(**{**SHAPE.__dict__, "ff_dim": 32}), {"train_hash": "a"}), (SHAPE, {"train_hash": "b"})]:
        with pytest.raises(RunError, match="another run"):
            train_sasrec(shape, TrainSettings(**{**HOW, "epochs": 1}), sequences, valid, tmp_path, fingerprint)


def test_a_deterministic_world_is_learned_whole():
    sequences, valid = ring(200)
    shape = SasRecConfig(**{**SHAPE.__dict__, "dropout": 0.0})
    trainer = train_sasrec(shape, TrainSettings(**{**HOW, "epochs": 20}), sequences, valid)
    model = trainer.load_best()
    result = evaluate_scores(model.scores, valid, "SASRec")
    assert result.metrics["valid/item/filtered/recall@1"] == 1.0
    assert trainer.best.value == trainer.position.records[-1]["valid/item/filtered/ndcg@10"] == 1.0
    assert model.counts.sum() == len(sequences.values), "popularity comes from the training rows"


def test_validation_is_the_evaluators():
    task = task_of()
    found = task.evaluate(task.model.eval())
    expected = evaluate_scores(task.model.scores, task.valid).metrics
    assert found and all(found[name] == pytest.approx(expected[name]) for name in found)


def test_no_validation_and_nothing_to_learn():
    sequences, _ = ring()
    trainer = train_sasrec(SHAPE, TrainSettings(**{**HOW, "best_metric": "", "epochs": 1}), sequences)
    assert not any(k.startswith("valid/") for k in trainer.position.records[0])
    with pytest.raises(InputError, match="no next item"):
        train_sasrec(SHAPE, TrainSettings(**HOW), Ragged.from_lists([[1], [], [2]]))


def train_for_comparison(folder):
    "One epoch without dropout, validated: the same on one process and on two."
    sequences, valid = ring()
    train_sasrec(SasRecConfig(**{**SHAPE.__dict__, "dropout": 0.0}), TrainSettings(**{**HOW, "epochs": 2}), sequences, valid, folder)


def test_two_processes_train_what_one_does(tmp_path):
    train_for_comparison(tmp_path / "one")
    launch(train_for_comparison, (tmp_path / "two",), num_processes=2, device="cpu")
    one, two = (read_torch(tmp_path / name / "checkpoints" / "last.pt")["model"] for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.allclose(one[k], two[k], atol=2e-4) for k in one)
    records = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two")]
    for a, b in zip(*records, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["valid/item/filtered/recall@10"] == pytest.approx(b["valid/item/filtered/recall@10"], abs=0.04)
