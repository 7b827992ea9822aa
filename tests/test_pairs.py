"Skip-gram pairs: exact counts and contents, permutations, subsampling, batches and streams; memory that does not grow."
import math
import tracemalloc
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from recgen.core.errors import InputError, ParameterError
from recgen.graph.negatives import DegreeBiasedNegativeSampler
from recgen.graph.pairs import (
    BatchGenerator,
    CooccurrencePairSampler,
    PairSampler,
    Permutation,
    StreamingBatchGenerator,
    TrainingData,
    distinct,
    in_batches,
    keep_probabilities,
    shuffled_stream,
)

def ragged_walks(lengths, width=0, nodes=30, seed=0):
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.as_tensor(lengths)
    width = width or int(lengths.max())
    walks = torch.randint(nodes, (len(lengths), width), generator=draws, dtype=torch.int32)
    return walks.masked_fill(torch.arange(width) >= lengths[:, None], -1)


def by_hand(walks, window):
    "Every ordered pair of every walk, as the definition has it."
    rows = [[v for v in w if v >= 0] for w in walks.tolist()]
    return Counter((a, b) for w in rows for i, a in enumerate(w) for j, b in enumerate(w) if i != j and abs(i - j) <= window)


def counted(batches):
    return Counter((t, c) for targets, contexts, *_ in batches for t, c in zip(targets.tolist(), contexts.tolist(), strict=True))


def test_a_full_walk_of_80_has_1490_pairs():
    assert PairSampler(ragged_walks([80] * 3), 10).n_pairs == 3 * 1490


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=6), st.integers(1, 16), st.integers(0, 99))
def test_all_numbers_give_all_pairs_each_once(lengths, window, seed):
    walks = ragged_walks(lengths, 14, seed=seed)
    sampler = PairSampler(walks, window)
    pairs = by_hand(walks, window)
    assert sampler.n_pairs == sum(pairs.values()) == len(sampler)
    assert counted([sampler.pairs(torch.arange(sampler.n_pairs))]) == pairs
    assert counted(sampler.epoch(5, torch.Generator().manual_seed(seed))) == pairs
    assert Counter(map(tuple, CooccurrencePairSampler(window).extract_pairs(walks).tolist())) == pairs
    assert counted(StreamingBatchGenerator(walks, batch_size=7, window=window, buffer_size=11, block=2, seed=seed)) == pairs


def test_full_walks_need_no_table_and_agree_with_ragged_ones():
    full = ragged_walks([9] * 20)
    longer = torch.cat([full, torch.full((20, 1), -1, dtype=torch.int32)], 1)
    a, b = PairSampler(full, 4), PairSampler(longer, 4)
    assert a.ends is None and b.ends is not None and a.n_pairs == b.n_pairs
    number = torch.arange(a.n_pairs)
    assert all(x.equal(y) for x, y in zip(a.pairs(number), b.pairs(number), strict=True))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 4097, 100_003])
def test_a_permutation_is_a_bijection(n):
    x = torch.arange(n)
    image = Permutation(n, 3)(x)
    assert image.sort().values.equal(x) and x.equal(torch.arange(n))
    if n > 10:
        assert not image.equal(Permutation(n, 4)(torch.arange(n)))
        assert abs(float(torch.corrcoef(torch.stack([x, image]).double())[0, 1])) < 4 / math.sqrt(n)


