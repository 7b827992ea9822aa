"""One judge for tables of semantic IDs: foreign files read or refused, scores against plain counting, six published tables as they are."""
import heapq
import json
from collections import Counter, defaultdict

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

from recgen.core.errors import InputError
from recgen.formats.embeddings import load_embeddings
from recgen.formats.semantic_ids import SemanticIDs
from recgen.sources.sequences import read_item_lines, read_pairs
from recgen.tokens.health import neighbour_preservation
from recgen.tokens.rqkmeans import RQKMeans
from recgen.tokens.scoring import adjusted_purity, cut_groups, headline, leaf_categories, purity, read_ids, score_ids, score_table

matplotlib.use("Agg")


def random_codes(n=400, sizes=(5, 4, 6), seed=0):
    "Skewed codes: low ones are frequent."
    g = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([(k * g.random(n) ** 2).astype(np.int64) for k in sizes], 1))


# --- reading


def refused(tmp_path, name, text, **options) -> InputError:
    path = tmp_path / name
    path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
    with pytest.raises(InputError) as caught:
        read_ids(path, **options)
    assert caught.value.parts["file"] == path and caught.value.parts["mend"]
    return caught.value


def test_all_formats_of_one_table_are_one_table(tmp_path):
    codes = random_codes(60)
    ids = SemanticIDs(torch.arange(1, 61), codes)
    ids.save(tmp_path)
    letters = "abc"
    tokens = {str(i): [f"<{letters[level]}_{c}>" for level, c in enumerate(row)] for i, row in enumerate(codes.tolist())}
    (tmp_path / "index.json").write_text(json.dumps(tokens))
    lines = ["\t".join(map(str, [i, *row])) for i, row in enumerate(codes.tolist(), 1)]
    (tmp_path / "codes.tsv").write_bytes(("\ufeff" + "\r\n".join(reversed(lines)) + "\r\n\r\n").encode())  # any order, Windows line ends, a mark at the start
    for name in (".", "semantic_ids.parquet", "semantic_id_mappings.json", "index.json", "codes.tsv"):
        assert read_ids(tmp_path / name) == ids, name


def test_first_id_says_what_item_0_becomes(tmp_path):
    (tmp_path / "from0.tsv").write_text("0\t3\n1\t4\n")
    (tmp_path / "from1.tsv").write_text("1\t3\n2\t4\n")
    assert read_ids(tmp_path / "from0.tsv") == read_ids(tmp_path / "from1.tsv") == read_ids(tmp_path / "from0.tsv", first_id=1)
    assert read_ids(tmp_path / "from1.tsv", first_id=10).item_ids.tolist() == [11, 12]
    error = refused(tmp_path, "zero.tsv", "0\t3\n1\t4\n", first_id=0)
    assert "item 0" in error.parts["rows"] and "first_id" in error.parts["mend"]


def test_codes_from_1_are_left_as_they_are(tmp_path):
    (tmp_path / "codes.tsv").write_text("1\t1\t2\n2\t2\t1\n")
    ids = read_ids(tmp_path / "codes.tsv")
    assert ids.codes().tolist() == [[1, 2], [2, 1]] and ids.sizes == [3, 3]


@pytest.mark.parametrize("text, rows, found", [
    ("1\t5\t6\n2\t7\t8\n3\t9", "line 3", "2 columns"),
    ("1\t5\t6\n\n2\t7\t8\t9\n3\t9\t1\n", "line 3", "4 columns"),
    ("1\t5\t6\n2\t-7\t8\n", "line 2", "'-7'"),
    ("1\t5\t6\n2\t7.0\t8\n", "line 2", "'7.0'"),
    ("1\t5\t6\n2\t\t8\n", "line 2", "''"),
    ("id\tc1\tc2\n2\t7\t8\n", "line 1", "'id'"),
    ("1 5 6\n2 7 8\n", "line 1, line 2", "1 columns"),
    ("1\t5\n2\t6\n1\t7\n", "item 1", "1 such"),
])
def test_text_that_is_no_table_is_refused(tmp_path, text, rows, found):
    error = refused(tmp_path, "codes.tsv", text)
    assert error.parts["rows"] == rows and found in error.parts["found"] and error.parts["expected"]


def test_files_that_are_empty_absent_or_not_text_are_refused(tmp_path):
    refused(tmp_path, "codes.tsv", "")
    refused(tmp_path, "codes.tsv", "\n\n")
    refused(tmp_path, "codes.tsv", b"1\t\xff\xfe\n")
    with pytest.raises(InputError):
        read_ids(tmp_path / "absent.tsv")
    with pytest.raises(InputError):
        read_ids(tmp_path / "absent.json")


