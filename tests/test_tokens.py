"""Semantic IDs by residual k-means: the properties that span more than one notebook cell."""
import io
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgen.core.errors import InputError
from recgen.core.neighbours import nearest_centres, nearest_neighbours
from recgen.formats.semantic_ids import SemanticIDs
from recgen.formats.trie import Trie, prefix_ids, rank_in_group
from recgen.quantization.kmeans import assign, fit_kmeans
from recgen.tokens.collisions import METHODS, bucket_counts, reconstruction_error, resolve, share_scores
from recgen.tokens.health import check_health, collision_table, health_table, summary
from recgen.tokens.rqkmeans import RQKMeans

few = settings(max_examples=40, deadline=None, derandomize=True)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tree(n=1500, groups=(8, 6), d=16, noise=0.2, seed=0):
    "A mixture of groups of subgroups."
    g, x = generator(seed), torch.zeros(n, d)
    for level, size in enumerate(groups):
        x += 2.0**-level * torch.randn(size, d, generator=g)[torch.randint(size, (n,), generator=g)]
    return x + noise * torch.randn(n, d, generator=g)


def naive_kmeans(x, k, seed, iterations=40):
    "Plain k-means++ and Lloyd, with a loop over centres and over clusters."
    g = generator(seed)
    chosen = [int(torch.randint(len(x), (1,), generator=g))]
    while len(chosen) < k:
        distance = torch.cdist(x, x[chosen]).square().amin(1)
        chosen.append(int(torch.multinomial(distance, 1, generator=g)))
    centres = x[chosen].clone()
    for _ in range(iterations):
        labels = torch.cdist(x, centres).argmin(1)
        for j in range(k):
            if (labels == j).any():
                centres[j] = x[labels == j].mean(0)
    return float(torch.cdist(x, centres).square().amin(1).mean())


# --- k-means


@pytest.mark.parametrize("k", [1, 7, 40])
def test_error_is_not_worse_than_a_plain_kmeans(k):
    x = tree(500, noise=0.5)
    reference = sorted(naive_kmeans(x, k, s) for s in range(3))[1]
    ours = sorted(fit_kmeans(x, k, generator(s)).error for s in range(3))[1]
    assert ours <= 1.02 * reference


def test_equal_seeds_equal_bits_and_other_seeds_others():
    x = tree()
    a, b, c = fit_kmeans(x, 30, generator(1)), fit_kmeans(x, 30, generator(1)), fit_kmeans(x, 30, generator(2))
    assert a.centres.equal(b.centres) and a.labels.equal(b.labels)
    assert not a.centres.equal(c.centres)


def test_the_number_of_threads_changes_nothing():
    x, before = tree(3000), torch.get_num_threads()
    try:
        fits = []
        for n in (1, 2):
            torch.set_num_threads(n)
            fits.append(fit_kmeans(x, 64))
    finally:
        torch.set_num_threads(before)
    assert fits[0].labels.equal(fits[1].labels) and torch.allclose(fits[0].centres, fits[1].centres, atol=1e-6)


def test_labels_of_the_fit_are_those_of_assign_in_any_batch_and_order():
    x = tree()
    fit = fit_kmeans(x, 50)
    assert fit.labels.equal(assign(x, fit.centres)[0])
    assert fit.labels.equal(torch.cat([assign(part, fit.centres, block=3)[0] for part in x.split(11)]))
    order = torch.randperm(len(x), generator=generator())
    assert fit.labels[order].equal(assign(x[order], fit.centres)[0])
    exact = torch.cdist(x.double(), fit.centres.double()).square()
    assert fit.labels.equal(exact.argmin(1)) and abs(fit.error - float(exact.amin(1).mean())) < 1e-5


def test_shifting_all_vectors_shifts_the_centres():
    x = tree()
    near, far = fit_kmeans(x, 20), fit_kmeans(x + 3000, 20)
    assert abs(far.error / near.error - 1) < 0.02
    assert nearest_centres(x + 3000, near.centres + 3000)[0].eq(near.labels).float().mean() > 0.999


@pytest.mark.parametrize("copies", [1, 30])
def test_more_centres_than_distinct_vectors(copies):
    x = torch.randn(9, 5, generator=generator()).repeat(copies, 1)
    assert fit_kmeans(x, 9).error < 1e-10
    with pytest.raises(InputError, match="9 distinct vectors"):
        fit_kmeans(x, 10)
    fit = fit_kmeans(x, 14, allow_unused=True)
    assert fit.unused == 5 and len(fit.labels.unique()) == 9 and fit.error < 1e-10 and torch.isfinite(fit.centres).all()


