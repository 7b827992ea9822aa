"""02_graphsage: what a run writes for each kind of graph, what it must not know, what it refuses before it writes."""
import functools
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stage_runs import run_stage

from recgen.core.device import generator
from recgen.core.errors import InputError, ParameterError
from recgen.core.files import read_torch
from recgen.core.params import check_values, read_declarations
from recgen.formats.dataset import Dataset, write_dataset
from recgen.formats.embeddings import load_embeddings
from recgen.formats.provenance import Provenance
from recgen.stages.graphsage import (
    ALIASES,
    NAME,
    RULES,
    Inputs,
    final_vectors,
    leaf_labels,
    learning_graph,
    node_features,
    prepare,
    read_inputs,
    sage_settings,
)

USERS, ITEMS = 60, 24  # item 23 was bought in test rows alone, item 24 never
QUICK = {"epochs": 2, "batch_size": 64, "batches_per_forward": 2, "pairs_per_epoch": 512, "walk_length": 8, "walks_per_node": 2, "window": 2, "hidden_dim": 8, "output_dim": 6,
         "lightgcn_epochs": 1, "device": "cpu"}


@functools.cache
def shop() -> Dataset:
    "Two kinds of items, two kinds of users."
    g = generator(0)
    rows = []
    for u in range(USERS):
        taken = (torch.randperm(11, generator=g)[:7] * 2 + u % 2 + 1).tolist()
        rows += [(u + 1, i, t) for t, i in enumerate([*taken[:6], 23 if u == 0 else taken[6]])]
    items = pd.DataFrame({"item_id": range(1, ITEMS + 1), "raw_id": [f"i{i}" for i in range(ITEMS)], "title": [f"thing {i}" for i in range(ITEMS)], "brand": [f"b{i % 5}" for i in range(ITEMS)],
                          "categories": [["all", f"c{i % 2}"] for i in range(ITEMS)]})
    users = pd.DataFrame({"user_id": range(1, USERS + 1), "raw_id": [f"u{i}" for i in range(USERS)]})
    return Dataset(pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]), items, {"name": "shop"}, users)


def vectors(n: int = ITEMS, seed: int = 1):
    return torch.randn(n, 5, generator=generator(seed))


def folder(tmp_path, table=None, **tables):
    "The shop on disk."
    place = tmp_path / "data"
    if table is None:
        table = pa.table({"ItemID": list(range(1, ITEMS + 1)), "embedding": vectors().tolist()})
    write_dataset(place, shop(), {"item_emb.parquet": table, **tables})
    return place


def also_bought():
    a = torch.arange(1, ITEMS - 1)
    return pd.DataFrame({"source": a.numpy(), "target": (a + 2).numpy()})


def settings(**change):
    "Parameters as the stage's functions read them."
    values = {**dict(graph="items", item_item=1, neighbours=20, attributes=[], features="text", p=1.0, q=1.0, n_layers=2, fanouts=[], scale=0.0, seed=0, val_fraction=0.1), **QUICK, **change}
    made = SimpleNamespace(**values)
    made.as_dict = lambda: values
    return made


def test_a_graph_of_items(runs, tmp_path):
    place = folder(tmp_path)
    names = run_stage("02_graphsage", whole=True, data_path=str(place), item_item=1, **QUICK)
    run = names["run"].folder
    emb = load_embeddings(run, catalogue=range(1, ITEMS + 1))
    assert emb.vectors.shape == (ITEMS, 6) and torch.allclose(emb.vectors.norm(dim=1), torch.ones(ITEMS), atol=1e-5), "items without an edge too"
    for name in ("model.pt", "per_user.parquet", "results.parquet", "checkpoints/model_best.pt", "checkpoints/last.pt", "logs/epoch_metrics.json", "logs/training_summary.json", "metrics.jsonl"):
        assert (run / name).exists(), name
    assert set(pq.read_table(run / "per_user.parquet").column_names) == {"user_id", "target", "rank", "rank_filtered"}
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["metrics"]["leaky"] == "" and "test/item/filtered/recall@10" in manifest["metrics"] and "valid/auc/low" in manifest["metrics"]
    assert Provenance.read(run) == Provenance({"02_graphsage": shop().train_hash})
    models = set(pq.read_table(run / "results.parquet")["model"].to_pylist())
    assert models == {NAME, "features alone", "popularity", "item-kNN", "EASE", "LightGCN", "LightGCN's items"}
    before = (run / "item_emb.parquet").read_bytes()
    again = run_stage("02_graphsage", data_path=str(place), item_item=1, **QUICK)
    assert again["run"].finished and again["run"].folder == run and (run / "item_emb.parquet").read_bytes() == before
    elsewhere = run_stage("02_graphsage", data_path=str(place), item_item=1, output_dir="twin", **QUICK)["run"].folder
    assert (elsewhere / "item_emb.parquet").read_bytes() == before, "the same parameters, the same bytes"


