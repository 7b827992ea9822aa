"""01_hgt, 02_graphsage and 06_compare end to end: what they write, how their vectors go down the chain, what they refuse, and where a killed one ends."""
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from stage_runs import GRAPH_TINY, TINY, joined, manifest_of, outputs_of, run_stage, tiny, workplace
from test_bad_input import put, refused
from test_faults import kill_when, nothing_left_over, rerun

from recgen.core.errors import InputError, ParameterError
from recgen.core.files import read_torch
from recgen.core.run import hash_manifest
from recgen.evaluation.classification import BINARY
from recgen.evaluation.protocol import LeakageError
from recgen.formats.dataset import Dataset
from recgen.formats.embeddings import load_embeddings
from recgen.formats.provenance import Provenance
from recgen.stages.hgt import CSV_COLUMNS, HEARD, append_results

GRAPH_STAGES = ("01_hgt", "02_graphsage")
HGT = {**GRAPH_TINY["01_hgt"], "epochs": 2, "lightgcn_epochs": 0, "ease_l2": 0.0}  # what need not be good
SAGE = {**GRAPH_TINY["02_graphsage"], "epochs": 2, "lightgcn_epochs": 0, "ease_l2": 0.0}
NODE = {**HGT, "objective": "node", "results_file": ""}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "In-process stages are small: threads would only wait for each other."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def data() -> str:
    return str(tiny("00_data"))


def identity(folder: Path) -> str:
    "What a later run's manifest calls this run."
    return hash_manifest(manifest_of(folder))


def finite(numbers: dict) -> bool:
    return bool(np.isfinite([v for v in numbers.values() if not isinstance(v, str)]).all())


def changed(folder: Path, users=None, **files) -> str:
    "A copy of the tiny dataset with other users (None: none) and files, as if written by hand."
    shutil.copytree(tiny("00_data"), folder, ignore=shutil.ignore_patterns("manifest.json", "dataset.json", "logs", "impressions", "oracle*", ".*"))
    table = pd.read_parquet(folder / "users.parquet")
    (folder / "users.parquet").unlink()
    if users is not None:
        users(table).to_parquet(folder / "users.parquet")
    return str(put(folder, **files))


# --- what a run writes


@pytest.mark.parametrize("stage, own", [
    ("01_hgt", {"embed/tiny_hgt_user_emb.pt", "embed/tiny_hgt_product_emb.pt", "embed/ids.parquet", "graph.json", "tmp/tiny_hgt_model_0.pt", f"per_user_{HEARD}.parquet"}),
    ("02_graphsage", {"checkpoints/model_best.pt", "per_user_features alone.parquet"}),
])
def test_a_graph_stage_writes_vectors_of_every_item_and_the_ranks_of_every_user(stage, own):
    folder, dataset = tiny(stage), Dataset.load(tiny("00_data"))
    manifest = manifest_of(folder)
    common = {"item_emb.parquet", "provenance.json", "model.pt", "per_user.parquet", "results.parquet", "metrics.jsonl", "checkpoints/last.pt", "checkpoints/best.pt",
              "per_user_popularity.parquet", "per_user_item-kNN.parquet", "per_user_EASE.parquet", "per_user_LightGCN.parquet", "per_user_LightGCN's items.parquet"}
    assert common | own <= set(manifest["outputs"]) and manifest["inputs"] == {"data_path": identity(tiny("00_data"))}
    vectors = load_embeddings(folder, catalogue=dataset.items["item_id"]).vectors
    assert vectors.shape == (dataset.n_items, {"01_hgt": 32, "02_graphsage": 16}[stage]) and bool(vectors.isfinite().all()) and float(vectors.std(0).min()) > 0
    assert Provenance.read(folder) == Provenance({stage: dataset.train_hash})
    metrics, users = manifest["metrics"], pd.read_parquet(folder / "per_user.parquet")
    assert finite(metrics) and len(metrics) > 50
    assert users["user_id"].tolist() == dataset.test_rows_held_out()["user_id"].tolist() and users["target"].tolist() == dataset.test_rows_held_out()["item_id"].tolist()
    for variant, column in (("filtered", "rank_filtered"), ("unfiltered", "rank")):
        assert metrics[f"test/item/{variant}/recall@10"] == pytest.approx(users[column].between(1, 10).mean())
        for name in ("EASE", "LightGCN", "popularity"):
            ranks = pd.read_parquet(folder / f"per_user_{name}.parquet")[column]
            assert metrics[f"baseline/{name}/test/item/{variant}/recall@10"] == pytest.approx(ranks.between(1, 10).mean())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in lines] == list(range(1, GRAPH_TINY[stage]["epochs"] + 1)) and all(np.isfinite(r["loss"]) and np.isfinite(r["valid/loss"]) for r in lines)
    assert not any("test" in k for r in lines for k in r), "test is not looked at in training"
    text = outputs_of(workplace() / stage / f"{stage}.ipynb")
    assert "popularity" in text and str(workplace()) not in text, "what it shows is of no machine"