def test_distinct_vectors_closer_than_rounding_still_count():
    x = 1000 + torch.arange(8.0)[:, None] * torch.tensor([[1e-3, 0, 0]])
    assert fit_kmeans(x, len(x.unique(dim=0))).error == 0


def test_empty_clusters_are_reseeded():
    x = tree(600)
    far = torch.full((20, x.shape[1]), 90.0) + torch.arange(20.0)[:, None]
    fit = fit_kmeans(x, 20, init=far)
    assert fit.reseeded >= 19 and fit.unused == 0 and fit.error < fit_kmeans(x, 1).error / 2
    good = fit_kmeans(x, 20)
    spoiled = good.centres.clone()
    spoiled[7] = 90
    assert fit_kmeans(x, 20, init=spoiled).error < 1.1 * good.error


def test_bfloat16_products_end_near_float32():
    x = tree(3000, noise=0.5)
    full, rounded = (sorted(fit_kmeans(x, 40, generator(s), dtype=kind).error for s in range(3))[1] for kind in (torch.float32, torch.bfloat16))
    assert rounded < 1.02 * full


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_with_their_rows(bad):
    x = tree(100)
    x[[3, 70], 2] = bad
    with pytest.raises(InputError, match="3, 70"):
        RQKMeans.fit(x, n_layers=2, n_clusters=4)


def test_neighbours_with_equal_vectors_and_small_blocks():
    x = torch.randint(0, 3, (120, 3), generator=generator()).float() + 1
    for metric in ("cosine", "l2"):
        whole = nearest_neighbours(x, k=6, metric=metric)
        assert not (whole[0] == torch.arange(120)[:, None]).any()
        assert torch.allclose(whole[1], nearest_neighbours(x, k=6, metric=metric, cells=2000)[1], atol=1e-5)
    squared = torch.cdist(x.double(), x.double()).square().fill_diagonal_(torch.inf)
    assert torch.allclose(whole[1].double(), squared.sort().values[:, :6], atol=1e-4)


# --- residual k-means


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("standardize", [False, True])
def test_codes_reconstruct_and_survive_saving(levels, standardize):
    x = tree()
    x[:, 4] = 3.25  # a constant column
    model = RQKMeans.fit(x, n_layers=levels, n_clusters=[16, 8, 8, 4, 4][:levels], standardize=standardize)
    codes = model.codes(x)
    assert codes.shape == (len(x), levels) and (codes < torch.tensor(model.sizes)).all()
    errors = [r["error"] for r in model.report]
    assert all(b <= a for a, b in itertools.pairwise(errors))
    assert reconstruction_error(model.transform(x), codes, model.codebooks) == pytest.approx(errors[-1], rel=1e-3)
    assert torch.isfinite(model.decode(codes)).all() and torch.allclose(model.decode(codes)[:, 4], x[:, 4], atol=1e-4)
    file = io.BytesIO()
    torch.save(model.file_state(), file)
    file.seek(0)
    loaded = RQKMeans.load(torch.load(file, weights_only=True))
    assert loaded.codes(x).equal(codes) and loaded.codes(x, block=17).equal(codes) and loaded.report == model.report
    assert loaded.codes(x.numpy()[::-1].copy()).flip(0).equal(codes)


def test_the_fit_and_the_export_agree_level_by_level():
    x = tree()
    residual, g = x.clone(), generator(5)
    model = RQKMeans.fit(x, n_layers=3, n_clusters=20, seed=5)
    codes = model.codes(x)
    for level in range(3):
        fit = fit_kmeans(residual, 20, g, allow_unused=level > 0)
        assert fit.labels.equal(codes[:, level])
        residual = residual - fit.centres[fit.labels]


def test_the_models_refusals():
    with pytest.raises(InputError, match="constant"):
        RQKMeans.fit(torch.ones(9, 3), n_layers=1, n_clusters=1)
    with pytest.raises(InputError, match="distinct"):
        RQKMeans.fit(tree(10), n_layers=2, n_clusters=11)
    with pytest.raises(InputError, match="sizes"):
        RQKMeans.fit(tree(10), n_layers=2, n_clusters=[2, 2, 2])
    model = RQKMeans.fit(tree(50), n_layers=2, n_clusters=4)
    with pytest.raises(InputError, match="width"):
        model.codes(torch.zeros(3, 5))
    with pytest.raises(InputError, match="not a residual k-means model"):
        RQKMeans.load({"version": 1})