def test_users_and_items(runs, tmp_path):
    names = run_stage("02_graphsage", whole=True, data_path=str(folder(tmp_path)), graph="bipartite", attributes=["brand"], fanouts=[5, 5], **QUICK)
    run = names["run"].folder
    users = read_torch(run / "embed" / "shop_graphsage_user_emb.pt")
    ids = pq.read_table(run / "embed" / "ids.parquet").to_pandas()
    assert users.shape == (USERS, 6) and users.dtype == torch.float32 and not users.requires_grad
    assert ids["raw_id"].tolist() == [f"u{i}" for i in range(USERS)] and (ids["row"] == ids["id"] - 1).all()


def test_a_leaky_relation_is_marked_everywhere(runs, tmp_path):
    place = folder(tmp_path, **{"relations/item__also_bought__item.parquet": also_bought()})
    names = run_stage("02_graphsage", data_path=str(place), graph="item__also_bought__item", **QUICK)
    run = names["run"].folder
    assert Provenance.read(run).leaky == ["also_bought"] and json.loads((run / "manifest.json").read_text())["metrics"]["leaky"] == "also_bought"
    table = pq.read_table(run / "results.parquet").to_pandas().set_index("model")
    assert table.loc[NAME, "leaky"] == "also_bought" and (table.drop(index=NAME)["leaky"] == "").all() and table.index[-1] == NAME


def test_held_out_rows_are_in_no_graph():
    for kind in ("items", "bipartite"):
        csr, first = learning_graph(Inputs(shop(), vectors()), settings(graph=kind)).homogeneous()
        canary = first["item"] + 22  # item 23: bought in a test row alone
        assert csr.degrees[canary] == 0 and not (csr.columns == canary).any() and csr.n_edges
    train = shop().train_interactions()
    bought = learning_graph(Inputs(shop(), None), settings(graph="bipartite")).relations["user", "bought", "item"]
    assert bought.n_edges == len(train.drop_duplicates(["user_id", "item_id"]))


def test_users_start_as_the_mean_of_their_items_without_held_out_edges():
    inputs = Inputs(shop(), vectors())
    graph = learning_graph(inputs, settings(graph="bipartite"))
    trainer = prepare(inputs, graph, settings(graph="bipartite"))
    user, item = trainer.validation.edges[:, 0].tolist()
    first = graph.homogeneous()[1]
    user, item = (user, item) if user < USERS else (item, user)
    whole = node_features(*reversed([graph, graph.homogeneous()[0]]), first, inputs.vectors, "text")
    assert not torch.allclose(trainer.features[user], whole[user]), "the held-out item is not in its user's mean"
    neighbours = trainer.graph.columns[trainer.graph.offsets[user] : trainer.graph.offsets[user + 1]].long()
    assert torch.allclose(trainer.features[user, :5], trainer.features[neighbours, :5].mean(0), atol=1e-5) and item not in neighbours.tolist()


@pytest.mark.parametrize("features", ["structural", "text+structural", "learned"])
def test_other_features(features):
    inputs = Inputs(shop(), vectors() if "text" in features else None)
    p = settings(features=features)
    graph = learning_graph(inputs, p)
    trainer = prepare(inputs, graph, p)
    trainer.train()
    made = final_vectors(trainer, inputs, graph, p)
    assert made["item"].shape == (ITEMS, 6) and bool(made["item"].isfinite().all()) and (trainer.model.nodes is not None) == (features == "learned")


def test_text_is_asked_for_only_where_it_is_used(tmp_path):
    place = folder(tmp_path)
    (place / "item_emb.parquet").unlink()
    assert read_inputs(str(place), "structural").vectors is None
    with pytest.raises(InputError, match="item_emb.parquet"):
        read_inputs(str(place), "text")


def test_labels_are_the_categories_and_unknown_ones_are_minus_one():
    labels, names = leaf_labels(pd.DataFrame({"categories": [["a", "x"], ["a"], None, ["a", "x"]]}))
    assert labels.tolist() == [0, 1, -1, 0] and names == ["x", "a"] and leaf_labels(pd.DataFrame({"title": ["t"]})) == (None, [])


# --- parameters


def declared():
    import nbformat
    from stage_runs import NOTEBOOKS

    (cell,) = (c for c in nbformat.read(NOTEBOOKS / "02_graphsage.ipynb", 4).cells if "parameters" in c.metadata.get("tags", []))
    return read_declarations(cell.source)


