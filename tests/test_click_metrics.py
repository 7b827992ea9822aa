"Figures of click models against scikit-learn, plain loops and their own symmetries."
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgen.core.errors import InputError, ParameterError
from recgen.evaluation import clicks as module
from recgen.evaluation.classification import ranking_metrics, resampled_counts
from recgen.evaluation.clicks import (
    CLIP,
    ClickResult,
    RankOrder,
    as_tensor,
    calibration_bins,
    calibration_error,
    calibration_table,
    checked_clicks,
    click_differences,
    click_intervals,
    click_metrics,
    click_samples,
    click_table,
    compare_clicks,
    draw_calibration,
    read_predictions,
    user_aucs,
)

PLAIN = dict(deadline=None, derandomize=True, database=None)


@st.composite
def judged(draw):
    "Probabilities with many ties, labels of both classes, a few users."
    n = draw(st.integers(2, 40))
    each = lambda values: draw(st.lists(st.sampled_from(values), min_size=n, max_size=n))  # noqa: E731
    labels = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n).filter(lambda x: 0 < sum(x) < len(x)))
    return torch.tensor(each([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])), torch.tensor(labels), torch.tensor(each([3, 7, 8, 100]))


def log(n=3000, n_users=60, seed=0, noise=0.5):
    "Users of very different readiness to click; scores of two decimals, so that some are equal."
    g = torch.Generator().manual_seed(seed)
    users = torch.randint(n_users, (n,), generator=g)
    eta = torch.sigmoid(1.5 * torch.randn(n_users, generator=g)[users] + torch.randn(n, generator=g) - 1)
    labels = (torch.rand(n, generator=g) < eta).long()
    scores = torch.sigmoid(eta.logit() + noise * torch.randn(n, generator=g)).mul(100).round() / 100
    return scores, labels, users


def loop_gauc(scores, labels, users):
    from sklearn.metrics import roc_auc_score
    total, weight, counted = 0.0, 0, 0
    for u in set(users.tolist()):
        own = users == u
        if 0 < int(labels[own].sum()) < int(own.sum()):
            total += int(own.sum()) * roc_auc_score(labels[own], scores[own])
            weight, counted = weight + int(own.sum()), counted + 1
    return (total / weight if weight else None), counted


@given(judged())
@settings(max_examples=60, **PLAIN)
def test_figures_are_those_of_scikit_learn_and_of_a_loop_over_users(case):
    from sklearn import metrics
    scores, labels, users = case
    found = click_metrics(scores, labels, users)
    gauc, counted = loop_gauc(scores, labels, users)
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
    assert found["logloss"] == pytest.approx(metrics.log_loss(labels, scores.double().clamp(CLIP, 1 - CLIP).numpy()), abs=1e-8)
    assert found["gauc_users"] == counted and found["users"] == len(set(users.tolist()))
    assert found.get("gauc") == (pytest.approx(gauc, abs=1e-12) if counted else None)
    assert found["bias"] == pytest.approx(scores.double().mean().item() - labels.double().mean().item()) and found["clipped"] == int(((scores == 0) | (scores == 1)).sum())


@given(judged(), st.integers(0, 5))
@settings(max_examples=60, **PLAIN)
def test_any_weighting_of_users_has_the_exact_auc(case, seed):
    scores, labels, unit, n = checked_clicks(*case)
    weights = torch.randint(4, (5, n), generator=torch.Generator().manual_seed(seed)).double()
    assert torch.equal(RankOrder(scores, labels, unit).auc(weights).nan_to_num(-1), ranking_metrics(scores, labels, weights[:, unit])[:, 0].nan_to_num(-1))


def test_a_bootstrap_sample_is_the_figures_of_its_users_rows():
    scores, labels, users = log(400, 12)
    names, samples = click_samples(scores, labels, users, resamples=8, seed=3)
    counts = torch.cat(list(resampled_counts(12, 8, 3)))
    for drawn, row in zip(counts.long(), samples, strict=True):
        copies = [(torch.nonzero(users == u)[:, 0], 1000 * u + c) for u, k in enumerate(drawn.tolist()) for c in range(k)]
        rows = torch.cat([r for r, _ in copies])
        owner = torch.cat([torch.full_like(r, name) for r, name in copies])  # a user drawn twice is two users
        found = click_metrics(scores[rows], labels[rows], owner)
        assert row.tolist() == pytest.approx([found[n] for n in names], abs=1e-12)


