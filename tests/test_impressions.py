"""Click logs: what is read is what is written, no held-out click is among the interactions, and what cannot be used is refused."""
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgen.core.errors import InputError
from recgen.core.files import write_parquet
from recgen.formats.dataset import Dataset
from recgen.sources.impressions import impressions_source, rekey, rekey_lists
from recgen.sources.log import read_log

def numbered(source) -> tuple:
    "Interactions, and key → id of users and items."
    with read_log(source) as log:
        assert log.split == (source.split or {"rule": "leave_one_out"})
        keys = {kind: log.keys(kind).to_pandas().set_index("key")["id"] for kind in ("user", "item")}
        return pd.concat(log.frames(), ignore_index=True), keys["user"], keys["item"]


def backwards(ids) -> np.ndarray:
    "id → key as a number, at the place of the id."
    out = np.zeros(ids.max() + 1, np.int64)
    out[ids.to_numpy()] = ids.index.astype(np.int64)
    return out


def random_log(seed=0, n=400, users=30, items=40) -> dict:
    "Three parts of a log without times; a user's history grows by what they click."
    rng = np.random.default_rng(seed)
    seen = {u: [] for u in range(1, users + 1)}
    rows = []
    for _ in range(n):
        u, i, label = int(rng.integers(1, users + 1)), int(rng.integers(1, items + 1)), int(rng.random() < 0.4)
        rows.append((u, i, label, [0] * int(rng.integers(0, 4)) + seen[u][-6:]))
        if label:
            seen[u].append(i)
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "label", "history"])
    return {"train": frame[: n * 6 // 10], "valid": frame[n * 6 // 10 : n * 8 // 10], "test": frame[n * 8 // 10 :]}


def save(folder, parts: dict):
    for name, frame in parts.items():
        write_parquet(folder / f"{name}.parquet", frame.reset_index(drop=True))
    return folder


# --- the real log --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def movies(request):
    folder = request.getfixturevalue("data") / "ml1m_ctr"
    source = impressions_source(folder)
    return folder, source, *numbered(source)


def test_ml1m_ctr_has_its_counts(movies):
    folder, source, rows, users, items = movies
    assert source.impressions.facts["rows"] == {"train": 33_891, "valid": 10_401}
    raw = [pq.read_table(folder / f"{p}.parquet").to_pandas() for p in ("train", "valid")]
    both = pd.concat(raw)
    assert both["user_id"].max() == 838 and both["item_id"].max() == 3_255  # what the data's README counts: the largest ids
    assert (both["user_id"].nunique(), both["item_id"].nunique()) == (source.impressions.facts["users"], len(items)) == (803, 3_199)
    assert len(rows) == both["label"].sum() == 23_686 and len(users) == 786


def test_ml1m_ctr_comes_back_through_raw_ids(movies):
    folder, source, _, users, items = movies
    made = source.impressions(users, items)
    item, user = backwards(items), backwards(source.impressions.number_users(users))
    start = 1
    for name, table in made.items():
        raw = pq.read_table(folder / f"{name}.parquet")
        assert table["row_id"].to_pylist() == list(range(start, start + len(raw)))
        start += len(raw)
        assert (user[table["user_id"]] == raw["user_id"].to_numpy()).all() and (item[table["item_id"]] == raw["item_id"].to_numpy()).all()
        for column in ("label", "timestamp", "not_cold"):
            assert table[column].to_pylist() == raw[column].to_pylist()
        assert "title" not in table.column_names and table["label"].type == pa.int8()
        assert [[int(item[i]) for i in h] for h in table["item_seq"].to_pylist()] == [[i for i in h if i] for h in raw["history"].to_pylist()]
    titles = dict(zip(raw["item_id"].to_pylist(), raw["title"].to_pylist(), strict=True))
    table = source.items(None).set_index("key")["title"]
    assert all(table[str(k)] == t for k, t in titles.items())
    assert list(source.items(None)) == ["key", "title"]  # not_cold differs between rows of one item


def test_ml1m_ctr_training_interactions_hold_no_later_click(movies):
    folder, source, rows, users, items = movies
    dataset = Dataset(rows, pd.DataFrame({"item_id": items.to_numpy(), "raw_id": items.index, "title": ""}), {"name": "m", "split": source.split})
    train = dataset.train_interactions()
    user, item = backwards(users), backwards(items)
    pairs = set(zip(user[train["user_id"]].tolist(), item[train["item_id"]].tolist(), strict=True))
    raw = {p: pq.read_table(folder / f"{p}.parquet").to_pandas() for p in ("train", "valid")}
    clicked = {p: set(zip(f["user_id"], f["item_id"], strict=True)) for p, f in ((p, f[f["label"] == 1]) for p, f in raw.items())}
    assert pairs == clicked["train"] and not pairs & clicked["valid"]
    assert source.split["valid_from"] == raw["valid"]["timestamp"].min() > train["timestamp"].max()
    assert len(dataset.valid_rows_held_out()) and len(dataset.test_rows_held_out())


# --- what the interactions are -------------------------------------------------------------------------------------------


def expected_sequences(parts: dict) -> dict:
    "The rule in plain words, a loop for each user."
    strip = lambda h: [i for i in h if i]  # noqa: E731
    later = pd.concat([parts[p] for p in ("valid", "test") if p in parts])
    held, out = set(zip(later["user_id"], later["item_id"], strict=True)), {}
    for user in dict.fromkeys([*parts["train"]["user_id"], *later["user_id"]]):
        mine, others = parts["train"][parts["train"]["user_id"] == user], later[later["user_id"] == user]
        if len(mine):
            histories = [strip(h) for h in mine["history"]]
            known = max(reversed(histories), key=len)
            clicks = sorted((len(h), n, i) for n, (h, i, label) in enumerate(zip(histories, mine["item_id"], mine["label"], strict=True)) if label)
            known = known + [i for i in dict.fromkeys(i for *_, i in clicks) if i not in known]
        else:
            known = min((strip(h) for h in others["history"]), key=len)
        known = [i for i in known if (user, i) not in held]
        if len(known) >= 3:
            out[user] = known
    return out


@pytest.mark.parametrize("seed", range(3))
def test_without_times_the_interactions_are_what_training_rows_tell(tmp_path, seed):
    parts = random_log(seed, users=30 if seed else 60)
    expected = expected_sequences(parts)
    source = impressions_source(save(tmp_path, parts))
    assert source.split is None and source.timestamp == ""
    rows, users, items = numbered(source)
    user, item = backwards(users), backwards(items)
    found = {user[u]: item[g["item_id"]].tolist() for u, g in rows.sort_values("position").groupby("user_id")}
    assert found == expected and len(found) >= 10
    held = set(zip(*(pd.concat([parts["valid"], parts["test"]])[c] for c in ("user_id", "item_id")), strict=True))
    assert not {(u, i) for u, g in found.items() for i in g} & held
    appears = [u for u in dict.fromkeys(parts["train"]["user_id"]) if u in expected]
    assert user[1 : len(appears) + 1].tolist() == appears  # numbered by first appearance
    made = source.impressions(users, items)
    every = backwards(source.impressions.number_users(users))
    assert len(every) - 1 == len(set(pd.concat(parts.values())["user_id"])) and every[made["test"]["user_id"]].tolist() == parts["test"]["user_id"].tolist()


def test_an_item_clicked_twice_stands_where_it_was_clicked_first(tmp_path):
    parts = {"train": pd.DataFrame({"user_id": 1, "item_id": [5, 6, 7, 5, 8], "label": [1, 1, 1, 1, 0], "history": [[9]] * 5}),
             "valid": pd.DataFrame({"user_id": [1, 2, 2], "item_id": [3, 4, 5], "label": [0, 1, 0], "history": [[9], [1, 2, 3], [8, 7, 6]]})}
    parts["test"] = parts["valid"].assign(history=[[], [6, 6, 6], []], user_id=[1, 2, 3])
    rows, users, items = numbered(impressions_source(save(tmp_path, parts)))
    found = {backwards(users)[u]: backwards(items)[g["item_id"]].tolist() for u, g in rows.groupby("user_id")}
    assert found == {1: [9, 5, 6, 7], 2: [1, 2, 3]}  # user 2: validation comes before test


def test_parts_that_overlap_in_time_are_no_split_in_time(tmp_path):
    parts = random_log()
    for i, frame in enumerate(parts.values()):
        frame["timestamp"] = np.arange(len(frame)) + 1_000 * i + 1
    timed = impressions_source(save(tmp_path, parts))
    assert timed.split == {"rule": "time", "valid_from": 1_001, "test_from": 2_001} and timed.timestamp
    parts["train"].loc[parts["train"].index[3], "timestamp"] = 1_001  # one row at the first moment of validation
    mixed = impressions_source(save(tmp_path, parts))
    assert mixed.split is None and mixed.timestamp == ""
    rows, users, items = numbered(mixed)
    user, item = backwards(users), backwards(items)
    assert {user[u]: item[g["item_id"]].tolist() for u, g in rows.groupby("user_id")} == expected_sequences(parts)
    assert "timestamp" in mixed.impressions(users, items)["train"].column_names


@pytest.mark.parametrize("labels", ["none", "filler", "missing"])
def test_test_labels_that_say_nothing_are_missing(tmp_path, labels):
    parts = random_log()
    for i, frame in enumerate(parts.values()):
        frame["timestamp"] = 1_000 * i + np.arange(len(frame))
    if labels == "none":
        parts["test"] = parts["test"].drop(columns="label")
    else:
        parts["test"]["label"] = 0 if labels == "filler" else pd.array([None] * len(parts["test"]), "Int64")
    source = impressions_source(save(tmp_path, parts))
    assert source.split["test_from"] < 2_000  # the later half of validation, since nothing is known of test
    rows, users, items = numbered(source)
    assert len(rows) == parts["train"]["label"].sum() + parts["valid"]["label"].sum()
    table = source.impressions(users, items)["test"]
    assert table["label"].null_count == len(table) == len(parts["test"])


# --- forms of the same thing ---------------------------------------------------------------------------------------------


def test_types_of_columns_do_not_matter(tmp_path):
    parts = random_log()
    plain = impressions_source(save(tmp_path, parts))
    expected = plain.impressions(*numbered(plain)[1:])
    text = {p: f.assign(user_id=f["user_id"].astype(str), item_id=" " + f["item_id"].astype(str), label=f["label"].astype(bool) if p == "train" else f["label"].astype(float),
                        history=[[str(i) if i else "" for i in h] for h in f["history"]]) for p, f in parts.items()}
    fixed = {}
    for p, f in parts.items():
        lists = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate([[0] * (9 - len(h)) + h for h in f["history"]]), pa.int32()), 9)
        fixed[p] = pa.table({"uid": f["user_id"].to_numpy(np.int16), "video_id": f["item_id"].to_numpy(np.uint32), "click": f["label"].to_numpy(), "hist": lists})
    for i, other in enumerate((text, fixed)):
        (tmp_path / str(i)).mkdir()
        if i:
            for p, table in other.items():
                write_parquet(tmp_path / "1" / f"{p}.parquet", table)
        source = impressions_source(tmp_path / "1" if i else save(tmp_path / "0", other))
        _, users, items = numbered(source)
        made = source.impressions(users, items)
        keys = pd.Series(items.index.astype(int), index=items)
        before = numbered(plain)[2]
        same = pd.Series(before.index.astype(int), index=before)
        for p in parts:
            assert made[p]["label"].equals(expected[p]["label"])
            assert [[keys[x] for x in h] for h in made[p]["item_seq"].to_pylist()] == [[same[x] for x in h] for h in expected[p]["item_seq"].to_pylist()]