def test_the_vectors_of_01_are_those_of_its_items_and_users_in_order():
    folder, dataset = tiny("01_hgt"), Dataset.load(tiny("00_data"))
    users, items = (torch.load(folder / f"embed/tiny_hgt_{kind}_emb.pt", weights_only=True) for kind in ("user", "product"))
    assert users.shape == (dataset.n_users, 32) and items.shape == (dataset.n_items, 32) and users.dtype == items.dtype == torch.float32
    assert torch.equal(load_embeddings(folder).vectors, items)
    ids = pd.read_parquet(folder / "embed/ids.parquet").set_index("node")
    assert (ids["row"] == ids["id"] - 1).all() and ids.loc["product", "raw_id"].tolist() == dataset.items["raw_id"].tolist()
    assert ids.loc["user", "raw_id"].tolist() == dataset.users.sort_values("user_id")["raw_id"].tolist()
    ranks = pd.read_parquet(folder / "per_user.parquet").set_index("user_id")
    user = int(ranks.index[ranks["rank"] == 1][0])  # unfiltered, the item of the largest product is first
    assert int((items @ users[user - 1]).argmax()) + 1 == ranks.loc[user, "target"]


def test_node_labels_give_six_figures_a_csv_and_vectors_and_several_seeds_their_spread(tmp_path):
    given = {**NODE, "objective": "auto", "seed": "0 1", "data_path": data(), "results_file": str(tmp_path / "all.csv")}
    names = run_stage("01_hgt", whole=True, **given, output_dir=str(tmp_path / "both"))
    run = names["run"]
    assert names["objective"] == "node", "users of the world have labels"
    metrics, table = run.manifest["metrics"], pd.read_csv(run.path("results.csv"))
    assert list(table.columns) == list(CSV_COLUMNS) and table["method"].tolist() == ["embedding", "embedding", "features alone"] and table["seed"].tolist() == [0, 1, 0]
    assert finite(metrics) and table[list(BINARY)].apply(lambda c: c.between(0, 1)).all(axis=None)
    ours, best = table[table["method"] == "embedding"], metrics["train/best_seed"]
    for name in BINARY:
        assert metrics[f"seeds/test/{name}"] == pytest.approx(ours[name].mean(), abs=1e-5) and metrics[f"seeds/test/{name}/sd"] == pytest.approx(ours[name].std(ddof=1), abs=1e-5)
        assert metrics[f"test/{name}"] == pytest.approx(ours.set_index("seed").loc[best, name], abs=1e-5)
        assert metrics[f"baseline/features alone/test/{name}"] == pytest.approx(table[name].iloc[-1], abs=1e-5)
    values = {s: max(json.loads(line)["valid/roc"] for line in run.path(f"seed_{s}/metrics.jsonl").read_text().splitlines()) for s in (0, 1)}
    assert best == max(values, key=values.get) and metrics["train/best_value"] == pytest.approx(np.mean(list(values.values()))), "validation chooses the seed"
    assert run.path("checkpoints/best.pt").read_bytes() == run.path(f"seed_{best}/checkpoints/best.pt").read_bytes() == run.path(f"tmp/tiny_hgt_model_{best}.pt").read_bytes()
    assert load_embeddings(run.folder, catalogue=range(1, 201)).vectors.shape == (200, 32) and not run.path("per_user.parquet").exists()
    lone = run_stage("01_hgt", **{**given, "seed": "1"}, output_dir=str(tmp_path / "one"))["run"]
    assert not [k for k in lone.manifest["metrics"] if k.endswith("/sd")], "one seed has no spread"
    assert lone.manifest["metrics"]["test/roc"] == pytest.approx(ours["roc"].iloc[1], abs=1e-5), "a seed is the same alone and among others"
    appended = pd.read_csv(tmp_path / "all.csv")
    assert appended["seed"].tolist() == [0, 1], "what the file has is not added twice"


