"""HGT's training: losses against their definitions, nothing predicted is heard, the epoch is chosen on validation, and a run that was interrupted ends as one that was not."""
import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from recgen.core.device import generator
from recgen.core.errors import InputError, RunError
from recgen.core.files import write_torch
from recgen.core.training import TrainSettings
from recgen.evaluation.protocol import cases_from_dataset
from recgen.formats.dataset import Dataset
from recgen.graph.hetero import BOUGHT, BOUGHT_BY, GraphSettings, graph_from_dataset
from recgen.graph.hgt_training import (
    FeatureConfig,
    FeatureExtractor,
    LinkSettings,
    LinkTask,
    NodeSettings,
    NodeTask,
    bpr_loss,
    embed,
    epoch_line,
    sampled_softmax_loss,
    train_hgt,
    user_logits,
)
from recgen.graph.imbalance import balance, read_labels

SHAPE = dict(learned=4, hidden=8, n_heads=2, dropout=0.3)
SHARED = GraphSettings(attributes=("brand",), user_user=2, item_item=2, neighbours=4)


def toy(seed=0, users=40, items=24, each=9):
    "A log in which user and item kinds agree, items with a brand, users with a label."
    g = generator(seed)
    rows = [(u + 1, int(i) + 1) for u in range(users) for i in torch.randperm(items // 2, generator=g)[:each] * 2 + (u % 2)]
    log = pd.DataFrame(rows, columns=["user_id", "item_id"])
    goods = pd.DataFrame({"item_id": range(1, items + 1), "raw_id": [f"i{i}" for i in range(items)], "title": "", "brand": [f"b{i % 5}" for i in range(items)]})
    split = (["train", "train", "train", "valid", "valid", "test", "test"] * users)[:users]
    people = pd.DataFrame({"user_id": range(1, users + 1), "label": [int(u % 2 > 0 and u % 3 > 0) for u in range(users)], "split": split})
    return Dataset(log, goods, {"name": "toy"}, people)


def graph_of(dataset, settings=SHARED, users=True):
    x = {"item": torch.randn(dataset.n_items, 3, generator=generator(1))} | ({"user": torch.randn(dataset.n_users, 2, generator=generator(2))} if users else {})
    return graph_from_dataset(dataset, settings, x)


def node_parts(dataset, graph):
    labels = read_labels(dataset.users, dataset.n_users)
    return labels, balance(graph, labels, "embedding", 0.6, generator(0))


# --- losses


def test_bpr_is_its_definition():
    positive, drawn = torch.randn(3, generator=generator(0)), torch.randn(3, 5, generator=generator(1))
    drawn[1, 2] = -torch.inf  # the taken item itself
    pairs = [-math.log(1 / (1 + math.exp(float(drawn[b, j] - positive[b])))) for b in range(3) for j in range(5) if (b, j) != (1, 2)]
    assert bpr_loss(positive, drawn).item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


def test_every_item_drawn_as_often_as_expected_gives_the_full_softmax():
    scores = torch.randn(4, 6, generator=generator(0))
    target, drawn = torch.tensor([0, 3, 5, 3]), torch.arange(6).repeat(2)
    all_drawn = scores[:, drawn].masked_fill(drawn == target[:, None], -torch.inf)
    found = sampled_softmax_loss(scores.gather(1, target[:, None])[:, 0], all_drawn, torch.full((12,), 2.0).log())
    assert found.item() == pytest.approx(F.cross_entropy(scores, target).item(), rel=1e-5)


def test_the_estimate_of_the_softmax_sum_is_right_on_average_whatever_q():
    scores, target = torch.randn(20, generator=generator(0)), 3
    q = torch.rand(20, generator=generator(1)) ** 2 + 0.01
    q = q / q.sum()
    drawn = torch.multinomial(q, 30 * 4000, replacement=True, generator=generator(2)).view(4000, 30)
    parts = (scores[drawn] - (30 * q[drawn]).log()).masked_fill(drawn == target, -torch.inf)
    total = parts.exp().sum(1)
    exact = scores.exp().sum() - scores[target].exp()
    assert abs(total.mean() - exact) < 4 * total.std() / 4000**0.5


# --- what a batch may hear


@pytest.mark.parametrize("batch", ["full", "sampled"])
def test_a_batch_hears_what_a_log_without_its_edges_would_have_told(batch):
    "Whole neighbourhoods, so that sampling takes all there is: users who share items are counted without the hidden edges as well."
    dataset = toy()
    graph = graph_of(dataset)
    model = FeatureExtractor(FeatureConfig.of(graph, **{**SHAPE, "dropout": 0.0})).eval()
    task = LinkTask(model, graph, LinkSettings(negatives=6, batch=batch, batch_size=7, fanout=(-1, -1)))
    parts = task.batches(generator(0))
    assert torch.cat(parts).sort().values.equal(torch.arange(len(task.users))), "every edge once"
    index = parts[3]
    placed = task.place(index)
    part = task.part == task.part[index[0]]
    rows = dataset.train_interactions()
    hidden = set(zip((task.items[part] + 1).tolist(), (task.users[part] + 1).tolist(), strict=True))
    kept = rows[[(i, u) not in hidden for i, u in zip(rows.item_id, rows.user_id, strict=True)]]

    class Smaller:  # the same dataset, a smaller log
        items, users, n_items, n_users, folder, info, train_hash = dataset.items, dataset.users, dataset.n_items, dataset.n_users, None, dataset.info, ""

        def train_interactions(self):
            return kept

    smaller = graph_of(Smaller())
    with torch.no_grad():
        whole, found = model(smaller), model(placed.graph, placed.nodes)
    assert torch.allclose(found["user"][placed.users], whole["user"][task.users[index]], atol=1e-5)
    assert torch.allclose(found["item"][placed.items], whole["item"][task.items[index]], atol=1e-5)
    with torch.no_grad():
        told = model(graph)["user"][task.users[index]]
    assert not torch.allclose(found["user"][placed.users], told, atol=1e-3), "the whole graph would have told more"


def test_a_sampled_batch_without_shared_edges_loses_its_own_edges_alone():
    graph = graph_of(toy(), GraphSettings(attributes=()))
    task = LinkTask(FeatureExtractor(FeatureConfig.of(graph, **SHAPE)), graph, LinkSettings(negatives=4, batch="sampled", batch_size=9, fanout=(-1, -1)))
    index = task.batches(generator(0))[0]
    placed = task.place(index)
    small = placed.graph.relations
    dense, back = (small[r].to_torch().to_dense() for r in (BOUGHT, BOUGHT_BY))
    assert not dense[placed.items, placed.users].any() and not back[placed.users, placed.items].any()
    whole = graph.relations[BOUGHT].to_torch().to_dense()
    for user, position in zip(task.users[index].tolist(), placed.users.tolist(), strict=True):
        gone = int((task.users[index] == user).sum())
        assert int(back[position].bool().sum()) == int(whole[:, user].bool().sum()) - gone


def test_items_drawn_follow_popularity_for_the_softmax_and_are_even_for_bpr():
    graph = graph_of(toy(), GraphSettings(attributes=()))
    model = FeatureExtractor(FeatureConfig.of(graph, **SHAPE))
    degrees = graph.relations[BOUGHT].degrees.float()
    assert torch.allclose(LinkTask(model, graph, LinkSettings("softmax")).q, degrees**0.75 / (degrees**0.75).sum())
    assert LinkTask(model, graph, LinkSettings("bpr")).q[degrees > 0].unique().numel() == 1
    placed = LinkTask(model, graph, LinkSettings(negatives=11)).place(torch.arange(3))
    assert torch.allclose(placed.log_expected, (11 * LinkTask(model, graph).q[placed.drawn]).log())


def test_added_users_read_the_learned_vectors_of_their_sources():
    dataset = toy()
    graph = graph_of(dataset)
    labels, made = node_parts(dataset, graph)
    task = NodeTask(FeatureExtractor(FeatureConfig.of(graph, n_classes=2, **SHAPE)), graph, labels, made)
    for settings in (NodeSettings(), NodeSettings("sampled", 8, (3, 3))):
        task.settings = settings
        placed = task.place(made.train[-5:])
        assert placed.nodes["user"][placed.users].equal(made.sources[-5:]) and (placed.labels == 1).all()


# --- vectors


def test_sampled_neighbourhoods_that_take_all_give_the_whole_graphs_vectors():
    graph = graph_of(toy())
    torch.manual_seed(0)
    model = FeatureExtractor(FeatureConfig.of(graph, **SHAPE))
    whole, sampled = embed(model, graph), embed(model, graph, fanouts=(-1, -1), block=7)
    assert all(torch.allclose(whole[t], sampled[t], atol=1e-5) for t in ("user", "item"))
    fewer = embed(model, graph, fanouts=(2, 2), block=7)
    assert not torch.allclose(fewer["user"], whole["user"], atol=1e-3) and all(a.equal(b) for a, b in zip(fewer.values(), embed(model, graph, fanouts=(2, 2), block=7).values(), strict=True))


def test_a_saved_extractor_is_the_same_and_another_file_is_refused(tmp_path):
    graph = graph_of(toy(), users=False)
    model = FeatureExtractor(FeatureConfig.of(graph, **SHAPE)).eval()
    write_torch(tmp_path / "model.pt", model.state())
    again = FeatureExtractor.load(tmp_path / "model.pt")
    assert again.config == model.config and all(a.equal(b) for a, b in zip(embed(again, graph).values(), embed(model, graph).values(), strict=True))
    write_torch(tmp_path / "other.pt", {"config": {"width": 3}, "model": {}})
    for path, problem in ((tmp_path / "other.pt", "of another model"), (tmp_path / "none.pt", "none.pt")):
        with pytest.raises(InputError, match=problem):
            FeatureExtractor.load(path)


# --- training


def trained(kind, folder, epochs=3, log=None, **changes):
    dataset = toy(users=28)
    graph = graph_of(dataset, users=kind != "link sampled")
    settings = TrainSettings(**{"epochs": epochs, "learning_rate": 1e-2, "warmup_ratio": 0.3, "seed": 3, "device": "cpu", **changes})
    if kind.startswith("link"):
        objective = LinkSettings(negatives=8, batch=kind.split()[1], batch_size=24, fanout=(3, 3))
        return train_hgt(graph, SHAPE, objective, settings, cases_from_dataset(dataset, "valid"), folder=folder, log=log)
    labels, made = node_parts(dataset, graph)
    return train_hgt(graph, SHAPE, NodeSettings(kind.split()[1], 8, (3, 3)), settings, labels=labels, balanced=made, folder=folder, log=log)


@pytest.mark.parametrize("kind", ["link full", "link sampled", "node full", "node sampled"])
def test_an_interrupted_training_ends_as_an_undisturbed_one(kind, tmp_path, monkeypatch):
    whole = trained(kind, tmp_path / "whole")
    task, calls = (LinkTask if kind.startswith("link") else NodeTask), []
    loss = task.loss

    def breaks(self, model, batch):
        calls.append(1)
        if len(calls) == 8:
            raise ZeroDivisionError("the power went out")
        return loss(self, model, batch)

    monkeypatch.setattr(task, "loss", breaks)
    with pytest.raises(ZeroDivisionError):
        trained(kind, tmp_path / "broken", save_minutes=0.0)  # a checkpoint after every step
    monkeypatch.setattr(task, "loss", loss)
    resumed = trained(kind, tmp_path / "broken")
    assert resumed.resumed_from[1] > 0, "in the middle of an epoch"
    assert resumed.position.records == whole.position.records and resumed.best == whole.best
    for a, b in zip(whole.load_best().parameters(), resumed.load_best().parameters(), strict=True):
        assert a.equal(b)


def test_another_seed_or_graph_does_not_go_on_from_the_checkpoint(tmp_path):
    trained("link full", tmp_path, epochs=1)
    with pytest.raises(RunError, match="seed"):
        trained("link full", tmp_path, epochs=1, seed=4)


@pytest.mark.parametrize("kind", ["link full", "node full"])
def test_the_best_epoch_is_that_of_the_best_validation(kind, tmp_path):
    trainer = trained(kind, tmp_path, epochs=8)
    metric = "valid/item/filtered/ndcg@10" if kind == "link full" else "valid/roc"
    values = [r[metric] for r in trainer.position.records]
    assert trainer.settings.best_metric == metric and trainer.best.value == max(values) and trainer.best.epoch == 1 + values.index(max(values))
    assert not any("test" in k for r in trainer.position.records for k in r), "test is not looked at"
    found = trainer.task.evaluate(trainer.load_best())
    assert found[metric] == trainer.best.value


def test_links_are_learned():
    "Kinds of users and items agree: after training a user's ten best hold hardly any item of the other kind."
    dataset = toy(each=7)
    graph = graph_of(dataset, GraphSettings(attributes=()))
    shape = {**SHAPE, "hidden": 16, "dropout": 0.0}
    for loss in ("softmax", "bpr"):
        trainer = train_hgt(graph, shape, LinkSettings(loss, negatives=32), TrainSettings(epochs=20, learning_rate=1e-2, warmup_ratio=0.2, device="cpu"))
        vectors = embed(trainer.module, graph)
        best = (vectors["user"] @ vectors["item"].T).topk(10).indices
        assert ((best % 2) == (torch.arange(40) % 2)[:, None]).float().mean() > 0.9, loss
        assert trainer.position.records[-1]["loss"] < 0.8 * trainer.position.records[0]["loss"]


def test_labels_are_learned_from_the_graph():
    dataset = toy(users=84)
    people = dataset.users.assign(label=(dataset.users.user_id - 1) % 2)  # the kind, which only the items taken tell
    dataset.users = people
    graph = graph_of(dataset, GraphSettings(attributes=()))
    labels = read_labels(people, 84)
    made = balance(graph, labels, "origin")
    trainer = train_hgt(graph, {**SHAPE, "hidden": 16}, NodeSettings(), TrainSettings(epochs=40, learning_rate=1e-2, warmup_ratio=0.2, device="cpu"), labels=labels, balanced=made)
    test = labels.index("test")
    right = user_logits(trainer.module, graph)[test].argmax(1) == labels.label[test]
    assert right.float().mean() > 0.9


def test_the_originals_lines():
    assert epoch_line({"epoch": 1, "loss": 0.69314}, 20, ()) == "Epoch 1/20:  Train Loss: 0.6931"
    assert epoch_line({"epoch": 20, "loss": 0.5, "valid/loss": 0.25, "valid/roc": 0.75}, 20, ("valid/roc",)) == "Epoch 20/20:  Train Loss: 0.5000  Val Loss: 0.2500  roc: 0.7500"


def test_no_edges_no_training():
    dataset = toy()
    graph = graph_of(dataset, GraphSettings(attributes=()))
    graph.relations[BOUGHT] = graph.relations[BOUGHT].select(torch.zeros(graph.relations[BOUGHT].n_edges, dtype=torch.bool))
    with pytest.raises(InputError, match="no edges to predict"):
        LinkTask(FeatureExtractor(FeatureConfig.of(graph, **SHAPE)), graph)


# --- the stage


def stage_parameters(**changes):
    "An object with the parameters that the stage's functions ask for."
    from types import SimpleNamespace

    return SimpleNamespace(**{"embedding_column": "auto", "user_features": "auto", "drop_features": "", "attributes": "auto", "relations": "", "user_user": 0, "item_item": 0, "neighbours": 5, "objective": "auto", "data_path": "", **changes})


def with_features(features):
    dataset = toy(users=10)
    dataset.users = dataset.users.assign(features=features)
    return dataset


def test_user_features_are_standardised_without_the_dropped_columns():
    from recgen.stages.hgt import user_inputs

    dataset = with_features([[float(u), 1.0, float(u % 3)] for u in range(10)])
    x = user_inputs(dataset, "auto", [2])
    assert x.shape == (10, 2) and abs(float(x[:, 0].mean())) < 1e-6 and abs(float(x[:, 0].std(unbiased=False)) - 1) < 1e-5
    assert not x[:, 1].any(), "a constant column is 0, not NaN"
    assert user_inputs(dataset, "learned", []) is None and user_inputs(toy(), "auto", []) is None


@pytest.mark.parametrize(("features", "drop", "source", "problem"), [
    ([[1.0, 2.0]] * 9 + [[1.0, math.nan]], [], "auto", "NaN"),
    ([[1.0, 2.0]] * 9 + [[1.0]], [], "auto", "different lengths"),
    ([[float(u), 2.0] for u in range(10)], [2], "auto", "cannot be dropped"),
    ([[float(u), 2.0] for u in range(10)], [0, 1], "auto", "cannot be dropped"),
    (None, [], "features", "users have no features"),
])
def test_user_features_that_cannot_be_used_are_refused(features, drop, source, problem):
    from recgen.stages.hgt import user_inputs

    with pytest.raises(InputError, match=problem):
        user_inputs(with_features(features) if features else toy(users=10), source, drop)


def test_users_without_a_row_of_features_are_listed():
    from recgen.stages.hgt import user_inputs

    dataset = with_features([[float(u)] for u in range(10)])
    dataset.users = dataset.users.iloc[:-2]
    with pytest.raises(InputError, match="user 9, user 10"):
        user_inputs(dataset, "auto", [])


@pytest.mark.parametrize(("changes", "problem", "said"), [
    ({"relations": "item__also_bought__item"}, "no such relation", "item__also_bought__item"),
    ({"attributes": "colour"}, "no such column", "colour"),
    ({"drop_features": "one"}, "lists whole numbers", "one"),
])
def test_a_graph_that_cannot_be_made_is_refused(changes, problem, said):
    from recgen.stages.hgt import Inputs, build_graph

    with pytest.raises(InputError) as e:
        build_graph(Inputs(toy(users=10)), stage_parameters(**changes))
    assert problem in str(e.value) and said in str(e.value)


def test_leaky_relations_and_vectors_are_marked_and_vectors_of_other_rows_refused(tmp_path):
    from recgen.evaluation.protocol import LeakageError
    from recgen.formats.provenance import Provenance
    from recgen.stages.hgt import Inputs, build_graph, deciding, input_paths

    dataset = toy(users=10)
    also = pd.DataFrame({"source": [1, 2], "target": [3, 4]})
    assert "also_bought" in build_graph(Inputs(dataset, relations={"item__also_bought__item": also}), stage_parameters(relations="item__also_bought__item")).leaky
    assert build_graph(Inputs(dataset), stage_parameters()).leaky == ""
    vectors = torch.randn(dataset.n_items, 4, generator=generator(0))
    pd.DataFrame({"ItemID": dataset.items.item_id, "embedding": list(vectors.numpy())}).to_parquet(tmp_path / "item_emb.parquet")
    p = stage_parameters(embedding_column=f"{tmp_path}:embedding")
    for train_hash, leaky in ((dataset.train_hash, ["co_view"]), ("0123", [])):
        Provenance({"02_graphsage": train_hash}, leaky).write(tmp_path)
        if leaky:
            graph = build_graph(Inputs(dataset), p)
            assert graph.leaky == "co_view" and graph.features["item"].shape == (dataset.n_items, 4)
        else:
            with pytest.raises(LeakageError, match="02_graphsage"):
                build_graph(Inputs(dataset), p)
    assert input_paths(p) == {"embedding_column 0": tmp_path}
    p.as_dict = lambda: vars(p)
    assert deciding(p, "link")["embedding_column"] == "0:embedding", "what, not where, decides a run"


def test_the_objective_follows_the_labels():
    from recgen.stages.hgt import choose_objective, user_labels

    dataset = toy()
    assert choose_objective(stage_parameters(), dataset) == "node" and choose_objective(stage_parameters(objective="link"), dataset) == "link"
    dataset.users = dataset.users.drop(columns="label")
    assert choose_objective(stage_parameters(), dataset) == "link"
    with pytest.raises(InputError, match="label"):
        user_labels(dataset)
    dataset.users = None
    with pytest.raises(InputError, match="needs labels of users"):
        user_labels(dataset)


def test_results_are_appended_and_another_table_is_left_alone(tmp_path):
    from recgen.evaluation.classification import BINARY
    from recgen.stages.hgt import append_results, mean_and_spread

    path = tmp_path / "results.csv"
    row = {"method": "smote", "seed": 10, "ratio": 0.1007, **{k: 0.5 for k in BINARY}}
    append_results(path, [row])
    append_results(path, [{**row, "seed": 11, "roc": 0.7}])
    lines = path.read_text().splitlines()
    assert lines[0] == "method,seed,ratio,prc,roc,f1,precision,recall,acc" and lines[2] == "smote,11,0.1007,0.5,0.7,0.5,0.5,0.5,0.5" and len(lines) == 3
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="other columns"):
        append_results(path, [row])
    assert path.read_text() == "a,b\n1,2\n"
    found = mean_and_spread([{"roc": 0.5}, {"roc": 0.7}])
    assert found["roc"] == pytest.approx(0.6) and found["roc/sd"] == pytest.approx(0.02**0.5)
    assert mean_and_spread([{"roc": 0.5}]) == {"roc": 0.5}


# --- ACM


def test_the_acm_graph_is_read_and_what_does_not_fit_is_refused(tmp_path):
    import numpy as np
    import scipy.sparse as sp

    from recgen.graph.acm import read_acm

    sp.save_npz(tmp_path / "p_feat.npz", sp.csr_matrix(np.array([[0.5, 0, 0.5], [0, 1, 0]])))
    np.save(tmp_path / "labels.npy", np.array([2.0, 0.0]))
    np.savetxt(tmp_path / "pa.txt", [[0, 0], [0, 2], [1, 2]], fmt="%d")
    np.savetxt(tmp_path / "ps.txt", [[0, 1], [1, 0]], fmt="%d")
    for s in ("train", "val", "test"):
        np.save(tmp_path / f"{s}_20.npy", np.array([1]))
    acm = read_acm(tmp_path)
    assert acm.graph.n_nodes == {"paper": 2, "author": 3, "subject": 2} and acm.labels.tolist() == [2, 0] and list(acm.splits) == [20]
    assert acm.graph.relations["author", "author_of", "paper"].to_torch().to_dense().tolist() == [[1, 0, 1], [0, 0, 1]]
    assert acm.graph.features["paper"].tolist() == [[1, 0, 1], [0, 1, 0]]
    np.savetxt(tmp_path / "ps.txt", [[0, 1], [2, 0]], fmt="%d")
    with pytest.raises(InputError, match="outside the graph"):
        read_acm(tmp_path)
    (tmp_path / "pa.txt").unlink()
    with pytest.raises(InputError, match="pa.txt"):
        read_acm(tmp_path)


def test_the_real_acm_graph(data):
    from recgen.graph.acm import read_acm

    acm = read_acm(data / "acm")
    assert acm.graph.n_nodes["paper"] == 4019 and acm.labels.bincount().tolist() == acm.labels.bincount(minlength=3).tolist()
    assert {r[1]: e.n_edges for r, e in acm.graph.relations.items()} == {"has_author": 13407, "author_of": 13407, "has_subject": 4019, "subject_of": 4019}
    for k, parts in acm.splits.items():
        assert acm.labels[parts[0]].bincount().tolist() == [k] * 3 and len(torch.cat(parts).unique()) == sum(map(len, parts)), "splits do not overlap"


def test_our_transformer_is_torch_geometrics_with_its_weights():
    "The study's peer and ours compute the same where the weights are the same."
    pytest.importorskip("torch_geometric")
    from recgen.graph.acm import Ours, Peer, make_acm

    acm = make_acm()
    torch.manual_seed(0)
    ours, peer = Ours(acm, 8, 2, 2, 0.0).eval(), Peer(acm, 8, 2, 2, 0.0).eval()
    names = ours.model.types
    with torch.no_grad():
        peer.adapter.load_state_dict(ours.model.inputs[names.index("paper")].state_dict())
        for t in peer.learned:
            peer.learned[t].copy_(ours.model.inputs[names.index(t)].weight)
        peer.head.load_state_dict(ours.model.head.state_dict())
        for layer, conv, norm in zip(ours.model.layers, peer.layers, peer.norms, strict=True):
            for i, t in enumerate(names):
                w, b = layer.project[i].weight.chunk(3), layer.project[i].bias.chunk(3)
                conv.kqv_lin.lins[t].weight.copy_(torch.cat([w[1], w[0], w[2]]))
                conv.kqv_lin.lins[t].bias.copy_(torch.cat([b[1], b[0], b[2]]))
                conv.out_lin.lins[t].load_state_dict(layer.output[i].state_dict())
                conv.skip[t].copy_(layer.skip[i])
                norm[t].load_state_dict(layer.norm[i].state_dict())
            for i, r in enumerate(ours.model.relations):
                conv.p_rel["__".join(r)].copy_(layer.mu[i][None])
                place = conv.edge_types_map[r]
                for h in range(2):
                    for weight, theirs in ((layer.w_att, conv.k_rel), (layer.w_msg, conv.v_rel)):
                        theirs.weight[h * len(ours.model.relations) + place].copy_(weight[i, h])
        assert torch.allclose(ours(acm.graph), peer(acm.graph), atol=1e-5)
