"""The stages as a user runs them: by papermill, from any folder, joined by folders; and what they refuse before anything is written."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from stage_runs import NOTEBOOKS, REPO, TINY, environment, finish, manifest_of, outputs_of, run, start, tiny, workplace

from recgen.core.files import read_torch
from recgen.core.hashing import sha256_file
from recgen.core.run import hash_manifest
from recgen.core.training import TrainSettings
from recgen.evaluation.protocol import LeakageError
from recgen.formats.dataset import Dataset
from recgen.formats.semantic_ids import SemanticIDs
from recgen.stages import tiger as tiger_stage
from recgen.stages.tokenizer import assign_ids, read_vectors
from recgen.tokens.rqkmeans import RQKMeans

STAGES = ("00_data", "03_tokenizer", "04_tiger")
OUTPUTS = {
    "00_data": {"interactions.parquet", "items.parquet", "users.parquet", "item_emb.parquet", "dataset.json", "oracle.json", "oracle/next_item.safetensors",
                "impressions/train.parquet", "relations/item__also_bought__item.parquet"},
    "03_tokenizer": {"semantic_id_mappings.json", "semantic_ids.parquet", "codebooks.safetensors", "final_model.pt", "training_results.json", "checkpoint_epoch_100.pt"},
    "04_tiger": {"model.pt", "per_user.parquet", "recommendations.parquet", "items.parquet", "semantic_id_mappings.json", "semantic_ids.parquet",
                 "checkpoints/last.pt", "checkpoints/best.pt", "metrics.jsonl"},
}
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|usr|var|work|Users|private|opt|mnt)/\S+")


# --- each stage bare


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    "Every stage without a parameter, at the same time, each started in its own empty folder: {stage: that folder}."
    places = {stage: tmp_path_factory.mktemp(stage) for stage in STAGES}
    running = {stage: start(stage, place) for stage, place in places.items()}
    for process in running.values():
        finish(process)
    return places


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_bare_stage_finishes(stage, bare):
    (manifest,) = bare[stage].glob(f"runs/world/{stage}/*/manifest.json")
    folder, found = manifest.parent, json.loads(manifest.read_text())
    assert found["stage"] == stage and found["hash"].startswith(folder.name) and len(folder.name) == 8
    assert OUTPUTS[stage] <= found["outputs"].keys()
    assert all(sha256_file(folder / name) == entry["sha256"] for name, entry in found["outputs"].items())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")}
    assert files - found["outputs"].keys() - {"manifest.json"} == {f for f in files if f.startswith("logs/")} != set()
    assert not list(folder.rglob(".run.json")) and not list(folder.rglob(".holder.json")) and not list(folder.rglob(".partial-*"))
    assert {p.name for p in bare[stage].iterdir()} == {"runs", f"{stage}.ipynb"}, "nothing is written elsewhere"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_prints_holds_no_absolute_path(stage, bare):
    text = outputs_of(bare[stage] / f"{stage}.ipynb")
    assert len(text) > 500 and not ABSOLUTE.findall(text)
    assert str(bare[stage]) not in text and str(REPO) not in text


# --- the chain


def test_the_chain_is_joined_by_folders():
    data, tokens, model = (tiny(stage) for stage in STAGES)
    assert manifest_of(tokens)["inputs"] == {"data_path": hash_manifest(manifest_of(data))}
    assert manifest_of(model)["inputs"] == {"data_path": hash_manifest(manifest_of(data)), "semantic_ids": hash_manifest(manifest_of(tokens))}
    assert {manifest_of(tiny(stage))["dataset"] for stage in STAGES} == {"tiny"}
    assert SemanticIDs.load(model) == SemanticIDs.load(tokens)
    for stage in STAGES:
        text = outputs_of(workplace() / stage / f"{stage}.ipynb")
        assert not ABSOLUTE.findall(text) and str(workplace()) not in text


def test_the_written_tables():
    folder, dataset = tiny("04_tiger"), Dataset.load(tiny("00_data"))
    users = pd.read_parquet(folder / "per_user.parquet")
    assert list(users.columns) == ["user_id", "target", "rank", "rank_filtered"] and (users.dtypes == "int64").all()
    held_out = dataset.test_rows_held_out()
    assert users["user_id"].tolist() == held_out["user_id"].tolist() and users["target"].tolist() == held_out["item_id"].tolist()
    lists = pd.read_parquet(folder / "recommendations.parquet")
    assert list(lists.columns) == ["user_id", "rank", "item_id", "raw_id", "title", "score"]
    assert lists.groupby("user_id")["rank"].apply(list).map(lambda r: r == list(range(1, 11))).all()
    assert (lists.groupby("user_id")["score"].diff().dropna() <= 0).all() and not lists.duplicated(["user_id", "item_id"]).any()
    items = dataset.items.set_index("item_id")
    assert (items.loc[lists["item_id"], "raw_id"].to_numpy() == lists["raw_id"].to_numpy()).all()
    seen = dataset.all_rows_with_held_out().query("split < 2")[["user_id", "item_id"]]
    offered = lists[["user_id", "item_id"]].merge(held_out[["user_id", "item_id"]], how="left", indicator=True).query("_merge == 'left_only'")
    assert offered.drop(columns="_merge").merge(seen).empty, "nothing that the user has had"
    metrics = manifest_of(folder)["metrics"]
    for variant, column in (("filtered", "rank_filtered"), ("unfiltered", "rank")):
        assert metrics[f"test/item/{variant}/recall@10"] == pytest.approx(((users[column] > 0) & (users[column] <= 10)).mean())
    hits = lists.merge(held_out[["user_id", "item_id"]])
    assert len(hits) / len(users) == pytest.approx(metrics["test/item/filtered/recall@10"], abs=0.02), "the lists are those that were counted"


def test_metrics_jsonl_is_the_training(tmp_path):
    lines = [json.loads(line) for line in (tiny("04_tiger") / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in lines] == [1, 2, 3] and all("valid/item/filtered/ndcg@10" in r for r in lines)
    assert manifest_of(tiny("04_tiger"))["metrics"]["train/best_value"] == max(r["valid/item/filtered/ndcg@10"] for r in lines)


@pytest.mark.slow
def test_a_second_run_reuses_the_first():
    folder = tiny("04_tiger")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    place = workplace() / "again"
    joined = {"data_path": tiny("00_data"), "semantic_ids": tiny("03_tokenizer"), "output_dir": folder}
    run("04_tiger", place, **TINY["04_tiger"], **joined)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before
    text = outputs_of(place / "04_tiger.ipynb")
    assert "reusing a finished run" in text and "Epoch 1" not in text and "| popularity |" in text


def test_exporting_ids_again_gives_the_same_ids():
    folder = tiny("03_tokenizer")
    vectors, _, _ = read_vectors(str(tiny("00_data")))
    published = SemanticIDs.load(folder)
    for _ in range(2):
        ids, _ = assign_ids(RQKMeans.load(read_torch(folder / "final_model.pt")), vectors, "nearest")
        assert ids == published
    assert SemanticIDs.load(folder / "semantic_id_mappings.json").codes().equal(published.codes())


@pytest.mark.slow
def test_the_pipeline_command_makes_equal_runs_and_a_report(tmp_path):
    settings = tmp_path / "small"
    settings.mkdir()
    for stage, values in TINY.items():
        (settings / f"{stage}.yaml").write_text(yaml.safe_dump(values))
    place = tmp_path / "elsewhere"
    place.mkdir()
    done = subprocess.run([sys.executable, "-m", "recgen.cli", "pipeline", str(settings), "--output", "out"], cwd=place, env=environment(place),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for stage in STAGES:
        assert manifest_of(place / "out" / stage) == manifest_of(tiny(stage)), "another folder, another way to start it, another time: the same run"
    page = (place / "out" / "report.html").read_text()
    table, notebooks = page.find(">recall@10<"), [page.find(f"The executed notebook: {stage}") for stage in STAGES]
    assert 0 < table < notebooks[0] < notebooks[1] < notebooks[2]
    assert 0 < page.find("TIGER is ahead") < notebooks[0] or 0 < page.find("TIGER loses") < notebooks[0]


def test_the_pipeline_command_refuses(tmp_path):
    for words, said in ((["nothing"], "demo"), (["demo", "-p", "99_x.epochs", "1"], "99_x.epochs")):
        done = subprocess.run([sys.executable, "-m", "recgen.cli", "pipeline", *words], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
        assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# --- what is refused


@pytest.mark.slow
def test_papermill_fails_and_writes_nothing(tmp_path):
    unknown, mode = start("04_tiger", tmp_path / "a", epocs=3), start("03_tokenizer", tmp_path / "b", quantize="gumbel")
    printed = finish(unknown, ok=False)
    assert "there is no parameter 'epocs'" in printed and "epochs" in printed
    assert "gumbel moves the codebooks by gradient" in (printed := finish(mode, ok=False)) and "-p use_ema false" in printed
    assert not list(tmp_path.glob("*/runs/**/*")), "no run folder was made"


def other_ids(folder: Path) -> Path:
    "A table that lacks the tiny catalogue's last item."
    ids = SemanticIDs.load(tiny("03_tokenizer"))
    SemanticIDs(ids.item_ids[:-1], ids.codes()[:-1], ids.sizes).save(folder)
    return folder


def refusals(folder: Path) -> dict:
    "name: (stage, parameters, words of the message)"
    data, tokens = str(tiny("00_data")), str(tiny("03_tokenizer"))
    both = {"data_path": data, "semantic_ids": tokens}
    return {
        "unknown name": ("00_data", {"n_user": 5}, ["n_user", "n_users"]),
        "wrong type": ("04_tiger", {"epochs": "three"}, ["epochs", "'three'", "int"]),
        "wrong bool": ("04_tiger", {"overwrite": "maybe"}, ["overwrite", "'maybe'", "bool"]),
        "wrong choice": ("03_tokenizer", {"dedup": "sufix"}, ["dedup", "'sufix'", "'suffix'"]),
        "out of range": ("04_tiger", {"epochs": 0}, ["epochs", "at least 1"]),
        "both names": ("04_tiger", {"epochs": 2, "n_epoch": 3}, ["epochs", "n_epoch", "two names"]),
        "alias by its own name": ("04_tiger", {"n_epoch": "many"}, ["n_epoch", "'many'"]),
        "contradiction": ("03_tokenizer", {"streaming": "true"}, ["-p mode kmeans -p dedup suffix"]),
        "no device": ("03_tokenizer", {"device": "cuda:63"}, ["cuda:63"]),
        "no ids": ("04_tiger", {"data_path": data}, ["semantic IDs", "run 03_tokenizer"]),
        "ids of nowhere": ("04_tiger", {**both, "semantic_ids": str(folder / "nowhere")}, ["nowhere"]),
        "ids of another catalogue": ("04_tiger", {**both, "semantic_ids": str(other_ids(folder / "other"))}, ["1 items without codes", "item 200", "run 03_tokenizer"]),
        "heads that do not fit": ("04_tiger", {**both, "attn_dim": 30, "num_heads": 4}, ["attn_dim", "num_heads"]),
        "no data": ("03_tokenizer", {"data_path": str(folder / "nowhere")}, ["nowhere"]),
        "no column": ("03_tokenizer", {"data_path": data, "embedding_column": "sound"}, ["sound", "item_emb.parquet"]),
        "too many codes": ("03_tokenizer", {"data_path": data, "n_embed": 5000}, ["n_embed", "200"]),
        "no source": ("00_data", {"data_path": str(folder / "nowhere")}, ["nowhere", "data_path"]),
    }


NAMES = ["unknown name", "wrong type", "wrong bool", "wrong choice", "out of range", "both names", "alias by its own name", "contradiction", "no device", "no ids",
         "ids of nowhere", "ids of another catalogue", "heads that do not fit", "no data", "no column", "too many codes", "no source"]
ACCEPTED = {"overwrite false": ("04_tiger", {"overwrite": "false"}, "params.overwrite", "False"), "alias": ("04_tiger", {"n_epoch": 2, "clip": "0.5"}, "(params.epochs, params.grad_clip)", "(2, 0.5)"),
            "learning rate as text": ("04_tiger", {"learning_rate": "1e-3"}, "params.learning_rate", "0.001"), "yaml's no": ("04_tiger", {"precision": False}, "params.precision", "'no'")}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    "What the notebooks' cells say to all these parameters: ({name: answer}, folder of their runs)."
    folder = tmp_path_factory.mktemp("refusals")
    cases = refusals(folder)
    assert list(cases) == NAMES
    requests = [{"stage": stage, "params": {**params, "output_dir": str(folder / "runs" / name.replace(" ", "_"))}, "stop": "if not run.finished:"}
                for name, (stage, params, _) in cases.items()]
    requests += [{"stage": stage, "params": params, "stop": "params_from(globals()", "show": show} for stage, params, show, _ in ACCEPTED.values()]
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("cells.py")), str(NOTEBOOKS)], cwd=folder, env=environment(folder),
                          input=json.dumps(requests), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip([*cases, *ACCEPTED], json.loads(done.stdout.splitlines()[-1]), strict=True)), cases, folder


@pytest.mark.parametrize("name", NAMES)
def test_what_is_refused_before_anything_is_written(name, answers):
    said, cases, folder = answers
    assert said[name].get("error") in ("ParameterError", "InputError", "RunError"), said[name]
    for word in cases[name][2]:
        assert word in said[name]["message"]
    left = [p for p in (folder / "runs").rglob("*") if p.is_file()]
    assert not left, "nothing was written"


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_papermill_makes_of_values_is_undone(name, answers):
    assert answers[0][name] == {"value": ACCEPTED[name][3]}


def test_held_out_rows_among_the_training_rows_stop_the_training(tmp_path):
    class Leaky(Dataset):
        "Its training rows are all rows."

        def train_interactions(self):
            return self.all_rows_with_held_out().drop(columns="split")

    dataset, ids = Leaky.load(tiny("00_data")), SemanticIDs.load(tiny("03_tokenizer"))
    config = tiger_stage.TigerConfig(ids.sizes, 16, 16, 2, 32, 1, 1)
    with pytest.raises(LeakageError, match="among the training rows"):
        tiger_stage.train(dataset, ids, config, TrainSettings(device="cpu"), 50, "exact", 20, 1, tmp_path, {})
    assert not list(tmp_path.iterdir())
    with pytest.raises(LeakageError):
        tiger_stage.check_provenance(dataset.train_hash, Dataset.load(tiny("00_data")).train_hash, "popularity")
    assert torch.is_tensor(ids.codes())
