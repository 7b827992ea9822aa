"05_ctr: from a click log to predictions, and from the challenge's folder to its zip."
import json
import shutil

import pandas as pd
import pytest
import stage_runs

from recgen.clicks import training
from recgen.clicks.submission import read_submission
from recgen.core.errors import InputError, ParameterError, RunError
from recgen.core.run import Run
from recgen.evaluation.protocol import LeakageError
from recgen.formats.dataset import Dataset
from recgen.formats.provenance import Provenance
from recgen.sources.assemble import prepared_log
from recgen.sources.microlens import microlens_source
from recgen.sources.mmctr_writer import write_mmctr

SMALL = dict(epochs=1, vqvae_epochs=2, n_embed=16, tokens=4, code_dim=8, embedding_dim=4, attention=[8], mlp=[8], resamples=100, device="cpu")


def test_the_world_goes_through_and_is_reused(runs):
    names = stage_runs.run_stage("05_ctr", whole=True, **SMALL)
    run = names["run"]
    table = pd.read_parquet(run.folder / "results.parquet").set_index("run")
    assert {"no_history", "none", "vectors", "codes", "both", "user + item", "item mean", "history length", "target only", "global rate"} == set(table.index) - {"user mean", "possible"}
    assert table["auc"].idxmax() == "possible" and table.loc["possible", "leaky"] and names["table"].iloc[0]["run"] != "possible"
    assert table.loc["none", "auc"] > 0.5 and table.loc["global rate", "auc"] == 0.5 and set(table["split"]) == {"test"}
    told = pd.read_parquet(run.folder / "predictions.parquet")
    assert told["row_id"].is_unique and told["score"].between(0, 1).all() and set(told["part"]) == {"valid", "test"}
    assert {"item_codes.safetensors", "item_info.parquet", "EMB_world_data.parquet", "vqvae_embedding.pt"} <= set(run.manifest["outputs"]) and not (run.folder / "submission").exists()
    assert stage_runs.run_stage("05_ctr", **SMALL)["run"].folder == run.folder


def test_a_challenges_folder_becomes_its_zip(runs, tmp_path):
    write_mmctr(tmp_path / "mmctr", n_users=120, n_items=60, n_rows=900, n_tags=20, widths=(8, 8, 8))
    data = stage_runs.run_stage("00_data", data_path=str(tmp_path / "mmctr"))["run"].folder
    run = stage_runs.run_stage("05_ctr", data_path=str(data), study=False, **SMALL)["run"]
    test = pd.read_parquet(data / "impressions" / "test.parquet")
    told = read_submission(run.folder / "submission" / "prediction.zip")
    assert len(told) == len(test) and told["ID"].astype(int).tolist() == list(range(len(test))) and told.iloc[:, 1].between(0, 1).all()
    assert (run.folder / "submission" / "prediction.csv").read_text().startswith("ID,Task1&2\n")
    assert set(json.loads((run.folder / "manifest.json").read_text())["inputs"]) == {"data_path"}


def test_one_call_goes_from_the_download_to_the_zip(runs, tmp_path):
    write_mmctr(tmp_path / "mmctr", n_users=120, n_items=60, n_rows=900, n_tags=20, widths=(8, 8, 8))
    how = SMALL | dict(data_path=str(tmp_path / "mmctr"), study=False, embedding_column="text+image")
    first = stage_runs.run_stage("05_ctr", **how)["run"]
    assert len(read_submission(first.folder / "submission" / "prediction.zip")) and {"vqvae_text.pt", "vqvae_image.pt", "model.pt"} <= set(first.manifest["outputs"])
    assert stage_runs.run_stage("05_ctr", **how)["run"].folder == first.folder and len(list(runs.glob("mmctr/00_data/*/manifest.json"))) == 1
    again = {place: stage_runs.run_stage("05_ctr", **how | dict(codes=str(first.folder / place)))["run"] for place in ("", "EMB_mmctr_data.parquet")}  # codes that are there
    assert all(r.folder != first.folder and not list(r.folder.glob("vqvae*")) for r in again.values())
    assert again[""].manifest["metrics"]["codes/valid/auc"] == first.manifest["metrics"]["codes/valid/auc"]


