"""The click model's benchmarks: both sides learn from the same rows in the same way, the limit is what torch counts, and a missing peer is said. Nothing here is held against a clock."""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from recgen.clicks import benchmarks as part
from recgen.clicks.din import Din, DinConfig
from recgen.clicks.features import ItemTable, features_of
from recgen.core import benchmark
from recgen.core.benchmark import OURS
from recgen.core.device import generator, seed_everything
from recgen.core.training import TrainSettings

TINY = {**part.DIN_SIZES["small"], "ml1m_rows": 400, "ml1m_batch": 100, "seed": 0, "data_path": ""}
needs_peer = pytest.mark.skipif(not benchmark.installed("fuxictr"), reason="fuxictr is not installed: pip install 'recgen[bench]'")


def job_of(n: int = 600, held: int = 200, user: bool = False, longest: int = 12, settings=None, features=None, **network) -> part.ClickJob:
    "Dense tables, nothing left to chance, all rows in one batch. No batch norm: biases before one have no gradient but rounding, which Adam makes steps of."
    table = part.drawn_table(90, generator(0), **({"tags": 20} if features is None else features))
    rows = part.drawn_clicks(table, n + held, 30, 5, generator(1), longest, levels=10)
    train = rows.select(torch.arange(n))
    config = DinConfig(features_of(table, train, user, True, list(train.context), 8, lazy_rows=1 << 30, code_pooling="mean"), [16, 8], [24, 12], **network)
    settings = settings or TrainSettings(epochs=3, batch_size=n, learning_rate=3e-3, grad_clip=10.0, scheduler="constant")
    return part.ClickJob(train, rows.select(torch.arange(n, n + held)), table, config, settings)


@needs_peer
@pytest.mark.parametrize(("features", "network"), [({"tags": 20, "width": 16}, {}), ({"codes": 6, "n_codes": 9}, {"embedding_l2": 1e-2}), ({"tags": 20}, {"softmax": True, "user": True})],
                         ids=["vectors", "codes and a penalty", "users and softmax"])
def test_both_sides_learn_the_same_from_the_same_weights(features, network):
    job = job_of(features=features, settings=TrainSettings(epochs=5, batch_size=600, learning_rate=1e-2, grad_clip=10.0, scheduler="constant"), init_std=0.5, **network)
    seed_everything(3)
    start = Din(job.config).see(job.train, job.table).state_dict()
    _, ours = part.train_ours(0, job, start)
    _, theirs = part.train_peer(0, job, start, reduce_lr_on_plateau=False)
    before = Din(job.config)
    before.load_state_dict(start)
    p, q = ours(job.valid), torch.as_tensor(theirs(job.valid)).float()
    moved = p - part.predict(before, job.valid)
    assert min(float(moved.std()), float(p.std())) > 0.005, "steps and rows must be told apart"
    assert float((p - q).abs().max()) < 5e-6
    found = {name: job.figures(predict) for name, predict in (("ours", ours), ("theirs", theirs))}
    assert found["theirs"] == pytest.approx(found["ours"], abs=1e-4) and set(found["ours"]) == {"auc", "logloss"}


