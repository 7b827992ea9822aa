"""GraphSAGE: equal to torch-geometric, gradients of its own aggregations, the loss, validation without a leak, files, resume."""
import json

import pytest
import torch
import torch.nn.functional as F

from recgen.core.device import generator
from recgen.core.errors import InputError
from recgen.graph.hetero import Csr
from recgen.graph.link_prediction import hold_out_edges
from recgen.graph.negatives import DegreeBiasedNegativeSampler
from recgen.graph.pairs import CooccurrencePairSampler, PairSampler
from recgen.graph.sage import NeighbourMax, ProductionGraphSAGE, SageLayer, as_csr, read_neighbours, skip_gram_loss, structural_features
from recgen.graph.sage_setup import SageSettings, Validation, cut_walks
from recgen.graph.sage_training import (
    EarlyStopping,
    GraphSAGETrainer,
    ModelCheckpoint,
    TrainingLogger,
    make_trainer,
    make_walks,
    train_graphsage,
)
from recgen.graph.sampling import sample_blocks

def random_graph(n: int = 30, edges: int = 120, seed: int = 0) -> Csr:
    "Directed, with nodes that nothing leads to."
    g = generator(seed)
    return Csr.from_edges(torch.randint(n - 3, (edges,), generator=g), torch.randint(n, (edges,), generator=g), n, n)


def two_groups(n: int = 20, seed: int = 0):
    "Features that say nothing and an edge_index of two dense groups joined by one edge."
    g = generator(seed)
    rows, columns = (torch.rand(n, n, generator=g).triu(1) > 0.6).nonzero().T
    half = torch.stack([torch.cat([rows, rows + n, torch.tensor([0])]), torch.cat([columns, columns + n, torch.tensor([n])])])
    return torch.randn(2 * n, 8, generator=g), torch.cat([half, half.flip(0)], 1)


FAST = {"epochs": 3, "batch_size": 64, "batches_per_forward": 2, "pairs_per_epoch": 512, "walk_length": 8, "walks_per_node": 3, "window": 2, "output_dim": 6, "hidden_dim": 5, "device": "cpu", "save_every": 2}


# --- the model beside torch-geometric


@pytest.mark.parametrize("width", [4, 16])  # narrower than the features (multiplied before it travels), wider (behind)
@pytest.mark.parametrize("aggregator", ["mean", "max"])
def test_a_layer_is_torch_geometrics_with_its_gradients(aggregator, width):
    from torch_geometric.nn import SAGEConv

    torch.manual_seed(0)
    csr = random_graph()
    ours, theirs = SageLayer(9, width, aggregator), SAGEConv(9, width, aggr=aggregator)
    theirs.lin_l.load_state_dict(ours.neighbours.state_dict())
    theirs.lin_r.load_state_dict(ours.own.state_dict())
    x = torch.randn(30, 9)
    x[3] = x[7]  # neighbours that tie for the largest value
    mine, other, weight = x.clone().requires_grad_(), x.clone().requires_grad_(), torch.randn(30, width)
    a, b = ours(mine, csr), theirs(other, csr.edge_index())
    assert torch.allclose(a, b, atol=1e-5)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    assert torch.allclose(mine.grad, other.grad, atol=1e-5)
    for p, q in ((ours.neighbours.weight, theirs.lin_l.weight), (ours.neighbours.bias, theirs.lin_l.bias), (ours.own.weight, theirs.lin_r.weight)):
        assert torch.allclose(p.grad, q.grad, atol=1e-4)


def test_the_lstm_is_torch_geometrics_wherever_that_does_not_read_padding():
    from torch_geometric.nn import SAGEConv

    torch.manual_seed(1)
    csr = random_graph()
    ours, theirs = SageLayer(4, 3, "lstm").eval(), SAGEConv(4, 3, aggr="lstm")
    theirs.lin_l.load_state_dict(ours.neighbours.state_dict())
    theirs.lin_r.load_state_dict(ours.own.state_dict())
    theirs.aggr_module.lstm.load_state_dict(ours.lstm.state_dict())
    x = torch.randn(30, 4)
    found = ours(x, csr)
    for row in csr.degrees.nonzero()[:, 0].tolist():  # one target at a time has no padding
        columns = csr.columns[csr.offsets[row] : csr.offsets[row + 1]].long()
        alone = theirs((x, x[row : row + 1]), torch.stack([columns, torch.zeros_like(columns)]))
        assert torch.allclose(found[row], alone[0], atol=1e-5)
    ring = torch.arange(10)
    regular = Csr.from_edges(ring.repeat(3), torch.cat([(ring + k) % 10 for k in (1, 3, 4)]), 10, 10)
    assert torch.allclose(ours(x[:10], regular), theirs(x[:10], regular.edge_index()), atol=1e-5)