# --- prefixes and the table


@few
@given(st.lists(st.lists(st.sampled_from([0, 1, 2, 255, 2**40, 2**62]), min_size=3, max_size=3), max_size=30))
def test_prefixes_are_numbered_in_order_however_large_the_codes(rows):
    codes = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
    for length, numbers in enumerate(prefix_ids(codes).unbind(1), 1):
        prefixes = [tuple(r[:length]) for r in rows]
        known = sorted(set(prefixes))
        assert numbers.tolist() == [known.index(p) for p in prefixes]
        assert rank_in_group(numbers).tolist() == [prefixes[:i].count(p) for i, p in enumerate(prefixes)]


@pytest.mark.parametrize("sizes", [[2] * 64, [1000] * 20, [100_000] * 8])
def test_many_levels_of_many_codes_do_not_overflow(sizes):
    codes = torch.stack([torch.randint(k, (500,), generator=generator()) for k in sizes], 1)
    codes[250:, :-1] = codes[:250, :-1]
    codes[250:, -1] = sizes[-1] - 1 - codes[:250, -1]
    assert prefix_ids(codes)[:, -2].max() < 250 + (prefix_ids(codes)[:250, -2] != prefix_ids(codes)[250:, -2]).sum()
    trie = Trie(codes, torch.arange(1, 501), sizes)
    assert trie.find(codes).equal(trie.leaf_of_item[1:]) and (trie.find(codes[:, [*range(1, len(sizes)), 0]].contiguous()) >= -1).all()


def test_a_million_rows_are_found_and_codes_that_are_nowhere_are_not():
    g = generator()
    codes = torch.randint(256, (1_000_000, 4), generator=g)
    made = SemanticIDs(torch.arange(1, 1_000_001), codes, [256] * 4)
    trie = made.to_trie()
    assert trie.find(codes).equal(trie.leaf_of_item[1:])
    other = torch.randint(-1, 258, (1_000_000, 4), generator=g)
    leaf = trie.find(other)
    there = torch.isin(other @ 1000 ** torch.arange(4), codes @ 1000 ** torch.arange(4)) & ((other >= 0) & (other < 256)).all(1)
    assert (leaf >= 0).equal(there) and there.any()
    first = trie.items[trie.leaf_starts[leaf[there]]]
    assert made.codes(first).equal(other[there])


def test_find_agrees_with_the_children():
    codes, *_ = random_codes(60, [3, 4, 5])
    trie = Trie(codes, torch.arange(1, 61), [3, 4, 5])
    every = torch.cartesian_prod(*(torch.arange(k) for k in (3, 4, 5)))
    node = torch.zeros(60, dtype=torch.int64)
    for level in range(3):  # the plain way: compare with every child
        code, child = trie.children(level, node.clamp(min=0))
        match = (code == every[:, level, None]) & (child >= 0) & (node >= 0)[:, None]
        node = torch.where(match.any(1), torch.where(match, child, -1).max(1).values, -1)
    assert trie.find(every).equal(node) and (node < 0).any() and (node >= 0).any()


@pytest.mark.parametrize("method", METHODS)
def test_the_published_table_survives_saving_twice(tmp_path, method):
    codes, vectors, codebooks, ids = random_codes(40, [2, 3, 8])
    result = resolve(codes, method, ids, vectors, codebooks)
    sizes = [2, 3, 8, result.report["suffix_size"]] if method == "suffix" else [2, 3, 8]
    made = SemanticIDs(ids, result.codes, sizes, codes)
    made.save(tmp_path / "a")
    SemanticIDs.load(tmp_path / "a").save(tmp_path / "b")
    read = SemanticIDs.load(tmp_path / "b")
    assert read == made and read.raw_codes.equal(made.raw_codes)
    assert (tmp_path / "a" / "semantic_ids.parquet").read_bytes() == (tmp_path / "b" / "semantic_ids.parquet").read_bytes()
    read.check_coverage(ids)
    with pytest.raises(InputError, match="1 items without codes, 0 codes"):
        read.check_coverage([*ids.tolist(), 10_000])
    with pytest.raises(InputError, match="0 items without codes, 2 codes"):
        read.check_coverage(ids[2:])


