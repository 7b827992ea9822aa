"""Sequences, decoding and recommending: what must hold for any catalogue, any history and any number of levels."""
import itertools
import json
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgen.core.errors import InputError, RunError
from recgen.core.files import write_parquet, write_torch
from recgen.core.ragged import Ragged, padding_share
from recgen.core.run import Run
from recgen.evaluation.protocol import Cases
from recgen.evaluation.ranking import rank_from_scores
from recgen.formats.semantic_ids import SemanticIDs
from recgen.formats.trie import Trie
from recgen.retrieval.beam import Seen, beam_search, exact_scores
from recgen.retrieval.recommender import Recommender
from recgen.retrieval.sequences import PrefixSamples, history_tokens, token_table
from recgen.retrieval.training import TigerTask, choose_path, rank_cases
from recgen.retrieval.transformer import Tiger, TigerConfig

FULL = 10_000  # beams: wider than any tree here


def small_model(sizes, seed=0, **changes):
    torch.manual_seed(seed)
    shape = {"embedding_dim": 16, "attn_dim": 16, "num_heads": 2, "ff_dim": 32, "encoder_layers": 1, "decoder_layers": 2, "max_history": 5, **changes}
    return Tiger(TigerConfig(list(sizes), **shape)).eval()


def shop(sizes, codes, seed=0, **changes):
    "A model, its IDs, token table and trie, for items 1 … N with these codes."
    ids = SemanticIDs(torch.arange(1, len(codes) + 1), torch.as_tensor(codes), list(sizes))
    return small_model(sizes, seed, **changes), ids, token_table(ids, len(ids)), ids.to_trie()


def tokens_of(model, table, history):
    return history_tokens(table, history.last(model.config.max_history).padded())


def expected_lists(model, ids, table, history, seen=True):
    "For each user all legal (item, score), best first, by teacher forcing on one tuple at a time: no trie, no cache."
    out = []
    for row in history.tolist():
        window = Ragged.from_lists([row[-model.config.max_history :]] * len(ids))
        with torch.no_grad():
            logits = model(history_tokens(table, window.padded()), ids.codes())
        score = sum(level.log_softmax(-1).gather(1, ids.codes()[:, i : i + 1]).squeeze(1) for i, level in enumerate(logits))
        legal = [(i + 1, s) for i, s in enumerate(score.tolist()) if not (seen and i + 1 in row)]
        out.append(sorted(legal, key=lambda p: -p[1]))
    return out


def check_lists(found, expected, exact, k):
    "Every list is legal, ordered, exactly scored; where it is certified (or the beam is full) it is the best there is."
    for u, legal in enumerate(expected):
        items = [i for i in found.items[u].tolist() if i]
        scores = found.scores[u, : len(items)]
        allowed = dict(legal)
        assert len(set(items)) == len(items) and set(items) <= allowed.keys()
        assert found.items[u, len(items) :].count_nonzero() == 0 and (found.scores[u, len(items) :] == -torch.inf).all()
        assert torch.allclose(scores, torch.tensor([allowed[i] for i in items]), atol=2e-5)
        assert (scores[1:] <= scores[:-1]).all()
        if exact or found.certified[u]:
            assert len(items) == min(k, len(legal))
            assert torch.allclose(scores, torch.tensor([s for _, s in legal[:k]]), atol=2e-5)


@st.composite
def worlds(draw):
    "A catalogue of 1 … 5 levels, sometimes with shared codes, and a few users' histories."
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    code = st.tuples(*[st.integers(0, k - 1) for k in sizes])
    shared = draw(st.booleans())
    codes = draw(st.lists(code, min_size=1, max_size=14, unique=not shared))
    item = st.integers(1, len(codes))
    histories = draw(st.lists(st.lists(item, max_size=9), min_size=1, max_size=4))
    return sizes, [list(c) for c in codes], histories


