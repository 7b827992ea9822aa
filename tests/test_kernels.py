"""Sparse products against plain loops over nodes and against the gathers: values, gradients, and graphs with little in them."""
import pytest
import torch

from recgen.graph.hetero import Csr
from recgen.graph.kernels import attention, edge_dots, mean_propagate, propagate, segment_softmax, sparse_path, stack_relations

GRAPHS = {"usual": (40, 30, 300), "empty rows": (60, 30, 25), "no edges": (5, 4, 0), "one node": (1, 1, 1), "one node alone": (1, 1, 0), "no targets": (0, 3, 0), "one hub": (3, 200, 350)}


def drawn_graph(n_rows, n_columns, n_edges, seed=0):
    "Distinct random edges, with weights."
    draws = torch.Generator().manual_seed(seed)
    cells = torch.randperm(n_rows * n_columns, generator=draws)[:n_edges]
    return Csr.from_edges(cells // max(1, n_columns), cells % max(1, n_columns), n_rows, n_columns, torch.rand(len(cells), generator=draws) + 0.1)


def drawn(*shape, seed=0, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale).requires_grad_()


def neighbours(csr, row):
    begin, end = csr.offsets[row : row + 2].tolist()
    return slice(begin, end), csr.columns[begin:end].long()


def error(a, b):
    "Largest difference, relative to the scale of b."
    return float((a - b).abs().max() / b.abs().max().clamp(min=0.1)) if b.numel() else float(a.numel())


def compare(function, inputs, seed=9):
    "Outputs and gradients of function(reference=…) by both paths: largest relative difference."
    found = []
    for reference in (True, False):
        out = function(*inputs, reference=reference)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
        found.append([out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)])
    return max(error(a, b) for a, b in zip(*reversed(found), strict=True))


@pytest.mark.parametrize("name", GRAPHS)
def test_paths_agree_with_each_other(name):
    csr = drawn_graph(*GRAPHS[name])
    e, r, c = csr.n_edges, csr.n_rows, csr.n_columns
    assert sparse_path(csr, torch.zeros(1)) == torch.backends.mkl.is_available()
    x, values = drawn(c, 16), drawn(e, seed=1)
    assert compare(lambda x, w, reference: propagate(csr, x, w, reference), [x, values]) < 2e-6
    assert compare(lambda x, reference: propagate(csr, x, None, reference), [x]) < 2e-6
    assert compare(lambda x, reference: mean_propagate(csr, x, reference), [x]) < 2e-6
    assert compare(lambda s, reference: segment_softmax(s, csr.offsets, reference), [drawn(e, 3, scale=4)]) < 2e-6
    q, k, v, bias = drawn(r, 4, 8), drawn(c, 4, 8, seed=1), drawn(c, 4, 8, seed=2), drawn(e, 4, seed=3)
    assert compare(lambda q, k, v, reference: attention(csr, q, k, v, None, reference), [q, k, v]) < 2e-6
    assert compare(lambda q, k, v, b, reference: attention(csr, q, k, v, b, reference), [q, k, v, bias]) < 2e-6


@pytest.mark.parametrize("reference", [True, False])
def test_against_loops_over_nodes(reference):
    csr = drawn_graph(20, 15, 60, seed=2)
    q, k, v, bias = (x.detach() for x in (drawn(20, 2, 5), drawn(15, 2, 5, seed=1), drawn(15, 2, 5, seed=2), drawn(60, 2, seed=3)))
    summed, mean, attended = propagate(csr, v[:, 0], reference=reference), mean_propagate(csr, v[:, 0], reference), attention(csr, q, k, v, bias, reference)
    shares = segment_softmax(bias, csr.offsets, reference)
    for row in range(20):
        edges, sources = neighbours(csr, row)
        zero = torch.zeros(5)
        assert summed[row].allclose((csr.values[edges, None] * v[sources, 0]).sum(0), atol=1e-6)
        assert mean[row].allclose(v[sources, 0].mean(0) if len(sources) else zero, atol=1e-6)
        assert shares[edges].allclose(bias[edges].softmax(0), atol=1e-6)
        for h in range(2):
            a = (k[sources, h] @ q[row, h] + bias[edges, h]).softmax(0)
            assert attended[row, h].allclose(a @ v[sources, h] if len(sources) else zero, atol=1e-5)