def test_raw_codes_of_other_items_are_refused():
    with pytest.raises(InputError, match="different items"):
        SemanticIDs([1, 2], [[0], [1]], [2], raw_codes=[[0]])


# --- collisions


def random_codes(n, sizes, d=3, seed=0):
    g = generator(seed)
    codebooks = [torch.randn(k, d, generator=g) * 2.0**-level for level, k in enumerate(sizes)]
    codes = torch.stack([torch.randint(k, (n,), generator=g) for k in sizes], 1)
    return codes, torch.randn(n, d, generator=g), codebooks, torch.randperm(10 * n, generator=g)[:n] + 1


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("sizes", [[5], [2, 5], [1, 2, 5]])
def test_nearest_is_the_cheapest_way_for_the_surplus(sizes, seed):
    codes, vectors, codebooks, ids = random_codes(4, sizes, seed=seed)
    codes[:, -1] %= 2  # collisions under every prefix, and no overflow
    result = resolve(codes, "nearest", ids, vectors, codebooks)
    prefixes = codes[:, :-1].tolist()
    for prefix in {tuple(p) for p in prefixes}:
        rows = sorted((i for i in range(4) if tuple(prefixes[i]) == prefix), key=lambda i: int(ids[i]))
        stays = {int(codes[i, -1]): i for i in reversed(rows)}
        surplus = [i for i in rows if i not in stays.values()]
        left = vectors - sum(b[codes[:, level]] for level, b in enumerate(codebooks[:-1]))
        cost = (left[:, None] - codebooks[-1]).square().sum(2)
        free = [c for c in range(sizes[-1]) if c not in stays]
        best = min((sum(float(cost[i, c]) for i, c in zip(surplus, choice, strict=True)) for choice in itertools.permutations(free, len(surplus))))
        assert sum(float(cost[i, result.codes[i, -1]]) for i in surplus) == pytest.approx(best, rel=1e-5)
        assert all(int(result.codes[i, -1]) == c for c, i in stays.items())
        assert result.moved[rows].tolist() == [i in surplus for i in rows]


@pytest.mark.parametrize("sizes", [[40], [5, 8], [2, 4, 5], [2, 2, 2, 5], [2, 2, 2, 2, 3]])
@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("method", ["nearest", "sinkhorn"])
def test_everybody_finds_a_place_up_to_the_last(method, sizes, crowded, full):
    total = int(torch.tensor(sizes).prod())
    n = total if full else total - 3
    codes, vectors, codebooks, ids = random_codes(n, sizes)
    if crowded:
        codes.zero_()  # all items in one tuple: every level overflows
    result = resolve(codes, method, ids, vectors, codebooks)
    assert len(result.codes.unique(dim=0)) == n and result.codes.shape == codes.shape
    assert ((result.codes >= 0) & (result.codes < torch.tensor(sizes))).all()
    assert result.report["after"] == {"duplicate_rate": 0, "collision_rate": 0, "largest_group": 1}
    assert result.moved.equal((result.codes != codes).any(1)) and result.report["moved"] == int(result.moved.sum())
    order = torch.randperm(n, generator=generator(1))
    again = resolve(codes[order], method, ids[order], vectors[order], codebooks)
    assert again.codes.equal(result.codes[order]) and again.collision_rank.equal(result.collision_rank[order])


def test_overflow_leaves_by_regret_then_by_the_later_id():
    codebooks = [torch.tensor([[0.0], [10.0], [14.0]]), torch.tensor([[0.0], [1.0]])]
    vectors, ids = torch.tensor([[1.0], [4.0], [2.0], [4.0], [9.5]]), torch.tensor([50, 40, 30, 20, 10])
    codes = torch.tensor([[0, 0], [0, 0], [0, 0], [0, 0], [1, 0]])
    result = resolve(codes, "nearest", ids, vectors, codebooks)
    # two of four may stay under prefix 0. The 4.0s lose least by leaving; the later id, 40, gets the one place left under
    # prefix 1, and id 20 goes on to the next nearest, prefix 2.
    assert result.codes[:, 0].tolist() == [0, 1, 0, 2, 1]
    assert len(result.codes.unique(dim=0)) == 5 and result.report["spilled"] == 2