@settings(derandomize=True, max_examples=60, deadline=None)
@given(worlds(), st.integers(1, 8), st.sampled_from([1, 2, 4, FULL]), st.booleans())
def test_beam_search_in_any_world(world, k, beams, filtered):
    sizes, codes, histories = world
    model, ids, table, trie = shop(sizes, codes)
    history = Ragged.from_lists(histories)
    found = beam_search(model, tokens_of(model, table, history), trie, k, beams, Seen.of(history, trie) if filtered else None)
    assert found.items.shape == found.scores.shape == (len(histories), k)
    check_lists(found, expected_lists(model, ids, table, history, filtered), beams == FULL, k)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(worlds())
def test_exact_scores_are_teacher_forcing(world):
    sizes, codes, histories = world
    model, ids, table, trie = shop(sizes, codes)
    history = Ragged.from_lists(histories)
    scores = exact_scores(model, tokens_of(model, table, history), trie, len(ids), chunk=1)
    for u, legal in enumerate(expected_lists(model, ids, table, history, seen=False)):
        assert torch.allclose(scores[u, 1:], torch.tensor([s for _, s in sorted(legal)]), atol=2e-5)
    assert (scores[:, 0] == -torch.inf).all()


@settings(derandomize=True, max_examples=20, deadline=None)
@given(worlds(), st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_the_lists(world, random):
    sizes, codes, histories = world
    model, _, table, trie = shop(sizes, codes)
    order = list(range(len(histories)))
    random.shuffle(order)
    found = []
    for rows in (histories, [histories[i] for i in order]):
        history = Ragged.from_lists(rows)
        found.append(beam_search(model, tokens_of(model, table, history), trie, 5, 3, Seen.of(history, trie)))
    assert torch.allclose(found[0].scores[order], found[1].scores, atol=1e-5)
    assert found[0].items[order].equal(found[1].items) or torch.allclose(found[0].scores[:, 1:], found[0].scores[:, :-1], atol=1e-5)


# --- corners


def lists(model, table, trie, histories, k=4, beams=FULL):
    history = Ragged.from_lists(histories)
    return beam_search(model, tokens_of(model, table, history), trie, k, beams, Seen.of(history, trie))


def test_a_catalogue_of_one_item():
    model, _, table, trie = shop([1, 1], [[0, 0]])
    found = lists(model, table, trie, [[], [1]], k=3)
    assert found.items.tolist() == [[1, 0, 0], [0, 0, 0]] and found.scores[0, 0] == 0, "the only code of a level is certain"
    assert (found.scores[1] == -torch.inf).all()


def test_a_level_that_is_full_and_levels_of_one_code():
    codes = [[a, 0, b] for a, b in itertools.product(range(4), range(5))]
    model, ids, table, trie = shop([4, 1, 5], codes)
    history = Ragged.from_lists([[3, 7], []])
    found = lists(model, table, trie, history.tolist(), k=25)
    check_lists(found, expected_lists(model, ids, table, history), True, 25)
    assert (found.items > 0).sum(1).tolist() == [18, 20]


def test_users_who_have_seen_everything_get_nothing():
    codes = [[a, b] for a, b in itertools.product(range(3), range(3))]
    model, _, table, trie = shop([3, 3], codes)
    found = lists(model, table, trie, [list(range(1, 10)), list(range(2, 10)), []], k=5)
    assert (found.items > 0).sum(1).tolist() == [0, 1, 5] and found.items[1, 0] == 1
    narrow = lists(model, table, trie, [list(range(1, 10)), list(range(2, 10)), []], k=5, beams=1)
    assert (narrow.items > 0).sum(1).tolist() == [0, 1, 1] and narrow.items[1, 0] == 1, "closed prefixes take no beam"


def test_items_that_share_codes_some_of_them_seen():
    codes = [[0, 0]] * 4 + [[0, 1], [1, 0], [1, 0]]
    model, ids, table, trie = shop([2, 2], codes)
    history = Ragged.from_lists([[2, 2, 4], [1, 2, 3, 4], [6], []])
    for k in (1, 2, 3, 7):
        found = beam_search(model, tokens_of(model, table, history), trie, k, FULL, Seen.of(history, trie))
        check_lists(found, expected_lists(model, ids, table, history), True, k)
    shared = [i for i in found.items[0].tolist() if i in (1, 3)]
    assert shared == [1, 3], "in the order of their ids"


def test_only_the_window_is_read_but_all_of_the_history_is_left_out():
    codes = [[a, b] for a, b in itertools.product(range(4), range(4))]
    model, _, table, trie = shop([4, 4], codes)
    long, short = [9, 8, 7, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5]
    a, b = (lists(model, table, trie, [h], k=16) for h in (long, short))
    assert set(a.items[0].tolist()) == set(range(1, 17)) - set(long) | {0}
    scores = dict(zip(b.items[0].tolist(), b.scores[0].tolist(), strict=True))
    assert all(scores[i] == pytest.approx(s, abs=1e-5) for i, s in zip(a.items[0].tolist(), a.scores[0].tolist(), strict=True) if i), "the same window, the same scores"


# --- the recommender


@pytest.fixture(scope="module")
def recommender():
    codes = [[a, b, c] for a, b, c in itertools.product(range(3), range(4), range(2))]
    model, ids, _, _ = shop([3, 4, 2], codes)
    items = pd.DataFrame({"item_id": range(1, 25), "raw_id": [f"B{i:03}" for i in range(1, 25)], "title": [f"thing {i}" for i in range(1, 25)]})
    return Recommender(model, ids, items)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 24), max_size=8), min_size=1, max_size=4), st.none() | st.sets(st.integers(1, 24)), st.none() | st.sets(st.integers(1, 24)),
       st.integers(1, 12), st.booleans())
