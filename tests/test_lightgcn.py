"LightGCN against dense matrices and torch-geometric; what its losses and its training must hold to."
import pandas as pd
import pytest
import torch

from recgen.core.errors import InputError, ParameterError
from recgen.core.ragged import Ragged
from recgen.core.training import TrainSettings
from recgen.evaluation.evaluator import evaluate_scores
from recgen.evaluation.protocol import make_cases
from recgen.graph.lightgcn import LightGCN, LightGCNConfig, normalised_graph, train_lightgcn

N_USERS, N_ITEMS = 30, 20


@pytest.fixture
def edges():
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, N_USERS - 1, (150,), generator=g), torch.randint(0, N_ITEMS - 1, (150,), generator=g)


@pytest.fixture
def graph(edges):
    return normalised_graph(*edges, N_USERS, N_ITEMS)


def dense(graph):
    return graph.to_torch().to_dense().double()


def test_the_graph_is_normalised_by_both_degrees(edges, graph):
    X = torch.zeros(N_USERS, N_ITEMS).double()
    X[edges] = 1
    scale = X.sum(1, keepdim=True).sqrt() * X.sum(0, keepdim=True).sqrt()
    assert torch.allclose(dense(graph), (X / scale.clamp(min=1)).T, atol=1e-6)
    with pytest.raises(InputError):
        normalised_graph(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), 3, 3)


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_vectors_are_the_mean_of_dense_propagations(graph, n_layers):
    model, A = LightGCN(LightGCNConfig(dim=6, n_layers=n_layers, tau=0.0), graph), dense(graph)
    u, i = model.user.double(), model.item.double()
    users, items = [u], [i]
    for _ in range(n_layers):
        u, i = A.T @ i, A @ u
        users.append(u)
        items.append(i)
    found = model.vectors()
    assert torch.allclose(found[0].double(), torch.stack(users).mean(0), atol=1e-6) and torch.allclose(found[1].double(), torch.stack(items).mean(0), atol=1e-6)
    assert torch.allclose(found[0][-1], model.user[-1] / (n_layers + 1)), "a user without edges has its own vector alone"


def test_propagation_is_torch_geometrics(graph):
    LGConv = pytest.importorskip("torch_geometric.nn").LGConv
    model = LightGCN(LightGCNConfig(dim=5, n_layers=1, tau=0.0), graph)
    ends = torch.stack([graph.columns.long(), graph.rows.long() + N_USERS])
    out = LGConv()(torch.cat([model.user, model.item]), torch.cat([ends, ends.flip(0)], 1))
    assert torch.allclose(torch.cat(model.vectors()) * 2 - torch.cat([model.user, model.item]), out, atol=1e-6)


def test_softmax_with_all_negatives_is_cross_entropy_over_items_not_taken(graph):
    for tau in (0.0, 0.2):
        model = LightGCN(LightGCNConfig(dim=6, negatives=1000, tau=tau, l2=0.0), graph)
        users, items = model.propagated()
        if tau:
            users, items = torch.nn.functional.normalize(users, dim=1) / tau, torch.nn.functional.normalize(items, dim=1)
            assert torch.allclose(model.vectors()[0] / tau, users)
        taken, losses = dense(graph) > 0, []
        for user, item in zip(graph.columns.tolist(), graph.rows.tolist(), strict=True):
            candidates = ~taken[:, user]
            candidates[item] = True
            logits = items @ users[user]
            losses.append(logits[candidates].logsumexp(0) - logits[item])
        assert torch.allclose(model(torch.arange(graph.n_edges)), torch.stack(losses).mean(), atol=1e-5)


def test_sampled_softmax_estimates_the_full_sum(graph):
    model = LightGCN(LightGCNConfig(dim=6, negatives=10, tau=0.0, l2=0.0), graph)
    full = LightGCN(LightGCNConfig(dim=6, negatives=1000, tau=0.0, l2=0.0), graph)
    full.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    index = torch.arange(graph.n_edges)
    with torch.no_grad():
        sampled = torch.stack([model(index) for _ in range(300)]).mean()
        assert abs(sampled - full(index)) < 0.05, "without the correction log 2 would be missing"