@pytest.mark.parametrize("wrong, problem", [(dict(main="all"), "main"), (dict(vqvae="huge"), "vqvae"), (dict(embedding_column="sound"), "sound"), (dict(codes="nowhere"), "nowhere"), (dict(data_path="nowhere"), "nowhere"), (dict(n_embed=5000), "distinct"), (dict(main="prefixes"), "nothing to read"), (dict(codes="none"), "nothing to read"), (dict(attention=["a"]), "attention"), (dict(mlp=[0]), "mlp"), (dict(prefixes=[2.5]), "prefixes"), (dict(codes=" "), "codes"), (dict(embedding_column="text+text"), "twice"), (dict(precision="fp16"), "fp16"), (dict(dropout=2.0), "dropout")], ids=str)
def test_what_is_wrong_is_said(runs, wrong, problem):
    with pytest.raises((InputError, ParameterError), match=problem):
        stage_runs.run_stage("05_ctr", **SMALL | wrong)
    assert not list(runs.rglob("manifest.json"))


def test_semantic_ids_and_graph_vectors_stand_in_one_table(runs):
    data, ids, sage = (stage_runs.tiny(stage) for stage in ("00_data", "03_tokenizer", "02_graphsage"))
    how = SMALL | dict(data_path=str(data), semantic_ids=str(ids), embedding_column=f"embedding+{sage}:embedding", n_seeds=2, main="prefixes", seed=3)
    run = stage_runs.run_stage("05_ctr", whole=True, **how)["run"]
    table = pd.read_parquet(run.folder / "results.parquet").set_index("run")
    arms = ["no_history", "none", "vectors", "codes", "both", "semantic_ids", "prefixes"]
    assert set(arms) < set(table.index) and (table.loc[arms, "seeds"] == 2).all() and (table.loc[arms, "auc/sd"] > 0).all() and table.loc["ensemble", "seeds"] == 1
    assert {"vqvae_embedding.pt", "vqvae_02_graphsage_embedding.pt", "predictions_user_item.parquet"} <= set(run.manifest["outputs"])
    assert set(run.manifest["inputs"]) == {"data_path", "semantic_ids", "embedding_column 0"} and Provenance.read(run.folder).train_hashes == {"02_graphsage": Dataset.load(data).train_hash}
    one, two = (pd.read_parquet(run.folder / f"predictions_prefixes_seed{k}.parquet") for k in (3, 4))
    told = pd.read_parquet(run.folder / "predictions.parquet").query("part == 'test'").sort_values("row_id", ignore_index=True)
    assert told["score"].to_numpy() == pytest.approx((one["score"] + two["score"]).to_numpy() / 2) and not one["score"].equals(two["score"])


def other_ids(folder, provenance):
    "The tiny table of semantic IDs, as a run that declares something else."
    run = Run("03_tokenizer", {"mode": "kmeans", "output_dir": str(folder)}, {}, "tiny")
    for name in ("semantic_ids.parquet", "semantic_ids.json"):
        if (stage_runs.tiny("03_tokenizer") / name).exists():
            (run.folder / name).write_bytes((stage_runs.tiny("03_tokenizer") / name).read_bytes())
    provenance.write(run.folder)
    run.finish({})
    return str(run.folder)


def test_what_knows_held_out_rows_is_refused_or_marked(runs, tmp_path):
    data = str(stage_runs.tiny("00_data"))
    how = SMALL | dict(data_path=data, codes="none", main="none")
    with pytest.raises(LeakageError, match="02_graphsage"):
        stage_runs.run_stage("05_ctr", **how, semantic_ids=other_ids(tmp_path / "foreign", Provenance({"02_graphsage": "f" * 64})))
    run = stage_runs.run_stage("05_ctr", whole=True, **how, semantic_ids=other_ids(tmp_path / "leaky", Provenance({}, ["also_bought"])))["run"]
    table = pd.read_parquet(run.folder / "results.parquet").set_index("run")
    assert (table.loc[["semantic_ids", "prefixes"], "leaky"] == "also_bought").all() and table.loc["none", "leaky"] == "" and Provenance.read(run.folder).leaky == ["also_bought"]


