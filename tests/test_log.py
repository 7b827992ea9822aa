"Logs of any size: what the streamed reader makes of rows is what a plain one in memory makes of them."
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recgen.core.errors import InputError, ParameterError
from recgen.core.files import read_parquet
from recgen.formats.dataset import Dataset, order_positions, split_rows
from recgen.formats.statistics import PartCounts, whole_users
from recgen.sources.log import Source, open_spool, read_log, write_interactions

few = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def source_of(frame, **more):
    "A source over a DataFrame with user, item and perhaps timestamp and rating."
    columns = {c: sql for c, sql in (("timestamp", "timestamp * 1000000"), ("rating", "rating")) if c in frame}
    return Source("toy", Path("toy.csv"), "toy", "CAST(\"user\" AS VARCHAR)", "item", frames={"toy": frame}, **columns, **more)


def plainly(frame, k_user, k_item, tie_policy):
    "The same work with pandas, row by row where that is plainest."
    if "timestamp" in frame:
        frame = frame[~frame.duplicated(["user", "item", "timestamp"])]
    while True:
        kept = frame[(frame.groupby("user")["item"].transform("size") >= k_user) & (frame.groupby("item")["user"].transform("size") >= k_item)] if len(frame) else frame
        if len(kept) == len(frame):
            break
        frame = kept
    return frame


logs = st.lists(st.tuples(st.sampled_from("abcdefg"), st.sampled_from("uvwxyz"), st.integers(0, 4)), min_size=1, max_size=60)


@few
@given(logs, st.integers(0, 3), st.integers(0, 4), st.sampled_from(["given", "hash"]), st.integers(1, 7), st.booleans())
def test_the_streamed_log_is_the_plain_one(rows, k, min_user, policy, piece, timed):
    frame = pd.DataFrame(rows, columns=["user", "item", "timestamp"])
    if not timed:
        frame, policy = frame.drop(columns="timestamp"), "given"
    numbers = {c: {v: i for i, v in enumerate(frame[c].unique(), 1)} for c in ("user", "item")}
    kept = plainly(frame, max(k, min_user, 1), max(k, 1), policy)
    sizes = kept.groupby("user").size()
    try:
        with read_log(source_of(frame), k_core=k, min_user=min_user, tie_policy=policy) as log:
            out = pd.concat(log.frames(rows=piece), ignore_index=True)
            keys = {kind: log.keys(kind).to_pandas().set_index("id")["key"] for kind in ("user", "item")}
            assert log.repeated == (int(frame.duplicated().sum()) if timed else 0) and log.n_rows == len(out) == len(kept)
    except InputError as e:
        assert (not len(kept)) if "is left" in e.problem else (sizes < 3).any()
        return
    assert (sizes >= 3).all() and len(kept)
    back = pd.DataFrame({"user": out["user_id"].map(keys["user"]), "item": out["item_id"].map(keys["item"]), "position": out["position"]})
    known = kept.assign(user_id=kept["user"].map(numbers["user"]))
    known["position"] = order_positions(known, policy, kept["user"], kept["item"])
    known = known.sort_values(["user_id", "position"])
    assert back[["user", "item", "position"]].to_numpy().tolist() == known[["user", "item", "position"]].to_numpy().tolist()
    for kind in ("user", "item"):  # ids without gaps, in the order of first appearance in the whole log
        there = [v for v in numbers[kind] if not (k or min_user) or v in set(kept[kind])]
        assert keys[kind].tolist() == there and keys[kind].index.tolist() == list(range(1, len(there) + 1))


def test_pieces_hold_whole_users_whatever_their_size():
    frame = pd.DataFrame({"user": np.repeat(["a", "b", "c"], [5, 3, 4]), "item": [str(i) for i in range(12)]})
    for size in (1, 2, 3, 5, 100):
        with read_log(source_of(frame)) as log:
            pieces = list(log.frames(rows=size))
        assert pd.concat(pieces)["item_id"].tolist() == list(range(1, 13))
        assert sum(p["user_id"].nunique() for p in pieces) == 3


def test_the_files_training_hash_is_the_datasets(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"user": rng.integers(0, 20, 400).astype(str), "item": rng.integers(0, 30, 400).astype(str), "timestamp": rng.integers(0, 50, 400), "rating": rng.random(400).astype(np.float32)})
    for split in ("leave_one_out", "time"):
        with read_log(source_of(frame), tie_policy="hash", split=split) as log:
            facts = write_interactions(tmp_path / f"{split}.parquet", log)
            rule, n = log.split, log.count("item")
        rows = read_parquet(tmp_path / f"{split}.parquet").to_pandas()
        made = Dataset(rows, pd.DataFrame({"item_id": range(1, n + 1), "raw_id": [str(i) for i in range(n)], "title": ""}), {"split": rule})
        assert facts["train_hash"] == made.train_hash and facts["n_train"] == len(made.train_interactions()) and facts["n_test"] == len(made.test_rows_held_out())
        assert rows.dtypes.astype(str).to_dict() == {"user_id": "int64", "item_id": "int64", "timestamp": "int64", "rating": "float32", "position": "int32"}
        part = split_rows(rows, rule)
        assert facts["n_valid"] == (part == 1).sum()


