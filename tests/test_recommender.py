"""The recommender for many users, the ensemble, and the explorer: files, filters, users, and numbers against plain references."""
import itertools
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgen.core.errors import InputError
from recgen.core.files import write_parquet, write_torch
from recgen.core.ragged import Ragged
from recgen.core.run import Run
from recgen.evaluation.evaluator import evaluate_scores
from recgen.evaluation.protocol import Cases
from recgen.formats.semantic_ids import SemanticIDs
from recgen.retrieval.beam import exact_scores
from recgen.retrieval.ensemble import candidate_union, ensemble_lists, evaluate_ensemble, mix, score_union, standardise, weight_curve
from recgen.retrieval.explorer import attention_map, beam_tree, most_probable, prefix_names, recall_by_length, search_trace, why
from recgen.retrieval.recommender import HistoryBlocks, Recommender, history_rows, latency
from recgen.retrieval.sequences import prompt_tokens
from recgen.retrieval.transformer import Tiger, TigerConfig

CODES = [[a, b, c] for a, b, c in itertools.product(range(3), range(4), range(2))]
N = len(CODES)
ITEMS = pd.DataFrame({"item_id": range(1, N + 1), "raw_id": [f"B{i:03}" for i in range(1, N + 1)], "title": [f"thing number {i}" for i in range(1, N + 1)]})
COLUMNS = ["user_id", "rank", "item_id", "raw_id", "title", "score"]


def make(seed=0, codes=CODES, dense=None, beams=200, items=ITEMS, **changes):
    torch.manual_seed(seed)
    ids = SemanticIDs(torch.arange(1, len(codes) + 1), codes, [3, 4, 2])
    shape = {"embedding_dim": 16, "attn_dim": 16, "num_heads": 2, "ff_dim": 32, "encoder_layers": 2, "decoder_layers": 1, "max_history": 5, **changes}
    return Recommender(Tiger(TigerConfig(ids.sizes, **shape)), ids, items, beams=beams, dense=dense)


class Dense:
    "Fixed scores of every item for every last item."

    def __init__(self, n_items=N, seed=0):
        self.matrix = torch.randn(n_items + 1, n_items + 1, generator=torch.Generator().manual_seed(seed)) * 4 + 7

    def scores(self, history, users=None):
        last = torch.zeros(len(history), dtype=torch.int64)
        some = history.lengths > 0
        last[some] = history.values[history.offsets[1:][some] - 1]
        return self.matrix[last].clone()


@pytest.fixture(scope="module")
def shop():
    return make(dense=Dense())


@pytest.fixture(scope="module")
def histories():
    g = torch.Generator().manual_seed(3)
    return [torch.randint(1, N + 1, (n,), generator=g).tolist() for n in torch.randint(0, 9, (57,), generator=g).tolist()]


def frame_of(path):
    return pq.read_table(path).to_pandas()


def same_lists(written, frame, columns=COLUMNS):
    "Equal apart from rounding of the scores."
    frame = frame.rename(columns={"user": "user_id"})
    assert list(written.columns) == columns and len(written) == len(frame)
    for column in columns[:-1]:
        assert written[column].tolist() == frame[column].tolist(), column
    assert written["score"].to_numpy() == pytest.approx(frame["score"].to_numpy(), abs=1e-5)


# --- files


@pytest.mark.parametrize(("rows", "block"), [(1, 256), (7, 2), (57, 57), (1000, 5)])
@pytest.mark.parametrize("source", ["file", "lists", "ragged"])
def test_the_file_is_what_memory_gives(shop, histories, tmp_path, source, rows, block):
    users = list(range(900, 900 + len(histories)))
    options = {"users": users}
    given_as = histories
    if source == "file":
        pq.write_table(pa.table({"history": histories, "other": users, "user_id": users}), tmp_path / "h.parquet", row_group_size=10)
        given_as, options = tmp_path / "h.parquet", {}
    elif source == "ragged":
        given_as = Ragged.from_lists(histories)
    facts = shop.recommend_to_file(given_as, tmp_path / "new" / "r.parquet", 4, block=block, rows=rows, **options)
    written = frame_of(tmp_path / "new" / "r.parquet")
    same_lists(written, shop.recommend(histories, 4, users=users))
    assert facts == {"users": 57, "rows": len(written), "unknown_items": 0}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.parquet"]


