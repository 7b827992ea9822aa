"The evaluation against plain loops, and what must hold across its chapters."

import functools
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from recgen.core.errors import InputError
from recgen.core.processes import launch
from recgen.core.ragged import Ragged
from recgen.evaluation.accumulator import TopKAccumulator
from recgen.evaluation.baselines import ItemKNN, Popularity
from recgen.evaluation.ceiling import ceiling_metrics, ceiling_share, expected_metrics, oracle_lists
from recgen.evaluation.evaluator import EvaluationResult, evaluate_lists, evaluate_scores, evaluate_tuples, result_table
from recgen.evaluation.protocol import (
    Cases,
    LeakageError,
    cases_from_dataset,
    check_no_leakage,
    check_provenance,
    make_cases,
    rows_hash,
)
from recgen.evaluation.ranking import drop_seen, metrics_from_ranks, rank_from_lists, rank_from_scores, top_lists
from recgen.evaluation.slices import catalogue_metrics, slice_table
from recgen.evaluation.tuples import resolve_tuples, tuple_rank
from recgen.evaluation.uncertainty import compare, interval, resampled_means

# the same examples in every run, and no folder of past failures left behind
PLAIN = dict(deadline=None, derandomize=True, database=None)


@st.composite
def questions(draw, max_users=4, max_items=8):
    "Scores with many ties, targets, and histories with repeats; targets are sometimes in their own history."
    n_users, n_items = draw(st.integers(1, max_users)), draw(st.integers(1, max_items))
    item = st.integers(1, n_items)
    scores = draw(st.lists(st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0]), min_size=n_items + 1, max_size=n_items + 1),
                           min_size=n_users, max_size=n_users))
    targets = draw(st.lists(item, min_size=n_users, max_size=n_users))
    histories = draw(st.lists(st.lists(item, max_size=6), min_size=n_users, max_size=n_users))
    return torch.tensor(scores), torch.tensor(targets), Ragged.from_lists(histories)


def loop_rank(scores, target, seen=()):
    return 1 + sum(1 for j in range(1, len(scores)) if j != target and j not in seen and scores[j] >= scores[target])


@given(questions())
@settings(max_examples=200, **PLAIN)
def test_rank_from_scores_is_the_plain_loop(question):
    scores, targets, seen = question
    rows, targets_list, histories = scores.tolist(), targets.tolist(), seen.tolist()
    assert rank_from_scores(scores, targets).tolist() == [loop_rank(s, t) for s, t in zip(rows, targets_list, strict=True)]
    expected = [loop_rank(s, t, h) for s, t, h in zip(rows, targets_list, histories, strict=True)]
    rank = rank_from_scores(scores, targets, seen)
    assert rank.tolist() == expected and rank.dtype == torch.int64


@given(questions(), st.randoms(use_true_random=False))
@settings(max_examples=100, **PLAIN)
def test_ranks_do_not_depend_on_the_numbering_of_items(question, random):
    scores, targets, seen = question
    n_items = scores.shape[1] - 1
    new_id = list(range(1, n_items + 1))
    random.shuffle(new_id)
    new_id = torch.tensor([0] + new_id)
    moved = torch.empty_like(scores)
    moved[:, new_id] = scores
    renumbered = Ragged(new_id[seen.values], seen.offsets)
    assert rank_from_scores(moved, new_id[targets], renumbered).equal(rank_from_scores(scores, targets, seen))


@given(questions(max_items=12))
@settings(max_examples=150, **PLAIN)
def test_lists_tell_the_ranks_of_the_scores_they_were_cut_from(question):
    scores, targets, seen = question
    scores = scores.masked_fill(scores == -math.inf, -2.0)
    items, best = top_lists(scores, scores.shape[1] - 1)
    assert rank_from_lists(items, targets, best).equal(rank_from_scores(scores, targets))
    kept, kept_scores = drop_seen(items, seen, targets, best)
    assert rank_from_lists(kept, targets, kept_scores).equal(rank_from_scores(scores, targets, seen))
    plain = drop_seen(items, seen)[0].tolist()
    for row, history, before in zip(plain, seen.tolist(), items.tolist(), strict=True):
        left = [i for i in before if i not in history]
        assert row == left + [0] * (len(before) - len(left))


