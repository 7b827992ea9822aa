"""HGT against a loop over nodes, against torch-geometric's HGTConv, by both paths; graphs that lack something; the original's size."""
import math

import pytest
import torch
import torch.nn.functional as F

from recgen.core.errors import InputError
from recgen.graph.hetero import Csr, HeteroGraph
from recgen.graph.hgt import HGT, GatedResidual, HGTConfig, HGTLayer, attention_plan, keep_mask

N = {"user": 12, "item": 9, "brand": 4, "shop": 3}
ENDS = {("user", "bought", "item"): 30, ("item", "bought_by", "user"): 30, ("item", "like", "item"): 14, ("brand", "of", "item"): 9, ("item", "has", "brand"): 8, ("shop", "sells", "item"): 5}


def drawn_graph(seed=0, relations=None, features=("user", "item")):
    "Four types, six relations; shops send only; some nodes hear nothing."
    draws, edges = torch.Generator().manual_seed(seed), {}
    for (source, name, target), e in (relations or ENDS).items():
        cells = torch.randperm(N[source] * N[target], generator=draws)[:e]
        edges[source, name, target] = Csr.from_edges(cells // N[source], cells % N[source], N[target], N[source])
    return HeteroGraph(dict(N), edges, {t: torch.randn(N[t], 6, generator=draws) for t in features})


def drawn_layer(attention="cross", seed=0, dtype=torch.float64, graph=None):
    "A layer whose μ, gates and biases are not what they begin as."
    graph = graph or drawn_graph()
    torch.manual_seed(seed)
    layer = HGTLayer(HGTConfig(hidden=8, n_heads=2, attention=attention), list(N), list(graph.relations)).to(dtype).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.5 * torch.randn_like(p))
    states = {t: torch.randn(n, 8, dtype=dtype).requires_grad_() for t, n in N.items()}
    return graph, layer, states


def by_loops(graph, layer, states):
    "The paper's equations, one node and one edge after the other."
    hidden, heads = layer.config.hidden, layer.config.n_heads
    d, out, place = hidden // heads, dict(states), {t: i for i, t in enumerate(layer.types)}
    parts = {t: [x.view(-1, heads, d) for x in layer.project[place[t]](x).split(hidden, 1)] for t, x in states.items()}
    for target in dict.fromkeys(r[2] for r in graph.relations):
        messages = []
        for node in range(N[target]):
            groups, heard = [], []
            for relation in graph.into(target):
                csr, r = graph.relations[relation], layer.relations.index(relation)
                for source in csr.columns[csr.offsets[node] : csr.offsets[node + 1]].tolist():
                    key = torch.einsum("hd,hde->he", parts[relation[0]][1][source], layer.w_att[r])
                    score = (key * parts[target][0][node]).sum(1) * layer.mu[r] / math.sqrt(d)
                    heard.append((score, torch.einsum("hd,hde->he", parts[relation[0]][2][source], layer.w_msg[r])))
                if layer.config.attention == "per_relation":
                    groups.append(heard)
                    heard = []
            groups = groups or [heard]
            zero = torch.zeros(heads, d, dtype=layer.mu.dtype)
            softened = [sum(a[:, None] * m for a, (_, m) in zip(torch.stack([s for s, _ in g]).softmax(0), g, strict=True)) if g else zero for g in groups]
            messages.append(sum(softened).flatten() / len(groups))
        i = place[target]
        gate = layer.skip[i].sigmoid()
        out[target] = layer.norm[i](gate * layer.output[i](F.gelu(torch.stack(messages))) + (1 - gate) * states[target])
    return out


def total(states, seed=5):
    draws = torch.Generator().manual_seed(seed)
    return sum((x * torch.randn(x.shape, generator=draws, dtype=x.dtype)).sum() for x in states.values())


@pytest.mark.parametrize("attention", ["cross", "per_relation"])
@pytest.mark.parametrize("reference", [True, False])
def test_layer_against_loops(attention, reference):
    graph, layer, states = drawn_layer(attention)
    found, expected = layer(states, attention_plan(graph, attention), reference), by_loops(graph, layer, states)
    assert all(found[t].allclose(expected[t], atol=1e-9) for t in N) and found["shop"] is states["shop"]
    inputs = [*states.values(), *layer.parameters()]
    for a, b, name in zip(*(torch.autograd.grad(total(x), inputs, allow_unused=True, materialize_grads=True) for x in (found, expected)), [*states, *dict(layer.named_parameters())], strict=True):
        assert a.allclose(b, atol=1e-9), name
    assert not expected["item"].allclose(by_loops(graph, drawn_layer("per_relation" if attention == "cross" else "cross")[1], states)["item"])  # the two attentions differ