def test_filters_titles_and_ensemble_reach_the_file(shop, histories, tmp_path):
    for options in ({"allowed": range(3, 20), "denied": [4, 5]}, {"exclude_seen": False}, {"ensemble": True}, {"ensemble": True, "denied": [1, 2, 3], "exclude_seen": False}):
        shop.recommend_to_file(histories, tmp_path / "r.parquet", 6, rows=20, **options)
        same_lists(frame_of(tmp_path / "r.parquet"), shop.recommend(histories, 6, **options))
    shop.recommend_to_file(histories, tmp_path / "r.parquet", 6, allowed=range(3, 20), denied=[4, 5], titles=False)
    written = frame_of(tmp_path / "r.parquet")
    assert list(written.columns) == [c for c in COLUMNS if c != "title"]
    assert set(written["item_id"]) <= set(range(3, 20)) - {4, 5}
    assert not any(set(part["item_id"]) & set(histories[user]) for user, part in written.groupby("user_id"))


def test_raw_ids_and_names_as_users(shop, histories, tmp_path):
    raw = [[f"B{i:03}" for i in h] for h in histories]
    names = [f"user {i}" for i in range(len(raw))]
    pq.write_table(pa.table({"user_id": names, "history": raw}), tmp_path / "h.parquet")
    shop.recommend_to_file(tmp_path / "h.parquet", tmp_path / "r.parquet", 3, raw=True, denied=["B007"])
    same_lists(frame_of(tmp_path / "r.parquet"), shop.recommend(histories, 3, denied=[7], users=names))
    numbered = make(items=ITEMS.assign(raw_id=[str(1000 + i) for i in range(1, N + 1)]))
    numbered.recommend_to_file([[1000 + i for i in h] for h in histories], tmp_path / "r.parquet", 3, raw=True)
    assert frame_of(tmp_path / "r.parquet")["item_id"].tolist() == numbered.recommend(histories, 3)["item_id"].tolist(), "raw ids that are numbers"


def test_unknown_items_are_counted_and_left_out(shop, tmp_path):
    pq.write_table(pa.table({"user_id": [5, 6, 7], "history": [[1, 99, 2], [0, 400], []]}), tmp_path / "h.parquet")
    with pytest.warns(UserWarning, match="3 history entries are not in the catalogue"):
        facts = shop.recommend_to_file(tmp_path / "h.parquet", tmp_path / "r.parquet", 3, rows=1)
    assert facts["unknown_items"] == 3
    same_lists(frame_of(tmp_path / "r.parquet"), shop.recommend([[1, 2], [], []], 3, users=[5, 6, 7]))
    with pytest.warns(UserWarning, match="1 history entries"):
        shop.recommend_to_file([["B001", "?"]], tmp_path / "r.parquet", 3, raw=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shop.recommend_to_file([[1.0, 2.0], []], tmp_path / "r.parquet", 3)  # whole numbers in a column of floats are ids
    same_lists(frame_of(tmp_path / "r.parquet"), shop.recommend([[1, 2], []], 3))


def test_users_without_anything_left_and_no_users_at_all(shop, tmp_path):
    facts = shop.recommend_to_file([list(range(1, N + 1)), list(range(2, N + 1))], tmp_path / "r.parquet", 3, rows=1)
    assert facts["rows"] == 1 and frame_of(tmp_path / "r.parquet")[["user_id", "item_id"]].to_numpy().tolist() == [[1, 1]]
    for options in ({"histories": []}, {"histories": [[1]], "allowed": []}):
        assert shop.recommend_to_file(path=tmp_path / "r.parquet", **options)["rows"] == 0
        assert list(frame_of(tmp_path / "r.parquet").columns) == COLUMNS and not len(frame_of(tmp_path / "r.parquet"))


def test_no_block_is_larger_than_asked_for(shop, histories, tmp_path, monkeypatch):
    widths, search = [], shop.search
    monkeypatch.setattr(shop, "search", lambda history, *args: widths.append(len(history)) or search(history, *args))
    shop.recommend_to_file(histories, tmp_path / "r.parquet", 3, rows=10)
    assert widths == [10, 10, 10, 10, 10, 7] and pq.ParquetFile(tmp_path / "r.parquet").num_row_groups == 6


def test_stopped_in_the_middle_it_leaves_what_was_there(shop, histories, tmp_path, monkeypatch):
    search, calls = shop.search, []

    def breaks(history, *args):
        calls.append(len(history))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return search(history, *args)

    for before in (None, b"the file of yesterday"):
        calls.clear()
        if before:
            (tmp_path / "r.parquet").write_bytes(before)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shop, "search", breaks)
            shop.recommend_to_file(histories, tmp_path / "r.parquet", 3, rows=10)
        assert len(calls) == 3
        assert [p.read_bytes() for p in tmp_path.iterdir()] == ([before] if before else [])