@pytest.mark.parametrize("text, part, says", [
    ('{"0": ["<a_1>", "<b_2>"], "1": ["<a_1>"], "2": ["<a_1>", "<b_3>"]}', "rows", "item 1"),
    ('{"0": ["<a_1>", "<b_2>"], "1": ["<b_1>", "<a_2>"]}', "found", "<b_1>"),
    ('{"0": ["<a_1>", "<b_2>"], "1": ["<a_1>", "<b_-2>"]}', "found", "<b_-2>"),
    ('{"0": ["<a_1>", "<b_2>"], "1": ["<a_1>", null]}', "found", "null"),
    ('{"0": ["<a_1>", "<b_2>"], "one": ["<a_1>", "<b_2>"]}', "rows", "one"),
    ('{"0": ["<a_1>", "<b_2>"], "1": [4, 5]}', "expected", "<a_189>"),
    ('{"0": ["<a_1>", "<b_2>"], "00": ["<a_1>", "<b_2>"]}', "rows", "item 0"),
    ('{"0": ["<a_1>", "<b_2>"], "0": ["<a_1>", "<b_2>"]}', "found", "twice"),
    ('{"0": ["<a_1>", "<b_2>"], "1": ["<a_', "expected", "JSON"),
    ("[1, 2]", "expected", "ItemID"),
])
def test_an_index_of_tokens_that_is_none_is_refused(tmp_path, text, part, says):
    assert says in refused(tmp_path, "index.json", text).parts[part]


# --- scores against plain counting


def plain_cut(codes, n_groups):
    "The largest group lets its largest child leave, until there are enough: a heap, item by item."
    children, size = defaultdict(set), Counter()
    for row in map(tuple, codes.tolist()):
        for length in range(len(row) + 1):
            size[row[:length]] += 1
            if length:
                children[row[: length - 1]].add(row[:length])
    chosen, heap = {()}, []

    def push(node, left):
        "A group: what is left of a node, of which one child has to stay."
        kids = sorted(children[node], key=lambda c: (-size[c], c))
        while len(kids) == 1:
            kids = sorted(children[kids[0]], key=lambda c: (-size[c], c))
        if kids:
            heapq.heappush(heap, (-left, kids))

    push((), size[()])
    while heap and len(chosen) < n_groups:
        left, kids = heapq.heappop(heap)
        chosen.add(kids[0])
        push(kids[0], size[kids[0]])
        if len(kids) > 2:
            heapq.heappush(heap, (left + size[kids[0]], kids[1:]))
        else:
            push(kids[1], size[kids[1]])
    return [max((p for p in chosen if row[: len(p)] == p), key=len) for row in map(tuple, codes.tolist())]


@pytest.mark.parametrize("n_groups", [1, 2, 5, 17, 40, 10_000])
def test_the_cut_is_that_of_the_plain_procedure(n_groups):
    codes = random_codes(300, seed=n_groups)
    cut = cut_groups(codes, n_groups)
    assert len(cut.unique()) == min(n_groups, len(codes.unique(dim=0)))
    plain = plain_cut(codes, n_groups)
    assert sorted(Counter(plain).values()) == sorted(torch.bincount(cut).tolist())  # equal sizes may leave in another order


def test_the_cut_is_nested_in_the_prefixes():
    "A group is what a prefix holds, less what left it: its items share a prefix that no item of another group has, save for those that left."
    codes = random_codes(500, sizes=(8, 6, 9))
    first = cut_groups(codes, 8)  # as many as first codes: no group mixes first codes, apart from the rest of the root
    mixed = [g for g in range(8) if len(codes[first == g, 0].unique()) > 1]
    assert len(mixed) <= 1
    finer = cut_groups(codes, 30)
    assert all(len(first[finer == g].unique()) == 1 for g in range(30))  # a finer cut splits, never regroups


def test_purity_is_that_of_counting_and_random_groups_score_nothing():
    g = torch.Generator().manual_seed(1)
    group, labels = torch.randint(20, (600,), generator=g), torch.randint(7, (600,), generator=g)
    counts = defaultdict(Counter)
    for a, b in zip(group.tolist(), labels.tolist(), strict=True):
        counts[a][b] += 1
    assert purity(group, labels) == sum(c.most_common(1)[0][1] for c in counts.values()) / 600
    assert abs(adjusted_purity(group, labels, permutations=16)["purity_adjusted"]) < 0.05
    assert adjusted_purity(labels, labels)["purity_adjusted"] == 1
    without = torch.cat([labels, torch.full((50,), -1)])
    assert adjusted_purity(torch.cat([group, torch.arange(50)]), without)["purity"] == purity(group, labels)