@given(st.data())
@settings(max_examples=200, **PLAIN)
def test_resolved_tuples_are_the_plain_loop(data):
    n_items = data.draw(st.integers(1, 8))
    group_of_item = [-1] + data.draw(st.lists(st.integers(-1, 3), min_size=n_items, max_size=n_items))
    groups = data.draw(st.lists(st.lists(st.integers(-2, 5), min_size=3, max_size=3), min_size=1, max_size=3))
    targets = data.draw(st.lists(st.integers(1, n_items), min_size=len(groups), max_size=len(groups)))
    k = data.draw(st.integers(1, 10))
    if max(group_of_item) < 0:
        group_of_item[1] = 0

    def resolve(row, target):
        out = []
        for g in row:
            members = [i for i in range(1, n_items + 1) if g >= 0 and group_of_item[i] == g]
            if target in members:
                members = [i for i in members if i != target] + [target]
            out += members or [0]
        return (out + [0] * k)[:k]

    group_tensor, table, target_tensor = torch.tensor(groups), torch.tensor(group_of_item), torch.tensor(targets)
    assert resolve_tuples(group_tensor, table, k).tolist() == [resolve(row, None) for row in groups]
    resolved = resolve_tuples(group_tensor, table, k, target_tensor)
    assert resolved.tolist() == [resolve(row, t) for row, t in zip(groups, targets, strict=True)]
    rank, tuples = rank_from_lists(resolved, target_tensor), tuple_rank(group_tensor, table, target_tensor)
    assert bool(((rank == 0) | (rank >= tuples)).all()) and bool((tuples[rank > 0] > 0).all())


def test_a_collapsed_codebook_takes_no_memory():
    n_items, n_users = 50_000, 2_000
    groups, group_of_item = torch.zeros(n_users, 20, dtype=torch.int64), torch.zeros(n_items + 1, dtype=torch.int64)
    resolved = resolve_tuples(groups, group_of_item, 20, torch.full((n_users,), 7))
    assert resolved.shape == (n_users, 20) and not bool((resolved == 7).any())


def test_constant_scores_are_the_worst_and_nan_raises():
    scores, targets = torch.zeros(3, 101), torch.tensor([1, 50, 100])
    assert rank_from_scores(scores, targets).tolist() == [100, 100, 100]
    scores[:, 0] = math.nan  # the padding column is nobody's score
    assert rank_from_scores(scores, targets).tolist() == [100, 100, 100]
    scores[1, 7] = math.nan
    with pytest.raises(InputError, match="not numbers") as error:
        rank_from_scores(scores, targets)
    assert error.value.parts["rows"] == "1"
    with pytest.raises(InputError, match="order of its scores"):
        rank_from_lists(torch.tensor([[1, 2]]), torch.tensor([2]), torch.tensor([[math.nan, 1.0]]))
    with pytest.raises(InputError, match="not an item"):
        rank_from_scores(torch.zeros(1, 101), torch.tensor([101]))


def some_cases(n_users=6, history=3):
    users = torch.arange(1, n_users + 1)
    return Cases(users, Ragged.from_lists([[9] * history] * n_users), users.clamp(max=8), torch.full_like(users, history))


def test_inflation_by_hand():
    # items 1 and 2 share a tuple, so do 3 and 4; everybody is offered tuple 0, then tuple 1
    group_of_item = torch.tensor([-1, 0, 0, 1, 1, 2, 3, 4, 5, 6])
    result = evaluate_tuples(torch.tensor([[0, 1]]).expand(6, -1), group_of_item, some_cases(), ks=(1, 2))
    assert result.per_user["rank"].tolist() == [2, 2, 4, 4, 0, 0]
    m = result.metrics
    assert m["test/tuple/unfiltered/recall@2"] == 4 / 6 and m["test/item/unfiltered/recall@2"] == 2 / 6
    assert m["test/inflation/unfiltered/recall@2"] == 2 and "test/inflation/unfiltered/recall@1" not in m  # no item hit at 1
    unique = evaluate_tuples(torch.tensor([[0, 1]]).expand(6, -1), torch.arange(-1, 9), some_cases(), ks=(1, 2))
    assert unique.metrics["test/inflation/unfiltered/recall@2"] == 1


def test_figure_before_resolution_stands_beside_items():
    raw_group = torch.tensor([-1, 0, 0, 1, 1, 2, 3, 4, 5, 6])
    result = evaluate_lists(torch.tensor([[2, 4, 0]]).expand(6, -1), some_cases(), raw_group=raw_group, ks=(1, 3))
    assert result.metrics["test/item/unfiltered/recall@3"] == 2 / 6
    assert result.metrics["test/tuple/unfiltered/recall@3"] == 4 / 6
    assert result.metrics["test/inflation/filtered/recall@3"] == 2


