"TIGER's benchmarks: both sides do the same work on the same samples, the limit is what torch counts, and a missing peer is said. Nothing here is held against a clock."
import importlib.util

import pandas as pd
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recgen.core import benchmark
from recgen.core.benchmark import OURS
from recgen.formats.trie import Trie
from recgen.retrieval import benchmark_data as data_module
from recgen.retrieval import benchmarks as part
from recgen.retrieval.beam import exact_scores
from recgen.retrieval.sequences import prompt_tokens
from recgen.retrieval.transformer import TigerConfig, codes_loss

TINY = {**part.TIGER_SIZES["small"], "tiger_users": 120, "tiger_items": 80, "tiger_codes": 6, "gemm": 64, "seed": 0, "data_path": ""}
needs_peer = pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed: pip install 'recgen[bench]'")


@pytest.mark.parametrize(("history", "levels"), [(4, 3), (2, 4)])
def test_the_training_limit_is_what_torch_counts_on_a_full_batch(history, levels):
    config = TigerConfig.preset("demo", [7, 5, 6, 3][:levels], attn_dim=24, num_heads=2, ff_dim=40, encoder_layers=3, decoder_layers=2)
    model = data_module.Tiger(config).train()
    tokens, codes = torch.randint(1, 1 + sum(config.sizes), (5, history * levels)), torch.randint(0, 3, (5, levels))
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        codes_loss(model(tokens, codes), codes).backward()
    assert counted.get_total_flops() == 5 * data_module.training_flops(config, history * levels)


def test_flops_of_many_lengths_are_those_of_each():
    config = TigerConfig.preset("demo", [4, 4])
    each = [data_module.training_flops(config, t) for t in (2, 6, 40)]
    assert data_module.training_flops(config, torch.tensor([2.0, 6.0, 40.0], dtype=torch.float64)).tolist() == each
    assert (each[2] - each[1]) / 34 > (each[1] - each[0]) / 4  # attention grows with the square
    wide, narrow = (data_module.decoding_flops(config, 10, [1, w]) for w in (20, 5))
    assert wide - narrow == 15 * data_module.level_flops(config, 1, 2, 10)


def test_drawn_users_have_the_lengths_of_beauty():
    samples = data_module.PrefixSamples.from_sequences(data_module.drop_last(data_module.drawn_sequences(22_363, 12_101, 3), 2))
    assert len(samples) == pytest.approx(131_413, rel=0.06) and float(samples.lengths.double().mean()) == pytest.approx(6.70, rel=0.05)  # as Beauty's: counted from its sequences.txt
    assert float((samples.lengths == 20).double().mean()) == pytest.approx(0.115, abs=0.02)


def test_a_folders_own_sequences_are_taken_where_it_has_some(tmp_path):
    def read(path):
        assert path == tmp_path / "sequences.txt"
        return pd.DataFrame({"user_id": [7, 7, 7, 2, 2], "item_id": [3, 1, 2, 5, 4]})

    options = {**TINY, "data_path": str(tmp_path)}
    assert len(data_module.sequences_of(options, read)) == 120
    (tmp_path / "sequences.txt").write_text("7 3 1 2\n2 5 4\n")
    assert data_module.sequences_of(options, read).tolist() == [[3, 1, 2], [5, 4]] and len(data_module.sequences_of(options)) == 120


def test_chosen_batches_are_of_the_epochs_mean_length():
    data = data_module.TigerData.of({**TINY, "tiger_users": 2000})
    samples, off, plain = data.samples(), [], []
    for seed in range(20):
        draws = torch.Generator().manual_seed(seed)
        batches = samples.batches(16, draws)
        chosen = part.typical_batches(batches, samples.lengths, 4, draws)
        assert len({id(b) for b in chosen}) == 4 and all(len(b) == 16 for b in chosen)
        off.append(float(samples.lengths[torch.cat(chosen)].double().mean() - samples.lengths.double().mean()))
        plain.append(float(samples.lengths[torch.cat(batches[:4])].double().mean() - samples.lengths.double().mean()))
    assert max(map(abs, off)) < 0.1 * float(samples.lengths.double().mean()) < max(map(abs, plain))


@needs_peer
def test_both_sides_train_on_the_same_samples(monkeypatch):
    seen = {}
    histories = data_module.PrefixSamples.histories

    def watch(self, index, *width):
        seen.setdefault(side_name, []).append(index)
        return histories(self, index, *width)

    monkeypatch.setattr(data_module.PrefixSamples, "histories", watch)
    sides, found = part.prepare_training(TINY), {}
    for side_name, side in sides.items():  # noqa: B007
        found[side_name] = side.judge(side.run(3))
    trained = {name: sorted(torch.cat(parts).tolist()) for name, parts in seen.items()}
    assert len(trained[OURS]) == sides[OURS].items == TINY["tiger_batch"] * TINY["tiger_steps"]
    assert all(t == trained[OURS] for t in trained.values()) and len(trained) == 4
    assert found[OURS]["padding"] < found["transformers"]["padding"] and all(0 < f["loss"] < 10 and f["tokens_per_second"] > 0 for f in found.values())
    assert found[OURS]["loss"] == pytest.approx(found["recgen bf16"]["loss"], rel=0.03)


