"""06_compare on runs of 05_ctr: their arms, seeds and baselines as rows, what each knew, and what may not stand together."""
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import stage_runs
from stage_runs import run_stage

from recgen.core.errors import InputError, ParameterError
from recgen.core.files import read_parquet, write_json, write_parquet
from recgen.core.lineage import lineage
from recgen.core.run import Run
from recgen.evaluation.click_comparison import ClickComparison, all_click_differences, click_comparison, click_metric
from recgen.evaluation.clicks import ClickResult, click_table, compare_clicks
from recgen.evaluation.comparison import finding, gains, grouped, of_metric, reference_of
from recgen.evaluation.evaluator import EvaluationResult
from recgen.evaluation.origins import describe_arm, reads_of_arm
from recgen.formats.provenance import Provenance
from recgen.sources.assemble import save_world, world_parts
from recgen.stages.compare import metric_of, read_arms, read_entries

BASELINES = {"item mean": 0.1, "user + item": 0.25}


def scored(signal, seed=0, rows=1200, users=150, label_seed=7, first=1):
    "Rows of clicks, and scores that know their logits as far as `signal` says."
    draws = np.random.default_rng(label_seed)
    user, logit = draws.integers(1, users + 1, rows), draws.normal(-1, 1.2, rows)
    label = (draws.random(rows) < 1 / (1 + np.exp(-logit))).astype(int)
    own = signal * logit + (1 - signal) * np.random.default_rng(seed).normal(-1, 1.2, rows)
    return pd.DataFrame({"row_id": range(first, first + rows), "user_id": user, "label": label, "score": 1 / (1 + np.exp(-own))})


def dataset(folder, clicks=((1, 2, 1), (2, 1, 0)), train_hash="4f1c"):
    "A dataset folder as far as a comparison looks into it."
    run = Run("00_data", {"overwrite": True}, {}, "shop", folder)
    write_json(run.path("dataset.json"), {"name": "shop", "train_hash": train_hash, "n_items": 3, "split": {"rule": "leave_one_out"}})
    write_parquet(run.path("items.parquet"), pd.DataFrame({"item_id": [1, 2, 3]}))
    table = pd.DataFrame(clicks, columns=["user_id", "item_id", "label"]).assign(row_id=lambda t: range(len(t)), item_seq=[[1]] * len(clicks))
    write_parquet(run.path("impressions/train.parquet"), table)
    run.finish()
    return run.folder


def click_run(folder, inputs=None, arms=("none", "vectors", "codes", "both"), leaky=None, split="test", told=None, baselines=None, files=None, results=None, name="shop", **params):
    "A folder as 05_ctr leaves it; with several seeds each arm has a file a seed, and one row."
    p = {"overwrite": True, "embedding_column": "embedding", "codes": "vqvae", "vqvae": "default", "tokens": 16, "n_embed": 64, "main": "codes", "n_seeds": 1, "seed": 0, "history": "attention", "epochs": 3, **params}
    run = Run("05_ctr", p, inputs, name, folder)
    models = results if results is not None else {a: [ClickResult(scored(0.3 + 0.06 * i, 10 * i + p["seed"] + k), a, split, (leaky or {}).get(a, "")) for k in range(p["n_seeds"])] for i, a in enumerate(arms)}
    models |= {n: [ClickResult(scored(s, 99), n, split)] for n, s in (BASELINES if baselines is None else baselines).items()}
    write_parquet(run.path("results.parquet"), pd.DataFrame(click_table(models, resamples=20)))
    for label, group in models.items():
        for k, result in enumerate(group):
            own = label if len(group) == 1 else f"{label} seed{p['seed'] + k}"
            write_parquet(run.path(f"predictions_{(files or {}).get(own, own.replace(' + ', '_').replace(' ', '_'))}.parquet"), result.per_row)
    metrics = {f"{n}/{split}/auc": sum(r.metrics[f"{split}/auc"] for r in g) / len(g) for n, g in models.items()}
    run.finish({**metrics, **(told or {})})
    return run.folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Two datasets of one name, vectors of a graph stage that knew test purchases, semantic IDs, and click runs."
    place = tmp_path_factory.mktemp("clicks") / "shop"
    data = dataset(place / "data")
    hgt = Run("01_hgt", {"overwrite": True, "seed": 3}, {"data_path": data}, "shop", place / "hgt")
    Provenance({"01_hgt": "4f1c"}, ["also_bought"]).write(hgt.folder)
    write_parquet(hgt.path("per_user.parquet"), pd.DataFrame({"user_id": [1, 2], "target": 1, "rank": 1, "rank_filtered": 1}))
    hgt.finish()
    ids = Run("03_tokenizer", {"overwrite": True, "mode": "kmeans", "n_layers": 3, "n_clusters": 32, "embedding_column": "embedding"}, {"data_path": data}, "shop", place / "ids")
    ids.finish()
    for seed in (0, 1):
        click_run(place / f"a_{seed}", {"data_path": data}, seed=seed)
    click_run(place / "wide", {"data_path": data}, n_embed=128)
    click_run(place / "graph", {"data_path": data, "embedding_column 0": hgt.folder}, embedding_column="embedding + 01_hgt_embedding")
    click_run(place / "ids_too", {"data_path": data, "semantic_ids": ids.folder}, arms=("no_history", "none", "codes", "semantic_ids", "prefixes"), n_seeds=2)
    return place.rename(place.with_name("moved"))  # so that copies find their own inputs, not these


