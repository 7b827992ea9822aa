"Classification figures against scikit-learn, plain loops and their own symmetries."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgen.core.errors import InputError
from recgen.evaluation.classification import (
    BINARY,
    binary_intervals,
    binary_metrics,
    compare_binary,
    compare_classes,
    finite_interval,
    multi_class_f1,
    multi_class_intervals,
    ranking_metrics,
    resampled_binary,
    resampled_counts,
)
from recgen.evaluation.uncertainty import resampled_means

PLAIN = dict(deadline=None, derandomize=True, database=None)


@st.composite
def judged(draw):
    "Scores with many ties and labels of both classes."
    n = draw(st.integers(2, 30))
    scores = draw(st.lists(st.sampled_from([-2.0, 0.0, 0.25, 0.5, 0.75, 1.0, 3.0]), min_size=n, max_size=n))
    labels = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n).filter(lambda x: 0 < sum(x) < len(x)))
    return torch.tensor(scores), torch.tensor(labels)


@given(judged())
@settings(max_examples=150, **PLAIN)
def test_binary_figures_are_scikit_learns(case):
    from sklearn import metrics
    scores, labels = case
    found, called = binary_metrics(scores, labels), (scores >= 0.5).long()
    expected = dict(roc=metrics.roc_auc_score(labels, scores), prc=metrics.average_precision_score(labels, scores),
                    f1=metrics.f1_score(labels, called, zero_division=0), precision=metrics.precision_score(labels, called, zero_division=0),
                    recall=metrics.recall_score(labels, called, zero_division=0), acc=metrics.accuracy_score(labels, called))
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_large_case_is_scikit_learns():
    from sklearn import metrics
    g = torch.Generator().manual_seed(0)
    labels = (torch.rand(50_000, generator=g) < 0.05).long()
    scores = (labels + torch.randn(50_000, generator=g)).mul(100).round() / 100
    found = binary_metrics(scores, labels)
    assert found["roc"] == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
    assert found["prc"] == pytest.approx(metrics.average_precision_score(labels, scores), abs=1e-12)


@given(judged())
@settings(max_examples=100, **PLAIN)
def test_auc_is_the_share_of_pairs_in_order(case):
    scores, labels = case
    up, down = scores[labels == 1].tolist(), scores[labels == 0].tolist()
    share = sum((a > b) + (a == b) / 2 for a in up for b in down) / len(up) / len(down)
    assert binary_metrics(scores, labels)["roc"] == pytest.approx(share, abs=1e-12)


@given(judged(), st.randoms(use_true_random=False))
@settings(max_examples=60, **PLAIN)
def test_order_scale_and_sign(case, random):
    "Figures do not depend on the order of cases; AUC only on the order of scores; turned scores turn it."
    scores, labels = case
    order = list(range(len(scores)))
    random.shuffle(order)
    found = binary_metrics(scores, labels)
    assert binary_metrics(scores[order], labels[order]) == pytest.approx(found, abs=1e-12)
    assert binary_metrics(scores.exp() * 3, labels)["roc"] == pytest.approx(found["roc"], abs=1e-12)
    assert binary_metrics(-scores, labels)["roc"] == pytest.approx(1 - found["roc"], abs=1e-12)
    assert binary_metrics(torch.zeros_like(scores), labels)["roc"] == 0.5


def test_perfect_and_reversed():
    scores, labels = torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([0, 0, 1, 1])
    assert binary_metrics(scores, labels) == dict.fromkeys(BINARY, 1.0)
    assert binary_metrics(1 - scores, labels)["roc"] == 0.0
    assert binary_metrics(scores, labels, threshold=2.0)["f1"] == 0.0, "nothing is called 1"


@pytest.mark.parametrize("kind", ["macro", "micro"])
def test_class_f1_is_scikit_learns(kind):
    from sklearn import metrics
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        labels, predicted = torch.randint(0, 7, (25,), generator=g), torch.randint(0, 5, (25,), generator=g)
        assert multi_class_f1(predicted, labels)[kind] == pytest.approx(metrics.f1_score(labels, predicted, average=kind), abs=1e-12)
    scores = torch.eye(7)[predicted]
    assert multi_class_f1(scores, labels) == multi_class_f1(predicted, labels)