def column(values, kind=None):
    return {"user_id": list(range(1, len(values) + 1)), "history": pa.array(values, kind)}


BAD = {
    "no history": ({"user_id": [1], "items": [[1]]}, "a column is missing", "history"),
    "no user_id": ({"history": [[1]]}, "a column is missing", "user_id"),
    "NaN": (column([[1.0], [], [2.0, float("nan")]]), "not ids", "user 3"),
    "infinite": (column([[float("inf")]]), "not ids", "infinite"),
    "fraction": (column([[1.0], [2.5]]), "not ids", "user 2"),
    "negative": (column([[1], [3, -2]]), "not ids", "user 2"),
    "null entry": (column([[1], [None, 2]]), "not ids", "user 2"),
    "null history": (column([[1], None]), "histories are not lists", "user 2"),
    "texts": (column([["B001"]]), "not ids", "raw=True"),
    "booleans": (column([[True]]), "not ids", "bool"),
    "no lists": (column([1, 2]), "histories are not lists", "int64"),
    "too large": (column([[2**60]]), "not ids", "2**53"),
    "user twice": ({"user_id": [4, 4, 5], "history": [[1], [2], [3]]}, "not one user a history", "4"),
    "user missing": ({"user_id": [4, None], "history": [[1], [2]]}, "not ids", "user_id"),
    "user negative": ({"user_id": [4, -1], "history": [[1], [2]]}, "not ids", "user_id"),
    "user fraction": ({"user_id": [4, 1.5], "history": [[1], [2]]}, "not ids", "user_id"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_histories_are_refused_before_anything_is_written(shop, tmp_path, name, monkeypatch):
    columns, problem, says = BAD[name]
    rows = {k: v if isinstance(v, pa.Array) else pa.array(v) for k, v in columns.items()}
    pq.write_table(pa.table(rows), tmp_path / "h.parquet")
    monkeypatch.setattr(shop, "search", lambda *a, **k: pytest.fail("searched"))
    with pytest.raises(InputError, match=problem) as error:
        shop.recommend_to_file(tmp_path / "h.parquet", tmp_path / "out" / "r.parquet", 3, rows=1)
    assert says in str(error.value) and "h.parquet" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["h.parquet"]


def test_other_bad_calls(shop, tmp_path):
    good = column([[1], [2]])
    pq.write_table(pa.table(good), tmp_path / "h.parquet")
    data = (tmp_path / "h.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:-20])
    broken = bytearray(data)
    broken[4:60] = b"\xff" * 56
    (tmp_path / "pages.parquet").write_bytes(broken)
    out = tmp_path / "r.parquet"
    for histories, options, says in [
        (tmp_path / "absent.parquet", {}, "no file"), (tmp_path / "cut.parquet", {}, "cut.parquet"), (tmp_path / "pages.parquet", {}, "pages.parquet"),
        (tmp_path / "h.parquet", {"users": [1, 2]}, "stand in the file already"), (tmp_path / "h.parquet", {"k": 0}, "nothing to recommend"),
        (tmp_path / "h.parquet", {"path": tmp_path / "h.parquet"}, "histories themselves"), (tmp_path / "h.parquet", {"path": tmp_path}, "a folder"),
        ([[1], [2]], {"users": [1]}, "1 users, 2 histories"), ([[1], ["B1"]], {}, "do not hold item ids"), ([[1], [-3]], {}, "negative"),
        ([[10**30]], {}, "do not hold item ids"), ([[1, 2], 3], {}, "do not hold item ids"),
    ]:
        with pytest.raises(InputError, match=says):
            shop.recommend_to_file(histories, **{"path": out, "k": 3, **options})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.parquet", "h.parquet", "pages.parquet"] and (tmp_path / "h.parquet").read_bytes() == data


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 30), max_size=6), min_size=1, max_size=9), st.integers(1, 4), st.booleans())
def test_blocks_are_read_as_lists(rows, size, large):
    kind = pa.large_list(pa.int32()) if large else pa.list_(pa.int64())
    whole = pa.array([[7]] + rows, kind)[1:]  # a slice: its offsets do not begin at 0
    ragged, dropped = history_rows(pa.array(range(len(rows))), whole, None, N)
    assert ragged.tolist() == [[i for i in r if 1 <= i <= N] for r in rows]
    assert dropped == sum(not 1 <= i <= N for r in rows for i in r)
    blocks = list(HistoryBlocks(Ragged.from_lists(rows), rows=size))
    assert [h for _, part in blocks for h in part.to_pylist()] == rows and [u for who, _ in blocks for u in who.to_pylist()] == list(range(len(rows)))
    assert all(len(part) <= size for _, part in blocks)