def test_filters_are_never_violated_and_change_no_score(recommender, histories, allowed, denied, k, exclude):
    recommender.beams = FULL
    everything = recommender.recommend(histories, 24, exclude_seen=False).set_index(["user", "item_id"])["score"]
    found = recommender.recommend(histories, k, exclude, allowed, denied)
    for user, history in enumerate(histories):
        mine = found[found["user"] == user]
        legal = (set(range(1, 25)) if allowed is None else set(allowed)) - (denied or set()) - (set(history) if exclude else set())
        assert set(mine["item_id"]) <= legal and len(mine) == min(k, len(legal)) and mine["item_id"].is_unique
        assert mine["rank"].tolist() == list(range(1, len(mine) + 1))
        assert mine["score"].to_numpy() == pytest.approx(everything[user].loc[mine["item_id"]].to_numpy(), abs=1e-5)
        best = everything[user].loc[sorted(legal)].nlargest(k).to_numpy() if legal else []
        assert mine["score"].to_numpy() == pytest.approx(best, abs=1e-5)


def test_histories_empty_long_and_of_unknown_items(recommender):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = recommender.recommend([[], [1, 999, 0, -3, 2], list(range(1, 24)), ["5"]], 3)
    assert found.attrs["unknown_items"] == 3 and any("3 history entries" in str(w.message) for w in said)
    assert found.groupby("user").size().to_dict() == {0: 3, 1: 3, 2: 1, 3: 3}
    assert found[found.user == 2].item_id.tolist() == [24] and 5 not in set(found[found.user == 3].item_id)
    clean = recommender.recommend([[1, 2]], 3)
    assert found[found.user == 1].item_id.tolist() == clean.item_id.tolist()
    assert recommender.recommend([], 3).empty
    assert list(found.columns) == ["user", "rank", "item_id", "raw_id", "title", "score"]


def test_raw_ids_and_blocks(recommender):
    plain = recommender.recommend([[1, 2], [7], [], [3, 4, 5]], 4, users=["a", "b", "c", "d"])
    raw = recommender.recommend([["B001", "B002"], ["B007"], [], ["B003", "B004", "B005"]], 4, raw=True, users=["a", "b", "c", "d"], block=1)
    assert plain[["user", "rank", "item_id"]].equals(raw[["user", "rank", "item_id"]])
    assert np.allclose(plain["score"], raw["score"], atol=1e-5) and plain["raw_id"].tolist() == [f"B{i:03}" for i in plain["item_id"]]
    assert set(recommender.recommend([["B001"]], 24, raw=True, allowed=["B002", "B003"], denied=["B003"]).raw_id) == {"B002"}


