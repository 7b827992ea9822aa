"""What a stage refuses: the list "Bad input" of the contracts, line by line, and what clumsy users produce besides.

Each refusal must be recgen's own error, name the file, the column, the rows, what was found and what was expected, and leave every
file where and as it was."""
import datetime
import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from log_datasets import dataset_of
from stage_runs import run_stage

from recgen.core.device import resolve_device
from recgen.core.errors import InputError, ParameterError, RunError
from recgen.core.files import (
    atomic_write,
    read_json,
    read_parquet,
    read_tensors,
    read_torch,
    write_json,
    write_parquet,
    write_tensors,
    write_torch,
)
from recgen.core.run import Run, hash_input, verify_file
from recgen.formats.dataset import Dataset, write_dataset
from recgen.formats.embeddings import load_embeddings
from recgen.formats.semantic_ids import SemanticIDs
from recgen.quantization.kmeans import fit_kmeans
from recgen.retrieval.recommender import Recommender
from recgen.retrieval.transformer import Tiger, TigerConfig
from recgen.sources.recbole import recbole_source
from recgen.sources.sequences import sequence_source
from recgen.tokens.rqkmeans import RQKMeans

ROOT = Path(__file__).parent.parent
NAN, INF, HUGE = float("nan"), float("inf"), 10**12
NOW = datetime.datetime(2020, 1, 1)


