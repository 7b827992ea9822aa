"""What stages hand to one another on disk, as properties: what is written is what is read, and the tree is the table."""
import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from log_datasets import dataset_of

from recgen.core.errors import InputError
from recgen.core.files import write_parquet
from recgen.formats.dataset import LEAVE_ONE_OUT, TEST, TRAIN, UNUSED, VALID, Dataset, dataset_table, order_positions, write_dataset
from recgen.formats.embeddings import load_embeddings
from recgen.formats.semantic_ids import SemanticIDs
from recgen.formats.trie import Trie
from recgen.sources.recbole import recbole_source
from recgen.sources.sequences import sequence_source

few = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def tables(draw, max_levels=4, max_size=5, max_items=25):
    "(item ids in any order, codes, sizes): duplicates of codes allowed, sizes at least what the codes need."
    levels = draw(st.integers(1, max_levels))
    sizes = draw(st.lists(st.integers(1, max_size), min_size=levels, max_size=levels))
    ids = draw(st.lists(st.integers(1, 60), min_size=1, max_size=max_items, unique=True))
    codes = [[draw(st.integers(0, k - 1)) for k in sizes] for _ in ids]
    return ids, codes, sizes


# --- semantic IDs


@few
@given(tables())
def test_both_files_give_the_table_back(tmp_path_factory, table):
    ids, codes, sizes = table
    folder = tmp_path_factory.mktemp("ids")
    written = SemanticIDs(ids, codes, sizes)
    written.save(folder)
    for path in (folder, folder / "semantic_ids.parquet"):
        assert SemanticIDs.load(path) == written
    # the original's format has no sizes: they are the largest codes + 1
    read = SemanticIDs.load(folder / "semantic_id_mappings.json")
    assert read.codes().equal(written.codes()) and read.item_ids.equal(written.item_ids)
    assert read.sizes == [max(c) + 1 for c in zip(*codes, strict=True)]
    assert json.loads((folder / "semantic_id_mappings.json").read_text()) == {str(i): c for i, c in sorted(zip(ids, codes, strict=True))}
    again = folder / "again"
    SemanticIDs.load(folder).save(again)
    for name in ("semantic_ids.parquet", "semantic_id_mappings.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


@few
@given(tables(), st.randoms(use_true_random=False))
def test_items_and_codes_are_inverse_and_order_of_rows_is_nothing(table, random):
    ids, codes, sizes = table
    made = SemanticIDs(ids, codes, sizes)
    assert made.codes(ids).tolist() == codes
    for item, same in zip(ids, made.items(torch.tensor(codes)), strict=True):
        assert same == sorted(i for i, c in zip(ids, codes, strict=True) if c == codes[ids.index(item)]) and item in same
    shuffled = list(zip(ids, codes, strict=True))
    random.shuffle(shuffled)
    assert SemanticIDs(*zip(*shuffled, strict=True), sizes) == made
    assert not hasattr(type(made), "__hash__") or type(made).__hash__ is None


@few
@given(tables())
def test_tokens_are_one_plus_offset_plus_code(table):
    ids, codes, sizes = table
    made = SemanticIDs(ids, codes, sizes)
    expected = [[1 + sum(sizes[:level]) + c for level, c in enumerate(row)] for row in codes]
    assert made.tokens(ids).tolist() == expected
    assert made.n_tokens == 1 + sum(sizes) and made.tokens().min() >= 1 and made.tokens().max() < made.n_tokens
    if len(set(sizes)) == 1:  # the original's formula
        assert expected == [[c + level * sizes[0] + 1 for level, c in enumerate(row)] for row in codes]


@few
@given(tables())
def test_collision_rank_counts_equal_codes_by_id(table):
    ids, codes, sizes = table
    made = SemanticIDs(ids, codes, sizes)
    seen, expected = {}, []
    for _, row in sorted(zip(ids, codes, strict=True)):
        expected.append(seen.get(tuple(row), 0))
        seen[tuple(row)] = expected[-1] + 1
    assert made.collision_rank().tolist() == expected
    assert len(made.groups().unique()) == len(seen)


def test_raw_codes_survive(tmp_path):
    made = SemanticIDs([5, 2], [[0, 1], [0, 0]], [3, 3], raw_codes=[[0], [0]])
    made.save(tmp_path)
    read = SemanticIDs.load(tmp_path)
    assert read == made and read.raw_codes.tolist() == [[0], [0]] and made.groups(made.raw_codes).tolist() == [0, 0]


@few
@given(tables(max_items=12), st.data())
def test_an_item_without_codes_is_named(table, data):
    ids, codes, sizes = table
    absent = data.draw(st.integers(0, 99).filter(lambda i: i not in ids))
    with pytest.raises(InputError, match=rf"rows: +{absent}$|rows: +{absent}\n"):
        SemanticIDs(ids, codes, sizes).codes([ids[0], absent])


# --- the prefix tree


def reference(ids, codes):
    "A dict of dicts; leaves are sorted lists of items."
    root = {}
    for item, row in sorted(zip(ids, codes, strict=True)):
        node = root
        for c in row[:-1]:
            node = node.setdefault(c, {})
        node.setdefault(row[-1], []).append(item)
    return root


def count_below(node):
    return len(node) if isinstance(node, list) else sum(map(count_below, node.values()))


def compare(trie, root, sizes):
    "Walk both trees from the root, level by level."
    nodes = {0: root}
    for level in range(len(sizes)):
        numbers = torch.tensor(sorted(nodes))
        assert len(numbers) == trie.n_nodes[level]
        assert trie.count[level][numbers].tolist() == [count_below(nodes[n]) for n in numbers.tolist()]
        code, child = trie.children(level, numbers)
        below = {}
        for row, n in enumerate(numbers.tolist()):
            found = {int(c): int(k) for c, k in zip(code[row], child[row], strict=True) if k >= 0}
            assert sorted(found) == sorted(nodes[n])
            assert all(int(trie.parent[level + 1][k]) == n and int(trie.code[level + 1][k]) == c for c, k in found.items())
            below |= {k: nodes[n][c] for c, k in found.items()}
        nodes = below
    for leaf, items in nodes.items():
        assert trie.items[trie.leaf_starts[leaf] : trie.leaf_starts[leaf + 1]].tolist() == items
        assert trie.leaf_of_item[torch.tensor(items)].tolist() == [leaf] * len(items)
        assert int(trie.ancestors[leaf, -1]) == leaf and int(trie.ancestors[leaf, 0]) == 0


def check_trie(ids, codes, sizes):
    ids, codes = zip(*sorted(zip(ids, codes, strict=True)), strict=True)  # as SemanticIDs hands them over: equal codes keep their order
    root = reference(ids, codes)
    for dense in (True, False):
        trie = Trie(torch.tensor(codes), torch.tensor(ids), sizes)
        if not dense:
            trie.dense = [None] * len(trie.dense)
        compare(trie, root, sizes)
        every = list(itertools.product(*(range(k) for k in sizes)))[:400]
        found = trie.find(torch.tensor(every)).tolist()
        there = set(map(tuple, codes))
        assert [f >= 0 for f in found] == [row in there for row in every]
        assert len({f for f in found if f >= 0}) == sum(row in there for row in every)
    return trie


@few
@given(tables())
def test_trie_is_the_dict_of_dicts(table):
    check_trie(*table)


@pytest.mark.parametrize("ids, codes, sizes", [
    ([7], [[2, 0, 1]], [3, 1, 2]),  # a catalogue of one item
    (list(range(1, 13)), [list(c) for c in itertools.product(range(3), range(2), range(2))], [3, 2, 2]),  # every level full
    ([4, 2, 9], [[1, 1]] * 3, [2, 2]),  # all items collide
    ([3, 1], [[0], [4]], [5]),  # one level
], ids=["one item", "full", "all equal", "one level"])
def test_trie_at_its_edges(ids, codes, sizes):
    check_trie(ids, codes, sizes)


def test_trie_of_nothing_and_of_some():
    made = SemanticIDs([1, 2, 3], [[0, 0], [0, 1], [1, 1]], [2, 2])
    empty, part = made.to_trie(allowed=[]), made.to_trie(allowed=[2, 3])
    assert not len(empty.items) and empty.find(torch.tensor([[0, 0]])).tolist() == [-1]
    assert part.items.tolist() == [2, 3] and part.find(torch.tensor([[0, 0], [0, 1]])).tolist()[0] == -1
    assert part.leaf_of_item.tolist() == [-1, -1, 0, 1]


def test_large_first_levels_use_ranges_not_tables():
    sizes = [5000, 5000, 3]
    g = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(k, (300,), generator=g) for k in sizes], 1)
    trie = Trie(codes, torch.arange(1, 301), sizes)
    assert trie.dense == [None, None]
    compare(trie, reference(range(1, 301), codes.tolist()), sizes)
    assert trie.find(codes).equal(trie.leaf_of_item[1:])


