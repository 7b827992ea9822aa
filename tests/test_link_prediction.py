"Hidden edges, negatives and what is read off vectors, against plain loops and known answers."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgen.core.errors import InputError
from recgen.core.ragged import Ragged
from recgen.evaluation.evaluator import evaluate_scores
from recgen.evaluation.protocol import Cases
from recgen.graph.hetero import Csr
from recgen.graph.link_prediction import (
    MeanHistoryScores,
    NonEdges,
    VectorScores,
    candidate_ranks,
    collapse_figures,
    contains,
    degree_matched_negatives,
    fit_logistic,
    hold_out_edges,
    linear_probe,
    link_auc,
    link_scores,
    one_nn_agreement,
    random_split,
    similarity_gap,
    uniform_negatives,
)

PLAIN = dict(deadline=None, derandomize=True, database=None)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_graph(n=200, degree=6, seed=0):
    "Symmetric, some loops, some nodes without an edge."
    g = seeded(seed)
    a, b = torch.randint(0, n - 5, (2, n * degree // 2), generator=g)
    return Csr.from_edges(torch.cat([a, b]), torch.cat([b, a]), n, n)


def pairs(edges):
    return set(map(tuple, edges.T.tolist()))


@pytest.mark.parametrize("keep_nodes", [True, False])
def test_both_directions_of_a_pair_are_hidden_together(keep_nodes):
    graph = random_graph()
    train, held = hold_out_edges(graph, 0.2, seed=3, keep_nodes=keep_nodes)
    left, all_edges = pairs(train.edge_index()), pairs(graph.edge_index())
    hidden = {(a, b) for a, b in held.T.tolist()}
    assert all(a < b for a, b in hidden), "a pair is asked once, a loop never"
    assert hidden | {(b, a) for a, b in hidden} == all_edges - left and all((b, a) in left for a, b in left)
    assert len(hidden) == round(0.2 * (len(all_edges) + sum(a == b for a, b in all_edges)) / 2)
    if keep_nodes:
        assert ((train.degrees > 0) == (graph.degrees > 0)).all()


def test_a_directed_graph_hides_edges_one_by_one():
    g = seeded()
    graph = Csr.from_edges(torch.randint(0, 30, (400,), generator=g), torch.randint(0, 50, (400,), generator=g), 30, 50, torch.rand(400, generator=g))
    train, held = hold_out_edges(graph, 0.25, seed=0)
    assert pairs(train.edge_index()) | pairs(held) == pairs(graph.edge_index()) and not pairs(train.edge_index()) & pairs(held)
    assert held.shape[1] == round(0.25 * graph.n_edges)
    for a, b in ((train, graph), (train.transpose[0], graph.transpose[0])):
        assert ((a.degrees > 0) == (b.degrees > 0)).all()
    weights = {(s, t): v for s, t, v in zip(*graph.edge_index().tolist(), graph.values.tolist(), strict=True)}
    assert [weights[s, t] for s, t in train.edge_index().T.tolist()] == train.values.tolist()


def test_the_seed_decides_and_every_free_edge_has_its_chance():
    graph = random_graph()
    assert pairs(hold_out_edges(graph, 0.1, 1)[1]) == pairs(hold_out_edges(graph, 0.1, 1)[1]) != pairs(hold_out_edges(graph, 0.1, 2)[1])
    seen = set().union(*(pairs(hold_out_edges(graph, 0.3, seed)[1]) for seed in range(30)))
    assert len(seen) > 0.95 * (graph.n_edges / 2 - 10)


def test_too_many_edges_are_refused():
    line = torch.arange(9)
    graph = Csr.from_edges(torch.cat([line, line + 1]), torch.cat([line + 1, line]), 10, 10)
    assert hold_out_edges(graph, 0.9, keep_nodes=False)[1].shape[1] == 8
    for share in (0.9, 0.0, 0.01):
        with pytest.raises(InputError, match="cannot be held out"):
            hold_out_edges(graph, share)


@st.composite
def small_graphs(draw):
    n, m, square = draw(st.integers(2, 7)), draw(st.integers(2, 7)), draw(st.booleans())
    m = n if square else m
    edges = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, m - 1)), max_size=25))
    weights = draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    rows, columns = (torch.tensor([e[i] for e in edges], dtype=torch.long) for i in (0, 1))
    return Csr.from_edges(rows, columns, n, m), torch.tensor(weights)