@st.composite
def catalogues(draw):
    "(codes, vectors, codebooks, ids): up to a full tuple space, often crowded."
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    room = int(torch.tensor(sizes).prod())
    codes, vectors, codebooks, ids = random_codes(draw(st.integers(1, min(room, 40))), sizes, seed=draw(st.integers(0, 99)))
    return codes % draw(st.integers(1, 5)), vectors, codebooks, ids


@few
@given(catalogues(), st.sampled_from(METHODS), st.integers(0, 99))
def test_whatever_the_method(catalogue, method, seed):
    codes, vectors, codebooks, ids = catalogue
    result, report = (r := resolve(codes, method, ids, vectors, codebooks)), r.report
    assert method == "none" or len(result.codes.unique(dim=0)) == len(codes)
    assert ((result.codes >= 0) & (result.codes < torch.tensor([*map(len, codebooks), 99])[: result.codes.shape[1]])).all()
    order = torch.randperm(len(codes), generator=generator(seed))
    again = resolve(codes[order], method, ids[order], vectors[order], codebooks)
    assert again.codes.equal(result.codes[order]) and again.report == report
    changed = result.codes[:, : codes.shape[1]] != codes
    assert result.moved.equal(changed.any(1)) and report["moved"] == int(changed.any(1).sum())
    assert report["moved_by_level"] == pytest.approx(changed.float().mean(0).tolist()) and report["spilled"] == int(changed[:, :-1].any(1).sum())
    assert report["share_moved"] == pytest.approx(report["moved"] / len(codes))
    error = [float((vectors - sum(b[c[:, i]] for i, b in enumerate(codebooks))).square().sum(1).mean()) for c in (codes, result.codes)]
    assert report["added_error"] == result.added_error == pytest.approx(error[1] - error[0], abs=1e-4)
    assert report["relative_added_error"] == pytest.approx(report["added_error"] / report["error_before"])
    if method in ("suffix", "none"):
        assert report["moved"] == report["added_error"] == 0


@few
@given(catalogues())
def test_of_each_bucket_the_first_by_id_stays_unless_its_prefix_overflows(catalogue):
    codes, vectors, codebooks, ids = catalogue
    result = resolve(codes, "nearest", ids, vectors, codebooks)
    if not result.report["spilled"]:
        first = result.collision_rank == 0
        assert result.codes[first].equal(codes[first]) and result.moved.equal(~first)


@pytest.mark.parametrize("seed", range(6))
def test_sinkhorn_leaves_prefixes_without_collisions_alone(seed):
    codes, vectors, codebooks, ids = random_codes(40, [4, 4, 12], seed=seed)
    result = resolve(codes, "sinkhorn", ids, vectors, codebooks)
    assert not result.report["spilled"] and result.codes[:, :2].equal(codes[:, :2])
    number = prefix_ids(codes)
    crowded = torch.isin(number[:, 1], number[result.collision_rank > 0, 1])
    assert result.codes[~crowded].equal(codes[~crowded]) and crowded.any() and (~crowded).any()


@pytest.mark.parametrize("temperature", [0.01, 0.3])
def test_sinkhorn_moves_all_items_of_a_prefix_at_little_more_than_the_least_cost(temperature):
    from scipy.optimize import linear_sum_assignment

    cost, least, nearest = 0.0, 0.0, 0.0
    for seed in range(20):
        codes, vectors, codebooks, ids = random_codes(8, [1, 16], seed=seed)
        residual = vectors - codebooks[0][codes[:, 0]]
        distances = torch.cdist(residual.double(), codebooks[1].double()).square()
        codes[:, 1] = distances.argmin(1)
        if len(codes[:, 1].unique()) == len(codes):
            continue
        shared = resolve(codes, "sinkhorn", ids, vectors, codebooks, temperature=temperature, iterations=500).codes[:, 1]
        cost += float(distances.gather(1, shared[:, None]).sum())
        least += float(distances.numpy()[linear_sum_assignment(distances.numpy())].sum())
        nearest += float(distances.gather(1, resolve(codes, "nearest", ids, vectors, codebooks).codes[:, 1:]).sum())
    assert least <= cost <= 1.02 * least < nearest and cost < nearest


