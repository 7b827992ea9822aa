"""Sampled neighbourhoods: every edge exists, the fan-out holds, draws are uniform, the seeds decide everything, and nothing that is to be predicted is let through."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgen.core.device import generator
from recgen.core.errors import InputError
from recgen.graph.hetero import Csr, HeteroGraph
from recgen.graph.sampling import draw_places, localise, locate, neighbours, sample_blocks, sample_hetero

BOUGHT, BOUGHT_BY, NEAR = ("user", "bought", "item"), ("item", "bought_by", "user"), ("item", "near", "item")


def random_csr(n_rows, n_columns, n_edges, seed=0, weights=False):
    "A random graph; some rows are without edges, one has many."
    g = generator(seed)
    rows, columns = torch.randint(max(1, n_rows - 2), (n_edges,), generator=g), torch.randint(n_columns, (n_edges,), generator=g)
    hub = torch.arange(n_columns)
    rows, columns = torch.cat([rows, torch.zeros_like(hub)]), torch.cat([columns, hub])
    return Csr.from_edges(rows, columns, n_rows, n_columns, torch.rand(len(rows), generator=g) if weights else None)


def shop(seed=0, users=30, items=20):
    bought = random_csr(items, users, 90, seed)
    return HeteroGraph({"user": users, "item": items, "brand": 3}, {BOUGHT: bought, BOUGHT_BY: bought.transpose[0], NEAR: random_csr(items, items, 40, seed + 1, weights=True)},
                       {"item": torch.randn(items, 4, generator=generator(seed))})


def edge_set(csr, rows=None, columns=None):
    "Edges as (target, source), in the numbers of the whole graph where node numbers are given."
    r, c = csr.rows.long(), csr.columns.long()
    return list(zip((r if rows is None else rows[r]).tolist(), (c if columns is None else columns[c]).tolist(), strict=True))


# --- drawing


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 12), st.integers(0, 2**31))
def test_places_are_distinct_and_in_range(extra, k, seed):
    degrees = torch.tensor(extra) + k
    places = draw_places(degrees, k, generator(seed))
    assert places.shape == (len(extra), k) and (places >= 0).all() and (places < degrees[:, None]).all()
    assert (places.sort(1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize(("degree", "k"), [(6, 3), (5, 4), (7, 1)])
def test_every_subset_is_equally_likely(degree, k):
    from itertools import combinations

    from scipy.stats import chisquare

    n = 30_000
    places = draw_places(torch.full((n,), degree), k, generator(degree)).sort(1).values
    key = (places * (degree ** torch.arange(k))).sum(1)
    subsets = torch.tensor([sum(p * degree**i for i, p in enumerate(c)) for c in combinations(range(degree), k)])
    counts = (key[:, None] == subsets).sum(0)
    assert counts.sum() == n, "nothing but k-subsets was drawn"
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_large_degrees_are_drawn_evenly_too():
    from scipy.stats import chisquare

    degree = 3_000_000_000  # past float32's and int32's reach
    places = draw_places(torch.full((40_000,), degree), 2, generator(3))
    assert places.max() < degree
    assert chisquare(torch.bincount(places.flatten() // 300_000_000, minlength=10).numpy()).pvalue > 1e-3
    assert chisquare(torch.bincount(places.flatten() % 7).numpy()).pvalue > 1e-3, "low digits are drawn as well"


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(-1, 9), st.integers(0, 2**31))
def test_neighbours_against_brute_force(n_edges, fanout, seed):
    csr = random_csr(12, 15, n_edges, seed % 1000)
    nodes = torch.randint(12, (9,), generator=generator(seed))
    rows, edges = neighbours(csr, nodes, fanout, generator(seed))
    assert (rows.diff() >= 0).all() and len(edges) == len(rows)
    for i, node in enumerate(nodes.tolist()):
        own = csr.columns[csr.offsets[node] : csr.offsets[node + 1]].tolist()
        drawn = csr.columns[edges[rows == i]].tolist()
        assert (csr.rows[edges[rows == i]] == node).all()
        assert len(set(drawn)) == len(drawn) and set(drawn) <= set(own)
        assert len(drawn) == (len(own) if fanout < 0 else min(fanout, len(own)))


def test_no_nodes_and_no_edges_are_fine():
    csr = random_csr(5, 5, 10)
    assert [len(x) for x in neighbours(csr, torch.zeros(0, dtype=torch.int64), 3)] == [0, 0]
    empty = Csr.from_edges(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 4, 4)
    (block, inputs), = sample_blocks(empty, torch.tensor([2, 0]), [3])
    assert block.n_edges == 0 and inputs.tolist() == [2, 0]


@settings(derandomize=True, max_examples=80, deadline=None)
@given(st.data())
def test_local_numbers_are_the_same_by_table_and_by_sorting(data):
    n = data.draw(st.integers(1, 50))
    targets = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=10)), dtype=torch.int64)
    columns = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=40)), dtype=torch.int64)
    for dense in (True, False):
        nodes, place = localise(targets, columns, n, dense)
        assert nodes[: len(targets)].equal(targets) and nodes[place].equal(columns)
        assert nodes[len(targets) :].tolist() == sorted(set(columns.tolist()) - set(targets.tolist()))


# --- blocks


def test_blocks_hold_existing_edges_and_keep_the_fan_out():
    csr = random_csr(60, 60, 500, 1, weights=True)
    known = dict(zip(edge_set(csr), csr.values.tolist(), strict=True))
    seeds = torch.tensor([0, 59, 7, 30])  # 59 is isolated
    blocks = sample_blocks(csr, seeds, [4, 3], generator(0))
    targets = seeds
    for (block, inputs), fanout in zip(reversed(blocks), [4, 3], strict=True):
        assert inputs[: block.n_rows].equal(targets) and len(inputs.unique()) == len(inputs)
        found = edge_set(block, targets, inputs)
        assert len(set(found)) == len(found) and all(known[e] == v for e, v in zip(found, block.values.tolist(), strict=True))
        assert block.degrees.equal(csr.degrees[targets].clamp(max=fanout)), "all neighbours where there are fewer"
        targets = inputs


def test_whole_blocks_compute_what_the_graph_computes():
    csr = random_csr(50, 50, 300, 2, weights=True)
    x, seeds = torch.randn(50, 6, generator=generator(1)), torch.tensor([3, 49, 0])
    dense = csr.to_torch().to_dense()
    h = x
    for i, (block, inputs) in enumerate(sample_blocks(csr, seeds, [-1, -1, -1])):
        h = block.to_torch() @ (x[inputs] if i == 0 else h)
    assert torch.allclose(h, (dense @ (dense @ (dense @ x)))[seeds], atol=1e-4)


def test_the_generator_decides_and_nothing_else():
    csr = random_csr(60, 60, 900, 3)
    draw = lambda seed: sample_blocks(csr, torch.arange(20), [5, 5], generator(seed))  # noqa: E731
    same = zip(draw(1), draw(1), strict=True)
    assert all(a.columns.equal(b.columns) and m.equal(n) for (a, m), (b, n) in same)
    assert not all(a.columns.equal(b.columns) for (a, _), (b, _) in zip(draw(1), draw(2), strict=True) if a.n_edges == b.n_edges)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(1)
    assert before.equal(torch.get_rng_state()), "the global generator is left alone"


def test_seeds_must_be_distinct_nodes():
    csr = random_csr(10, 10, 20)
    for seeds, problem in ((torch.tensor([1, 1]), "twice"), (torch.tensor([10]), "no node"), (torch.tensor([-1]), "no node")):
        with pytest.raises(InputError, match=problem):
            sample_blocks(csr, seeds, [2])


# --- many types


@pytest.mark.parametrize("method", ["fanout", "hgsampling"])
def test_a_hetero_sample_is_a_part_of_the_graph(method):
    graph = shop()
    seeds = {"user": torch.tensor([5, 29, 2]), "item": torch.tensor([19])}
    small, nodes = sample_hetero(graph, seeds, [3, 2], generator(0), method)
    for t, n in small.n_nodes.items():
        assert len(nodes[t]) == n == len(nodes[t].unique())
    assert all(nodes[t][: len(s)].equal(s) for t, s in seeds.items())
    assert small.features["item"].equal(graph.features["item"][nodes["item"]])
    for r, csr in small.relations.items():
        whole = graph.relations[r]
        values = whole.values.tolist() if whole.values is not None else [1.0] * whole.n_edges
        known = dict(zip(edge_set(whole), values, strict=True))
        found = edge_set(csr, nodes[r[2]], nodes[r[0]])
        assert len(set(found)) == len(found) and csr.n_columns == small.n_nodes[r[0]] and csr.n_rows == small.n_nodes[r[2]]
        assert all(known[e] == v for e, v in zip(found, csr.values.tolist() if csr.values is not None else [1.0] * len(found), strict=True))
        if method == "fanout":
            assert csr.degrees.max() <= 3
        else:
            inside = [e for e in edge_set(whole) if e[0] in nodes[r[2]].tolist() and e[1] in nodes[r[0]].tolist()]
            assert sorted(found) == sorted(inside), "all edges among sampled nodes"


def test_complete_hops_reach_all_that_the_seeds_hear():
    graph = shop(2)
    seeds = {"user": torch.tensor([4])}
    _, nodes = sample_hetero(graph, seeds, [-1, -1])
    heard = {("user", 4)}
    for _ in range(2):
        heard |= {(r[0], c) for r, e in graph.relations.items() for t, c in edge_set(e) if (r[2], t) in heard}
    assert {(t, i) for t, ids in nodes.items() for i in ids.tolist()} == heard


@pytest.mark.parametrize("method", ["fanout", "hgsampling"])
def test_edges_to_be_predicted_are_left_out_both_ways(method):
    graph = shop(3)
    items, users = graph.relations[BOUGHT].rows[::3].long(), graph.relations[BOUGHT].columns[::3].long()
    seeds = {"user": users.unique(), "item": items.unique()}
    gone = {BOUGHT: (items, users), BOUGHT_BY: (users, items)}
    pairs = set(zip(items.tolist(), users.tolist(), strict=True))
    small, nodes = sample_hetero(graph, seeds, [-1 if method == "fanout" else 50, 50], generator(0), method, gone)
    left = set(edge_set(small.relations[BOUGHT], nodes["item"], nodes["user"]))
    back = {(i, u) for u, i in edge_set(small.relations[BOUGHT_BY], nodes["user"], nodes["item"])}
    assert not left & pairs and not back & pairs
    assert left == set(edge_set(graph.relations[BOUGHT])) - pairs, "and no other is missing"


def test_hgsampling_prefers_what_many_sampled_nodes_hear_from():
    "Two seeds hear 0, one hears 1: the budget of 0 is 1/2 + 1/2, of 1 and 2 it is 1/2, so 0 comes with probability 1 / (1 + 1/4 + 1/4)."
    edges = Csr.from_edges([0, 0, 1, 1], [0, 1, 0, 2], 2, 3)
    graph = HeteroGraph({"a": 2, "b": 3}, {("b", "to", "a"): edges})
    first = torch.tensor([int(sample_hetero(graph, {"a": torch.tensor([0, 1])}, [1], generator(5, i), "hgsampling")[1]["b"][0]) for i in range(1500)])
    counts = first.bincount(minlength=3)
    assert abs(counts[0] / 1500 - 2 / 3) < 4 * (2 / 9 / 1500) ** 0.5
    assert abs(counts[1] / 1500 - 1 / 6) < 4 * (5 / 36 / 1500) ** 0.5


def test_a_batch_costs_what_it_holds_not_what_the_graph_holds():
    "Sizes of what is sampled do not depend on the graph's size."
    sizes = []
    for n in (2_000, 20_000):
        csr = random_csr(n, n, 10 * n, 4)
        graph = HeteroGraph({"item": n}, {NEAR: csr})
        small, _ = sample_hetero(graph, {"item": torch.arange(1, 20)}, [5, 5], generator(0))
        dense, _ = sample_hetero(graph, {"item": torch.arange(1, 20)}, [30, 30], generator(0), "hgsampling")
        assert small.n_nodes["item"] <= 19 * (1 + 5 + 25) and dense.n_nodes["item"] <= 19 + 60
        sizes.append(small.n_nodes["item"])
    assert sizes[1] <= 1.5 * sizes[0]


def test_what_cannot_be_sampled_is_refused():
    graph = shop()
    with pytest.raises(InputError, match="no such sampling"):
        sample_hetero(graph, {"user": torch.tensor([0])}, [2], method="metropolis")
    with pytest.raises(InputError, match="type that the graph does not have"):
        sample_hetero(graph, {"shop": torch.tensor([0])}, [2])
    with pytest.raises(InputError, match="no user"):
        sample_hetero(graph, {"user": torch.tensor([30])}, [2])


def test_locate():
    assert locate(torch.tensor([7, 3, 5]), torch.tensor([3, 4, 7, 9])).tolist() == [1, -1, 0, -1]
    assert locate(torch.zeros(0, dtype=torch.int64), torch.tensor([3])).tolist() == [-1]
