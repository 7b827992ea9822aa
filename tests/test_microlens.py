"""MicroLens: its counts, its files' corners, and the challenge's folder, column by column, against what its writer wrote."""
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgen.core.errors import InputError
from recgen.core.files import write_parquet
from recgen.sources.clicks import bayes_auc
from recgen.sources.log import read_log
from recgen.sources.microlens import id_lines, microlens_source
from recgen.sources.mmctr_writer import write_mmctr

def numbered(source) -> tuple:
    with read_log(source) as log:
        keys = {kind: log.keys(kind).to_pandas().set_index("key")["id"] for kind in ("user", "item")}
        return pd.concat(log.frames(), ignore_index=True), keys["user"], keys["item"]


def backwards(ids) -> np.ndarray:
    out = np.zeros(ids.max() + 1, np.int64)
    out[ids.to_numpy()] = ids.index.astype(np.int64)
    return out


# --- sequences and pairs -------------------------------------------------------------------------------------------------


def test_the_small_subset_has_its_counts_and_its_order(data):
    folder = data / "microlens_small"
    source = microlens_source(folder)
    rows, users, items = numbered(source)
    assert (len(users), len(items), len(rows)) == (13_210, 5_312, 78_255)
    item, sequences = backwards(items), json.loads((folder / "sequences.json").read_text())
    found = {int(u): g.tolist() for u, g in pd.Series(item[rows["item_id"]]).groupby(backwards(users)[rows["user_id"]])}
    assert found == {int(u): s for u, s in sequences.items()}
    titles = json.loads((folder / "items.json").read_text())
    table = source.items(None)
    assert table["title"].tolist() == [titles[k]["title"] for k in table["key"]] and list(table) == ["key", "title"]  # its other columns are empty


@pytest.mark.parametrize(("sequences", "items", "problem"), [
    ({"1": [0, 1, 9]}, {"0": {}, "1": {}}, "not in the catalogue"), ({"1": "0 1"}, {"0": {}}, "something else"), ({}, {"0": {}}, "something else"),
    ([[0]], {"0": {}}, "something else"), ({"1": [0, 1.5]}, {"0": {}}, "no id"), ({"1": [0]}, {"0": "title"}, "something else"), ({"1": [0, None]}, {"0": {}}, "no id")])
def test_json_that_is_something_else(tmp_path, sequences, items, problem):
    (tmp_path / "sequences.json").write_text(json.dumps(sequences))
    (tmp_path / "items.json").write_text(json.dumps(items))
    with pytest.raises(InputError, match=problem):
        microlens_source(tmp_path)


