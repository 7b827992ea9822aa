"""The graph of a dataset: equal to brute force, made of training rows alone, and refused where its tables do not fit."""
from collections import Counter
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgen.core.errors import InputError
from recgen.formats.dataset import Dataset
from recgen.graph.hetero import (
    BOUGHT,
    BOUGHT_BY,
    SHARED,
    Csr,
    GraphSettings,
    HeteroGraph,
    attribute_edges,
    graph_from_dataset,
    leaky_relations,
    shared_neighbours,
    without_interactions,
)

def toy_dataset(n_users=30, n_items=20, seed=0, **info):
    draws = np.random.default_rng(seed)
    rows = [(u, i, k) for u in range(1, n_users + 1) for k, i in enumerate(draws.choice(n_items, draws.integers(3, 9), replace=False) + 1)]
    items = pd.DataFrame({"item_id": np.arange(1, n_items + 1), "raw_id": [f"r{i}" for i in range(n_items)], "title": "", "brand": [f"b{i % 4}" for i in range(n_items)]})
    return Dataset(pd.DataFrame(rows, columns=["user_id", "item_id", "position"]), items, {"name": "toy", **info})


BRANDS = GraphSettings(attributes=("brand",))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=40))
def test_csr_is_the_matrix_of_its_edges(ends):
    rows, columns = [list(c) for c in zip(*ends, strict=True)] if ends else ([], [])
    edges = Csr.from_edges(rows, columns, 6, 7, torch.ones(len(rows)))
    dense = torch.zeros(6, 7)
    for r, c in ends:
        dense[r, c] += 1
    assert torch.equal(edges.to_torch().to_dense(), dense)
    turned, order = edges.transpose
    assert torch.equal(turned.to_torch().to_dense(), dense.T)
    assert torch.equal(edges.columns[order], turned.rows) and torch.equal(edges.values[order], turned.values)
    assert torch.equal(edges.degrees, (dense > 0).sum(1))
    keep = torch.arange(edges.n_edges) % 2 == 0
    part = edges.select(keep)
    assert torch.equal(part.edge_index(), edges.edge_index()[:, keep]) and len(part.offsets) == 7


def test_edges_outside_the_graph_are_refused():
    for rows, columns in [([6], [0]), ([0], [7]), ([-1], [0])]:
        with pytest.raises(ValueError, match="outside"):
            Csr.from_edges(rows, columns, 6, 7)


def test_a_graph_is_shared_between_processes():
    graph = graph_from_dataset(toy_dataset(), BRANDS, {"item": torch.ones(20, 3)}).share_memory_()
    assert all(t.is_shared() for e in graph.relations.values() for t in (e.offsets, e.columns)) and graph.features["item"].is_shared()


def test_only_training_rows_become_edges():
    data = toy_dataset()
    graph = graph_from_dataset(data, GraphSettings(attributes=(), user_user=1, item_item=1))
    train = {(u - 1, i - 1) for u, i in data.train_interactions()[["user_id", "item_id"]].itertuples(index=False)}
    source, target = graph.relations[BOUGHT].edge_index().tolist()
    assert set(zip(source, target, strict=True)) == train
    item, user = graph.relations[BOUGHT_BY].edge_index().tolist()
    assert set(zip(user, item, strict=True)) == train
    assert graph.train_hash == data.train_hash and graph.leaky == ""


def test_a_canary_seen_only_in_held_out_rows_has_no_edge():
    rows = [(u, i, k) for u in (1, 2, 3) for k, i in enumerate([1, 2, 3, 4])]
    items = pd.DataFrame({"item_id": [1, 2, 3, 4], "raw_id": list("abcd"), "title": ""})
    data = Dataset(pd.DataFrame(rows, columns=["user_id", "item_id", "position"]), items)
    graph = graph_from_dataset(data, GraphSettings(attributes=(), user_user=1, item_item=1))
    for canary in (2, 3):  # items 3 and 4: every user's validation and test row
        assert graph.relations[BOUGHT].degrees[canary] == 0
        assert graph.relations[SHARED["item_item"]].degrees[canary] == 0
    assert graph.relations[SHARED["item_item"]].edge_index().tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("least", [1, 2])
def test_shared_neighbours_are_counted(least):
    data = toy_dataset()
    edges = graph_from_dataset(data, GraphSettings(attributes=())).relations[BOUGHT]
    counts = Counter()
    for _, row in data.train_interactions().groupby("user_id")["item_id"]:
        counts.update(frozenset(pair) for pair in combinations(set(row), 2))
    expected = torch.zeros(20, 20)
    for pair, n in counts.items():
        a, b = pair
        expected[a - 1, b - 1] = expected[b - 1, a - 1] = n if n >= least else 0
    assert torch.equal(shared_neighbours(edges, least, 1000).to_torch().to_dense(), expected)
    few = shared_neighbours(edges, least, 2).to_torch().to_dense()
    assert torch.equal(few, few.T) and ((few == expected) | (few == 0)).all()
    kept = torch.minimum((expected > 0).sum(1), torch.tensor(2))
    assert ((few > 0).sum(1) >= kept).all()
    assert torch.equal(few.max(1).values, expected.max(1).values)  # the largest is always among them