@pytest.fixture
def shop(built, tmp_path):
    "A copy of it to change."
    return Path(shutil.copytree(built, tmp_path / "shop"))


def refused(call, *words):
    with pytest.raises(InputError) as e:
        call()
    assert all(w in str(e.value) for w in words), str(e.value)


# --- which rows


def test_every_arm_is_a_row_and_the_plain_one_comes_first(built):
    entries = read_entries(f"A={built}/a_0", "none")
    assert [e.label for e in entries] == ["A/none", "A/vectors", "A/codes", "A/both"] and reference_of(grouped(entries), "") == "A/none"
    assert entries[0].result.per_row.equals(scored(0.3, 0).sort_values("row_id", ignore_index=True)) and entries[0].result.split == "test"
    assert [e.facts["tokenizer"] for e in entries] == ["", "raw", "VQ-VAE 16 × 64", "raw + VQ-VAE 16 × 64"] and {e.facts["embeddings"] for e in entries[1:]} == {"text"}


def test_one_arm_of_each_run_is_called_after_the_run(built):
    assert [e.label for e in read_entries(f"small={built}/a_0,wide={built}/wide", "none", ["codes"])] == ["small", "wide"]
    assert [e.label for e in read_entries(f"small={built}/a_0,ids={built}/ids_too", "none", ["codes", "prefixes"])] == ["small", "ids/codes", "ids/codes", "ids/prefixes", "ids/prefixes"]


def test_seeds_of_one_setting_are_one_row_whether_of_one_run_or_of_several(built):
    groups = grouped(read_entries(f"{built}/a_0,{built}/a_1", "none"))
    assert {label: len(g) for label, g in groups.items()} == {"a/none": 2, "a/vectors": 2, "a/codes": 2, "a/both": 2}
    table = click_comparison(groups, resamples=50).set_index("run")
    each = [ClickResult(scored(0.3, seed)).metrics["valid/auc"] for seed in (0, 1)]
    assert table.loc["a/none", "auc"] == pytest.approx(np.mean(each)) and table.loc["a/none", "auc/sd"] == pytest.approx(np.std(each, ddof=1))
    within = grouped(read_entries(f"I={built}/ids_too", "none"))
    assert {len(g) for g in within.values()} == {2} and [e.seeds[0] for e in within["I/codes"]] == [("05_ctr", 0), ("05_ctr", 1)]


def test_settings_that_do_not_reach_an_arm_do_not_part_it(built):
    "Two codebooks: the arms that read no codes are the same setting, the others are not."
    a, wide = ({e.label.split("/")[1]: e.setting for e in read_entries(f"{built}/{n}", "none")} for n in ("a_0", "wide"))
    a, wide = ({k.partition("/")[2] or k: v for k, v in x.items()} for x in (a, wide))
    assert {arm for arm in a if a[arm] == wide[arm]} == {"none", "vectors"}


def test_files_are_found_however_a_version_named_them(built, tmp_path):
    for files in ({}, {"user + item": "user_+_item"}, {"user + item": "user_item", "none": "none_"}):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        click_run(tmp_path / "run", {"data_path": built / "data"}, files=files)
        assert {e.label for e in read_entries(f"R={tmp_path}/run", "all")} == {"R/none", "R/vectors", "R/codes", "R/both", "item mean", "user + item"}
    rows = {f"{a} seed{k}": [ClickResult(scored(0.4, k), a, "test")] for a in ("none", "codes") for k in range(2)}  # a row a seed, as 05_ctr once wrote them
    click_run(tmp_path / "rows", {"data_path": built / "data"}, results=rows, n_seeds=2)
    assert {k: len(g) for k, g in grouped(read_entries(f"R={tmp_path}/rows", "none")).items()} == {"R/none": 2, "R/codes": 2}


