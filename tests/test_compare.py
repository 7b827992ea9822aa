"""06_compare: what runs are made of, what may stand in one table, and the figures in it."""
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from stage_runs import run_stage

from recgen.core.errors import InputError, ParameterError
from recgen.core.files import read_parquet, write_json, write_parquet
from recgen.core.lineage import lineage, setting_of
from recgen.core.run import Run
from recgen.evaluation.comparison import (
    ComparisonTable,
    Entry,
    all_differences,
    comparison,
    difference_table,
    finding,
    grouped,
    paired_differences,
    reference_of,
    seeds_label,
)
from recgen.evaluation.evaluator import EvaluationResult, result_table
from recgen.evaluation.uncertainty import compare
from recgen.formats.provenance import Provenance
from recgen.stages.compare import describe, leaks, read_baselines, read_entries, read_run, run_folders

SPLIT = {"rule": "leave_one_out"}


def ranking(hits, users=200, seed=0, target=7):
    draws = np.random.default_rng(seed)
    rank = np.where(draws.random(users) < hits, draws.integers(1, 11, users), 0)
    return pd.DataFrame({"user_id": range(1, users + 1), "target": target, "rank": rank // 2, "rank_filtered": rank})


def finished(folder, stage, params=None, inputs=None, metrics=None, ranks=None, dataset="shop", provenance=None, files=None, baselines=None, **environment):
    "A run folder as a stage leaves it."
    run = Run(stage, {"overwrite": True, **(params or {})}, inputs, dataset, folder)
    for name, table in {**({} if ranks is None else {"per_user": ranks}), **{f"per_user_{k}": v for k, v in (baselines or {}).items()}}.items():
        write_parquet(run.path(f"{name}.parquet"), table)
    for name, content in (files or {}).items():
        write_json(run.path(name), content)
    (provenance or Provenance()).write(run.folder)
    metrics = metrics if metrics is not None else {} if ranks is None else EvaluationResult(ranks, split="test").metrics
    run.finish(metrics, **environment)
    return run.folder


def dataset_run(folder, train_hash="4f1c", n_items=50, seed=0):
    return finished(folder, "00_data", {"source": "world", "seed": seed}, files={"dataset.json": {"name": "shop", "train_hash": train_hash, "n_items": n_items, "split": SPLIT}})


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A dataset, vectors of two graph stages, their IDs, a retrieval run from text and one from text and graph."
    tmp_path = tmp_path_factory.mktemp("shop") / "built"
    data = dataset_run(tmp_path / "data")
    hgt = finished(tmp_path / "hgt", "01_hgt", {"seed": 0}, {"data_path": data}, ranks=ranking(0.3, seed=3), provenance=Provenance({"01_hgt": "4f1c"}))
    sage = finished(tmp_path / "sage", "02_graphsage", {"seed": 0}, {"data_path": data}, ranks=ranking(0.25, seed=4), provenance=Provenance({"02_graphsage": "4f1c"}, ["also_bought"]))
    ids = {"mode": "kmeans", "n_layers": 3, "n_clusters": 16}
    text_ids = finished(tmp_path / "text_ids", "03_tokenizer", {**ids, "embedding_column": "embedding"}, {"data_path": data})
    both_ids = finished(tmp_path / "both_ids", "03_tokenizer", {**ids, "embedding_column": "embedding+0:embedding"}, {"data_path": data, "embedding_column 0": hgt})
    leaky_ids = finished(tmp_path / "leaky_ids", "03_tokenizer", {**ids, "mode": "tiger", "n_embed": 64, "embedding_column": "embedding"}, {"data_path": sage})
    tiger = {"preset": "small", "seed": 0}
    extra = {"popularity": ranking(0.1, seed=9), "TIGER + SASRec": ranking(0.5, seed=8)}
    for name, codes, hits in (("text", text_ids, 0.4), ("both", both_ids, 0.6), ("leaky", leaky_ids, 0.9)):
        finished(tmp_path / name, "04_tiger", tiger, {"data_path": data, "semantic_ids": codes}, ranks=ranking(hits, seed=int(hits * 10)), baselines=extra)
    return tmp_path.rename(tmp_path.with_name("moved"))  # so that copies find their own inputs, not these


@pytest.fixture
def shop(built, tmp_path):
    "A copy of it to change."
    return Path(shutil.copytree(built, tmp_path / "shop"))


# --- where runs come from


def test_a_chain_is_followed_to_its_dataset_and_named(shop):
    assert [r.stage for r in lineage(shop / "both").runs()] == ["04_tiger", "00_data", "03_tokenizer", "00_data", "01_hgt", "00_data"]
    assert describe(lineage(shop / "text")) == {"embeddings": "text", "tokenizer": "k-means 3 × 16", "retrieval": "TIGER small"}
    assert describe(lineage(shop / "both"))["embeddings"] == "text + HGT"
    assert describe(lineage(shop / "leaky")) == {"embeddings": "GraphSAGE", "tokenizer": "RQ-VAE 3 × 64", "retrieval": "TIGER small"}
    assert describe(lineage(shop / "hgt")) == {"embeddings": "HGT", "tokenizer": "", "retrieval": "link ranking"}


def test_an_encoder_and_a_named_text_column_are_named(tmp_path):
    data = finished(tmp_path / "data", "00_data", {"encoder": "models/minilm"})
    ids = finished(tmp_path / "ids", "03_tokenizer", {"mode": "kmeans", "n_layers": 2, "n_clusters": 4, "embedding_column": "text+image"}, {"data_path": data})
    assert describe(lineage(finished(tmp_path / "run", "04_tiger", {"preset": "demo"}, {"data_path": data, "semantic_ids": ids})))["embeddings"] == "text (minilm) + image"


def test_an_input_that_was_made_anew_is_lost_and_said_so(shop):
    finished(shop / "hgt", "01_hgt", {"seed": 1}, {"data_path": shop / "data"}, ranks=ranking(0.3))
    entry = read_run("both", shop / "both")
    assert entry.lost == ("03_tokenizer: embedding_column 0",) and entry.facts["embeddings"] == "text + embedding"
    table = ComparisonTable(comparison({"both": [entry]}))
    assert "Not all inputs of both are there any more (03_tokenizer: embedding_column 0)" in table._repr_markdown_()


def test_chains_that_moved_as_a_whole_are_found(shop):
    (shop / "moved").mkdir()
    for f in [f for f in shop.iterdir() if f.name != "moved"]:
        f.rename(shop / "moved" / f.name)
    assert not read_run("both", shop / "moved" / "both").lost


def test_settings_differ_in_anything_but_seeds(shop):
    seeded = finished(shop / "seed1", "04_tiger", {"preset": "small", "seed": 1}, {"data_path": shop / "data", "semantic_ids": shop / "text_ids"}, ranks=ranking(0.4))
    other = finished(shop / "wide", "04_tiger", {"preset": "tiger", "seed": 0}, {"data_path": shop / "data", "semantic_ids": shop / "text_ids"}, ranks=ranking(0.4))
    text = setting_of(lineage(shop / "text"))
    assert text == setting_of(lineage(seeded)) and text != setting_of(lineage(other)) and text != setting_of(lineage(shop / "both"))


# --- what knows held-out rows


def test_a_leak_anywhere_in_the_chain_marks_the_run(shop):
    assert leaks(lineage(shop / "leaky")) == leaks(lineage(shop / "sage")) == "also_bought"
    assert not leaks(lineage(shop / "both")) and not leaks(lineage(shop / "text"))


@pytest.mark.parametrize("said", [{"metrics": {"leaky": "co_view"}}, {"metrics": {"graph/leaky": "co_view"}}, {"leaky": "co_view"}, {"metrics": {"leaky": ["co_view"]}}])
def test_a_manifest_may_say_so_too(tmp_path, said):
    assert leaks(lineage(finished(tmp_path / "run", "01_hgt", **said))) == "co_view"


def test_vectors_of_other_training_rows_are_a_leak(tmp_path):
    data = dataset_run(tmp_path / "data")
    run = finished(tmp_path / "run", "01_hgt", {}, {"data_path": data}, provenance=Provenance({"01_hgt": "beef"}))
    assert leaks(lineage(run)) == "other training rows (01_hgt)"


def test_leaky_runs_are_marked_last_and_never_the_best(shop):
    entries = read_entries(f"{shop}/leaky,{shop}/text,{shop}/both", "none")
    groups = grouped(entries)
    table = comparison(groups)
    assert list(table.run) == ["both", "text", "leaky"] and table["filtered/ndcg@10"].idxmax() == 2  # though its figure is the largest
    assert reference_of(groups, "") == "text"  # the first that is not leaky
    with pytest.raises(ParameterError, match="cannot be the reference"):
        reference_of(groups, "leaky")
    shown = ComparisonTable(table)._repr_markdown_()
    row = next(line for line in shown.splitlines() if "leaky (not comparable: knows also_bought)" in line)
    assert "**" not in row and "**" in shown
    differences = all_differences(groups, table, "text")
    said = finding(table, differences, "ndcg@10")
    assert "both is best" in said and "leaky over" not in said and "1 of 3 runs know held-out rows" in said
    assert "leaky (not comparable" in difference_table(differences).to_string()


def test_where_all_are_leaky_there_is_no_headline(shop):
    groups = grouped(read_entries(f"{shop}/leaky,{shop}/sage", "none"))
    table = comparison(groups)
    said = finding(table, all_differences(groups, table, reference_of(groups, "")), "ndcg@10")
    assert "no figure to report" in said and "best" not in said and "**" not in ComparisonTable(table)._repr_markdown_()


# --- the figures


def entry(label, ranks, setting="", seed=0, leaky=""):
    return Entry(label, EvaluationResult(ranks, label, leaky=leaky), {"retrieval": "TIGER"}, {"dataset": "shop"}, setting or label, (("04_tiger", seed),))


def test_single_runs_have_the_evaluators_figures_and_intervals():
    a, b = ranking(0.5, seed=1), ranking(0.3, seed=2)
    groups = grouped([entry("b", b), entry("a", a)])
    mine, known = comparison(groups).set_index("run"), result_table({"a": EvaluationResult(a), "b": EvaluationResult(b)})
    columns = [f"{h}/{m}@{k}{end}" for h in ("filtered", "unfiltered") for m in ("recall", "ndcg") for k in (5, 10) for end in ("", "/low", "/high")]
    assert list(mine.index) == list(known.index) == ["a", "b"]
    assert np.allclose(mine[columns].to_numpy(float), known[columns].to_numpy(float))
    for history, column in (("filtered", "rank_filtered"), ("unfiltered", "rank")):
        told = compare(a, b, column=column).loc[["recall@5", "recall@10", "ndcg@5", "ndcg@10"]]
        ours = paired_differences(groups, "b").query(f"history == {history!r}").set_index("metric").loc[told.index]
        assert np.allclose(ours[["difference", "low", "high"]].to_numpy(float), told[["difference", "low", "high"]].to_numpy(float)) and list(ours.clear) == list(told.clear)


def test_seeds_are_one_row_of_mean_and_sd():
    ranks = [ranking(h, seed=i) for i, h in enumerate((0.3, 0.4, 0.5))]
    groups = grouped([entry("base", ranking(0.2, seed=7)), *(entry(f"HGT seed{i}", r, "hgt", i) for i, r in enumerate(ranks))])
    assert list(groups) == ["base", "HGT"] and len(groups["HGT"]) == 3
    row = comparison(groups).set_index("run").loc["HGT"]
    each = [(r.rank_filtered.between(1, 10)).mean() for r in ranks]
    assert row.seeds == 3 and np.isclose(row["filtered/recall@10"], np.mean(each)) and np.isclose(row["filtered/recall@10/sd"], np.std(each, ddof=1))
    assert np.isnan(comparison(groups).set_index("run").loc["base", "filtered/recall@10/sd"])
    lone = grouped([entry("base", ranking(0.2, seed=7)), entry("one", ranks[0])])
    wide, narrow = (d.iloc[1].high - d.iloc[1].low for d in (paired_differences(lone, "base"), paired_differences(groups, "base")))
    assert narrow < wide  # the mean of three seeds is a steadier figure than one
    assert "±" in ComparisonTable(comparison(groups))._repr_markdown_() and "±" not in ComparisonTable(comparison(lone))._repr_markdown_()


def test_any_of_the_seeds_names_the_reference():
    groups = grouped([entry("base", ranking(0.2)), entry("HGT s0", ranking(0.3), "hgt", 0), entry("HGT s1", ranking(0.4), "hgt", 1)])
    assert reference_of(groups, "HGT s1") == reference_of(groups, "HGT") == "HGT"
    with pytest.raises(ParameterError, match="no such run") as e:
        reference_of(groups, "SAGE")
    assert "base, HGT" in str(e.value)


@pytest.mark.parametrize("labels, name", [(["HGT seed0", "HGT seed1"], "HGT"), (["text_s0", "text_s1"], "text"), (["a-1", "a-2"], "a"), (["x/1a", "y/2b"], "x/1a"), (["items1", "items2"], "items1"), (["lr 0.1 seed 1", "lr 0.1 seed 2"], "lr 0.1"), (["HGT", "HGT"], "HGT"), (["seed0", "seed1"], "seed0"), (["run s0/codes", "run s1/codes"], "run/codes"), (["a_0/both", "a_1/none"], "a_0/both")])
def test_the_name_of_several_seeds(labels, name):
    assert seeds_label(labels) == name


def test_two_groups_keep_two_names():
    groups = grouped([entry(f"run{i}", ranking(0.1 * i), "abab"[i], i // 2) for i in range(4)])
    assert len(groups) == 2 and sum(map(len, groups.values())) == 4


def test_one_name_for_two_settings_is_refused_and_the_same_run_twice_too():
    for setting, seed in (("other", 1), ("HGT", 0)):
        with pytest.raises(InputError, match="runs of one name differ"):
            grouped([entry("HGT", ranking(0.3), "HGT", 0), entry("HGT", ranking(0.4), setting, seed)])


def test_the_best_is_also_compared_with_the_next():
    groups = grouped([entry("base", ranking(0.1, seed=1)), entry("good", ranking(0.5, seed=2)), entry("better", ranking(0.6, seed=3))])
    table = comparison(groups)
    differences = all_differences(groups, table, "base")
    assert set(zip(differences.run, differences.reference, strict=True)) == {("better", "base"), ("good", "base"), ("better", "good")}
    assert "  better over good: " in finding(table, differences, "recall@10") and list(difference_table(differences).index) == ["better", "good"]


# --- which runs


def test_folders_by_name_wildcard_and_place(tmp_path):
    for name in ("a/x", "b/x", "b/y"):
        (tmp_path / name).mkdir(parents=True)
    assert [n for n, _ in run_folders(f"{tmp_path}/*/x, {tmp_path}/b/y")] == ["a/x", "b/x", "y"]
    assert run_folders(f"seeds={tmp_path}/b/*") == [("seeds", tmp_path / "b/x"), ("seeds", tmp_path / "b/y")]
    assert run_folders(f"text + HGT = {tmp_path}/a/x") == [("text + HGT", tmp_path / "a/x")]
    assert run_folders(f"{tmp_path}/lr=1/run") == [("run", tmp_path / "lr=1/run")]
    (tmp_path / "br[1]" / "run").mkdir(parents=True)
    assert run_folders(f"mine={tmp_path}/br[1]/run") == [("mine", tmp_path / "br[1]/run")], "a folder that is there is no pattern"
    assert run_folders(f"A={tmp_path}/lr=1/run") == [("A", tmp_path / "lr=1/run")]
    with pytest.raises(InputError, match="no such run folder"):
        run_folders(f"{tmp_path}/c*")
    with pytest.raises(InputError, match="given twice"):
        run_folders(f"{tmp_path}/a/x,{tmp_path}/*/x")
    with pytest.raises(InputError, match="there are no runs"):
        run_folders(" , ")


def test_baselines_are_taken_once(shop):
    entries = read_entries(f"{shop}/text,{shop}/both", "all")
    assert [e.label for e in entries] == ["text", "both", "TIGER + SASRec", "popularity"]
    assert entries[2].facts["retrieval"] == "TIGER + SASRec, beside text"
    assert [e.label for e in read_entries(f"{shop}/text", "popularity")] == ["text", "popularity"]
    assert len(read_entries(f"{shop}/text", "none")) == 1
    with pytest.raises(InputError, match="no run has such a baseline") as e:
        read_entries(f"{shop}/text", "EASE")
    assert "popularity" in str(e.value)


def test_another_ranking_of_the_same_name_says_beside_which_run_it_stood(shop):
    other = finished(shop / "other", "04_tiger", {"preset": "small", "seed": 9}, {"data_path": shop / "data"}, ranks=ranking(0.25, seed=4), baselines={"popularity": ranking(0.3, seed=5)})
    entries = read_entries(f"{shop}/text,{shop}/both,third={other}", "popularity")
    assert [e.label for e in entries] == ["text", "both", "third", "popularity", "popularity (beside third)"]
    assert entries[-1].result.metrics != entries[-2].result.metrics


def test_a_baseline_that_was_trained_with_every_seed_is_one_row(shop):
    for seed in (1, 2):
        finished(shop / f"seed{seed}", "04_tiger", {"preset": "tiger", "seed": seed}, {"data_path": shop / "data"}, ranks=ranking(0.3, seed=seed), baselines={"SASRec": ranking(0.4, seed=seed), "popularity": ranking(0.1, seed=9)})
    groups = grouped(read_entries(f"{shop}/seed1,{shop}/seed2", "all"))
    assert {label: len(g) for label, g in groups.items()} == {"seed1": 2, "SASRec": 2, "popularity": 1}


def test_a_sum_with_a_leaky_model_is_leaky(shop):
    entries = read_entries(f"{shop}/leaky", "all")
    assert {e.label: e.result.leaky for e in entries} == {"leaky": "also_bought", "TIGER + SASRec": "also_bought", "popularity": ""}


def test_graph_and_retrieval_runs_stand_in_one_table(shop):
    table = comparison(grouped(read_entries(f"{shop}/text,{shop}/hgt", "none")))
    assert set(table.retrieval) == {"TIGER small", "link ranking"} and set(table.users) == {200}


def test_path_and_leak_are_read_off_the_results(shop):
    run = Run("04_tiger", {"seed": 5}, {"data_path": shop / "data"}, "shop", shop / "beam")
    write_parquet(run.path("per_user.parquet"), ranking(0.3))
    write_parquet(run.path("per_user_LightGCN.parquet"), ranking(0.4))
    write_parquet(run.path("results.parquet"), pd.DataFrame({"model": ["TIGER", "LightGCN"], "path": ["beam", "exact"], "leaky": ["", "also_bought"]}))
    run.finish()
    (lightgcn,) = read_baselines([read_run("beam", run.folder)], "all")
    assert lightgcn.result.leaky == "also_bought" and lightgcn.result.path == "exact"  # a baseline may know more than its run
    assert read_run("beam", run.folder).result.path == "beam" and read_run("text", shop / "text").result.path == "exact"


# --- what is refused


def refused(call, *words):
    with pytest.raises(InputError) as e:
        call()
    assert all(w in str(e.value) for w in words), str(e.value)


def test_a_folder_without_a_finished_run(shop, tmp_path):
    (shop / "begun").mkdir()
    refused(lambda: read_entries(f"{shop}/begun", "all"), "the folder is not a run's", "manifest.json")
    open_run = Run("04_tiger", {"seed": 8}, {}, "shop", shop / "open")
    write_parquet(open_run.path("per_user.parquet"), ranking(0.2))
    refused(lambda: read_entries(f"{shop}/open", "all"), "the run has not finished", "resumes where it stopped")
    refused(lambda: read_entries(f"{shop}/nowhere", "all"), "no such run folder")
    refused(lambda: read_entries(f"{shop}/text_ids", "all"), "ranked no users", "a run of 03_tokenizer")
    write_json(shop / "begun" / "manifest.json", {"stage": "04_tiger"})
    refused(lambda: read_entries(f"{shop}/begun", "all"), "not a run's manifest")


def test_ranks_that_are_not_the_runs(shop):
    write_parquet(shop / "text" / "per_user.parquet", ranking(0.41))
    refused(lambda: read_entries(f"{shop}/text", "none"), "not the file that its run wrote")
    finished(shop / "wrong", "04_tiger", {"seed": 2}, {}, metrics={"test/item/filtered/recall@10": 0.99}, ranks=ranking(0.3))
    refused(lambda: read_entries(f"{shop}/wrong", "none"), "do not give the manifest's figures", "0.990000")


@pytest.mark.parametrize("bad, words", [(lambda r: pd.concat([r, r.head(1)]), "two ranks"), (lambda r: r.head(0), "no users"), (lambda r: r.drop(columns="target"), "column is missing")])
def test_a_table_of_ranks_that_is_none(shop, bad, words):
    finished(shop / "bad", "04_tiger", {"seed": 2}, {}, ranks=bad(ranking(0.3)), metrics={})
    refused(lambda: read_entries(f"{shop}/bad", "none"), words)


def test_other_users_and_other_targets(shop):
    for name, ranks in (("fewer", ranking(0.3, users=150)), ("others", ranking(0.3, target=8))):
        finished(shop / name, "04_tiger", {"seed": 2}, {"data_path": shop / "data"}, ranks=ranks)
        refused(lambda name=name: read_entries(f"{shop}/text,{shop}/{name}", "none"), "different users or targets")


def test_another_split(shop):
    valid = ranking(0.3)
    finished(shop / "valid", "04_tiger", {"seed": 2}, {"data_path": shop / "data"}, ranks=valid, metrics=EvaluationResult(valid, split="valid").metrics)
    refused(lambda: read_entries(f"{shop}/text,{shop}/valid", "none"), "validation and test")


@pytest.mark.parametrize("changes, words", [({"train_hash": "beef"}, "train_hash"), ({"n_items": 51}, "items")])
def test_another_dataset(shop, changes, words):
    data = dataset_run(shop / "data2", **changes, seed=1)
    finished(shop / "elsewhere", "04_tiger", {"seed": 2}, {"data_path": data}, ranks=ranking(0.3))
    refused(lambda: read_entries(f"{shop}/text,{shop}/elsewhere", "none"), "different data", words)
    finished(shop / "name", "04_tiger", {"seed": 2}, {}, ranks=ranking(0.3), dataset="market")
    refused(lambda: read_entries(f"{shop}/text,{shop}/name", "none"), "different data", "market")


def test_the_same_data_written_again_may_be_compared(shop):
    data = dataset_run(shop / "again", seed=1)  # another run, the same rows
    finished(shop / "later", "04_tiger", {"preset": "tiger"}, {"data_path": data}, ranks=ranking(0.3))
    assert len(read_entries(f"{shop}/text,{shop}/later", "none")) == 2


# --- the stage


def test_the_stage_on_runs(shop, tmp_path):
    for seed in (1, 2):
        finished(shop / f"text_{seed}", "04_tiger", {"preset": "small", "seed": seed}, {"data_path": shop / "data", "semantic_ids": shop / "text_ids"}, ranks=ranking(0.4, seed=20 + seed))
    given = dict(runs=f"text={shop}/text,text={shop}/text_[12],text+HGT={shop}/both,HGT={shop}/hgt,bought={shop}/leaky", reference="text", baselines="popularity", metric="recall@10", output_dir=str(tmp_path / "out"))
    run = run_stage("06_compare", whole=True, **given)["run"]
    table = read_parquet(run.path("comparison.parquet")).to_pandas()
    assert list(table.run)[0] == "text+HGT" and list(table.run)[-1] == "bought" and set(table.run) == {"text", "text+HGT", "HGT", "popularity", "bought"}
    assert table.set_index("run").seeds["text"] == 3 and table.set_index("run").leaky["bought"] == "also_bought"
    differences = read_parquet(run.path("differences.parquet")).to_pandas()
    settings, cells = (read_parquet(run.path(f"{n}.parquet")).to_pandas() for n in ("settings", "ablation"))
    assert settings.run.tolist() == ["text", "text+HGT", "HGT", "bought"] and set(cells.run) == {"text", "text+HGT", "HGT", "bought"} and cells.leaky[cells.run == "bought"].tolist() == ["also_bought"]
    assert set(differences.reference[differences.run != "text+HGT"]) == {"text"} and len(pd.read_csv(run.path("comparison.csv"))) == 5
    manifest = run.manifest
    assert manifest["dataset"] == "shop" and len(manifest["inputs"]) == 6 and "runs" not in manifest["parameters"] and str(tmp_path) not in str({k: v for k, v in manifest.items() if k != "environment"})
    assert np.isclose(manifest["metrics"]["text+HGT/test/item/filtered/recall@10"], table["filtered/recall@10"][0])
    again = run_stage("06_compare", **given)
    assert again["run"].finished and "log" not in again  # reused
    other = run_stage("06_compare", **{**given, "reference": "HGT", "output_dir": str(tmp_path / "other")})["run"]
    assert other.hash != run.hash


def test_the_stage_alone_compares_baselines_of_the_world(tmp_path):
    names = run_stage("06_compare", whole=True, output_dir=str(tmp_path / "out"))
    table = names["table"].set_index("run")
    assert set(table.index) == {"popularity", "item-kNN", "EASE", "item-kNN, test rows seen"} and table.index[-1] == "item-kNN, test rows seen"
    assert table.leaky["item-kNN, test rows seen"] == "held-out rows" and (table.leaky.drop("item-kNN, test rows seen") == "").all()
    assert table["filtered/ndcg@10"].idxmax() == "item-kNN, test rows seen" and names["reference"] == "popularity"
    assert re.search(r"(item-kNN|EASE) is best", finding(names["table"], names["differences"], "ndcg@10"))


@pytest.mark.parametrize("given, words", [({"metric": "mrr"}, "metric"), ({"metric": "ndcg@20"}, "cut-off"), ({"metric": "auc"}, "these are rankings"), ({"axes": ["tokenizer"]}, "no two runs differ"), ({"arms": ["codes"]}, "only runs of 05_ctr"), ({"ks": [0]}, "ks"), ({"ks": []}, "ks"), ({"reference": "TIGER"}, "no such run"), ({"resamples": 5}, "resamples")])
def test_wrong_parameters_write_nothing(tmp_path, given, words):
    with pytest.raises(ParameterError, match=words):
        run_stage("06_compare", **given, output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