def test_columns_of_other_names_and_names_that_are_taken(tmp_path):
    parts = {p: f.rename(columns={"user_id": "who", "history": "before"}).assign(row_id=7, KEY="x" + f["item_id"].astype(str), price=f["item_id"] / 2) for p, f in random_log().items()}
    with pytest.raises(InputError, match="user=COLUMN history=COLUMN"):
        impressions_source(save(tmp_path, parts))
    source = impressions_source(tmp_path, "user=who history=before")
    _, users, items = numbered(source)
    table = source.impressions(users, items)["train"]
    assert table.column_names == ["row_id", "user_id", "item_id", "label", "item_seq", "source_row_id", "price"] and table["row_id"].to_pylist()[:3] == [1, 2, 3]
    described = source.items(None)
    assert described["source_KEY"].dropna().tolist() == ["x" + k for k in described["key"][described["source_KEY"].notna()]] and described["price"].notna().any()


def test_a_null_history_is_an_empty_one(tmp_path):
    parts = random_log()
    parts["train"].at[parts["train"].index[-1], "history"] = None
    source = impressions_source(save(tmp_path, parts))
    assert source.impressions(*numbered(source)[1:])["train"]["item_seq"].to_pylist()[-1] == []


def test_batches_join_to_the_whole(tmp_path):
    source = impressions_source(save(tmp_path, random_log()))
    _, users, items = numbered(source)
    whole, pieces = source.impressions(users, items), source.impressions(users, items, batch=7)
    assert all(whole[p].combine_chunks().equals(pieces[p].combine_chunks()) for p in whole) and whole["valid"]["row_id"][0].as_py() == 241