def snapshot(folder: Path) -> dict:
    "Every file below a folder with its bytes and time of change."
    return {p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(call, folder, problem, kind=InputError, says=(), **parts) -> str:
    "The message of a refusal, after checking it and that no file below `folder` changed. Parts are texts that the part must hold."
    before = snapshot(folder)
    with pytest.raises(kind) as e:
        call()
    assert snapshot(folder) == before
    message = str(e.value)
    assert problem in message.splitlines()[0]
    if isinstance(e.value, InputError):
        for name, text in parts.items():
            assert name in e.value.parts, f"the message does not say {name}:\n{message}"
            assert str(text) in str(e.value.parts[name]), f"{name} does not say {text!r}:\n{message}"
        assert "expected" in e.value.parts or "mend" in e.value.parts, f"the message does not say what is right:\n{message}"
    for text in says:
        assert text in message, message
    return message


def put(folder: Path, **files) -> Path:
    "Files of a folder: frames and tables as parquet, text and bytes as they are; `__` in a name is a dot."
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        elif isinstance(content, pd.DataFrame):
            content.to_parquet(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def frame(base, changes) -> pd.DataFrame:
    return pd.DataFrame({k: v for k, v in {**base, **changes}.items() if v is not None})


LOG = {"user_id": [1, 1, 1, 2, 2, 2], "item_id": [1, 2, 3, 3, 2, 1], "timestamp": [1, 2, 3, 1, 2, 3]}
ITEMS = {"item_id": [1, 2, 3], "raw_id": ["a", "b", "c"], "title": ["x", "y", "z"]}


def dataset_folder(folder, log=None, items=None, **files):
    "A hand-written dataset folder."
    return put(folder, interactions__parquet=frame(LOG, log or {}), items__parquet=frame(ITEMS, items or {}), **files)


def case(name, *values):
    return pytest.param(*values, id=name)


# --- the dataset folder


def test_the_good_folder_is_good(tmp_path):
    assert Dataset.load(dataset_folder(tmp_path)).n_items == 3


@pytest.mark.parametrize("changes, problem, parts", [
    case("no user column", {"user_id": None}, "a column is missing", dict(column="user_id", found="item_id, timestamp")),
    case("no item column", {"item_id": None}, "a column is missing", dict(column="item_id", found="user_id, timestamp")),
    case("unknown item", {"item_id": [1, 2, 3, 3, 2, 9]}, "items that the catalogue does not have", dict(column="item_id", rows="5", found="9", expected="1 … 3")),
    case("unknown huge item", {"item_id": [1, 2, 3, 3, 2, HUGE]}, "items that the catalogue does not have", dict(column="item_id", rows="5", found=HUGE)),
    case("item 0", {"item_id": [1, 0, 3, 3, 2, 1]}, "not whole numbers from 1", dict(column="item_id", rows="1", found="0", expected="from 1")),
    case("negative item", {"item_id": [1, 2, -7, 3, 2, 1]}, "not whole numbers from 1", dict(column="item_id", rows="2", found="-7")),
    case("half an item", {"item_id": [1, 2, 3, 3, 2, 1.5]}, "not whole numbers from 1", dict(column="item_id", rows="5", found="1.5")),
    case("items as text", {"item_id": list("123321")}, "not whole numbers from 1", dict(column="item_id", rows="0, 1", found="'1'", mend="raw_id")),
    case("items as truth values", {"item_id": [True] * 6}, "not whole numbers from 1", dict(column="item_id", found="bool")),
    case("items as dates", {"item_id": [NOW] * 6}, "not whole numbers from 1", dict(column="item_id", found="datetime64")),
    case("items as lists", {"item_id": [[1]] * 6}, "not whole numbers from 1", dict(column="item_id")),
    case("missing item", {"item_id": [1, 2, None, 3, 2, 1]}, "ids are missing", dict(column="item_id", rows="2", found="1 row")),
    case("raw user ids", {"user_id": list("aaabbb")}, "not whole numbers from 1", dict(column="user_id", found="'a'", mend="number them")),
    case("huge user id", {"user_id": [1, 1, 1] + [HUGE] * 3}, "user ids have gaps", dict(column="user_id", rows="user 2", found=HUGE, expected="1 … U", mend="k_core=1")),
    case("user id beyond int64", {"user_id": np.array([1, 1, 1, 2, 2, 2**64 - 1], np.uint64)}, "not whole numbers from 1", dict(column="user_id", rows="5")),
    case("short users", {"user_id": [1, 1, 1, 2, 2, 3]}, "fewer than 3 interactions", dict(column="user_id", rows="2, 3", found="2 such", expected="at least 3", mend="k_core=3")),
    case("timestamp missing", {"timestamp": [1, None, 3, 1, 2, 3]}, "timestamps are missing or not finite", dict(column="timestamp", rows="1", found="nan")),
    case("timestamp infinite", {"timestamp": [1, 2, INF, 1, 2, 3]}, "timestamps are missing or not finite", dict(column="timestamp", rows="2", found="inf")),
    case("timestamp as datetime64", {"timestamp": pd.to_datetime(["2020-01-01"] * 6)}, "timestamp does not hold numbers", dict(column="timestamp", found="datetime64", expected="seconds")),
    case("timestamp as text", {"timestamp": ["2020-01-01"] * 6}, "timestamp does not hold numbers", dict(column="timestamp", found="2020-01-01", expected="seconds")),
    case("timestamp as date", {"timestamp": [NOW.date()] * 6}, "timestamp does not hold numbers", dict(column="timestamp", expected="seconds")),
    case("rating as text", {"rating": ["good"] * 6}, "rating does not hold numbers", dict(column="rating", found="good")),
    case("rating NaN", {"rating": [1, 2, 3, 4, NAN, 5.0]}, "ratings are missing", dict(column="rating", rows="4")),
    case("position as text", {"position": list("012012")}, "position does not hold numbers", dict(column="position", found="'0'")),
    case("position missing", {"position": [0, 1, None, 0, 1, 2]}, "positions are not whole numbers", dict(column="position", rows="2")),
    case("half a position", {"position": [0, 1.5, 2, 0, 1, 2]}, "positions are not whole numbers", dict(column="position", rows="1", found="1.5")),
    case("position twice", {"position": [0, 1, 1, 0, 1, 2]}, "two interactions of a user have one position", dict(column="position", rows="1, 2", found="2 such")),
])
def test_interactions(tmp_path, changes, problem, parts):
    folder = dataset_folder(tmp_path, log=changes)
    refused(lambda: Dataset.load(folder), folder, problem, file="interactions.parquet", **parts)


@pytest.mark.parametrize("changes, problem, parts", [
    case("no title", {"title": None}, "a column is missing", dict(column="title", found="item_id, raw_id")),
    case("twice", {"item_id": [1, 2, 2]}, "items appear twice", dict(column="item_id", rows="1, 2", found="2", expected="once", mend="drop")),
    case("gap", {"item_id": [1, 2, 5]}, "item ids have gaps", dict(column="item_id", found="none is 3", expected="1 … N")),
    case("huge", {"item_id": [1, 2, HUGE]}, "item ids have gaps", dict(column="item_id", found=HUGE)),
    case("zero", {"item_id": [0, 1, 2]}, "not whole numbers from 1", dict(column="item_id", rows="0", found="0", expected="padding")),
    case("text", {"item_id": ["B001", "B002", "B003"]}, "not whole numbers from 1", dict(column="item_id", found="B001", mend="raw_id")),
    case("float beyond int64", {"item_id": [1.0, 2.0, 1e30]}, "not whole numbers from 1", dict(column="item_id", rows="2", found="1e+30")),
    case("infinite", {"item_id": [1.0, 2.0, INF]}, "not whole numbers from 1", dict(column="item_id", rows="2", found="inf")),
    case("raw id missing", {"raw_id": ["a", None, "c"]}, "raw ids are missing or stand twice", dict(column="raw_id", rows="1")),
    case("raw id twice", {"raw_id": ["a", "b", "a"]}, "raw ids are missing or stand twice", dict(column="raw_id", rows="0, 2", found="'a'")),
])
def test_items(tmp_path, changes, problem, parts):
    folder = dataset_folder(tmp_path, items=changes)
    refused(lambda: Dataset.load(folder), folder, problem, file="items.parquet", **parts)


def test_a_table_without_rows(tmp_path):
    for name, problem in (("interactions", "there are no interactions"), ("items", "there are no items")):
        folder = dataset_folder(tmp_path / name)
        put(folder, **{f"{name}__parquet": pd.read_parquet(folder / f"{name}.parquet").head(0)})
        refused(lambda at=folder: Dataset.load(at), folder, problem, file=f"{name}.parquet", found="0 rows")


@pytest.mark.parametrize("users, problem, parts", [
    case("no id", pd.DataFrame({"name": ["a"]}), "a column is missing", dict(column="user_id", found="name")),
    case("twice", pd.DataFrame({"user_id": [1, 2, 2]}), "users appear twice", dict(column="user_id", rows="1, 2", found="2")),
    case("zero", pd.DataFrame({"user_id": [0, 1]}), "not whole numbers from 1", dict(column="user_id", rows="0")),
])
def test_users(tmp_path, users, problem, parts):
    folder = dataset_folder(tmp_path, users__parquet=users)
    refused(lambda: Dataset.load(folder), folder, problem, file="users.parquet", **parts)


@pytest.mark.parametrize("text, problem, parts", [
    case("a list", "[1]", "does not describe a dataset", dict(found="[1]")),
    case("null", "null", "does not describe a dataset", dict(found="None")),
    case("cut off", '{"name": "a', "cannot be read as JSON", dict(found="line 1", mend="again")),
    case("empty", "", "is empty", dict(found="0 bytes")),
    case("key twice", '{"name": "a", "name": "b"}', "cannot be read as JSON", dict(found="name")),
    case("name with slash", '{"name": "../../etc"}', "becomes a folder's name", dict(column="name", found="../../etc")),
    case("no name", '{"name": null}', "becomes a folder's name", dict(column="name", found="None")),
    case("tie policy", '{"tie_policy": "random"}', "no such tie policy", dict(column="tie_policy", found="random", expected="given, hash")),
    case("split", '{"split": {"rule": "random"}}', "no such split", dict(column="split", found="random", expected="leave_one_out")),
    case("split as text", '{"split": "time"}', "no such split", dict(column="split", found="time")),
    case("split without bounds", '{"split": {"rule": "time"}}', "no such split", dict(column="split", expected="valid_from")),
    case("split backwards", '{"split": {"rule": "time", "valid_from": 5, "test_from": 2}}', "no such split", dict(column="split", expected="later")),
    case("hashes as list", '{"sha256": ["x"]}', "hashes are not given by file", dict(column="sha256")),
])
def test_dataset_json(tmp_path, text, problem, parts):
    folder = dataset_folder(tmp_path, dataset__json=text)
    refused(lambda: Dataset.load(folder), folder, problem, file="dataset.json", **parts)


def test_time_split_without_times(tmp_path):
    folder = dataset_folder(tmp_path, {"timestamp": None}, dataset__json='{"split": {"rule": "time", "valid_from": 1, "test_from": 2}}')
    refused(lambda: Dataset.load(folder), folder, "needs a timestamp", file="interactions.parquet", column="timestamp", found="user_id", mend="leave_one_out")


@pytest.mark.parametrize("name", ["interactions.parquet", "items.parquet"])
def test_missing_empty_truncated_and_disguised_tables(tmp_path, name):
    folder = dataset_folder(tmp_path)
    path = folder / name
    whole = path.read_bytes()
    path.unlink()
    refused(lambda: Dataset.load(folder), folder, f"there is no file {name}", file=name, mend="00_data")
    for content, problem in ((b"", "is empty"), (whole[: len(whole) // 2], "cannot be read as parquet"), (whole[:-1], "cannot be read as parquet"),
                             (b"user_id,item_id\n1,1\n", "cannot be read as parquet"), (b"PAR1" * 40, "cannot be read as parquet")):
        path.write_bytes(content)
        refused(lambda: Dataset.load(folder), folder, problem, file=name, expected="parquet", mend="00_data")
    path.unlink()
    path.mkdir()
    refused(lambda: Dataset.load(folder), folder, "is not a file", file=name)


def test_no_folder_and_a_column_twice(tmp_path):
    refused(lambda: Dataset.load(tmp_path / "nowhere"), tmp_path, "there is no dataset folder", file="nowhere", expected="interactions.parquet", mend="00_data")
    twice = pa.table([pa.array([1, 1, 1]), pa.array([1, 2, 3]), pa.array([1, 2, 3])], names=["user_id", "item_id", "item_id"])
    folder = put(tmp_path / "twice", interactions__parquet=twice, items__parquet=frame(ITEMS, {}))
    refused(lambda: Dataset.load(folder), folder, "a column stands twice", file="interactions.parquet", column="item_id", found="user_id, item_id, item_id")


def test_an_exchanged_file_of_a_finished_dataset(tmp_path):
    made = Dataset(frame(LOG, {}), frame(ITEMS, {}), {"name": "toy"})
    write_dataset(tmp_path, made)
    write_parquet(tmp_path / "items.parquet", frame(ITEMS, {"title": ["x", "y", "another"]}))
    refused(lambda: Dataset.load(tmp_path), tmp_path, "not the file that dataset.json describes", file="items.parquet", found="sha256", mend="00_data")


def test_what_is_unusual_but_right(tmp_path):
    "Whole floats, small and unsigned integers, missing titles, numbers as raw ids, no times at all: a parquet writer's habits, not errors."
    folder = dataset_folder(tmp_path, {"item_id": np.array([1, 2, 3, 3, 2, 1], np.uint8), "user_id": [1.0, 1, 1, 2, 2, 2], "timestamp": [None] * 6},
                            {"title": [None, "", "é"], "raw_id": [7, 8, 9]})
    made = Dataset.load(folder)
    assert made.items["title"].tolist() == ["", "", "é"] and made.items["raw_id"].tolist() == ["7", "8", "9"]
    assert made.train_sequences().tolist() == [[1], [3]] and made.all_rows_with_held_out()["user_id"].dtype == np.int64


# --- vectors

GOOD = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


def vectors(folder, emb=GOOD, ids=(1, 2, 3), kind=None, id_kind=None, **more):
    return put(folder, item_emb__parquet=pa.table({"ItemID": pa.array(list(ids), type=id_kind), "embedding": pa.array(emb, type=kind), **more}))


@pytest.mark.parametrize("emb, problem, parts", [
    case("ragged", [[1.0, 2.0], [3.0], [5.0, 6.0]], "different lengths", dict(rows="item 2", found="1", expected="2 numbers")),
    case("a missing vector", [[1.0, 2.0], None, [5.0, 6.0]], "vectors are missing", dict(rows="item 2", found="no vector")),
    case("an empty vector", [[], [1.0, 2.0], [5.0, 6.0]], "vectors are missing", dict(rows="item 1", found="0")),
    case("all empty", [[], [], []], "vectors are missing", dict(rows="item 1, item 2, item 3", found="0")),
    case("all null", [None] * 3, "does not hold vectors", dict(found="null")),
    case("NaN", [[1.0, 2.0], [NAN, 4.0], [5.0, 6.0]], "NaN or infinite", dict(rows="item 2", found="1 such", expected="finite", mend="again")),
    case("null inside", [[1.0, 2.0], [None, 4.0], [5.0, 6.0]], "NaN or infinite", dict(rows="item 2")),
    case("infinite", [[1.0, 2.0], [3.0, -INF], [5.0, 6.0]], "NaN or infinite", dict(rows="item 2")),
    case("beyond float32", [[1e300, 2.0], [3.0, 4.0], [5.0, 6.0]], "NaN or infinite", dict(rows="item 1")),
    case("constant", [[1.0, 2.0]] * 3, "every vector is the same", dict(found="3 equal vectors", mend="again")),
    case("text in lists", [["a", "b"]] * 3, "does not hold vectors", dict(found="string", expected="list of numbers")),
    case("numbers as text", [["1", "2"], ["3", "4"], ["5", "6"]], "does not hold vectors", dict(found="string")),
    case("truth values", [[True, False], [False, True], [True, True]], "does not hold vectors", dict(found="bool")),
    case("nested", [[[1.0]], [[2.0]], [[3.0]]], "does not hold vectors", dict(found="list<")),
    case("one number", [1.0, 2.0, 3.0], "does not hold vectors", dict(found="double")),
    case("text", ["[1, 2]", "[3, 4]", "[5, 6]"], "does not hold vectors", dict(found="string")),
])
def test_vectors(tmp_path, emb, problem, parts):
    folder = vectors(tmp_path, emb)
    refused(lambda: load_embeddings(folder, catalogue=[1, 2, 3]), folder, problem, file="item_emb.parquet", column="embedding", **parts)


@pytest.mark.parametrize("ids, problem, parts", [
    case("twice", [1, 2, 2], "items have two vectors", dict(rows="item 2", found="1 repeated", mend="drop")),
    case("text", ["1", "2", "3"], "not whole numbers from 1", dict(rows="0, 1, 2", found="'1'")),
    case("raw ids", ["a", "b", "c"], "not whole numbers from 1", dict(found="'a'", mend="raw_id")),
    case("truth values", [True, False, True], "not whole numbers from 1", dict(found="bool")),
    case("halves", [1.5, 2.0, 3.0], "not whole numbers from 1", dict(rows="0", found="1.5")),
    case("negative", [-1, 2, 3], "not whole numbers from 1", dict(rows="0", found="-1")),
    case("zero", [0, 1, 2], "not whole numbers from 1", dict(rows="0", found="0")),
    case("missing", [None, 2, 3], "ids are missing", dict(rows="0")),
    case("lists", [[1], [2], [3]], "not whole numbers from 1", dict(rows="0, 1, 2")),
    case("times", [NOW] * 3, "not whole numbers from 1", dict(found="datetime64")),
    case("other items", [1, 2, 4], "for other items than the catalogue", dict(rows="item 3", found="1 items without a vector, 1 vectors without an item", expected="3 items", mend="same dataset")),
    case("a huge id", [1, 2, HUGE], "for other items than the catalogue", dict(rows="item 3")),
])
def test_ids_of_vectors(tmp_path, ids, problem, parts):
    folder = vectors(tmp_path, ids=ids)
    refused(lambda: load_embeddings(folder, catalogue=[3, 1, 2]), folder, problem, file="item_emb.parquet", column="ItemID", **parts)


def test_too_few_and_too_many_vectors(tmp_path):
    folder = vectors(tmp_path)
    refused(lambda: load_embeddings(folder, catalogue=range(1, 10)), folder, "other items", rows="item 4, item 5", found="6 items without a vector, 0 vectors")
    refused(lambda: load_embeddings(folder, catalogue=[1]), folder, "other items", rows="item 2, item 3", found="0 items without a vector, 2 vectors")


def test_vectors_of_no_file_column_or_row(tmp_path):
    folder = vectors(tmp_path)
    refused(lambda: load_embeddings(folder, column="text"), folder, "a column is missing", file="item_emb.parquet", column="text", found="ItemID, embedding", mend="rename")
    refused(lambda: load_embeddings(folder, column="embedding+"), folder, "a column is missing", file="item_emb.parquet", found="ItemID, embedding")
    refused(lambda: load_embeddings(folder, file="other.parquet"), folder, "there is no file other.parquet", file="other.parquet", mend="embedding_file")
    refused(lambda: load_embeddings(tmp_path / "nowhere"), folder, "there is no file item_emb.parquet", found="not even its folder", mend="embedding_file")
    none = put(tmp_path / "none", item_emb__parquet=pq.read_table(folder / "item_emb.parquet").slice(0, 0))
    refused(lambda: load_embeddings(none), none, "there are no vectors", file="item_emb.parquet", found="0 rows")
    twice = put(tmp_path / "twice", item_emb__parquet=pa.table([pa.array([1]), pa.array([1]), pa.array([[1.0]])], names=["ItemID", "ItemID", "embedding"]))
    refused(lambda: load_embeddings(twice), twice, "a column stands twice", column="ItemID")
    cut = put(tmp_path / "cut", item_emb__parquet=(folder / "item_emb.parquet").read_bytes()[:-40])
    refused(lambda: load_embeddings(cut), cut, "cannot be read as parquet", file="item_emb.parquet")


@pytest.mark.parametrize("kind, id_kind", [(pa.list_(pa.float32(), 2), pa.uint8()), (pa.large_list(pa.float64()), pa.float64()), (pa.list_(pa.int32()), pa.int16())], ids=str)
def test_vectors_in_other_types_are_the_same_vectors(tmp_path, kind, id_kind):
    read = load_embeddings(vectors(tmp_path, kind=kind, id_kind=id_kind), catalogue=[1, 2, 3])
    assert read.item_ids.tolist() == [1, 2, 3] and read.vectors.tolist() == GOOD


def test_one_constant_column_is_normal():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 7.0
    for standardize in (False, True):
        model = RQKMeans.fit(x, 2, 4, standardize=standardize)
        assert torch.isfinite(model.transform(x)).all() and torch.isfinite(model.decode(model.codes(x))).all()
    assert not model.transform(x)[:, 1].any()


def test_a_quantiser_refuses_what_it_cannot_cluster(tmp_path):
    few, x = torch.eye(3).repeat(5, 1), torch.randn(20, 3)
    refused(lambda: fit_kmeans(few, 4), tmp_path, "more centres than distinct vectors", found="K=4, 3 distinct", mend="lower")
    refused(lambda: RQKMeans.fit(few, 2, 4), tmp_path, "more centres than distinct vectors", found="K=4, 3 distinct")
    refused(lambda: RQKMeans.fit(torch.ones(5, 3), 2, 2), tmp_path, "every column of the vectors is constant", found="5 equal vectors", mend="check")
    x[[4, 7], 1] = NAN
    refused(lambda: RQKMeans.fit(x, 2, 2), tmp_path, "NaN or infinite", rows="4, 7", found="2 such")
    refused(lambda: RQKMeans.fit(torch.randn(9), 1, 2), tmp_path, "not a matrix", found="(9,)")
    deeper = RQKMeans.fit(torch.eye(4), 3, 4)  # the second level has one distinct residual: surplus codes stay unused and are reported
    assert [level["unused"] for level in deeper.report][1:] == [3, 3]


# --- semantic IDs

CODES = [[0, 1], [1, 0], [1, 1]]


def id_table(folder, codes=CODES, ids=(1, 2, 3), kind=None, id_kind=None, sizes=None):
    table = pa.table({"item_id": pa.array(list(ids), type=id_kind), "codes": pa.array(codes, type=kind)})
    return put(folder, semantic_ids__parquet=table.replace_schema_metadata({"codebook_sizes": sizes}) if sizes is not None else table)


@pytest.mark.parametrize("changes, problem, parts", [
    case("exceeds its codebook", dict(sizes="1,2"), "a code exceeds its codebook", dict(column="level 0", rows="item 2, item 3", found="1", expected="0 … 0", mend="one run")),
    case("negative", dict(codes=[[0, -1], [1, 0], [1, 1]]), "a code exceeds its codebook", dict(column="level 1", rows="item 1", found="-1")),
    case("sizes of fewer levels", dict(sizes="2"), "another number of levels", dict(found="2", expected="1")),
    case("sizes unreadable", dict(sizes="two,two"), "codebook sizes cannot be read", dict(column="codebook_sizes", found="two")),
    case("sizes negative", dict(sizes="-2,2"), "codebook sizes cannot be read", dict(found="-2")),
    case("floats", dict(codes=[[0.0, 1.0]] * 3), "not lists of whole numbers", dict(column="codes", found="double")),
    case("text", dict(codes=["0 1"] * 3), "not lists of whole numbers", dict(column="codes", found="string")),
    case("nested", dict(codes=[[[0]], [[1]], [[2]]]), "not lists of whole numbers", dict(column="codes", found="list<")),
    case("truth values", dict(codes=[[True]] * 3), "not lists of whole numbers", dict(column="codes", found="bool")),
    case("ragged", dict(codes=[[0], [0, 1], [1, 1]]), "different numbers of levels", dict(column="codes", rows="item 1", found="1", expected="2 codes")),
    case("null", dict(codes=[None, [0, 1], [1, 1]]), "different numbers of levels", dict(column="codes", rows="item 1", found="no codes")),
    case("null inside", dict(codes=[[0, 1], [None, 1], [1, 1]]), "a code is missing", dict(column="codes", rows="item 2")),
    case("empty lists", dict(codes=[[], [], []], kind=pa.list_(pa.int64())), "there are no codes", dict(found="(3, 0)")),
    case("no rows", dict(codes=[], ids=[], kind=pa.list_(pa.int64()), id_kind=pa.int64()), "there are no codes", dict(found="0 ids")),
    case("ids as text", dict(ids=["1", "2", "3"]), "item ids are not whole numbers", dict(column="item_id", found="string")),
    case("ids as floats", dict(ids=[1.0, 2.0, 3.0]), "item ids are not whole numbers", dict(column="item_id", found="double")),
    case("id 0", dict(ids=[0, 1, 2]), "not whole numbers from 1", dict(column="item_id", rows="0", found="0")),
    case("ids twice", dict(ids=[1, 1, 2]), "two semantic IDs", dict(column="item_id", rows="item 1", found="1 such")),
    case("id missing", dict(ids=[1, None, 2]), "item ids are not whole numbers", dict(column="item_id", found="1 missing")),
    case("ids beyond int64", dict(ids=[1, 2, 2**63 + 5], id_kind=pa.uint64()), "item ids are not whole numbers", dict(column="item_id", found="largest")),
])
def test_tables_of_codes(tmp_path, changes, problem, parts):
    folder = id_table(tmp_path, **changes)
    refused(lambda: SemanticIDs.load(folder), folder, problem, file="semantic_ids.parquet", **parts)


@pytest.mark.parametrize("kind", [pa.list_(pa.int8()), pa.list_(pa.uint64()), pa.large_list(pa.int32()), pa.list_(pa.int16(), 2)], ids=str)
def test_codes_in_other_types_are_the_same_codes(tmp_path, kind):
    assert SemanticIDs.load(id_table(tmp_path, kind=kind, id_kind=pa.uint8(), sizes="2,2")) == SemanticIDs([1, 2, 3], CODES, [2, 2])


@pytest.mark.parametrize("text, problem, parts", [
    case("key twice", '{"1": [0, 1], "1": [1, 1]}', "cannot be read as JSON", dict(found="keys stand twice: 1")),
    case("key twice with a zero", '{"1": [0, 1], "01": [1, 1]}', "two semantic IDs", dict(rows="item 1")),
    case("raw ids", '{"B001": [0, 1]}', "item ids are not whole numbers", dict(rows="B001", expected='"17"', mend="item_id")),
    case("id beyond int64", '{"%d": [0, 1]}' % 10**30, "item ids are not whole numbers", dict(rows=10**30)),
    case("id 0", '{"0": [0, 1]}', "not whole numbers from 1", dict(found="0")),
    case("negative id", '{"-1": [0, 1]}', "item ids are not whole numbers", dict(rows="-1")),
    case("code beyond int64", '{"1": [0, %d]}' % 10**30, "not lists of whole numbers", dict(column="codes")),
    case("floats", '{"1": [0, 1.5]}', "not lists of whole numbers", dict(found="double")),
    case("truth values", '{"1": [true, false]}', "not lists of whole numbers", dict(found="bool")),
    case("null", '{"1": null}', "not lists of whole numbers", dict(found="null")),
    case("null inside", '{"1": [0, null]}', "a code is missing", dict(rows="item 1")),
    case("NaN", '{"1": [NaN]}', "not lists of whole numbers", dict(found="double")),
    case("empty list", '{"1": []}', "not lists of whole numbers", dict(found="null")),
    case("text", '{"1": "<a_0><b_1>"}', "not lists of whole numbers", dict(found="string")),
    case("mixed", '{"1": [0, 1], "2": 3}', "not lists of whole numbers", dict(column="codes")),
    case("ragged", '{"1": [0, 1], "2": [0], "3": [1, 1]}', "different numbers of levels", dict(rows="item 2")),
    case("negative", '{"1": [0, -1]}', "a code exceeds its codebook", dict(rows="item 1", found="-1")),
    case("a list", "[[0, 1]]", "not a table of semantic IDs", dict(expected="<ItemID>")),
    case("empty object", "{}", "not a table of semantic IDs", dict(expected="<ItemID>")),
    case("cut off", '{"1": [0, 1], "2": [', "cannot be read as JSON", dict(found="line 1", mend="03_tokenizer")),
    case("empty", "", "is empty", dict(found="0 bytes")),
    case("bottomless", "[" * 100_000, "cannot be read as JSON", dict(mend="03_tokenizer")),
    case("not UTF-8", b'{"1": "\xe9"}', "cannot be read as JSON", dict(found="utf-8")),
])
def test_tables_of_codes_as_json(tmp_path, text, problem, parts):
    folder = put(tmp_path, semantic_id_mappings__json=text)
    refused(lambda: SemanticIDs.load(folder), folder, problem, file="semantic_id_mappings.json", **parts)


def test_a_byte_order_mark_is_no_content(tmp_path):
    assert SemanticIDs.load(put(tmp_path, semantic_id_mappings__json='\ufeff{"1": [0, 1]}')).codes().tolist() == [[0, 1]]


def test_a_table_that_does_not_cover_the_catalogue(tmp_path):
    ids = SemanticIDs.load(id_table(tmp_path))
    message = "the semantic IDs do not fit the catalogue"
    refused(lambda: ids.check_coverage(range(1, 8), tmp_path), tmp_path, message, file=tmp_path.name, rows="item 4, item 5, item 6, item 7", found="4 items without", mend="03_tokenizer")
    refused(lambda: ids.check_coverage([1, 2], tmp_path), tmp_path, message, rows="item 3", found="1 codes without an item")
    refused(lambda: SemanticIDs.load(put(tmp_path / "empty")), tmp_path, "no semantic IDs in this folder", file="empty", expected="semantic_ids.parquet", mend="03_tokenizer")
    refused(lambda: SemanticIDs.load(tmp_path / "no.json"), tmp_path, "there is no file no.json", mend="03_tokenizer")


# --- text files


@pytest.mark.parametrize("content, problem, parts", [
    case("empty", b"", "the file is empty", dict(found="no line")),
    case("blank", b" \n\t\n", "the file is empty", dict(found="no line")),
    case("not UTF-8", b"1 1 2\n2 \xe9\n", "the file is not text", dict(found="byte 8", mend="UTF-8")),
    case("UTF-16", "1 1 2\n".encode("utf-16"), "the file is not text", dict(mend="UTF-8")),
    case("commas", b"1,2,3\n", "not whole numbers", dict(rows="line 1", found="1,2,3", expected="blanks")),
    case("words", b"1 1 2 3\nalice 1 2 3\n", "not whole numbers", dict(rows="line 2", found="alice")),
    case("negative", b"1 1 -2 3\n", "not whole numbers", dict(rows="line 1", found="-2")),
    case("zero", b"0 1 2 3\n", "not whole numbers", dict(rows="line 1")),
    case("padding zeros", b"1 1 2 3 0 0\n", "not whole numbers", dict(rows="line 1")),
    case("python's underscore", b"1 1_0 2\n", "not whole numbers", dict(rows="line 1")),
    case("other digits", "1 \u0663 2\n".encode(), "not whole numbers", dict(rows="line 1")),
    case("a null byte", b"1 \x00 2\n", "not whole numbers", dict(rows="line 1")),
    case("beyond int64", b"1 %d 2\n" % 10**30, "not whole numbers", dict(rows="line 1")),
    case("no item", b"1 1 2 3\n7\n", "lines without an item", dict(rows="line 2", found="1 such", expected="at least one item")),
    case("a user twice", b"1 1 2 3\n\n1 3 2 1\n", "users have two lines", dict(rows="line 1, line 3", found="user 1", mend="join")),
    case("unknown item", b"1 1 2 3\n2 1 2 9\n", "items are not in the catalogue", dict(rows="user 2", found="item 9", expected="items.jsonl")),
    case("huge unknown item", b"1 1 2 %d\n" % HUGE, "items are not in the catalogue", dict(rows="user 1", found=HUGE)),
])
def test_sequence_files(tmp_path, content, problem, parts):
    folder = put(tmp_path, sequences__txt=content, items__jsonl='{"id": 1}\n{"id": 2}\n{"id": 3}\n')
    refused(lambda: sequence_source(folder), folder, problem, file="sequences.txt", **parts)


@pytest.mark.parametrize("content, problem, parts", [
    case("empty", b"", "the file is empty", {}),
    case("not UTF-8", b'{"id": 1, "title": "\xe9"}', "the file is not text", dict(found="byte 20", mend="UTF-8")),
    case("cut off", b'{"id": 1}\n{"id": 2, "ti', "a line is not an item", dict(rows="line 2", found='{"id": 2')),
    case("no id", b'{"title": "a"}', "a line is not an item", dict(rows="line 1", expected='"id"')),
    case("half an id", b'{"id": 1.5}', "a line is not an item", dict(rows="line 1", found="1.5")),
    case("a truth value", b'{"id": true}', "a line is not an item", dict(rows="line 1")),
    case("beyond int64", b'{"id": %d}' % 10**30, "a line is not an item", dict(rows="line 1")),
    case("negative", b'{"id": -1}', "a line is not an item", dict(rows="line 1")),
    case("a list", b"[1]", "a line is not an item", dict(rows="line 1")),
    case("one JSON array", b'[\n{"id": 1},\n{"id": 2}\n]', "a line is not an item", dict(rows="line 1")),
])
def test_item_files(tmp_path, content, problem, parts):
    folder = put(tmp_path, sequences__txt="1 1 2 3", items__jsonl=content)
    refused(lambda: sequence_source(folder), folder, problem, file="items.jsonl", **parts)


@pytest.mark.parametrize("content, problem, parts", [
    case("empty", b"", "no file of pairs, or it is empty", {}),
    case("blank", b"\n\n", "no file of pairs, or it is empty", {}),
    case("one column", b"1\n2\n", "not a pair of item ids", {}),
    case("halves", b"1.5\t2\n", "not a pair of item ids", dict(found="float")),
    case("words", b"1\tb\n", "not a pair of item ids", {}),
    case("not UTF-8", b"1\t\xe9\n", "not a pair of item ids", dict(found="utf-8")),
    case("unknown", b"1\t2\n1\t9\n", "items are not in the catalogue", dict(rows="line 2", found="item 9")),
    case("negative", b"-1\t2\n", "items are not in the catalogue", dict(rows="line 1", found="item -1")),
])
def test_pair_files(tmp_path, content, problem, parts):
    folder = put(tmp_path, sequences__txt="1 1 2 3", items__jsonl='{"id": 1}\n{"id": 2}\n{"id": 3}\n', also__tsv=content)
    refused(lambda: sequence_source(folder), folder, problem, file="also.tsv", **parts)


HEAD = b"user_id:token\titem_id:token\ttimestamp:float\n"


@pytest.mark.parametrize("content, problem, parts", [
    case("empty", b"", "the file is empty", {}),
    case("header alone", HEAD, "the log has no rows", {}),
    case("no types", b"user_id\titem_id\na\tx\n", "a column has no type", dict(column="user_id", expected="name:token")),
    case("no header", b"a\tx\t1\n", "a column has no type", dict(column="a")),
    case("no items", b"user_id:token\na\n", "a column is missing", dict(column="item_id", found="user_id")),
    case("a column twice", b"user_id:token\tuser_id:token\titem_id:token\na\tb\tx\n", "a column stands twice", dict(column="user_id:token")),
    case("short line", HEAD + b"a\tx\t1\na\ty\n", "a line does not fit", dict(rows="line 3", expected="3 columns")),
    case("long line", HEAD + b"a\tx\t1\t9\n", "a line does not fit", dict(rows="line 2", found="9")),
    case("commas", b"user_id:token,item_id:token\na,x\n", "a column has no type", {}),
    case("no time", HEAD + b"a\tx\t\n", "timestamps are missing", dict(column="timestamp", rows="line 2", found="nothing")),
    case("NaN", HEAD + b"a\tx\t1\na\ty\tnan\n", "timestamps are missing", dict(column="timestamp", rows="line 3")),
    case("infinite", HEAD + b"a\tx\tinf\n", "timestamps are missing", dict(column="timestamp", rows="line 2")),
    case("a date", HEAD + b"a\tx\t2020-13-01\n", "timestamps are missing", dict(column="timestamp", rows="line 2", found="2020-13-01")),
    case("no user", HEAD + b"\tx\t1\n", "ids are missing", dict(column="user_id", rows="line 2", found="1 such row")),
    case("not UTF-8", HEAD + b"\xe9\tx\t1\n", "not tab-separated text", dict(found="byte", mend="UTF-8")),
])
def test_recbole_logs(tmp_path, content, problem, parts):
    folder = put(tmp_path, toy__inter=content)
    refused(lambda: dataset_of(recbole_source(folder)), folder, problem, file="toy.inter", **parts)


@pytest.mark.parametrize("name, content, problem, parts", [
    case("item without id", "item", b"iid:token\tt:token\nx\t1\n", "a column is missing", dict(column="item_id", found="iid")),
    case("item twice", "item", b"item_id:token\tt:token\nx\t1\nx\t2\n", "items appear twice", dict(column="item_id", rows="line 2, line 3", found="x")),
    case("user without id", "user", b"uid:token\nx\n", "a column is missing", dict(column="user_id", found="uid")),
    case("user twice", "user", b"user_id:token\nx\nx\n", "users appear twice", dict(column="user_id", rows="line 2, line 3")),
])
def test_recbole_side_files(tmp_path, name, content, problem, parts):
    folder = put(tmp_path, toy__inter=HEAD + b"a\tx\t1\n", **{f"toy__{name}": content})
    refused(lambda: recbole_source(folder), folder, problem, file=f"toy.{name}", **parts)


def test_recbole_folders(tmp_path):
    refused(lambda: recbole_source(tmp_path), tmp_path, "one .inter file", file=tmp_path.name, found="[]", expected="NAME.inter")
    put(tmp_path, a__inter=HEAD, b__inter=HEAD)
    refused(lambda: recbole_source(tmp_path), tmp_path, "one .inter file", found="a.inter")


# --- checkpoints and other files


class Surprise:
    "Something that runs code when it is unpickled."

    def __reduce__(self):
        return (os.system, ("echo should never run > unpickled",))


@pytest.fixture
def models(tmp_path):
    "A TIGER's model.pt and a k-means' final_model.pt."
    torch.manual_seed(0)
    write_torch(tmp_path / "model.pt", Tiger(TigerConfig([3, 3], 8, 8, 2, 8, 1, 1)).state())
    write_torch(tmp_path / "final_model.pt", RQKMeans.fit(torch.randn(20, 3), 2, 4).file_state())
    return tmp_path


def load_quantiser(path):
    return RQKMeans.load(read_torch(path), path)


def test_a_checkpoint_of_another_model(models):
    assert Tiger.load_from_checkpoint(models / "model.pt").n_levels == 2 and load_quantiser(models / "final_model.pt").sizes == [4, 4]
    refused(lambda: Tiger.load_from_checkpoint(models / "final_model.pt"), models, "not a checkpoint of a TIGER", file="final_model.pt", found="kind", expected="config, model", mend="04_tiger")
    refused(lambda: load_quantiser(models / "model.pt"), models, "not a residual k-means model", file="model.pt", found="None", expected="rqkmeans", mend="mode=kmeans")


@pytest.mark.parametrize("state", [
    case("a list", [1]), case("a tensor", torch.ones(3)), case("nothing", None), case("an empty dict", {}), case("text", "model"),
    case("weights alone", {"encoder.weight": torch.ones(2, 2)}), case("a config of text", {"config": "tiger", "model": {}}),
    case("unknown config", {"config": {"colour": 1}, "model": {}}), case("no heads", {"config": {"sizes": [4, 4], "num_heads": 0}, "model": {}}),
    case("negative sizes", {"config": {"sizes": [4, -4]}, "model": {}}), case("sizes of text", {"config": {"sizes": "ab"}, "model": {}}),
    case("weights as list", {"config": {"sizes": [4, 4]}, "model": [1]}), case("half a k-means", {"kind": "recgen.rqkmeans", "version": 1}),
    case("codebooks misnamed", {"kind": "recgen.rqkmeans", "version": 1, "codebooks": {"a": torch.ones(2, 2)}, "mean": torch.ones(2), "scale": torch.ones(2), "report": []}),
    case("codebooks of other widths", {"kind": "recgen.rqkmeans", "version": 1, "codebooks": {"level_0": torch.ones(2, 3)}, "mean": torch.ones(2), "scale": torch.ones(2), "report": []}),
    case("a later version", {"kind": "recgen.rqkmeans", "version": 99}),
])
def test_checkpoints_that_hold_something_else(tmp_path, state):
    path = tmp_path / "strange.pt"
    torch.save(state, path)
    refused(lambda: Tiger.load_from_checkpoint(path), tmp_path, "checkpoint", file="strange.pt")
    refused(lambda: load_quantiser(path), tmp_path, "residual k-means model" if not isinstance(state, dict) or state.get("mean") is None else "the", file="strange.pt")


def test_truncated_files_of_every_kind(models):
    write_json(models / "a.json", {"a": [1, 2, 3]})
    write_parquet(models / "a.parquet", frame(ITEMS, {}))
    write_tensors(models / "a.safetensors", {"a": torch.ones(50)})
    readers = {"a.json": (read_json, "JSON"), "a.parquet": (read_parquet, "parquet"), "a.safetensors": (read_tensors, "safetensors"),
               "model.pt": (Tiger.load_from_checkpoint, "a torch checkpoint"), "final_model.pt": (load_quantiser, "a torch checkpoint")}
    for name, (read, kind) in readers.items():
        path = models / name
        whole = path.read_bytes()
        for keep in (len(whole) // 2, 3, len(whole) - 5):
            path.write_bytes(whole[:keep])
            refused(lambda r=read, p=path: r(p), models, f"{name} cannot be read as {kind}", file=name, expected=kind, mend="again")
        path.write_bytes(b"")
        refused(lambda r=read, p=path: r(p), models, f"{name} is empty", file=name, found="0 bytes")
        path.unlink()
        refused(lambda r=read, p=path: r(p), models, f"there is no file {name}", file=name, mend="again")


def test_nothing_that_is_read_runs_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"config": Surprise(), "model": {}}, "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Surprise()))
    torch.save(TigerConfig([2, 2]), "c.pt")
    for name in "abc":
        path = tmp_path / f"{name}.pt"
        refused(lambda p=path: read_torch(p), tmp_path, f"{name}.pt cannot be read as a torch checkpoint", file=path.name, mend="again")
        for read in (read_tensors, read_json, read_parquet):
            refused(lambda p=path, r=read: r(p), tmp_path, "cannot be read", file=path.name)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("name", ["cuda:99", "cuda:-2", "cpu:7", "tpu", "gpu", "99", "", "cuda:x"])
def test_a_device_that_does_not_exist(tmp_path, name):
    refused(lambda: resolve_device(name), tmp_path, "there is no device", ParameterError, column="device", found=name, expected="cpu", mend="choose")


# --- run folders


def make_run(folder, **more):
    return Run("03_tokenizer", {"seed": 0, "output_dir": str(folder), **more})


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    refused(lambda: make_run(tmp_path / "file" / "run"), tmp_path, "cannot make the folder", RunError, says=["run", "choose an output_dir"])
    refused(lambda: make_run(tmp_path / "file"), tmp_path, "cannot make the folder", RunError, says=["choose an output_dir"])
    for write, content in ((write_json, {}), (write_parquet, frame(ITEMS, {})), (write_tensors, {}), (write_torch, {})):
        refused(lambda w=write, c=content: w(tmp_path / "file" / "x", c), tmp_path, "cannot write x", RunError, says=["choose a folder"])
    refused(lambda: make_run(Path("/proc/recgen")), tmp_path, "cannot make the folder", RunError) if Path("/proc").exists() else None


WRITERS = {"json": (write_json, {"a": list(range(40_000))}), "parquet": (write_parquet, pd.DataFrame({"a": np.random.default_rng(0).random(40_000)})),
           "safetensors": (write_tensors, {"a": torch.ones(40_000)}), "torch": (write_torch, {"a": torch.ones(40_000)})}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_no_disk_left_leaves_the_old_file(tmp_path, monkeypatch, kind, call):
    write, content = WRITERS[kind]
    (tmp_path / "x").write_text("what was there")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    refused(lambda: write(tmp_path / "x", content), tmp_path, "no space left to write x", RunError, says=["bytes free", "make room", "unharmed"])


def test_a_write_that_the_system_cuts_off(tmp_path):
    "A real one: the system lets no file grow over 20 kB, so the write fails in the middle, inside the library that writes."
    pytest.importorskip("resource")
    for kind in WRITERS:
        (tmp_path / kind).write_text("what was there")
    code = f"""
import resource, signal, sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(ROOT)!r}]
import test_bad_input as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for kind, (write, content) in t.WRITERS.items():
    try: write(kind, content)
    except t.RunError as e: print("refused:", e)
"""
    before = snapshot(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == len(WRITERS), done.stdout + done.stderr
    for kind, line in zip(WRITERS, lines, strict=True):
        assert line.startswith(f"refused: cannot write {kind}") and "choose a folder" in line
    assert snapshot(tmp_path) == before


@pytest.fixture
def tiny_disk(tmp_path):
    "A file system of 128 kB, where this process may mount one."
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder], capture_output=True) if sys.platform == "linux" else None
    if done is None or done.returncode:
        pytest.skip("this process may not mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk(tiny_disk, kind):
    write, content = WRITERS[kind]
    (tiny_disk / "x").write_text("what was there")
    refused(lambda: write(tiny_disk / "x", content), tiny_disk, "no space left to write x", RunError, says=["bytes free", "make room"])
    (tiny_disk / "fill").write_bytes(b"x" * (os.statvfs(tiny_disk).f_bavail * 4096))
    refused(lambda: make_run(tiny_disk / "run"), tiny_disk, "no space left", RunError)


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def write():
        with atomic_write(tmp_path / "x", "w") as f:
            f.write("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert not snapshot(tmp_path)


def test_a_run_folder_held_by_another_process(tmp_path):
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom recgen.core.run import Run\nrun = Run('03_tokenizer', {{'output_dir': {str(tmp_path / 'run')!r}}})\nprint('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline().strip() == "held"
            message = refused(lambda: make_run(tmp_path / "run", overwrite=True), tmp_path / "run", "another run is writing", RunError, says=["choose another output_dir"])
            assert f"process {other.pid} " in message
        finally:
            other.kill()
    make_run(tmp_path / "run", overwrite=True).finish()  # a dead holder's lock is taken over


def test_inputs_of_a_run(tmp_path):
    refused(lambda: hash_input(tmp_path / "nowhere"), tmp_path, "an input does not exist", file="nowhere", mend="correct the path")
    put(tmp_path / "empty")
    refused(lambda: hash_input(tmp_path / "empty"), tmp_path, "the input folder is empty", file="empty")
    put(tmp_path / "half", **{".run__json": "{}"}, a__txt="x")
    refused(lambda: hash_input(tmp_path / "half"), tmp_path, "a run that has not finished", file="half", expected="manifest.json", mend="run that stage again")


def test_files_of_finished_runs_are_verified(tmp_path):
    run = make_run(tmp_path / "run")
    id_table(run.folder, sizes="2,2")
    run.finish()
    assert len(SemanticIDs.load(run.folder)) == 3
    id_table(run.folder, codes=[[1, 1], [1, 0], [0, 1]], sizes="2,2")
    refused(lambda: SemanticIDs.load(run.folder), run.folder, "not the file that its run wrote", file="semantic_ids.parquet", found="sha256", mend="overwrite=True")
    refused(lambda: make_run(run.folder), run.folder, "is damaged", RunError, says=["semantic_ids.parquet", "overwrite=True"])
    refused(lambda: Run("03_tokenizer", {"seed": 1, "output_dir": str(run.folder)}), run.folder, "is finished, with other parameters", RunError, says=["seed: 0 → 1", "overwrite=True"])
    assert verify_file(tmp_path / "elsewhere") == tmp_path / "elsewhere"


def test_a_recommender_refuses_what_is_not_one(models):
    refused(lambda: Recommender.load(models), models, "is not a finished run of 04_tiger", RunError, says=["manifest.json"])
    put(models, manifest__json="{}", items__parquet=frame(ITEMS, {}))
    id_table(models, sizes="3,3", codes=[[0, 1], [1, 0]], ids=[1, 2])
    refused(lambda: Recommender.load(models), models, "do not fit the catalogue", rows="item 3", found="1 items without codes")
    id_table(models, sizes="2,2")
    refused(lambda: Recommender.load(models), models, "do not belong together", found="model [3, 3], IDs [2, 2]")


def test_histories_that_hold_something_else(tmp_path):
    torch.manual_seed(0)
    ids = SemanticIDs([1, 2, 3], CODES, [3, 3])
    recommender = Recommender(Tiger(TigerConfig([3, 3], 8, 8, 2, 8, 1, 1)), ids, frame(ITEMS, {}))
    for histories in ([["a", "b"]], [1, 2], [[None]], [[NAN]], 5):
        refused(lambda h=histories: recommender.recommend(h), tmp_path, "histories do not hold item ids", expected="one list", mend="raw=True")
    for k in (0, -1):
        refused(lambda k=k: recommender.recommend([[1]], k), tmp_path, "nothing to recommend", column="k", found=k)
    with pytest.warns(UserWarning, match="2 history entries"):
        found = recommender.recommend([[1, 99, -3], []], k=5)
    assert found[found["user"] == 0]["item_id"].tolist() != [] and 1 not in found[found["user"] == 0]["item_id"].tolist()
    assert sorted(found[found["user"] == 1]["item_id"]) == [1, 2, 3]  # fewer than k where there are fewer


# --- whole stages: refused before anything is written


SEQUENCES = "\n".join(f"{u} " + " ".join(str((u * k) % 12 + 1) for k in (1, 3, 5, 7, 2)) for u in range(1, 31))
LINES = "\n".join(json.dumps({"id": i, "asin": f"r{i}", "title": f"thing {i}"}) for i in range(1, 13))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "Finished runs of 00_data and 03_tokenizer on a small log."
    folder = tmp_path_factory.mktemp("finished")
    rng = np.random.default_rng(0)
    emb = pa.table({"ItemID": range(1, 13), "embedding": list(rng.normal(size=(12, 4)).astype(np.float32))})
    source = put(folder / "source", sequences__txt=SEQUENCES, items__jsonl=LINES, item_emb__parquet=emb)
    run_stage("00_data", source="sequences", data_path=str(source), output_dir=str(folder / "data"))
    run_stage("03_tokenizer", data_path=str(folder / "data"), output_dir=str(folder / "ids"), mode="kmeans", n_layers=2, n_clusters=4)
    for name in ("data", "ids"):
        assert (folder / name / "manifest.json").exists()
    return folder


DATA_CASES = [
    case("an unknown item", dict(sequences__txt=SEQUENCES + "\n31 1 2 99"), InputError, "items are not in the catalogue"),
    case("a short user", dict(sequences__txt=SEQUENCES + "\n31 1 2"), InputError, "fewer than 3 interactions"),
    case("a user twice", dict(sequences__txt=SEQUENCES + "\n3 1 2 3"), InputError, "users have two lines"),
    case("a gap", dict(sequences__txt=SEQUENCES + "\n99 1 2 3"), InputError, "user ids have gaps"),
    case("an item twice", dict(items__jsonl=LINES + "\n" + LINES.splitlines()[0]), InputError, "items appear twice"),
    case("vectors of other items", dict(item_emb__parquet=pa.table({"ItemID": [1, 2], "embedding": [[1.0], [2.0]]})), InputError, "other items than the catalogue"),
    case("an empty log", dict(sequences__txt=""), InputError, "the file is empty"),
]


@pytest.mark.parametrize("files, kind, problem", DATA_CASES)
def test_00_data_refuses_before_it_touches_a_folder(finished, runs, tmp_path, files, kind, problem):
    source = put(tmp_path / "source", **{"sequences__txt": SEQUENCES, "items__jsonl": LINES, **files})
    refused(lambda: run_stage("00_data", source="sequences", data_path=str(source)), tmp_path, problem, kind)
    assert not list(runs.iterdir())
    again = dict(source="sequences", data_path=str(source), output_dir=str(finished / "data"), overwrite=True)
    refused(lambda: run_stage("00_data", **again), finished, problem, kind)


def test_00_data_names_the_file_that_the_user_wrote(runs, tmp_path):
    source = put(tmp_path / "source", sequences__txt=SEQUENCES + "\n31 1 2", items__jsonl=LINES)
    refused(lambda: run_stage("00_data", source="sequences", data_path=str(source)), tmp_path, "fewer than 3 interactions", file="sequences.txt", rows="31", mend="k_core=3")


@pytest.mark.parametrize("params, kind, problem, parts", [
    case("no such folder", dict(data_path="nowhere"), InputError, "there is no file item_emb.parquet", dict(file="nowhere", mend="embedding_file")),
    case("no such column", dict(embedding_column="text"), InputError, "a column is missing", dict(column="text", found="ItemID")),
    case("K over the vectors", dict(n_clusters=13), InputError, "more codes than distinct vectors", dict(column="n_clusters", found="12 distinct", expected="12", mend="-p n_clusters")),
    case("no device", dict(device="cuda:99"), ParameterError, "there is no device", dict(column="device")),
    case("no such choice", dict(mode="magic"), ParameterError, "not allowed", dict(column="mode", found="magic", expected="kmeans")),
    case("K of the RQ-VAE over the vectors", dict(mode="tiger", n_embed=13), InputError, "more codes than distinct vectors", dict(column="n_embed", found="12 distinct", mend="-p n_embed")),
    case("more items than tuples", dict(n_layers=1), InputError, "more items than different tuples", dict(column="n_layers, n_clusters", found="12 items, 4^1")),
    case("gumbel with means", dict(mode="tiger", n_embed=4, quantize="gumbel"), ParameterError, "by gradient", dict(column="quantize, use_ema", mend="use_ema false")),
    case("balanced RQ-VAE", dict(mode="tiger", n_embed=4, balanced=True), ParameterError, "balanced is of mode kmeans", dict(mend="mode kmeans")),
    case("raw vectors", dict(mode="tiger", n_embed=4, standardize="no"), ParameterError, "standardises its input", dict(column="standardize, mode")),
    case("stopping the last", dict(select="last", early_stop_patience=3), ParameterError, "not chosen by validation", dict(mend="select reconstruction")),
    case("a decay of one", dict(ema_decay=1), ParameterError, "not allowed", dict(column="ema_decay", expected="less than 1")),
    case("no half precision here", dict(mode="tiger", n_embed=4, precision="fp16"), ParameterError, "fp16 needs a CUDA device", dict(column="precision")),
    case("nothing to append to", dict(append_to="nowhere"), InputError, "", dict(file="nowhere")),
    case("no table to compare", dict(compare_ids="nowhere/*.tsv"), InputError, "there is no such table", dict(column="compare_ids")),
    case("wrong type", dict(n_layers="two"), ParameterError, "wrong type", dict(column="n_layers", found="two", expected="int")),
])
def test_03_tokenizer_refuses_before_it_touches_a_folder(finished, runs, params, kind, problem, parts):
    given = dict(data_path=str(finished / "data"), mode="kmeans", n_layers=2, n_clusters=4) | params
    refused(lambda: run_stage("03_tokenizer", **given), finished, problem, kind, **parts)
    assert not list(runs.iterdir())
    refused(lambda: run_stage("03_tokenizer", **given, output_dir=str(finished / "ids"), overwrite=True), finished, problem, kind)


@pytest.mark.parametrize("params, kind, problem, parts", [
    case("no IDs", dict(semantic_ids=""), InputError, "there are no semantic IDs", dict(column="semantic_ids", mend="03_tokenizer")),
    case("no such IDs", dict(semantic_ids="nowhere"), InputError, "there is no file nowhere", dict(file="nowhere", mend="03_tokenizer")),
    case("IDs without data", dict(data_path=""), InputError, "semantic IDs without a dataset", dict(column="data_path", mend="00_data")),
    case("IDs of fewer items", dict(semantic_ids="some.json"), InputError, "do not fit the catalogue", dict(rows="item 2", found="11 items without", mend="03_tokenizer")),
    case("heads", dict(num_heads=5), InputError, "attention cannot be cut", dict(column="attn_dim, num_heads", found="64 / 5")),
    case("no device", dict(device="tpu"), ParameterError, "there is no device", dict(column="device")),
    case("no precision", dict(precision="fp8"), ParameterError, "not allowed", dict(column="precision", found="fp8", expected="bf16")),
])
def test_04_tiger_refuses_before_it_touches_a_folder(finished, runs, params, kind, problem, parts):
    write_json("some.json", {"1": [0, 1]})
    given = dict(data_path=str(finished / "data"), semantic_ids=str(finished / "ids")) | params
    refused(lambda: run_stage("04_tiger", **given), finished, problem, kind, **parts)
    assert not list(runs.iterdir())


def test_a_stage_refuses_an_exchanged_input(finished, runs, tmp_path):
    import shutil

    copy = shutil.copytree(finished / "data", tmp_path / "data")
    table = pq.read_table(copy / "item_emb.parquet")
    pq.write_table(table.set_column(1, "embedding", pa.array([v[::-1] for v in table["embedding"].to_pylist()])), copy / "item_emb.parquet")
    refused(lambda: run_stage("03_tokenizer", data_path=str(copy), mode="kmeans", n_layers=2, n_clusters=4), copy, "not the file that its run wrote", file="item_emb.parquet")
    refused(lambda: run_stage("04_tiger", data_path=str(copy), semantic_ids=str(finished / "ids")), copy, "not the file that dataset.json describes", file="item_emb.parquet")
    assert not list(runs.iterdir())