def test_hiding_interactions_is_as_if_they_had_not_been():
    data, wanted = toy_dataset(), GraphSettings(attributes=("brand",), user_user=1, item_item=2)
    graph = graph_from_dataset(data, wanted)
    taken = graph.relations[BOUGHT]
    hidden = torch.rand(taken.n_edges, generator=torch.Generator().manual_seed(0)) < 0.3
    less = without_interactions(graph, hidden)
    left = Csr.from_edges(taken.rows[~hidden], taken.columns[~hidden], 20, 30)
    assert torch.equal(less.relations[BOUGHT].edge_index(), left.edge_index())
    assert torch.equal(less.relations[BOUGHT_BY].edge_index(), left.transpose[0].edge_index())
    assert torch.equal(less.relations[SHARED["user_user"]].edge_index(), shared_neighbours(left.transpose[0], 1, 20).edge_index())
    assert torch.equal(less.relations[SHARED["item_item"]].edge_index(), shared_neighbours(left, 2, 20).edge_index())
    assert graph.relations[BOUGHT].n_edges == taken.n_edges


def test_relations_come_in_both_directions():
    data = toy_dataset()
    tables = {"item__also_bought__item": pd.DataFrame({"source": [1, 2, 5], "target": [2, 1, 5]}), "item__made_in__country": pd.DataFrame({"source": [3], "target": [7]})}
    graph = graph_from_dataset(data, GraphSettings(relations=tuple(tables), attributes=()), relations=tables)
    assert graph.relations["item", "also_bought", "item"].edge_index().tolist() == [[1, 0], [0, 1]]  # once each; none to itself
    assert graph.n_nodes["country"] == 7
    assert graph.relations["country", "made_in_of", "item"].edge_index().tolist() == [[6], [2]]
    assert graph.leaky == "also_bought"


def test_a_dataset_may_say_that_a_relation_is_clean():
    names = ("item__also_bought__item", "user__trusts__user", "item__made_in__country")
    assert leaky_relations(names, {}) == "also_bought, trusts"
    assert leaky_relations(names, {"leaky_relations": []}) == ""
    assert leaky_relations(names, {"leaky_relations": ["item__made_in__country"]}) == "made_in"


def test_a_way_between_users_and_items_over_other_types_is_leaky_too():
    names = ("user__made__order", "order__has__line", "line__of__item", "item__made_in__country", "user__lives_in__town")
    assert leaky_relations(names, {}) == "made, has, of"
    assert leaky_relations(names[1:], {}) == ""


def test_no_relation_takes_the_place_of_the_training_edges():
    tables = {"user__bought__item": pd.DataFrame({"source": [1], "target": [5]})}
    with pytest.raises(InputError, match="of this name already"):
        graph_from_dataset(toy_dataset(), GraphSettings(relations=tuple(tables), attributes=()), relations=tables)


@pytest.mark.parametrize("table, what", [
    (pd.DataFrame({"source": [1]}), "a column is missing"),
    (pd.DataFrame({"source": [], "target": []}), "no edges"),
    (pd.DataFrame({"source": [1, 99], "target": [1, 1]}), "items that there are not"),
    (pd.DataFrame({"source": [1, -3], "target": [1, 1]}), "not whole numbers from 1"),
    (pd.DataFrame({"source": [1.5], "target": [1]}), "not whole numbers from 1"),
    (pd.DataFrame({"source": [1], "target": [2], "weight": [np.nan]}), "weights are missing"),
])
def test_bad_relations_are_refused(table, what):
    name = "item__also_bought__item"
    with pytest.raises(InputError, match=what) as raised:
        graph_from_dataset(toy_dataset(), GraphSettings(relations=(name,), attributes=()), relations={name: table})
    assert name in str(raised.value)


def test_an_unknown_relation_is_refused_with_those_that_there_are(tmp_path):
    with pytest.raises(InputError, match="no such relation"):
        graph_from_dataset(toy_dataset(), GraphSettings(relations=("item__x__item",), attributes=()))
    tables = {"item__likes__item": pd.DataFrame({"source": [1], "target": [2]})}
    with pytest.raises(InputError, match="item__likes__item"):
        graph_from_dataset(toy_dataset(), GraphSettings(relations=("item__x__item",), attributes=()), relations=tables)


def test_a_value_that_most_items_have_is_no_node():
    items = pd.DataFrame({"kind": [["all", "a"], ["all", "b"], ["all"], ["all", "a", "a"]]})
    edges, names = attribute_edges(items, "kind")
    assert names.tolist() == ["a", "b"] and edges.edge_index().tolist() == [[0, 3, 1], [0, 0, 1]]
    with pytest.raises(InputError, match="tells items apart"):
        attribute_edges(pd.DataFrame({"kind": ["x", "x", "Unknown"]}), "kind")


@pytest.mark.parametrize("x, what", [(torch.ones(19, 2), "features are not those"), (torch.full((20, 2), torch.nan), "not finite")])
def test_bad_features_are_refused(x, what):
    with pytest.raises(InputError, match=what):
        graph_from_dataset(toy_dataset(), BRANDS, {"item": x})


def test_torch_geometrics_form_and_back():
    graph = graph_from_dataset(toy_dataset(), BRANDS, {"item": torch.rand(20, 3)})
    again = HeteroGraph.from_hetero_data(graph.to_hetero_data())
    assert again.n_nodes == graph.n_nodes and torch.equal(again.features["item"], graph.features["item"])
    assert all(torch.equal(again.relations[r].edge_index(), e.edge_index()) for r, e in graph.relations.items())


def test_homogeneous_numbers_types_one_after_the_other():
    graph = graph_from_dataset(toy_dataset(), BRANDS)
    edges, first = graph.homogeneous()
    assert first == {"user": 0, "item": 30, "brand": 50} and edges.n_rows == 54
    assert edges.n_edges == sum(e.n_edges for e in graph.relations.values())
    taken = edges.edge_index()
    inside = (taken[0] < 30) & (taken[1] >= 30) & (taken[1] < 50)
    assert torch.equal(taken[:, inside] - torch.tensor([[0], [30]]), graph.relations[BOUGHT].edge_index())
