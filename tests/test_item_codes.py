"Item codes: rows by item id, ranges that do not meet, integrity, the original's files."
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recgen.clicks.item_codes import ItemCodes, item_info_table, join_codes, read_item_info, tag_matrix, write_item_info
from recgen.clicks.vqvae import VqVae, VqVaeConfig, train_vqvae
from recgen.core.errors import InputError
from recgen.core.files import write_parquet, write_tensors
from recgen.core.training import TrainSettings
from recgen.formats.embeddings import Embeddings
from recgen.formats.semantic_ids import SemanticIDs
from recgen.quantization.scaling import column_scale

N = 60


@pytest.fixture(scope="module")
def modalities():
    "Vectors and trained models of two modalities."
    g = torch.Generator().manual_seed(0)
    vectors = {name: torch.randn(N, 4, generator=g) @ torch.randn(4, width, generator=g) for name, width in (("text", 10), ("image", 7))}
    how = TrainSettings(epochs=3, batch_size=20, learning_rate=3e-3, device="cpu")
    sizes = {"text": {"tokens": 3, "n_embed": 16}, "image": {"tokens": 2, "n_embed": 8}}
    models = {name: train_vqvae(VqVaeConfig(v.shape[1], hidden=16, code_dim=4, **sizes[name]), how, v).load_best() for name, v in vectors.items()}
    return vectors, models


def semantic(n=N, sizes=(4, 5, 6), seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(k, (n,), generator=g) for k in sizes], 1)
    return SemanticIDs(torch.randperm(n, generator=g) + 1, codes, list(sizes))


def valid_table():
    return ItemCodes([[0, 0, 0], [1, 2, 5], [2, 2, 6], [4, 1, 8]], {"text": (0, 1, 1, 4), "image": (2, 2, 5, 8)})


# --- makers


def test_codes_of_modalities_never_meet_unless_asked(modalities):
    vectors, models = modalities
    table = ItemCodes.from_vqvaes(models, vectors)
    own = {name: models[name].encode(v) for name, v in vectors.items()}
    assert table.codes.dtype == torch.int32 and table.codes.shape == (N + 1, 5) and not table.codes[0].any()
    assert table.codes[1:, :3].equal(own["text"].int() + 1) and table.codes[1:, 3:].equal(own["image"].int() + 17)
    assert table.modalities == {"text": (0, 2, 1, 16), "image": (3, 4, 17, 24)} and table.n_codes == 24 and table.column_groups == [[0, 3], [3, 5]]
    assert not set(table.codes[1:, :3].unique().tolist()) & set(table.codes[1:, 3:].unique().tolist())
    shared = ItemCodes.from_vqvaes(models, vectors, shared=True)
    assert shared.modalities == {"text": (0, 2, 1, 16), "image": (3, 4, 1, 8)} and shared.n_codes == 16 and shared.check(N)
    assert shared.codes[1:, 3:].equal(own["image"].int() + 1)


def test_vectors_are_joined_by_item_id(modalities):
    vectors, models = modalities
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    shuffled = {name: Embeddings(order + 1, v[order], {name: v.shape[1]}) for name, v in vectors.items()}
    assert ItemCodes.from_vqvaes(models, shuffled).codes.equal(ItemCodes.from_vqvaes(models, vectors).codes)
    less = {"text": Embeddings(torch.arange(1, N), vectors["text"][:-1], {}), "image": vectors["image"]}
    with pytest.raises(InputError, match=f"items have no code(.|\n)*text(.|\n)*item {N}"):
        ItemCodes.from_vqvaes(models, less)
    table = ItemCodes.from_vqvaes(models, less, missing_ok=True)
    assert not table.codes[N, :3].any() and table.codes[N, 3:].all()
    for wrong, message in (({"text": vectors["text"]}, "different modalities"), ({"text": vectors["image"], "image": vectors["image"]}, "another width"),
                           ({"text": vectors["text"], "image": Embeddings(torch.ones(2, dtype=torch.int64), vectors["image"][:2], {})}, "do not belong"),
                           ({"text": vectors["text"], "image": vectors["image"] * float("nan")}, "NaN")):
        with pytest.raises(InputError, match=message):
            ItemCodes.from_vqvaes(models, wrong)
    with pytest.raises(InputError, match="do not belong(.|\n)*item 60"):
        ItemCodes.from_vqvaes(models, vectors, n_items=N - 1)


def test_an_untrained_model_makes_no_table(modalities):
    vectors, models = modalities
    fresh = VqVae(models["text"].config, *column_scale(vectors["text"], True))
    with pytest.raises(InputError, match="never trained"):
        ItemCodes.from_vqvaes({"text": fresh}, {"text": vectors["text"]})