@pytest.mark.parametrize("seed", [0, 1])
def test_codes_dealt_out_with_the_judges_own_seed_still_score_chance(seed):
    "A judge that drew the same permutation would undo the deal and call the truth chance."
    labels = torch.arange(1200) // 30
    dealt = labels[torch.randperm(1200, generator=torch.Generator().manual_seed(seed))]
    assert abs(adjusted_purity(dealt, labels, seed=seed)["purity_adjusted"]) < 0.05


def test_every_score_is_that_of_counting():
    codes, n = random_codes(200), 200
    g = torch.Generator().manual_seed(3)
    item_ids, vectors = torch.arange(1, n + 1) * 3, torch.randn(n, 5, generator=g)
    listed = torch.randint(n, (300, 2), generator=g)
    pairs = torch.cat([listed, listed[:50].flip(1), listed[:9]])  # both ways round, twice, and with itself
    score = score_ids(SemanticIDs(item_ids, codes), vectors, pairs=item_ids[pairs], groups=10, queries=0)
    undirected = {tuple(sorted(p)) for p in listed.tolist() if p[0] != p[1]}
    rows = [tuple(r) for r in codes.tolist()]
    for length in (1, 2, 3):
        heads = [r[:length] for r in rows]
        counts = Counter(heads)
        assert score[f"prefixes@{length}"] == len(counts) and score[f"largest_group@{length}"] == max(counts.values())
        assert score[f"duplicate_rate@{length}"] == pytest.approx(1 - len(counts) / n)
        assert score[f"collision_rate@{length}"] == pytest.approx(sum(c for c in counts.values() if c > 1) / n)
        chance = sum(c * (c - 1) for c in counts.values()) / (n * (n - 1))
        share = np.mean([heads[a] == heads[b] for a, b in undirected])
        assert score[f"pairs@{length}"] == pytest.approx(share) and score[f"pairs_lift@{length}"] == pytest.approx(share / chance)
    assert score["duplicate_rate"] == score["duplicate_rate@3"] and score["groups"] == 10
    assert [score[f"neighbours@{length}"] for length in (1, 2, 3)] == pytest.approx(neighbour_preservation(vectors, codes))
    entropy = -sum(c / n * np.log2(c / n) for c in Counter(r[1] for r in rows).values())
    assert score["entropy_1"] == pytest.approx(entropy) and score["perplexity_1"] == pytest.approx(2**entropy)


def test_scores_do_not_depend_on_the_order_of_anything():
    codes, ids = random_codes(150), torch.arange(1, 151)
    g = torch.Generator().manual_seed(0)
    order, pairs = torch.randperm(150, generator=g), torch.randint(1, 151, (80, 2), generator=g)
    categories = {i: f"kind {i % 4}" for i in range(1, 151)}
    one = score_ids(SemanticIDs(ids, codes), categories=categories, pairs=pairs, groups=12)
    other = score_ids(SemanticIDs(ids[order], codes[order]), categories=dict(reversed(categories.items())), pairs=pd.DataFrame(pairs.flip(0, 1).numpy()), groups=12)
    assert one == other


def test_evidence_of_other_items_is_refused():
    ids = SemanticIDs(torch.arange(1, 31), random_codes(30))
    with pytest.raises(InputError, match="item 31"):
        score_ids(ids, pairs=[[1, 31]])
    with pytest.raises(InputError, match="different items"):
        score_ids(ids, pairs=[[1, 1]])
    with pytest.raises(InputError, match="item 30"):
        score_ids(ids, categories={i: "a" for i in range(1, 30)})
    with pytest.raises(InputError, match="no item has a category"):
        score_ids(ids, categories={i: None for i in range(1, 31)})
    with pytest.raises(InputError, match="29 vectors"):
        score_ids(ids, vectors=torch.randn(29, 4))
    with pytest.raises(InputError, match="item 31"):
        score_table({"a": ids, "b": SemanticIDs(torch.arange(2, 32), random_codes(30))})
    with pytest.raises(InputError):
        score_table({})


def test_leaf_categories_are_the_last_of_the_path():
    items = pd.DataFrame({"item_id": [1, 2, 3, 4], "categories": [["a", "b"], [], None, np.array(["c"], dtype=object)]})
    assert leaf_categories(items).to_dict() == {1: "b", 2: None, 3: None, 4: "c"}