@given(small_graphs())
@settings(max_examples=150, **PLAIN)
def test_negatives_are_exactly_the_non_edges(case):
    graph, weights = case
    edges = pairs(graph.edge_index())
    drawer = NonEdges(graph, weights)
    for source in range(graph.n_columns):
        free = {t for t in range(graph.n_rows) if (source, t) not in edges and weights[t] > 0 and not (graph.n_rows == graph.n_columns and t == source)}
        asked = torch.tensor([source])
        if not free:
            with pytest.raises(InputError, match="linked to every"):
                drawer.draw(asked, 3)
        else:
            assert set(drawer.draw(asked, 300, seeded()).flatten().tolist()) == free


def test_draws_follow_the_weights():
    graph = random_graph(60, 8, seed=5)
    sources = torch.arange(60).repeat_interleave(3)
    for negatives, weight in ((uniform_negatives, torch.ones(60)), (degree_matched_negatives, graph.degrees.float())):
        drawn = negatives(graph, sources, 4000, seeded(1))
        assert not contains(graph, drawn, sources[:, None].expand_as(drawn)).any()
        for source in (0, 17, 40):
            p = weight.clone()
            p[graph.transpose[0].columns[graph.transpose[0].rows == source].long()] = 0
            p[source] = 0
            found = torch.bincount(drawn[sources == source].flatten(), minlength=60) / 12_000
            assert (found - p / p.sum()).abs().max() < 0.012


def test_membership_is_the_loop():
    graph, g = random_graph(40, 5), seeded(2)
    rows, columns = torch.randint(0, 40, (2, 3, 500), generator=g)
    edges = pairs(graph.edge_index())
    assert contains(graph, rows, columns).flatten().tolist() == [(c, r) in edges for r, c in zip(rows.flatten().tolist(), columns.flatten().tolist(), strict=True)]
    assert not contains(Csr.from_edges([], [], 3, 3), torch.tensor([0]), torch.tensor([1])).any()


def test_link_figures_are_the_loops_and_scikit_learns():
    from sklearn import metrics
    g = seeded()
    up, down = torch.randn(150, generator=g).round(decimals=1) + 0.7, torch.randn(150, 9, generator=g).round(decimals=1)
    found = link_auc(up, down)
    labels, scores = [1] * 150 + [0] * 1350, torch.cat([up, down.flatten()])
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(labels, scores)) and found["ap"] == pytest.approx(metrics.average_precision_score(labels, scores))
    assert found["mrr"] == pytest.approx(np.mean([1 / (1 + sum(d >= u for d in row)) for u, row in zip(up.tolist(), down.tolist(), strict=True)]))
    for name in ("auc", "ap", "mrr"):
        assert found[f"{name}/low"] < found[name] < found[f"{name}/high"]
    assert link_auc(up, down) == found, "seeded"
    assert link_auc(torch.zeros(5), torch.zeros(5, 4))["mrr"] == 1 / 5, "ties count against the model"


def test_bootstrap_of_links_draws_edges_not_cases():
    "Twenty copies of one negative an edge tell no more than one."
    g = seeded(4)
    up, down = torch.randn(300, generator=g) + 0.5, torch.randn(300, 1, generator=g)
    one, many = link_auc(up, down, resamples=400), link_auc(up, down.expand(-1, 20), resamples=400)
    width = [f["auc/high"] - f["auc/low"] for f in (one, many)]
    assert width[1] == pytest.approx(width[0], rel=1e-6) and one["auc"] == pytest.approx(many["auc"])


