"""The imbalanced label: what is added, between whom, with whose edges; and what the labels must be like."""
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgen.core.device import generator
from recgen.core.errors import InputError
from recgen.graph.hetero import Csr, HeteroGraph
from recgen.graph.imbalance import SETTINGS, add_nodes, balance, read_labels, smote, synthetic_count

def users_table(n=40, minority=5):
    "Users in turn train, train, valid, test; the first of each split are of class 1."
    split = ["train", "train", "valid", "test"] * (n // 4)
    label = [1 if i < 4 * minority and i % 4 != 1 else 0 for i in range(n)]
    return pd.DataFrame({"user_id": range(1, n + 1), "label": label, "split": split})


def graph_of(n=40, features=3):
    g = generator(0)
    bought = Csr.from_edges(torch.randint(9, (120,), generator=g), torch.randint(n - 1, (120,), generator=g), 9, n)
    friends = Csr.from_edges([0, 1, 4], [1, 0, 8], n, n, torch.tensor([2.0, 3, 4]))
    x = {"user": torch.randn(n, features, generator=g)} if features else {}
    return HeteroGraph({"user": n, "item": 9}, {("user", "bought", "item"): bought, ("item", "bought_by", "user"): bought.transpose[0], ("user", "shares_items", "user"): friends}, x)


@settings(derandomize=True, max_examples=80, deadline=None)
@given(st.integers(1, 400), st.integers(1, 4000), st.floats(0, 0.9))
def test_the_share_is_reached_as_nearly_as_whole_users_can(few, others, ratio):
    n = few + others
    k = synthetic_count(few, n, ratio)
    if ratio <= few / n:
        assert k == 0
    else:
        error = lambda j: abs((few + j) / (n + j) - ratio)  # noqa: E731
        assert error(k) <= min(error(k + 1), error(max(0, k - 1))) + 1e-3 / n + 1 / (n + k) ** 2


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 2.0])
def test_an_impossible_share_is_refused(ratio):
    with pytest.raises(InputError, match="below 1"):
        synthetic_count(5, 100, ratio)


def test_smote_stays_between_a_minority_user_and_one_of_its_nearest():
    g = generator(1)
    x = torch.randn(60, 4, generator=g) * torch.tensor([1.0, 1, 1000, 1])  # one column in another unit
    few = torch.arange(0, 60, 3)
    made, a, b = smote(x, few, 300, 3, g)
    assert made.shape == (300, 4) and set(a.tolist()) | set(b.tolist()) <= set(few.tolist()) and (a != b).all()
    way = (made - x[a]) / (x[b] - x[a])
    assert torch.allclose(way, way[:, :1].expand_as(way), atol=2e-3) and (way >= -1e-3).all() and (way <= 1.001).all()
    assert way[:, 0].std() > 0.2, "not always the same place on the line"
    scaled = (x[few] - x.mean(0)) / x.std(0)
    near = {int(few[i]): set(few[(scaled - scaled[i]).norm(dim=1).argsort()[1:4]].tolist()) for i in range(len(few))}
    assert all(int(v) in near[int(u)] for u, v in zip(a, b, strict=True)), "nearest by standardised distance"


def test_smote_needs_two():
    with pytest.raises(InputError, match="two minority users"):
        smote(torch.randn(5, 2), torch.tensor([3]), 4)


def test_added_users_have_their_models_edges_and_the_real_graph_is_unchanged():
    graph, sources = graph_of(), torch.tensor([4, 39, 1, 4])
    made = add_nodes(graph, "user", sources)
    assert made.n_nodes == {"user": 44, "item": 9} and made.features["user"][40:].equal(graph.features["user"][sources])
    for r, e in made.relations.items():
        before, after = graph.relations[r].to_torch().to_dense(), e.to_torch().to_dense()
        assert after[: before.shape[0], : before.shape[1]].equal(before)
        if r[2] == "user":
            assert after[40:, : before.shape[1]].equal(before[sources])
        if r[0] == "user":
            assert after[: before.shape[0], 40:].equal(before[:, sources])
        if r[0] == r[2]:
            assert not after[40:, 40:].any()