def log_of(rows):
    triples = [(u, i, p) for u, row in enumerate(rows, start=1) for p, i in enumerate(row)]
    return pd.DataFrame(triples, columns=["user_id", "item_id", "position"])


def leave_one_out(log):
    behind = log.groupby("user_id").position.transform("max") - log.position
    return log[behind > 1], log[behind == 1], log[behind == 0]


def test_leakage_raises_and_names_rows():
    train, valid, test = leave_one_out(log_of([[1, 2, 3, 4], [2, 3, 1, 4], [5, 5, 5, 5]]))
    check_no_leakage(train, valid, test)  # user 3 repeats an item: items are not compared, positions are
    with pytest.raises(LeakageError, match=r"validation rows are among the training rows(.|\n)*user 2, position 2"):
        check_no_leakage(pd.concat([train, valid[valid.user_id == 2]]), valid, test)
    with pytest.raises(LeakageError, match="test rows are among the training rows"):
        check_no_leakage(pd.concat([train, test[:1]]), valid[1:], test)
    with pytest.raises(LeakageError, match="test rows are among the validation rows"):
        check_no_leakage(train, test, test)
    with pytest.raises(LeakageError, match="training rows lie after a validation row"):
        check_no_leakage(train.assign(position=train.position + 4), valid, test)
    with pytest.raises(LeakageError, match="history of a test case reaches its target"):
        make_cases(pd.concat([train, test]), valid, test)
    with pytest.raises(InputError, match="two test rows"):
        check_no_leakage(train, valid, pd.concat([test, test]))
    with pytest.raises(InputError, match="lack a column"):
        check_no_leakage(train.drop(columns="position"), valid, test)


def test_cases_do_not_depend_on_the_order_of_rows():
    train, valid, test = leave_one_out(log_of([[1, 2, 3, 4], [2, 3, 1, 4, 6], [5, 6, 7]]))
    mixed = [f.sample(frac=1, random_state=1) for f in (train, valid, test)]
    a, b = make_cases(train, valid, test), make_cases(*mixed)
    assert a.users.equal(b.users) and a.history.tolist() == b.history.tolist() == [[1, 2, 3], [2, 3, 1, 4], [5, 6]]
    assert a.targets.tolist() == b.targets.tolist() == [4, 6, 7] and rows_hash(train) == rows_hash(mixed[0])


def test_canary_item_leaves_no_trace():
    canary = 8  # only ever a validation or test item
    train, valid, test = leave_one_out(log_of([[1, 2, canary, 3], [2, 1, 3, canary], [1, 3, 2, canary], [3, 1, canary, 2]]))
    popularity, knn = Popularity().fit(train, 8), ItemKNN().fit(train, 8)
    assert popularity.counts[canary] == 0 and knn.similarity[[canary]].nnz == 0 and knn.similarity[:, [canary]].nnz == 0
    cases = make_cases(train, valid, test)  # histories hold the canary, and still nothing points to or from it
    scores = knn.scores(cases.history)
    assert bool((scores[:, canary] == 0).all()) and knn.similarity.nnz > 0
    leaky = ItemKNN().fit(pd.concat([train, valid, test]), 8)
    assert leaky.similarity[[canary]].nnz > 0
    check_provenance(knn.train_hash, rows_hash(train), "item-kNN")
    for artefact_hash in (leaky.train_hash, ""):
        with pytest.raises(LeakageError, match="item-kNN was not made from"):
            check_provenance(artefact_hash, rows_hash(train), "item-kNN")


def test_item_similarity_is_the_plain_loop():
    rng = np.random.default_rng(0)
    baskets = [rng.choice(np.arange(1, 21), rng.integers(2, 8)).tolist() for _ in range(60)]
    knn = ItemKNN(k=20, shrink=3.0, half_life=0).fit(log_of(baskets), 20)
    sets = [set(b) for b in baskets]
    count = [0] + [sum(i in b for b in sets) for i in range(1, 21)]
    expected = [[sum(i in b and j in b for b in sets) / (math.sqrt(count[i] * count[j]) + 3) if i != j else 0 for j in range(1, 21)]
                for i in range(1, 21)]
    assert np.allclose(knn.similarity.toarray()[1:, 1:], expected, atol=1e-6)
    assert np.allclose(knn.scores(Ragged.from_lists([[3, 5]]))[0, 1:], np.array(expected)[2] + np.array(expected)[4], atol=1e-6)
    few = ItemKNN(k=4, shrink=3.0).fit(log_of(baskets), 20).similarity
    assert np.diff(few.indptr).max() <= 4
    for i, row in enumerate(expected):
        assert np.allclose(sorted(few[[i + 1]].data), sorted([v for v in row if v])[-4:], atol=1e-6)