# --- the published tables


@pytest.fixture(scope="module")
def beauty(data):
    folder = data / "beauty"
    tables = {p.stem: read_ids(p) for p in sorted((folder / "peer_codes").glob("*.tsv"))}
    vectors = load_embeddings(folder)
    codes = RQKMeans.fit(vectors.vectors, 3, 256, max_iters=10, seed=0).codes(vectors.vectors)
    dealt = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))]
    tables |= {"k-means": SemanticIDs(vectors.item_ids, codes, [256] * 3), "dealt": SemanticIDs(vectors.item_ids, dealt, [256] * 3)}
    return score_table(tables, vectors, leaf_categories(read_item_lines(folder / "items.jsonl")), read_pairs(folder / "also_bought.tsv"), queries=1000)


def test_six_published_tables(beauty):
    assert len(beauty) == 8 and (beauty["items"] == 12101).all() and (beauty.groups == 256).all()
    prefixes = {"cgr_rkmeans_native": 8758, "cgr_rqvae_native": 10600, "iba_rqvae": 11473, "letter_official": 11696, "nonametiger_rqkmeans": 7840, "nonametiger_rqvae": 11412}
    assert beauty["prefixes@3"][list(prefixes)].to_dict() == prefixes
    assert beauty.loc["letter_official", "duplicate_rate@3"] == pytest.approx(0.0335, abs=1e-4)
    assert beauty.loc["nonametiger_rqkmeans", "duplicate_rate@3"] == pytest.approx(0.3521, abs=1e-4)
    assert (beauty.loc[["nonametiger_rqkmeans", "nonametiger_rqvae"], "duplicate_rate"] == 0).all()  # resolved by the last code
    assert beauty.loc["nonametiger_rqkmeans", ["perplexity_0", "perplexity_1", "perplexity_2"]].astype(float).round().tolist() == [85, 63, 42]


def test_the_witnesses_tell_a_table_from_one_dealt_at_random(beauty):
    dealt, ours = beauty.loc["dealt"], beauty.loc["k-means"]
    assert abs(dealt.purity_adjusted) < 0.02 and 0.8 < dealt.pairs_lift_cut < 1.2 and dealt.neighbours_cut < 0.02
    assert dealt["duplicate_rate"] == ours["duplicate_rate"]
    assert ours.purity_adjusted > 0.35 and ours.pairs_lift_cut > 25 and ours.neighbours_cut > 0.5
    assert (beauty.drop("dealt").purity_adjusted > 0.1).all() and (beauty.drop("dealt").pairs_lift_cut > 5).all()
    assert {"purity", "pairs_lift_cut", "neighbours_cut"} <= set(headline(beauty))


def test_an_index_of_tokens_as_published(data):
    ids = read_ids(data / "microlens_small" / "peer_codes.json")
    raw = json.loads((data / "microlens_small" / "peer_codes.json").read_text())
    assert len(ids) == len(raw) == 5312 and ids.item_ids[0] == 1 and ids.n_levels == 4
    assert [f"<{letter}_{c}>" for letter, c in zip("abcd", ids.codes([18])[0].tolist(), strict=True)] == raw["17"]


# --- pictures


def test_pictures_of_any_table_can_be_drawn():
    import matplotlib.pyplot as plt

    from recgen.tokens.pictures import plot_collisions, plot_prefix_map, plot_scores, squarify

    g = np.random.default_rng(0)
    for n in (1, 2, 9, 60):
        areas = np.sort(g.random(n) ** 3 + 1e-3)[::-1]
        boxes = squarify(areas, 7, 3)
        assert np.allclose(boxes[:, 2] * boxes[:, 3], areas / areas.sum() * 21) and (boxes > -1e-9).all()
        assert (boxes[:, 0] + boxes[:, 2]).max() < 7 + 1e-9 and (boxes[:, 1] + boxes[:, 3]).max() < 3 + 1e-9
    for codes in (random_codes(300), random_codes(300, sizes=(200, 90)), torch.tensor([[0, 0]]), torch.tensor([[0, 0], [0, 1], [5, 5]])):
        figure = plot_prefix_map(codes, [f"title $^{i} $_\n{'word ' * (i % 30)}" for i in range(len(codes))])
        figure.canvas.draw()
        plot_collisions(codes).canvas.draw()
    table = score_table({"a": SemanticIDs(torch.arange(1, 301), random_codes(300)), "b": SemanticIDs(torch.arange(1, 301), random_codes(300, seed=1))})
    assert len(plot_scores(table).axes) == 1
    plt.close("all")
