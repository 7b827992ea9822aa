"""k-means on many vectors: balanced loads, sources read in blocks, memory that does not grow with them."""
import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recgen.core.errors import InputError
from recgen.quantization.balanced import auction, capacity_of, fit_balanced
from recgen.quantization.kmeans import assign, fit_kmeans
from recgen.quantization.scaling import column_scale, standardized
from recgen.quantization.streaming import VectorSource, column_moments, open_source, sample_rows
from recgen.tokens.rqkmeans import RQKMeans

def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def skewed(n=2000, groups=50, d=12, noise=0.3, seed=0):
    "A mixture in which a few groups hold most vectors."
    g = generator(seed)
    which = torch.multinomial(torch.arange(1, groups + 1).float() ** -1, n, True, generator=g)
    return torch.randn(groups, d, generator=g)[which] + noise * torch.randn(n, d, generator=g)


def write_parquet(path, vectors, ids=None, groups=500):
    pq.write_table(pa.table({"ItemID": list(ids or range(1, len(vectors) + 1)), "embedding": pa.array(vectors, pa.list_(pa.float32()))}), path, row_group_size=groups)
    return path


@pytest.fixture(params=["tensor", "array", "npy", "npy of doubles", "parquet"])
def source(request, tmp_path):
    "The same vectors as every kind of source."
    x = skewed(1300)
    if request.param == "parquet":
        return write_parquet(tmp_path / "x.parquet", x.tolist())
    if request.param.startswith("npy"):
        np.save(tmp_path / "x.npy", x.double().numpy() if "doubles" in request.param else x.numpy())
        return tmp_path / "x.npy"
    return x if request.param == "tensor" else x.numpy()


# --- large N


def test_a_start_on_a_sample_is_nearly_as_good_as_on_everything():
    x = skewed(30_000, groups=400, noise=0.5)
    sampled, full = (sorted(fit_kmeans(x, 64, generator(s), sample=size).error for s in range(3))[1] for size in (4096, len(x)))
    assert sampled < 1.01 * full


def test_a_sample_that_lacks_distinct_vectors_is_not_the_last_word():
    x = torch.cat([torch.zeros(40_000, 2), torch.arange(60.0).reshape(30, 2)])
    fit = fit_kmeans(x, 31, sample=100)
    assert fit.error == 0 and fit.unused == 0
    with pytest.raises(InputError, match="31 distinct"):
        fit_kmeans(x, 32, sample=100)


# --- balanced


@pytest.mark.parametrize("n, k, noise", [(2000, 40, 0.3), (600, 60, 0.05), (500, 7, 1.0), (40, 40, 0.3)])
def test_capacities_hold(n, k, noise):
    x = skewed(n, noise=noise)
    fit = fit_balanced(x, k)
    loads = torch.bincount(fit.labels, minlength=k)
    assert int(loads.max()) == fit.largest <= fit.capacity == capacity_of(n, k)
    assert fit.labels.equal(assign(x, fit.centres, prices=fit.prices)[0]) and bool((fit.prices >= 0).all())
    assert fit.labels.equal(torch.cat([assign(part, fit.centres, prices=fit.prices)[0] for part in x.split(77)]))


def test_a_price_buys_what_the_definition_says():
    x, centres, prices = skewed(300), skewed(20, seed=5), torch.rand(20, generator=generator(2))
    expected = (torch.cdist(x.double(), centres.double()).square() + prices).argmin(1)
    labels, distances = assign(x, centres, prices=prices)
    assert labels.equal(expected)
    assert torch.allclose(distances, (x - centres[expected]).square().sum(1))  # the distance itself has no price in it
    assert assign(x, centres, prices=torch.full((20,), 3.0))[0].equal(assign(x, centres)[0])


def test_of_equal_centres_the_cheaper_one_serves():
    centres, prices = torch.tensor([[0.0], [0.0], [5.0]]), torch.tensor([1.0, 0.5, 0.0])
    assert assign(torch.tensor([[0.1], [4.9]]), centres, prices=prices)[0].tolist() == [1, 2]