def test_several_seeds_of_links_give_mean_and_spread_of_the_ranking(tmp_path):
    runs = {s: run_stage("01_hgt", **{**HGT, "seed": s}, data_path=data(), output_dir=str(tmp_path / s.replace(" ", "_")))["run"] for s in ("0", "1", "0 1")}
    found = runs["0 1"].manifest["metrics"]
    each = {s: runs[s].manifest["metrics"] for s in ("0", "1")}
    name = "test/item/filtered/ndcg@10"
    pair = [m[name] for m in each.values()]
    assert pair[0] != pair[1] and found[f"seeds/{name}"] == pytest.approx(np.mean(pair)) and found[f"seeds/{name}/sd"] == pytest.approx(np.std(pair, ddof=1))
    best = str(found["train/best_seed"])
    assert found[name] == each[best][name] and each[best]["train/best_value"] == max(m["train/best_value"] for m in each.values())
    assert (runs["0 1"].folder / "item_emb.parquet").read_bytes() == (runs[best].folder / "item_emb.parquet").read_bytes(), "the vectors are the best seed's"


# --- the chain


QUICK_TIGER = {**TINY["04_tiger"], "epochs": 1, "sasrec_epochs": 0}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    "TIGER on IDs of text, and on IDs of text and both graphs' vectors, and their comparison: {name: folder}."
    folder = tmp_path_factory.mktemp("chain")
    both = f"embedding+{tiny('01_hgt')}:embedding+{tiny('02_graphsage')}:embedding"
    ids = run_stage("03_tokenizer", **TINY["03_tokenizer"], data_path=data(), embedding_column=both, output_dir=str(folder / "ids"))["run"].folder
    found = {"ids": ids}
    for name, codes in (("text", tiny("03_tokenizer")), ("both", ids)):
        found[name] = run_stage("04_tiger", **QUICK_TIGER, data_path=data(), semantic_ids=str(codes), output_dir=str(folder / name))["run"].folder
    given = dict(runs=f"text={found['text']},both={found['both']}", reference="text", baselines="none", resamples=200)
    found["compared"] = run_stage("06_compare", whole=True, **given, output_dir=str(folder / "compared"))["run"].folder
    return found


def test_both_graphs_vectors_reach_the_ids_and_are_recorded_all_the_way(chain):
    own = Dataset.load(tiny("00_data")).train_hash
    made = Provenance({stage: own for stage in GRAPH_STAGES})
    assert Provenance.read(chain["ids"]) == Provenance.read(chain["both"]) == made and Provenance.read(chain["text"]) == Provenance()
    inputs = manifest_of(chain["ids"])["inputs"]
    assert inputs == {"data_path": identity(tiny("00_data")), "embedding_column 0": identity(tiny("01_hgt")), "embedding_column 1": identity(tiny("02_graphsage"))}
    assert manifest_of(chain["ids"])["parameters"]["embedding_column"] == "embedding+0:embedding+1:embedding", "what, not where"
    assert (chain["ids"] / "semantic_id_mappings.json").read_bytes() != (tiny("03_tokenizer") / "semantic_id_mappings.json").read_bytes(), "the graph changes the IDs"
    assert manifest_of(chain["both"])["inputs"]["semantic_ids"] == identity(chain["ids"])