def test_blocks_of_resamples_do_not_change_them(monkeypatch):
    scores, labels, users = log(300, 10)
    whole = click_samples(scores, labels, users, 50, 1)[1]
    monkeypatch.setattr(module, "block_rows", lambda columns: 7)
    assert torch.equal(click_samples(scores, labels, users, 50, 1)[1], whole)


def test_the_order_of_rows_does_not_matter_nor_do_the_names_of_users():
    scores, labels, users = log()
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(1))
    assert click_metrics(scores, labels, users) == pytest.approx(click_metrics(scores[order], labels[order], 5 * users[order] + 2), abs=1e-12)
    assert click_metrics(scores.numpy(), pd.Series(labels.numpy()), users.tolist()) == click_metrics(scores, labels, users)


def test_a_score_by_user_alone_has_an_auc_and_no_gauc_above_one_half():
    scores, labels, users = log()
    readiness = torch.rand(60, generator=torch.Generator().manual_seed(2))[users]
    assert click_metrics(readiness, labels, users)["gauc"] == 0.5
    shifted = (scores / 2 + readiness / 2)  # adds the same to all rows of a user
    assert click_metrics(shifted, labels, users)["gauc"] == pytest.approx(click_metrics(scores, labels, users)["gauc"], abs=0.005)
    assert "gauc" not in click_metrics(scores, labels) and click_samples(scores, labels, None, 4)[0] == ["auc", "logloss", "bias"]


def test_users_of_one_class_are_left_out_and_counted():
    scores, labels, users = torch.tensor([.9, .1, .5, .6, .2]), torch.tensor([1, 0, 1, 1, 0]), torch.tensor([1, 1, 2, 2, 3])
    found = click_metrics(scores, labels, users)
    assert (found["gauc"], found["gauc_users"], found["users"]) == (1.0, 1, 3)
    assert user_aucs(*checked_clicks(scores, labels, users)).isnan().tolist() == [False, True, True]
    nobody = click_metrics(scores[:4], torch.tensor([1, 1, 0, 0]), users[:4])
    assert nobody["gauc_users"] == 0 and "gauc" not in nobody  # no user has both classes


def test_saturated_scores_cost_a_finite_loss():
    found = click_metrics(torch.tensor([1.0, 0.0, .5]), torch.tensor([0, 1, 1]))
    assert found["clipped"] == 2 and found["logloss"] == pytest.approx((-2 * np.log(CLIP) + np.log(2)) / 3, rel=1e-9)


@pytest.mark.parametrize("by, strategy", [("mass", "quantile"), ("width", "uniform")])
def test_calibration_is_scikit_learns(by, strategy):
    from sklearn.calibration import calibration_curve
    scores, labels, users = log()
    table = calibration_table(scores, labels, 10, users, by, resamples=100)
    clicked, mean = calibration_curve(labels, scores.double(), n_bins=10, strategy=strategy)
    assert table.clicked.to_numpy() == pytest.approx(clicked, abs=1e-12) and table.score.to_numpy() == pytest.approx(mean, abs=1e-9)
    assert table.rows.sum() == len(scores) and (table.highest[:-1].to_numpy() < table.lowest[1:].to_numpy()).all()
    assert (table["clicked/low"] <= table.clicked).all() and (table.clicked <= table["clicked/high"]).all()
    error = (table.rows * (table.score - table.clicked).abs()).sum() / len(scores)
    assert calibration_error(scores.double(), labels.bool(), 10, by) == pytest.approx(error, abs=1e-12)


def test_equal_scores_share_a_bin_and_a_constant_has_one():
    index, k = calibration_bins(torch.full((50,), 0.3).double(), 15)
    assert k == 1 and index.unique().tolist() == [0]
    scores = torch.tensor([.1] * 30 + [.2] * 2 + [.3] * 30).double()
    index, _ = calibration_bins(scores, 7)
    assert all(len(index[scores == s].unique()) == 1 for s in scores.unique())
    with pytest.raises(ParameterError, match="no such bins"):
        calibration_bins(scores, 5, "depth")
    with pytest.raises(ParameterError, match="no such bins"):
        calibration_bins(scores, 0)