# --- users and separators


def test_a_model_that_knows_its_users(histories, tmp_path):
    personal = make(num_user_embeddings=40, separator=True)
    users = [10_000 + 17 * i for i in range(len(histories))]
    for wrong in ({}, {"users": [f"u{i}" for i in users]}, {"users": users[:-1]}, {"users": [float(u) for u in users]}):
        with pytest.raises(InputError, match="users"):
            personal.recommend(histories, 3, **wrong)
        with pytest.raises(InputError):
            personal.recommend_to_file(histories, tmp_path / "r.parquet", 3, **{k: v for k, v in wrong.items() if k != "users" or isinstance(v[0], str)})
    assert not list(tmp_path.iterdir())
    frame = personal.recommend(histories, 3, users=users)
    personal.recommend_to_file(histories, tmp_path / "r.parquet", 3, users=users, rows=5)
    same_lists(frame_of(tmp_path / "r.parquet"), frame)
    for u in (0, 9, 30):  # one by one
        scores = exact_scores(personal.model, prompt_tokens(personal.model.config, personal.table, Ragged.from_lists([histories[u]]), torch.tensor([users[u]])), personal.trie, N)[0]
        mine = frame[frame["user"] == users[u]]
        assert mine["score"].to_numpy() == pytest.approx(scores[mine["item_id"].tolist()].numpy(), abs=1e-5)
    other = personal.recommend(histories, 3, users=[u + 1 for u in users])
    assert not np.allclose(other["score"], frame["score"], atol=1e-4)
    batch = {"history": histories[:4], "user_id": users[:4]}
    assert personal.recommend_batch(batch, 3).flatten().tolist() == frame[frame["user"].isin(users[:4])]["item_id"].tolist()


def test_names_must_be_as_many_as_histories(shop):
    with pytest.raises(InputError, match="2 users, 1 histories"):
        shop.recommend([[1]], users=["a", "b"])


def test_a_ragged_is_as_good_as_lists(shop, histories):
    assert shop.recommend(Ragged.from_lists(histories), 5).equals(shop.recommend(histories, 5))


def test_latency_is_of_one_user(shop):
    waited = latency(shop, [1, 2, 3], 5, repeats=4, ensemble=True)
    assert waited["n"] == 4 and 0 < waited["low"] <= waited["median"] <= waited["high"]


# --- the run folder


def saved(shop, folder, sasrec=None):
    run = Run("04_tiger", {"seed": 0}, output_dir=str(folder))
    write_torch(run.path("model.pt"), shop.model.state())
    shop.semantic_ids.save(run.folder)
    write_parquet(run.path("items.parquet"), shop.items)
    if sasrec is not None:
        write_torch(run.path("sasrec.pt"), sasrec.state())
    run.finish()
    return run


def test_a_run_without_a_dense_model(shop, tmp_path):
    loaded = Recommender.load(saved(shop, tmp_path / "run").folder, device="cpu", beams=200)
    assert loaded.dense is None
    assert loaded.recommend([[1, 2]], 5).equals(shop.recommend([[1, 2]], 5))
    for call in (lambda: loaded.recommend([[1]], ensemble=True), lambda: loaded.recommend_to_file([[1]], tmp_path / "r.parquet", ensemble=True)):
        with pytest.raises(InputError, match="no dense model") as error:
            call()
        assert "mend" in str(error.value)
    assert not (tmp_path / "r.parquet").exists()