@pytest.mark.parametrize("attention", ["cross", "per_relation"])
def test_single_precision(attention):
    graph, layer, states = drawn_layer(attention, dtype=torch.float32)
    inputs = [*states.values(), layer.w_att, layer.w_msg, layer.mu, *layer.project.parameters()]
    results = []
    for reference in (True, False):
        out = layer(states, attention_plan(graph, attention), reference)
        results.append([*out.values(), *torch.autograd.grad(total(out), inputs, allow_unused=True, materialize_grads=True)])
    for expected, found in zip(*results, strict=True):
        assert (found - expected).abs().max().item() <= 2e-6 * max(1.0, expected.abs().max().item())


def test_the_same_as_torch_geometric():
    "HGTConv's softmax is over all relations too; it has neither dropout nor norm."
    conv_type = pytest.importorskip("torch_geometric.nn").HGTConv
    torch.manual_seed(1)
    graph, layer, states = drawn_layer(dtype=torch.float32)
    conv = conv_type(8, 8, (list(N), list(graph.relations)), heads=2)
    with torch.no_grad():
        for p in conv.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for i, t in enumerate(N):
            lin = conv.kqv_lin.lins[t]
            k, q, v = zip(lin.weight.split(8), lin.bias.split(8), strict=True)
            layer.project[i].weight.copy_(torch.cat([q[0], k[0], v[0]]))
            layer.project[i].bias.copy_(torch.cat([q[1], k[1], v[1]]))
            layer.output[i].load_state_dict(conv.out_lin.lins[t].state_dict())
            layer.skip[i].copy_(conv.skip[t])
        for i, r in enumerate(graph.relations):
            for h in range(2):
                layer.w_att[i, h], layer.w_msg[i, h] = (w.weight[h * len(graph.relations) + i] for w in (conv.k_rel, conv.v_rel))
            layer.mu[i] = conv.p_rel["__".join(r)][0]
    layer.norm = torch.nn.ModuleList(torch.nn.Identity() for _ in N)
    found, expected = layer(states, attention_plan(graph)), conv(states, {r: e.edge_index() for r, e in graph.relations.items()})
    for t in ("user", "item", "brand"):
        assert found[t].allclose(expected[t], atol=2e-6)
    assert expected.get("shop") is None and found["shop"] is states["shop"]
    ours, theirs = (torch.autograd.grad(sum(x[t].square().sum() for t in ("user", "item", "brand")), list(states.values())) for x in (found, expected))
    assert all(a.allclose(b, atol=2e-5) for a, b in zip(ours, theirs, strict=True))


def test_parameter_count_of_the_original():
    relations = [("user", "a", "product"), ("product", "b", "user"), ("user", "c", "user"), ("product", "d", "product")]
    model = HGT(HGTConfig(attention="per_relation", n_classes=2), {"user": 23, "product": 23}, {}, relations)
    assert sum(p.numel() for p in model.parameters()) == 1_329_702


