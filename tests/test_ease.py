"EASE against its formula, and what a baseline must hold to."
import numpy as np
import pandas as pd
import pytest
import torch

from recgen.core.errors import InputError
from recgen.core.ragged import Ragged
from recgen.evaluation.ease import EASE, best_l2, ease_weights, gram_matrix
from recgen.evaluation.evaluator import evaluate_scores
from recgen.evaluation.protocol import Cases, make_cases, rows_hash

def random_log(n_users, n_items, length, seed=0):
    rng = np.random.default_rng(seed)
    rows = [(u, i, p) for u in range(1, n_users + 1) for p, i in enumerate(1 + rng.choice(n_items, length, replace=True, p=np.arange(1, n_items + 1) / np.arange(1, n_items + 1).sum()))]
    return pd.DataFrame(rows, columns=["user_id", "item_id", "position"])


def formula(log, n_items, l2):
    X = np.zeros((log.user_id.max() + 1, n_items))
    X[log.user_id, log.item_id - 1] = 1
    P = np.linalg.inv(X.T @ X + l2 * np.eye(n_items))
    B = -P / np.diag(P)
    np.fill_diagonal(B, 0)
    return B


@pytest.mark.parametrize("block", [7, 1024])
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-11), (np.float32, 2e-5)])
def test_weights_are_the_formula(block, dtype, tolerance):
    log = random_log(300, 60, 9)
    gram = gram_matrix(log.user_id.to_numpy(), log.item_id.to_numpy(), 60, dtype, block)
    address = gram.ctypes.data
    found = ease_weights(gram, 5.0, block)
    assert found.dtype == dtype and found.ctypes.data == address, "one matrix, overwritten"
    assert np.abs(found - formula(log, 60, 5.0)).max() < tolerance


def test_float32_holds_where_items_are_many_and_l2_small():
    log = random_log(2000, 700, 12, seed=1)
    found, expected = EASE(l2=1.0).fit(log, 700).weights.numpy(), formula(log, 700, 1.0)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_weights_solve_what_they_should():
    "No matrix with a zero diagonal has a lower penalised error: the gradient vanishes off the diagonal."
    log = random_log(200, 30, 6, seed=2)
    X = np.zeros((201, 30))
    X[log.user_id, log.item_id - 1] = 1
    B = EASE(l2=3.0).fit(log, 30).weights.double().numpy()
    gradient = X.T @ (X @ B - X) + 3.0 * B
    assert np.abs(gradient - np.diag(np.diag(gradient))).max() < 1e-3 and np.abs(np.diag(gradient)).max() > 1


def test_scores_are_sums_over_different_items():
    log = random_log(100, 20, 5)
    model = EASE(l2=2.0).fit(log, 20)
    rows = [[3, 9], [], [9, 3, 9], [20]]
    scores = model.scores(Ragged.from_lists(rows))
    B = model.weights
    expected = torch.stack([B[2] + B[8], torch.zeros(20), B[2] + B[8], B[19]])
    assert torch.allclose(scores[:, 1:], expected, atol=1e-6) and (scores[:, 0] == -torch.inf).all()
    model.half_life = 1.0
    assert torch.allclose(model.scores(Ragged.from_lists(rows))[0, 1:], B[2] / 2 + B[8], atol=1e-6)
    assert torch.allclose(model.scores(Ragged.from_lists(rows))[2, 1:], B[2] / 2 + B[8], atol=1e-6), "a repeat counts where it stood last"


def test_the_order_of_rows_and_repeats_change_nothing():
    log = random_log(80, 15, 4)
    twice = pd.concat([log, log]).sample(frac=1, random_state=0)
    assert torch.allclose(EASE(1.0).fit(log, 15).weights, EASE(1.0).fit(twice, 15).weights, atol=1e-5)


def test_an_item_of_no_training_row_has_no_weight():
    log = random_log(100, 12, 5)
    model = EASE(l2=1.0).fit(log, 14)
    assert model.weights.shape == (14, 14) and not model.weights[12:].any() and not model.weights[:, 12:].any()
    assert model.train_hash == rows_hash(log)


def test_what_cannot_be_fitted_is_refused():
    log = random_log(20, 10, 3)
    for model, n_items in [(EASE(limit=9), 10), (EASE(l2=0.0), 10), (EASE(l2=-1.0), 10), (EASE(), 5)]:
        with pytest.raises(InputError):
            model.fit(log, n_items)
    with pytest.raises(InputError, match="too large.*(.|\n)*raise limit"):
        EASE(limit=9).fit(log, 10)
    fitted = EASE().fit(log, 10)
    for row in ([0], [11]):
        with pytest.raises(InputError):
            fitted.scores(Ragged.from_lists([row]))


def test_it_explains_away_what_counting_cannot():
    "Jam comes only with butter, and among those who have butter it goes with bread no more than without."
    rows = [[1, 2, 3]] * 30 + [[2, 3]] * 10 + [[1, 2]] * 30 + [[2]] * 10 + [[4, 5]] * 30
    log = pd.DataFrame([(u, i, p) for u, row in enumerate(rows, 1) for p, i in enumerate(row)], columns=["user_id", "item_id", "position"])
    B = EASE(l2=0.1).fit(log, 5).weights
    assert B[1, 0] > 0.7 and abs(B[2, 0]) < 0.02, "bread follows from butter alone, though 30 users have bread and jam"
    assert B[0, 3].abs() < 1e-3 and B[3, 4] > 0.9


def test_l2_is_chosen_on_validation():
    log = random_log(150, 25, 6, seed=3)
    train, held = log[log.position < 5], log[log.position == 5]
    valid = make_cases(train, None, held, "valid")
    model, table = best_l2(train, 25, valid, l2s=(0.5, 20.0, 5000.0), half_lives=(0.0, 2.0))
    best = table.loc[table["ndcg@10"].idxmax()]
    assert len(table) == 6 and (model.l2, model.half_life) == (best.l2, best.half_life)
    assert evaluate_scores(model.scores, valid).metrics["valid/item/filtered/ndcg@10"] == pytest.approx(best["ndcg@10"])
    with pytest.raises(InputError, match="validation"):
        best_l2(train, 25, Cases(valid.users, valid.history, valid.targets, valid.positions, "test"))
