"""The benchmarks' harness: who runs when, what is made of the times, and what happens without a peer. Nothing here is held against a clock."""
import json

import pytest

from recgen.core import benchmark
from recgen.core.benchmark import PeakMemory, Side, alternate, child_environment, fitted_exponent, paired_ratio, run_fresh, spread
from recgen.core.errors import RunError
from recgen.stages import benchmarks as stage
from recgen.tokens import benchmarks as tokens

REGISTRY = "recgen.stages.benchmarks:MEASUREMENTS"
TINY = {**stage.SIZES["small"], "items": 300, "width": 8, "codes": 8, "base": 40, "growth_codes": 8, "growth_width": 8, "gemm": 64, "seed": 0, "data_path": ""}


class Clock:
    "Seconds that pass only when a side says so."

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def side(self, name, seconds, order, **more):
        times = iter(seconds)

        def run(seed):
            order.append((name, seed))
            self.now += next(times)
            return name

        return Side(run, **more)


def test_sides_alternate_each_round_begins_with_the_next_and_warm_ups_do_not_count():
    clock, order = Clock(), []
    sides = {n: clock.side(n, [100, *t], order) for n, t in {"a": [1, 2, 3], "b": [10, 20, 30], "c": [7, 7, 7]}.items()}
    rows = alternate(sides, 3, seed=5, clock=clock)
    assert [n for n, _ in order] == list("abc" "abc" "bca" "cab")
    assert [s for _, s in order] == [5] * 6 + [6] * 3 + [7] * 3
    assert {n: [r["seconds"] for r in rows if r["side"] == n] for n in "abc"} == {"a": [1, 2, 3], "b": [10, 20, 30], "c": [7, 7, 7]}


def test_judges_work_off_the_clock_and_may_overrule_it():
    clock, order = Clock(), []

    def slow_judge(made):
        clock.now += 1000
        return {"error": len(made)}

    rows = alternate({"ours": clock.side("ours", [5, 1, 2], order, judge=slow_judge), "peer": clock.side("peer", [5, 9, 9], order, judge=lambda made: {"seconds": 3.5})}, 2, clock=clock)
    assert [(r["seconds"], r.get("error")) for r in rows] == [(1, 4), (3.5, None), (3.5, None), (2, 4)]


def test_medians_and_ratios_are_of_rounds():
    rows = [{"side": s, "repeat": i, "seconds": t} for i, pair in enumerate([(1, 2), (10, 40), (2, 20)]) for s, t in zip(("ours", "peer"), pair, strict=True)]
    assert paired_ratio(rows, "ours", "peer") == {"median": 4, "low": 2, "high": 10, "n": 3}  # of medians it would be 10
    assert spread([3, 1, 2, 9]) == {"median": 2.5, "low": 1, "high": 9, "n": 4}


@pytest.mark.parametrize("power", [0, 0.5, 1, 2])
def test_the_exponent_of_a_power_law_is_found(power):
    assert fitted_exponent([1, 4, 16, 64], [3 * n**power for n in (1, 4, 16, 64)]) == pytest.approx(power, abs=1e-12)


def test_a_missing_peer_is_said_and_ours_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.importlib.metadata, "version", lambda name: (_ for _ in ()).throw(benchmark.importlib.metadata.PackageNotFoundError(name)))
    there, missing = benchmark.present_sides(tokens.prepare_rqkmeans(TINY))
    assert list(there) == ["recgen"] and missing == {"faiss": "faiss-cpu", "scikit-learn": "scikit-learn"}
    rows = [{**r, "package": "", "items": 300, "limit_seconds": 0.1, "allocator": "glibc"} for r in alternate(there, 2)]
    measured = {"rqkmeans": {"rows": rows, "memory": [], "missing": missing, "rates": {}}}
    assert stage.side_table(measured)["error"].iloc[0] > 0 and stage.ratio_table(measured).empty and stage.growth_table(measured).empty
    stage.save_tables(tmp_path, measured, {"cpu": "some"})
    assert json.loads((tmp_path / "benchmarks.json").read_text())["measured"]["rqkmeans"]["missing"] == missing
    assert (tmp_path / "ratios.csv").read_text().startswith("measurement,")


def test_the_allocator_and_threads_are_set_before_the_process_starts(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "77")  # what this process happens to run under is not passed on
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    plain, tuned = child_environment("glibc", 3), child_environment("tuned", 3)
    assert not set(benchmark.TUNED) & set(plain) and benchmark.TUNED.items() <= tuned.items()
    assert {k: v for k, v in tuned.items() if k not in benchmark.TUNED} == plain
    assert plain["OMP_NUM_THREADS"] == plain["OPENBLAS_NUM_THREADS"] == "3" and plain["OMP_WAIT_POLICY"] == "PASSIVE"
    assert run_fresh("os:getenv", {"key": "MALLOC_TOP_PAD_"}, "tuned") == "67108864" and run_fresh("os:getenv", {"key": "MALLOC_MMAP_MAX_"}) is None


