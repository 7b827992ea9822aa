"""04_tiger as a whole: what it leaves with every option, the baselines beside it, the original's names, and what it refuses."""
import json

import pandas as pd
import pytest
import torch
from stage_runs import NOTEBOOKS, TINY, manifest_of, run_stage, tiny

from recgen.core.errors import InputError, ParameterError
from recgen.core.params import check_values, read_declarations
from recgen.evaluation.evaluator import evaluate_scores
from recgen.evaluation.protocol import cases_from_dataset
from recgen.formats.dataset import Dataset
from recgen.retrieval.recommender import Recommender
from recgen.retrieval.sasrec import SasRec
from recgen.retrieval.transformer import Tiger
from recgen.stages import tiger as stage

SMALL = {**TINY["04_tiger"], "device": "cpu", "sasrec_dim": 16, "sasrec_epochs": 2}


def whole(folder, **params):
    "A run on the tiny world with everything that it shows."
    given = {"data_path": str(tiny("00_data")), "semantic_ids": str(tiny("03_tokenizer"))} | SMALL | params
    return run_stage("04_tiger", whole=True, output_dir=str(folder), **given)


@pytest.mark.slow
def test_every_option_at_once(tmp_path):
    names = whole(tmp_path / "run", separator=True, num_user_embeddings=20, augmentation="subsample", gradient_accumulate_every=2, encoder_layers=2, decoder_layers=1, max_seq_len=17,
                  precision="bf16", path="beam", scheduler="inverse_sqrt", dropout=0.0)
    config = Tiger.load_from_checkpoint(tmp_path / "run" / "model.pt").config
    assert (config.separator, config.num_user_embeddings, config.encoder_layers, config.decoder_layers, config.dropout) == (True, 20, 2, 1, 0.0)
    assert config.max_history == (17 - 1) // (len(config.sizes) + 1) and config.n_tokens == 1 + sum(config.sizes) + 1 + 20
    assert set(names["table"].index) == {"TIGER", "item-kNN", "popularity", "SASRec", "TIGER + SASRec"}
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(r["valid/loss"] > 0 for r in records)
    recommender = Recommender.load(tmp_path / "run", device="cpu")
    with pytest.raises(InputError, match="users"):
        recommender.recommend([[1, 2]], 3)
    assert len(recommender.recommend([[1, 2]], 3, users=[5])) == 3


def test_the_dense_baseline_is_judged_as_what_was_saved():
    folder, dataset = tiny("04_tiger"), Dataset.load(tiny("00_data"))
    cases, metrics = cases_from_dataset(dataset, "test"), manifest_of(folder)["metrics"]
    dense = SasRec.load_from_checkpoint(folder / "sasrec.pt").eval()
    again = evaluate_scores(dense.scores, cases, "SASRec")
    assert again.metrics["test/item/filtered/ndcg@10"] == pytest.approx(metrics["baseline/SASRec/test/item/filtered/ndcg@10"])
    saved = pd.read_parquet(folder / "per_user_SASRec.parquet")
    assert saved["rank_filtered"].tolist() == again.per_user["rank_filtered"].tolist()
    together = pd.read_parquet(folder / "per_user_TIGER + SASRec.parquet")
    assert together["user_id"].tolist() == saved["user_id"].tolist() and together["target"].tolist() == saved["target"].tolist()
    lines = (folder / "sasrec" / "metrics.jsonl").read_text().splitlines()
    assert metrics["baseline/TIGER + SASRec/weight"] in [i / 10 for i in range(11)]
    assert max(json.loads(line).get("valid/item/filtered/ndcg@10", 0) for line in lines) > 0


def test_what_is_served_is_what_was_judged():
    folder, dataset = tiny("04_tiger"), Dataset.load(tiny("00_data"))
    cases = cases_from_dataset(dataset, "test")
    recommender = Recommender.load(folder, device="cpu")
    assert recommender.beams == 20 and recommender.weight == manifest_of(folder)["metrics"]["baseline/TIGER + SASRec/weight"]
    judged = pd.read_parquet(folder / "per_user_TIGER + SASRec.parquet")
    served = recommender.recommend(cases.history, 10, users=cases.users.numpy(), ensemble=True)
    hit = served.merge(judged.drop(columns="rank"), left_on=["user", "item_id"], right_on=["user_id", "target"])
    top = judged[(judged["rank_filtered"] > 0) & (judged["rank_filtered"] <= 10)]
    repeats = {u for u, h, t in zip(cases.users.tolist(), cases.history.tolist(), cases.targets.tolist(), strict=True) if t in h}
    assert set(hit["user"]) == set(top["user_id"]) - repeats and (hit["rank"] <= hit["rank_filtered"]).all() and len(top) > 3
    lists = pd.read_parquet(folder / "recommendations.parquet")
    alone = Recommender.load(folder, device="cpu", beams=10_000).recommend(cases.history, 10, users=cases.users.numpy())
    assert (alone["item_id"].to_numpy() == lists["item_id"].to_numpy()).mean() > 0.99, "the table's lists, scored exactly, are those of a search that drops nothing"


