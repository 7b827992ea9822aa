"""Append: new items get semantic IDs, and no published ID ever moves."""
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgen.core.errors import InputError
from recgen.formats.semantic_ids import SemanticIDs
from recgen.tokens.append import append_ids, check_published, join_tables, split_departed
from recgen.tokens.collisions import METHODS, resolve

few = settings(max_examples=40, deadline=None, derandomize=True)


def catalogue(n, sizes, seed=0, d=3):
    "Codes, vectors, codebooks and ids of n items, all ids different and in no order."
    g = torch.Generator().manual_seed(seed)
    codebooks = [torch.randn(k, d, generator=g) * 2.0**-level for level, k in enumerate(sizes)]
    codes = torch.stack([torch.randint(k, (n,), generator=g) for k in sizes], 1)
    return codes, torch.randn(n, d, generator=g), codebooks, torch.randperm(10 * n, generator=g)[:n] + 1


def publish(codes, method, ids, vectors, codebooks):
    "What a first run publishes."
    result = resolve(codes, method, ids, vectors, codebooks)
    sizes = [len(c) for c in codebooks]
    return SemanticIDs(ids, result.codes, sizes + [result.report["suffix_size"]] if method == "suffix" else sizes, codes)


@st.composite
def growths(draw):
    "(codes, vectors, codebooks, ids, cuts): a catalogue that comes in three parts, crowded, up to the last free tuple."
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    room = int(torch.tensor(sizes).prod())
    n = draw(st.integers(1, min(room, 40)))
    codes, vectors, codebooks, ids = catalogue(n, sizes, draw(st.integers(0, 99)))
    first, second = sorted((draw(st.integers(1, n)), draw(st.integers(1, n))))
    return codes % draw(st.integers(1, 5)), vectors, codebooks, ids, (first, second)


@few
@given(growths(), st.sampled_from(METHODS), st.integers(0, 99))
def test_two_appends_move_nothing_and_leave_no_duplicates(growth, method, seed):
    codes, vectors, codebooks, ids, (first, second) = growth
    ledger = publish(codes[:first], method, ids[:first], vectors[:first], codebooks)
    for start, stop in ((first, second), (second, len(ids))):
        before = ledger
        only_new = append_ids(ledger, ids[start:stop], codes[start:stop], method, vectors[start:stop], codebooks)
        whole = append_ids(ledger, ids[:stop], codes[:stop], method, vectors[:stop], codebooks)
        assert only_new.ledger == whole.ledger and only_new.codes.equal(whole.codes[start:])  # given the catalogue or only the new: the same
        order = torch.randperm(stop, generator=torch.Generator().manual_seed(seed))
        mixed = append_ids(ledger, ids[:stop][order], codes[:stop][order], method, vectors[:stop][order], codebooks)
        assert mixed.ledger == whole.ledger and mixed.report == whole.report
        for name in ("codes", "new", "moved"):
            assert getattr(mixed, name).equal(getattr(whole, name)[order])
        ledger = whole.ledger
        assert ledger.codes(before.item_ids).equal(before.codes()) and ledger.raw_codes.equal(codes[:stop][torch.argsort(ids[:stop])])
        assert whole.new.tolist() == [False] * start + [True] * (stop - start) and not whole.moved[:start].any()
        assert whole.moved[start:].equal((whole.codes[start:, : codes.shape[1]] != codes[start:stop]).any(1))
        assert whole.report["moved"] == int(whole.moved.sum()) and whole.report["new"] == stop - start and whole.report["drifted"] == 0
    assert method == "none" or len(ledger.codes().unique(dim=0)) == len(ids)
    assert ledger.sizes[: len(codebooks)] == [len(c) for c in codebooks]


@few
@given(growths(), st.sampled_from(METHODS))
def test_appending_nothing_changes_nothing(growth, method):
    codes, vectors, codebooks, ids, (first, _) = growth
    table = publish(codes[:first], method, ids[:first], vectors[:first], codebooks)
    nothing = append_ids(table, [], [], method, vectors[:0], codebooks)
    same = append_ids(table, ids[:first], codes[:first], method, vectors[:first], codebooks)
    for result in (nothing, same):
        assert result.ledger == table and result.ledger.raw_codes.equal(table.raw_codes) and result.report["new"] == result.report["moved"] == 0
    assert not len(nothing.codes) and same.codes.equal(table.codes(ids[:first]))