def test_auction_costs_little_more_than_the_best_assignment():
    "Against the exact minimum-cost assignment with the same capacities."
    from scipy.optimize import linear_sum_assignment

    x = skewed(240, groups=6)
    centres, capacity = fit_kmeans(x, 8).centres, 33
    _, labels, distances = auction(x, centres, torch.zeros(8), capacity)
    cost = torch.cdist(x, centres).square().repeat_interleave(capacity, 1).numpy()
    rows, columns = linear_sum_assignment(cost)
    assert torch.bincount(labels, minlength=8).max() <= capacity
    assert cost[rows, columns].mean() - 1e-4 <= float(distances.mean()) <= 1.15 * cost[rows, columns].mean()


def test_equal_vectors_beyond_the_capacity_are_told():
    x = torch.cat([skewed(400), torch.ones(300, 12), -torch.ones(200, 12)])
    fit = fit_balanced(x, 30)
    loads = torch.bincount(fit.labels, minlength=30).sort().values
    assert loads[-1] >= 300 and loads[-2] >= 200 and loads[-3] <= fit.capacity and fit.largest == loads[-1]


def test_balanced_model_saves_its_prices_and_is_deterministic():
    x = skewed(1200)
    model, again = (RQKMeans.fit(x, 3, 20, seed=3, balanced=True) for _ in range(2))
    codes = model.codes(x)
    assert codes.equal(again.codes(x))
    file = io.BytesIO()
    torch.save(model.file_state(), file)
    file.seek(0)
    loaded = RQKMeans.load(torch.load(file, weights_only=True))
    assert loaded.codes(x).equal(codes) and loaded.codes(x[::3]).equal(codes[::3])
    for level, r in enumerate(model.report):
        assert int(codes[:, level].bincount().max()) == r["largest"] <= r["capacity"] == 66
    plain = RQKMeans.fit(x, 3, 20, seed=3)
    assert plain.file_state()["version"] == 1 and RQKMeans.load(plain.file_state()).prices is None
    broken = model.file_state() | {"prices": {"level_0": torch.zeros(20)}}
    with pytest.raises(InputError, match="not whole"):
        RQKMeans.load(broken)


# --- joined sources


def test_joined_sources_weigh_alike_and_one_alone_as_before():
    x = torch.cat([skewed(500, d=30), 5 * skewed(500, d=4, seed=1), torch.ones(500, 2)], 1)
    variance = standardized(x, *column_scale(x, True, [30, 6])).var(0, correction=0)
    assert torch.allclose(variance[:30].sum(), variance[30:].sum(), rtol=1e-4) and torch.allclose(variance.sum(), torch.tensor(34.0), rtol=1e-4)
    for a, b in zip(column_scale(x, True), column_scale(x, True, [36]), strict=True):
        assert a.equal(b)
    with pytest.raises(InputError, match="widths"):
        column_scale(x, True, [30, 4])


# --- streaming


@functools.cache
def models_of_1300():
    return [RQKMeans.fit(skewed(1300), 2, 12, standardize=True, balanced=balanced, max_iters=5) for balanced in (False, True)]


@pytest.mark.parametrize("block", [7, 64, 999, 5000])
def test_streamed_codes_are_the_codes(source, block):
    x = skewed(1300)
    for model in models_of_1300():
        firsts, parts = zip(*model.codes_stream(source, block), strict=True)
        assert torch.cat(parts).equal(model.codes(x).short())
        assert list(firsts) == [sum(map(len, parts[:i])) for i in range(len(parts))] and max(map(len, parts)) <= block


def test_sources_agree_on_everything(source):
    x, found = skewed(1300), open_source(source)
    assert isinstance(found, VectorSource) and (len(found), found.width) == x.shape
    mean, variance = column_moments(found)
    assert torch.allclose(mean, x.double().mean(0), rtol=1e-6) and torch.allclose(variance, x.double().var(0, correction=0), rtol=1e-5)
    index = sample_rows(1300, 200, generator())
    assert found.rows(index).equal(x[index])
    here, there = (RQKMeans.fit_stream(s, 2, 16, sample=600, passes=1, standardize=True) for s in (x, source))
    assert all(a.equal(b) for a, b in zip(here.codebooks, there.codebooks, strict=True))