@needs_peer
def test_the_peer_decodes_inside_the_catalogue_and_only_with_the_function():
    sides = part.prepare_decoding({**TINY, "decode_users": 6, "peer_users": 4}, beams=10)
    legal = {name: side.judge(side.run(0))["legal"] for name, side in sides.items()}
    assert legal[OURS] == legal["recgen bf16"] == legal["transformers"] == 1
    assert legal["recgen unconstrained"] < 1 and legal["transformers unconstrained"] < 1
    assert len({(s.items, s.flops) for s in sides.values()}) == 1


@needs_peer
def test_the_peer_has_the_shape_of_ours():
    config = TigerConfig.preset("tiger", [256] * 3)
    peer, ours = data_module.peer_model(config), data_module.Tiger(config)
    def layers(model):
        return sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in ("encoder", "decoder") and "embed" not in name and "relative" not in name)

    norms = sum(p.numel() for m in (ours.encoder_norm, ours.decoder_norm) for p in m.parameters())  # T5 counts these two among its stacks'
    assert layers(peer) == layers(ours) + norms


def test_a_missing_peer_is_said_and_ours_measured(monkeypatch):
    version = benchmark.importlib.metadata.version

    def without_peer(name):  # accelerate asks for torch's
        if name == "transformers":
            raise benchmark.importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(benchmark.importlib.metadata, "version", without_peer)
    monkeypatch.setattr(data_module, "peer_model", None)
    for prepare in (part.prepare_training, part.prepare_decoding):
        there, missing = benchmark.present_sides(prepare(TINY))
        assert set(missing.values()) == {"transformers"} and OURS in there and not any(s.package for s in there.values())
        rows = [{**r, "allocator": "glibc", "items": 1} for r in benchmark.alternate(there, 1)]
        assert set(part.rate_table({"tiger_x": {"rows": rows}})["side"]) == set(there)


def test_search_without_the_tree_is_the_search_of_all_tuples():
    data = data_module.TigerData.of(TINY)
    model, tuples = data.model(4), torch.cartesian_prod(*[torch.arange(6)] * 3)
    tokens = prompt_tokens(data.config, data.table, data.prompts(9))
    exact = exact_scores(model, tokens, Trie(tuples, torch.arange(1, 217), [6] * 3), 216).topk(10, 1)
    assert part.AllTuples([6] * 3).codes(part.free_search(model, tokens, 216)[0][:, :10]).equal(tuples[exact.indices - 1])
    assert part.AllTuples([2, 3, 4]).codes(torch.arange(24).view(4, 6)).flatten(0, 1).equal(torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)))


def test_recall_counts_what_the_exact_list_has():
    sides = part.prepare_exact({**TINY, "exact_users": 12, "exact_steps": 20})
    recall = {name: side.judge(side.run(1))["recall"] for name, side in sides.items()}
    assert recall[OURS] == recall["recgen 200 beams"] == 1 and 0.2 < recall["recgen 20 beams"] <= recall["recgen 50 beams"] <= 1
    assert recall["recgen bf16"] > 0.9
    flops = [side.flops for side in sides.values()]
    assert flops[0] == flops[1] < flops[4] and flops[2] < flops[3] < flops[4]  # this catalogue has fewer prefixes than 200 at each level


def test_growing_works_have_the_size_they_are_asked_for(monkeypatch):
    kept = {}
    monkeypatch.setattr(part, "decode", lambda model, data, *a, **k: kept.setdefault("trie", data.trie))
    for items in (50, 200):
        kept.clear()
        side = part.prepare_growing_catalogue({**TINY, "items": items})[OURS]
        side.run(0)
        assert side.items == items and len(kept["trie"].items) == items
    made = part.prepare_growing_users({**TINY, "items": 30})[OURS].run(0)
    assert made.trained == len(data_module.TigerData.of({**TINY, "tiger_users": 30}).samples())


def test_memory_of_training_is_that_of_the_longest_histories():
    data = data_module.TigerData.of(TINY)
    trainer = part.train_ours(0, data, {**TINY, "widest": True})
    (batch,) = trainer.task.chosen
    assert int(data.samples().lengths[batch].max()) == data.config.max_history


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiger_trie", "growth_tiger"])
def test_a_measurement_in_fresh_processes(name):
    found = benchmark.measure("recgen.retrieval.benchmarks:MEASUREMENTS", name, {**TINY, "decode_users": 4, "catalogue_base": 20}, repeats=1, allocators=["glibc"], threads=1)
    if name.startswith("growth"):
        assert [m["items"] for m in found["memory"]] == [20, 80, 320, 1280] and not found["rows"]
    else:
        sides = {r["side"] for r in found["rows"]} | set(found["missing"])
        assert sides == set(part.MEASUREMENTS[name].prepare(TINY)) and all(r["limit_seconds"] > 0 for r in found["rows"])


def test_every_row_of_a_table_is_against_ours():
    seconds = {OURS: (1, 2), "transformers": (4, 6), "recgen bf16": (0.5, 0.5)}
    rows = [{"allocator": "glibc", "side": s, "repeat": i, "seconds": t[i], "items": 8} for s, t in seconds.items() for i in (0, 1)]
    table = part.rate_table({"tiger_training": {"rows": rows}, "level": {"rows": rows}, "growth_tiger": {"rows": []}}).set_index("side")
    assert table["times_as_long"].to_dict() == {OURS: 1, "transformers": 3.5, "recgen bf16": 0.375} and len(table) == 3
    assert table.loc["transformers", ["per_second", "low", "high"]].tolist() == [1.6, 3, 4]
    assert part.rate_table({}).empty