@pytest.mark.parametrize("reference", [True, False])
def test_gradients_against_finite_differences(reference):
    csr = drawn_graph(6, 5, 12, seed=3)
    double = {"dtype": torch.float64}
    assert torch.autograd.gradcheck(lambda x, w: propagate(csr, x, w, reference), (drawn(5, 3, **double), drawn(12, **double)))
    assert torch.autograd.gradcheck(lambda x: mean_propagate(csr, x, reference), (drawn(5, 3, **double),))
    assert torch.autograd.gradcheck(lambda s: segment_softmax(s, csr.offsets, reference), (drawn(12, 2, **double),))
    inputs = (drawn(6, 2, 3, **double), drawn(5, 2, 3, seed=1, **double), drawn(5, 2, 3, seed=2, **double), drawn(12, 2, seed=3, **double))
    assert torch.autograd.gradcheck(lambda *a: attention(csr, *a, reference), inputs)


def test_no_tensor_holds_a_vector_for_every_edge():
    "What autograd keeps and makes has at most a number an edge and head."
    from torch.utils._python_dispatch import TorchDispatchMode

    csr, largest = drawn_graph(50, 40, 1500), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor) and x.layout == torch.strided)
            return out

    q, k, v = drawn(50, 2, 32), drawn(40, 2, 32, seed=1), drawn(40, 2, 32, seed=2)
    for reference, least, most in ((False, 1, 1500 * 4), (True, 1500 * 64, 1500 * 1000)):
        largest.clear()
        with Sizes():
            attention(csr, q, k, v, reference=reference).sum().backward()
        assert least <= max(largest) <= most


def test_large_scores_do_not_overflow():
    csr = drawn_graph(20, 15, 60)
    q, k, v = drawn(20, 1, 4, scale=300), drawn(15, 1, 4, seed=1, scale=300), drawn(15, 1, 4, seed=2)
    out = attention(csr, q, k, v, reference=False)
    out.sum().backward()
    assert all(torch.isfinite(x).all() for x in (out, q.grad, k.grad, v.grad))


def test_half_precision_is_summed_in_float32():
    csr = Csr.from_edges(torch.zeros(1000, dtype=torch.int64), torch.arange(1000), 1, 1000)
    ones = torch.ones(1000, 2, dtype=torch.bfloat16)
    assert propagate(csr, ones).tolist() == [[1000.0, 1000.0]]  # bfloat16 stops counting at 256
    assert attention(csr, ones[:1, None], ones[:, None], ones[:, None]).dtype == torch.float32


@pytest.mark.parametrize("reference", [True, False])
def test_gradients_only_where_they_are_asked_for(reference):
    csr = drawn_graph(20, 15, 60)
    x, values = drawn(15, 4), drawn(60, seed=1)
    propagate(csr, x, values.detach(), reference).sum().backward()
    expected = torch.zeros(15).index_add(0, csr.columns.long(), values.detach())
    assert x.grad.allclose(expected[:, None].expand(15, 4), atol=1e-5) and values.grad is None
    propagate(csr, x.detach(), values, reference).sum().backward()
    assert values.grad.allclose(x.detach().sum(1)[csr.columns.long()], atol=1e-5)


def test_dots_of_edges():
    csr = drawn_graph(20, 15, 60)
    q, k = drawn(20, 7).detach(), drawn(15, 7, seed=1).detach()
    assert edge_dots(csr, q, k).allclose((q @ k.T)[csr.rows.long(), csr.columns.long()], atol=1e-5)


def test_stacked_relations_keep_every_edge():
    parts = [drawn_graph(30, n, e, seed=n) for n, e in ((20, 100), (7, 0), (15, 60))]
    whole = stack_relations(parts)
    assert whole.to_torch(torch.ones(160)).to_dense().equal(torch.cat([p.to_torch(torch.ones(p.n_edges)).to_dense() for p in parts], 1))
    assert whole.columns.dtype == torch.int32 and stack_relations(parts[:1]) is parts[0]
