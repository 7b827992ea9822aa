"""Decoding: known rankings, corners of the catalogue, filters, candidates, the trace, and what memory it takes."""
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgen.core.errors import InputError
from recgen.core.ragged import Ragged
from recgen.formats.trie import Trie
from recgen.retrieval.beam import Seen, beam_search, beam_searches, exact_scores, free_search, score_items
from recgen.retrieval.transformer import Tiger, TigerConfig

FULL = 10_000  # beams: wider than any tree here


def small_model(sizes, seed=0):
    torch.manual_seed(seed)
    return Tiger(TigerConfig(list(sizes), embedding_dim=16, attn_dim=16, num_heads=2, ff_dim=32, encoder_layers=1, decoder_layers=2, max_history=5)).eval()


def known_model(log_p):
    "A model that gives each level's codes these log-probabilities, whatever the history and the codes before: layers that add nothing, and a constant in every vector."
    model = small_model([len(p) for p in log_p])
    with torch.no_grad():
        for layer in model.decoder:
            for last in (layer.self_attention.o, layer.cross_attention.o, layer.ff.down):
                last.weight.zero_()
        model.embedding.weight.zero_()
        model.embedding.weight[:, 0] = 1.0
        model.start.copy_(model.embedding.weight[1])
        for head, p in zip(model.heads, log_p, strict=True):
            head.weight.zero_()
            head.weight[:, 0] = torch.tensor(p) / 16**0.5  # the normed vector is (√16, 0, …)
    return model


def tokens(sizes, users=3, length=6, seed=0):
    return torch.randint(1, 1 + sum(sizes), (users, length), generator=torch.Generator().manual_seed(seed))


def random_codes(sizes, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, k, (n,), generator=g) for k in sizes], 1)


@st.composite
def catalogues(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    code = st.tuples(*[st.integers(0, k - 1) for k in sizes])
    codes = draw(st.lists(code, min_size=1, max_size=20, unique=draw(st.booleans())))
    return sizes, torch.tensor(codes)


def teacher_forced(model, history, codes):
    "(B, N) log-probability of each item by the model's own forward."
    with torch.no_grad():
        rows = [model(row.expand(len(codes), -1), codes) for row in history]
    return torch.stack([sum(level.log_softmax(-1).gather(1, codes[:, i : i + 1]).squeeze(1) for i, level in enumerate(logits)) for logits in rows])


# --- rankings known by construction


def test_the_ranking_of_a_model_whose_probabilities_are_given():
    level = [torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.6, 0.25, 0.15]).log()]
    model = known_model([p.tolist() for p in level])
    codes = torch.tensor([[0, 2], [1, 1], [1, 0], [2, 0], [0, 1]])  # .075, .075, .18, .12, .125
    trie = Trie(codes, torch.arange(1, 6), [3, 3])
    history = tokens([3, 3], 2)
    expected = torch.tensor([0.18, 0.125, 0.12])
    for found in (beam_search(model, history, trie, 3, FULL), beam_search(model, history, trie, 3, 3)):
        assert found.items.tolist() == [[3, 5, 4]] * 2 and torch.allclose(found.scores.exp(), expected.expand(2, -1), atol=1e-5)
    assert torch.allclose(exact_scores(model, history, trie, 5)[:, 1:].exp(), torch.tensor([0.075, 0.075, 0.18, 0.12, 0.125]).expand(2, -1), atol=1e-5)
    greedy = beam_search(model, history, trie, 3, 1)  # goes to code 0, and there to 1: a beam of one misses the best item
    assert greedy.items.tolist() == [[5, 0, 0]] * 2 and not greedy.certified.any()
    best = beam_search(model, history, trie, 1, 2)  # (0, 1) and (1, 0) are kept; the dropped code 2 had .2 > .18
    assert best.items.tolist() == [[3]] * 2 and not best.certified.any()


def test_a_certificate_is_given_exactly_when_the_dropped_prefix_is_worse():
    model = known_model([torch.tensor([0.9, 0.06, 0.04]).log().tolist(), torch.tensor([0.9, 0.1]).log().tolist()])
    trie = Trie(torch.tensor([[0, 0], [0, 1], [1, 0], [2, 0]]), torch.arange(1, 5), [3, 2])
    history = tokens([3, 2], 1)
    one = beam_search(model, history, trie, 1, 1)  # .81 is more than the dropped .06 and .09
    assert one.items.tolist() == [[1]] and one.certified.all()
    two = beam_search(model, history, trie, 2, 2)  # .81, .09; dropped: .04, and .054
    assert two.items.tolist() == [[1, 2]] and two.certified.all()
    three = beam_search(model, history, trie, 3, 2)  # the third does not fit into two beams
    assert three.items.tolist() == [[1, 2, 0]] and not three.certified.any()