def test_the_comparison_is_the_paired_difference_of_the_two_tables_of_ranks(chain):
    table = pd.read_parquet(chain["compared"] / "comparison.parquet").set_index("run")
    assert set(table.index) == {"text", "both"} and table.loc["text", "embeddings"] == "text" and table.loc["both", "embeddings"] == "text + HGT + GraphSAGE"
    assert (table["leaky"] == "").all() and (table["lost"] == "").all() and (table["stage"] == "04_tiger").all()
    differences = pd.read_parquet(chain["compared"] / "differences.parquet")
    assert len(differences) == 8 and set(differences["run"]) == {"both"} and set(differences["reference"]) == {"text"}
    ranks = {name: pd.read_parquet(chain[name] / "per_user.parquet").set_index("user_id") for name in ("text", "both")}
    assert ranks["text"].index.equals(ranks["both"].index)
    for row in differences.itertuples():
        what, k = row.metric.split("@")
        column = {"filtered": "rank_filtered", "unfiltered": "rank"}[row.history]
        gain = {name: np.where(r[column].between(1, int(k)), 1.0 if what == "recall" else 1 / np.log2(1 + r[column].clip(lower=1)), 0.0) for name, r in ranks.items()}
        paired = gain["both"] - gain["text"]
        assert row.difference == pytest.approx(paired.mean(), abs=1e-12)
        assert row.value == pytest.approx(gain["both"].mean()) and row.reference_value == pytest.approx(gain["text"].mean())
        half = 1.96 * paired.std() / len(paired) ** 0.5
        assert row.low <= row.difference <= row.high and row.high - row.low == pytest.approx(2 * half, rel=0.25, abs=1e-9), "as wide as paired differences vary"
        assert row.clear == (row.low > 0 or row.high < 0)
        assert table.loc["both", f"{row.history}/{row.metric}"] == pytest.approx(manifest_of(chain["both"])["metrics"][f"test/item/{row.history}/{row.metric}"])


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    "Vectors of both graph stages from a relation that knows held-out rows: {stage: folder}."
    folder, name = tmp_path_factory.mktemp("leaky"), "item__also_bought__item"
    place = changed(folder / "data", lambda u: u, dataset__json='{"name": "tiny"}')  # the same rows; nothing vouches for the relation, as 00_data does for the world's
    return {"01_hgt": run_stage("01_hgt", **HGT, data_path=place, relations=name, output_dir=str(folder / "hgt"))["run"].folder,
            "02_graphsage": run_stage("02_graphsage", **SAGE, data_path=place, graph=name, output_dir=str(folder / "sage"))["run"].folder}


@pytest.mark.parametrize("stage, own", [("01_hgt", {"HGT", "HGT's items", HEARD}), ("02_graphsage", {"GraphSAGE"})])
def test_a_graph_that_knows_held_out_rows_marks_what_was_made_of_it_and_nothing_else(stage, own, leaky):
    assert Provenance.read(tiny(stage)).leaky == [] and set(pd.read_parquet(tiny(stage) / "results.parquet")["leaky"]) == {""}
    assert Provenance.read(leaky[stage]).leaky == ["also_bought"]
    table = pd.read_parquet(leaky[stage] / "results.parquet").set_index("model")["leaky"]
    assert set(table.index[table == "also_bought"]) == own and set(table) == {"", "also_bought"}


@pytest.mark.parametrize("stage", GRAPH_STAGES)
def test_vectors_that_know_held_out_rows_mark_the_graph_stage_that_reads_them(stage, leaky, tmp_path):
    other = leaky["02_graphsage" if stage == "01_hgt" else "01_hgt"]
    given = {**(HGT if stage == "01_hgt" else SAGE), "data_path": data(), "embedding_column": f"embedding + {other}:embedding"}
    run = run_stage(stage, **given, output_dir=str(tmp_path / "out"))["run"]
    assert Provenance.read(run.folder).leaky == ["also_bought"]
    assert run.manifest["inputs"]["embedding_column 0"] == identity(other) and str(other) not in json.dumps(run.manifest["parameters"])
    table = pd.read_parquet(run.path("results.parquet")).set_index("model")["leaky"]
    features = "features alone"
    assert table[features] == "also_bought" and table["popularity"] == table["item-kNN"] == "", "the features know them too, baselines of the log do not"
    Provenance({"elsewhere": "0" * 64}).write(put(tmp_path / "rows", item_emb__parquet=(other / "item_emb.parquet").read_bytes()))
    refused(lambda: run_stage(stage, **{**given, "embedding_column": f"{tmp_path / 'rows'}:embedding"}, output_dir=str(tmp_path / "no")), tmp_path, "elsewhere", LeakageError)