def test_an_arm_that_nobody_has_heard_of_is_an_arm_where_it_was_trained(built, tmp_path):
    run = Run("05_ctr", {"seed": 0}, {"data_path": built / "data"}, "shop", tmp_path / "run")
    models = {n: ClickResult(scored(s), n, "test") for n, s in {"gated": 0.6, "guess": 0.1}.items()}
    write_parquet(run.path("results.parquet"), pd.DataFrame(click_table(models, resamples=20)))
    for n, r in models.items():
        write_parquet(run.path(f"predictions_{n}.parquet"), r.per_row)
    write_json(run.path("arms/gated_0/metrics.json"), {})
    run.finish({})
    assert [(e.label, e.stage) for e in read_entries(f"R={run.folder}", "all")] == [("R", "05_ctr"), ("guess", "baseline")]


def test_semantic_ids_prefixes_and_ensembles_are_described(built, tmp_path):
    facts = {e.label: e.facts for e in read_entries(f"I={built}/ids_too", "none")}
    assert facts["I/semantic_ids"] == {"embeddings": "text", "tokenizer": "k-means 3 × 32", "model": "DIN"} and facts["I/prefixes"]["tokenizer"] == "k-means 3 × 32, prefixes"
    assert facts["I/no_history"] == {"embeddings": "", "tokenizer": "", "model": "DIN, no history"}
    assert describe_arm(lineage(built / "graph"), "both") == {"embeddings": "text + HGT", "tokenizer": "raw + VQ-VAE 16 × 64", "model": "DIN"}
    assert describe_arm(lineage(built / "graph"), "ensemble")["model"] == "DIN, mean of seeds"
    run = click_run(tmp_path / "coded", {"data_path": built / "data", "codes": built / "ids"}, codes="semantic IDs", embedding_column="image", history="mean")
    assert describe_arm(lineage(run), "both") == {"embeddings": "image + text", "tokenizer": "raw + k-means 3 × 32", "model": "DIN, history averaged"}


def test_baselines_are_taken_once_and_by_name(built, tmp_path):
    runs = f"A={built}/a_0,W={built}/wide"
    assert [e.label for e in read_entries(runs, "all")][-2:] == ["user + item", "item mean"] and len(read_entries(runs, "all")) == 10
    assert [e.label for e in read_entries(runs, "item mean")][8:] == ["item mean"]
    refused(lambda: read_entries(runs, "EASE"), "no run has such a baseline", "user + item")
    other = click_run(tmp_path / "other", {"data_path": built / "data"}, baselines={"item mean": 0.2})
    assert [e.label for e in read_entries(f"A={built}/a_0,O={other}", "item mean")][8:] == ["item mean", "item mean (beside O)"]


# --- what an arm knew


def test_only_the_arms_that_read_leaky_vectors_are_marked(built):
    entries = read_entries(f"G={built}/graph", "all")
    assert {e.label: e.result.leaky for e in entries} == {"G/none": "", "G/vectors": "also_bought", "G/codes": "also_bought", "G/both": "also_bought", "item mean": "", "user + item": ""}
    groups = grouped(entries)
    table = click_comparison(groups, resamples=50)
    assert set(table.run[-3:]) == {"G/both", "G/vectors", "G/codes"} and table.auc[-3:].max() == table.auc.max()
    said = finding(table, all_click_differences(groups, table, "G/none", 50), "auc")
    assert re.search("(G/none|user . item) is best", said) and "G/both over" not in said and "3 of 6 runs know held-out rows" in said
    with pytest.raises(ParameterError, match="cannot be the reference"):
        reference_of(groups, "G/codes")


def test_what_a_run_says_of_an_arm_counts_too(built, tmp_path):
    run = click_run(tmp_path / "run", {"data_path": built / "data"}, leaky={"codes": "the test's labels"})
    assert {e.label: e.result.leaky for e in read_arms("R", run)} == {"R/none": "", "R/vectors": "", "R/codes": "the test's labels", "R/both": ""}