def test_a_time_split_by_share_by_date_and_by_second():
    frame = pd.DataFrame({"user": ["a"] * 10 + ["b"] * 10, "item": [str(i % 7) for i in range(20)], "timestamp": 1_700_000_000 + 86_400 * np.arange(20)})
    bounds = []
    for how in ({}, {"valid_from": "2023-11-30", "test_from": "2023-12-02"}, {"valid_from": "1701302400", "test_from": "1701475200.0"}):
        with read_log(source_of(frame), split="time", **how) as log:
            bounds.append((log.split["valid_from"], log.split["test_from"]))
    day = [(b - 1_700_000_000) / 86_400 for b in bounds[0]]
    assert day == [15, 17] and bounds[1] == bounds[2] == (1_701_302_400, 1_701_475_200)
    for how, problem in (({"valid_from": "yesterday"}, "no time"), ({"valid_from": "2023-12-05", "test_from": "2023-12-01"}, "leaves a part empty"), ({"test_from": "2030-01-01"}, "leaves a part empty")):
        with pytest.raises(ParameterError, match=problem), read_log(source_of(frame), split="time", **how):
            pass
    with pytest.raises(ParameterError, match="needs times"), read_log(source_of(frame.drop(columns="timestamp")), split="time"):
        pass
    with pytest.raises(ParameterError, match="no timestamps"), read_log(source_of(frame.drop(columns="timestamp")), tie_policy="hash"):
        pass


def test_within_a_second_rows_are_ordered_and_between_seconds_they_are_split():
    micros = [1_999_999, 2_000_000, -1, -1_000_001, 0, 999_999, 1_000_000]  # −1 µs is in the second before 1970
    frame = pd.DataFrame({"user": ["a"] * 7, "item": list("tuvwxyz"), "t": micros})
    with read_log(Source("toy", Path("toy.csv"), "toy", "user", "item", "t", frames={"toy": frame}), split="time", valid_from="1", test_from="2") as log:
        rows, keys = pd.concat(log.frames()), log.keys("item")["key"].to_pylist()
        assert [keys[i - 1] for i in rows["item_id"]] == list("wvxyztu") and rows["timestamp"].tolist() == [-2, -1, 0, 0, 1, 1, 2] and rows["timestamp"].dtype == np.int64
        assert split_rows(rows, log.split).tolist() == [0, 0, 0, 0, 1, 3, 2]
    for bounds, empty in ((("1", "3"), "no rows in test"), (("-2", "1"), "no rows in train"), (("1", "1"), "no rows in valid")):
        with pytest.raises(ParameterError, match="leaves a part empty") as e, read_log(Source("toy", Path("toy.csv"), "toy", "user", "item", "t", frames={"toy": frame}), split="time", valid_from=bounds[0], test_from=bounds[1]):
            pass
        assert empty in e.value.parts["found"] and e.value.parts["expected"] == "two ascending times between -2 and 2"


@few
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=50), st.integers(1, 29), st.integers(1, 20))
def test_targets_that_training_has_not_seen_are_counted(rows, valid_from, piece):
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).sort_values(["user_id", "timestamp"], kind="stable", ignore_index=True)
    frame["item_id"] += 1
    split = {"rule": "time", "valid_from": valid_from, "test_from": 30}
    counts, part = PartCounts(), split_rows(frame, split)
    for table in whole_users(pa.Table.from_pandas(frame).to_batches(max_chunksize=piece)):
        users = table.to_pandas()
        counts.add(users, split_rows(users, split))
    assert counts.rows.tolist() == np.bincount(part, minlength=4).tolist()
    train, facts = frame[part == 0], counts.facts()
    for name, p in (("valid", 1), ("test", 2)):
        for end in ("user", "item"):
            assert facts[f"n_{name}_{end}_unseen"] == sum(v not in set(train[f"{end}_id"]) for v in frame.loc[part == p, f"{end}_id"])


