"The planted world: same integers everywhere, the law that it says it follows, ceilings that hold."
import hashlib
import itertools
import json

import numpy as np
import pytest

from recgen.core.errors import InputError
from recgen.sources.catalogue import Draws, WorldSettings
from recgen.sources.clicks import bayes_auc, bayes_logloss
from recgen.sources.oracle import ceilings, filter_states, first_belief, next_item, section_belief, state_parts, step_belief
from recgen.sources.world import draw_lengths, first_states, make_world, move_states

TINY = WorldSettings(n_users=200_000, n_items=24, branching=(2, 2, 2), n_types=2, share_cold=64, ring_items=32, ring_users=77,
                     drift=13_107, n_impressions=0, oracle_users=0)


@pytest.fixture(scope="module")
def world():
    return make_world()


@pytest.fixture(scope="module")
def tiny():
    return make_world(TINY)


def integers_hash(world):
    "SHA-256 of all integer tables, little-endian."
    log, pairs = world.interactions, world.relations["item__also_bought__item"]
    parts = [log[c] for c in log] + [pairs.source, pairs.target, world.users.label, world.tree_codes, world.states]
    parts += [f[c] for f in world.impressions.values() for c in ("user_id", "item_id", "label", "device", "slot")]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
    for text in (*world.items.title, *world.items.brand, *world.users.split):
        digest.update(text.encode())
    return digest.hexdigest()


def padded(world, n):
    "(n, T) item indices of the first n users, -1 beyond the end, and their lengths."
    log = world.interactions[world.interactions.user_id <= n]
    lengths = np.bincount(log.user_id)[1:]
    out = np.full((n, lengths.max()), -1)
    out[log.user_id - 1, log.position] = log.item_id - 1
    return out, lengths


def plain_law(law, phase, history):
    "(S, N) probability of the next item in every state, written out state by state."
    s, c, n = law.settings, law.catalogue, law.settings.n_items
    weight = np.where(c.cold, 0, c.weight) if phase == 0 else c.weight
    slots = np.array(s.neighbour_weight) / sum(s.neighbour_weight)
    rows = []
    for ring, kind, slot in itertools.product((0, 1), range(s.n_types), range(3)):
        section = law.sections[kind, slot]
        department = section // s.branching[1]
        m = s.mix_popular / 256 * weight / weight.sum()
        for share, inside in ((s.mix_taste, c.section == section), (s.mix_broad, c.department == department)):
            if weight[inside].sum():
                m = m + share / 256 * np.where(inside, weight, 0) / weight[inside].sum()
        for share, back in ((s.mix_last, 1), (s.mix_previous, 2)):
            if len(history) >= back:
                for m_slot, w in zip(c.neighbours[history[-back]], slots, strict=True):
                    m[m_slot] += share / 256 * w
        if ring:
            uniform = np.isin(np.arange(n), law.ring_items) / len(law.ring_items)
            m = s.ring_push / 256 * uniform + (1 - s.ring_push / 256) * m
        m[list(history)] = 0
        rows.append(m / m.sum())
    return np.array(rows)


def plain_chain(law):
    "First distribution (S,) and transition matrix (S, S) of the hidden state, written out."
    s = law.settings
    kinds, slots = law.type_weight / law.type_weight.sum(), np.array(s.slot_weight) / sum(s.slot_weight)
    names = list(itertools.product((0, 1), range(s.n_types), range(3)))
    ring = [1 - s.ring_users / 256, s.ring_users / 256]
    first = np.array([ring[r] * kinds[k] * slots[m] for r, k, m in names])
    drift, redraw = s.drift / 65_536, s.redraw / 256
    move = np.zeros((len(names), len(names)))
    for a, (r, k, m) in enumerate(names):
        for b, (r2, k2, m2) in enumerate(names):
            if r == r2:
                move[a, b] = drift * kinds[k2] * slots[m2]
                move[a, b] += (1 - drift) * (k == k2) * (redraw * slots[m2] + (1 - redraw) * (m == m2))
    return first, move