def test_the_plan_gives_every_item_its_mass_and_no_code_too_much():
    g = generator()
    cost, there = torch.rand(5, 8, 16, generator=g, dtype=torch.float64), torch.arange(8) < torch.tensor([2, 3, 5, 8, 7])[:, None]
    plan = share_scores(cost, there, temperature=0.2, iterations=2000).softmax(2) * there[..., None]
    assert plan.sum(1).max() < 1.01 and torch.allclose(plan.sum(2)[there], torch.ones(25, dtype=torch.float64))
    padded = torch.cat([cost, torch.rand(5, 3, 16, generator=g, dtype=torch.float64)], 1)
    wider = share_scores(padded, torch.arange(11) < there.sum(1, keepdim=True), temperature=0.2, iterations=2000).softmax(2)[:, :8] * there[..., None]
    assert torch.allclose(plan, wider, atol=1e-9)  # padding changes nothing


@pytest.mark.parametrize("temperature", [1e-5, 1e-2, 1.0, 100.0])
def test_no_temperature_breaks_sinkhorn(temperature):
    codes, vectors, codebooks, ids = random_codes(300, [2, 256])
    codes[:, 1] = 7  # all in two buckets
    result = resolve(codes, "sinkhorn", ids, vectors, codebooks, temperature=temperature, iterations=300)
    assert len(result.codes.unique(dim=0)) == 300 and result.codes[:, 0].equal(codes[:, 0])


def test_equal_vectors_and_equal_distances_are_shared_out_too():
    codebooks, nothing = [torch.zeros(2, 3), torch.zeros(8, 3)], torch.zeros(11, 2, dtype=torch.int64)
    result = resolve(nothing, "sinkhorn", None, torch.zeros(11, 3), codebooks)
    assert len(result.codes.unique(dim=0)) == 11 and result.report["added_error"] == 0 and result.report["relative_added_error"] is None
    result = resolve(nothing, "sinkhorn", None, torch.ones(11, 3), codebooks)  # all distances equal, and not 0; places stay empty
    assert len(result.codes.unique(dim=0)) == 11 and result.report["relative_added_error"] == 0


@pytest.mark.parametrize("method", ["nearest", "sinkhorn"])
def test_equal_vectors_are_told_apart_by_id_whatever_the_threads(method):
    x = tree(60, noise=0.5).repeat(7, 1)  # seven copies of each item
    model = RQKMeans.fit(x, n_layers=2, n_clusters=24)
    codes, ids, before = model.codes(x), torch.randperm(len(x), generator=generator()) + 1, torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            order = torch.randperm(len(x), generator=generator(threads))
            result = resolve(codes[order], method, ids[order], x[order], model.codebooks)
            results.append(result.codes[torch.argsort(order)])
    finally:
        torch.set_num_threads(before)
    assert results[0].equal(results[1]) and len(results[0].unique(dim=0)) == len(x)


def test_latents_and_trained_codebooks_are_taken_as_they_are():
    codes, vectors, codebooks, ids = random_codes(30, [4, 16])
    plain = resolve(codes, "sinkhorn", ids, vectors, codebooks)
    latents, parameters = vectors.clone().requires_grad_(), [torch.nn.Parameter(c) for c in codebooks]
    for method in METHODS:
        result = resolve(codes, method, ids, latents, parameters)
        assert result.report == resolve(codes, method, ids, vectors.numpy(), codebooks).report
    assert plain.codes.equal(resolve(codes, "sinkhorn", ids, latents, parameters).codes)
    shift = torch.ones(3)  # only differences from the codebooks count
    assert plain.codes.equal(resolve(codes, "sinkhorn", ids, vectors + shift, [codebooks[0] + shift, codebooks[1]]).codes)
    with pytest.raises(InputError, match="not in the space of the codebooks"):
        resolve(codes, "nearest", ids, torch.zeros(30, 4), codebooks)


def test_nothing_changes_where_nothing_collides():
    codes = torch.cartesian_prod(torch.arange(4), torch.arange(5))[torch.randperm(20, generator=generator())][:13]
    _, vectors, codebooks, ids = random_codes(13, [4, 5])
    for method in ("nearest", "sinkhorn", "none"):
        result = resolve(codes, method, ids, vectors, codebooks)
        assert result.codes.equal(codes) and not result.moved.any() and result.added_error == 0