@few
@given(growths(), st.sampled_from(METHODS), st.data())
def test_an_id_of_a_departed_item_is_never_given_again(growth, method, data):
    codes, vectors, codebooks, ids, (first, _) = growth
    ledger = publish(codes[:first], method, ids[:first], vectors[:first], codebooks)
    stays = data.draw(st.lists(st.sampled_from(ids[:first].tolist()), min_size=1, unique=True))
    present, departed = split_departed(ledger, stays)
    present.check_coverage(stays)
    assert join_tables(present, departed) == ledger and join_tables(present, departed).raw_codes.equal(ledger.raw_codes)
    grown = append_ids(join_tables(present, departed), ids[first:], codes[first:], method, vectors[first:], codebooks)
    if method != "none" and departed is not None:
        reserved = set(map(tuple, departed.codes().tolist()))
        assert not reserved & set(map(tuple, grown.codes.tolist()))
    now, gone = split_departed(grown.ledger, [*stays, *ids[first:].tolist()])
    assert (gone is None) == (departed is None) and (gone is None or gone.item_ids.equal(departed.item_ids) and gone.codes().equal(departed.codes()))
    now.check_coverage([*stays, *ids[first:].tolist()])
    back = append_ids(join_tables(now, gone), ids, codes, method, vectors, codebooks)  # everybody is back
    assert back.ledger == grown.ledger and back.report["new"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_the_ledger_survives_the_disk(tmp_path, method):
    codes, vectors, codebooks, ids = catalogue(60, [2, 4, 9])
    ledger = publish(codes[:30], method, ids[:30], vectors[:30], codebooks)
    present, departed = split_departed(ledger, ids[5:30])
    present.save(tmp_path / "now")
    departed.save(tmp_path / "gone")
    read = join_tables(SemanticIDs.load(tmp_path / "now"), SemanticIDs.load(tmp_path / "gone"))
    assert read == ledger
    a, b = (append_ids(t, ids, codes, method, vectors, codebooks) for t in (read, ledger))
    assert a.ledger == b.ledger and a.ledger.raw_codes.equal(b.ledger.raw_codes) and a.report == b.report


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("method", ["nearest", "sinkhorn"])
def test_newcomers_take_their_own_code_or_the_cheapest_free_ones(method, seed):
    codes, vectors, codebooks, ids = catalogue(7, [1, 7], seed)
    codes[:, 1] %= 2
    codes[:3, 1] = torch.tensor([0, 3, 5])  # published
    table = publish(codes[:3], method, ids[:3], vectors[:3], codebooks)
    result = append_ids(table, ids[3:], codes[3:], method, vectors[3:], codebooks)
    taken, stays, surplus = {0, 3, 5}, {}, []
    for row in sorted(range(3, 7), key=lambda i: int(ids[i])):
        code = int(codes[row, 1])
        if code in taken:
            surplus.append(row)
        else:
            stays[row] = code
            taken.add(code)
    assert all(int(result.codes[row - 3, 1]) == code for row, code in stays.items())
    cost = (vectors[:, None] - codebooks[0][0] - codebooks[1]).square().sum(2)
    best = min(sum(float(cost[r, c]) for r, c in zip(surplus, choice, strict=True)) for choice in itertools.permutations(set(range(7)) - taken, len(surplus)))
    assert sum(float(cost[r, result.codes[r - 3, 1]]) for r in surplus) == pytest.approx(best, rel=1e-5)


def test_an_overfull_prefix_sends_newcomers_away_by_regret():
    codebooks = [torch.tensor([[0.0], [10.0], [14.0]]), torch.tensor([[0.0], [1.0]])]
    table = SemanticIDs([7, 8, 9], [[0, 0], [1, 0], [1, 1]], [3, 2], [[0, 0], [1, 0], [1, 1]])
    vectors = torch.tensor([[1.0], [6.0], [2.0]])
    result = append_ids(table, [1, 2, 3], [[0, 1]] * 3, "nearest", vectors, codebooks)
    # one place under prefix 0, none under 1: the 1.0 loses most by leaving; 6.0 and 2.0 go to 2, though 1 is nearer
    assert result.codes[:, 0].tolist() == [0, 2, 2] and result.report["spilled"] == 2 and result.report["moved_by_level"][0] == pytest.approx(2 / 3)
    assert result.ledger.codes([7, 8, 9]).equal(table.codes())


@pytest.mark.parametrize("sizes", [[30], [5, 6], [2, 3, 5]])
@pytest.mark.parametrize("method", ["nearest", "sinkhorn"])
def test_the_last_free_tuple_is_found_and_not_one_more(method, sizes):
    codes, vectors, codebooks, ids = catalogue(31, sizes)
    codes.zero_()
    table = publish(codes[:12], method, ids[:12], vectors[:12], codebooks)
    full = append_ids(table, ids[12:30], codes[12:30], method, vectors[12:30], codebooks)
    assert len(full.ledger.codes().unique(dim=0)) == 30 and full.ledger.codes(ids[:12]).equal(table.codes(ids[:12]))
    with pytest.raises(InputError, match="1 new items, 0 of 30 tuples free"):
        append_ids(full.ledger, ids[30:], codes[30:], method, vectors[30:], codebooks)


def test_suffixes_go_on_after_the_largest_and_the_level_grows():
    table = SemanticIDs([1, 2, 3], [[5, 0, 0], [5, 0, 1], [6, 0, 0]], [7, 1, 2])
    result = append_ids(table, [40, 30, 20], [[5, 0], [5, 0], [1, 0]], "suffix")
    assert result.codes.tolist() == [[5, 0, 3], [5, 0, 2], [1, 0, 0]] and result.ledger.sizes == [7, 1, 4] == result.report["sizes"]
    assert not result.moved.any() and result.ledger.raw_codes.tolist() == [[5, 0], [5, 0], [6, 0], [1, 0], [5, 0], [5, 0]]
    present, gone = split_departed(result.ledger, [1, 20, 30])  # 40 held the largest suffix
    again = append_ids(join_tables(present, gone), [50], [[5, 0]], "suffix")
    assert again.codes.tolist() == [[5, 0, 4]]


def test_changed_vectors_change_nothing_and_are_reported():
    codes, vectors, codebooks, ids = catalogue(20, [4, 8])
    table = publish(codes, "nearest", ids, vectors, codebooks)
    other = codes.clone()
    other[:6, 1] = (other[:6, 1] + 1) % 8
    result = append_ids(table, ids, other, "nearest", -vectors, codebooks)
    assert result.ledger == table and result.codes.equal(table.codes(ids)) and result.report["drifted"] == 6 and not result.moved.any()
    unknown = SemanticIDs(table.item_ids, table.codes(), table.sizes)  # a table without raw codes cannot tell
    assert append_ids(unknown, ids, other, "nearest", vectors, codebooks).report["drifted"] is None


@pytest.mark.parametrize("made, used", [(a, b) for a in METHODS for b in METHODS if a != b and {a, b} != {"nearest", "sinkhorn"}])
def test_another_method_is_refused(made, used):
    codes, vectors, codebooks, ids = catalogue(40, [2, 3, 9])
    table = publish(codes, made, ids, vectors, codebooks)
    assert (table.collision_rank() > 0).any() == (made == "none")
    check_published(table, [2, 3, 9], made)
    with pytest.raises(InputError):
        append_ids(table, ids + 1000, codes, used, vectors, codebooks)


def test_the_refusals():
    codes, vectors, codebooks, ids = catalogue(10, [4, 8])
    table = publish(codes, "nearest", ids, vectors, codebooks)
    new, arguments = ids + 1000, (vectors, codebooks)
    with pytest.raises(InputError, match="not of this model and method"):
        append_ids(table, new, codes, "nearest", vectors, [codebooks[0], codebooks[1][:7]] if codes[:, 1].max() < 7 else [codebooks[0], torch.cat([codebooks[1]] * 2)])
    with pytest.raises(InputError, match="not of this model and method"):
        append_ids(table, new, torch.cat([codes, codes[:, 1:]], 1), "nearest", vectors, [*codebooks, codebooks[1]])
    with pytest.raises(InputError, match="needs the vectors"):
        append_ids(table, new, codes)
    with pytest.raises(InputError, match="one id of its own"):
        append_ids(table, new * 0 + 5, codes, "nearest", *arguments)
    with pytest.raises(InputError, match="no such way"):
        append_ids(table, [], [], "closest", *arguments)
    with pytest.raises(InputError, match="whole numbers from 1"):
        append_ids(table, [0], codes[:1], "nearest", vectors[:1], codebooks)
    suffixed = publish(codes, "suffix", ids, vectors, codebooks)
    for bad in ([[0, 8]], [[-1, 0]], [[0]], [[0, 0, 0]]):
        with pytest.raises(InputError, match="not of the published table's model"):
            append_ids(suffixed, [5000], bad, "suffix")
    with pytest.raises(InputError, match="different kinds"):
        join_tables(table, suffixed)
    with pytest.raises(InputError, match="two semantic IDs"):
        join_tables(table, table)
    with pytest.raises(InputError, match="1 items without codes"):
        split_departed(table, [*ids.tolist(), 9999])


def test_beauty_in_two_parts(data):
    import pyarrow.parquet as pq

    from recgen.tokens.rqkmeans import RQKMeans

    table = pq.read_table(data / "beauty" / "item_emb.parquet")
    x = torch.tensor(table["embedding"].combine_chunks().values.to_numpy(zero_copy_only=False)).reshape(len(table), -1)
    ids = torch.tensor(table["ItemID"].to_numpy())
    model = RQKMeans.fit(x[:4000], n_layers=3, n_clusters=64, max_iters=10)
    codes, placed = model.codes(x), model.transform(x)
    old = torch.arange(len(ids)) % 5 > 0
    first = publish(codes[old], "nearest", ids[old], placed[old], model.codebooks)
    result = append_ids(first, ids, codes, "nearest", placed, model.codebooks)
    assert result.ledger.codes(ids[old]).equal(first.codes(ids[old])) and result.report["after"]["duplicate_rate"] == 0
    assert result.report["new"] == int((~old).sum()) and 0 < result.report["share_moved"] < 0.5 and result.added_error > 0
    result.ledger.check_coverage(ids)