def brute_force(law, history, phases, last_phase):
    "P(next | history) by summing over every path of hidden states."
    first, move = plain_chain(law)
    emit = [plain_law(law, phase, history[:t])[:, history[t]] for t, phase in enumerate(phases)]
    last = plain_law(law, last_phase, history)
    paths = np.array(list(itertools.product(range(len(first)), repeat=len(history) + 1)))
    weight = first[paths[:, 0]]
    for t in range(len(history)):
        weight = weight * emit[t][paths[:, t]] * move[paths[:, t], paths[:, t + 1]]
    posterior = np.bincount(paths[:, -1], weight, minlength=len(first))
    return posterior @ last / posterior.sum(), posterior.sum()


def filtered(law, histories, launch):
    count = np.array([len(h) for h in histories])
    table = np.full((len(histories), count.max()), -1)
    for row, h in enumerate(histories):
        table[row, : len(h)] = h
    belief, loglik = filter_states(law, table, count, np.asarray(launch))
    return belief, loglik, table, count


def test_same_seed_same_integers(world):
    assert integers_hash(world) == "a38a2b5f7512d90cbe88771a8f7d603abfd6ce0613b246f5f324feb0e40e22d6"
    assert integers_hash(make_world(WorldSettings(seed=1))) != integers_hash(world)


def test_streams_are_independent_of_what_is_switched_off(world):
    bare = make_world(WorldSettings(n_impressions=0, oracle_users=0))
    assert bare.interactions.equals(world.interactions) and bare.impressions == {} and "next_item" not in bare.oracle


def test_shape_of_the_tables(world):
    s, log = world.settings, world.interactions
    assert log.user_id.unique().tolist() == list(range(1, s.n_users + 1)) and log.item_id.between(1, s.n_items).all()
    assert world.items.item_id.tolist() == list(range(1, s.n_items + 1)) and world.items.raw_id.is_unique
    assert world.tree_codes.shape == (s.n_items, 3) and (world.tree_codes.max(0) < s.branching).all()
    assert not log.duplicated(["user_id", "item_id"]).any()
    assert (log.groupby("user_id").position.max() + 1 == log.groupby("user_id").size()).all()
    assert (log.groupby("user_id").timestamp.diff().dropna() >= 0).all()
    assert (log.timestamp.diff()[log.position > 0] == 0).mean() > .3  # day ties
    assert np.stack(world.item_emb.embedding).dtype == np.float32 and np.isfinite(np.stack(world.item_emb.image)).all()
    assert set(world.users.split) == {"train", "valid", "test"} and set(world.users.label) == {-1, 0, 1}
    assert abs((world.users.label == 1).sum() / (world.users.label >= 0).sum() - .10) < .025
    json.dumps(world.oracle, allow_nan=False)


def test_numbers_of_beauty():
    lengths = draw_lengths(22_363, 204, Draws(3, "lengths"))
    assert abs(lengths.mean() - 8.876) < .05 and np.median(lengths) == 6 and lengths.min() == 5
    assert abs(lengths.sum() / 12_101 - 16.4) < .1
    at_least = {6: .6797, 10: .2291, 20: .0558, 40: .0118}
    assert all(abs((lengths >= k).mean() - share) < .012 for k, share in at_least.items())


def test_cold_items(world):
    log = world.interactions
    last = log.groupby("user_id").position.transform("max")
    cold = world.law.catalogue.cold[log.item_id - 1]
    assert not cold[log.position < last - 1].any()
    assert 0 < cold[log.position >= last - 1].mean() < .05
    p = world.oracle_tables["next_item"]["probability"]
    reachable = (p[:, world.law.catalogue.cold] > 0).mean(1)  # a validation item that was cold is behind the user
    assert reachable.min() > .95
    expected, found = p[:, world.law.catalogue.cold].sum(1), cold[log.position == last]
    assert abs(expected.mean() - found.mean()) < 4 * np.sqrt(expected.mean() / len(p))