def test_semantic_ids_by_level_and_prefix():
    ids = semantic()
    table = ItemCodes.from_semantic_ids(ids, prefixes=[3, 2])
    assert table.codes[ids.item_ids, :3].equal(ids.tokens().int()), "the tokens of the contract, with 0 for padding"
    assert list(table.modalities) == ["semantic_ids", "prefix_2", "prefix_3"] and table.modalities["semantic_ids"] == (0, 2, 1, 15)
    for column, length in ((3, 2), (4, 3)):
        own = table.codes[ids.item_ids, column]
        same = (ids.codes()[:, None, :length] == ids.codes()[None, :, :length]).all(2)
        assert same.equal(own[:, None] == own[None])
        assert len(own.unique()) == int(own.max() - own.min()) + 1 == len(ids.codes()[:, :length].unique(dim=0))
    assert ItemCodes.from_semantic_ids(ids).codes.shape == (N + 1, 3)
    for wrong in ([1], [4], [0, 2]):
        with pytest.raises(InputError, match="no prefixes"):
            ItemCodes.from_semantic_ids(ids, wrong)
    with pytest.raises(InputError, match="no code"):
        ItemCodes.from_semantic_ids(ids, n_items=N + 2)
    assert ItemCodes.from_semantic_ids(ids, n_items=N + 2, missing_ok=True).n_items == N + 2


def test_joining(modalities):
    vectors, models = modalities
    one, other = ItemCodes.from_vqvaes(models, vectors), ItemCodes.from_semantic_ids(semantic())
    both = join_codes([one, other]).check(N)
    assert both.modalities["semantic_ids"] == (5, 7, 25, 39) and both.codes[1:, 5:].equal(other.codes[1:] + 24) and both.codes[:, :5].equal(one.codes)
    with pytest.raises(InputError, match="stands twice"):
        join_codes([one, one])
    with pytest.raises(InputError, match="different catalogues"):
        join_codes([one, ItemCodes.from_semantic_ids(semantic(5))])
    with pytest.raises(InputError, match="different catalogues"):
        join_codes([])


# --- integrity


@pytest.mark.parametrize("spoil, message", [
    (lambda c: c.__setitem__((0, 1), 1), "row 0 is not padding"),
    (lambda c: c.__setitem__((2, 0), 5), "outside their modality's range(.|\n)*item 2"),
    (lambda c: c.__setitem__((3, 2), 4), "outside their modality's range(.|\n)*item 3"),
    (lambda c: c.__setitem__((1, 1), -1), "outside their modality's range(.|\n)*item 1"),
    (lambda c: c.__setitem__((1, 2), 0), "have no code(.|\n)*image(.|\n)*item 1"),
])
def test_spoiled_tables_are_refused(spoil, message):
    table = valid_table()
    table.check(3)
    spoil(table.codes)
    with pytest.raises(InputError, match=message):
        table.check(3)


@pytest.mark.parametrize("places", [{"text": (0, 1, 1, 4)}, {"text": (0, 1, 1, 4), "image": (1, 2, 5, 8)}, {"text": (0, 1, 0, 4), "image": (2, 2, 5, 8)}, {"text": (0, 1, 1, 4), "image": (2, 2, 4, 8)}])
def test_spoiled_ranges_are_refused(places):
    with pytest.raises(InputError, match="modalities"):
        ItemCodes(valid_table().codes, places).check()


def test_what_is_no_table():
    for wrong in (torch.zeros(3), torch.zeros(3, 2), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.int64)):
        with pytest.raises(InputError, match="not a table"):
            ItemCodes(wrong)
    with pytest.raises(InputError, match="another catalogue"):
        valid_table().check(4)


def test_save_and_load(modalities, tmp_path):
    table = join_codes([ItemCodes.from_vqvaes(modalities[1], modalities[0]), ItemCodes.from_semantic_ids(semantic(), [2])])
    file = tmp_path / "item_codes.safetensors"
    table.save(file)
    again = ItemCodes.load(file, N)
    assert again.codes.equal(table.codes) and list(again.modalities.items()) == list(table.modalities.items()) and again.shared is False and again.codes.dtype == torch.int32
    with pytest.raises(InputError, match="another catalogue"):
        ItemCodes.load(file, N + 1)
    write_tensors(tmp_path / "other.safetensors", {"level_0": torch.zeros(3, 2)})
    broken = table.codes.clone()
    broken[0] = 1
    write_tensors(tmp_path / "broken.safetensors", {"codes": broken, "modality.0.text": torch.tensor([0, 8, 1, 100])})
    (tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:-100])
    for name in ("other", "broken", "torn", "absent"):
        with pytest.raises(InputError, match=name):
            ItemCodes.load(tmp_path / f"{name}.safetensors")


# --- the original's files


def items(n=N):
    g = np.random.default_rng(0)
    return pd.DataFrame({"item_id": np.arange(1, n + 1), "title": [f"t{i}" for i in range(n)], "categories": [[str(t) for t in g.integers(1, 99, g.integers(0, 8))] for _ in range(n)],
                         "likes_level": pd.array(g.integers(0, 11, n), "Int64"), "views_level": g.integers(0, 11, n).astype(np.int8)})