def published(folder, kind="50k"):
    rows = [(u, i, 1_583_378_629_552 + 1_000 * (7 * u + 3 * i) + 999) for u in range(1, 6) for i in (9, 3, 12, 100)]
    folder.mkdir(exist_ok=True)
    (folder / f"MicroLens-{kind}_pairs.csv").write_text("user,item,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    name, header = ("titles", "item,title\r\n") if kind == "50k" else ("title_en", "")
    (folder / f"MicroLens-{kind}_{name}.csv").write_bytes((header + '3,"Rain, ""again"""\r\n9,cats, dogs, mice\r\n12,plain\r\n77,unseen\r\n').encode())
    (folder / f"MicroLens-{kind}_likes_and_views.txt").write_text("3\t5\t70\n9\t0\t0\n12\t1\t2\n")
    (folder / "tags_to_summary.csv").write_text("3,Animals\n12,People & Blogs\n")
    return rows


@pytest.mark.parametrize("kind", ["50k", "100k"])
def test_pairs_and_titles_as_published(tmp_path, kind):
    rows = published(tmp_path, kind)
    source = microlens_source(tmp_path)
    frame, users, items = numbered(source)
    back = {(backwards(users)[u], backwards(items)[i]): t for u, i, t in zip(frame["user_id"], frame["item_id"], frame["timestamp"], strict=True)}
    assert back == {(u, i): t // 1_000 for u, i, t in rows}
    table = source.items(None).set_index("key")
    assert table["title"].to_dict() == {"3": 'Rain, "again"', "9": "cats, dogs, mice", "12": "plain", "77": "unseen"}
    assert table["categories"].tolist() == [["Animals"], [], ["People & Blogs"], []]
    assert table["likes"].tolist()[:3] == [5, 0, 1] and table["views"].isna().tolist() == [False, False, False, True]
    assert len(items) == 5  # 100 has no title, 77 nobody took


def test_pairs_alone_are_enough(tmp_path):
    published(tmp_path)
    for f in tmp_path.glob("*"):
        if "pairs" not in f.name:
            f.unlink()
    source = microlens_source(tmp_path)
    assert source.items is None and len(numbered(source)[2]) == 4


def test_bad_lines_of_item_files(tmp_path):
    for text, problem in (("1,a\n1,b\n", "twice"), ("1,a\nx,b\n", "not about an item"), ("1\n", "not about an item"), ("", "empty"), ("item,title\n", "empty")):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(InputError, match=problem):
            id_lines(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes(b"1,\xff\n")
    with pytest.raises(InputError, match="not text"):
        id_lines(tmp_path / "t.csv")
    published(tmp_path / "a")
    (tmp_path / "a" / "MicroLens-50k_likes_and_views.txt").write_text("3\tmany\t70\n")
    with pytest.raises(InputError, match="not numbers"):
        microlens_source(tmp_path / "a")
    published(tmp_path / "a", "100k")
    with pytest.raises(InputError, match="two sets"):
        microlens_source(tmp_path / "a")
    with pytest.raises(InputError, match="no such folder"):
        microlens_source(tmp_path / "b")


# --- the challenge -------------------------------------------------------------------------------------------------------

SIZE = dict(n_users=400, n_items=60, n_rows=3_000, seed=3, widths=(8, 12, 16), n_tags=45, history=20, missing_levels=0.2)


@pytest.fixture(scope="module", params=[False, True], ids=["one folder", "two folders"])
def challenge(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmctr")
    facts = write_mmctr(folder, **SIZE, two_folders=request.param)
    files = {f.stem: f for f in folder.rglob("*.parquet")}
    return folder, facts, files, microlens_source(folder)


@pytest.fixture
def fresh(tmp_path):
    write_mmctr(tmp_path, **SIZE)
    return tmp_path, {f.stem: f for f in tmp_path.rglob("*.parquet")}


def test_the_writer_makes_the_corners(challenge):
    _, facts, files, _ = challenge
    info, feature, train, test = (pq.read_table(files[n]) for n in ("item_info", "item_feature", "train", "test"))
    assert info["item_id"].to_pylist() == list(range(61)) and not any(info["item_tags"][0].as_py()) and not any(info["item_emb_d128"][0].as_py())
    assert sorted(feature["item_id"].to_pylist()) == list(range(1, 61)) != feature["item_id"].to_pylist()
    assert {len(t) for t in feature["item_tags"].to_pylist()} == {1, 2, 3, 4, 5} and {len(t) for t in info["item_tags"].to_pylist()} == {5}
    assert all(len(set(t)) == len(t) and 1 <= min(t) and max(t) <= 45 for t in feature["item_tags"].to_pylist())
    assert feature["likes_level"].null_count and feature["views_level"].null_count and 1 <= min(v for v in feature["likes_level"].to_pylist() if v) <= 10
    histories = np.array(train["item_seq"].to_pylist())
    assert histories.shape[1] == 20 and (np.diff((histories > 0).astype(int), axis=1) >= 0).all()  # zeros stand on the left
    assert (histories == 0).all(1).any() and (histories > 0).all(1).any()
    assert "label" not in test.column_names and test["ID"].to_pylist() == list(range(len(test))) and test.column_names[0] == "ID"
    assert len(set(pq.read_table(files["item_seq"])["user_id"].to_pylist())) * 2 == pq.read_metadata(files["item_seq"]).num_rows
    assert sum(map(len, facts["eta"].values())) == 3_000


def test_the_writers_law_is_in_its_rows(tmp_path):
    facts = write_mmctr(tmp_path, n_users=2_000, n_items=60, n_rows=20_000, seed=1, widths=(8, 4, 4), n_tags=45, history=20)
    eta, label = (np.concatenate(list(facts[k].values())) for k in ("eta", "labels"))
    order = np.argsort(eta)
    for piece in np.array_split(order, 10):  # calibrated: clicks are as frequent as their probabilities say, within 4 standard errors
        assert abs(label[piece].mean() - eta[piece].mean()) < 4 * np.sqrt((eta[piece] * (1 - eta[piece])).sum()) / len(piece)
    assert 0.15 < label.mean() < 0.35 and facts["bayes_auc"]["train"] == bayes_auc(facts["eta"]["train"]) > 0.75
    train, info = pq.read_table(tmp_path / "MicroLens_1M_x1" / "train.parquet"), pq.read_table(tmp_path / "MicroLens_1M_x1" / "item_info.parquet")
    vector = np.array(info["item_emb_d128"].to_pylist())
    near = np.array([vector[[i for i in h if i][-8:]].mean(0) @ vector[t] if any(h) else 0 for h, t in zip(train["item_seq"].to_pylist(), train["item_id"].to_pylist(), strict=True)])
    assert np.corrcoef(near, facts["eta"]["train"])[0, 1] > 0.7  # the history and the vectors carry the clicks


def test_rows_come_back_column_by_column(challenge):
    _, facts, files, source = challenge
    rows, users, items = numbered(source)
    assert source.split is None and len(items) == 60 and source.kind == "microlens"
    made, item, user = source.impressions(users, items), backwards(items), backwards(source.impressions.number_users(users))
    for name, table in made.items():
        raw = pq.read_table(files[name])
        assert (user[table["user_id"]] == raw["user_id"].to_numpy()).all() and (item[table["item_id"]] == raw["item_id"].to_numpy()).all()
        assert [[int(item[i]) for i in h] for h in table["item_seq"].to_pylist()] == [[i for i in h if i] for h in raw["item_seq"].to_pylist()]
        for c in ("likes_level", "views_level", *(["ID"] if name == "test" else ["label"])):
            assert table[c].to_pylist() == raw[c].to_pylist()
    assert made["test"]["label"].null_count == len(made["test"]) and made["train"]["label"].to_pylist() == facts["labels"]["train"].tolist()
    held = {(u, i) for n in ("valid", "test") for u, i in zip(*(pq.read_table(files[n])[c].to_pylist() for c in ("user_id", "item_id")), strict=True)}
    pairs = set(zip(user[rows["user_id"]].tolist(), item[rows["item_id"]].tolist(), strict=True))
    assert not pairs & held and (rows.groupby("user_id").size() >= 3).all() and len(users) > 250


def test_items_and_vectors_come_back_by_id(challenge):
    _, _, files, source = challenge
    table = source.items(None).set_index("key")
    feature = pq.read_table(files["item_feature"]).to_pandas().set_index("item_id")
    for i, row in feature.iterrows():
        mine = table.loc[str(i)]
        assert mine["title"] == row["item_title"] and mine["categories"] == [str(t) for t in row["item_tags"]]
        assert all(mine[c] == (0 if np.isnan(row[c]) else row[c]) for c in ("likes_level", "views_level"))
    assert table["likes_level"].dtype == np.int8 and (table["likes_level"] == 0).any()
    keys = pd.Series(["7", "60", "1"])  # in this order, and no others
    vectors = source.vectors(keys)
    assert list(vectors) == ["key", "embedding", "text", "image", "item_emb_d128_v1", "item_emb_d128_v2"] and vectors["key"].tolist() == keys.tolist()
    info, emb = (pq.read_table(files[n]).to_pandas().set_index("item_id") for n in ("item_info", "item_emb"))
    for column, (frame, own) in {"embedding": (info, "item_emb_d128"), "text": (feature, "txt_emb_BERT"), "image": (feature, "img_emb_CLIPRN50"), "item_emb_d128_v2": (emb, "item_emb_d128_v2")}.items():
        assert all(np.array_equal(v, frame.loc[int(k), own]) for k, v in zip(vectors["key"], vectors[column], strict=True)), column


def test_the_files_that_may_be_missing(fresh):
    folder, files = fresh
    expected = microlens_source(folder)
    for name in ("item_emb", "item_seq", "test"):
        files[name].unlink()
    source = microlens_source(folder)
    assert list(source.impressions.facts["rows"]) == ["train", "valid"] and list(source.vectors(["1"])) == ["key", "embedding", "text", "image"]
    files["item_feature"].unlink()  # titles are gone; the levels of items are in the rows
    source = microlens_source(folder)
    known, table = expected.items(None).set_index("key"), source.items(None).set_index("key")
    rows = set(map(str, pq.read_table(files["train"])["item_id"].to_pylist()))
    assert (table["title"] == "").all() and table["categories"].tolist() == known["categories"].tolist()
    assert all(table.loc[k, "likes_level"] == known.loc[k, "likes_level"] for k in rows)
    files["item_info"].unlink()
    with pytest.raises(InputError, match="item_info.parquet or item_feature.parquet"):
        microlens_source(folder)


def test_item_feature_alone(fresh):
    folder, files = fresh
    for name in ("item_info", "item_emb"):
        files[name].unlink()
    source = microlens_source(folder)
    assert source.items(None)["categories"].map(len).between(1, 5).all() and list(source.vectors(["1"])) == ["key", "embedding", "image"]
    write_parquet(files["item_feature"], pq.read_table(files["item_feature"]).drop_columns(["txt_emb_BERT", "img_emb_CLIPRN50"]))
    assert microlens_source(folder).vectors is None


def test_histories_by_user(fresh):
    folder, files = fresh
    whole = {n: pq.read_table(files[n]) for n in ("train", "valid", "test")}
    for n, table in whole.items():
        write_parquet(files[n], table.drop_columns("item_seq"))
    with pytest.raises(InputError, match="several histories"):
        microlens_source(folder)
    seqs = pq.read_table(files["item_seq"])
    write_parquet(files["item_seq"], seqs.take(list(range(1, len(seqs), 2))).take(list(range(len(seqs) // 2))[::-1]))
    source = microlens_source(folder)
    _, users, items = numbered(source)
    made, item = source.impressions(users, items), backwards(items)
    by_user = dict(zip(seqs["user_id"].to_pylist()[1::2], seqs["item_seq"].to_pylist()[1::2], strict=True))
    for n, table in made.items():
        assert [[int(item[i]) for i in h] for h in table["item_seq"].to_pylist()] == [[i for i in by_user[u] if i] for u in whole[n]["user_id"].to_pylist()]
        assert [int(item[i]) for i in table["item_id"].to_pylist()] == whole[n]["item_id"].to_pylist()
    files["item_seq"].unlink()
    with pytest.raises(InputError, match="rows have no history"):
        microlens_source(folder)


# --- what is refused -----------------------------------------------------------------------------------------------------


def cell(row, column, value):
    def spoil(table):
        values = table[column].to_pylist()
        values[row] = value
        return table.set_column(table.column_names.index(column), column, pa.array(values, table[column].type))
    return spoil


def without(rows):
    return lambda t: t.take([i for i in range(len(t)) if i not in rows])


FAULTS = {
    "an item twice": ("item_info", lambda t: pa.concat_tables([t, t.slice(5, 1)]), "appear twice", "61"),
    "an item twice in item_feature": ("item_feature", lambda t: pa.concat_tables([t, t.slice(5, 1)]), "appear twice", "60"),
    "a negative item": ("item_info", cell(9, "item_id", -9), "negative", "9"),
    "an item without id": ("item_info", cell(9, "item_id", None), "missing or not whole", None),
    "ids of text": ("item_feature", lambda t: t.set_column(0, "item_id", pa.array([str(i) for i in t["item_id"].to_pylist()])), "not whole numbers", None),
    "row 0 with tags": ("item_info", cell(0, "item_tags", [3, 0, 0, 0, 0]), "not padding", "item 0"),
    "row 0 with a vector": ("item_info", cell(0, "item_emb_d128", [0.0] * 7 + [0.1]), "not padding", "item 0"),
    "a missing vector": ("item_info", cell(12, "item_emb_d128", None), "missing or of different lengths", "item 12"),
    "a ragged vector": ("item_info", cell(12, "item_emb_d128", [1.0] * 7), "missing or of different lengths", "item 12"),
    "a NaN vector": ("item_info", cell(12, "item_emb_d128", [float("nan")] + [0.5] * 7), "NaN", "item 12"),
    "an item without a feature": ("item_feature", without({3}), "about other items", None),
    "an item without an embedding": ("item_emb", without({4, 5}), "about other items", "item 5, item 6"),
    "a missing tag": ("item_info", cell(7, "item_tags", [4, None, 0, 0, 0]), "tags are missing", "item 7"),
    "a negative tag": ("item_info", cell(7, "item_tags", [4, -2, 0, 0, 0]), "tags are missing or negative", "item 7"),
    "tags of text": ("item_info", lambda t: t.set_column(1, "item_tags", pa.array([[], *[["a"]] * (len(t) - 1)])), "not lists of whole numbers", None),
    "a negative level": ("item_feature", cell(0, "likes_level", -1), "levels are not whole", None),
    "an unknown item in the rows": ("train", cell(8, "item_id", 61), "not in the catalogue", "8"),
    "an unknown item in a history": ("valid", cell(8, "item_seq", [0] * 19 + [777]), "not in the catalogue", "8"),
    "a label of 7": ("valid", cell(8, "label", 7), "neither 0 nor 1", "8"),
    "no ids": ("item_info", lambda t: t.drop_columns("item_id"), "column is missing", None),
    "no clicks": ("train", lambda t: t.drop_columns("label"), "no column is known to be the label", None),
    "no items": ("item_info", lambda t: t.slice(0, 1), "no items", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_used_is_refused(fresh, fault):
    folder, files = fresh
    name, spoil, problem, rows = FAULTS[fault]
    write_parquet(files[name], spoil(pq.read_table(files[name])))
    with pytest.raises(InputError) as refused:
        microlens_source(folder)
    assert problem in refused.value.problem and (rows is None or refused.value.parts["rows"] == rows), refused.value


@pytest.mark.parametrize("name", ["train", "item_info", "item_feature", "item_emb"])
@pytest.mark.parametrize("size", [0, 500])
def test_torn_files(fresh, name, size):
    folder, files = fresh
    files[name].write_bytes(files[name].read_bytes()[:size])
    with pytest.raises(InputError, match="empty|cut off") as refused:
        microlens_source(folder)
    assert refused.value.parts["file"] == files[name]


def test_a_file_that_is_there_twice(fresh):
    folder, files = fresh
    (folder / "copy").mkdir()
    (folder / "copy" / "train.parquet").write_bytes(files["train"].read_bytes())
    with pytest.raises(InputError, match="twice"):
        microlens_source(folder)