def test_a_run_with_a_dense_model(shop, histories, tmp_path):
    module = pytest.importorskip("recgen.retrieval.sasrec")
    torch.manual_seed(1)
    sasrec = module.SasRec(module.SasRecConfig(n_items=N, d_model=16, n_layers=1, num_heads=2, ff_dim=16)).eval()
    run = saved(shop, tmp_path / "run", sasrec)
    loaded = Recommender.load(run.folder, device="cpu", beams=200)
    some = Ragged.from_lists(histories)
    assert torch.allclose(loaded.dense.scores(some)[:, 1:], sasrec.scores(some)[:, 1:])
    expected = ensemble_lists(loaded.model, sasrec, loaded.table, loaded.trie, some, 5, seen=some)
    frame = loaded.recommend(histories, 5, ensemble=True)
    assert frame["item_id"].tolist() == expected[0][expected[0] > 0].tolist()
    assert not frame["item_id"].equals(loaded.recommend(histories, 5)["item_id"])
    data = bytearray(run.path("sasrec.pt").read_bytes())
    data[len(data) // 2] ^= 1
    run.path("sasrec.pt").write_bytes(data)
    with pytest.raises(InputError, match="sasrec.pt"):
        Recommender.load(run.folder)


# --- the ensemble


def reference_ensemble(shop, history, k, weight, candidates, seen, legal):
    "One user in plain Python."
    one = Ragged.from_lists([history])
    tiger = exact_scores(shop.model, prompt_tokens(shop.model.config, shop.table, one), shop.trie, N)[0].double().numpy()
    dense = shop.dense.scores(one)[0].double().numpy()
    open_items = sorted(set(legal) - (set(history) if seen else set()))
    union = sorted({i for s in (tiger, dense) for i in sorted(open_items, key=lambda i: -s[i])[:candidates]})
    if not union:
        return []
    total = np.zeros(len(union))
    for share, s in ((weight, tiger), (1 - weight, dense)):
        x = s[union]
        total += share * ((x - x.mean()) / x.std() if x.std() > 1e-9 else 0)
    return sorted(zip(union, total.tolist(), strict=True), key=lambda p: -p[1])[:k]


@pytest.mark.parametrize("path", ["beam", "exact"])
@pytest.mark.parametrize(("weight", "candidates", "seen"), [(0.5, 6, True), (0.5, 6, False), (0.2, 9, True), (1.0, 100, True), (0.0, 3, False)])
def test_the_ensemble_against_a_plain_reference(shop, histories, path, weight, candidates, seen):
    history, k = Ragged.from_lists([*histories, list(range(1, N + 1)), list(range(2, N + 1))]), 3
    legal = list(range(4, N + 1))
    trie = shop.legal_trie(allowed=legal)
    items, scores = ensemble_lists(shop.model, shop.dense, shop.table, trie, history, k, seen=history if seen else None, weight=weight, candidates=candidates, beams=200, path=path, block=8)
    assert items.shape == scores.shape == (len(history), k)
    for u, past in enumerate(history.tolist()):
        expected = reference_ensemble(shop, past, k, weight, candidates, seen, legal)
        n = len(expected)
        assert scores[u, :n].numpy() == pytest.approx([s for _, s in expected], abs=1e-4)
        assert items[u, n:].count_nonzero() == 0 and (scores[u, n:] == -torch.inf).all()
        gaps = [a - b for (_, a), (_, b) in itertools.pairwise(expected)]
        if all(gap > 1e-4 for gap in gaps) and (n == k or not seen or len(past) >= N - 1):
            assert items[u, :n].tolist() == [i for i, _ in expected]
        assert set(items[u].tolist()) - {0} <= set(legal) - (set(past) if seen else set())


def test_the_union_and_its_scores():
    g = torch.Generator().manual_seed(0)
    lists = [torch.randint(0, 12, (40, n), generator=g) for n in (5, 1, 7)]
    union = candidate_union(*lists)
    for u, row in enumerate(union.tolist()):
        expected = sorted(set(torch.cat([v[u] for v in lists]).tolist()) - {0})
        assert row == expected + [0] * (union.shape[1] - len(expected))
    scores, valid = torch.randn(40, union.shape[1], generator=g) * 5 - 60, union > 0
    standard = standardise(scores, valid)
    for u in range(40):
        x = scores[u, valid[u]].double().numpy()
        assert standard[u, valid[u]].numpy() == pytest.approx((x - x.mean()) / x.std(), abs=1e-6)
    assert (standard[~valid] == 0).all()
    flat = torch.full((1, 4), -7.3) + torch.tensor([[0, 1e-6, 0, -1e-6]])
    assert standardise(flat, torch.ones(1, 4, dtype=torch.bool)).count_nonzero() == 0, "rounding is no opinion"
    assert standardise(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)).count_nonzero() == 0
    holes = standardise(torch.tensor([[1.0, -torch.inf, 3.0]]), torch.ones(1, 3, dtype=torch.bool))
    assert torch.allclose(holes, standardise(torch.tensor([[1.0, 1.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool)))


def test_mixing_ranks_ties_by_id_and_pads():
    items, scores = mix(torch.tensor([[3, 8, 9]]), torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[5.0, 5.0, 5.0]]), k=5)
    assert items.tolist() == [[3, 8, 9, 0, 0]] and scores.tolist() == [[0, 0, 0, -np.inf, -np.inf]]