def test_bad_link_scores_are_refused():
    for up, down in [(torch.rand(3), torch.rand(4, 2)), (torch.rand(3), torch.rand(3)), (torch.tensor([torch.nan]), torch.rand(1, 2))]:
        with pytest.raises(InputError):
            link_auc(up, down)


def test_candidate_ranks_are_the_loop():
    graph = random_graph(40, 5, seed=7)
    train, held = hold_out_edges(graph, 0.2, 0)
    x = torch.randn(40, 4, generator=seeded()).round(decimals=0)
    edges, expected = pairs(train.edge_index()), []
    for s, t in held.T.tolist():
        score = (x @ x[s]).tolist()
        expected.append(1 + sum(score[j] >= score[t] for j in range(40) if j not in (s, t) and (s, j) not in edges))
    assert candidate_ranks(x, x, held, train).tolist() == expected
    y = torch.randn(11, 4, generator=seeded(1))
    edge = torch.tensor([[3], [5]])
    assert candidate_ranks(x, y, edge).item() == 1 + sum(v > (x[3] @ y[5]) for v in y @ x[3])


def test_link_scores_are_dot_products():
    x, y = torch.randn(20, 3, generator=seeded()), torch.randn(9, 3, generator=seeded(1))
    s, t = torch.tensor([1, 4, 4]), torch.tensor([[0, 8], [3, 3], [7, 1]])
    assert torch.allclose(link_scores(x, y, s, t), (x @ y.T)[s[:, None], t])
    assert torch.allclose(link_scores(x, y, s, t[:, 0]), (x @ y.T)[s, t[:, 0]])


