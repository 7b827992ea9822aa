"05_ctr: from a click log to predictions, and from the challenge's folder to its zip."
import json

import pandas as pd
import pytest
import stage_runs

from recgen.clicks.submission import read_submission
from recgen.core.errors import InputError, ParameterError
from recgen.sources.mmctr_writer import write_mmctr

SMALL = dict(epochs=1, vqvae_epochs=2, n_embed=16, tokens=4, code_dim=8, embedding_dim=4, attention=[8], mlp=[8], resamples=100, device="cpu")


def test_the_world_goes_through_and_is_reused(runs):
    names = stage_runs.run_stage("05_ctr", whole=True, **SMALL)
    run = names["run"]
    table = pd.read_parquet(run.folder / "results.parquet").set_index("run")
    assert {"none", "vectors", "codes", "both", "user + item", "item mean", "history length", "target only", "global rate"} == set(table.index) - {"user mean"}
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


@pytest.mark.parametrize("wrong, problem", [(dict(main="all"), "main"), (dict(vqvae="huge"), "vqvae"), (dict(modalities=["sound"]), "sound"), (dict(codes="nowhere"), "nowhere"), (dict(data_path="nowhere"), "nowhere"), (dict(n_embed=5000), "distinct"), (dict(dropout=2.0), "dropout")], ids=str)
def test_what_is_wrong_is_said(runs, wrong, problem):
    with pytest.raises((InputError, ParameterError), match=problem):
        stage_runs.run_stage("05_ctr", **SMALL | wrong)
    assert not list(runs.rglob("manifest.json"))
