"""03_tokenizer as a whole: both modes, what it leaves, appending, streaming, joined vectors, other people's tables."""
import json
import os
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stage_runs import manifest_of, run_stage

from recgen.core.errors import InputError, ParameterError
from recgen.core.files import read_json
from recgen.formats.semantic_ids import SemanticIDs
from recgen.tokens.rqvae import RqVae, load_tokenizer

SMALL = {"n_layers": 3, "n_embed": 16, "latent_dim": 8, "epochs": 4, "batch_size": 64, "save_every": 2, "eval_every": 2, "device": "cpu"}
MEANS = {"mode": "kmeans", "n_layers": 3, "n_clusters": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Vectors of 240 items in 30 groups: text, a wider and louder graph, and a catalogue with titles, categories and pairs."
    here, rng = tmp_path_factory.mktemp("vectors"), np.random.default_rng(0)
    group = rng.integers(30, size=240)
    text = rng.normal(size=(30, 12))[group] + 0.3 * rng.normal(size=(240, 12))
    graph = 100 * (rng.normal(size=(30, 40))[group] + 0.3 * rng.normal(size=(240, 40)))
    vectors = {"text": list(text.astype(np.float32)), "graph": list(graph.astype(np.float32))}
    write(here, np.arange(1, 241), vectors)
    items = pd.DataFrame({"item_id": range(1, 241), "raw_id": [f"r{i}" for i in range(240)], "title": [f"thing {i} of {g}" for i, g in enumerate(group)],
                          "categories": [["all", f"g{g}"] for g in group]})
    pq.write_table(pa.Table.from_pandas(items), here / "items.parquet")
    (here / "relations").mkdir()
    pairs = [(i + 1, j + 1) for i in range(240) for j in range(i) if group[i] == group[j]]
    pq.write_table(pa.table({"source": [a for a, _ in pairs], "target": [b for _, b in pairs]}), here / "relations" / "item__also_bought__item.parquet")
    return here


def write(where, ids, columns):
    pq.write_table(pa.table({"ItemID": pa.array(np.asarray(ids)), **columns, "embedding": columns["text"]}), where / "item_emb.parquet")


def some(folder, where, ids):
    "A folder with the vectors of some of the items, and no catalogue."
    where.mkdir(exist_ok=True)
    table = pq.read_table(folder / "item_emb.parquet").to_pandas()
    pq.write_table(pa.Table.from_pandas(table[table["ItemID"].isin(list(ids))], preserve_index=False), where / "item_emb.parquet")
    return str(where)


@pytest.fixture(scope="module")
def tiger(folder, tmp_path_factory):
    "A finished run of each kind, with everything that it shows."
    out = tmp_path_factory.mktemp("tiger") / "out"
    return out, run_stage("03_tokenizer", whole=True, data_path=str(folder), output_dir=str(out), **SMALL)


def test_the_files_of_the_original(folder, tiger):
    out, names = tiger
    assert {p.name for p in out.iterdir() if not p.name.startswith(".")} >= {
        "manifest.json", "final_model.pt", "semantic_id_mappings.json", "semantic_ids.parquet", "training_results.json", "codebooks.safetensors", "metrics.jsonl",
        "checkpoint_epoch_2.pt", "checkpoint_epoch_4.pt", "checkpoints", "logs"}
    assert os.path.samefile(out / "checkpoint_epoch_4.pt", out / "checkpoints" / "epoch_4.pt")
    (log,) = (out / "logs").glob("*.log")
    assert log.name.endswith(f"_{folder.name}_tiger_ep4_bs64.log")
    text = log.read_text()
    for part in (" - INFO - Epoch 4: Loss=", "Recon=", "VQ=", "Duplicate rate:", "Codebook usage: level 0", "Model: 12 → 512 → 256 → 128 → 8 and back, 3 levels of 16 codes"):
        assert part in text, part
    mapping = json.loads((out / "semantic_id_mappings.json").read_text())
    model, ids = RqVae.load_from_checkpoint(out / "final_model.pt"), SemanticIDs.load(out)
    assert mapping["17"] == ids.codes([17])[0].tolist() and len(mapping) == 240
    assert model.get_semantic_ids(names["vectors"].vectors).equal(ids.raw_codes)
    results = read_json(out / "training_results.json")
    assert len(results["health"]) == 3 and results["mode"] == "tiger" and results["training"]["epochs"] == 4 and 0 <= results["scores"]["purity"] <= 1


def test_equal_runs_are_equal_and_a_second_one_is_reused(folder, tiger, tmp_path, capsys):
    out, _ = tiger
    run_stage("03_tokenizer", data_path=str(folder), output_dir=str(tmp_path / "again"), **SMALL)
    one, two = manifest_of(out), manifest_of(tmp_path / "again")
    assert one["outputs"] == two["outputs"] and one["metrics"] == two["metrics"]
    assert {"tokens/duplicate_rate", "tokens/use_0", "collisions/share_moved", "collisions/duplicate_rate_before", "scores/purity", "scores/pairs_lift_cut", "train/best_epoch"} <= set(one["metrics"])
    capsys.readouterr()
    run_stage("03_tokenizer", whole=True, data_path=str(folder), output_dir=str(out), **SMALL)
    assert "reusing a finished run" in capsys.readouterr().out


def test_joined_vectors_weigh_the_same(folder, tmp_path):
    "The louder and wider source does not decide alone: both keep about as much of their own neighbours."
    out = tmp_path / "both"
    names = run_stage("03_tokenizer", data_path=str(folder), output_dir=str(out), embedding_column="text+graph", **MEANS)
    model = load_tokenizer(out / "final_model.pt")
    x = model.transform(names["vectors"].vectors)
    variance = x.var(0, correction=0)
    assert variance[:12].sum().item() == pytest.approx(variance[12:].sum().item(), rel=1e-3) and x.shape[1] == 52
    with pytest.raises(InputError, match="another width"):
        model.codes(names["vectors"].vectors[:, :12])


def test_appending(folder, tmp_path):
    "Two appends: nothing that was published moves, ids of departed items stay reserved, the last table is of exactly the last catalogue."
    run = lambda name, ids, **more: run_stage("03_tokenizer", data_path=some(folder, tmp_path / name, ids), output_dir=str(tmp_path / f"{name}-ids"), dedup=DEDUP, **MEANS, **more)  # noqa: E731
    for DEDUP in ("nearest", "suffix"):
        tables = []
        for step, ids in enumerate((range(60, 200), [*range(1, 60), *range(100, 200)], range(1, 241))):
            run(f"{DEDUP}{step}", ids, **({"append_to": str(tmp_path / f"{DEDUP}{step - 1}-ids")} if step else {}))
            tables.append(SemanticIDs.load(tmp_path / f"{DEDUP}{step}-ids"))
            assert tables[-1].item_ids.tolist() == sorted(ids) and len(tables[-1].codes().unique(dim=0)) == len(ids)
        first, second, third = tables
        kept = [i for i in range(100, 200)]
        assert first.codes(kept).equal(second.codes(kept)) and second.codes(kept).equal(third.codes(kept))
        assert third.codes(list(range(60, 100))).equal(first.codes(list(range(60, 100)))), "an item that comes back finds its ID"
        assert third.codes(list(range(1, 60))).equal(second.codes(list(range(1, 60))))
        assert (tmp_path / f"{DEDUP}1-ids" / "departed" / "semantic_ids.parquet").exists() and not (tmp_path / f"{DEDUP}2-ids" / "departed").exists()
    manifest = read_json(tmp_path / "nearest2-ids" / "manifest.json")
    assert manifest["parameters"]["mode"] == "kmeans" and "epochs" not in manifest["parameters"]
    shutil.rmtree(tmp_path / "nearest1-ids" / "departed")
    DEDUP = "nearest"
    with pytest.raises(InputError, match="departed"):  # lost: their IDs would be given to others
        run("lost", range(1, 241), append_to=str(tmp_path / "nearest1-ids"))
    with pytest.raises(InputError):
        run("wrong", range(1, 241), append_to=str(folder))
    with pytest.raises(InputError):  # published with a suffix, continued without
        run_stage("03_tokenizer", data_path=str(folder), output_dir=str(tmp_path / "other"), dedup="nearest", append_to=str(tmp_path / "suffix0-ids"), **MEANS)
    assert not (tmp_path / "other").exists() and not (tmp_path / "lost-ids").exists()


def test_streaming(folder, tmp_path):
    "Codes that are assigned in blocks are those of the saved model; a suffix tells items apart."
    names = run_stage("03_tokenizer", whole=True, data_path=str(folder), output_dir=str(tmp_path / "stream"), dedup="suffix", streaming=True, **MEANS)
    ids, x = SemanticIDs.load(tmp_path / "stream"), names["vectors"].vectors
    assert ids.raw_codes.equal(load_tokenizer(tmp_path / "stream" / "final_model.pt").codes(x)) and len(ids.codes().unique(dim=0)) == 240
    for change in ({"dedup": "nearest"}, {"mode": "tiger"}, {"balanced": True}, {"embedding_column": "text+graph"}, {"max_items": 10}):
        with pytest.raises(ParameterError, match="plain residual k-means only"):
            run_stage("03_tokenizer", data_path=str(folder), output_dir=str(tmp_path / "none"), streaming=True, **{**MEANS, "dedup": "suffix", **change})
    assert not (tmp_path / "none").exists()


def test_streaming_refuses_before_it_writes(folder, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(folder / "items.parquet", few)
    table = pq.read_table(folder / "item_emb.parquet")
    how = dict(data_path=str(few), output_dir=str(tmp_path / "out"), streaming=True, dedup="suffix")
    pq.write_table(table.slice(0, 200), few / "item_emb.parquet")
    with pytest.raises(InputError, match="other items than the catalogue"):
        run_stage("03_tokenizer", **how, **MEANS)
    pq.write_table(table, few / "item_emb.parquet")
    with pytest.raises(InputError, match="more codes than distinct vectors"):
        run_stage("03_tokenizer", **how, **{**MEANS, "n_clusters": 500})
    assert not (tmp_path / "out").exists()


def test_balanced(folder, tmp_path):
    run_stage("03_tokenizer", data_path=str(folder), output_dir=str(tmp_path / "out"), balanced=True, **MEANS)
    raw = SemanticIDs.load(tmp_path / "out").raw_codes
    assert max(int(torch.bincount(c).max()) for c in raw.T) <= -(-11 * 240 // 160)


def test_other_peoples_tables_stand_beside(folder, tmp_path, tiger):
    rng = np.random.default_rng(1)
    lines = "\n".join(f"{i}\t" + "\t".join(map(str, rng.integers(16, size=3))) for i in range(1, 241))
    (tmp_path / "random.tsv").write_text(lines)
    (tmp_path / "index.json").write_text(json.dumps({str(i): [f"<a_{rng.integers(16)}>", f"<b_{rng.integers(16)}>"] for i in range(240)}))
    names = run_stage("03_tokenizer", whole=True, data_path=str(folder), output_dir=str(tiger[0]), compare_ids=f"{tmp_path}/*.tsv,{tmp_path}/index.json", **SMALL)
    table = names["scores"]
    assert list(table.index) == ["this run", "random", "index"]
    assert table.loc["this run", "pairs_lift_cut"] > 2 > table.loc["random", "pairs_lift_cut"]
    (tmp_path / "random.tsv").write_text(lines.rsplit("\n", 1)[0])
    with pytest.raises(InputError, match="do not fit the catalogue"):
        run_stage("03_tokenizer", whole=True, data_path=str(folder), output_dir=str(tiger[0]), compare_ids=f"{tmp_path}/random.tsv", **SMALL)


def test_ill_ids_warn_or_fail(folder, tmp_path, capsys):
    "Too many codes for 240 items: a warning in report and log, or an error if asked."
    much = {**SMALL, "n_embed": 200, "epochs": 1}
    run_stage("03_tokenizer", data_path=str(folder), output_dir=str(tmp_path / "out"), min_codebook_use=1.0, **much)
    assert read_json(tmp_path / "out" / "training_results.json")["warnings"] and "warning: level" in capsys.readouterr().out
    with pytest.raises(InputError, match="semantic IDs are ill"):
        run_stage("03_tokenizer", data_path=str(folder), output_dir=str(tmp_path / "strict"), min_codebook_use=1.0, strict=True, **much)
    assert not (tmp_path / "strict" / "manifest.json").exists()


def test_max_items_and_levels(folder, tmp_path):
    for levels in (1, 5):
        run_stage("03_tokenizer", whole=True, data_path=str(folder), output_dir=str(tmp_path / str(levels)), max_items=50, **{**SMALL, "n_layers": levels, "n_embed": 50, "valid_share": 0.0})
        assert len(SemanticIDs.load(tmp_path / str(levels))) == 50


def test_a_catalogue_without_categories_or_pairs(folder, tmp_path):
    items = pq.read_table(folder / "items.parquet").to_pandas()
    items["categories"] = [[] for _ in range(len(items))]
    (tmp_path / "relations").mkdir()
    shutil.copy(folder / "item_emb.parquet", tmp_path)
    pq.write_table(pa.table({"source": [3], "target": [3]}), tmp_path / "relations" / "item__also_bought__item.parquet")
    pq.write_table(pa.Table.from_pandas(items), tmp_path / "items.parquet")
    names = run_stage("03_tokenizer", whole=True, data_path=str(tmp_path), output_dir=str(tmp_path / "out"), **MEANS)
    assert "purity" not in names["scores"] and "neighbours_cut" in names["scores"]


def test_a_collapsed_last_level_is_seen(folder, tmp_path, capsys):
    "Resolving collisions spreads a collapsed level out; its use is that of the model's own codes."
    table = pq.read_table(folder / "item_emb.parquet").to_pandas()
    near = np.eye(6)[np.arange(240) % 6] + 1e-3 * np.random.default_rng(0).normal(size=(240, 6))
    (tmp_path / "tight").mkdir()
    pq.write_table(pa.table({"ItemID": table["ItemID"], "embedding": list(near.astype(np.float32))}), tmp_path / "tight" / "item_emb.parquet")
    run_stage("03_tokenizer", data_path=str(tmp_path / "tight"), output_dir=str(tmp_path / "out"), **{**SMALL, "n_layers": 1, "n_embed": 240, "use_ema": False, "valid_share": 0.0, "learning_rate": 1e-6})
    results = read_json(tmp_path / "out" / "training_results.json")
    assert results["collisions"]["after"]["duplicate_rate"] == 0
    assert results["health"][0]["used"] == len(SemanticIDs.load(tmp_path / "out").raw_codes.unique())
