"00_data: which source is meant, what makes a run, and that nothing is touched before all is known."
import gzip
import json
import os
import signal
import time

import numpy as np
import pandas as pd
import pytest
import stage_runs
from http_server import Server

from recgen.core.errors import InputError, ParameterError
from recgen.formats.dataset import Dataset
from recgen.formats.embeddings import load_embeddings
from recgen.formats.statistics import statistics_table
from recgen.sources.assemble import make_dataset
from recgen.sources.tables import table_source
from recgen.stages import data as stage

def sales(path, users=12, rows=5, start=1):
    frame = pd.DataFrame([(f"c{u}", f"B{(u * k) % 7}", f"2024-05-{k:02d}") for u in range(start, users + start) for k in range(1, rows + 1)], columns=["customer", "sku", "date"])
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False)
    return path


def goods(path, title="Thing"):
    pd.DataFrame({"sku": [f"B{i}" for i in range(7)], "name": [f"{title} {i}, {'ab'[i % 2]}" for i in range(7)]}).to_csv(path, index=False)
    return path


def snapshot(folder):
    return {p.relative_to(folder).as_posix(): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def shop(tmp_path):
    return {"data_path": str(sales(tmp_path / "shop" / "sales.csv")), "columns": "user=customer item=sku", "items_path": str(goods(tmp_path / "shop_goods.csv")), "min_user": 3}


@pytest.mark.parametrize("names, kind", [
    (["sequences.txt", "items.jsonl"], "sequences"), (["x.inter"], "recbole"), (["u.data"], "movielens"), (["ratings.dat"], "movielens"), (["ratings.csv", "movies.csv", "links.csv"], "movielens"),
    (["reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"], "amazon"), (["Luxury_Beauty_5.json.gz"], "amazon"), (["meta_All_Beauty.jsonl.gz", "All_Beauty.csv.gz"], "amazon"),
    (["MicroLens-50k_pairs.csv"], "microlens"), (["sequences.json", "items.json"], "microlens"), (["train.parquet", "valid.parquet", "item_info.parquet"], "microlens"),
    (["train.parquet", "valid.parquet"], "impressions"), (["part-0.csv", "part-1.csv"], "tables"), (["log.parquet"], "tables"),
])
def test_a_folder_is_recognised_by_its_files(tmp_path, names, kind):
    for name in names:
        (tmp_path / name).write_text("x")
    assert stage.recognise(tmp_path) == kind == stage.choose_source("world", str(tmp_path))[0]
    assert stage.choose_source(str(tmp_path), "")[0] == kind


def test_a_folder_of_two_kinds_or_of_none_is_asked_about(tmp_path):
    with pytest.raises(ParameterError, match="no log of a known kind"):
        stage.recognise(tmp_path)
    for name in ("sequences.txt", "x.inter"):
        (tmp_path / name).write_text("x")
    with pytest.raises(ParameterError, match="could be several kinds") as e:
        stage.recognise(tmp_path)
    assert "sequences, recbole" in str(e.value) and stage.choose_source("recbole", str(tmp_path))[0] == "recbole"


@pytest.mark.parametrize("source, data_path, problem", [("tables", "", "needs a file"), ("nowhere/log.csv", "", "no such file or folder"), ("world", "nowhere", "no such file or folder"), ("mine", ".", "no such kind"), ("beuty", "", "beuty")])
def test_sources_that_are_not_there(runs, source, data_path, problem):
    with pytest.raises(ParameterError, match=problem):
        stage.choose_source(source, data_path)


def test_a_published_set_is_taken_from_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("RECGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RECGEN_DATA", str(tmp_path))
    (tmp_path / "Beauty").mkdir()
    for name in ("reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"):
        (tmp_path / "Beauty" / name).write_bytes(gzip.compress(b"{}"))
    assert stage.choose_source("beauty", "", 2014) == ("amazon", tmp_path / "Beauty") and not (tmp_path / "cache").exists()


def test_a_csv_becomes_a_dataset_and_is_known_again(runs, shop):
    first = stage_runs.run_stage("00_data", whole=True, **shop)["run"]
    made = Dataset.load(first.folder)
    assert (made.n_users, made.n_items, len(made.all_rows_with_held_out())) == (12, 7, 60)
    assert load_embeddings(first.folder, catalogue=made.items["item_id"]).vectors.isfinite().all()
    facts = json.loads((first.folder / "dataset.json").read_text())
    assert facts["text"]["encoder"] == "svd" and facts["source"] == "tables" and facts["name"] == "sales" and facts["sha256"]["interactions.parquet"]
    assert stage_runs.run_stage("00_data", **shop, memory_mb=256)["run"].folder == first.folder, "how it was read is not what it is"
    assert stage_runs.run_stage("00_data", **shop, k_core=2)["run"].folder != first.folder
    assert {"columns", "item_columns", "split"} <= set(first.manifest["parameters"]) and not {"n_users", "spool_dir", "items_path"} & set(first.manifest["parameters"])
    assert str(runs.parent) not in json.dumps({k: v for k, v in first.manifest.items() if k != "environment"}) + (first.folder / "dataset.json").read_text()
    goods(runs.parent / "shop_goods.csv", "Ware")
    assert stage_runs.run_stage("00_data", **shop)["run"].folder != first.folder, "another table of items is another run"


def test_a_log_without_texts_has_no_vectors_and_none_is_none(runs, shop):
    shop.pop("items_path")
    folder = stage_runs.run_stage("00_data", **shop)["run"].folder
    assert not (folder / "item_emb.parquet").exists()
    shop["items_path"] = str(runs.parent / "shop_goods.csv")
    assert not (stage_runs.run_stage("00_data", **shop, encoder="none")["run"].folder / "item_emb.parquet").exists()


def test_a_time_split_is_part_of_the_data(runs, shop):
    folder = stage_runs.run_stage("00_data", **shop, split="time", valid_from="2024-05-04", test_from="2024-05-05")["run"].folder
    made = Dataset.load(folder)
    assert made.info["split"]["rule"] == "time" and len(made.train_interactions()) == 36 and len(made.test_rows_held_out()) == 12
    short = dict(shop, data_path=str(sales(runs.parent / "short" / "log.csv", rows=2)), min_user=0)
    with pytest.raises(InputError, match="fewer than 3"):
        stage_runs.run_stage("00_data", **short)
    with pytest.raises(ParameterError, match="leaves a part empty") as e:
        stage_runs.run_stage("00_data", **short, split="time", valid_from="2024-05-01 12:00", test_from="2024-05-02")
    assert "no rows in valid" in e.value.parts["found"]


def test_targets_without_training_rows_are_counted_and_shown(runs, tmp_path):
    rows = [(f"c{u}", f"B{(u * k) % 7}", f"2024-05-{k:02d}") for u in range(1, 9) for k in range(1, 6)]
    rows += [("late", "B1", "2024-05-04"), ("late", "new", "2024-05-05"), ("later", "B2", "2024-05-05")]  # two users and an item that the training rows do not have
    pd.DataFrame(rows, columns=["user", "item", "date"]).to_csv(tmp_path / "log.csv", index=False)
    made = stage_runs.run_stage("00_data", whole=True, data_path=str(tmp_path / "log.csv"), split="time", valid_from="2024-05-04", test_from="2024-05-05")
    facts, data = json.loads((made["run"].folder / "dataset.json").read_text()), Dataset.load(made["run"].folder)
    assert [facts[f"n_{part}_{end}_unseen"] for part in ("valid", "test") for end in ("user", "item")] == [1, 0, 2, 1]
    train, test = data.train_interactions(), data.test_rows_held_out()
    assert (~test["user_id"].isin(train["user_id"])).sum() == 2 and (~test["item_id"].isin(train["item_id"])).sum() == 1
    shown = statistics_table(made["counts"])["value"]
    assert shown["targets whose user has no training row"] == "1 validation, 2 test" and shown["targets whose item has no training row"] == "0 validation, 1 test"


def test_a_stage_and_make_dataset_write_the_same_folder(runs, shop, tmp_path):
    run = stage_runs.run_stage("00_data", **shop)["run"]
    source = table_source(shop["data_path"], shop["columns"], shop["items_path"])
    facts = make_dataset(source, tmp_path / "made", min_user=3)
    assert facts == json.loads((run.folder / "dataset.json").read_text()) == json.loads((tmp_path / "made" / "dataset.json").read_text())
    for name in [*facts["sha256"], "dataset.json"]:
        assert (run.folder / name).read_bytes() == (tmp_path / "made" / name).read_bytes(), name
    assert {"interactions.parquet", "items.parquet", "users.parquet", "item_emb.parquet"} == set(facts["sha256"])


def test_what_an_encoder_cannot_read_leaves_no_folder(runs, shop, tmp_path):
    source = table_source(shop["data_path"], shop["columns"], shop["items_path"])
    for how, problem in (({"template": "{colour}"}, "columns that the items do not have"), ({"encoder": str(tmp_path / "other.parquet")}, "items have no vector"), ({"k_core": -2}, "whole number from 0")):
        pd.DataFrame({"raw_id": ["Z1", "Z2"], "embedding": [[1.0], [2.0]]}).to_parquet(tmp_path / "other.parquet")
        before = snapshot(tmp_path)
        with pytest.raises((InputError, ParameterError), match=problem):
            make_dataset(source, tmp_path / "made", min_user=3, **how)
        assert snapshot(tmp_path) == before and not (tmp_path / "made").exists()


@pytest.mark.parametrize("wrong, problem", [
    (dict(columns="user=buyer"), "a column is missing"), (dict(columns="customer"), "cannot be read"), (dict(items_path="nowhere.csv"), "no such file"), (dict(k_core=50), "50-core"), (dict(delimiter=";"), "a column is missing"),
    (dict(text_template="{colour}"), "columns that the items do not have"), (dict(encoder="vectors.npy"), "vectors.npy"), (dict(spool_dir="nowhere", k_core=2), "no such folder"), (dict(tie_policy="random"), "tie_policy"),
    (dict(split="time", valid_from="soon"), "no time"), (dict(source="recbole"), "own tables"), (dict(year=2020), "year"), (dict(name="a/b"), "dataset's name"), (dict(valid_from="2024-05-04"), "split in time"), (dict(data_path="", columns="", items_path="", min_user=3), "means nothing"), (dict(encoder_model="x"), "encoder_model"),
], ids=str)
def test_what_is_wrong_is_said_before_anything_is_touched(runs, shop, tmp_path, wrong, problem):
    before = snapshot(runs)
    with pytest.raises((InputError, ParameterError), match=problem):
        stage_runs.run_stage("00_data", **shop | wrong)
    assert snapshot(runs) == before and not list(runs.iterdir())
    stage_runs.run_stage("00_data", **shop, output_dir=str(tmp_path / "out"))
    before = snapshot(tmp_path / "out")
    with pytest.raises((InputError, ParameterError), match=problem):
        stage_runs.run_stage("00_data", **shop | wrong, output_dir=str(tmp_path / "out"), overwrite=True)
    assert snapshot(tmp_path / "out") == before


def test_a_run_does_not_write_where_it_reads(runs, shop, tmp_path):
    before = snapshot(tmp_path / "shop")
    with pytest.raises(ParameterError, match="folder that is read"):
        stage_runs.run_stage("00_data", **shop, output_dir=str(tmp_path / "shop"), overwrite=True)
    with pytest.raises(ParameterError, match="folder that is read"):
        stage_runs.run_stage("00_data", **shop | {"data_path": str(tmp_path / "shop")}, output_dir=str(tmp_path / "shop" / "out"))
    assert snapshot(tmp_path / "shop") == before


def test_parameters_of_tables_are_refused_elsewhere(runs, tmp_path):
    (tmp_path / "sequences.txt").write_text("1 1 2 3\n")
    (tmp_path / "items.jsonl").write_text('{"id": 1}\n{"id": 2}\n{"id": 3}\n')
    with pytest.raises(ParameterError, match="columns is for the user's own tables"):
        stage_runs.run_stage("00_data", data_path=str(tmp_path), columns="user=a")


@pytest.mark.slow
def test_killed_at_any_time_a_log_is_read_again_and_ends_the_same(tmp_path):
    "kill -9 while it reads and while it writes: the spool may stay behind, a half-written dataset never."
    rng = np.random.default_rng(0)
    n = 150_000
    frame = pd.DataFrame({"user_id": rng.integers(0, 10_000, n), "item_id": rng.integers(0, 3_000, n), "timestamp": rng.integers(0, 10**6, n)})
    frame.to_csv(tmp_path / "log.csv", index=False)
    params = {"data_path": tmp_path / "log.csv", "k_core": 5}
    whole = stage_runs.run("00_data", tmp_path / "whole", **params)
    for moment in (lambda: list((tmp_path / "spool").glob("recgen-log-*/log.duckdb")), lambda: list((tmp_path / "cut").rglob("items.parquet")) + list((tmp_path / "cut").rglob(".partial-*"))):
        (tmp_path / "spool").mkdir(exist_ok=True)
        process = stage_runs.start("00_data", tmp_path / "cut", **params, spool_dir=tmp_path / "spool")
        until = time.monotonic() + 120
        while not moment() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        assert moment()
        for line in os.popen(f"ps -o pid= --ppid {process.pid}").read().split():
            os.kill(int(line), signal.SIGKILL)
        process.kill()
        process.communicate()
        assert not list((tmp_path / "cut").rglob("manifest.json")) and not list((tmp_path / "cut").rglob("dataset.json"))
    again = stage_runs.run("00_data", tmp_path / "cut", **params)
    one, two = (json.loads((f / "manifest.json").read_text())["outputs"] for f in (whole, again))
    assert one == two and not [p for p in again.rglob("*") if "partial" in p.name]


def test_a_service_gives_the_vectors_and_is_asked_once(runs, shop, tmp_path, monkeypatch):
    monkeypatch.setenv("RECGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SHOP_KEY", "sk-not-to-be-seen")
    asked = []

    def embeddings(data, request):
        asked.extend(data["input"])
        return {"data": [{"index": i, "embedding": [float(text.count(c)) + 1 for c in "aeio,0123"]} for i, text in enumerate(data["input"])], "usage": {"total_tokens": 7}}

    with Server() as server:
        server.post("/v1/embeddings", embeddings)
        service = dict(encoder="openai", encoder_model="letters", encoder_address=server.url("/v1"), encoder_key="SHOP_KEY", encoder_dimensions=4)
        first = stage_runs.run_stage("00_data", **shop, **service)["run"]
        vectors = load_embeddings(first.folder).vectors
        assert vectors.shape == (7, 4) and np.allclose(vectors.norm(dim=1), 1) and len(asked) == 7
        assert server.requests[0].headers["authorization"] == "Bearer sk-not-to-be-seen"
        second = stage_runs.run_stage("00_data", **shop, **service, k_core=2)["run"]
        assert second.folder != first.folder and len(asked) == 7, "the answers are kept beside the other downloads"
    for path in [p for p in tmp_path.rglob("*") if p.is_file()]:
        assert b"sk-not-to-be-seen" not in path.read_bytes(), path
    assert "letters" in json.dumps(first.manifest["parameters"])