def test_codes_of_a_table_know_what_the_table_knows_and_nothing_of_the_vectors(built, tmp_path):
    inputs = {"data_path": built / "data", "codes": built / "ids", "embedding_column 0": built / "hgt"}
    run = lineage(click_run(tmp_path / "run", inputs, codes="semantic IDs", embedding_column="01_hgt_embedding"))
    assert {e.label: e.result.leaky for e in read_arms("R", run.folder)} == {"R/none": "", "R/vectors": "also_bought", "R/codes": "", "R/both": "also_bought"}
    assert not {"n_embed", "embedding_column"} & set(reads_of_arm(run, "codes").manifest["parameters"]) and set(reads_of_arm(run, "codes").inputs) == {"data_path", "codes"}
    assert "n_embed" in reads_of_arm(lineage(built / "a_0"), "codes").manifest["parameters"]


def test_vectors_of_other_training_rows_are_a_leak(shop):
    other = dataset(shop / "other", train_hash="beef")
    run = click_run(shop / "run", {"data_path": other, "embedding_column 0": shop / "hgt"}, embedding_column="01_hgt_embedding")
    assert {e.label: e.result.leaky for e in read_arms("R", run)}["R/codes"] == "also_bought, other training rows (01_hgt)"


def test_the_true_probabilities_are_never_the_best(built, tmp_path):
    run = click_run(tmp_path / "run", {"data_path": built / "data"}, baselines={"possible": 1.0, "user + item": 0.2})
    table = click_comparison(grouped(read_entries(f"R={run}", "all")), resamples=50)
    assert table.run.iloc[-1] == "possible" and table.leaky.iloc[-1] == "the true probabilities" and table.auc.idxmax() == len(table) - 1
    row = next(line for line in table._repr_markdown_().splitlines() if "possible" in line)
    assert "not comparable" in row and "**" not in row


def test_an_input_that_is_gone_is_said_of_the_arms_that_read_it(shop):
    shutil.rmtree(shop / "hgt")
    graph = Path(shutil.move(shop / "graph", shop / "moved" / "deep" / "graph"))
    lost = {e.label: e.lost for e in read_arms("G", graph)}
    assert "05_ctr: embedding_column 0" in lost["G/codes"] and not any("embedding" in x for x in lost["G/none"])
    assert "Not all inputs of G/codes are there any more" in click_comparison(grouped(read_arms("G", graph)), resamples=20)._repr_markdown_()


# --- the figures


def test_figures_and_differences_are_those_of_two_models(built):
    groups = grouped(read_entries(f"A={built}/a_0", "none", ["none", "both"]))
    table = click_comparison(groups, resamples=200)
    differences = all_click_differences(groups, table, "A/none", 200)
    a, b = groups["A/both"][0].result, groups["A/none"][0].result
    known = compare_clicks(a.columns[0], b.columns[0], *a.columns[1:], resamples=200)
    ours = differences.set_index("metric").loc[known.index]
    assert ours[["difference", "low", "high"]].to_numpy(float) == pytest.approx(known[["difference", "low", "high"]].to_numpy(float), abs=1e-9)
    assert ours.run.unique().tolist() == ["A/both"] and ours.reference.unique().tolist() == ["A/none"] and known.clear["auc"]


def test_the_best_is_also_compared_with_the_next_and_less_loss_is_better(built):
    groups = grouped(read_entries(f"A={built}/a_0", "none"))
    table = click_comparison(groups, "logloss", resamples=100)
    assert table.run.tolist()[0] == "A/both" and table.logloss.is_monotonic_increasing
    differences = all_click_differences(groups, table, "A/none", 100)
    losses, areas = of_metric(differences, "logloss"), of_metric(differences, "auc")
    assert (losses.difference < 0).all() and (areas.difference > 0).all()
    assert gains(losses[:3]).tolist() == losses.clear[:3].tolist() and gains(losses.assign(difference=1.0)).sum() == 0 and losses.clear.any()
    assert set(zip(differences.run, differences.reference, strict=True)) == {(f"A/{x}", "A/none") for x in ("vectors", "codes", "both")} | {("A/both", f"A/{table.run[1].partition('/')[2]}")}
    said = finding(table, differences, "logloss")
    assert said.startswith("log loss on test, 1,200 rows of 150 users: A/both is best") and f"A/both over {table.run[1]}" in said


# --- what is refused


def test_rankings_and_clicks_are_not_mixed(built):
    refused(lambda: read_entries(f"A={built}/a_0,G={built}/hgt", "none"), "rankings and clicks", "rankings: G; clicks: A")


