"Walks: their law against exact transition probabilities, dead ends, seeds, threads, and what is refused."
import importlib.util

import pytest
import torch
from scipy.stats import chisquare

from recgen.core.errors import InputError, ParameterError
from recgen.graph.hetero import Csr
from recgen.graph.walks import StepTables, node2vec_walks, uniform_walks, walk_starts

has_numba = importlib.util.find_spec("numba") is not None
WAYS = [False, pytest.param(True, marks=pytest.mark.skipif(not has_numba, reason="numba is not installed: pip install 'recgen[bench]'"))]


def random_graph(n=9, edges=24, seed=0, dead=(), symmetric=False):
    "A small graph with weights; rows in `dead` have no edges."
    draws = torch.Generator().manual_seed(seed)
    rows, columns = torch.randint(n, (2, edges), generator=draws)
    if symmetric:
        rows, columns = torch.cat([rows, columns]), torch.cat([columns, rows])
    keep = ~torch.isin(rows, torch.tensor(dead, dtype=torch.int64))
    graph = Csr.from_edges(rows[keep], columns[keep], n, n)
    graph.values = torch.rand(graph.n_edges, generator=draws) + 0.1
    return graph


def dense(graph, weighted):
    out = torch.zeros(graph.n_rows, graph.n_rows, dtype=torch.float64)
    out[graph.rows.long(), graph.columns.long()] = graph.values.double() if weighted else 1.0
    return out


def exact_triples(graph, start, p, q, weighted):
    "{(x1, x2, x3): probability} of three steps from `start`, written as the definition has it; -1 after a dead end."
    weights, found = dense(graph, weighted), {}

    def step(before, here):
        w = weights[here].clone()
        if before >= 0:
            for x in w.nonzero().flatten().tolist():
                w[x] *= 1 / p if x == before else 1.0 if weights[before, x] > 0 else 1 / q
        return w / w.sum() if w.sum() > 0 else None

    def go(path, probability):
        if len(path) == 4:
            found[tuple(path[1:])] = found.get(tuple(path[1:]), 0.0) + probability
            return
        law = None if path[-1] < 0 else step(path[-2] if len(path) > 1 else -1, path[-1])
        for x, share in [(-1, 1.0)] if law is None else [(x, float(law[x])) for x in law.nonzero().flatten().tolist()]:
            go([*path, x], probability * share)

    go([start], 1.0)
    return found


def assert_law(walks, expected):
    shapes, counts = walks[:, 1:].long().unique(dim=0, return_counts=True)
    seen = dict(zip(map(tuple, shapes.tolist()), counts.tolist(), strict=True))
    assert not set(seen) - set(expected)
    keys = [k for k in expected if expected[k] * len(walks) >= 5]  # the chi-square's usual condition; the rest is one class
    observed, law = [seen.get(k, 0) for k in keys], [expected[k] * len(walks) for k in keys]
    rest = len(walks) - sum(law)
    if rest > 5:
        observed, law = [*observed, len(walks) - sum(observed)], [*law, rest]
    assert chisquare(observed, torch.tensor(law, dtype=torch.float64) * (sum(observed) / sum(law))).pvalue > 1e-4


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_uniform_walks_have_the_exact_law(seed, weighted):
    graph = random_graph(seed=seed, dead=(3,))
    start = int(graph.degrees.argmax())
    walks = uniform_walks(graph, torch.full((60_000,), start), 4, torch.Generator().manual_seed(seed), weighted)
    assert_law(walks, exact_triples(graph, start, 1, 1, weighted))


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize(("p", "q", "weighted", "symmetric"), [(4, 0.5, False, True), (0.25, 2, False, False), (0.5, 0.25, True, True), (2, 4, True, False), (1, 3, False, True), (0.3, 0.2, True, False)])
def test_node2vec_walks_have_the_exact_law(p, q, weighted, symmetric, compiled):
    graph = random_graph(7, 16, seed=5, dead=() if symmetric else (2,), symmetric=symmetric)
    start = int(graph.degrees.argmax())
    walks = node2vec_walks(graph, torch.full((60_000,), start), 4, p, q, torch.Generator().manual_seed(1), weighted, compiled)
    assert_law(walks, exact_triples(graph, start, p, q, weighted))