def test_without_epochs_there_is_no_dense_model(tmp_path):
    names = run_stage("04_tiger", data_path=str(tiny("00_data")), semantic_ids=str(tiny("03_tokenizer")), output_dir=str(tmp_path / "run"), **{**SMALL, "sasrec_epochs": 0, "epochs": 1})
    assert set(names["results"]) == {"TIGER", "item-kNN", "popularity"} and not (tmp_path / "run" / "sasrec.pt").exists()
    with pytest.raises(InputError, match="dense"):
        Recommender.load(tmp_path / "run", device="cpu").recommend([[1]], 2, ensemble=True)


def test_a_tokenizers_checkpoint_stands_for_the_table_beside_it(tmp_path):
    folder = tiny("03_tokenizer")
    assert stage.table_place(str(folder / "final_model.pt")) == folder == stage.table_place(str(folder / "checkpoints" / "x.pt"))
    assert stage.table_place(str(folder)) == folder
    with pytest.raises(InputError, match="no table of semantic IDs beside"):
        stage.table_place(str(tmp_path / "checkpoint_299999.pt"))


CELLS = json.loads((NOTEBOOKS / "04_tiger.ipynb").read_text())["cells"]
DECLARED = read_declarations("".join(next(c for c in CELLS if "parameters" in c["metadata"].get("tags", []))["source"]))
GUIDE = {"epochs": 5000, "learning_rate": "3e-4", "batch_size": 256, "weight_decay": 0.035, "embedding_dim": 128, "attn_dim": 512, "dropout": 0.3, "num_heads": 8, "n_layers": 8,
         "max_seq_len": 512, "num_item_embeddings": 256, "num_user_embeddings": 2000, "sem_id_dim": 3, "pretrained_rqvae_path": "out/checkpoint_299999.pt", "dataset_folder": "my_dataset",
         "save_dir_root": "my_tiger_output/", "wandb_logging": True, "wandb_project": "mine", "wandb_log_interval": 100, "gradient_accumulate_every": 4, "mixed_precision_type": "fp16"}


def given(**values):
    class Values(dict):
        __getattr__ = dict.__getitem__

        def as_dict(self):
            return dict(self)

    return Values(check_values(values, DECLARED, stage.RULES, stage.ALIASES))


def test_the_guides_configuration_is_taken():
    p = given(**GUIDE)
    assert (p.semantic_ids, p.data_path, p.output_dir) == ("out/checkpoint_299999.pt", "my_dataset", "my_tiger_output/")
    config = stage.model_config(p, [256] * 3)
    assert (config.embedding_dim, config.attn_dim, config.num_heads, config.encoder_layers, config.decoder_layers, config.dropout) == (128, 512, 8, 4, 4, 0.3)
    assert config.max_history == 511 // 3 and config.num_user_embeddings == 2000
    assert (p.project, p.log_interval, p.precision, p.gradient_accumulate_every) == ("mine", 100, "fp16", 4)


@pytest.mark.parametrize("preset, layers, d, ff", [("demo", 2, 64, 128), ("small", 4, 128, 512), ("tiger", 8, 128, 1024), ("recipe", 12, 128, 1024)])
def test_presets_and_what_wins(preset, layers, d, ff):
    config = stage.model_config(given(preset=preset), [8, 8])
    assert (config.encoder_layers + config.decoder_layers, config.embedding_dim, config.ff_dim) == (layers, d, ff)
    changed = stage.model_config(given(preset=preset, n_layers=3, dropout=0, embedding_dim=32), [8, 8])
    assert (changed.encoder_layers, changed.decoder_layers, changed.dropout, changed.embedding_dim, changed.ff_dim) == (1, 2, 0.0, 32, ff)


def test_wandb_logging_joins_the_other_trackers(monkeypatch):
    monkeypatch.setattr(stage, "tracker_names", lambda names: names)
    assert stage.train_settings(given(wandb_logging=True)).report_to == "wandb"
    assert stage.train_settings(given(wandb_logging=True, report_to="tensorboard")).report_to == "tensorboard,wandb"
    assert stage.train_settings(given(report_to="mlflow")).report_to == "mlflow"


@pytest.mark.parametrize("params, kind, says", [
    (dict(preset="huge"), ParameterError, "preset"),
    (dict(n_layers=1), ParameterError, "n_layers"),
    (dict(dropout=-0.5), ParameterError, "dropout"),
    (dict(augmentation="shuffle"), ParameterError, "augmentation"),
    (dict(sasrec_dim=33), ParameterError, "sasrec_dim"),
    (dict(compile="maybe"), ParameterError, "compile"),
    (dict(epochs=1, n_epoch=2), ParameterError, "two names of one parameter"),
])
def test_values_that_are_not_allowed(params, kind, says):
    with pytest.raises(kind, match=says):
        given(**params)


@pytest.mark.parametrize("params, kind, says", [
    (dict(sem_id_dim=4), InputError, "another shape than asked for"),
    (dict(num_item_embeddings=256), InputError, "another shape than asked for"),
    (dict(max_seq_len=2), InputError, "no item fits"),
    (dict(report_to="excel"), ParameterError, "no such tracker"),
    (dict(precision="fp16"), ParameterError, "fp16 needs a CUDA"),
])
def test_what_is_refused_before_a_folder_is_touched(runs, params, kind, says):
    if torch.cuda.is_available() and "precision" in params:
        pytest.skip("this machine has what is refused")
    with pytest.raises(kind, match=says):
        run_stage("04_tiger", data_path=str(tiny("00_data")), semantic_ids=str(tiny("03_tokenizer")), **{**SMALL, **params})
    assert not list(runs.iterdir())