def saved(recommender, folder):
    "A finished run folder with a model, IDs and items."
    run = Run("04_tiger", {"seed": 0}, output_dir=str(folder))
    write_torch(run.path("model.pt"), recommender.model.state())
    recommender.semantic_ids.save(run.folder)
    write_parquet(run.path("items.parquet"), recommender.items)
    return run


def test_a_run_folder_is_a_recommender(recommender, tmp_path):
    run = saved(recommender, tmp_path / "run")
    with pytest.raises(RunError, match="not a finished run"):
        Recommender.load(run.folder)
    run.finish()
    loaded = Recommender.load(run.folder, device="cpu", beams=recommender.beams)
    histories = [["B001", "B002"], []]
    assert loaded.recommend(histories, 5, raw=True).equals(recommender.recommend(histories, 5, raw=True))


@pytest.mark.parametrize("name", ["model.pt", "semantic_ids.parquet", "items.parquet"])
def test_a_tampered_run_folder_is_refused(name, recommender, tmp_path):
    run = saved(recommender, tmp_path / "run")
    run.finish()
    data = bytearray(run.path(name).read_bytes())
    data[len(data) // 2] ^= 1
    run.path(name).write_bytes(data)
    with pytest.raises(InputError, match=name):
        Recommender.load(run.folder)


def test_a_model_of_other_ids_is_refused(recommender, tmp_path):
    run = saved(recommender, tmp_path / "run")
    write_torch(run.path("model.pt"), small_model([3, 4, 3]).state())
    run.finish()
    with pytest.raises(InputError, match="do not belong together"):
        Recommender.load(run.folder)
    write_torch(tmp_path / "other.pt", {"weights": torch.zeros(3)})
    with pytest.raises(InputError, match="not a checkpoint of a TIGER"):
        Tiger.load_from_checkpoint(tmp_path / "other.pt")


# --- large


@pytest.mark.slow
def test_beam_search_in_a_million_items():
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (1_000_000, 4), generator=g)
    model = small_model([256] * 4)
    begun = time.perf_counter()
    trie = Trie(codes, torch.arange(1, 1_000_001), [256] * 4)
    built, begun = time.perf_counter() - begun, time.perf_counter()
    table = torch.zeros(1_000_001, 4, dtype=torch.int64)
    table[1:] = codes + model.offsets
    history = Ragged(torch.randint(1, 1_000_001, (320,), generator=g), torch.arange(0, 321, 10))
    found = beam_search(model, tokens_of(model, table, history), trie, 10, 20, Seen.of(history, trie))
    print(f"\ntree of a million items: {built:.2f} s; 32 users, 20 beams: {time.perf_counter() - begun:.2f} s")
    assert (found.items > 0).all() and all(len(set(r)) == 10 for r in found.items.tolist())
    assert not any(set(r) & set(h) for r, h in zip(found.items.tolist(), history.tolist(), strict=True))
    with torch.no_grad():
        logits = model(tokens_of(model, table, history), codes[found.items[:, 0] - 1])
    score = sum(level.log_softmax(-1).gather(1, codes[found.items[:, 0] - 1][:, i : i + 1]).squeeze(1) for i, level in enumerate(logits))
    assert torch.allclose(score, found.scores[:, 0], atol=1e-4)


# --- training samples


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 50), max_size=12), min_size=1, max_size=8), st.integers(1, 6))
def test_training_samples_are_all_prefixes(sequences, max_history):
    samples = PrefixSamples.from_sequences(Ragged.from_lists(sequences), max_history)
    expected = [(row[max(0, t - max_history) : t], row[t]) for row in sequences for t in range(1, len(row))]
    assert len(samples) == len(expected)
    if not expected:
        return
    every = torch.arange(len(samples))
    histories = [[i for i in row if i] for row in samples.histories(every).tolist()]
    assert list(zip(histories, samples.targets(every).tolist(), strict=True)) == expected
    batches = samples.batches(3, torch.Generator().manual_seed(0))
    assert torch.cat(batches).sort().values.equal(every) and all(len(b) <= 3 for b in batches)