def test_tables_of_the_oracle(world):
    sequences, lengths = padded(world, 2_000)
    rows = np.arange(2_000)
    for name in ("probability", "latent_probability"):
        p = world.oracle_tables["next_item"][name]
        assert p.dtype == np.float32 and np.allclose(p.sum(1), 1, atol=1e-4) and (p >= 0).all()
        history = np.where(np.arange(sequences.shape[1]) < lengths[:, None] - 1, sequences, -1)
        r, c = np.nonzero(history >= 0)
        assert (p[r, history[r, c]] == 0).all() and (p[rows, sequences[rows, lengths - 1]] > 0).all()
    figures = world.oracle["next_item"]
    assert ceilings(world.oracle_tables["next_item"]["probability"]) == figures["observable"]
    assert all(figures["observable"][k] <= figures["latent"][k] for k in figures["observable"])
    values = [figures["observable"][f"recall@{k}"] for k in (1, 5, 10, 20)]
    assert values == sorted(values) and .25 < values[2] < .35


def test_filtering_against_all_paths(tiny):
    law, old, cold = tiny.law, np.flatnonzero(~tiny.law.catalogue.cold), np.flatnonzero(tiny.law.catalogue.cold)
    histories = [old[[0, 5, 3]], old[[7, 1]], np.array([old[2], old[9], cold[0]]), old[[4]]]
    launches = [2, 9, 2, 1]
    belief, loglik, table, count = filtered(law, histories, launches)
    for row, (history, launch) in enumerate(zip(histories, launches, strict=True)):
        last_phase = int(len(history) >= launch)
        expected, likelihood = brute_force(law, history, [int(t >= launch) for t in range(len(history))], last_phase)
        found = next_item(law, section_belief(law, belief[[row]]), table[[row]], count[[row]], last_phase)[0]
        assert np.allclose(found, expected, atol=1e-12) and np.isclose(np.exp(loglik[row]), likelihood, rtol=1e-9)


def test_log_follows_the_law(tiny):
    "Given the two most common openings, third items fall as the oracle says: chi-square over 200,000 users."
    sequences, _ = padded(tiny, TINY.n_users)
    opening = sequences[:, 0] * TINY.n_items + sequences[:, 1]
    for code in np.argsort(-np.bincount(opening))[:2]:
        history = np.array(divmod(int(code), TINY.n_items))
        belief, _, table, count = filtered(tiny.law, [history], [3])
        p = next_item(tiny.law, section_belief(tiny.law, belief), table, count, 0)[0]
        found = np.bincount(sequences[opening == code, 2], minlength=TINY.n_items)
        total, possible = found.sum(), p > 0
        chi2 = ((found - total * p)[possible] ** 2 / (total * p[possible])).sum()
        freedom = possible.sum() - 1
        assert total > 1_000 and found[~possible].sum() == 0 and chi2 < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("back", [1, 2])
def test_held_out_rows_follow_the_law(tiny, back):
    "Validation and test items of 20,000 users, cold ones among them, are as probable as the filter says on average."
    n = 20_000
    sequences, lengths = padded(tiny, n)
    count = lengths - back
    past = np.where(np.arange(sequences.shape[1]) < count[:, None], sequences, -1)
    belief, _ = filter_states(tiny.law, past, count, lengths - 2)
    p = next_item(tiny.law, section_belief(tiny.law, belief), past, count)
    target, cold, ring = sequences[np.arange(n), count], tiny.law.catalogue.cold, tiny.law.in_ring
    assert cold[target].mean() > .01
    for statistic in (np.log(np.maximum(p, 1e-30)), p, cold * np.ones_like(p), ring * np.ones_like(p)):
        gap = statistic[np.arange(n), target] - (p * statistic).sum(1)
        assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(n)


def test_hidden_chain_moves_as_the_filter_believes(world):
    "States drawn by the sampler against the belief of the filter: the start, and one step from a known state."
    law, n = world.law, 400_000
    for state in (0, law.sections.size + 4):
        known = np.zeros((1, 2 * law.sections.size))
        known[0, state] = 1
        for drawn, p in ((first_states(law, n, Draws(7, "start")), first_belief(law)),
                         (move_states(law, np.full(n, state), Draws(7, "move")), step_belief(law, known)[0])):
            found = np.bincount(drawn, minlength=len(p)) / n
            assert (np.abs(found - p) <= 5 * np.sqrt(p * (1 - p) / n)).all()