def test_a_leak_is_marked_in_the_ids_the_ranking_and_the_comparison(chain, leaky, tmp_path):
    settings = {**TINY["03_tokenizer"], "data_path": data()}
    ids = {s: run_stage("03_tokenizer", **settings, embedding_column=f"embedding+{place}:embedding", output_dir=str(tmp_path / s))["run"].folder for s, place in leaky.items()}
    assert all(Provenance.read(folder).leaky == ["also_bought"] for folder in ids.values())
    tiger = run_stage("04_tiger", **QUICK_TIGER, data_path=data(), semantic_ids=str(ids["01_hgt"]), output_dir=str(tmp_path / "tiger"))["run"].folder
    table = pd.read_parquet(tiger / "results.parquet").set_index("model")["leaky"]
    assert table["TIGER"] == "also_bought" and table["popularity"] == "" and Provenance.read(tiger).leaky == ["also_bought"]
    given = dict(runs=f"text={chain['text']},leaky={tiger},sage={leaky['02_graphsage']},hgt={tiny('01_hgt')}", baselines="none", resamples=100)
    names = run_stage("06_compare", whole=True, **given, output_dir=str(tmp_path / "compared"))
    rows = names["table"].set_index("run")["leaky"]
    assert rows.to_dict() == {"text": "", "hgt": "", "leaky": "also_bought", "sage": "also_bought"} and set(rows.index[2:]) == {"leaky", "sage"}, "after those that may be compared"
    assert names["reference"] == "text" and "2 of 4 runs know held-out rows" in names["finding"](names["table"], names["differences"], "ndcg@10")
    refused(lambda: run_stage("06_compare", **{**given, "reference": "leaky"}, output_dir=str(tmp_path / "no")), tmp_path, "cannot be the reference", ParameterError)


# --- what 01_hgt refuses


def lone_minority(users):
    "A single training user of class 1."
    ones = users.index[(users["label"] == 1) & (users["split"] == "train")][1:]
    return users.assign(label=users["label"].mask(users.index.isin(ones), 0))


def with_nan(users):
    return users.assign(features=[[np.nan, *x[1:]] if i in (3, 7) else x for i, x in enumerate(users["features"])])


FEW_ITEMS = pd.DataFrame({"ItemID": range(1, 190), "embedding": list(np.random.default_rng(0).normal(size=(189, 4)).astype(np.float32))})
MORE_ITEMS = pd.DataFrame({"ItemID": range(1, 202), "embedding": list(np.random.default_rng(0).normal(size=(201, 4)).astype(np.float32))})


@pytest.mark.parametrize("given, problem, parts", [
    pytest.param({"relations": "item__likes__item"}, "no such relation", dict(column="relations", found="item__likes__item", expected="item__also_bought__item"), id="relation"),
    pytest.param({"attributes": "brand colour"}, "no such column", dict(file="items.parquet", column="colour", found="brand"), id="attribute"),
    pytest.param({"drop_features": "99"}, "cannot be dropped", dict(column="drop_features", found="99", expected="0 … 8"), id="feature to drop"),
    pytest.param({"embedding_column": "sound"}, "a column is missing", dict(file="item_emb.parquet", column="sound"), id="column"),
    pytest.param({"embedding_column": "nowhere:embedding"}, "there is no file", dict(file="nowhere"), id="folder"),
    pytest.param({"data_path": "nowhere"}, "there is no dataset folder", dict(file="nowhere", mend="00_data"), id="dataset"),
    pytest.param({"hidden": 30, "n_heads": 4}, "there is no such model", dict(column="n_heads", found="30, 2, 4", expected="heads can share"), id="width and heads"),
    pytest.param({"batch": "sampled", "fanout": "5"}, "a fan-out for each layer", dict(column="fanout", found="'5'", expected="2 numbers"), id="too few fan-outs"),
    pytest.param({"batch": "sampled", "fanout": "5 0"}, "a fan-out for each layer", dict(column="fanout", found="'5 0'", expected="from 1"), id="fan-out of none"),
    pytest.param({"batch": "sampled", "sampling": "hgsampling", "fanout": "-1 5"}, "HGSampling takes a number", dict(column="fanout", found="'-1 5'"), id="all nodes"),
    pytest.param({"objective": "node", "setting": "smote", "ratio": 0.4, "user_features": "learned"}, "SMOTE draws between features", dict(column="setting", mend="oversampling"),
                 id="SMOTE without features"),
    pytest.param({"device": "cuda:99"}, "there is no device 'cuda:99'", dict(column="device", found="cuda:99", expected="cpu"), id="device"),
    *(pytest.param({name: value}, "not allowed", dict(column=name, found=value), id=f"{name} {value}")
      for name, value in (("ratio", 1.0), ("ratio", -0.1), ("hide", 0.0), ("hide", 1.0), ("dropout", 0.95), ("attention", "global"), ("loss", "hinge"), ("epochs", 0),
                          ("seed", "one two"), ("seed", "1.5"), ("seed", "3 3"), ("seed", "-1"), ("seed", ""), ("seed", "9" * 30), ("fanout", "ten"), ("fanout", ""),
                          ("objective", "nodes"))),
    pytest.param({"epochs": "many"}, "wrong type", dict(column="epochs", found="'many'"), id="epochs many"),
])
def test_what_01_refuses_before_it_writes(given, problem, parts, runs, tmp_path):
    refused(lambda: run_stage("01_hgt", **{**HGT, "data_path": data(), **given}), tmp_path, problem, **parts)