def test_two_layers_are_two_of_torch_geometrics():
    from torch_geometric.nn import SAGEConv

    torch.manual_seed(0)
    csr, x = random_graph(), torch.randn(30, 9)
    model = ProductionGraphSAGE(9, 7, 5).eval()
    convs = [SAGEConv(9, 7), SAGEConv(7, 5)]
    for conv, layer in zip(convs, model.layers, strict=True):
        conv.lin_l.load_state_dict(layer.neighbours.state_dict())
        conv.lin_r.load_state_dict(layer.own.state_dict())
    expected = F.normalize(convs[1](convs[0](x, csr.edge_index()).relu(), csr.edge_index()))
    assert torch.allclose(model(x, csr), expected, atol=1e-5) and torch.allclose(model(x, csr.edge_index()), expected, atol=1e-5)
    model.keep_means = True
    assert torch.allclose(model(x, csr), expected, atol=1e-5)
    x *= 2  # kept means belong to the features as they were
    assert torch.allclose(model(x, csr), F.normalize(convs[1](convs[0](x, csr.edge_index()).relu(), csr.edge_index())), atol=1e-5)


def test_gradients_of_max_and_lstm_against_finite_differences():
    csr = random_graph(8, 20)
    x = torch.randn(8, 3, dtype=torch.float64, generator=generator(3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: NeighbourMax.apply(x, csr, 4), (x,))
    lstm = torch.nn.LSTM(3, 3).double()
    assert torch.autograd.gradcheck(lambda x: read_neighbours(lstm, x, csr), (x,))


def test_rows_without_neighbours_and_blocks_of_any_size():
    csr = Csr.from_edges([0, 0, 4], [1, 2, 0], 6, 6)
    x = torch.randn(6, 3)
    whole = NeighbourMax.apply(x, csr)
    assert all(NeighbourMax.apply(x, csr, cells).equal(whole) for cells in (1, 3, 100)) and (whole[[1, 2, 3, 5]] == 0).all()
    empty = Csr.from_edges([], [], 6, 6)
    for aggregator in ("mean", "max", "lstm"):
        model = ProductionGraphSAGE(3, aggregator=aggregator).eval()
        assert torch.allclose(model(x, empty).norm(dim=1), torch.ones(6), atol=1e-5)


@pytest.mark.parametrize("aggregator", ["mean", "max", "lstm"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_all_neighbours_sampled_give_the_vectors_of_the_whole_graph(aggregator, layers):
    torch.manual_seed(0)
    csr, x = random_graph(), torch.randn(30, 9)
    model = ProductionGraphSAGE(9, 6, 4, layers, aggregator=aggregator).eval()
    seeds = torch.tensor([5, 29, 0])
    found = model(x, sample_blocks(csr, seeds, [-1] * layers))
    assert found.shape == (3, 4)
    if aggregator != "lstm" or layers == 1:  # an LSTM reads the rows of a block in the order of the block's edges
        assert torch.allclose(found, model(x, csr)[seeds], atol=1e-5)


def test_the_original_makes_a_model_without_arguments():
    model = ProductionGraphSAGE()
    x, edges = two_groups()
    assert not list(model.layers) and model(x, edges).shape == (40, 64) and model.config.input_dim == 8
    with pytest.raises(InputError, match="another width"):
        model(x[:, :3], edges)


def test_featureless_graphs():
    x, edges = two_groups()
    csr = as_csr(edges, 40)
    structural = structural_features(csr)
    assert structural.shape == (40, 8) and torch.allclose(structural.mean(0), torch.zeros(8), atol=1e-3)
    assert torch.corrcoef(torch.stack([structural[:, 0], csr.degrees.float().log1p()]))[0, 1] > 0.999
    learned = ProductionGraphSAGE(n_nodes=40)
    learned(None, edges).sum().backward()
    assert learned.nodes.weight.grad.shape == (40, 64)
    with pytest.raises(InputError, match="neither features"):
        ProductionGraphSAGE(8)(None, edges)


def test_a_model_comes_back_from_its_file(tmp_path):
    from recgen.core.files import write_torch

    x, edges = two_groups()
    model = ProductionGraphSAGE(aggregator="max").eval()
    expected = model(x, edges)
    write_torch(tmp_path / "model.pt", model.state())
    assert ProductionGraphSAGE.load_from_checkpoint(tmp_path / "model.pt")(x, edges).equal(expected)
    write_torch(tmp_path / "other.pt", {"weights": torch.zeros(2)})
    with pytest.raises(InputError, match="other.pt"):
        ProductionGraphSAGE.load_from_checkpoint(tmp_path / "other.pt")


# --- the loss


def test_the_loss_is_the_papers():
    g = generator(0)
    t, c, n = (F.normalize(torch.randn(*shape, generator=g), dim=-1) for shape in ((7, 4), (7, 4), (7, 5, 4)))
    for scale in (1.0, 5.0):
        plain = sum(-torch.sigmoid(scale * t[i] @ c[i]).log() - sum(torch.sigmoid(-scale * t[i] @ n[i, k]).log() for k in range(5)) for i in range(7)) / 7
        assert torch.allclose(skip_gram_loss(t, c, n, scale), plain, atol=1e-5)
    mean = sum(-torch.sigmoid(5 * t[i] @ c[i]).log() - sum(torch.sigmoid(-5 * t[i] @ n[i, k]).log() for k in range(5)) / 5 for i in range(7)) / 7
    assert torch.allclose(skip_gram_loss(t, c, n, 5.0, "mean"), mean, atol=1e-5)
    assert torch.allclose(skip_gram_loss(t, c, n[0]), skip_gram_loss(t, c, n[:1].expand(7, 5, 4)), atol=1e-5), "negatives that all share"
    assert bool(skip_gram_loss(t * 1e4, -c * 1e4, n, 5.0).isfinite())


# --- held-out edges


def test_cut_walks_never_cross_a_held_out_edge_and_lose_no_other_step():
    x, edges = two_groups()
    csr = as_csr(edges, 40)
    train, held_out = hold_out_edges(csr, 0.2, 0)
    walks = make_walks(csr, SageSettings(walk_length=12, walks_per_node=4))
    cut = cut_walks(walks, held_out, 40).long()

    def steps(w):
        real = (w[:, :-1] >= 0) & (w[:, 1:] >= 0)
        return (w[:, :-1] * 40 + w[:, 1:])[real].sort().values

    hidden = torch.cat([held_out[0] * 40 + held_out[1], held_out[1] * 40 + held_out[0]])
    before, after = steps(walks.long()), steps(cut)
    assert torch.isin(before, hidden).any() and not torch.isin(after, hidden).any()
    assert after.equal(before[~torch.isin(before, hidden)]) and (cut[:, 1] >= 0).all()
    assert PairSampler(cut.int(), 3).n_pairs > 0, "ends only at the end"


def test_held_out_edges_are_in_neither_walks_nor_message_passing():
    x, edges = two_groups()
    for walks in (None, make_walks(as_csr(edges, 40), SageSettings(walk_length=8, walks_per_node=3))):
        trainer = make_trainer(x, as_csr(edges, 40), SageSettings.read(FAST, val_fraction=0.2), walks)
        a, b = trainer.validation.edges
        keys = torch.cat([a * 40 + b, b * 40 + a])
        passed = trainer.graph.rows.long() * 40 + trainer.graph.columns
        assert not torch.isin(passed, keys).any() and trainer.graph.n_edges + 2 * len(a) == edges.shape[1]
        w = trainer.task.pairs.walks.long()
        real = w[:, 1:] >= 0
        assert not torch.isin((w[:, :-1] * 40 + w[:, 1:])[real], keys).any()
        assert not torch.isin(a[:, None] * 40 + trainer.validation.others, torch.cat([keys, passed])).any(), "negatives of the AUC are no edges"


def test_validation_is_fixed_and_seeded():
    x, edges = two_groups()
    csr = as_csr(edges, 40)
    _, held_out = hold_out_edges(csr, 0.2, 0)
    sampler = DegreeBiasedNegativeSampler(csr, 40)
    a, b, c = (Validation(held_out, csr, sampler, seed=s) for s in (0, 0, 1))
    vectors = F.normalize(x)
    assert a.metrics(vectors) == a.metrics(vectors) == b.metrics(vectors) != c.metrics(vectors)


def test_a_canary_edge_that_is_held_out_changes_nothing_that_is_learned():
    "Two graphs that differ in one edge, held out in both trainings: the same losses, bit for bit."
    x, edges = two_groups()
    csr = as_csr(edges, 40)
    train, held_out = hold_out_edges(csr, 0.2, 0)
    made = []
    for extra in ([3, 37], [5, 30]):
        valid = torch.cat([held_out, torch.tensor(extra)[:, None]], 1)
        s = SageSettings.read(FAST, best_metric="valid/loss")
        torch.manual_seed(0)
        pairs = PairSampler(make_walks(train, s), s.window)
        trainer = GraphSAGETrainer(ProductionGraphSAGE(8), x, train, pairs, DegreeBiasedNegativeSampler(train, 40), s, valid)
        trainer.train()
        made.append([r["loss"] for r in trainer.trainer.position.records])
        assert trainer.validation.edges.shape[1] == held_out.shape[1] + 1
    assert len(made[0]) == 3 and made[0] == made[1]


# --- training


@pytest.mark.parametrize("fanouts", [(), (4, 3)])
def test_it_learns_and_leaves_the_best_model_in_place(fanouts, tmp_path):
    x, edges = two_groups()
    config = {**FAST, "epochs": 12, "learning_rate": 0.02, "fanouts": fanouts, "pairs_per_epoch": 2048, "early_stop_patience": 0, "min_delta": 0.0}
    for folder in (None, tmp_path / "run"):
        trainer = make_trainer(x, as_csr(edges, 40), SageSettings.read(config), folder=folder)
        best = trainer.train()
        records = trainer.trainer.position.records
        assert best == min(r["valid/loss"] for r in records)
        with torch.no_grad():
            again = trainer.validation.metrics(trainer.get_embeddings(), trainer.model.scale)["valid/loss"]
        assert again == pytest.approx(best, abs=1e-5), "the model in place is the best one"
    vectors = trainer.get_embeddings()
    similar = vectors @ vectors.T
    assert similar[:20, :20].mean() > similar[:20, 20:].mean() + 0.2 and not vectors.requires_grad


def test_a_resumed_training_ends_bit_for_bit_where_an_undisturbed_one_does(tmp_path):
    x, edges = two_groups()

    class Stops:
        "Fails behind the second epoch, when its checkpoint is written."
        def update(self, records):
            if len(records) == 2:
                raise ZeroDivisionError

    for name, fanouts in (("whole", ()), ("sampled", (4, 3))):
        settings = SageSettings.read({**FAST, "epochs": 5}, fanouts=fanouts, learn_scale=True)
        undisturbed = make_trainer(x, as_csr(edges, 40), settings)
        undisturbed.train()
        broken = make_trainer(x, as_csr(edges, 40), settings, folder=tmp_path / name, live=Stops())
        with pytest.raises(ZeroDivisionError):
            broken.train()
        resumed = make_trainer(x, as_csr(edges, 40), settings, folder=tmp_path / name)
        resumed.train()
        assert resumed.trainer.resumed_from == (2, 0) and resumed.trainer.position.records == undisturbed.trainer.position.records
        assert all(a.equal(b) for a, b in zip(resumed.model.state_dict().values(), undisturbed.model.state_dict().values(), strict=True))
        assert resumed.get_embeddings().equal(undisturbed.get_embeddings())


def test_a_training_stopped_inside_an_epoch_goes_on_with_the_same_batches(tmp_path):
    x, edges = two_groups()
    settings = SageSettings.read({**FAST, "epochs": 2})
    whole = make_trainer(x, as_csr(edges, 40), settings)
    whole.train()
    task = make_trainer(x, as_csr(edges, 40), settings).task
    first, again = (task.batches(generator(settings.seed, 1)) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        placed = task.place(a), task.place(b)
        assert all(placed[0][k].equal(placed[1][k]) for k in ("targets", "contexts", "negatives"))
    assert not task.place(first[0])["targets"].equal(task.place(first[1])["targets"])


def test_files_of_the_original(tmp_path):
    x, edges = two_groups()
    model, vectors = train_graphsage((x, edges), None, {**FAST, "epochs": 4, "min_delta": 0.0}, folder=tmp_path)
    place = tmp_path / "checkpoints"
    assert (place / "model_best.pt").samefile(place / "best.pt") and (place / "model_epoch4.pt").samefile(place / "epoch_4.pt") and (place / "model_epoch2.pt").exists()
    records, summary = (json.loads((tmp_path / "logs" / f"{n}.json").read_text()) for n in ("epoch_metrics", "training_summary"))
    assert [r["epoch"] for r in records] == [1, 2, 3, 4] and summary["finished"] and summary["epochs"] == 4
    assert summary["best_value"] == min(r["valid/loss"] for r in records) == records[summary["best_epoch"] - 1]["valid/loss"]
    assert vectors.shape == (40, 6)


def test_logs_are_written_while_it_trains(tmp_path):
    x, edges = two_groups()
    seen = []

    class Looks:
        def update(self, records):
            seen.append((len(json.loads((tmp_path / "logs" / "epoch_metrics.json").read_text())), json.loads((tmp_path / "logs" / "training_summary.json").read_text())["finished"],
                         (tmp_path / "checkpoints" / "model_best.pt").exists()))

    make_trainer(x, as_csr(edges, 40), SageSettings.read(FAST), folder=tmp_path, live=Looks()).train()
    assert seen[:3] == [(1, False, True), (2, False, True), (3, True, True)]


def test_the_originals_call_with_its_callbacks(tmp_path):
    x, edges = two_groups()
    walks = make_walks(as_csr(edges, 40), SageSettings(walk_length=8, walks_per_node=2))
    pairs = CooccurrencePairSampler(window=2).extract_pairs(walks)
    lines = []
    log = type("Log", (), {"info": lambda self, line: lines.append(line)})()
    trainer = GraphSAGETrainer(model=ProductionGraphSAGE(), features=x, edge_index=edges, positive_pairs=pairs, negative_sampler=DegreeBiasedNegativeSampler(edges, 40, device="cpu"),
                               config={"training": {"learning_rate": 0.0, "batch_size": 512, "gradient_clip": 1.0}, "negatives": {"per_positive": 3}}, folder=tmp_path,
                               callbacks=[EarlyStopping(patience=2, min_delta=1.0), ModelCheckpoint(tmp_path, every=1), TrainingLogger(tmp_path, log_every=2, log=log)])
    best = trainer.train(num_epochs=50)
    assert trainer.trainer.position.epoch == 3 and trainer.trainer.position.stopped, "two epochs without an improvement by 1"
    assert best == trainer.trainer.position.records[0]["loss"] and (tmp_path / "checkpoints" / "model_epoch1.pt").exists()
    assert [line.split(":")[0] for line in lines] == ["Epoch 2", "Epoch 3"]
    assert trainer.trainer.position.samples == 3 * len(pairs), "each pair once an epoch"


def test_batches_that_share_a_forward_are_one_larger_batch():
    x, edges = two_groups()
    made = []
    for size, shared in ((128, 1), (32, 4)):
        trainer = make_trainer(x, as_csr(edges, 40), SageSettings.read({**FAST, "batch_size": size, "batches_per_forward": shared}))
        trainer.train()
        made.append(trainer)
    assert made[0].trainer.position.step == made[1].trainer.position.step and made[0].get_embeddings().equal(made[1].get_embeddings())


def test_train_graphsage_takes_what_torch_geometric_gives():
    from torch_geometric.data import Data

    x, edges = two_groups()
    model, vectors = train_graphsage(Data(x=x, edge_index=edges), None, FAST, torch.device("cpu"))
    _, structural = train_graphsage(Data(edge_index=edges, num_nodes=40), None, FAST)
    assert vectors.shape == structural.shape == (40, 6) and not model.training


# --- bad input


def test_what_it_refuses():
    x, edges = two_groups()
    sampler, pairs = DegreeBiasedNegativeSampler(edges, 40), torch.tensor([[0, 1], [1, 0]])
    good = dict(model=ProductionGraphSAGE(8), features=x, edge_index=edges, positive_pairs=pairs, negative_sampler=sampler)
    for change, words in [(dict(edge_index=edges.to("meta")), "one device"), (dict(features=x.to("meta")), "one device"), (dict(features=None), "neither features"), (dict(edge_index=edges + 1), "edges end at nodes"),
                          (dict(positive_pairs=torch.zeros(0, 2)), "no pairs"), (dict(config={"fanouts": [3]}), "fan-out"), (dict(config={"epocs": 3}), "epocs"), (dict(features=x.long()), "floats")]:
        with pytest.raises(InputError, match=words):
            GraphSAGETrainer(**{**good, **change})
    with pytest.raises(InputError, match="no edges"):
        make_trainer(x, Csr.from_edges([], [], 40, 40), SageSettings.read(FAST))
    with pytest.raises(InputError, match="aggregator"):
        ProductionGraphSAGE(aggregator="sum")
    with pytest.raises(InputError, match="model"):
        ProductionGraphSAGE(num_layers=0)
    with pytest.raises(InputError, match="no graph"):
        train_graphsage(object())