def test_permutations_of_small_ranges_are_about_evenly_likely():
    images = Counter(tuple(Permutation(4, seed)(torch.arange(4)).tolist()) for seed in range(4800))
    assert len(images) == 24 and max(images.values()) < 2.5 * 200
    first = torch.tensor([int(Permutation(1000, seed)(torch.tensor([7]))) for seed in range(2000)])
    assert chisquare(torch.bincount(first // 100, minlength=10)).pvalue > 1e-4


def test_a_permutation_of_very_many_is_computed_where_it_is_asked():
    n = 3 * 10**12
    some = torch.randint(n, (1000,), generator=torch.Generator().manual_seed(0)).unique()
    image = Permutation(n, 1)(some.clone())
    assert image.min() >= 0 and image.max() < n and len(image.unique()) == len(some) and image.max() > n // 2


def test_drawn_pairs_are_even_over_all_pairs():
    walks = ragged_walks([6, 2, 1, 4, 3], nodes=4, seed=2)
    sampler, pairs = PairSampler(walks, 2), by_hand(walks, 2)
    found = counted([sampler.draw(50_000, torch.Generator().manual_seed(0))])
    assert set(found) == set(pairs)
    assert chisquare([found[k] for k in pairs], [pairs[k] * 50_000 / sampler.n_pairs for k in pairs]).pvalue > 1e-4
    first, second = (sampler.draw(9, torch.Generator().manual_seed(s)) for s in (0, 0))
    assert first[0].equal(second[0]) and first[0].dtype == torch.int64 and len(sampler.draw(0)[0]) == 0


def test_subsampling_is_word2vecs():
    counts = torch.tensor([9000, 900, 90, 9, 1, 0])
    keep = keep_probabilities(counts, 1e-2)
    f = counts[:5] / counts.sum()
    assert torch.allclose(keep[:5], torch.minimum(torch.ones(5), (1e-2 / f).sqrt() + 1e-2 / f), atol=1e-6)
    assert keep[0] < keep[1] < keep[2] == 1 == keep[5] and (keep_probabilities(counts, 0) == 1).all()


def test_frequent_nodes_are_thinned_in_draws_and_epochs():
    walks = ragged_walks([12] * 300, nodes=5, seed=4)
    walks[torch.rand(walks.shape, generator=torch.Generator().manual_seed(1)) < 0.6] = 0
    sampler, pairs = PairSampler(walks, 3, subsample=0.02), by_hand(walks, 3)
    weight = {k: n * float(sampler.keep[k[0]] * sampler.keep[k[1]]) for k, n in pairs.items()}
    found = counted([sampler.draw(40_000, torch.Generator().manual_seed(0))])
    assert chisquare([found[k] for k in pairs], [weight[k] * 40_000 / sum(weight.values()) for k in pairs]).pvalue > 1e-4
    epoch = counted(sampler.epoch(512, torch.Generator().manual_seed(0)))
    assert all(epoch[k] <= pairs[k] for k in epoch) and sum(epoch.values()) == pytest.approx(sum(weight.values()), rel=0.1)
    assert epoch[0, 0] / pairs[0, 0] == pytest.approx(float(sampler.keep[0]) ** 2, rel=0.2)


def test_lists_of_walks_are_walks():
    lists = [[0, 1, 2], [3], [], [4, 5]]
    assert Counter(map(tuple, CooccurrencePairSampler(1).extract_pairs(lists).tolist())) == Counter([(0, 1), (1, 0), (1, 2), (2, 1), (4, 5), (5, 4)])
    assert CooccurrencePairSampler(2).extract_pairs([]).shape == (0, 2)


def test_what_is_refused():
    walks = ragged_walks([5, 3])
    with pytest.raises(InputError, match="(?s)too many pairs.*PairSampler"):
        CooccurrencePairSampler(2, limit=10).extract_pairs(walks)
    with pytest.raises(InputError, match="(?s)goes on behind its end.*rows: +1"):
        PairSampler(torch.tensor([[0, 1, 2], [0, -1, 2]]))
    with pytest.raises(InputError, match="table of nodes"):
        PairSampler(torch.rand(3, 4))
    with pytest.raises(ParameterError, match="window"):
        PairSampler(walks, 0)
    with pytest.raises(ParameterError, match="not negative"):
        PairSampler(walks, 2, subsample=-1)
    with pytest.raises(InputError, match="no pairs to draw"):
        PairSampler(torch.tensor([[0, -1], [3, -1]])).draw(2)
    with pytest.raises(InputError, match="two columns"):
        BatchGenerator(torch.zeros(5, 3))
    with pytest.raises(ParameterError, match="batch_size"):
        BatchGenerator(PairSampler(walks), batch_size=0)
    assert list(PairSampler(torch.tensor([[0, -1]])).epoch(4)) == []


@pytest.mark.parametrize("stored", [True, False])
def test_batches_shuffle_by_epoch_and_cover_all(stored):
    walks = ragged_walks([7, 4, 2, 1, 7])
    pairs = by_hand(walks, 3)
    given = CooccurrencePairSampler(3).extract_pairs(walks) if stored else PairSampler(walks, 3)
    batches = BatchGenerator(given, batch_size=16, seed=5)
    first, second = list(batches), list(batches)
    assert counted(first) == counted(second) == pairs and len(first) == len(batches) == math.ceil(sum(pairs.values()) / 16)
    assert not first[0].targets.equal(second[0].targets) and batches.epoch == 2 and first[0].negatives is None
    resumed = BatchGenerator(given, batch_size=16, seed=5)
    resumed.epoch = 1
    assert all(a.targets.equal(b.targets) for a, b in zip(resumed, second, strict=True))
    full = BatchGenerator(given, batch_size=16, drop_last=True)
    assert [len(b.targets) for b in full] == [16] * len(full) and len(full) == sum(pairs.values()) // 16
    plain = BatchGenerator(given, batch_size=16, shuffle=False)
    assert all(a.targets.equal(b.targets) for a, b in zip(plain, plain, strict=True))


@pytest.mark.parametrize("kind", [BatchGenerator, StreamingBatchGenerator])
def test_negatives_are_never_the_pair(kind):
    walks = ragged_walks([9] * 40, nodes=6)
    sampler = DegreeBiasedNegativeSampler(torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]), 6)
    batches = list(kind(PairSampler(walks, 2) if kind is BatchGenerator else walks, sampler, 64, 4))
    for b in batches:
        assert b.negatives.shape == (len(b.targets), 4)
        assert not (b.negatives == b.targets[:, None]).any() and not (b.negatives == b.contexts[:, None]).any()