def test_calibration_error_tells_overconfidence():
    g = torch.Generator().manual_seed(0)
    eta = torch.rand(40_000, generator=g).double()
    labels = (torch.rand(40_000, generator=g) < eta).long()
    bold = torch.sigmoid(3 * eta.logit())
    assert click_metrics(eta, labels)["ece"] < 0.01 < 0.1 < click_metrics(bold, labels)["ece"]


def test_intervals_over_users_are_wider_than_over_rows_and_hold_the_value():
    scores, labels, users = log()
    by_user, by_row = (click_intervals(scores, labels, u, 300) for u in (users, None))
    assert (by_user.low <= by_user.value).all() and (by_user.value <= by_user.high).all()
    assert (by_user.high - by_user.low)["auc"] > 1.5 * (by_row.high - by_row.low)["auc"]
    assert click_intervals(scores, labels, users, 50, seed=4).equals(click_intervals(scores, labels, users, 50, seed=4))


def test_intervals_cover_as_often_as_they_say():
    "Of 120 logs of 80 users, the 90% interval holds the AUC of the population in about nine of ten."
    population = click_metrics(*log(400_000, 20_000, seed=999)[:2])["auc"]
    inside = 0
    for seed in range(120):
        row = click_intervals(*log(1600, 80, seed), 200, level=0.9).loc["auc"]
        inside += row.low <= population <= row.high
    assert 96 <= inside <= 117, inside


def test_a_paired_difference_is_narrower_than_either_interval():
    scores, labels, users = log()
    worse = torch.sigmoid(scores.clamp(.01, .99).logit() + 0.4 * torch.randn(len(scores), generator=torch.Generator().manual_seed(5)))
    table, one = compare_clicks(scores, worse, labels, users, 300), click_intervals(scores, labels, users, 300)
    assert table.clear["auc"] and table.difference["auc"] > 0 > table.difference["logloss"]
    assert (table.high - table.low)["auc"] < 0.6 * (one.high - one.low)["auc"]
    mirrored = compare_clicks(worse, scores, labels, users, 300)
    assert mirrored.low.to_numpy() == pytest.approx(-table.high.to_numpy()) and not compare_clicks(scores, scores, labels, users, 50).clear.any()


@pytest.mark.parametrize("case, problem", [
    ((torch.tensor([.1, .2]), torch.tensor([1, 1])), "one class"),
    ((torch.tensor([.1, .2]), torch.tensor([1, 2])), "neither 0 nor 1"),
    ((torch.tensor([.1, .2, .3]), torch.tensor([1, 0, torch.nan])), "neither 0 nor 1"),
    ((torch.tensor([.1, .2, .3]), pd.Series([1, 0, None], dtype="Int8")), "neither 0 nor 1"),
    ((torch.tensor([.1, torch.nan]), torch.tensor([1, 0])), "not numbers"),
    ((torch.tensor([.1, 1.2]), torch.tensor([1, 0])), "no probability"),
    ((torch.tensor([.1, -torch.inf]), torch.tensor([1, 0])), "no probability"),
    ((torch.tensor([.1, .2]), torch.tensor([1, 0, 1])), "one length"),
    ((torch.tensor([.1, .2]), torch.tensor([1, 0]), torch.tensor([1])), "not one user a row"),
    ((torch.tensor([]), torch.tensor([]), torch.tensor([])), "no rows"),
    (([], []), "no rows"),
])
def test_bad_input_is_refused(case, problem):
    for function in (click_metrics, click_samples, click_intervals):
        with pytest.raises(InputError, match=problem):
            function(*case)


def test_missing_values_of_any_kind_become_nan():
    assert as_tensor([1, None]).isnan().tolist() == [False, True] and as_tensor(pd.Series([True, False])).dtype == torch.bool


# --- results and tables


