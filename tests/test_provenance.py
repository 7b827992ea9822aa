"""What vectors have seen goes with them: through the tokenizer's folder into the retrieval stage, which refuses other training rows."""
import json

import pandas as pd
import pytest
from stage_runs import TINY, run_stage, tiny

from recgen.core.errors import InputError
from recgen.evaluation.protocol import LeakageError
from recgen.formats.dataset import Dataset
from recgen.formats.provenance import Provenance

def graph_vectors(folder, train_hash, leaky=()):
    "A folder as a graph stage leaves it: the tiny catalogue's vectors, and what they were made from."
    folder.mkdir(parents=True)
    pd.read_parquet(tiny("00_data") / "item_emb.parquet")[["ItemID", "embedding"]].to_parquet(folder / "item_emb.parquet")
    Provenance({"01_hgt": train_hash}, list(leaky)).write(folder)
    return folder


def tokenize(folder, vectors):
    run_stage("03_tokenizer", data_path=str(tiny("00_data")), embedding_column=f"embedding+{vectors}:embedding", output_dir=str(folder), **TINY["03_tokenizer"])
    return folder


def test_it_reads_what_it_wrote(tmp_path):
    assert Provenance.read(tmp_path) == Provenance()
    Provenance().write(tmp_path)
    assert not list(tmp_path.iterdir())
    Provenance({"01_hgt": "ab"}, ["also_bought"]).write(tmp_path)
    assert Provenance.read(tmp_path) == Provenance.read(tmp_path / "provenance.json") == Provenance({"01_hgt": "ab"}, ["also_bought"])


def test_parts_of_other_rows_are_not_joined():
    a, b = Provenance({"01_hgt": "ab"}, ["x"]), Provenance({"02_graphsage": "ab"}, ["x", "y"])
    assert Provenance.join([a, b]) == Provenance({"01_hgt": "ab", "02_graphsage": "ab"}, ["x", "y"])
    with pytest.raises(InputError, match="different training rows"):
        Provenance.join([a, Provenance({"01_hgt": "cd"})])


@pytest.mark.parametrize("content", ["[]", '{"train_hashes": 3, "leaky": []}', '{"leaky": []}'])
def test_what_says_nothing_is_refused(tmp_path, content):
    (tmp_path / "provenance.json").write_text(content)
    with pytest.raises(InputError, match="provenance.json"):
        Provenance.read(tmp_path)


@pytest.mark.slow
def test_the_tokenizer_passes_it_on_and_retrieval_compares(tmp_path):
    own = Dataset.load(tiny("00_data")).train_hash
    ids = tokenize(tmp_path / "ids", graph_vectors(tmp_path / "hgt", own, ["also_bought"]))
    assert Provenance.read(ids) == Provenance({"01_hgt": own}, ["also_bought"])
    settings = {**TINY["04_tiger"], "epochs": 1, "sasrec_epochs": 1}
    run_stage("04_tiger", data_path=str(tiny("00_data")), semantic_ids=str(ids), output_dir=str(tmp_path / "tiger"), **settings)
    table = pd.read_parquet(tmp_path / "tiger" / "results.parquet").set_index("model")
    assert table.loc[["TIGER", "TIGER + SASRec"], "leaky"].tolist() == ["also_bought"] * 2 and (table.loc[["SASRec", "popularity"], "leaky"] == "").all()
    assert "provenance.json" in json.loads((tmp_path / "tiger" / "manifest.json").read_text())["outputs"]


@pytest.mark.slow
def test_vectors_that_saw_other_rows_are_refused(tmp_path):
    ids = tokenize(tmp_path / "ids", graph_vectors(tmp_path / "hgt", "0" * 64))
    with pytest.raises(LeakageError, match="01_hgt, behind the semantic IDs, was not made from this run's training rows"):
        run_stage("04_tiger", data_path=str(tiny("00_data")), semantic_ids=str(ids), output_dir=str(tmp_path / "tiger"), **TINY["04_tiger"])
    assert not (tmp_path / "tiger").exists()