@pytest.mark.parametrize("compiled", WAYS)
def test_the_law_test_can_fail(compiled):
    graph = random_graph(7, 16, seed=5, symmetric=True)
    start = int(graph.degrees.argmax())
    walks = node2vec_walks(graph, torch.full((60_000,), start), 4, 4, 0.5, torch.Generator().manual_seed(1), compiled=compiled)
    with pytest.raises(AssertionError):
        assert_law(walks, exact_triples(graph, start, 3, 0.5, False))


@pytest.mark.parametrize("way", ["uniform", "weighted", "torch", *(["numba"] if has_numba else [])])
def test_walks_follow_edges_and_stop_for_good_at_dead_ends(way):
    graph = random_graph(200, 320, seed=3, dead=tuple(range(0, 200, 7)))
    draws, starts = torch.Generator().manual_seed(0), torch.arange(200).repeat(20)
    if way in ("uniform", "weighted"):
        walks = uniform_walks(graph, starts, 12, draws, way == "weighted")
    else:
        walks = node2vec_walks(graph, starts, 12, 0.5, 2, draws, compiled=way == "numba")
    assert walks.dtype == torch.int32 and walks.shape == (4000, 12) and walks.is_contiguous() and walks[:, 0].long().equal(starts)
    edge = torch.zeros(201, 201, dtype=torch.bool)
    edge[graph.rows.long(), graph.columns.long()] = True
    here, then = walks[:, :-1].long(), walks[:, 1:].long()
    assert edge[here[then >= 0], then[then >= 0]].all()
    ended = then < 0
    degrees = torch.cat([graph.degrees, torch.zeros(1, dtype=torch.int64)])
    assert ended.any() and (degrees[here[ended]] == 0).all() and not (degrees[here[~ended]] == 0).any()


def test_a_row_whose_weights_are_all_zero_is_a_dead_end():
    graph = Csr.from_edges([0, 0, 1, 1, 2], [1, 2, 0, 2, 1], 3, 3, values=torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0]))
    walks = uniform_walks(graph, torch.tensor([0, 1, 2] * 50), 4, torch.Generator().manual_seed(0), weighted=True)
    assert walks[:3].tolist() == [[0, 1, -1, -1], [1, -1, -1, -1], [2, 1, -1, -1]] and (walks.view(50, 3, 4) == walks[:3]).all()
    if has_numba:
        again = node2vec_walks(graph, torch.tensor([0, 1, 2] * 50), 4, 2, 2, torch.Generator().manual_seed(0), weighted=True, compiled=True)
        assert again.equal(walks)


def test_the_same_generator_gives_the_same_walks_on_any_number_of_threads():
    graph = random_graph(500, 3000, seed=1)
    starts = torch.arange(500).repeat(150)  # more than two blocks
    before = torch.get_num_threads()
    try:
        made = {}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made[threads] = [uniform_walks(graph, starts, 5, torch.Generator().manual_seed(7)),
                             *(node2vec_walks(graph, starts[:70_000], 4, 2, 0.5, torch.Generator().manual_seed(7), compiled=c) for c in (False, *([True] if has_numba else [])))]
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for a, b in zip(made[1], made[2], strict=True))
    draws = torch.Generator().manual_seed(8)
    first, second = uniform_walks(graph, starts, 5, draws), uniform_walks(graph, starts, 5, draws)
    assert not first.equal(made[1][0]) and not first.equal(second)
    blocks = uniform_walks(graph, torch.full((80_000,), 3), 5, draws).view(4, 20_000, 5)
    assert all(not blocks[0].equal(b) for b in blocks[1:]), "blocks have streams of their own"


def test_a_hub_is_left_evenly():
    n = 20_001
    graph = Csr.from_edges(torch.zeros(n - 1, dtype=torch.int64), torch.arange(1, n), n, n)
    assert StepTables.of(graph).degree.dtype == torch.float64
    second = uniform_walks(graph, torch.zeros(400_000, dtype=torch.int64), 2, torch.Generator().manual_seed(0))[:, 1].long()
    counts = torch.bincount(second, minlength=n)[1:]
    assert counts.min() > 0 and chisquare(counts.view(100, -1).sum(1)).pvalue > 1e-4


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33, 80])
def test_walks_of_any_length_are_laid_down_whole(length):
    ring = Csr.from_edges(torch.arange(50), (torch.arange(50) + 1) % 50, 50, 50)
    walks = uniform_walks(ring, torch.arange(50), length, torch.Generator().manual_seed(0))
    assert walks.long().equal((torch.arange(50)[:, None] + torch.arange(length)) % 50)
    tail = Csr.from_edges(torch.arange(49), torch.arange(1, 50), 50, 50)  # ends at 49
    walks, there = uniform_walks(tail, torch.arange(40, 50), length), torch.arange(40, 50)[:, None] + torch.arange(length)
    assert walks.long().equal(there.masked_fill(there > 49, -1))