def test_equal_scores_give_the_same_list_every_time():
    model = known_model([[0.0] * 4, [0.0] * 4])
    codes = torch.tensor(list(itertools.product(range(4), range(4))))
    trie, history = Trie(codes, torch.arange(1, 17), [4, 4]), tokens([4, 4], 4)
    lists = [beam_search(model, history, trie, 5, 6).items for _ in range(3)]
    assert lists[0].equal(lists[1]) and lists[0].equal(lists[2]) and all(len(set(r)) == 5 for r in lists[0].tolist())


# --- corners of the catalogue


@pytest.mark.parametrize("sizes", [[7], [3, 2, 4, 2, 3]], ids=["one level", "five levels"])
def test_one_level_and_five(sizes):
    codes = random_codes(sizes, 30).unique(dim=0)
    model, history, trie = small_model(sizes), tokens(sizes), Trie(codes, torch.arange(1, len(codes) + 1), sizes)
    exact = exact_scores(model, history, trie, len(codes))
    assert torch.allclose(exact[:, 1:], teacher_forced(model, history, codes), atol=2e-5)
    found = beam_search(model, history, trie, 5, FULL)
    assert torch.allclose(found.scores, exact.topk(5, dim=1).values, atol=2e-5) and found.certified.all()


def test_all_codes_under_one_prefix():
    sizes = [3, 5, 4]
    codes = torch.tensor([[1, b, c] for b in range(5) for c in range(4)] + [[0, 0, 0]])
    model, history, trie = small_model(sizes), tokens(sizes), Trie(codes, torch.arange(1, 22), sizes)
    found, scores = beam_search(model, history, trie, 21, FULL), teacher_forced(model, history, codes)
    assert found.items.sort(1).values.equal(torch.arange(1, 22).expand(3, -1)) and torch.allclose(found.scores, scores.sort(1, descending=True).values, atol=2e-5)
    full = torch.tensor(list(itertools.product(*map(range, sizes))))
    assert exact_scores(model, history, Trie(full, torch.arange(1, 61), sizes), 60).exp().sum(1).tolist() == pytest.approx([1.0] * 3, abs=1e-4), "all tuples together are certain"


def test_codebooks_too_large_for_a_table():
    sizes, codes = [1500, 1500], random_codes([1500, 1500], 300)
    trie = Trie(codes, torch.arange(1, 301), sizes)
    assert trie.dense == [None, None]
    model, history = small_model(sizes), tokens(sizes, 2)
    past = Ragged.from_lists([list(range(1, 200)), []])
    scores = teacher_forced(model, history, codes)
    scores[0, :199] = -torch.inf
    found = beam_search(model, history, trie, 10, FULL, Seen.of(past, trie))
    assert torch.allclose(found.scores, scores.topk(10, dim=1).values, atol=2e-5) and not set(found.items[0].tolist()) & set(range(1, 200))


def test_a_catalogue_of_nothing():
    trie = Trie(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), [3, 3])
    assert (exact_scores(small_model([3, 3]), tokens([3, 3]), trie, 4) == -torch.inf).all()


# --- exact scores and candidates


@settings(derandomize=True, max_examples=40, deadline=None)
@given(catalogues(), st.sampled_from([1, 2, 3, 7, 1000]), st.sampled_from([0, 1, 2]))
def test_exact_scores_do_not_depend_on_the_runs(catalogue, rows, chunk):
    sizes, codes = catalogue
    model, history, trie = small_model(sizes), tokens(sizes), Trie(codes, torch.arange(1, len(codes) + 1), sizes)
    history[1, 3:] = 0
    scores = exact_scores(model, history, trie, len(codes), chunk, rows=rows)
    expected = torch.cat([teacher_forced(model, h[None, :n], codes) for h, n in zip(history, (6, 3, 6), strict=True)])
    assert torch.allclose(scores[:, 1:], expected, atol=2e-5)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(catalogues(), st.sampled_from([1, 5, 0]))
def test_candidates_score_what_exact_scoring_says(catalogue, rows):
    sizes, codes = catalogue
    model, history, trie = small_model(sizes), tokens(sizes), Trie(codes, torch.arange(1, len(codes) + 1), sizes)
    exact = exact_scores(model, history, trie, len(codes))
    items = torch.randint(1, len(codes) + 1, (3, 4), generator=torch.Generator().manual_seed(1))
    wanted = codes[items - 1]
    wanted[2, 1] = -1
    scores = score_items(model, history, wanted, rows=rows)
    expected = exact.gather(1, items)
    expected[2, 1] = -torch.inf
    assert torch.allclose(scores, expected, atol=2e-5)
    assert score_items(model, history, wanted[:, :0]).shape == (3, 0)