@pytest.mark.parametrize("objective, users, problem, parts", [
    pytest.param("link", with_nan, "NaN", dict(file="users.parquet", column="features", rows="user 4, user 8", found="2 such"), id="features with NaN"),
    pytest.param("link", lambda u: u.assign(features=[x[:2] if i == 5 else x for i, x in enumerate(u["features"])]), "different lengths", dict(column="features", rows="user 6"),
                 id="ragged features"),
    pytest.param("link", lambda u: u.iloc[:-2], "users have no features", dict(column="user_id", rows="user 299, user 300"), id="users without a row"),
    pytest.param("node", lambda u: u.drop(columns="label"), "a column is missing", dict(file="users.parquet", column="label", mend="objective=link"), id="no labels"),
    pytest.param("node", None, "needs labels of users", dict(file="users.parquet", mend="objective=link"), id="no users"),
    pytest.param("node", lambda u: u.assign(label=u["label"].clip(upper=0)), "labels of one class in train", dict(column="label", found="[0]"), id="one class"),
    pytest.param("node", lambda u: u.assign(label=u["label"].mask(u["split"] == "valid", -1)), "no user with a label in valid", dict(column="label", rows="split valid"),
                 id="no validation"),
    pytest.param("node", lambda u: u.assign(label=u["label"].replace(1, 2)), "a label is not allowed", dict(column="label", found="2", expected="0, 1"), id="three"),
    pytest.param("node", lambda u: u.assign(split=u["split"].replace("test", "final")), "a split is not allowed", dict(column="split", found="'final'", expected="valid, test"),
                 id="split"),
    pytest.param("node", lone_minority, "SMOTE needs two minority users", dict(column="label", found="1 in train", mend="oversampling"), id="one user of a class"),
])
def test_users_that_01_cannot_learn_from(objective, users, problem, parts, runs, tmp_path):
    folder = changed(tmp_path / "data", users)
    refused(lambda: run_stage("01_hgt", **{**HGT, "objective": objective, "setting": "smote", "ratio": 0.4, "data_path": folder}), tmp_path, problem, **parts)


@pytest.mark.parametrize("table, words", [
    pytest.param(FEW_ITEMS, ["other items", "item 190", "11 items without a vector"], id="fewer"),
    pytest.param(MORE_ITEMS, ["other items", "item 201", "1 vectors without an item"], id="more"),
])
@pytest.mark.parametrize("stage", GRAPH_STAGES)
def test_vectors_of_other_items_in_another_folder(stage, table, words, runs, tmp_path):
    place = put(tmp_path / "vectors", item_emb__parquet=table)
    given = {**(HGT if stage == "01_hgt" else SAGE), "data_path": data(), "embedding_column": f"embedding+{place}:embedding"}
    refused(lambda: run_stage(stage, **given), tmp_path, words[0], says=words, file="item_emb.parquet", column="ItemID", mend="the same dataset folder")


def test_a_results_file_of_something_else_is_refused_before_anything_is_trained(runs, tmp_path):
    place = put(tmp_path / "other", notes__csv="a,b\n1,2\n")
    for path, problem in ((place / "notes.csv", "other columns"), (place, "is a folder")):
        given = {**NODE, "data_path": data(), "results_file": str(path)}
        refused(lambda given=given: run_stage("01_hgt", **given), tmp_path, problem, file=path.name, column="results_file", mend="another results_file")


def test_rows_that_a_stopped_run_has_added_are_not_added_again(tmp_path):
    row = {"method": "smote", "seed": 1, "ratio": 0.1, **dict.fromkeys(BINARY, 0.25)}
    for rows in ([row], [row, {**row, "seed": 2}], [row]):
        append_results(tmp_path / "all.csv", rows)
    assert pd.read_csv(tmp_path / "all.csv")["seed"].tolist() == [1, 2]
    (tmp_path / "cut.csv").write_text((tmp_path / "all.csv").read_text().rstrip("\n"))  # as some editors leave it
    append_results(tmp_path / "cut.csv", [{**row, "seed": 3}])
    assert pd.read_csv(tmp_path / "cut.csv")["seed"].tolist() == [1, 2, 3]


# --- what 06_compare refuses