def test_starts_are_of_nodes_with_edges_and_shuffled():
    graph = random_graph(50, 60, seed=2, dead=(1, 2, 3))
    starts = walk_starts(graph, 3, torch.Generator().manual_seed(0))
    assert starts.long().bincount(minlength=50).tolist() == [3 * int(d > 0) for d in graph.degrees] and not starts.equal(starts.sort().values)


def test_edges_of_the_graph_that_are_not_there():
    empty = Csr.from_edges([], [], 3, 3)
    assert uniform_walks(empty, torch.tensor([0, 2]), 3).tolist() == [[0, -1, -1], [2, -1, -1]]
    assert node2vec_walks(empty, torch.tensor([0, 2]), 3, 2, 2, compiled=False).tolist() == [[0, -1, -1], [2, -1, -1]]
    assert uniform_walks(random_graph(), torch.tensor([], dtype=torch.int64), 3).shape == (0, 3)


def test_what_is_refused():
    graph, square = random_graph(), Csr.from_edges([0, 1], [0, 4], 2, 5)
    with pytest.raises(InputError, match="one set of nodes"):
        uniform_walks(square, torch.tensor([0]), 3)
    for starts in ([9], [-1, 0]):
        with pytest.raises(InputError, match="outside the graph"):
            uniform_walks(graph, torch.tensor(starts), 3)
    for p, q in ((0, 1), (1, -2), (float("nan"), 1), (2, float("inf"))):
        with pytest.raises(ParameterError, match="positive"):
            node2vec_walks(graph, torch.tensor([0]), 3, p, q)
    with pytest.raises(ParameterError, match="at least its start"):
        uniform_walks(graph, torch.tensor([0]), 0)
    graph.values = None
    with pytest.raises(InputError, match="no weights"):
        uniform_walks(graph, torch.tensor([0]), 3, weighted=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_the_law_holds_on_cuda():
    graph = random_graph(7, 16, seed=5, dead=(2,)).to("cuda")
    start = int(graph.degrees.argmax())
    for weighted in (False, True):
        walks = uniform_walks(graph, torch.full((60_000,), start), 4, torch.Generator().manual_seed(0), weighted)
        assert walks.device.type == "cuda"
        assert_law(walks.cpu(), exact_triples(graph.to("cpu"), start, 1, 1, weighted))
        walks = node2vec_walks(graph, torch.full((60_000,), start), 4, 2, 0.5, torch.Generator().manual_seed(0), weighted)
        assert_law(walks.cpu(), exact_triples(graph.to("cpu"), start, 2, 0.5, weighted))


def test_both_sides_of_the_benchmarks_do_the_same_work():
    from recgen.core.benchmark import OURS, present_sides
    from recgen.graph import walk_benchmarks as part

    options = {**part.WALK_SIZES["small"], "walk_nodes": 500, "walk_edges": 5000, "block_seeds": 200, "fanouts": [7, 4], "seed": 0, "items": 40}
    for name, measurement in part.MEASUREMENTS.items():
        sides, missing = present_sides(measurement.prepare(options))
        assert next(iter(sides)) == OURS and set(missing.values()) <= {"numba", "pyg-lib"} and len({s.items for s in sides.values()}) == 1
        made = {side: s.judge(s.run(1)) for side, s in sides.items() if s.judge}
        if name == "pairs":
            assert len({tuple(v.values()) for v in made.values()}) == 1 and made[OURS]["pairs"] == sides[OURS].items
        for side in made:
            figure = {"walks": "mean_degree", "walks_second_order": "back", "neighbourhoods": "edges"}.get(name)
            if figure and side != "NeighborLoader":  # which draws fewer: see the notebook
                assert made[side][figure] == pytest.approx(made[OURS][figure], rel=0.05)
