"""Reading impressions: what is kept, what is refused, and that nothing is written or guessed on the way."""
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from recgen.clicks.data import Clicks, item_lists, past_rates, read_clicks
from recgen.core.errors import InputError
from recgen.core.files import write_parquet
from recgen.core.ragged import Ragged

GOOD = {"row_id": [10, 11, 12, 13], "user_id": [1, 2, 1, 70], "item_id": [3, 1, 2, 5], "label": [1, 0, 0, 1], "item_seq": [[1, 2], [], [2, 3, 4], [5]], "hour": [1, 2, 3, 4]}


def folder_with(path, part="train", **changes):
    "A dataset folder of five items whose part has GOOD's columns, some changed or (None) dropped."
    columns = {k: v for k, v in {**GOOD, **changes}.items() if v is not None}
    write_parquet(path / "items.parquet", pa.table({"item_id": [1, 2, 3, 4, 5]}))
    write_parquet(path / "impressions" / f"{part}.parquet", pa.table(columns))
    return path


def test_a_part_becomes_tensors(tmp_path):
    clicks = read_clicks(folder_with(tmp_path), "train", longest=2, context=["hour"])
    assert clicks.users.tolist() == [1, 2, 1, 70] and clicks.items.tolist() == [3, 1, 2, 5] and clicks.row_ids.tolist() == [10, 11, 12, 13]
    assert clicks.labels.dtype == torch.float32 and clicks.labels.tolist() == [1, 0, 0, 1]
    assert clicks.histories.tolist() == [[1, 2], [], [3, 4], [5]]  # the last two: histories are oldest first
    assert clicks.context["hour"].tolist() == [1, 2, 3, 4] and clicks.context["hour"].dtype == torch.int64


def test_context_is_read_only_where_it_is_named(tmp_path):
    assert read_clicks(folder_with(tmp_path, likes=[9, 9, 9, 9]), "train").context == {}


def test_padding_is_left_out_and_a_missing_history_is_empty():
    column = pa.chunked_array([pa.array([[0, 0, 4], None]), pa.array([[0], [1, 2]])])
    assert item_lists(column, 4, 0, "x").tolist() == [[4], [], [], [1, 2]]


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint16())])
def test_kinds_of_lists(kind):
    assert item_lists(pa.array([[1, 2], [], [3]], kind), 3, 0, "x").tolist() == [[1, 2], [], [3]]


def test_sliced_columns_keep_their_rows():
    "An arrow slice shares the values of the whole column."
    column = pa.array([[9, 9], [1], [2, 3], [9]]).slice(1, 2)
    assert item_lists(column, 3, 0, "x").tolist() == [[1], [2, 3]]


def test_all_histories_empty():
    assert item_lists(pa.array([[], []], pa.list_(pa.int64())), 3, 64, "x").tolist() == [[], []]
    assert item_lists(pa.array([[], None], pa.list_(pa.null())), 3, 64, "x").tolist() == [[], []]


def test_a_test_part_may_lack_labels(tmp_path):
    for label in (None, pa.array([None] * 4, pa.int8()), pa.array([1, None, 1, None], pa.int8())):
        clicks = read_clicks(folder_with(tmp_path, "test", label=label), "test")
        assert len(clicks) == 4 and bool(clicks.labels.isnan().any())
    assert len(read_clicks(folder_with(tmp_path, "test", label=[1, 1, 1, 1]), "test")) == 4  # of one class: no matter, nobody learns from it