def test_gap_and_collapse():
    graph = random_graph(150, 6)
    same = torch.ones(150, 8) + 1e-6 * torch.randn(150, 8, generator=seeded())
    assert abs(similarity_gap(same, graph)["gap"]) < 1e-5 and collapse_figures(same)["mean_cosine"] > 0.999
    x = torch.randn(5000, 8, generator=seeded())
    figures = collapse_figures(x)
    assert 7.9 < figures["effective_rank"] <= 8 and figures["dead_dimensions"] == 0 and abs(figures["mean_cosine"]) < 0.01
    assert figures["variance"] == pytest.approx(x.double().var(0, correction=0).mean().item())
    x[:, 2:] = 0
    figures = collapse_figures(x)
    assert 1.9 < figures["effective_rank"] < 2.001 and figures["dead_dimensions"] == 6 and figures["least_variance"] == 0
    assert collapse_figures(torch.ones(4, 3))["effective_rank"] == 0
    with pytest.raises(InputError):
        collapse_figures(torch.full((2, 2), torch.nan))
    components = torch.nn.functional.one_hot(torch.arange(60) // 20).float()
    a, b = torch.cartesian_prod(torch.arange(60), torch.arange(60)).T
    inside = (a // 20 == b // 20) & (a != b)
    blocks = Csr.from_edges(a[inside], b[inside], 60, 60)
    assert similarity_gap(components, blocks) == dict(neighbours=1.0, others=0.0, gap=1.0)


def test_one_nn_agreement_and_its_chance():
    g = seeded()
    labels = torch.tensor([0] * 700 + [1] * 200 + [2] * 100 + [-1] * 50)
    noise = one_nn_agreement(torch.randn(1050, 5, generator=g), labels)
    assert noise["nodes"] == 1000 and noise["chance"] == pytest.approx(0.54, abs=0.01), "the sum of squared shares"
    assert noise["agreement"] < noise["chance_high"] + 0.02 and noise["chance"] < noise["chance_high"] < 0.62
    known = torch.nn.functional.one_hot(labels.clamp(min=0), 3) + 0.1 * torch.randn(1050, 3, generator=g)
    assert one_nn_agreement(known, labels)["agreement"] == 1.0
    assert one_nn_agreement(known, labels, metric="l2")["agreement"] == 1.0


def test_splits_are_stratified_disjoint_and_seeded():
    labels = torch.cat([torch.arange(7).repeat_interleave(40), torch.full((9,), -1)])
    parts = random_split(labels, 0, train=0.25, valid=0.1)
    assert [torch.bincount(labels[p]).tolist() for p in parts] == [[10] * 7, [4] * 7, [26] * 7]
    assert sorted(torch.cat(parts).tolist()) == list(range(280))
    assert parts[0].equal(random_split(labels, 0, 0.25, 0.1)[0]) and not parts[0].equal(random_split(labels, 1, 0.25, 0.1)[0])


def test_logistic_regression_is_scikit_learns():
    from sklearn import linear_model as linear
    g = seeded()
    y = torch.randint(0, 3, (150,), generator=g)
    x = torch.randn(150, 6, generator=g).double() + y[:, None]
    found = fit_logistic(x, y, 0.05, torch.zeros(3, 7).double())
    expected = linear.LogisticRegression(C=1 / (0.05 * 150), tol=1e-10, max_iter=5000).fit(x, y)
    assert np.abs(found[:, :-1].numpy() - expected.coef_).max() < 1e-4


def test_the_probe_finds_what_is_linear_and_chooses_on_validation():
    g = seeded()
    labels = torch.randint(0, 3, (900,), generator=g)
    x = torch.cat([torch.nn.functional.one_hot(labels, 3) + 0.4 * torch.randn(900, 3, generator=g), torch.randn(900, 30, generator=g)], 1)
    probe, noise = linear_probe(x, labels), linear_probe(torch.randn(900, 33, generator=g), labels)
    assert len(probe) == 3 and probe.micro.min() > 0.8 and noise.micro.max() < 0.45
    assert (probe.l2 > 1e-4).all(), "thirty useless columns and thirty nodes a class ask for a penalty"
    split = random_split(labels, 0)
    assert linear_probe(x, labels, splits=[split]).drop(columns="seed").iloc[0].equals(probe.drop(columns="seed").iloc[0])
    assert linear_probe(x * 100 - 7, labels, splits=[split]).micro[0] == pytest.approx(probe.micro[0], abs=0.01), "features are standardised"


def test_vectors_rank_items():
    users, items = torch.randn(6, 4, generator=seeded()), torch.randn(9, 4, generator=seeded(1))
    model = VectorScores(users, items)
    scores = model.scores(None, torch.tensor([2, 6]))
    assert scores.shape == (2, 10) and (scores[:, 0] == -torch.inf).all() and torch.allclose(scores[1, 1:], items @ users[5])
    best = (users @ items.T).argmax(1) + 1
    cases = Cases(torch.arange(1, 7), Ragged.from_lists([[]] * 6), best, torch.zeros(6, dtype=torch.long))
    assert evaluate_scores(model.scores, cases).metrics["test/item/filtered/recall@1"] == 1.0
    for wrong in (0, 7):
        with pytest.raises(InputError):
            model.scores(None, torch.tensor([wrong]))
    with pytest.raises(InputError):
        VectorScores(users, items[:, :3])


def test_mean_of_the_history_ranks_items():
    items = torch.randn(9, 4, generator=seeded())
    rows = [[1, 9, 3], [], [2, 2]]
    history = Ragged.from_lists(rows)
    scores = MeanHistoryScores(items).scores(history)
    expected = torch.stack([items[[i - 1 for i in r]].mean(0) if r else torch.zeros(4) for r in rows]) @ items.T
    assert torch.allclose(scores[:, 1:], expected, atol=1e-6) and (scores[:, 0] == -torch.inf).all()
    late = MeanHistoryScores(items, half_life=2.0).scores(history)
    weight = torch.tensor([0.5, 0.5**0.5, 1.0])
    assert torch.allclose(late[0, 1:], items @ (weight / weight.sum() @ items[[0, 8, 2]]), atol=1e-6)
    with pytest.raises(InputError):
        MeanHistoryScores(items).scores(Ragged.from_lists([[10]]))