def test_every_setting_does_what_the_table_says():
    graph, labels = graph_of(), read_labels(users_table(), 40)
    train = labels.index("train")
    natural = (labels.label[train] == 1).float().mean()
    for setting in SETTINGS:
        made = balance(graph, labels, setting, 0.5, generator(0))
        share = (made.label[made.train] == 1).float().mean()
        assert made.train[: len(train)].equal(train) and len(made.label) == made.graph.n_nodes["user"] == 40 + made.added == 40 + len(made.sources)
        assert abs(share - (natural if setting in ("origin", "reweight") else 0.5)) < 0.02
        assert made.weights.tolist() == [1, 1] or setting in ("reweight", "embedding")
        if setting == "reweight":
            counts = torch.bincount(labels.label[train])
            assert torch.allclose(made.weights * counts, torch.full((2,), len(train) / 2))
        if setting == "oversampling":
            assert made.graph.features["user"][40:].equal(graph.features["user"][made.sources])
        if setting in ("smote", "embedding"):
            assert not made.graph.features["user"][40:].equal(graph.features["user"][made.sources]), "features of their own"
            edges = made.graph.relations["item", "bought_by", "user"].to_torch().to_dense()
            assert edges[40:].equal(edges[made.sources]), "edges of the neighbour"
        assert (labels.label[made.sources] == 1).all() and torch.isin(made.sources, train).all(), "training users alone"


def test_below_the_natural_share_none_are_made_and_the_run_says_so():
    graph, labels = graph_of(), read_labels(users_table(), 40)
    made = balance(graph, labels, "embedding", 0.1, generator(0))
    assert made.added == 0 and made.graph is graph and "no users were added" in made.said


def test_learned_users_are_repeated_not_interpolated():
    graph, labels = graph_of(features=0), read_labels(users_table(), 40)
    assert "repeated" in balance(graph, labels, "embedding", 0.5, generator(0)).said
    with pytest.raises(InputError, match="SMOTE draws between features"):
        balance(graph, labels, "smote", 0.5, generator(0))


def test_one_minority_user_cannot_be_interpolated():
    table = users_table()
    train = table.split == "train"
    table.loc[train, "label"] = 0
    table.loc[0, "label"] = 1
    with pytest.raises(InputError, match="two minority users"):
        balance(graph_of(), read_labels(table, 40), "smote", 0.5, generator(0))
    assert balance(graph_of(), read_labels(table, 40), "oversampling", 0.5, generator(0)).added > 0


def test_unknown_setting():
    with pytest.raises(InputError, match="no such setting"):
        balance(graph_of(), read_labels(users_table(), 40), "undersampling")


def test_the_minority_may_be_class_0():
    table = users_table()
    table["label"] = 1 - table["label"]
    labels = read_labels(table, 40)
    made = balance(graph_of(), labels, "smote", 0.5, generator(0))
    assert labels.minority == 0 and (made.label[40:] == 0).all()


# --- labels


def test_unknown_labels_and_users_without_a_row_are_left_out():
    table = users_table().assign(label=lambda f: f.label.where(f.user_id != 2, -1)).iloc[:-1]
    labels = read_labels(table, 50)
    assert 1 not in labels.index("train").tolist() and labels.label[39:].eq(-1).all() and labels.part[39:].eq(-1).all()


@pytest.mark.parametrize(("change", "problem", "said"), [
    (lambda f: None, "needs labels of users", "objective=link"),
    (lambda f: f.drop(columns="label"), "a column is missing", "label"),
    (lambda f: f.drop(columns="split"), "a column is missing", "split"),
    (lambda f: f.assign(label=f.label.where(f.split != "train", 0)), "labels of one class in train", "both classes"),
    (lambda f: f.assign(label=f.label.where(f.split != "valid", 1)), "labels of one class in valid", "both classes"),
    (lambda f: f[f.split != "test"], "no user with a label in test", "both classes"),
    (lambda f: f.assign(label=f.label * 2), "a label is not allowed", "−1 where unknown"),
    (lambda f: f.assign(label=f.label * 0.5), "a label is not allowed", "0.5"),
    (lambda f: f.assign(split=f.split.replace("valid", "dev")), "a split is not allowed", "dev"),
    (lambda f: f.assign(user_id=f.user_id + 5), "users that there are not", "1 … 40"),
])
def test_labels_that_cannot_be_used_are_refused(change, problem, said):
    with pytest.raises(InputError) as e:
        read_labels(change(users_table()), 40, "users.parquet")
    assert problem in str(e.value) and said in str(e.value) and "users.parquet" in str(e.value)
