"""DIN against a plain padded one: numbers, gradients, and what a row may and may not see."""
from dataclasses import asdict

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from recgen.clicks.data import Clicks
from recgen.clicks.din import Din, DinConfig, TargetAttention, segment_softmax
from recgen.clicks.features import (
    CodeMean,
    FeatureConfig,
    ItemEncoder,
    ItemTable,
    code_mean,
    features_of,
    item_table,
    numbered,
    pooled_codes,
)
from recgen.core.errors import InputError
from recgen.core.files import write_torch
from recgen.core.ragged import Ragged
from recgen.formats.embeddings import Embeddings

N = 9  # items; item 9 is never seen in training


def catalogue(groups=None):
    g = torch.Generator().manual_seed(3)
    frame = pd.DataFrame(dict(item_id=range(1, N + 1), brand=["a", None, "b", "a", "c", "b", "a", "c", "b"], level=[0, 10, 3, 3, 0, 0, 10, 3, 0],
                              tags=[["x", "y"], [], ["y"], None, ["z", "x", "y"], ["z"], ["x"], [], ["y"]]))
    codes = torch.randint(0, 6, (N + 1, 4), generator=g)
    codes[0], codes[:, 0] = 0, codes[:, 0].clamp(min=1)
    codes[0, 0] = 0
    return item_table(frame, ["brand", "level"], ["tags"], codes, groups, torch.randn(N, 5, generator=g))


def rows(seed=0, n=11, lengths=(0, 3, 1, 7, 2, 0, 5, 4, 1, 6, 2), top=N):
    g = torch.Generator().manual_seed(seed)
    histories = Ragged.from_lists([torch.randint(1, top + 1, (k,), generator=g).tolist() for k in lengths[:n]])
    users = torch.randint(1, 5, (n,), generator=g)
    context = {"hour": torch.randint(0, 4, (n,), generator=g), "price": torch.randn(n, generator=g)}
    return Clicks(users, torch.randint(1, top + 1, (n,), generator=g), torch.randint(0, 2, (n,), generator=g).float(), histories, torch.arange(n), context)


def build(groups=None, double=True, **config):
    train, table = rows(top=N - 1), catalogue(groups)
    torch.manual_seed(1)
    shape = {"attention": [6, 5], "mlp": [7, 4], "init_std": 0.5, **config}
    model = Din(DinConfig(features_of(table, train, context=["hour", "price"], width=3), **shape)).see(train, table)
    for m in model.modules():  # so that Dice is neither ReLU nor the identity
        if hasattr(m, "alpha"):
            torch.nn.init.normal_(m.alpha)
    return (model.double() if double else model), table, train


def double(clicks):
    return Clicks(clicks.users, clicks.items, clicks.labels.double(), clicks.histories, clicks.row_ids, {k: v.double() if v.is_floating_point() else v for k, v in clicks.context.items()})


# --- the plain one: padded, one item after the other, the first layer over [t, h, t − h, t · h]


def plain_item(model, table, i):
    "Features of one item, as the configuration says."
    encoder, c = model.encoder, model.config.features
    parts = []
    if c.item_id:
        parts.append(encoder.ids.table.weight[i if encoder.ids.seen[i] else 0])
    tables = iter(encoder.tables)
    parts += [next(tables).weight[table.columns[k][i]] for k in c.columns]
    for k in c.lists:
        weight, values = next(tables).weight, table.lists[k][i]
        parts.append(weight[values].mean(0) if len(values) else torch.zeros(c.width, dtype=weight.dtype))
    for a, b in c.code_groups if c.n_codes else []:
        some = table.codes[i, a:b]
        some = some[some > 0].long()
        parts.append(encoder.book.weight[some].sum(0) / len(some) ** 0.5 if len(some) else torch.zeros(c.width, dtype=encoder.book.weight.dtype))
    if c.vector_width:
        parts.append(encoder.project(table.vectors[i].to(encoder.project.weight.dtype)))
    return torch.cat(parts)


def plain_act(module, x, mask=None):
    "ReLU or Dice on (…, width); statistics over the real places."
    if isinstance(module, torch.nn.ReLU):
        return x.clamp(min=0)
    real = x[mask] if mask is not None else x
    if module.training and len(real) > 1:
        mean, var = real.mean(0), real.var(0, unbiased=False)
    else:
        mean, var = module.norm.running_mean, module.norm.running_var
    p = 1 / (1 + torch.exp(-(x - mean) / (var + module.norm.eps).sqrt()))
    return p * x + (1 - p) * module.alpha * x