def test_a_step_of_exact_scoring_is_as_small_as_asked(monkeypatch):
    from recgen.retrieval import beam

    sizes, codes = [4, 4, 4, 4], random_codes([4] * 4, 200).unique(dim=0)
    model, history, trie = small_model(sizes), tokens(sizes, 2), Trie(codes, torch.arange(1, len(codes) + 1), sizes)
    steps, step = [], beam.Decoder.step

    def counted(self, x, path, keep=True):
        steps.append((x.shape[0] * x.shape[1], keep, sum(s.keys_values[0].shape[:2].numel() for s in path)))
        return step(self, x, path, keep)

    monkeypatch.setattr(beam.Decoder, "step", counted)
    exact_scores(model, history, trie, len(codes), rows=20)
    assert max(rows for rows, _, _ in steps) <= 20
    assert max(stored for _, _, stored in steps) <= 3 * 20, "one run a level is stored"
    assert sum(rows for rows, _, _ in steps) == 2 * sum(trie.n_nodes[:-1]), "every prefix once a user"
    assert sum(rows for rows, keep, _ in steps if keep) == 2 * sum(trie.n_nodes[:-2]), "the last input level stores none"


# --- precision, blocks


@pytest.mark.parametrize("seen", [False, True])
def test_blocks_of_users_change_nothing(seen):
    sizes, codes = [5, 4, 6], random_codes([5, 4, 6], 80)
    model, trie = small_model(sizes), Trie(codes, torch.arange(1, 81), sizes)
    history = tokens(sizes, 7)
    history[2:5, 3:] = 0
    history[5] = 0
    past = Seen.of(Ragged.from_lists([[1, 2], [], [5], list(range(1, 60)), [7], [], [80]]), trie) if seen else None
    whole, parts = (beam_search(model, history, trie, 6, 5, past, rows=rows) for rows in (10_000, 10))
    assert torch.allclose(whole.scores, parts.scores, atol=1e-5) and whole.items.equal(parts.items) and whole.certified.equal(parts.certified)


def test_several_filters_are_several_searches():
    sizes, codes = [5, 4, 6], random_codes([5, 4, 6], 60)
    model, history, trie = small_model(sizes), tokens(sizes), Trie(codes, torch.arange(1, 61), sizes)
    past = Seen.of(Ragged.from_lists([[1, 2, 3], list(range(1, 40)), []]), trie)
    for both, seen in zip(beam_searches(model, history, trie, 6, 5, (None, past), rows=10), (None, past), strict=True):
        alone = beam_search(model, history, trie, 6, 5, seen)
        assert both.items.equal(alone.items) and torch.allclose(both.scores, alone.scores, atol=1e-5)


def test_bf16_is_close_and_other_precisions_are_refused():
    sizes, codes = [5, 4, 6], random_codes([5, 4, 6], 60).unique(dim=0)
    model, history, trie = small_model(sizes), tokens(sizes, 8), Trie(codes, torch.arange(1, len(codes) + 1), sizes)
    exact, near = (exact_scores(model, history, trie, len(codes), precision=p)[:, 1:] for p in ("fp32", "bf16"))
    assert not exact.equal(near) and (exact - near).abs().mean() < 0.05
    with pytest.raises(InputError, match="fp32, bf16"):
        beam_search(model, history, trie, precision="fp8")


def test_no_users_and_no_history():
    sizes, codes = [5, 4], random_codes([5, 4], 12)
    model, trie = small_model(sizes), Trie(codes, torch.arange(1, 13), sizes)
    none = beam_search(model, torch.zeros(0, 6, dtype=torch.int64), trie, 3)
    assert none.items.shape == none.scores.shape == (0, 3) and none.certified.shape == (0,)
    assert exact_scores(model, torch.zeros(0, 6, dtype=torch.int64), trie, 12).shape == (0, 13)
    empty = beam_search(model, torch.zeros(2, 0, dtype=torch.int64), trie, 3, FULL)
    padded = beam_search(model, torch.zeros(2, 8, dtype=torch.int64), trie, 3, FULL)
    assert empty.items.equal(padded.items) and (empty.items > 0).all()


# --- filters


@settings(derandomize=True, max_examples=60, deadline=None)
@given(catalogues(), st.sets(st.integers(0, 25)))
def test_a_restricted_tree_is_the_tree_of_those_items(catalogue, wanted):
    sizes, codes = catalogue
    ids = torch.randperm(20, generator=torch.Generator().manual_seed(0))[: len(codes)] + 1
    part = Trie(codes, ids, sizes).restrict(sorted(wanted))
    keep = torch.tensor([i in wanted for i in ids.tolist()])
    built = Trie(codes[keep], ids[keep], sizes)
    for name in ("items", "leaf_starts", "ancestors", "leaf_of_item"):
        assert getattr(part, name).equal(getattr(built, name)), name
    for name in ("count", "starts", "code", "parent", "dense", "closed"):
        assert all(a is b is None or a.equal(b) for a, b in zip(getattr(part, name), getattr(built, name), strict=True)), name
    assert (part.sizes, part.n_levels, part.n_nodes, part.width) == (built.sizes, built.n_levels, built.n_nodes, built.width)