REFUSED = {
    "one class": (dict(label=[1, 1, 1, 1]), "one class"),
    "a missing label": (dict(label=pa.array([1, None, 0, 1], pa.int8())), "missing"),
    "a label that is neither": (dict(label=[0, 1, 2, 1]), "neither"),
    "no label": (dict(label=None), "column is missing"),
    "no history": (dict(item_seq=None), "column is missing"),
    "no user": (dict(user_id=None), "column is missing"),
    "an item outside": (dict(item_id=[1, 2, 3, 6]), "catalogue"),
    "item 0": (dict(item_id=[1, 2, 3, 0]), "whole numbers"),
    "a negative user": (dict(user_id=[1, 2, 3, -1]), "whole numbers"),
    "a history outside": (dict(item_seq=[[1], [6], [], []]), "histories hold items"),
    "a negative history": (dict(item_seq=[[1], [-1], [], []]), "histories hold items"),
    "a null in a history": (dict(item_seq=[[1], [None, 2], [], []]), "histories hold items"),
    "a history that is no list": (dict(item_seq=[1, 2, 3, 4]), "not lists"),
    "a history of text": (dict(item_seq=[["a"], [], [], []]), "not lists"),
    "text as context": (dict(hour=["a", "b", "c", "d"]), "context"),
    "missing context": (dict(hour=[1.0, None, 2.0, 3.0]), "context"),
    "infinite context": (dict(hour=[1.0, np.inf, 2.0, 3.0]), "context"),
    "missing row ids": (dict(row_id=pa.array([1, None, 2, 3])), "row_id"),
    "no rows": ({k: pa.array(v).slice(0, 0) for k, v in GOOD.items()}, "no rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    changes, words = REFUSED[case]
    with pytest.raises(InputError, match=words) as refused:
        read_clicks(folder_with(tmp_path, **changes), "train", context=["hour"])
    assert "train.parquet" in str(refused.value)


def test_refusal_names_the_rows(tmp_path):
    with pytest.raises(InputError) as refused:
        read_clicks(folder_with(tmp_path, item_seq=[[1], [6], [], [9]]), "train")
    assert refused.value.parts["rows"] == "1, 3" and "6, 9" in refused.value.parts["found"]


def test_missing_part_and_torn_file(tmp_path):
    with pytest.raises(InputError, match="no such part"):
        read_clicks(folder_with(tmp_path), "valid")
    file = tmp_path / "impressions" / "train.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(InputError):
        read_clicks(tmp_path, "train")


def clicks_of(lengths):
    n = len(lengths)
    return Clicks(torch.arange(1, n + 1), torch.ones(n, dtype=torch.int64), torch.zeros(n), Ragged.from_lists([[1] * k for k in lengths]), torch.arange(n))


def test_batches_hold_every_row_once_and_follow_their_seed():
    clicks = clicks_of([0, 5, 2, 0, 7, 1, 3])
    one, again, other = (clicks.batches(3, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert sorted(torch.cat(one).tolist()) == list(range(7)) and [len(b) for b in one].count(3) == 2
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_select_keeps_rows_together(tmp_path):
    clicks = read_clicks(folder_with(tmp_path), "train", context=["hour"])
    some = clicks.select([3, 0, 3])
    assert some.users.tolist() == [70, 1, 70] and some.histories.tolist() == [[5], [1, 2], [5]] and some.context["hour"].tolist() == [4, 1, 4]
    assert some.row_ids.tolist() == [13, 10, 13]


def plain_rates(ids, labels, times, query_ids, query_times, prior, strength):
    "Rate of clicks of each id over rows strictly earlier than the query, one by one."
    out = []
    for i, t in zip(query_ids, query_times, strict=True):
        past = [y for j, y, s in zip(ids, labels, times, strict=True) if j == i and s < t]
        out.append((sum(past) + prior * strength) / (len(past) + strength))
    return out


def test_past_rates_look_only_backwards():
    rng = np.random.default_rng(0)
    ids, times, labels = rng.integers(1, 5, 60), rng.integers(0, 30, 60), rng.integers(0, 2, 60).astype(float)
    later_ids, later_times = rng.integers(1, 7, 20), rng.integers(20, 40, 20)
    t = [torch.tensor(x) for x in (ids, labels, times, later_ids, later_times)]
    found = past_rates(t[0], t[1], t[2], t[3], t[4], strength=3.0)
    expected = plain_rates(ids, labels, times, later_ids, later_times, labels.mean(), 3.0)
    assert np.allclose(found[:, 0], expected, atol=1e-6)
    own = past_rates(t[0], t[1], t[2], t[0], t[2], strength=3.0)
    assert np.allclose(own[:, 0], plain_rates(ids, labels, times, ids, times, labels.mean(), 3.0), atol=1e-6)  # a row never counts itself


def test_rates_of_validation_do_not_depend_on_its_labels(tmp_path):
    folder_with(tmp_path, "train", timestamp=[1, 2, 3, 4])
    a = read_clicks(folder_with(tmp_path, "valid", timestamp=[5, 6, 7, 8]), "valid", context=["timestamp"])
    b = read_clicks(folder_with(tmp_path, "valid", timestamp=[5, 6, 7, 8], label=[0, 1, 1, 0]), "valid", context=["timestamp"])
    train = read_clicks(tmp_path, "train", context=["timestamp"])
    rates = [past_rates(train.items, train.labels, train.context["timestamp"], c.items, c.context["timestamp"]) for c in (a, b)]
    assert torch.equal(*rates)


def test_reading_ml1m_ctr():
    "The real log, if it is here: what the readme of the data says of it."
    import os
    from pathlib import Path

    source = Path(os.environ.get("RECGEN_DATA", "")) / "ml1m_ctr" / "train.parquet"
    if not source.exists():
        pytest.skip("no ml1m_ctr")
    frame = pd.read_parquet(source)
    column = next(c for c in frame if len(frame[c]) and isinstance(frame[c].iloc[0], (list, np.ndarray)))
    histories = item_lists(pa.array(frame[column].tolist()), 3255, 0, source)
    assert len(histories) == 33_891 and int(histories.values.min()) > 0
    assert histories.tolist()[100] == [i for i in frame[column].iloc[100] if i]