def test_both_models_score_all_candidates(shop, histories):
    history = Ragged.from_lists(histories)
    union, tiger, dense = score_union(shop.model, shop.dense, shop.table, shop.trie, history, candidates=4)
    exact = exact_scores(shop.model, prompt_tokens(shop.model.config, shop.table, history), shop.trie, N)
    valid = union > 0
    assert torch.allclose(tiger[valid], exact.gather(1, union)[valid], atol=2e-5) and dense[valid].equal(shop.dense.scores(history).gather(1, union)[valid])
    assert ((valid.sum(1) >= 4) & (valid.sum(1) <= 8)).all()


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_evaluation_of_the_ensemble(shop, histories, weight):
    g = torch.Generator().manual_seed(5)
    cases = Cases(torch.arange(1, len(histories) + 1), Ragged.from_lists(histories), torch.randint(1, N + 1, (len(histories),), generator=g), torch.full((len(histories),), 9))
    found = evaluate_ensemble(shop.model, shop.dense, shop.table, shop.trie, cases, k=N, candidates=N, beams=200, weight=weight)
    full = torch.full((len(cases), N + 1), -torch.inf)
    items, scores = ensemble_lists(shop.model, shop.dense, shop.table, shop.trie, cases.history, N, candidates=N, beams=200, weight=weight)
    full.scatter_(1, items, scores)
    reference = evaluate_scores(lambda history, users: full[users - 1], cases)
    assert found.path == "beam" and found.per_user["rank"].tolist() == reference.per_user["rank"].tolist()
    assert {"test/item/filtered/recall@10", "test/item/unfiltered/ndcg@5", "test/repeat_share"} <= found.metrics.keys()
    if weight in (0, 1):  # one model alone: its order does not depend on which candidates are standardised
        assert found.per_user["rank_filtered"].tolist() == reference.per_user["rank_filtered"].tolist()
    assert not any(set(a) & set(h) for a, h in zip(found.lists.tolist(), histories, strict=True))


def test_the_recommender_passes_everything_on_to_the_ensemble(shop, histories):
    history, trie = Ragged.from_lists(histories), shop.legal_trie(denied=[3])
    for seen in (True, False):
        items, scores = ensemble_lists(shop.model, shop.dense, shop.table, trie, history, N, seen=history if seen else None)
        frame = shop.recommend(histories, N, seen, denied=[3], ensemble=True)
        assert frame["item_id"].tolist() == items[items > 0].tolist() and frame["score"].to_numpy() == pytest.approx(scores[items > 0].numpy(), abs=1e-5)
    shop.weight = 0.9
    other = shop.recommend(histories, N, denied=[3], ensemble=True)
    shop.weight = 0.5
    heavy = ensemble_lists(shop.model, shop.dense, shop.table, trie, history, N, seen=history, weight=0.9)[0]
    assert other["item_id"].tolist() == heavy[heavy > 0].tolist()


def test_the_weight_is_chosen_on_validation(shop, histories):
    g = torch.Generator().manual_seed(5)
    targets = torch.randint(1, N + 1, (len(histories),), generator=g)
    cases = Cases(torch.arange(1, len(histories) + 1), Ragged.from_lists(histories), targets, torch.full((len(histories),), 9), "valid")
    curve = weight_curve(shop.model, shop.dense, shop.table, shop.trie, cases, (0.0, 0.3, 1.0), k=5, candidates=8, block=9)
    for weight, recall, ndcg in curve.itertuples(index=False):
        metrics = evaluate_ensemble(shop.model, shop.dense, shop.table, shop.trie, cases, candidates=8, k=8, ks=(5,), weight=weight).metrics
        assert recall == pytest.approx(metrics["valid/item/filtered/recall@5"]) and ndcg == pytest.approx(metrics["valid/item/filtered/ndcg@5"])
    with pytest.raises(InputError, match="not chosen on these cases"):
        weight_curve(shop.model, shop.dense, shop.table, shop.trie, Cases(cases.users, cases.history, cases.targets, cases.positions))