def test_streams_come_from_tensors_lists_functions_and_iterators():
    walks = ragged_walks([6, 3, 5, 1, 6, 2])
    pairs = by_hand(walks, 2)
    for given_walks in (walks, list(walks.split(2)), lambda: iter(walks.split(4))):
        stream = StreamingBatchGenerator(given_walks, batch_size=10, window=2, buffer_size=16)
        first, second = list(stream), list(stream)
        assert counted(first) == counted(second) == pairs and stream.seen == sum(pairs.values())
        assert [len(b.targets) for b in first[:-1]] == [10] * (len(first) - 1) and not first[0].targets.equal(second[0].targets)
    once = StreamingBatchGenerator(iter(walks.split(1)), window=2)
    assert counted(once) == pairs
    with pytest.raises(InputError, match="used up"):
        list(once)
    with pytest.raises(TypeError, match="not known"):
        len(once)
    assert len(StreamingBatchGenerator(walks, batch_size=10, window=2)) == math.ceil(sum(pairs.values()) / 10)


def test_the_buffer_shuffles_across_chunks():
    chunks = [torch.full((64, 2), i) for i in range(50)]
    out = [rows for rows in shuffled_stream(iter(chunks), 1024, torch.Generator().manual_seed(0))]
    where = torch.cat(out)[:, 0].double()
    assert torch.bincount(where.long()).tolist() == [64] * 50
    assert len(torch.cat(out)[:64, 0].unique()) > 10, "one batch holds rows of many chunks"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 20), st.integers(1, 20))
def test_rows_pass_buffers_and_batches_exactly_once(sizes, buffer, batch):
    rows = torch.arange(sum(sizes))[:, None].expand(-1, 2)
    batches = list(in_batches(shuffled_stream(iter(rows.split(sizes)) if sizes else iter([]), buffer, torch.Generator().manual_seed(0)), batch))
    assert sorted(v for b in batches for v in b[:, 0].tolist()) == list(range(sum(sizes)))
    assert [len(b) for b in batches[:-1]] == [batch] * (len(batches) - 1) and all(0 < len(b) <= batch for b in batches)


def test_distinct_numbers_are_distinct():
    found = distinct(300, 2000, torch.Generator().manual_seed(0))
    assert len(found.unique()) == 300 and found.max() < 2000


def test_memory_of_drawing_does_not_follow_the_number_of_pairs():
    "Tensors that live at once: those of a batch, for ten times as many pairs too."
    def most_held(walks):
        sampler, largest = PairSampler(ragged_walks([40] * walks), 10), 0
        tracemalloc.start()
        for targets, contexts in sampler.epoch(4096, torch.Generator().manual_seed(0)):
            largest = max(largest, targets.numel() + contexts.numel())
        tables = [v for v in vars(sampler).values() if isinstance(v, torch.Tensor) and v is not sampler.walks]
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return sampler.n_pairs, largest, sum(t.numel() for t in tables), python

    few, many = most_held(20), most_held(200)
    assert many[0] == 10 * few[0] and many[1] == few[1] == 8192 and many[2] == few[2] == 0 and many[3] < few[3] + 100_000


def test_training_data_moves_and_checks():
    walks = ragged_walks([4, 4], nodes=5)
    sampler = DegreeBiasedNegativeSampler(torch.tensor([[0, 1, 2], [1, 2, 3]]), 5)
    data = TrainingData(torch.randn(5, 3), torch.tensor([[0, 1], [1, 2]]), CooccurrencePairSampler(2).extract_pairs(walks), sampler)
    assert counted(data.batches(4)) == by_hand(walks, 2)
    moved = data.to("meta")
    assert moved.features.device.type == moved.positive_pairs.device.type == moved.negative_sampler.device.type == "meta" and data.features.device.type == "cpu"
    with pytest.raises(InputError, match="(?s)without features.*validation_pairs"):
        TrainingData(torch.randn(3, 2), None, torch.tensor([[0, 2]]), validation_pairs=torch.tensor([[0, 3]]))