def test_a_study_that_was_cut_off_goes_on(runs, tmp_path, monkeypatch):
    how = SMALL | dict(data_path=str(stage_runs.tiny("00_data")), codes="none", main="vectors", epochs=2)
    whole = stage_runs.run_stage("05_ctr", **how, output_dir=str(tmp_path / "whole"))["run"]
    epoch, done = training.Trainer.epoch, []

    def cut(self, *args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(self.fingerprint["arm"])
        return epoch(self, *args)

    monkeypatch.setattr(training.Trainer, "epoch", cut)
    with pytest.raises(KeyboardInterrupt):
        stage_runs.run_stage("05_ctr", **how, output_dir=str(tmp_path / "cut"))
    assert done == ["no_history", "no_history", "none"] and not (tmp_path / "cut" / "manifest.json").exists()
    done.clear()
    monkeypatch.setattr(training.Trainer, "epoch", lambda self, *args: (done.append(self.fingerprint["arm"]), epoch(self, *args))[1])
    again = stage_runs.run_stage("05_ctr", **how, output_dir=str(tmp_path / "cut"))["run"]
    assert done == ["none", "vectors", "vectors"]
    assert pd.read_parquet(again.folder / "results.parquet").equals(pd.read_parquet(whole.folder / "results.parquet"))
    assert pd.read_parquet(again.folder / "predictions.parquet").equals(pd.read_parquet(whole.folder / "predictions.parquet"))


@pytest.mark.slow
def test_two_processes_fill_the_same_folder(runs, tmp_path):
    how = SMALL | dict(data_path=str(stage_runs.tiny("00_data")), study=False, unknown_rate=0.0)
    one, two = (stage_runs.run_stage("05_ctr", **how, num_processes=n, output_dir=str(tmp_path / str(n)))["run"] for n in (1, 2))
    assert one.manifest["outputs"].keys() == two.manifest["outputs"].keys()
    assert one.manifest["metrics"]["codes/test/auc"] == pytest.approx(two.manifest["metrics"]["codes/test/auc"], abs=0.02)


@pytest.fixture(scope="module")
def challenge(tmp_path_factory):
    place = tmp_path_factory.mktemp("challenge")
    write_mmctr(place / "mmctr", n_users=120, n_items=60, n_rows=900, n_tags=20, widths=(8, 8, 8))
    with prepared_log(microlens_source(place / "mmctr")) as dataset:
        dataset.save(place / "data", "mmctr")
    return place / "data"


def broken(challenge, folder, part, change):
    "A copy of the dataset with one part changed."
    shutil.copytree(challenge, folder)
    file, info = folder / "impressions" / f"{part}.parquet", folder / "dataset.json"
    change(pd.read_parquet(file)).to_parquet(file)
    info.write_text(json.dumps({k: v for k, v in json.loads(info.read_text()).items() if k != "sha256"}))
    return str(folder)


def some_labels(f):
    return f.assign(label=[1.0] * (len(f) // 2) + [None] * (len(f) - len(f) // 2))


BAD = [("test", some_labels, {}, "some test rows"), ("train", lambda f: f.assign(label=["yes", "no"] * (len(f) // 2) + ["no"] * (len(f) % 2)), {}, "not numbers"), ("train", lambda f: f.assign(user_id=f.user_id + 2_000_000_000), {}, "not numbered"),
       ("valid", lambda f: f.assign(row_id=7), {}, "same row_id"), ("train", lambda f: f.assign(colour=-f.index - 1), {}, "categories"), ("train", lambda f: f, {"id_column": "nope"}, "nope"),
       ("train", lambda f: f, {"submission_column": "a,b"}, "header|column's name"), ("valid", lambda f: f.assign(label=0), {}, "one class")]


@pytest.mark.parametrize("part, change, how, problem", BAD, ids=[b[3] for b in BAD])
def test_bad_rows_are_refused_before_anything_is_written(runs, tmp_path, challenge, part, change, how, problem):
    data = broken(challenge, tmp_path / "data", part, change)
    with pytest.raises((InputError, ParameterError), match=problem):
        stage_runs.run_stage("05_ctr", data_path=data, study=False, embedding_column="text", **SMALL, **how, output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_a_run_reads_is_never_cleared_for_it(runs, tmp_path, challenge):
    data = tmp_path / "data"
    shutil.copytree(challenge, data)
    for place in (data, tmp_path):
        with pytest.raises(RunError, match="output_dir is, or holds"):
            stage_runs.run_stage("05_ctr", data_path=str(data), study=False, embedding_column="text", **SMALL, output_dir=str(place), overwrite=True)
    assert Dataset.load(data).n_items == 60 and (data / "impressions" / "train.parquet").exists()