def test_ring_posterior_is_calibrated(tiny):
    n = 20_000
    sequences, lengths = padded(tiny, n)
    belief, _ = filter_states(tiny.law, sequences, lengths, lengths - 2)
    ring, _ = state_parts(tiny.law)
    posterior, truth = belief[:, ring == 1].sum(1), tiny.states[:n] // tiny.law.sections.size
    for low, high in ((0, .2), (.2, .4), (.4, .7), (.7, 1)):
        inside = (posterior >= low) & (posterior < high)
        assert inside.sum() > 100
        assert abs(truth[inside].mean() - posterior[inside].mean()) < 4 * np.sqrt(.25 / inside.sum())


def auc(score, label):
    order = np.argsort(score, kind="stable")
    rank = np.empty(len(score))
    rank[order] = np.arange(1, len(score) + 1)
    return (rank[label == 1].mean() - (label.sum() + 1) / 2) / (label == 0).sum()


def test_bayes_figures_of_clicks(world):
    clicks, eta = world.impressions["test"], world.oracle_tables["clicks"]["probability"]
    label = clicks.label.to_numpy()
    assert clicks.row_id.tolist() == world.oracle_tables["clicks"]["row_id"].tolist()
    figures = world.oracle["clicks"]["test"]
    assert figures["auc"] == bayes_auc(eta) and figures["logloss"] == bayes_logloss(eta)
    assert abs(auc(eta, label) - figures["auc"]) < .03
    assert abs(-np.log(np.where(label == 1, eta, 1 - eta)).mean() - figures["logloss"]) < .03
    assert auc(eta[::-1], label) < .6  # another row's probability is worth nothing
    draws = np.random.default_rng(0).random((200, len(eta))) < eta
    assert abs(np.mean([auc(eta, d.astype(int)) for d in draws]) - figures["auc"]) < .002


def test_click_histories_are_training_rows(world):
    log = world.interactions
    last = log.groupby("user_id").position.transform("max")
    train = log[log.position < last - 1].groupby("user_id").item_id.agg(list)
    rows = world.impressions["train"].head(300)
    for user, sequence in zip(rows.user_id, rows.item_seq, strict=True):
        items, sequence = train[user], list(sequence)
        first = items.index(sequence[0])
        assert items[first : first + len(sequence)] == sequence


def test_also_bought_follows_the_transition(world):
    pairs = world.relations["item__also_bought__item"]
    inside = (world.law.catalogue.neighbours[pairs.source - 1] == (pairs.target.to_numpy() - 1)[:, None]).any(1)
    assert (pairs.source != pairs.target).all() and .85 < np.average(inside, weights=pairs.weight) < .96


def test_large_world_has_fewer_oracle_rows():
    small = make_world(WorldSettings(n_users=500, n_items=300, oracle_cells=3_000, n_impressions=60))
    full = make_world(WorldSettings(n_users=500, n_items=300, n_impressions=60))
    a, b = (w.oracle_tables["next_item"] for w in (small, full))
    assert a["probability"].shape == (10, 300) and b["probability"].shape == (500, 300)
    assert np.array_equal(a["probability"], b["probability"][:10]) and a["user_id"].tolist() == list(range(1, 11))


def test_smallest_world_and_bad_settings():
    assert make_world(WorldSettings(n_users=10, n_items=20, n_impressions=12)).interactions.groupby("user_id").size().min() == 5
    for seed in range(30):  # some have one test user or none
        json.dumps(make_world(WorldSettings(n_users=10, n_items=20, n_impressions=12, seed=seed)).oracle, allow_nan=False)
    for bad in (dict(n_items=5), dict(n_impressions=3), dict(mix_taste=0), dict(seed=-1), dict(branching=(6, 6))):
        with pytest.raises(InputError):
            WorldSettings(**bad)