def test_draws_are_those_of_resampled_means():
    values = torch.randn(70_001, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means = torch.cat([counts @ values / len(values) for counts in resampled_counts(len(values), 60, seed=3)])
    assert torch.allclose(means, resampled_means(values, 60, seed=3))


@given(judged())
@settings(max_examples=30, **PLAIN)
def test_a_resample_is_the_list_of_its_cases(case):
    scores, labels = case
    counts = torch.cat(list(resampled_counts(len(scores), 20, seed=0)))
    found = resampled_binary(scores.double(), labels.bool(), 0.5, 20, 0)
    for weights, row in zip(counts, found, strict=True):
        drawn = torch.repeat_interleave(torch.arange(len(scores)), weights.long())
        if 0 < labels[drawn].sum() < len(drawn):
            assert row.tolist() == pytest.approx(list(binary_metrics(scores[drawn], labels[drawn]).values()), abs=1e-12)
        else:
            assert row.isnan().any(), "one class alone has no AUC"


def test_units_are_drawn_together():
    scores, labels = torch.rand(40, generator=torch.Generator().manual_seed(0)).double(), torch.arange(40) % 4 == 0
    units = torch.arange(40) // 4
    found = resampled_binary(scores, labels, 0.5, 50, 0, units)
    counts = torch.cat(list(resampled_counts(10, 50, 0)))
    assert torch.allclose(found[:, :2].flip(1), ranking_metrics(scores, labels, counts.repeat_interleave(4, 1)))
    assert torch.allclose(found[:, 5], ((scores >= 0.5) == labels).double().view(10, 4).mean(1) @ counts.T / 10)


def test_intervals_cover_and_pair():
    g = torch.Generator().manual_seed(1)
    labels = (torch.rand(1500, generator=g) < 0.3).long()
    scores = torch.sigmoid(labels + torch.randn(1500, generator=g))
    table = binary_intervals(scores, labels, resamples=300)
    assert ((table.low < table.value) & (table.value < table.high)).all()
    assert table.equals(binary_intervals(scores, labels, resamples=300)), "seeded"
    expected = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(0.5**0.5))  # AUC of two unit normals one apart
    assert table.low["roc"] < expected < table.high["roc"]
    same = compare_binary(scores, scores, labels, resamples=100)
    assert (same.difference == 0).all() and not same.clear.any()
    noise = torch.rand(1500, generator=g)
    other = compare_binary(scores, noise, labels, resamples=300)
    assert other.clear["roc"] and other.clear["prc"] and other.low["roc"] > 0.1


def test_intervals_of_classes():
    g = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 4, (600,), generator=g)
    good = torch.where(torch.rand(600, generator=g) < 0.7, labels, 0)
    table = multi_class_intervals(good, labels, resamples=300)
    assert ((table.low < table.value) & (table.value < table.high)).all()
    se = (table.value["micro"] * (1 - table.value["micro"]) / 600) ** 0.5
    assert (table.high["micro"] - table.low["micro"]) / (2 * 1.96 * se) == pytest.approx(1, abs=0.15), "micro F1 is a binomial share"
    assert compare_classes(good, torch.zeros_like(good), labels, resamples=100).clear.all()
    assert not compare_classes(good, good, labels, resamples=100).clear.any()


@pytest.mark.parametrize("scores, labels", [
    (torch.tensor([0.1, 0.2]), torch.tensor([1, 1])),
    (torch.tensor([0.1, 0.2]), torch.tensor([0, 0])),
    (torch.tensor([0.1, torch.nan]), torch.tensor([0, 1])),
    (torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1])),
    (torch.tensor([0.1, 0.2]), torch.tensor([0, 2])),
    (torch.rand(4, 2), torch.tensor([0, 1, 0, 1])),
    (torch.tensor([]), torch.tensor([])),
])
def test_what_has_no_figures_is_refused(scores, labels):
    for call in (lambda: binary_metrics(scores, labels), lambda: binary_intervals(scores, labels), lambda: compare_binary(scores, scores, labels)):
        with pytest.raises(InputError):
            call()


def test_bad_classes_are_refused():
    for predicted, labels in [(torch.tensor([0, 1]), torch.tensor([0])), (torch.tensor([0, -1]), torch.tensor([0, 1])),
                              (torch.tensor([[0.1, torch.nan]]), torch.tensor([0])), (torch.tensor([]), torch.tensor([]))]:
        with pytest.raises(InputError):
            multi_class_f1(predicted, labels)


def test_resamples_of_one_class_are_left_out_or_refused():
    samples = torch.tensor([[0.1], [0.3], [torch.nan]])
    low, high = finite_interval(samples, ["roc"], 1.0)
    assert (low.item(), high.item()) == (pytest.approx(0.1), pytest.approx(0.3))
    with pytest.raises(InputError, match="too few cases"):
        finite_interval(samples[1:].repeat(2, 1)[1:], ["roc"], 0.95)


def test_equal_infinite_scores_are_ties():
    labels = torch.tensor([1, 0, 1, 0, 1])
    infinite, finite = (binary_metrics(torch.tensor(x), labels, 0.5) for x in ([torch.inf, torch.inf, 1.0, -torch.inf, -torch.inf], [2.0, 2.0, 1.0, 0.0, 0.0]))
    assert infinite == finite