def result(name="a", seed=0, noise=0.5, split="valid", leaky=""):
    scores, labels, users = log()
    scores = torch.sigmoid(scores.clamp(.01, .99).logit() + noise * torch.randn(len(scores), generator=torch.Generator().manual_seed(seed)))
    return ClickResult(pd.DataFrame({"row_id": range(1, 3001), "user_id": users, "label": labels, "score": scores}), name, split, leaky)


def test_metrics_are_paths_and_parts_can_be_cut():
    whole = result()
    assert whole.metrics["valid/auc"] == click_metrics(*whole.columns)["auc"] and all(k.startswith("valid/") for k in whole.metrics)
    half = whole.part(range(1, 1501), "valid_first")
    assert len(half.per_row) == 1500 and "valid_first/gauc" in half.metrics


def test_rows_come_in_any_order_and_go_through_a_file(tmp_path):
    from recgen.core.files import write_parquet
    one = result()
    shuffled = ClickResult(one.per_row.sample(frac=1, random_state=0), "b")
    assert shuffled.per_row.equals(one.per_row) and not click_differences({"a": one, "b": shuffled}, resamples=20).clear.any()
    write_parquet(tmp_path / "predictions.parquet", one.per_row)
    assert read_predictions(tmp_path / "predictions.parquet").metrics == one.metrics


def test_a_table_ranks_marks_and_pairs():
    results = {"noisy": result(noise=1.5), "good": result(noise=0.1), "cheat": result(noise=0.0, leaky="the truth")}
    table, differences = click_table(results, resamples=100), click_differences(results, "good", resamples=100)
    assert table.run.tolist() == ["good", "noisy", "cheat"] and click_table(results, "logloss", 100).run[0] == "good"
    text = table._repr_markdown_()
    assert "cheat (not comparable: knows the truth)" in text and "**" not in next(line for line in text.splitlines() if "cheat" in line)
    expected = compare_clicks(*(results[k].columns[0] for k in ("noisy", "good")), *results["good"].columns[1:], resamples=100)
    found = differences[differences.run == "noisy"].set_index("metric")
    assert found[["difference", "low", "high"]].to_numpy(float) == pytest.approx(expected[["difference", "low", "high"]].to_numpy(float), abs=1e-9)
    assert click_differences(results, resamples=20).reference.unique().tolist() == ["noisy"]  # the first that is not leaky
    with pytest.raises(ParameterError, match="no such run"):
        click_differences(results, "DIN")


def test_seeds_of_one_setting_are_one_row():
    group = [result(seed=s, noise=1.0) for s in range(3)]
    table = click_table({"DIN": group, "one": result(noise=2.0)}, resamples=50)
    aucs = [r.metrics["valid/auc"] for r in group]
    assert table.seeds.tolist() == [3, 1] and table.auc[0] == pytest.approx(np.mean(aucs)) and table["auc/sd"][0] == pytest.approx(np.std(aucs, ddof=1))
    assert "±" in table._repr_markdown_() and np.isnan(table["auc/sd"][1])


def test_other_rows_parts_or_labels_do_not_stand_in_one_table():
    one = result()
    flipped = one.per_row.assign(label=1 - one.per_row.label)
    for other in (one.part(range(100), "valid"), result(split="test"), ClickResult(flipped), ClickResult(one.per_row.assign(user_id=1))):
        with pytest.raises(InputError, match="do not stand in one table"):
            click_table({"a": one, "b": other})
    with pytest.raises(InputError, match="no results"):
        click_table({})
    with pytest.raises(InputError, match="stands twice"):
        ClickResult(pd.concat([one.per_row, one.per_row[:1]]))
    with pytest.raises(InputError, match="column is missing"):
        ClickResult(one.per_row.drop(columns="score"))


def test_the_picture_names_the_best_calibrated():
    one = result(noise=0.0)
    bold = ClickResult(one.per_row.assign(score=(3 * torch.tensor(one.per_row.score.to_numpy()).logit()).sigmoid().numpy()))
    _, axes = draw_calibration({"bold": bold, "honest": one}, bins=5, resamples=20)
    assert axes.get_title() == "honest is best calibrated" and len(axes.get_legend().get_texts()) == 2