def test_one_allowed_item_and_few_legal_ones():
    sizes, codes = [5, 4, 6], random_codes([5, 4, 6], 60).unique(dim=0)
    model, history = small_model(sizes), tokens(sizes)
    trie = Trie(codes, torch.arange(1, len(codes) + 1), sizes)
    scores = teacher_forced(model, history, codes)
    one = beam_search(model, history, trie.restrict([17]), 4, 2)
    assert one.items.tolist() == [[17, 0, 0, 0]] * 3 and torch.allclose(one.scores[:, 0], scores[:, 16], atol=2e-5), "a filter does not change a score"
    assert (one.scores[:, 1:] == -torch.inf).all() and one.certified.all()
    few = beam_search(model, history, trie.restrict([3, 9, 17]), 4, FULL, Seen.of(Ragged.from_lists([[9], [3, 9, 17], []]), trie.restrict([3, 9, 17])))
    assert (few.items > 0).sum(1).tolist() == [2, 0, 3]
    assert len(trie.restrict([]).items) == 0


def test_closed_prefixes_take_no_beam():
    model = known_model([torch.tensor([0.6, 0.3, 0.1]).log().tolist(), torch.tensor([0.7, 0.3]).log().tolist()])
    trie = Trie(torch.tensor(list(itertools.product(range(3), range(2)))), torch.arange(1, 7), [3, 2])
    seen = Seen.of(Ragged.from_lists([[1, 2], [1], [1, 2, 3, 4]]), trie)
    found = beam_search(model, tokens([3, 2]), trie, 1, 1, seen)
    assert found.items.tolist() == [[3], [2], [5]], "the best code is closed to the first user, half open to the second"


# --- what the search tells


def test_the_trace_is_the_search():
    sizes, codes = [6, 5, 7], random_codes([6, 5, 7], 100)
    model, history, trie = small_model(sizes), tokens(sizes, 1), Trie(codes, torch.arange(1, 101), sizes)
    trace = []
    found = beam_search(model, history, trie, 8, 9, Seen.of(Ragged.from_lists([[1, 2, 3]]), trie), trace=trace)
    assert len(trace) == 3 and all(set(t) == {"codes", "parent", "score", "node"} for t in trace)
    before = torch.zeros(1, dtype=torch.int64)
    for level, beam in enumerate(trace):
        assert len(beam["node"]) == len(beam["codes"]) == len(beam["parent"]) == len(beam["score"]) <= 9
        assert trie.code[level + 1][beam["node"]].equal(beam["codes"]) and trie.parent[level + 1][beam["node"]].equal(before[beam["parent"]])
        assert (beam["score"][1:] <= beam["score"][:-1]).all() and beam["score"].isfinite().all()
        before = beam["node"]
    assert trie.leaf_of_item[found.items[0, 0]] == trace[-1]["node"][0] and found.scores[0, 0] == trace[-1]["score"][0]
    dead = []
    beam_search(model, history, trie.restrict([17]), 8, 9, trace=dead)
    assert [len(b["node"]) for b in dead] == [1, 1, 1], "dead beams are not in it"
    with pytest.raises(InputError, match="one user"):
        beam_search(model, tokens(sizes, 2), trie, trace=[])


def test_the_search_without_a_catalogue_is_the_search_of_all_tuples():
    sizes = [4, 3, 5]
    model, history = small_model(sizes), tokens(sizes)
    trie = Trie(torch.tensor(list(itertools.product(*map(range, sizes)))), torch.arange(1, 61), sizes)
    numbers, scores = free_search(model, history, 7)
    found = beam_search(model, history, trie, 7, 7)
    assert (numbers + 1).equal(found.items) and torch.allclose(scores, found.scores, atol=1e-5)


def test_a_moved_tree_answers_alike():
    sizes, codes = [4, 3, 9], random_codes([4, 3, 9], 30)
    trie = Trie(codes, torch.arange(1, 31), sizes)
    moved, scores = trie.to("cpu"), torch.rand(4, 9, generator=torch.Generator().manual_seed(0))
    assert moved.__dict__.keys() == trie.__dict__.keys() and repr(moved) == repr(trie)
    for level, k in enumerate(sizes):
        nodes = torch.arange(min(4, trie.n_nodes[level]))
        for a, b in zip(moved.follow(level, nodes, nodes * 0), trie.follow(level, nodes, nodes * 0), strict=True):
            assert a.equal(b)
        assert moved.continuations(level, nodes, scores[: len(nodes), :k]).equal(trie.continuations(level, nodes, scores[: len(nodes), :k]))