def test_large_item_ids_cost_no_memory():
    made = SemanticIDs([1, 10**12], [[0], [1]])
    assert made.codes([10**12]).tolist() == [[1]] and made.items([[1]]) == [[10**12]]
    with pytest.raises(InputError, match="do not fit the catalogue"):
        made.check_coverage([1, 2])


# --- embeddings


@few
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.randoms(use_true_random=False))
def test_vectors_are_joined_by_id(tmp_path_factory, n, d, e, random):
    folder = tmp_path_factory.mktemp("vectors")
    rng = np.random.default_rng(random.randrange(99))
    ids = rng.permutation(60)[:n] + 1
    text, image = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(n, e)).astype(np.float32)
    write_parquet(folder / "item_emb.parquet", pd.DataFrame({"ItemID": ids, "embedding": list(text)}))
    other = rng.permutation(n)
    write_parquet(folder / "b" / "item_emb.parquet", pd.DataFrame({"ItemID": ids[other], "image": list(image[other])}))
    read = load_embeddings(folder, column=f"embedding+{folder / 'b'}:image", catalogue=ids)
    order = np.argsort(ids)
    assert read.item_ids.tolist() == sorted(ids.tolist()) and list(read.sources.values()) == [d, e]
    assert np.array_equal(read.vectors.numpy(), np.hstack([text, image])[order])
    assert load_embeddings(folder / "item_emb.parquet", max_items=2).item_ids.tolist() == sorted(ids.tolist())[:2]