def test_bpr_is_the_formula_and_its_negatives_are_not_the_users(graph):
    model = LightGCN(LightGCNConfig(dim=6, loss="bpr", negatives=4, l2=0.3), graph)
    index = torch.arange(0, graph.n_edges, 2)
    user, item = graph.columns[index].long(), graph.rows[index].long()
    torch.manual_seed(5)
    found = model(index)
    torch.manual_seed(5)
    drawn = model.non_edges.draw(user, 4)
    assert not (dense(graph) > 0)[drawn, user[:, None]].any()
    users, items = model.vectors()
    difference = (users[user] * items[item]).sum(1)[:, None] - (users[user][:, None] * items[drawn]).sum(2)
    held = model.user[user].square().sum() + model.item[item].square().sum() + model.item[drawn].square().sum() / 4
    assert torch.allclose(found, -difference.sigmoid().log().mean() + 0.15 * held / len(index), atol=1e-6)


def groups(n=120, seed=0):
    "Three groups of users, each with twenty items of its own; the last item of each user is held out."
    g = torch.Generator().manual_seed(seed)
    rows = [(u, i, p) for u in range(1, n + 1) for p, i in enumerate((torch.randperm(20, generator=g)[:8] + 20 * (u % 3) + 1).tolist())]
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "position"])
    return frame[frame.position < 7], frame[frame.position == 7]


def how(**settings):
    return TrainSettings(**dict(epochs=10, batch_size=210, learning_rate=0.02, scheduler="constant", device="cpu", eval_every=5) | settings)


@pytest.mark.parametrize("config", [LightGCNConfig(8, negatives=30, tau=0.0), LightGCNConfig(8, negatives=30, tau=0.2), LightGCNConfig(8, loss="bpr", negatives=1)])
def test_it_learns_the_groups(config):
    train, held = groups()
    valid = make_cases(train, None, held, "valid")
    trained = train_lightgcn(config, how(best_metric="valid/item/filtered/recall@10"), train, 120, 60, valid)
    model = trained.load_best()
    result = evaluate_scores(model.ranker().scores, valid, "LightGCN")
    assert result.metrics["valid/item/filtered/recall@20"] > 0.9, "13 of the group's items are left"
    assert result.metrics["valid/item/filtered/recall@10"] == pytest.approx(trained.position.records[-1]["valid/item/filtered/recall@10"])
    some = torch.tensor([3, 120])
    assert torch.allclose(model.scores(None, some), model.ranker().scores(None, some)) and model.scores(Ragged.from_lists([[], []]), some).shape == (2, 61)


def test_training_is_seeded_and_resumes(tmp_path):
    train, held = groups(60)
    valid = make_cases(train, None, held, "valid")
    config = LightGCNConfig(8, loss="bpr", negatives=2)
    whole = train_lightgcn(config, how(epochs=4), train, 60, 60, valid, tmp_path / "whole")
    again = train_lightgcn(config, how(epochs=4), train, 60, 60, valid)
    other = train_lightgcn(config, how(epochs=4, seed=1), train, 60, 60, valid)
    assert whole.module.item.equal(again.module.item) and not whole.module.item.equal(other.module.item)

    class Stop(Exception):
        pass

    class StopAfterTwo:
        def info(self, line):
            if line.startswith("LightGCN epoch 2"):
                raise Stop

    with pytest.raises(Stop):
        train_lightgcn(config, how(epochs=4), train, 60, 60, valid, tmp_path / "cut", log=StopAfterTwo())
    resumed = train_lightgcn(config, how(epochs=4), train, 60, 60, valid, tmp_path / "cut")
    assert resumed.resumed_from == (2, 0) and resumed.module.item.equal(whole.module.item)


def test_held_out_rows_leave_no_trace():
    "A canary item that only held-out rows have gets no edge, and other held-out rows give the same vectors."
    train, held = groups(60)
    canary = make_cases(train, None, held.assign(item_id=61), "valid")
    a, b = (train_lightgcn(LightGCNConfig(8, loss="bpr", negatives=1), how(epochs=2), train, 60, 61, valid) for valid in (canary, None))
    assert a.module.graph.degrees[60] == 0 and a.module.graph.n_edges == len(train)
    assert a.module.item.equal(b.module.item) and a.module.user.equal(b.module.user)


def test_what_cannot_be_trained_is_refused(graph):
    for config in (LightGCNConfig(loss="hinge"), LightGCNConfig(dim=0), LightGCNConfig(n_layers=-1), LightGCNConfig(negatives=0)):
        with pytest.raises(ParameterError):
            LightGCN(config, graph)
    train, _ = groups(60)
    for n_users, n_items in ((59, 60), (60, 59)):
        with pytest.raises(InputError, match="outside the dataset"):
            train_lightgcn(LightGCNConfig(), how(), train, n_users, n_items)