def test_a_child_answers_past_what_libraries_print_and_a_failed_one_says_why(tmp_path, monkeypatch):
    (tmp_path / "noisy.py").write_text("import os\ndef work(n):\n    print('a library says hello')\n    os.write(1, b'and one in C')\n    return {'n': n + 1}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_fresh("noisy:work", {"n": 1}) == {"n": 2}
    with pytest.raises(RunError, match="(?s)noisy:work failed.*TypeError"):
        run_fresh("noisy:work", {"n": None})


def test_memory_is_of_the_block_alone():
    bytearray(200 << 20)
    with PeakMemory() as peak:
        bytearray(60 << 20)
    if not peak.how.startswith("VmHWM"):
        pytest.skip("this system does not let a process set its mark back: earlier peaks hide later ones")
    assert 50 < peak.megabytes < 80


def test_times_and_memory_of_one_measurement_in_fresh_processes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = benchmark.measure(REGISTRY, "rqkmeans", TINY, repeats=2, allocators=["tuned"], threads=1)
    ours = [r for r in found["rows"] if r["side"] == "recgen"]
    assert [r["repeat"] for r in ours] == [0, 1] and ours[0]["error"] != ours[1]["error"]  # another seed each
    sides = {r["side"] for r in found["rows"]}
    assert sides | set(found["missing"]) == {"recgen", "faiss", "scikit-learn"} and {m["side"] for m in found["memory"]} == sides
    assert found["rates"]["tuned"]["fp32"] > 0 and len(stage.ratio_table({"rqkmeans": found})) == len(sides) - 1


@pytest.mark.parametrize("size", stage.SIZES)
def test_every_measurement_has_what_it_needs_at_every_size(size):
    options = {**stage.SIZES[size], "items": 200, "level_items": 300, "level_width": 4, "seed": 0, "width": 8}
    names = set(tokens.measurements())
    assert len(names) == 9 and names <= set(stage.MEASUREMENTS) and all(isinstance(m.limit, str) and m.title for m in stage.MEASUREMENTS.values())
    for name in names - {"growth_collisions"}:  # which fits a model first; TIGER's are in test_benchmarks_tiger
        sides = stage.MEASUREMENTS[name].prepare(options)
        assert list(sides)[0] == benchmark.OURS and all(s.package in (*stage.PEERS, "") and s.items for s in sides.values())
        assert stage.MEASUREMENTS[name].factors or all(s.flops > 0 and s.precision in ("fp32", "bf16") for s in sides.values())


GRAPHS = {**stage.hgt_benchmarks.MEASUREMENTS, **stage.walk_benchmarks.MEASUREMENTS, **stage.sage_benchmarks.MEASUREMENTS}


@pytest.mark.parametrize("name", GRAPHS)
def test_every_measurement_of_a_graph_runs_ours_and_the_peers_that_are_here(name):
    assert name in stage.MEASUREMENTS
    sides = stage.MEASUREMENTS[name].prepare({**stage.SIZES["small"], "items": 60, "pair_draws": 4096, "seed": 0, "data_path": ""})
    assert list(sides)[0] == benchmark.OURS and all(s.package in (*stage.PEERS, "torch", "") and s.items for s in sides.values())
    there, missing = benchmark.present_sides(sides)
    assert benchmark.OURS in there and set(there) | set(missing) == set(sides)
    rows = alternate(there, 1, seed=0)
    assert {r["side"] for r in rows} == set(there) and all(r["seconds"] > 0 for r in rows)
    if name.startswith(("hgt", "sage")):  # equal weights, other dropout: about equal losses; without dropout the notebooks compare them to four digits
        losses = [r["loss"] for r in rows]
        assert len(losses) > 1 and losses == pytest.approx([losses[0]] * len(losses), rel=0.05)


@pytest.mark.skipif(not all(benchmark.installed(p) for p in stage.PEERS[:3]), reason="the peers are not installed: pip install 'recgen[bench]'")
def test_peers_do_the_same_work():
    sides = tokens.prepare_rqkmeans({**TINY, "items": 2000})
    errors = {name: side.judge(side.run(0))["error"] for name, side in sides.items()}
    assert max(errors.values()) < 1.25 * min(errors.values())
    trained = tokens.prepare_rqvae({**TINY, "epochs": 1, "quality_epochs": 3}, batch_size=64, whole=True)
    made = {name: side.judge(side.run(0)) for name, side in trained.items() if "bf16" not in name}
    assert {frozenset(m) for m in made.values()} == {frozenset(made["recgen"])} and all(0 < m["reconstruction"] < 8 * 1.5 for m in made.values())