def test_other_rows_users_or_labels(shop):
    for other in (scored(0.4, rows=1100), scored(0.4, first=2), scored(0.4, users=140), scored(0.4, label_seed=8)):
        shutil.rmtree(shop / "run", ignore_errors=True)
        click_run(shop / "run", {"data_path": shop / "data"}, results={"none": [ClickResult(other, "none", "test")]}, baselines={})
        refused(lambda: read_entries(f"A={shop}/a_0,R={shop}/run", "none"), "different rows", "R")


def test_another_part(shop):
    click_run(shop / "run", {"data_path": shop / "data"}, split="valid")
    refused(lambda: read_entries(f"A={shop}/a_0,R={shop}/run", "none"), "two parts")


@pytest.mark.parametrize("changes, words", [({"clicks": ((1, 2, 0), (2, 1, 1))}, "clicks"), ({"train_hash": "beef"}, "train_hash")])
def test_models_that_learned_from_other_rows(shop, changes, words):
    other = dataset(shop / "other", **changes)
    click_run(shop / "run", {"data_path": other})
    refused(lambda: read_entries(f"A={shop}/a_0,R={shop}/run", "none"), "different data", words)
    click_run(shop / "name", {}, name="market")
    refused(lambda: read_entries(f"A={shop}/a_0,R={shop}/name", "none"), "different data", "market")


def test_the_same_rows_in_another_order_are_the_same_data(shop):
    same = dataset(shop / "same")
    table = read_parquet(same / "impressions/train.parquet").to_pandas()
    shutil.rmtree(shop / "same")
    run = Run("00_data", {"overwrite": True}, {}, "shop", shop / "same")
    write_json(run.path("dataset.json"), {"name": "shop", "train_hash": "4f1c", "n_items": 3, "split": {"rule": "leave_one_out"}})
    write_parquet(run.path("items.parquet"), pd.DataFrame({"item_id": [1, 2, 3]}))
    write_parquet(run.path("impressions/train.parquet"), table[::-1])
    run.finish()
    click_run(shop / "run", {"data_path": shop / "same"}, arms=("none",))
    assert len(read_entries(f"A={shop}/a_0,R={shop}/run", "none")) == 5


def test_scores_that_are_not_the_runs(shop):
    write_parquet(shop / "a_0" / "predictions_codes.parquet", scored(0.9))
    refused(lambda: read_entries(f"A={shop}/a_0", "none"), "not the file that its run wrote")
    (shop / "a_1" / "predictions_codes.parquet").unlink()
    refused(lambda: read_entries(f"A={shop}/a_1", "none"), "scores are not there", "codes")
    for told in ({"codes/test/auc": 0.99}, {"item mean/test/auc": 0.99}):
        shutil.rmtree(shop / "wrong", ignore_errors=True)
        click_run(shop / "wrong", {"data_path": shop / "data"}, told=told)
        refused(lambda: read_entries(f"W={shop}/wrong", "all"), "do not give the manifest's figures", "0.990000")


def test_an_unfinished_run_and_one_without_scores(shop):
    (shop / "a_0" / "manifest.json").unlink()
    refused(lambda: read_entries(f"{shop}/a_0", "none"), "manifest.json")
    refused(lambda: read_entries(f"{shop}/ids", "none"), "ranked no users", "a run of 03_tokenizer")


def test_arms_that_are_none(built):
    refused(lambda: read_entries(f"A={built}/a_0", "none", ["prefixes"]), "none of these arms", "vectors")
    refused(lambda: read_entries(f"H={built}/hgt", "none", ["codes"]), "only runs of 05_ctr have arms")


@pytest.mark.parametrize("metric, words", [("ndcg@10", "these are clicks"), ("bias", "there is no bias")])
def test_metrics_of_another_kind(built, metric, words):
    entries = read_entries(f"A={built}/a_0", "none", ["none"])
    assert click_metric("", entries) == "auc" and metric_of("logloss", [5], entries) == ("logloss", [5])
    with pytest.raises(ParameterError, match=words):
        click_metric(metric, entries)
    ranks = read_entries(f"H={built}/hgt", "none")
    assert metric_of("", [10, 5], ranks) == ("ndcg@10", [5, 10]) and metric_of("", [1, 20], ranks) == ("ndcg@20", [1, 20]) and isinstance(ranks[0].result, EvaluationResult)
    with pytest.raises(ParameterError, match="these are rankings"):
        metric_of("auc", [5], ranks)