def test_the_ensemble_refuses(shop):
    history = Ragged.from_lists([[1]])
    with pytest.raises(InputError, match="not a share"):
        ensemble_lists(shop.model, shop.dense, shop.table, shop.trie, history, weight=1.5)
    with pytest.raises(InputError, match="another catalogue"):
        ensemble_lists(shop.model, Dense(N + 3), shop.table, shop.trie, history)


# --- the explorer


@pytest.fixture(autouse=True)
def no_figure_stays():
    yield
    plt.close("all")


@pytest.mark.parametrize("changes", [{}, {"num_user_embeddings": 9}, {"separator": True}])
def test_why_adds_up(changes, histories):
    shop = make(**changes)
    user = {"user": 77} if changes.get("num_user_embeddings") else {}
    for history in (*histories[:6], [], [1, 1, 2]):
        table = why(shop, history, 6, **user)
        frame = shop.recommend([history], 6, users=[77] if user else None)
        assert table["score"].tolist() == frame["score"].tolist() and table["title"].tolist() == frame["title"].tolist()
        levels = table[["level 1", "level 2", "level 3"]]
        assert levels.sum(axis=1).to_numpy() == pytest.approx(table["score"].to_numpy(), abs=2e-5) and (levels.to_numpy() <= 0).all()
        assert table["probability"].to_numpy() == pytest.approx(np.exp(table["score"].to_numpy()))
        for item, shared, like in zip(frame["item_id"], table["shared"], table["like"], strict=True):
            lengths = {h: next((i for i, (a, b) in enumerate(zip(CODES[h - 1], CODES[item - 1], strict=True)) if a != b), 3) for h in history[::-1]}
            longest = max(lengths.values(), default=0)
            nearest = [h for h, n in lengths.items() if n == longest][:2] if longest else []
            assert shared == longest and like == " / ".join(f"thing number {h}" for h in nearest)


def test_the_trace_is_the_search(shop, histories):
    for history in (*histories[:5], []):
        levels = search_trace(shop, history, k=4, beams=7)
        found = shop.recommend([history], 4)
        scores = exact_scores(shop.model, prompt_tokens(shop.model.config, shop.table, Ragged.from_lists([history])), shop.trie, N)[0].exp().numpy()
        assert [len(v) <= 7 for v in levels] == [True] * 3
        for depth, level in enumerate(levels, 1):
            for node in level.itertuples():
                assert len(node.prefix) == depth and node.seen == sum(CODES[h - 1][:depth] == list(node.prefix) for h in set(history))
                below = sum(scores[i + 1] for i, c in enumerate(CODES) if c[:depth] == list(node.prefix))
                assert node.probability >= below - 1e-5 and (depth < 3 or node.probability == pytest.approx(below, abs=1e-5))
                assert depth == 1 or levels[depth - 2].prefix[node.parent] == node.prefix[:-1]
                results = [CODES[i - 1][:depth] == list(node.prefix) for i in levels[-1].attrs["items"]]
                assert node.led == any(results)
        assert sorted(r for v in levels[-1]["results"] for r in v) == list(range(1, 1 + len(levels[-1].attrs["items"])))
        best = [(scores[i]) for i in levels[-1].attrs["items"]]
        assert best == sorted(best, reverse=True) and set(levels[-1].attrs["items"]).isdisjoint(history) and best[0] <= np.exp(found["score"].iloc[0]) + 1e-6


def test_the_drawn_search_is_the_one_that_recommends_and_what_is_drawn_hangs_together(shop, histories):
    for history in (*histories[:5], []):
        levels = search_trace(shop, history, 4, shop.beams)
        assert levels[-1].attrs["items"] == shop.recommend([history], 4)["item_id"].tolist()
        drawn = most_probable(levels, 3)
        for i, (cut, whole) in enumerate(zip(drawn, levels, strict=True)):
            assert cut.attrs["kept"] == len(whole) and cut.attrs["held"] == pytest.approx(whole["probability"].sum())
            best = set(whole.nlargest(3, "probability")["prefix"]) | set(whole["prefix"][whole["led"]])
            assert best <= set(cut["prefix"]) and (cut["led"].sum() == whole["led"].sum())
            assert i == 0 or [drawn[i - 1]["prefix"][p] for p in cut["parent"]] == [prefix[:-1] for prefix in cut["prefix"]]