def test_bootstrap_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits = (torch.rand(400, 300, generator=generator) < 0.2).double()  # 300 experiments of 400 users
    intervals = [interval(resampled_means(h[:, None], 400, seed=i)) for i, h in enumerate(hits.T)]
    covered = [bool(low <= 0.2 <= high) for low, high in intervals]
    assert 0.925 <= np.mean(covered) <= 0.975
    low, high = interval(resampled_means(hits[:, :1], 4000))
    half_width = 1.96 * math.sqrt(float(hits[:, 0].mean()) * (1 - float(hits[:, 0].mean())) / 400)
    assert abs(float(high - low) / 2 - half_width) < 0.08 * half_width


def test_compare_is_paired():
    generator = torch.Generator().manual_seed(0)
    rank = torch.randint(1, 30, (3000,), generator=generator)
    a = pd.DataFrame(dict(user_id=range(3000), target=1, rank=rank, rank_filtered=rank))
    b = a.assign(rank_filtered=a.rank_filtered.where(a.user_id >= 15, 100))
    table = compare(a, b.sample(frac=1, random_state=0))  # the order of rows does not matter
    lost = (a.rank_filtered[:15] <= 10).sum() / 3000
    assert table.loc["recall@10", "difference"] == pytest.approx(lost) and table.loc["recall@10", "clear"]
    mirrored = compare(b, a)
    assert np.allclose(table.low, -mirrored.high) and np.allclose(table.high, -mirrored.low)
    with pytest.raises(InputError, match="two ranks"):
        compare(a, pd.concat([b, b[:1]]))
    with pytest.raises(InputError, match="share no user"):
        compare(a, b.assign(user_id=b.user_id + 9999))


@given(st.lists(st.integers(0, 60), min_size=1, max_size=30))
@settings(max_examples=100, **PLAIN)
def test_metrics_are_the_plain_formulas(ranks):
    metrics = metrics_from_ranks(torch.tensor(ranks), prefix="valid/item/filtered")
    for k in (1, 5, 10, 20):
        hits = [r for r in ranks if 0 < r <= k]
        assert metrics[f"valid/item/filtered/recall@{k}"] == pytest.approx(len(hits) / len(ranks))
        assert metrics[f"valid/item/filtered/ndcg@{k}"] == pytest.approx(sum(1 / math.log2(r + 1) for r in hits) / len(ranks))
    assert metrics["valid/item/filtered/mrr"] == pytest.approx(sum(1 / r for r in ranks if r) / len(ranks))


def test_no_list_beats_the_ceiling():
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(50, 30, generator=generator).pow(3)
    probability /= probability.sum(1, keepdim=True)
    best = ceiling_metrics(probability)
    at_random = torch.randint(0, 31, (50, 20), generator=generator)
    for lists in (at_random, oracle_lists(probability).flip(1), torch.ones(50, 20, dtype=torch.int64)):
        assert all(v <= best[n] + 1e-12 for n, v in expected_metrics(probability, lists).items())
        assert 0 < ceiling_share(probability, lists) <= 1
    assert ceiling_share(probability, oracle_lists(probability)) == 1
    assert ceiling_share(probability, torch.zeros(50, 10, dtype=torch.int64)) == 0


def test_tables_refuse_what_may_not_be_compared():
    cases = some_cases()
    result = evaluate_scores(lambda history, users: torch.rand(len(history), 10), cases)
    with pytest.raises(InputError, match="validation and test"):
        result_table({"a": result, "b": EvaluationResult(result.per_user, split="valid")})
    with pytest.raises(InputError, match="different users or targets"):
        result_table({"a": result, "b": EvaluationResult(result.per_user.assign(target=3))})
    with pytest.raises(InputError, match="number of rows"):
        evaluate_scores(lambda history, users: torch.zeros(2, 10), cases)
    with pytest.raises(InputError, match="cannot be evaluated"):
        evaluate_lists(torch.ones(6, 5, dtype=torch.int64), cases)
    result.extra["test/share_of_ceiling@10"] = 0.5
    table = result_table({"a": result, "leak": EvaluationResult(result.per_user.assign(rank_filtered=1), leaky="also_bought")})
    text = table._repr_markdown_()
    assert table.index.tolist() == ["a", "leak"] and "knows also_bought" in text and "0.500" in text and "nan" not in text.lower()