def test_model_trains_and_repeats():
    graph = drawn_graph()
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        model = HGT.for_graph(HGTConfig(hidden=16, n_heads=4, n_classes=3), graph)
        optimizer, labels, run = torch.optim.AdamW(model.parameters(), lr=0.01), torch.arange(12) % 3, []
        for _ in range(60):
            loss = F.cross_entropy(model.classify(model(graph)["user"]), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(run)
    assert losses[0] == losses[1] and losses[0][-1] < 0.5 * losses[0][0]


def test_graphs_that_lack_something():
    graph = drawn_graph()
    torch.manual_seed(0)
    model = HGT.for_graph(HGTConfig(hidden=16), graph).eval()
    without = HeteroGraph({t: N[t] for t in ("user", "item")}, {r: e for r, e in graph.relations.items() if r == ("user", "bought", "item")}, graph.features)
    out = model(without)
    assert set(out) == {"user", "item"} and out["user"].equal(model.first_state("user", N["user"], graph.features, {}))  # users hear nothing here: their state stays
    empty = HeteroGraph({"user": 2}, {}, {"user": graph.features["user"][:2]})
    assert model(empty)["user"].equal(out["user"][:2])
    lonely = HeteroGraph({"user": 1, "item": 1}, {("user", "bought", "item"): Csr.from_edges([], [], 1, 1)}, {t: graph.features[t][:1] for t in ("user", "item")})
    for reference in (True, False):
        out = model(lonely, reference=reference)["item"]
        assert torch.isfinite(out).all()
        model.zero_grad()
        out.sum().backward()
    nobody = HeteroGraph({"user": 0, "item": 0}, {("user", "bought", "item"): Csr.from_edges([], [], 0, 0)}, {t: graph.features[t][:0] for t in ("user", "item")})
    assert model(nobody)["item"].shape == (0, 16)


def test_nodes_hear_only_their_neighbours():
    "Two layers: what lies further than two edges away changes nothing."
    line = HeteroGraph({"n": 6}, {("n", "next", "n"): Csr.from_edges([1, 2, 3, 4, 5], [0, 1, 2, 3, 4], 6, 6)}, {"n": torch.randn(6, 4, generator=torch.Generator().manual_seed(0))})
    torch.manual_seed(0)
    model = HGT.for_graph(HGTConfig(hidden=8, n_layers=2), line).eval()
    changed = {"n": line.features["n"].clone()}
    changed["n"][0] += 1
    same = (model(line)["n"] - model(line, changed)["n"]).abs().amax(1) == 0
    assert same.tolist() == [False, False, False, True, True, True]


def test_parts_of_a_graph_take_their_rows_of_learned_vectors():
    graph = drawn_graph(features=())
    torch.manual_seed(0)
    model = HGT.for_graph(HGTConfig(hidden=8), graph).eval()
    nodes = {t: torch.randperm(n, generator=torch.Generator().manual_seed(1)) for t, n in N.items()}
    back = {t: p.argsort() for t, p in nodes.items()}
    renamed = {r: Csr.from_edges(back[r[2]][e.rows.long()], back[r[0]][e.columns.long()], e.n_rows, e.n_columns) for r, e in graph.relations.items()}
    whole, part = model(graph), model(HeteroGraph(dict(N), renamed), nodes=nodes)
    assert all(part[t].allclose(whole[t][nodes[t]], atol=1e-5) for t in N)
    with pytest.raises(InputError, match="learned vectors"):
        model(HeteroGraph({"user": 3}, {}))


def test_a_changed_graph_gets_another_plan():
    graph = drawn_graph()
    first = attention_plan(graph)
    assert attention_plan(graph) is first and attention_plan(graph, "per_relation") is not first
    relation = ("item", "like", "item")
    graph.relations[relation] = graph.relations[relation].select(torch.arange(14) < 3)
    second = attention_plan(graph)
    assert second is not first and sum(g.csr.n_edges for g in first.groups) - sum(g.csr.n_edges for g in second.groups) == 11


def test_awkward_names():
    graph = HeteroGraph({"type": 2, "a.b": 2, "a_b": 2}, {("type", "keys", "a.b"): Csr.from_edges([0], [1], 2, 2), ("a.b", "", "a_b"): Csr.from_edges([1], [0], 2, 2)})
    model = HGT.for_graph(HGTConfig(hidden=8), graph)
    again = HGT.for_graph(HGTConfig(hidden=8), graph)
    again.load_state_dict(model.state_dict())
    assert all(a.equal(b) for a, b in zip(model.eval()(graph).values(), again.eval()(graph).values(), strict=True))


def test_dropout_and_gate():
    torch.manual_seed(0)
    assert abs(keep_mask(torch.empty(1001, 999), 0.2).double().mean() - 0.8) < 0.002
    update, state, gate = (torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((50, 4), (50, 4), (1,)))
    torch.manual_seed(3)
    out = GatedResidual.apply(update, state, gate, 0.3)
    torch.manual_seed(3)
    keep = keep_mask(update, 0.3)
    plain = gate * update * keep / 0.7 + (1 - gate) * state
    assert out.allclose(plain)
    for a, b in zip(torch.autograd.grad(out.square().sum(), [update, state, gate]), torch.autograd.grad(plain.square().sum(), [update, state, gate]), strict=True):
        assert a.allclose(b)


def test_bfloat16_autocast_keeps_sums_in_float32():
    graph = drawn_graph()
    torch.manual_seed(0)
    model = HGT.for_graph(HGTConfig(hidden=16), graph).eval()
    for reference in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            half = model(graph, reference=reference)
            total(half).backward()
        assert all(x.dtype == torch.float32 for x in half.values())
    assert all((half[t] - x).abs().max() < 0.1 for t, x in model(graph).items())


@pytest.mark.parametrize("change", [{"attention": "some"}, {"hidden": 10}, {"n_layers": 0}, {"dropout": 1.0}, {"n_classes": -1}])
def test_models_that_there_are_not(change):
    with pytest.raises(InputError):
        HGT.for_graph(HGTConfig(**change), drawn_graph())


def test_graphs_that_do_not_fit():
    graph = drawn_graph()
    model = HGT.for_graph(HGTConfig(hidden=8), graph)
    for other, words in ((HeteroGraph({"user": 12, "page": 1}, {}, graph.features), "type of node"), (HeteroGraph({"user": 12}, {}), "features do not fit"),
                         (HeteroGraph(dict(N), {("user", "saw", "item"): Csr.from_edges([0], [0], 9, 12)}, graph.features), "relation")):
        with pytest.raises(InputError, match=words):
            model(other)
    with pytest.raises(InputError, match="classifier"):
        model.classify(torch.zeros(1, 8))
    with pytest.raises(InputError, match="leads to a type"):
        HGT(HGTConfig(hidden=8), {"user": 3}, {}, [("user", "x", "item")])