def test_streamed_fit_is_within_a_percent_and_passes_help():
    x = skewed(40_000, groups=300, d=16)
    errors = {}
    for name, model in {"memory": RQKMeans.fit(x, 2, 32), "sample": RQKMeans.fit_stream(x, 2, 32), "passes": RQKMeans.fit_stream(x, 2, 32, passes=2)}.items():
        errors[name] = float((x - model.decode(model.codes(x))).square().sum(1).mean())
    assert errors["sample"] < 1.01 * errors["memory"] and errors["passes"] < 1.001 * errors["sample"], errors


def test_bad_files_are_refused(tmp_path):
    nan = float("nan")
    cases = {"different lengths": [[1.0, 2], [3.0]], "missing": [[1.0, 2], None], "infinite": [[1.0, 2], [nan, 1]], "vectors hold": [[1.0, 2], [1, None]]}
    for words, vectors in cases.items():
        with pytest.raises(InputError, match=words) as refused:
            list(open_source(write_parquet(tmp_path / "bad.parquet", vectors, [7, 9])).blocks())
        assert refused.value.parts["column"] == "embedding" and refused.value.parts["rows"] == "item 9" and "bad.parquet" in str(refused.value)
    with pytest.raises(InputError, match="ids are not whole numbers from 1"):
        list(open_source(write_parquet(tmp_path / "ids.parquet", [[1.0], [2.0]], [0, 1])).blocks())
    with pytest.raises(InputError, match="two vectors"):
        open_source(write_parquet(tmp_path / "twice.parquet", [[1.0], [2.0]], [4, 4])).item_ids()
    with pytest.raises(InputError, match="does not hold vectors"):
        open_source(tmp_path / "twice.parquet", "text")
    whole = write_parquet(tmp_path / "whole.parquet", [[1.0], [2.0]]).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    np.save(tmp_path / "whole.npy", np.ones((50, 3), np.float32))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-4])
    for name in ("cut.parquet", "cut.npy", "absent.npy", "absent.parquet"):
        with pytest.raises(InputError, match="cannot be read|cut off"):
            open_source(tmp_path / name)
    holed = np.ones((50, 3), np.float32)
    holed[31, 1] = nan
    np.save(tmp_path / "holed.npy", holed)
    with pytest.raises(InputError) as refused:
        list(open_source(tmp_path / "holed.npy").blocks(20))
    assert refused.value.parts["rows"] == "31"


GROWTH = """
import json, sys, torch
from recgen.tokens.rqkmeans import RQKMeans
torch.set_num_threads(1)
model = RQKMeans.fit_stream(sys.argv[1], 2, 16, max_iters=5, standardize=True, passes=1)
seen = sum(len(codes) for _, codes in model.codes_stream(sys.argv[1]))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # getrusage would tell the parent's peak if that is higher
print(json.dumps([seen, int(peak.split()[1]) / 1024]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of resident memory is read from Linux's /proc")
@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_memory_does_not_grow_with_the_vectors(tmp_path, kind):
    "Four times the vectors, 77 MB more: the peak of a process that fits and assigns grows by less than a third of that, which is how much an allocator's leftovers differ."
    peaks = []
    for n in (100_000, 400_000):
        file = tmp_path / f"{n}.{kind}"
        x = np.random.default_rng(0).standard_normal((n, 64), dtype=np.float32)
        if kind == "npy":
            np.save(file, x)
        else:
            pq.write_table(pa.table({"ItemID": np.arange(1, n + 1), "embedding": pa.FixedSizeListArray.from_arrays(x.ravel(), 64)}), file, row_group_size=20_000)
        done = subprocess.run([sys.executable, "-c", GROWTH, str(file)], capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)})
        assert done.returncode == 0, done.stderr
        seen, peak = json.loads(done.stdout)
        assert seen == n
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 25, peaks