# --- datasets


@st.composite
def logs(draw, times=True):
    "(interactions, items): every user with at least 3 rows, rows in any order, many equal times."
    n_items = draw(st.integers(3, 9))
    rows = [(u, draw(st.integers(1, n_items)), draw(st.integers(0, 3))) for u in range(1, draw(st.integers(1, 5)) + 1) for _ in range(draw(st.integers(3, 6)))]
    frame = pd.DataFrame(draw(st.permutations(rows)), columns=["user_id", "item_id", "timestamp"])
    items = pd.DataFrame({"item_id": range(1, n_items + 1), "raw_id": [f"r{i}" for i in range(n_items)], "title": ["", "b"] * (n_items // 2) + ["c"] * (n_items % 2)})
    return frame if times else frame.drop(columns="timestamp"), items


@few
@given(logs())
def test_dataset_round_trip(tmp_path_factory, log):
    folder = tmp_path_factory.mktemp("data")
    made = Dataset(*log, {"name": "toy"})
    facts = write_dataset(folder, made, {"relations/item__with__item.parquet": pd.DataFrame({"source": [1], "target": [2]})}, {"licence": "none"})
    read = Dataset.load(folder)
    pd.testing.assert_frame_equal(read.all_rows_with_held_out(), made.all_rows_with_held_out())
    pd.testing.assert_frame_equal(read.items, made.items)
    assert read.train_hash == made.train_hash == facts["train_hash"] and read.info["licence"] == "none" and read.info["split"] == LEAVE_ONE_OUT
    assert read.train_sequences().tolist() == made.train_sequences().tolist()
    assert dataset_table(folder, "relations/item__with__item.parquet").to_dict("list") == {"source": [1], "target": [2]}


@few
@given(logs())
def test_leave_one_out_is_last_and_last_but_one(log):
    made = Dataset(*log)
    for user, rows in made.all_rows_with_held_out().groupby("user_id"):
        assert rows["position"].tolist() == list(range(len(rows)))
        assert rows["split"].tolist() == [TRAIN] * (len(rows) - 2) + [VALID, TEST]
        given_order = log[0][log[0]["user_id"] == user].sort_values("timestamp", kind="stable")
        assert rows["item_id"].tolist() == given_order["item_id"].tolist()  # ties as given
    assert len(made.test_rows_held_out()) == len(made.valid_rows_held_out()) == made.n_users
    assert sum(map(len, made.train_sequences().tolist())) == len(made.train_interactions())


@few
@given(logs(), st.randoms(use_true_random=False))
def test_hashed_ties_do_not_depend_on_the_order_of_the_file(log, random):
    frame, _ = log
    frame = frame.drop_duplicates(["user_id", "item_id", "timestamp"])
    order = list(range(len(frame)))
    random.shuffle(order)

    def positions(f):
        return f.assign(position=order_positions(f, "hash", f["user_id"], f["item_id"])).sort_values(["user_id", "position"])[["user_id", "item_id", "timestamp"]].values.tolist()

    assert positions(frame) == positions(frame.iloc[order])
    later = frame.assign(position=order_positions(frame, "hash", frame["user_id"], frame["item_id"])).sort_values(["user_id", "position"])
    assert later.groupby("user_id")["timestamp"].apply(lambda t: t.is_monotonic_increasing).all()


def test_given_and_hashed_ties_differ_where_they_may():
    frame = pd.DataFrame({"user_id": [1] * 6, "item_id": [1, 2, 3, 4, 5, 6], "timestamp": [0] * 6})
    assert order_positions(frame).tolist() == [0, 1, 2, 3, 4, 5]
    hashed = order_positions(frame, "hash", frame["user_id"], frame["item_id"]).tolist()
    assert sorted(hashed) == [0, 1, 2, 3, 4, 5] != hashed


@few
@given(logs(), st.integers(0, 2))
def test_time_split_takes_the_first_later_row_of_each_user(log, start):
    made = Dataset(*log, {"split": {"rule": "time", "valid_from": start, "test_from": start + 1}})
    for _, rows in made.all_rows_with_held_out().groupby("user_id"):
        expected, seen = [], set()
        for t in rows["timestamp"]:
            part = TEST if t >= start + 1 else VALID if t >= start else TRAIN
            expected.append(part if part == TRAIN or part not in seen else UNUSED)
            seen.add(part)
        assert rows["split"].tolist() == expected


# --- sources


@few
@given(logs(times=False), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_sequence_files_round_trip(tmp_path_factory, log, end, bom):
    frame, items = log
    folder = tmp_path_factory.mktemp("sequences")
    lines = {u: rows["item_id"].tolist() for u, rows in frame.groupby("user_id")}
    (folder / "sequences.txt").write_bytes(("\ufeff" * bom + end.join(" ".join(map(str, [u, *row])) for u, row in lines.items())).encode())
    awkward = ["a\u2028b", "\x85", "“ü”", "", " "]
    titles = [awkward[i % 5] for i in range(len(items))]
    records = [json.dumps({"id": int(i), "asin": r, "title": t, "brand": "Unknown"}, ensure_ascii=False) for i, r, t in zip(items["item_id"], items["raw_id"], titles, strict=True)]
    (folder / "items.jsonl").write_bytes(end.join([*records, ""]).encode())
    (folder / "with.tsv").write_text("1\t2\n2\t3\n")
    source = sequence_source(folder)
    made = dataset_of(source)
    rows = made.all_rows_with_held_out()
    assert {u: r["item_id"].tolist() for u, r in rows.groupby("user_id")} == lines
    assert made.items["title"].tolist() == titles and made.items["raw_id"].tolist() == items["raw_id"].tolist() and made.items["brand"].isna().all()
    assert source.relations["item__with__item"].to_dict("list") == {"source": ["1", "2"], "target": ["2", "3"]}


@few
@given(logs())
def test_recbole_files_round_trip(tmp_path_factory, log):
    frame, items = log
    folder = tmp_path_factory.mktemp("recbole")
    names = {"user": "u{}".format, "item": "i{}".format}
    rows = [f"{names['user'](r.user_id)}\t{names['item'](r.item_id)}\t{r.timestamp}" for r in frame.itertuples()]
    (folder / "x.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows]) + "\n")
    (folder / "x.item").write_text("\n".join(["item_id:token\tmovie_title:token_seq\tclass:token_seq", *(f"i{i}\tTitle {i}\ta b" for i in items["item_id"])]))
    if (frame.drop_duplicates().groupby("user_id").size() < 3).any():  # what is there twice counts once
        with pytest.raises(InputError, match="fewer than 3"):
            dataset_of(recbole_source(folder))
        return
    made = dataset_of(recbole_source(folder))
    rows = made.all_rows_with_held_out()
    raw = made.items.set_index("item_id")["raw_id"]
    who = made.users.set_index("user_id")["raw_id"]
    back = sorted(zip(rows["user_id"].map(who), rows["item_id"].map(raw), rows["timestamp"], strict=True))
    assert back == sorted({(names["user"](r.user_id), names["item"](r.item_id), r.timestamp) for r in frame.itertuples()})
    assert who.tolist() == [names["user"](u) for u in frame["user_id"].unique()]  # numbers by first appearance
    assert made.items["title"].tolist() == [f"Title {r[1:]}" for r in made.items["raw_id"]] and made.items["categories"].iloc[0] == ["a", "b"]


def test_sources_read_the_real_files(data):
    made = dataset_of(sequence_source(data / "beauty"))
    assert (made.n_users, made.n_items, len(made.all_rows_with_held_out())) == (22363, 12101, 198502)
    made = dataset_of(recbole_source(data / "ml100k"))
    assert (made.n_users, len(made.all_rows_with_held_out())) == (943, 100_000) and made.items["title"].str.len().gt(0).all()