def texts(figure):
    return [t.get_text() for axis in figure.axes for t in [*axis.texts, axis.title]]


def test_the_tree_shows_titles_ranks_and_what_was_had(shop):
    figure = beam_tree(shop, [1, 2, 3], k=3, show=6)
    shown = texts(figure)
    assert all(any(t.startswith(f"{r}. thing number") for t in shown) for r in (1, 2, 3)) and not any(t.startswith("4. thing") for t in shown)
    assert sum(t.startswith("code ") for t in shown) == 3 and any("beams hold" in t for t in shown) and "3" in shown
    assert sum(t.startswith("code ") for t in texts(beam_tree(shop, ["B001"], raw=True, levels=2))) == 2
    shared = make(codes=[[0, 0, 0]] * 3 + [[1, 0, 1]] * (N - 3))
    assert any(t.startswith("1. thing number") and "/ 2. thing" in t for t in texts(beam_tree(shared, [], k=2)))
    assert any("of" in t for t in texts(beam_tree(make(num_user_embeddings=5), [1], user=3)))
    with pytest.raises(InputError, match="nothing to recommend"):
        beam_tree(shop, [1], allowed=[])
    everything = beam_tree(shop, list(range(1, N + 1)))
    assert "Nothing is left to recommend" in texts(everything)


def test_names_say_what_sets_a_prefix_apart():
    items = pd.DataFrame({"item_id": [4, 3, 2, 1], "title": ["The green comb", "The red comb", "The green soap", "The red soap"], "brand": ["A", "", None, "Bee"],
                          "categories": [["Hair"], ["Hair"], ["Bath"], None]})
    ids = SemanticIDs([1, 2, 3, 4], [[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]], [2, 2, 1])
    names = prefix_names(ids, items, n=1)
    assert names == {(0,): "soap", (1,): names[1,], (0, 0): names[0, 0], (0, 1): names[0, 1], (1, 0): "red", (1, 1): "green", **{p: names[p] for p in names if len(p) == 3}}
    assert names[1,] in ("hair", "comb") and names[0, 0] in ("red", "bee") and names[0, 1] in ("green", "bath") and len(names) == 2 + 4 + 4
    assert prefix_names(ids, items, [(1,)], n=1) == {(1,): names[1,]}
    assert names[0, 0, 0] in ("the", "red", "soap", "bee"), "an only child is called by what it has"
    assert set(prefix_names(ids, items.assign(title="", brand="", categories=None)).values()) == {""}


@pytest.mark.parametrize("changes", [{}, {"num_user_embeddings": 9, "separator": True}])
def test_the_attention_map_names_the_window(changes):
    shop = make(**changes)
    user = {"user": 5} if changes else {}
    figure = attention_map(shop, [9, 1, 2, 3, 4, 5, 999][:6], **user)
    names = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert names == (["user"] if changes else []) + [f"thing number {i}" for i in (1, 2, 3, 4, 5)], "the latest five are read"
    drawn = np.asarray(figure.axes[0].images[0].get_array())
    assert drawn.shape == (5 * (4 if changes else 3) + bool(changes),) * 2 and drawn.sum(1) == pytest.approx(1, abs=1e-5)
    assert "of the attention goes to" in figure.axes[0].get_title()
    with pytest.raises(InputError, match="no history"):
        attention_map(shop, [], **user)


def test_recall_by_length_counts_users():
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (400,), generator=g)
    cases = Cases(torch.arange(400), Ragged(torch.ones(int(lengths.sum()), dtype=torch.int64), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])), torch.ones(400, dtype=torch.int64), lengths)
    rank = torch.randint(0, 25, (400,), generator=g).numpy()
    table = pd.DataFrame({"user_id": cases.users, "target": cases.targets, "rank": rank, "rank_filtered": rank})
    figure = recall_by_length({"a": table, "b": table.assign(rank_filtered=0)}, cases, k=7, edges=(10, 20))
    for name, line in zip("ab", figure.axes[0].containers, strict=True):
        points = line.lines[0].get_ydata()
        for (low, high), point in zip([(0, 10), (10, 20), (20, 99)], points, strict=True):
            here = ((lengths >= low) & (lengths < high)).numpy()
            assert point == pytest.approx(((rank > 0) & (rank <= 7))[here].mean() if name == "a" else 0)
    with pytest.raises(InputError, match="not those of these cases"):
        recall_by_length({"a": table[::-1]}, cases)