def test_no_gauc_where_no_user_has_both_classes():
    rows = scored(0.5).assign(user_id=lambda t: t.row_id)
    with pytest.raises(ParameterError, match="no user both clicked and did not"):
        click_metric("gauc", read_like(rows))


def read_like(rows):
    from recgen.evaluation.comparison import Entry
    return [Entry("a", ClickResult(rows, "a", "test"))]


# --- the stage


def test_the_stage_on_click_runs(built, tmp_path):
    given = dict(runs=f"A={built}/a_0,A={built}/a_1,wide={built}/wide,graph={built}/graph", baselines="user + item", output_dir=str(tmp_path / "out"), resamples=100)
    run = run_stage("06_compare", whole=True, **given)["run"]
    table = read_parquet(run.path("comparison.parquet")).to_pandas().set_index("run")
    assert len(table) == 13 and table.loc["A/codes", "seeds"] == 2 and table.index[:10].isin(table.index[table.leaky == ""]).all() and set(table.index[10:]) == {"graph/vectors", "graph/codes", "graph/both"}
    manifest = run.manifest
    assert manifest["parameters"]["metric"] == "auc" and manifest["metrics"]["A/codes/test/auc"] == pytest.approx(table.loc["A/codes", "auc"]) and "A/codes over A/none/auc" in manifest["metrics"]
    assert len(manifest["inputs"]) == 4 and "A/codes/test/bias" not in manifest["metrics"] and "runs" not in manifest["parameters"] and str(tmp_path) not in str({k: v for k, v in manifest.items() if k != "environment"})
    cells = read_parquet(run.path("ablation.parquet")).to_pandas()
    assert set(cells.columns) >= {"embeddings", "tokenizer", "run", "value", "leaky", "runs"} and len(pd.read_csv(run.path("comparison.csv"))) == 13
    shown = ClickComparison(table.reset_index())._repr_markdown_()
    assert "graph/codes (not comparable: knows also_bought)" in shown and "±" in shown and "| embeddings | tokenizer | model |" in shown
    assert "log" not in run_stage("06_compare", **given)  # reused
    other = run_stage("06_compare", **{**given, "arms": ["codes"], "metric": "logloss", "output_dir": str(tmp_path / "codes")}, whole=True)
    assert other["table"].run.tolist()[-1] == "graph" and other["reference"] == "A" and other["metric"] == "logloss"
    picked = run_stage("06_compare", **{**given, "axes": ["05_ctr.n_embed"], "output_dir": str(tmp_path / "axes")}, whole=True)
    assert sorted(picked["cells"]["05_ctr.n_embed"]) == ["", "128", "64"] and picked["cells"].runs.max() > 1


@pytest.mark.parametrize("given, words", [({"axes": ["tokenizer", "retrieval"]}, "no two runs differ"), ({"metric": "ndcg@10"}, "these are clicks"), ({"reference": "A/both"}, "no such run"), ({"arms": ["prefixes"]}, "none of these arms")])
def test_wrong_parameters_write_nothing(built, tmp_path, given, words):
    with pytest.raises(InputError, match=words):
        run_stage("06_compare", **{"runs": f"{built}/a_0,{built}/wide", "output_dir": str(tmp_path / "out"), **given})
    assert not (tmp_path / "out").exists()


def test_what_05_ctr_writes_is_what_is_read_here(runs, tmp_path):
    small = dict(epochs=1, vqvae_epochs=1, n_embed=16, tokens=4, code_dim=8, embedding_dim=4, attention=[8], mlp=[8], resamples=100, device="cpu", n_seeds=2, study=False)
    save_world(tmp_path / "world", world_parts(300, 200, 0), {"name": "tiny"})
    made = stage_runs.run_stage("05_ctr", data_path=str(tmp_path / "world"), **small)["run"]
    told = pd.read_parquet(made.folder / "results.parquet").set_index("run")
    ours = click_comparison(grouped(read_entries(f"R={made.folder}", "all")), resamples=100).set_index("run")
    assert {label.removeprefix("R/") for label in ours.index} == set(told.index)
    for label in ours.index:
        assert ours.loc[label, "auc"] == pytest.approx(told.loc[label.removeprefix("R/"), "auc"]) and ours.loc[label, "seeds"] == told.loc[label.removeprefix("R/"), "seeds"]
    assert ours.loc["R/codes", "seeds"] == 2 and ours.loc["user + item", "stage"] == "baseline"