def test_suffix_counts_by_item_id():
    codes = torch.tensor([[1, 2], [1, 2], [0, 0], [1, 2]])
    result = resolve(codes, "suffix", torch.tensor([9, 3, 7, 5]))
    assert result.codes.tolist() == [[1, 2, 2], [1, 2, 0], [0, 0, 0], [1, 2, 1]]
    assert result.report["suffix_size"] == 3 and result.report["after"]["duplicate_rate"] == 0
    assert result.report["before"] == {"duplicate_rate": 0.5, "collision_rate": 0.75, "largest_group": 3}


@pytest.mark.parametrize("method", ["nearest", "sinkhorn"])
def test_more_items_than_tuples_are_refused(method):
    codes, vectors, codebooks, ids = random_codes(13, [3, 4])
    with pytest.raises(InputError, match="13 items, 12 tuples"):
        resolve(codes, method, ids, vectors, codebooks)
    assert resolve(codes, "none", ids, vectors, codebooks).codes.equal(codes)
    assert len(resolve(codes, "suffix", ids, vectors, codebooks).codes.unique(dim=0)) == 13, "a suffix tells apart as many as there are"


def test_the_refusals_of_resolve():
    codes, vectors, codebooks, ids = random_codes(8, [3, 4])
    with pytest.raises(InputError, match="no such way"):
        resolve(codes, "closest", ids, vectors, codebooks)
    with pytest.raises(InputError, match="one id of its own"):
        resolve(codes, "suffix", ids * 0)
    with pytest.raises(InputError, match="needs the vectors"):
        resolve(codes, "nearest", ids)
    with pytest.raises(InputError, match="do not have"):
        resolve(codes + 3, "nearest", ids, vectors, codebooks)


# --- health


def test_health_of_known_codes():
    codes = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 0]])
    table = health_table(codes, [2, 8])
    assert table.use.tolist() == [1, 0.25] and table.perplexity[0] == 2 and table.uniqueness.tolist() == [0.5, 0.75]
    assert collision_table(codes).largest_group.tolist() == [2, 2] and bucket_counts(codes)["duplicate_rate"] == 0.25
    assert summary(table)["collision_rate"] == 0.5 and summary(table)["min_codebook_use"] == 0.25
    assert len(check_health(table)) == 1 and check_health(table, min_codebook_use=0.2) == []
    with pytest.raises(InputError, match="level 1 uses 2 of 8"):
        check_health(table, strict=True)


def test_health_takes_a_suffix_level():
    x = tree(400)
    model = RQKMeans.fit(x, n_layers=2, n_clusters=8)
    suffixed = resolve(model.codes(x), "suffix")
    table = health_table(suffixed.codes, [8, 8, suffixed.report["suffix_size"]], x, model.codebooks)
    assert len(table) == 3 and table.duplicate_rate.iloc[-1] == 0
    assert table.explained_variance[2] == table.explained_variance[1] == pytest.approx(model.report[1]["explained_variance"], abs=1e-4)
    assert (table.neighbours[:2] > 2 * table.chance[:2]).all()


# --- real data


@pytest.mark.slow
def test_beauty(data):
    import pyarrow.parquet as pq

    table = pq.read_table(data / "beauty" / "item_emb.parquet")
    x = torch.tensor(table["embedding"].combine_chunks().values.to_numpy(zero_copy_only=False)).reshape(len(table), -1)
    ids = torch.tensor(table["ItemID"].to_numpy())
    model = RQKMeans.fit(x, n_layers=3, n_clusters=256)
    assert model.report[-1]["error"] <= 0.315
    codes = model.codes(x)
    assert 0 < bucket_counts(codes)["duplicate_rate"] < 0.15
    result = resolve(codes, "nearest", ids, model.transform(x), model.codebooks)
    assert len(result.codes.unique(dim=0)) == len(x) == 12_101
    shared = resolve(codes, "sinkhorn", ids, model.transform(x), model.codebooks)
    assert len(shared.codes.unique(dim=0)) == len(x) and shared.added_error < result.added_error < 0.03 * result.report["error_before"]
    assert check_health(health_table(result.codes, model.sizes)) == []
    standardised = RQKMeans.fit(x, n_layers=2, n_clusters=64, standardize=True)  # columns 127 and 223 are constant
    assert torch.isfinite(standardised.decode(standardised.codes(x))).all() and (standardised.scale == 0).sum() >= 2