def plain_din(model, table, clicks):
    config = model.config
    items = torch.stack([plain_item(model, table, i) for i in range(N + 1)])
    target = items[clicks.items]
    width = max(1, int(clicks.histories.lengths.max()))
    padded = clicks.histories.padded(width)
    mask, h = padded > 0, items[padded]  # (B, W), (B, W, E)
    t = target[:, None].expand_as(h)
    z = model.attention.first(torch.cat([t, h, t - h, t * h], dim=2)) if config.history == "attention" else None
    if z is not None:
        for layer in model.attention.rest:
            if not isinstance(layer, torch.nn.Dropout):
                z = layer(z) if isinstance(layer, torch.nn.Linear) else plain_act(layer, z, mask)
        w = z.squeeze(2)
        w = torch.softmax(w.masked_fill(~mask, -1e30), dim=1) if config.softmax else w
        interest = [(w * mask)[:, :, None].mul(h).sum(1)]
    elif config.history == "mean":
        interest = [(h * mask[:, :, None]).sum(1) / mask.sum(1).clamp(min=1)[:, None]]
    else:
        interest = []
    users = torch.stack([model.users.table.weight[u if u < len(model.users.seen) and model.users.seen[u] else 0] for u in clicks.users.tolist()])
    hour, (mean, deviation) = clicks.context["hour"], config.features.scales["price"]
    price = (clicks.context["price"] - mean) / deviation
    x = torch.cat([target, users, model.context[0].weight[torch.where(hour <= config.features.context["hour"], hour, 0)], price[:, None], *interest], dim=1)
    for layer in model.mlp:
        if isinstance(layer, torch.nn.BatchNorm1d):
            mean, var = (x.mean(0), x.var(0, unbiased=False)) if layer.training else (layer.running_mean, layer.running_var)
            x = (x - mean) / (var + layer.eps).sqrt() * layer.weight + layer.bias
        elif not isinstance(layer, torch.nn.Dropout):
            x = layer(x) if isinstance(layer, torch.nn.Linear) else plain_act(layer, x)
    return x.squeeze(1)