def test_lists_are_looked_up_whatever_their_offsets():
    ids = pd.Series([10, 20, 30], index=["1", "2", "3"])
    lists = pa.array([[3], [], [1, 2, 9], [], [2]], pa.list_(pa.int64()))
    assert rekey_lists(lists, ids).to_pylist() == [[30], [], [10, 20, -1], [], [20]]
    assert rekey_lists(lists.slice(1, 3), ids).to_pylist() == [[], [10, 20, -1], []]
    assert rekey(pa.array(["2", "x"]), ids).tolist() == [20, -1] and rekey(pa.array([], pa.int64()), ids).tolist() == []
    assert rekey(pa.array([1]), pd.Series([], dtype=np.int64, index=pd.Index([], dtype=object))).tolist() == [-1]


# --- what is refused -----------------------------------------------------------------------------------------------------


def change(column, value):
    def at(frame):
        frame = frame.astype({column: object}).reset_index(drop=True)
        frame.at[17, column] = value
        return frame
    return at


FAULTS = {
    "a label of 2": ("train", change("label", 2), "neither 0 nor 1", "label"),
    "a label of NaN": ("valid", change("label", float("nan")), "neither 0 nor 1", "label"),
    "a missing label": ("train", change("label", None), "neither 0 nor 1", "label"),
    "a test label of 3": ("test", change("label", 3), "neither 0 nor 1", "label"),
    "one class": ("train", lambda f: f.assign(label=1), "one class", "label"),
    "text labels": ("train", lambda f: f.assign(label="yes"), "labels are not numbers", "label"),
    "item 0": ("train", change("item_id", 0), "not numbered from 1", "item_id"),
    "item -3": ("valid", change("item_id", -3), "not numbered from 1", "item_id"),
    "no item": ("train", change("item_id", None), "ids are missing", "item_id"),
    "user -1": ("test", change("user_id", -1), "negative", "user_id"),
    "a float user": ("train", lambda f: f.assign(user_id=f["user_id"] + 0.5), "neither whole numbers nor text", "user_id"),
    "a negative history": ("train", change("history", [0, 3, -1]), "negative", "history"),
    "a history with a hole": ("train", change("history", [0, None, 1]), "missing ids", "history"),
    "a history of text": ("train", lambda f: f.assign(history="1 2"), "not a list of items", "history"),
    "a history of vectors": ("train", lambda f: f.assign(history=[[0.5]] * len(f)), "not a list of items", "history"),
    "no history": ("train", lambda f: f.drop(columns="history"), "no column is known to be the history", None),
    "no label": ("valid", lambda f: f.drop(columns="label"), "no column is known to be the label", None),
    "two users": ("train", lambda f: f.assign(uid=1), "several columns could be the user", "user_id, uid"),
    "no rows": ("train", lambda f: f[:0], "no rows", None),
    "a type that changes": ("valid", lambda f: f.assign(user_id=f["user_id"].astype(str)), "numbers in one part and text in another", "user or item"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_used_is_refused_with_its_rows(tmp_path, fault):
    part, spoil, problem, column = FAULTS[fault]
    parts = random_log()
    parts[part] = spoil(parts[part])
    with pytest.raises(InputError) as refused:
        impressions_source(save(tmp_path, parts))
    assert problem in refused.value.problem and refused.value.parts.get("column") == column, refused.value
    if isinstance(refused.value.parts.get("rows"), str):
        assert refused.value.parts["rows"] == "17" and part in str(refused.value.parts["file"])


def test_a_time_that_cannot_be_read(tmp_path):
    parts = {p: f.assign(timestamp=1_000_000_000) for p, f in random_log().items()}
    parts["train"] = change("timestamp", None)(parts["train"])
    with pytest.raises(InputError, match="timestamps are missing"):
        impressions_source(save(tmp_path, parts))


@pytest.mark.parametrize("size", [0, 100, -9])
def test_torn_files(tmp_path, size):
    save(tmp_path, random_log())
    path = tmp_path / "train.parquet"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="empty|cut off") as refused:
        impressions_source(tmp_path)
    assert refused.value.parts["file"] == path


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        impressions_source(tmp_path / "nowhere")
    save(tmp_path, {"train": random_log()["train"]})
    with pytest.raises(InputError, match=r"valid\.parquet"):
        impressions_source(tmp_path)


def test_items_that_a_k_core_dropped_are_named(tmp_path):
    parts = random_log(n=3_000)
    parts["train"] = pd.concat([parts["train"], pd.DataFrame({"user_id": [1], "item_id": [99], "label": [1], "history": [[]]})])
    source = impressions_source(save(tmp_path, parts))
    with read_log(source, k_core=3) as log:
        keys = {kind: log.keys(kind).to_pandas().set_index("key")["id"] for kind in ("user", "item")}
    assert 0 < len(keys["item"]) < 41
    with pytest.raises(InputError, match="-p k_core 0"):
        source.impressions(keys["user"], keys["item"])