def test_item_info_has_the_originals_layout(tmp_path):
    frame, table = items(), ItemCodes.from_semantic_ids(semantic())
    frame.loc[4, "likes_level"] = pd.NA
    emb = np.random.default_rng(1).random((N, 6), np.float32)
    files = write_item_info(tmp_path, "all_emb_cb05", frame, table, {"item_emb_d128": emb})
    assert [f.name for f in files] == ["item_info.parquet", "EMB_all_emb_cb05_data.parquet"]
    for file, columns in zip(files, (["dis_emb"], ["dis_emb", "dis_dim"]), strict=True):
        found = pd.read_parquet(file)
        assert found.columns.tolist() == ["item_id", "item_tags", "likes_level", "views_level", "item_emb_d128", *columns]
        assert found["item_id"].tolist() == list(range(N + 1))
        for c in columns:
            assert (np.stack(found[c]) == table.codes.numpy()).all()
        assert all(not np.any(found[c][0]) for c in found), "row 0 is padding"
        assert np.stack(found["item_tags"]).shape == (N + 1, 5) and [t for t in found["item_tags"][3] if t] == [int(t) for t in frame["categories"][2][:5]]
        assert found["likes_level"][5] == 0 and found["likes_level"].isna().sum() == 0 and found["views_level"][1:].tolist() == frame["views_level"].tolist()
        assert (np.stack(found["item_emb_d128"][1:]) == emb).all()
        assert read_item_info(file, N).codes.equal(table.codes)


def test_tags_with_names_are_numbered():
    tags, names = tag_matrix([["b", "a"], None, [], np.array(["c", "b", "a"], object), float("nan")], max_tags=2)
    assert names == ["a", "b", "c"] and tags.tolist() == [[0, 0], [2, 1], [0, 0], [0, 0], [3, 2], [0, 0]]
    tags, names = tag_matrix([["7", "30"], []], max_tags=2)
    assert names == [] and tags.tolist() == [[0, 0], [7, 30], [0, 0]]
    tags, _ = tag_matrix([[], []])
    assert tags.shape == (3, 5) and not tags.any()


def test_items_that_do_not_fit_are_refused_before_writing(tmp_path):
    table = ItemCodes.from_semantic_ids(semantic())
    wrong = [(items(N - 1), {}, "another catalogue"), (items().iloc[::-1], {}, "in order"), (items().assign(likes_level=-1), {}, "levels"), (items().assign(views_level=1.5), {}, "levels"),
             (items(), {"vectors": {"v": np.zeros((N + 1, 2))}}, "for each item"), (items(), {"vectors": {"v": np.full((N, 2), np.nan)}}, "finite")]
    for frame, more, message in wrong:
        with pytest.raises(InputError, match=message):
            write_item_info(tmp_path, "x", frame, table, **more)
    with pytest.raises(InputError, match="file's name"):
        write_item_info(tmp_path, "../x", items(), table)
    assert not list(tmp_path.iterdir())
    assert item_info_table(items()[["item_id"]], table)["likes_level"].to_pylist() == [0] * (N + 1)


@pytest.mark.parametrize("spoil, message", [
    (lambda f: f.iloc[1:], "row number is not the item id"),
    (lambda f: f.drop(index=7), "row number is not the item id"),
    (lambda f: f.iloc[:0], "row number is not the item id"),
    (lambda f: f.sample(frac=1, random_state=0), "row number is not the item id"),
    (lambda f: f.assign(dis_emb=[[1, 1, 1]] + f["dis_emb"].tolist()[1:]), "row 0 is not padding"),
    (lambda f: f.assign(dis_emb=f["dis_emb"].tolist()[:-1] + [[1, 2]]), "different lengths"),
    (lambda f: f.assign(dis_emb=f["dis_emb"].tolist()[:-1] + [[1, 2, -3]]), "missing or negative"),
    (lambda f: f.assign(dis_emb=f["dis_emb"].tolist()[:-1] + [None]), "different lengths"),
    (lambda f: f.assign(dis_emb=[[0.5] * 3] * len(f)), "lists of whole numbers"),
    (lambda f: f.assign(likes_level=[None] + [1] * (len(f) - 1)), "levels"),
    (lambda f: f.assign(likes_level=[1] * len(f)), "levels"),
    (lambda f: f.assign(item_tags=f["item_tags"].tolist()[:-1] + [[1]]), "different lengths(.|\n)*item_tags"),
    (lambda f: f.assign(item_tags=[[1] * 5] * len(f)), "item 0 is not padding"),
    (lambda f: f.drop(columns="dis_emb"), "a column is missing"),
    (lambda f: f.assign(item_id=None), "item_id|item ids"),
])
def test_spoiled_item_files_are_refused(spoil, message, tmp_path):
    file, table = tmp_path / "item_info.parquet", ItemCodes.from_semantic_ids(semantic())
    write_parquet(file, pa.Table.from_pandas(spoil(item_info_table(items(), table).to_pandas()), preserve_index=False))
    with pytest.raises(InputError, match=message):
        read_item_info(file)


def test_the_originals_name_alone_is_read_too(tmp_path):
    table = item_info_table(items(), ItemCodes.from_semantic_ids(semantic()), names=("dis_dim",))
    pq.write_table(table.select(["item_id", "dis_dim"]), tmp_path / "EMB_x_data.parquet")
    assert read_item_info(tmp_path / "EMB_x_data.parquet", N).n_items == N