CASES = {
    "dice": dict(activation="dice", attention_activation="dice"),
    "relu": dict(),
    "softmax": dict(softmax=True),
    "dice, softmax, batch norm": dict(activation="dice", attention_activation="dice", softmax=True, batch_norm=True),
    "dice in the attention alone": dict(attention_activation="dice"),
    "mean": dict(history="mean"),
    "none": dict(history="none"),
    "each code alone": dict(groups="each"),
    "codes of two modalities": dict(groups=[[0, 1], [1, 4]]),
    "deep attention": dict(attention=[6, 5, 4]),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_the_plain_models(case, training):
    model, table, _ = build(**CASES[case])
    model.train(training)
    clicks = double(rows(seed=5))
    results = []
    for logits in (plain_din(model, table, clicks), model(clicks)):
        model.zero_grad(set_to_none=True)
        F.binary_cross_entropy_with_logits(logits, clicks.labels).backward()
        results.append((logits.detach(), {k: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for k, p in model.named_parameters()}))
    (plain, plain_grads), (ours, grads) = results
    assert torch.allclose(plain, ours, atol=1e-9), (plain - ours).abs().max()
    for name in grads:
        assert torch.allclose(plain_grads[name], grads[name], atol=1e-9), name
    assert any(g.abs().max() > 1e-4 for g in grads.values())


def test_factored_layer_in_single_precision():
    "Equal within 1e-5 at the challenge's sizes, where neither dropout nor a norm stands before it."
    torch.manual_seed(0)
    attention = TargetAttention(128, [512, 256], "relu")
    t, h, r = torch.randn(40, 128), torch.randn(300, 128), torch.randint(0, 40, (300,)).sort().values
    with torch.no_grad():
        plain = attention.rest(attention.first(torch.cat([t[r], h, t[r] - h, t[r] * h], dim=1))).squeeze(1)
        assert torch.allclose(plain, attention.weights(t, h, attention.item_part(h), r), atol=1e-5)


def test_softmax_survives_large_weights():
    w = segment_softmax(torch.tensor([1000.0, 999.0, -1000.0]), torch.tensor([0, 0, 2]), 3)
    assert torch.allclose(w, torch.tensor([0.7310586, 0.2689414, 1.0]))


def test_every_distinct_item_is_encoded_once():
    model, _, _ = build()
    asked = []
    model.encoder.register_forward_pre_hook(lambda module, args: asked.append(args[0]))
    clicks = double(rows(seed=7))
    model(clicks)
    assert len(asked) == 1 and asked[0].tolist() == sorted(set(clicks.items.tolist()) | set(clicks.histories.values.tolist()))


@pytest.mark.parametrize("history", ["attention", "mean", "none"])
def test_a_row_sees_itself_alone(history):
    model, _, _ = build(history=history)
    model.eval()
    clicks = double(rows(seed=8))
    with torch.no_grad():
        together = model(clicks)
        order = torch.randperm(len(clicks), generator=torch.Generator().manual_seed(0))
        assert torch.allclose(model(clicks.select(order)), together[order], atol=1e-12)
        assert torch.allclose(torch.cat([model(clicks.select([i])) for i in range(len(clicks))]), together, atol=1e-12)
        assert torch.allclose(model(clicks, model.encoded(torch.arange(N + 1))), together, atol=1e-12)
        turned = Clicks(clicks.users, clicks.items, clicks.labels, Ragged.from_lists([h[::-1] for h in clicks.histories.tolist()]), clicks.row_ids, clicks.context)
        assert torch.allclose(model(turned), together, atol=1e-12)  # a set of items: DIN does not read the order


@pytest.mark.parametrize("config", [dict(activation="dice", attention_activation="dice", batch_norm=True), dict(softmax=True), dict(history="mean")], ids=str)
@pytest.mark.parametrize("lengths", [(0, 0, 0), (0,), (1,), (0, 1, 0)], ids=str)
def test_empty_histories_and_tiny_batches_train(config, lengths):
    model, _, _ = build(**config)
    clicks = double(rows(n=len(lengths), lengths=lengths))
    loss = model.train()(clicks).pow(2).sum()
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_statistics_of_a_single_row_do_not_move():
    model, _, _ = build(batch_norm=True, activation="dice", attention_activation="dice")
    before = {k: v.clone() for k, v in model.named_buffers()}
    model.train()(double(rows(n=1, lengths=(1,))))
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())


def test_ids_that_training_has_not_seen_read_the_unknown_row():
    model, table, train = build()
    ids, users = model.encoder.ids, model.users
    assert ids.rows(torch.tensor([N, 1])).tolist()[0] == 0 and not bool(ids.seen[N]) and not bool(ids.seen[0])
    assert users.rows(torch.tensor([4_000_000_000, 0])).tolist() == [0, 0]
    model.eval()
    clicks = double(rows(seed=9))
    with torch.no_grad():
        base = model(clicks)
        ids.table.weight[N] += 100  # what stands in the row of an unseen item is of no consequence
        assert torch.equal(model(clicks), base)
        ids.table.weight[0] += 1
        touched = [N in h or i == N for h, i in zip(clicks.histories.tolist(), clicks.items.tolist(), strict=True)]
        assert any(touched) and not all(touched)
        assert ((model(clicks) - base).abs() > 1e-9).tolist() == touched


def test_a_cold_item_is_known_by_its_codes_and_vectors():
    model, table, _ = build()
    model.eval()
    with torch.no_grad():
        model.encoder.ids.seen[8] = False
        a, b = model.encoder(torch.tensor([8, N]))
    assert torch.equal(a[:3], b[:3]) and not torch.equal(a[-3:], b[-3:])


def test_unknown_rows_are_trained_by_replacing_ids():
    model, _, _ = build(unknown_rate=0.5)
    ids = model.encoder.ids
    torch.manual_seed(0)
    some = torch.arange(1, N).repeat(2000)
    share = float((ids.train().rows(some) == 0).float().mean())
    assert 0.47 < share < 0.53 and int((ids.eval().rows(some) == 0).sum()) == int((~ids.seen[some]).sum())