def accumulate_in_process(folder, targets, predictions):
    process = dist.get_rank()
    evaluator = TopKAccumulator(k=[5, 10])
    part = slice(0, 7) if process == 0 else slice(7, None)  # unequal shares: a mean of means would be wrong
    evaluator.accumulate(targets[part], predictions[part])
    evaluator.reduce()
    torch.save(evaluator.reduce(), f"{folder}/{process}.pt")  # the second call says the same as the first


def test_accumulator_sums_over_processes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 2, (40, 3), generator=generator)
    predictions = torch.randint(0, 2, (40, 10, 3), generator=generator)
    launch(accumulate_in_process, (tmp_path, targets, predictions), 2)
    alone = TopKAccumulator(k=[5, 10])
    for start in (0, 30):
        alone.accumulate(targets[start : start + 30], predictions[start : start + 30])
    reports = [torch.load(tmp_path / f"{process}.pt", weights_only=True) for process in (0, 1)]
    assert reports[0] == pytest.approx(alone.reduce()) and reports[1] == reports[0]
    ranks = [next((p + 1 for p in range(10) if predictions[u, p].equal(targets[u])), 0) for u in range(40)]
    assert alone.reduce() == pytest.approx({n: v for n, v in metrics_from_ranks(torch.tensor(ranks), (5, 10)).items() if n != "mrr"})


@functools.cache
def beauty_log(path):
    log = log_of([line.split()[1:] for line in path.read_text().splitlines()]).astype("int64")
    return log, *leave_one_out(log)


@pytest.fixture
def beauty(data):
    return beauty_log(data / "beauty" / "sequences.txt")


def test_beauty_baselines(beauty):
    _, train, valid, test = beauty
    check_no_leakage(train, valid, test)
    cases = make_cases(train, valid, test)
    assert len(cases) == 22_363 and len(cases.history.values) == 198_502 - 22_363
    popularity, knn = Popularity().fit(train, 12_101), ItemKNN().fit(train, 12_101)
    results = {"popularity": evaluate_scores(popularity.scores, cases), "item-kNN": evaluate_scores(knn.scores, cases)}
    table = result_table(results, resamples=100)
    assert table.index.tolist() == ["item-kNN", "popularity"]
    # what these two score, order of the file as given: a change of protocol would move them
    assert table.loc["popularity", "filtered/recall@10"] == pytest.approx(0.0110, abs=2e-4)
    assert table.loc["item-kNN", "filtered/recall@10"] == pytest.approx(0.0703, abs=1e-3)
    assert table.loc["item-kNN", "unfiltered/recall@10"] == pytest.approx(0.0626, abs=1e-3)
    assert results["item-kNN"].metrics["test/repeat_share"] == 0
    slices = slice_table(results["item-kNN"].per_user, cases, popularity.counts)
    cold = slices.loc[("target", "cold: never in training")]
    assert cold.n == 138 and cold["recall@10"] == 0
    assert catalogue_metrics(results["popularity"].lists, popularity.counts)["coverage@10"] < 0.01


def test_dataset_hash_and_cases_agree_with_the_folder_format(beauty):
    from recgen.formats.dataset import Dataset

    log, train, valid, test = beauty
    small = log[log.user_id <= 300]
    ids = {i: n for n, i in enumerate(small.item_id.unique(), start=1)}
    small = small.assign(item_id=small.item_id.map(ids))
    items = pd.DataFrame(dict(item_id=range(1, len(ids) + 1), raw_id=[str(i) for i in ids], title="-"))
    dataset = Dataset(small, items)
    train, valid, test = leave_one_out(small)
    check_provenance(Popularity().fit(dataset.train_interactions(), dataset.n_items).train_hash, dataset.train_hash, "popularity")
    for split, expected in [("test", make_cases(train, valid, test)), ("valid", make_cases(train, None, valid, "valid"))]:
        cases = cases_from_dataset(dataset, split)
        assert cases.split == split and cases.history.tolist() == expected.history.tolist() and cases.targets.equal(expected.targets)