def test_the_originals_names_are_aliases():
    given = {"gradient_clip": 2, "early_stopping_patience": 4, "min_delta": "1e-3", "checkpoint_every": 5, "num_layers": 3, "hidden": 16, "per_positive": 7, "num_epochs": 9}
    values = check_values(given, declared(), RULES, ALIASES)
    found = sage_settings(SimpleNamespace(**values, as_dict=lambda: values))
    assert (found.grad_clip, found.early_stop_patience, found.early_stop_min_delta, found.save_every) == (2.0, 4, 0.001, 5)
    assert (found.num_layers, found.hidden_dim, found.negatives_per_positive, found.epochs, found.learn_scale) == (3, 16, 7, 9, True)
    for wrong in ({"epocs": 1}, {"aggregator": "sum"}, {"walk_length": 1}, {"val_fraction": 0.9}, {"fanouts": [0]}, {"min_delta": 1, "early_stop_min_delta": 1}, {"p": 0}, {"features": "none"}):
        with pytest.raises(ParameterError):
            check_values(wrong, declared(), RULES, ALIASES)


# --- bad input


def broken_vectors(kind: str):
    x = vectors(ITEMS + 1 if kind == "more" else ITEMS).tolist()
    ids = list(range(1, len(x) + 1))
    if kind == "nan":
        x[3][0] = float("nan")
    if kind == "ragged":
        x[3] = x[3][:2]
    if kind == "twice":
        ids[1] = 1
    if kind == "missing":
        ids, x = ids[:-1], x[:-1]
    return pa.table({"ItemID": ids, "embedding": x})


@pytest.mark.parametrize("kind, words", [("nan", "NaN"), ("ragged", "different lengths"), ("twice", "two vectors"), ("missing", "other items"), ("more", "other items")])
def test_bad_vectors_are_refused_before_anything_is_written(kind, words, runs, tmp_path):
    with pytest.raises(InputError, match=words):
        run_stage("02_graphsage", data_path=str(folder(tmp_path, broken_vectors(kind))), **QUICK)
    assert not list(runs.rglob("*.*"))


@pytest.mark.parametrize("change, words", [
    ({"graph": "friends"}, "no such graph"), ({"graph": "item__likes__item"}, "no such relation"), ({"attributes": ["colour"]}, "no such column"),
    ({"fanouts": [3]}, "fan-out"), ({"device": "cuda:99"}, "device"), ({"data_path": "nowhere"}, "no dataset folder"),
])
def test_what_a_run_refuses_before_it_writes(change, words, runs, tmp_path):
    with pytest.raises(InputError, match=words):
        run_stage("02_graphsage", **{**QUICK, "data_path": str(folder(tmp_path)), "item_item": 1, **change})
    assert not list(runs.rglob("*.*"))


def test_a_relation_of_unknown_items_and_a_graph_without_edges(runs, tmp_path):
    place = folder(tmp_path, **{"relations/item__also_bought__item.parquet": pd.DataFrame({"source": [1, 99], "target": [2, 3]})})
    with pytest.raises(InputError, match="items that there are not"):
        run_stage("02_graphsage", **{**QUICK, "data_path": str(place), "graph": "item__also_bought__item"})
    for change, words in (({"item_item": 1000}, "no edges"), ({"item_item": 1, "neighbours": 1, "val_fraction": 0.5}, "cannot be held out")):
        with pytest.raises(InputError, match=words):
            run_stage("02_graphsage", **{**QUICK, "data_path": str(place), **change})
    assert not list(runs.rglob("*.*"))


def test_a_relation_whose_name_ends_in_of_goes_both_ways():
    inputs = Inputs(shop(), vectors(), {"item__part_of__series": pd.DataFrame({"source": [1, 2, 3], "target": [1, 1, 2]})})
    assert set(learning_graph(inputs, settings(graph="item__part_of__series")).relations) == {("item", "part_of", "series"), ("series", "part_of_of", "item")}


def test_vectors_of_another_dataset_are_not_mistaken_for_its_own():
    inputs = Inputs(shop(), vectors())
    graph = learning_graph(inputs, settings())
    graph.train_hash = "0" * 64
    with pytest.raises(InputError, match="training rows"):
        prepare(inputs, graph, settings())


def test_the_map_needs_no_categories():
    from recgen.stages.graphsage import draw_map, nearest_titles

    items = shop().items.drop(columns="categories")
    x = torch.nn.functional.normalize(vectors())
    assert draw_map(x, items).axes and len(nearest_titles(x, items, torch.tensor([0, 5]), 3)) == 6
    assert np.isfinite(x.numpy()).all()