def test_numbers_of_the_context_are_read_in_deviations_of_training():
    train, table = rows(40), ItemTable(9)
    small = features_of(table, train, context=["price"], width=3)
    large = Clicks(train.users, train.items, train.labels, train.histories, train.row_ids, {**train.context, "price": 1e6 + 1e4 * train.context["price"]})
    other = features_of(table, large, context=["price"], width=3)
    torch.manual_seed(0)
    one = Din(DinConfig(small)).see(train).eval()
    two = Din(DinConfig(other)).see(large).eval()
    two.load_state_dict(one.state_dict())
    assert torch.allclose(one(train), two(large), atol=1e-3) and abs(other.scales["price"][0] - 1e6) < 1e4


def test_context_beyond_training_reads_row_0():
    model, _, _ = build()
    model.eval()
    clicks = double(rows(seed=2))
    with torch.no_grad():
        far, zero = (Clicks(clicks.users, clicks.items, clicks.labels, clicks.histories, clicks.row_ids, {**clicks.context, "hour": torch.full((len(clicks),), h)}) for h in (99, 0))
        assert torch.equal(model(far), model(zero))


def test_a_model_is_one_file(tmp_path):
    model, _, _ = build(groups=[[0, 1], [1, 4]], double=False)
    model.eval()
    write_torch(tmp_path / "model.pt", model.state())
    again = Din.load_from_checkpoint(tmp_path / "model.pt")
    clicks = rows(seed=4)
    with torch.no_grad():
        assert torch.equal(again(clicks), model(clicks))  # features and known ids came along
    assert again.config == model.config and not again.training
    write_torch(tmp_path / "other.pt", {"config": asdict(model.config) | {"mlp": [3]}, "model": model.state()["model"]})
    write_torch(tmp_path / "no.pt", {"a": 1})
    for name in ("other.pt", "no.pt"):
        with pytest.raises(InputError):
            Din.load_from_checkpoint(tmp_path / name)


@pytest.mark.parametrize("rows_at_once", [1, 5000])
def test_pooled_codes_and_their_gradient(rows_at_once):
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 12, (rows_at_once, 7), generator=g)
    book = torch.randn(12, 3, generator=g, dtype=torch.float64, requires_grad=True)
    plain = torch.stack([book[c[c > 0]].mean(0) if bool((c > 0).any()) else torch.zeros(3, dtype=torch.float64) for c in codes])
    target = torch.randn(rows_at_once, 3, generator=g, dtype=torch.float64)
    wanted = torch.autograd.grad((plain * target).sum(), book)[0]
    for pooled in (CodeMean.apply(codes, book), code_mean(codes, book), F.embedding_bag(codes, book, mode="mean", padding_idx=0)):
        assert torch.allclose(pooled, plain) and torch.allclose(torch.autograd.grad((pooled * target).sum(), book)[0], wanted)


@pytest.mark.parametrize("how", ["mean", "sqrtn", "sum"])
def test_codes_are_pooled_over_those_that_are_there(how):
    codes, book = torch.tensor([[1, 2, 2, 0], [3, 0, 0, 0], [0, 0, 0, 0]]), torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    n = {"mean": 3.0, "sqrtn": 3.0**0.5, "sum": 1.0}[how]
    wanted = torch.stack([(book[1] + 2 * book[2]) / n, book[3], torch.zeros(5)])
    assert torch.allclose(pooled_codes(codes, book, how), wanted, atol=1e-6)
    config = FeatureConfig(2, item_id=False, n_codes=3, code_columns=4, code_groups=[[0, 4]], width=5, code_pooling=how)
    encoder = ItemEncoder(config).load_table(ItemTable(2, codes=codes[[2, 0, 1]].int()))
    encoder.book.weight.data.copy_(book)
    assert torch.allclose(encoder(torch.tensor([1, 2, 0])), wanted, atol=1e-6)


# --- the item table


def test_numbering_does_not_depend_on_the_order_of_items():
    a, n = numbered(["b", "a", None, "b"])
    b, _ = numbered(["b", "b", "a", None])
    assert n == 2 and a.tolist() == [2, 1, 0, 2] and b.tolist() == [2, 2, 1, 0]


def test_vectors_are_joined_by_item_id():
    frame = pd.DataFrame(dict(item_id=[1, 2, 3]))
    table = item_table(frame, vectors=Embeddings(torch.tensor([3, 1, 2]), torch.tensor([[30.0], [10.0], [20.0]]), {"text": 1}))
    assert table.vectors[:, 0].argsort().tolist()[0] == 1 and table.vectors[3] > table.vectors[2] > table.vectors[1]