def test_a_split_that_comes_with_the_data_stands_unless_another_is_asked_for():
    frame = pd.DataFrame({"user": list("aaabbb"), "item": list("xyzxyz"), "timestamp": range(6)})
    given_split = {"rule": "time", "valid_from": 2, "test_from": 5}
    with read_log(source_of(frame, split=given_split)) as log:
        assert log.split == given_split
    with read_log(source_of(frame, split=given_split), split="leave_one_out") as log:
        assert log.split == {"rule": "leave_one_out"}


def test_numbers_of_a_source_stay_and_gaps_are_named():
    frame = pd.DataFrame({"user": [2, 2, 2, 1, 1, 1], "item": ["9", "1", "3", "1", "3", "9"]})
    listed = pd.DataFrame({"key": [str(i) for i in range(1, 11)]})
    with read_log(source_of(frame, numbered=True, items=lambda keys: listed)) as log:
        assert pd.concat(log.frames())["item_id"].tolist() == [1, 3, 9, 9, 1, 3] and log.count("item") == 10
    with pytest.raises(InputError, match="gaps") as e, read_log(source_of(frame.assign(user=[5, 5, 5, 1, 1, 1]), numbered=True)):
        pass
    assert "user 2, user 3, user 4" in str(e.value)
    with read_log(source_of(frame.assign(user=[5, 5, 5, 1, 1, 1]), numbered=True), k_core=1) as log:
        assert log.keys("user")["key"].to_pylist() == ["1", "5"]


@pytest.mark.parametrize("column, value, problem", [("user", None, "ids are missing"), ("item", None, "ids are missing"), ("timestamp", None, "timestamps are missing"), ("rating", None, "ratings are missing")])
def test_a_missing_value_is_named_with_its_row(column, value, problem):
    frame = pd.DataFrame({"user": list("aaab"), "item": list("xyzx"), "timestamp": pd.array(range(4), "Int64"), "rating": pd.array([1.0] * 4, "Float64")})
    frame.loc[2, column] = value
    with pytest.raises(InputError, match=problem) as e, read_log(source_of(frame, raw={column: (column, f'"{column}"')}, first_line=2)):
        pass
    assert e.value.parts["rows"] == "line 4" and e.value.parts["column"] == column and "1 such row" in e.value.parts["found"]


def test_a_column_without_a_single_rating_is_none():
    frame = pd.DataFrame({"user": list("aaa"), "item": list("xyz"), "rating": pd.array([None] * 3, "Float64")})
    with read_log(source_of(frame, raw={"rating": ("rating", "rating")})) as log:
        assert "rating" not in next(log.frames())


def test_no_rows_and_no_core_are_said():
    empty = pd.DataFrame({"user": pd.array([], "string"), "item": pd.array([], "string")})
    with pytest.raises(InputError, match="no rows"), read_log(source_of(empty)):
        pass
    with pytest.raises(InputError, match="9-core"), read_log(source_of(pd.DataFrame({"user": list("aaa"), "item": list("xyz")})), k_core=9):
        pass


def test_the_spool_is_gone_afterwards_and_nothing_is_fetched(tmp_path):
    frame = pd.DataFrame({"user": list("aaa"), "item": list("xyz")})
    with read_log(source_of(frame), spool_dir=tmp_path):
        assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(InputError), read_log(source_of(frame), k_core=9, spool_dir=tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    with open_spool(tmp_path) as connection, pytest.raises(duckdb.Error):
        connection.execute("FROM read_csv('https://example.invalid/log.csv')")
    with pytest.raises(ParameterError, match="no such folder"), open_spool(tmp_path / "nowhere"):
        pass


def test_more_rows_than_the_memory_that_it_may_use(tmp_path):
    "Rows sorted, filtered and ordered in 96 MiB: what does not fit goes to disk, and the rows are those that pandas keeps."
    rng = np.random.default_rng(1)
    n = 800_000
    frame = pd.DataFrame({"user": rng.integers(0, 60_000, n), "item": rng.integers(0, 3_000, n).astype(str), "timestamp": rng.integers(0, 10**6, n)})
    frame.to_parquet(tmp_path / "log.parquet")
    source = Source("toy", tmp_path / "log.parquet", f"read_parquet('{tmp_path}/log.parquet')", "CAST(\"user\" AS VARCHAR)", "item", "timestamp * 1000000")
    kept = plainly(frame, 5, 5, "given")
    with read_log(source, k_core=5, spool_dir=tmp_path, memory_mb=96) as log:
        facts = write_interactions(tmp_path / "interactions.parquet", log)
    assert facts["n_interactions"] == len(kept) and facts["n_users"] == kept["user"].nunique()
    rows = read_parquet(tmp_path / "interactions.parquet").to_pandas()
    assert (rows.groupby("user_id")["timestamp"].diff().dropna() >= 0).all() and rows["user_id"].is_monotonic_increasing