@needs_peer
def test_the_peers_network_has_the_challenges_shape(tmp_path):
    job = part.microlens_job({**part.DIN_SIZES["full"], "din_items": 200}, rows=100)
    model = part.peer_model(job, tmp_path)
    linear = [tuple(m.weight.shape) for m in model.attention_layers.modules() if isinstance(m, torch.nn.Linear)]
    assert linear == [(512, 4 * 192), (256, 512), (1, 256)]
    assert [tuple(m.weight.shape) for m in model.dnn.modules() if isinstance(m, torch.nn.Linear)] == [(1024, 512), (512, 1024), (256, 512), (1, 256)]
    kinds = [type(m).__name__ for m in model.dnn.modules()]
    assert kinds.count("BatchNorm1d") == kinds.count("Dropout") == 3 and {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    ours = Din(job.config)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(model.attention_layers) == count(ours.attention) and count(model.dnn) == count(ours.mlp)


@pytest.mark.parametrize("user", [False, True])
def test_the_limit_is_what_torch_counts(user):
    job = job_of(200, 20, user, features={"tags": 20, "width": 16})
    model = Din(job.config).see(job.train, job.table).train()
    with FlopCounterMode(display=False) as counted:
        F.binary_cross_entropy_with_logits(model(job.train), job.train.labels).backward()
    assert counted.get_total_flops() == part.step_flops(job.config, job.train)
    assert job.flops == 3 * part.step_flops(job.config, job.train)


def test_places_that_a_step_leaves_out_do_not_count():
    job = job_of()
    whole, half, none = (part.step_flops(replace(job.config, history_dropout=share), job.train) for share in (0.0, 0.5, 1.0))
    assert whole - half == pytest.approx(half - none) and whole > half


def test_padded_batches_hold_the_jagged_rows():
    job = job_of(300, 100, user=True, longest=12)
    job.train.items[:] = job.train.items.clamp(max=60)  # the last thirty items are new in held-out rows
    job.train.histories.values.clamp_(max=60)
    job = replace(job, config=replace(job.config, features=replace(job.config.features, context={"likes_level": 7, "views_level": 10})))  # as if training had seen no higher level
    batches = part.PaddedBatches(job, job.valid, 32, longest=8)
    assert len(batches) == 4 and not part.seen_ids(job.train.items, 90)[0]
    first = 0
    for row, item, mask in batches:
        n = len(mask)
        rows = job.valid.select(torch.arange(first, first + n))
        ids = item["item_id"].view(n, -1)
        known = lambda x: [i if i <= 60 else 91 for i in x]  # noqa: E731
        histories = [[int(i) for i, m in zip(r[:-1], w, strict=True) if m] for r, w in zip(ids, mask, strict=True)]
        assert histories == [known(h[-8:]) for h in rows.histories.tolist()] and ids[:, -1].tolist() == known(rows.items.tolist())
        assert not bool((mask[:, 1:] < mask[:, :-1]).any()), "padding stands on the left"
        assert int(mask.sum(1).max()) == mask.shape[1] and bool((ids[:, :-1][mask == 0] == 0).all())
        assert torch.equal(row["label"], rows.labels) and row["likes_level"].tolist() == [x if x <= 7 else 0 for x in rows.context["likes_level"].tolist()]
        tags = item["item_tags"].view(n, -1, 5)[:, -1]
        assert [[t for t in r if t] for r in tags.tolist()] == [job.table.lists["item_tags"][int(i)].tolist() for i in rows.items]
        first += n
    assert first == 100


def test_an_epoch_of_padded_batches_has_every_row_once_in_another_order():
    job = job_of(300, 100)
    batches = part.PaddedBatches(job, job.train, 64, seed=1)
    one, two = (torch.cat([item["item_id"].view(len(mask), -1)[:, -1] for _, item, mask in batches]) for _ in range(2))
    assert one.sort().values.tolist() == job.train.items.sort().values.tolist() == two.sort().values.tolist() and not torch.equal(one, two)


def test_drawn_rows_have_the_lengths_that_are_asked_for_and_something_to_learn():
    rows = part.drawn_clicks(ItemTable(500), 40_000, 100, 8, generator(2))
    lengths = rows.histories.lengths
    assert float(lengths.double().mean()) == pytest.approx(8, abs=0.2) and int(lengths.max()) <= 64 and float((lengths == 0).double().mean()) == pytest.approx(1 / 9, abs=0.01)
    rate = torch.zeros(501).index_add_(0, rows.items, rows.labels) / torch.bincount(rows.items, minlength=501).clamp(min=1)
    assert float(rate[1:].std()) > 0.15  # of chance alone .06
    assert set(part.drawn_clicks(ItemTable(500), 50, 10, 64, generator(2)).histories.lengths.tolist()) == {64}


@pytest.mark.parametrize("name", part.MEASUREMENTS)
def test_every_measurement_runs_ours_and_the_peer_where_it_is_installed(name):
    measurement = part.MEASUREMENTS[name]
    sides = measurement.prepare({**TINY, "items": 64})
    assert list(sides)[0] == OURS and {s.package for s in sides.values()} <= {"", "fuxictr"} and all(s.items for s in sides.values())
    there, missing = benchmark.present_sides(sides)
    assert set(there) | set(missing) == set(sides) and (measurement.factors or "FuxiCTR" in sides)
    rows = benchmark.alternate(there, 1, seed=0)
    assert all(r["seconds"] > 0 and 0 < r["auc"] < 1 and 0 < r["logloss"] < 5 for r in rows) and {r["side"] for r in rows} == set(there)
    assert measurement.factors or all(s.flops > 0 for s in sides.values())
    if missing:
        pytest.skip("FuxiCTR's side is not run: " + ", ".join(missing.values()) + " is not installed")


@pytest.mark.parametrize("name", part.MEASUREMENTS)
def test_full_sizes_can_be_prepared(name):
    measurement = part.MEASUREMENTS[name]
    sides = measurement.prepare({**part.DIN_SIZES["full"], "din_items": 3000, "din_steps": 1, "items": 1024, "data_path": ""})
    n = {"din_microlens": 2048, "din_full": 2048, "din_codes": 384, "growth_din": 1024}.get(name)
    assert n is None or {s.items for s in sides.values()} == {n}


def test_full_histories_and_codes_are_what_the_names_say():
    options = {**part.DIN_SIZES["full"], "din_items": 400}
    full, coded = part.microlens_job(options, 64, rows=100), part.microlens_job(options, codes=64, rows=100)
    assert set(full.train.histories.lengths.tolist()) == {64} and full.config.features.vector_width == 128 and full.config.features.item_width == 192
    assert coded.table.codes.shape == (401, 64) and int(coded.table.codes.max()) <= 2048 and coded.config.features.code_groups == [[0, 64]] and coded.settings.batch_size == 384


def test_the_log_is_found_beside_the_data_folder_and_split_in_time(data, monkeypatch):
    monkeypatch.delenv("RECGEN_DATA", raising=False)
    folder = part.movielens_folder({"data_path": str(data / "beauty")})
    assert folder == data / "ml1m_ctr" == part.movielens_folder({"data_path": str(data / "ml1m_ctr")}) and part.movielens_folder({"data_path": ""}) is None
    monkeypatch.setenv("RECGEN_DATA", str(data))
    assert part.movielens_folder({"data_path": ""}) == data / "ml1m_ctr"
    train, held, n = part.movielens_rows(folder)
    assert (len(train), len(held), n) == (33_891, 10_401, 3255) and int(held.histories.lengths.max()) == 64 and int(train.histories.values.min()) == 1
    job = part.movielens_job((train, held, n), TINY, **part.OUR_SETTINGS)
    assert int(job.valid.context["timestamp"].max()) < int(job.test.context["timestamp"].min()) and len(job.valid) + len(job.test) == 10_401 == len(job.more["_all"])


def test_figures_are_of_the_rows_that_chose_nothing():
    job = job_of()
    told = replace(job, test=job.train.select(torch.arange(50)), more={"_all": job.valid})
    seen = []

    def predict(rows):
        seen.append(len(rows))
        return np.linspace(0, 1, len(rows))

    assert set(told.figures(predict)) == {"auc", "auc_all", "logloss"} and seen == [50, 200]