FRAME = pd.DataFrame(dict(item_id=[1, 2, 3], brand=["a", "b", "a"]))
WRONG = {
    "a column that is not there": dict(columns=["price"]),
    "vectors with NaN": dict(vectors=torch.tensor([[1.0], [torch.nan], [2.0]])),
    "infinite vectors": dict(vectors=torch.tensor([[1.0], [torch.inf], [2.0]])),
    "vectors of too few items": dict(vectors=torch.ones(2, 2)),
    "vectors of other items": dict(vectors=Embeddings(torch.tensor([1, 2, 4]), torch.randn(3, 2), {"x": 2})),
    "vectors of more items": dict(vectors=torch.ones(5, 2)),
    "codes of too few items": dict(codes=torch.ones(3, 2, dtype=torch.int32)),
    "codes with a filled row 0": dict(codes=torch.ones(4, 2, dtype=torch.int32)),
    "an item without codes": dict(codes=torch.tensor([[0, 0], [1, 2], [0, 0], [1, 1]])),
    "negative codes": dict(codes=torch.tensor([[0, 0], [1, 2], [-1, 1], [1, 1]])),
    "codes that are not whole": dict(codes=torch.zeros(4, 2)),
}


@pytest.mark.parametrize("case", WRONG)
def test_features_that_cannot_be_used(case):
    with pytest.raises(InputError):
        item_table(FRAME, **WRONG[case])


def test_items_must_be_in_order():
    with pytest.raises(InputError, match="in order"):
        item_table(FRAME.iloc[::-1])


def test_models_that_cannot_be():
    train = rows()
    with pytest.raises(InputError, match="no feature"):
        features_of(item_table(FRAME), train, item_id=False)
    with pytest.raises(InputError, match="context"):
        features_of(item_table(FRAME), train, context=["weather"])
    good = FeatureConfig(n_items=3)
    for wrong in (dict(history="lstm"), dict(activation="gelu"), dict(attention_activation="gelu"), dict(mlp=[]), dict(attention=[])):
        with pytest.raises(InputError):
            Din(DinConfig(good, **wrong))


def test_large_id_tables_have_sparse_gradients():
    encoder = ItemEncoder(FeatureConfig(n_items=30, width=2, lazy_rows=30))
    encoder.ids.see(torch.arange(1, 31))
    encoder(torch.tensor([4, 7])).sum().backward()
    grad = encoder.ids.table.weight.grad
    assert grad.is_sparse and sorted(grad.coalesce().indices()[0].tolist()) == [4, 7]


@pytest.mark.parametrize("config", [dict(), dict(history="mean"), dict(softmax=True)], ids=str)
def test_history_dropout_leaves_items_out_in_training_alone(config):
    model, _, _ = build(history_dropout=0.5, **config)
    clicks = double(rows(seed=6))
    empty = Clicks(clicks.users, clicks.items, clicks.labels, Ragged(clicks.histories.values[:0], torch.zeros(len(clicks) + 1)), clicks.row_ids, clicks.context)
    with torch.no_grad():
        assert torch.equal(model.eval()(clicks), model(clicks))
        model.train()
        assert not torch.equal(model(clicks), model(clicks))
        model.config.history_dropout = 1.0
        assert torch.allclose(model(clicks), model(empty), atol=1e-12)  # with all left out, it is the model without a history


def test_half_precision_is_close():
    "bf16, as precision=bf16 runs it."
    model, _, _ = build(double=False, activation="dice", softmax=True)
    clicks = rows(seed=5)
    whole = model.eval()(clicks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(clicks)
        F.binary_cross_entropy_with_logits(half.float(), clicks.labels).backward()
    assert torch.allclose(whole, half.float(), atol=0.1) and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_groups_of_codes():
    from recgen.clicks.item_codes import ItemCodes

    two = ItemCodes(torch.tensor([[0, 0, 0], [1, 2, 4], [2, 1, 5], [1, 1, 4]]), {"text": (0, 1, 1, 3), "image": (2, 2, 4, 6)})
    assert item_table(FRAME, codes=two).code_groups == [[0, 2], [2, 3]]
    assert item_table(FRAME, codes=two, code_groups="all").code_groups == [[0, 3]] == item_table(FRAME, codes=two.codes).code_groups
    assert item_table(FRAME, codes=two, code_groups="each").code_groups == [[0, 1], [1, 2], [2, 3]]