@pytest.mark.parametrize("given, problem, parts", [
    pytest.param({"runs": "text={text},both=nowhere"}, "no such run folder", {}, id="folder missing"),
    pytest.param({"runs": "text={text},both={both}/none*"}, "there is no such run folder", dict(column="runs"), id="wildcard of nothing"),
    pytest.param({"runs": "same={text},same={both}"}, "runs of one name differ", dict(column="runs", found="same", mend="a name of its own"), id="one name for two"),
    pytest.param({"runs": "text={text},again={text}"}, "a run is given twice", dict(column="runs", mend="once"), id="one run twice"),
    pytest.param({"runs": "text={text},data={data}"}, "the run ranked no users", dict(file="per_user.parquet", found="00_data"), id="a dataset"),
    pytest.param({"reference": "graph"}, "no such run to compare with", dict(column="reference", found="graph", expected="text, both"), id="reference"),
    pytest.param({"baselines": "SASRec"}, "no run has such a baseline", dict(column="baselines", found="SASRec", expected="popularity"), id="baseline"),
])
def test_what_06_refuses_before_it_writes(given, problem, parts, chain, runs, tmp_path):
    given = {"runs": "text={text},both={both}", "baselines": "none", **given}
    given["runs"] = given["runs"].format(data=tiny("00_data"), **chain)
    refused(lambda: run_stage("06_compare", **given), tmp_path, problem, kind=(InputError, ParameterError), **parts)


@pytest.mark.parametrize("positions, problem, parts", [
    pytest.param([0], "runs on different data", dict(column="train_hash", found="there", expected="text"), id="training"),
    pytest.param([-1], "different users or targets", {}, id="test"),
])
def test_runs_on_other_rows_under_one_name_are_refused(positions, problem, parts, chain, runs, tmp_path):
    log = pd.read_parquet(tiny("00_data") / "interactions.parquet").sort_values(["user_id", "position"])
    row = log.index[log["user_id"] == 7][positions]  # of one user, another first (training) or last (test) item
    log.loc[row, "item_id"] = log.loc[row, "item_id"] % 200 + 1
    other = changed(tmp_path / "data", dataset__json='{"name": "tiny"}', interactions__parquet=log)
    there = run_stage("02_graphsage", **SAGE, data_path=other, output_dir=str(tmp_path / "there"))["run"].folder
    refused(lambda: run_stage("06_compare", runs=f"text={chain['text']},there={there}", baselines="none"), tmp_path, problem, **parts)


# --- killed


def same_results(folder: Path, stage: str):
    "Every output and figure of the undisturbed run, bit for bit."
    mine, other = manifest_of(folder), manifest_of(tiny(stage))
    for name in ("item_emb.parquet", "per_user.parquet"):
        assert (folder / name).read_bytes() == (tiny(stage) / name).read_bytes(), name
    assert mine["outputs"] == other["outputs"] and mine["metrics"] == other["metrics"] and mine["hash"] == other["hash"]
    nothing_left_over(folder)


@pytest.mark.slow
@pytest.mark.parametrize("stage", GRAPH_STAGES)
def test_a_graph_stage_killed_in_training_goes_on_and_ends_as_if_undisturbed(stage, tmp_path):
    tiny(stage)  # undisturbed, before anything is killed
    params = joined(stage)
    folder = kill_when("metrics.jsonl", stage, tmp_path, **params)  # after the first epoch
    last = folder / "checkpoints" / "last.pt"
    trained = read_torch(last)["position"]["epoch"] if last.exists() else 0
    assert not (folder / "item_emb.parquet").exists(), "it was killed in training"
    rerun(stage, tmp_path, **params)
    printed = outputs_of(tmp_path / f"{stage}.ipynb")
    assert not trained or "Epoch 1/" not in printed and "Epoch 1:" not in printed, "it went on, it did not begin again"
    same_results(folder, stage)


@pytest.mark.slow
def test_01_killed_twice_while_it_writes_its_results_ends_as_if_undisturbed(tmp_path):
    tiny("01_hgt")  # undisturbed, before anything is killed
    params = joined("01_hgt")
    folder = kill_when("item_emb.parquet", "01_hgt", tmp_path, **params)  # the vectors are there, nothing is evaluated
    kill_when("per_user.parquet", "01_hgt", tmp_path, **params)  # the first table of ranks is there
    rerun("01_hgt", tmp_path, **params)
    same_results(folder, "01_hgt")
