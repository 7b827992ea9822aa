"""Real logs: their counts, their order, their tables of codes. Skipped where the data are not there."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from log_datasets import dataset_of

from recgen.core.ragged import padding_share
from recgen.core.training import TrainSettings
from recgen.evaluation.protocol import cases_from_dataset
from recgen.formats.dataset import Dataset, order_positions
from recgen.formats.embeddings import load_embeddings
from recgen.formats.semantic_ids import SemanticIDs
from recgen.quantization.scaling import column_scale, standardized
from recgen.retrieval.sequences import PrefixSamples
from recgen.sources.recbole import recbole_source
from recgen.sources.sequences import sequence_source
from recgen.tokens.rqvae import RqVaeConfig, train_rqvae

@pytest.fixture(scope="module")
def beauty(request):
    data = request.getfixturevalue("data")
    return dataset_of(sequence_source(data / "beauty"), "beauty")


def test_beauty_has_its_published_counts(beauty):
    assert (beauty.n_users, beauty.n_items, len(beauty.all_rows_with_held_out())) == (22_363, 12_101, 198_502)
    assert len(beauty.valid_rows_held_out()) == len(beauty.test_rows_held_out()) == 22_363
    cases = cases_from_dataset(beauty, "test")
    assert len(cases) == 22_363 and int(cases.history.lengths.min()) == 4


def test_beauty_is_the_file_as_it_stands(beauty, data):
    line = (data / "beauty" / "sequences.txt").read_text().splitlines()[0].split()
    rows = beauty.all_rows_with_held_out()
    assert rows[rows.user_id == int(line[0])].item_id.tolist() == [int(i) for i in line[1:]]
    first = json.loads((data / "beauty" / "items.jsonl").read_text().splitlines()[0])
    assert beauty.items.set_index("item_id").loc[first["id"], "title"] == first["title"]


def test_beautys_training_samples_and_their_padding(beauty):
    samples = PrefixSamples.from_sequences(beauty.train_sequences(), 20)
    assert len(samples) == 131_413
    share = padding_share(samples.lengths, samples.batches(256, torch.Generator().manual_seed(0)))
    print(f"\npadding in batches of 256: {share:.2%}")
    assert share < 0.1


def test_beautys_vectors_cover_its_items(beauty, data):
    vectors = load_embeddings(data / "beauty", catalogue=beauty.items["item_id"])
    assert vectors.vectors.shape == (12_101, 384) and vectors.vectors.isfinite().all()
    assert (vectors.vectors.std(0) == 0).nonzero().squeeze(1).tolist() == [127, 223]


@pytest.mark.parametrize("name", ["cgr_rkmeans_native", "cgr_rqvae_native", "iba_rqvae", "letter_official", "nonametiger_rqkmeans", "nonametiger_rqvae"])
def test_published_code_tables_are_semantic_ids(name, data, beauty, tmp_path):
    table = pd.read_csv(data / "beauty" / "peer_codes" / f"{name}.tsv", sep="\t", names=["id", "c1", "c2", "c3", "c4"]).to_numpy(np.int64)
    codes = table[:, 1:]
    ids = SemanticIDs(table[:, 0], codes - codes.min(0))
    assert len(ids) == 12_101 and ids.n_levels == 4
    ids.check_coverage(beauty.items["item_id"].tolist())
    ids.save(tmp_path)
    assert SemanticIDs.load(tmp_path) == ids
    trie = ids.to_trie()
    assert len(trie.items) == 12_101 and trie.n_nodes[-1] == len(np.unique(codes, axis=0))
    assert trie.find(ids.codes()[:500]).equal(trie.leaf_of_item[ids.item_ids[:500]])


@pytest.mark.parametrize("policy", ["given", "hash"])
def test_movielens_has_its_published_counts(policy, data):
    dataset = dataset_of(recbole_source(data / "ml100k"), "ml100k", tie_policy=policy)
    assert (dataset.n_users, dataset.n_items, len(dataset.all_rows_with_held_out())) == (943, 1_682, 100_000)
    rows = dataset.all_rows_with_held_out()
    assert (rows.groupby("user_id")["timestamp"].diff().dropna() >= 0).all() and rows["user_id"].is_monotonic_increasing
    assert rows.groupby("user_id")["position"].apply(lambda p: (p.to_numpy() == np.arange(len(p))).all()).all()
    assert len(dataset.users) == 943 and dataset.users["age"].notna().all()
    assert dataset.items["title"].str.len().gt(0).all()


def test_policy_hash_does_not_depend_on_the_files_order(data):
    frame = pd.read_csv(data / "ml100k" / "ml-100k.inter", sep="\t", names=["user_id", "item_id", "rating", "timestamp"], header=0)
    users, items = frame["user_id"], frame["item_id"]
    mixed = np.random.default_rng(0).permutation(len(frame))
    a = order_positions(frame, "hash", users, items)
    b = order_positions(frame.iloc[mixed], "hash", users.iloc[mixed], items.iloc[mixed])
    assert (a[mixed] == b).all()
    given = order_positions(frame), order_positions(frame.iloc[mixed])
    assert (given[0][mixed] != given[1]).any(), "policy given does: this log has ties"
    assert (a != given[0]).any()


def test_a_k_core_of_movielens(data):
    dataset = dataset_of(recbole_source(data / "ml100k"), "ml100k", k_core=20, tie_policy="hash")
    rows = dataset.all_rows_with_held_out()
    assert rows.groupby("user_id").size().min() >= 20 and rows.groupby("item_id").size().min() >= 20
    assert dataset.n_items < 1_682 and rows["item_id"].max() == dataset.n_items == rows["item_id"].nunique()
    assert isinstance(dataset, Dataset)


@pytest.mark.slow
def test_an_rqvae_of_beauty_uses_its_codes(data):
    "A quarter of the default training: every level is used, few items share a tuple, and it rebuilds more than half of the variance."
    vectors = load_embeddings(data / "beauty").vectors
    mean, scale = column_scale(vectors, standardize=True)
    how = TrainSettings(epochs=25, batch_size=512, learning_rate=1e-3, device="cpu", eval_every=25)
    trainer = train_rqvae(RqVaeConfig(width=384, latent_dim=32, n_layers=3, n_embed=256), how, standardized(vectors, mean, scale), mean, scale)
    record = trainer.position.records[-1]
    assert min(record[f"catalogue/use_{level}"] for level in range(3)) >= 0.95
    assert record["catalogue/duplicate_rate"] <= 0.05 and record["catalogue/recon"] <= 215