def test_padding_of_batches_with_the_lengths_of_a_real_log():
    g = torch.Generator().manual_seed(0)
    lengths = (3 + torch.empty(20_000).exponential_(1 / 3.9, generator=g).long()).clamp(max=200)  # Beauty's training part: 3 … 202, mean 6.9
    samples = PrefixSamples.from_sequences(Ragged(torch.ones(int(lengths.sum()), dtype=torch.int64), torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])))
    share = padding_share(samples.lengths, samples.batches(256, torch.Generator().manual_seed(0)))
    print(f"\n{len(samples):,} samples, {share:.1%} padding")
    assert share < 0.1


# --- ranking cases


@settings(derandomize=True, max_examples=25, deadline=None)
@given(worlds(), st.data())
def test_exact_and_full_beam_rank_alike(world, data):
    sizes, codes, histories = world
    model, ids, table, trie = shop(sizes, codes)
    n = len(ids)
    targets = torch.tensor([data.draw(st.integers(1, n)) for _ in histories])
    cases = Cases(torch.arange(1, len(histories) + 1), Ragged.from_lists(histories), targets, torch.zeros(len(histories), dtype=torch.long), "test")
    exact, beam = (rank_cases(model, table, trie, cases, path, FULL, k=n) for path in ("exact", "beam"))
    history = cases.history
    scores = exact_scores(model, tokens_of(model, table, history), trie, n)
    reference = {"rank": rank_from_scores(scores, targets), "rank_filtered": rank_from_scores(scores, targets, history)}
    for u in range(len(histories)):
        others = scores[u, 1:].clone()
        others[targets[u] - 1] = torch.inf
        codes_u = torch.as_tensor(codes)
        near = ((others - scores[u, targets[u]]).abs() < 1e-4) & (codes_u != codes_u[targets[u] - 1]).any(1)
        if near.any():
            continue  # rounding may decide between different codes
        for name in reference:
            assert exact[name][u] == beam[name][u] == reference[name][u], name
    for variant in ("scores", "filtered_scores"):
        assert torch.allclose(exact[variant].nan_to_num(neginf=-99), beam[variant].nan_to_num(neginf=-99), atol=2e-5)
    for found in (exact, beam):
        for items, past, target in zip(found["filtered_items"].tolist(), histories, targets.tolist(), strict=True):
            assert {i for i in items if i} == set(range(1, n + 1)) - (set(past) - {target}), "all that is legal; the target stays"
    assert beam["certified"].all() and exact["certified"].all()


def test_small_catalogues_are_scored_exactly():
    assert choose_path("auto", 2000) == "exact" and choose_path("auto", 2001) == "beam" and choose_path("beam", 5) == "beam"


def test_the_loss_sees_the_target_and_its_history_only():
    codes = [[a, b] for a, b in itertools.product(range(3), range(3))]
    model, _, table, _ = shop([3, 3], codes)
    samples = PrefixSamples.from_sequences(Ragged.from_lists([[1, 2, 3, 4], [9, 8]]), 2)
    task = TigerTask(model, samples, table, 4)
    losses = [task.loss(model, torch.tensor([i])).item() for i in range(4)]
    other = PrefixSamples.from_sequences(Ragged.from_lists([[1, 2, 3, 5], [9, 8]]), 2)
    changed = [TigerTask(model, other, table, 4).loss(model, torch.tensor([i])).item() for i in range(4)]
    assert [a == pytest.approx(b, abs=1e-6) for a, b in zip(losses, changed, strict=True)] == [True, True, False, True]
    assert task.loss(model, torch.arange(4)).item() == pytest.approx(sum(losses) / 4, abs=1e-5)
    assert json.dumps(model.state()["config"])
