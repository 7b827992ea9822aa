"Negative nodes: their law, what is left out of a row, and what is refused."
import pytest
import torch
from scipy.stats import chisquare

from recgen.core.errors import InputError, ParameterError
from recgen.graph.hetero import Csr
from recgen.graph.negatives import DegreeBiasedNegativeSampler, degrees_of, line_of_weights

N = 12


def edges(seed=0, n=N - 2, m=60):
    "The last two nodes have no edge; low numbers have more than high ones."
    draws = torch.Generator().manual_seed(seed)
    return (n * torch.rand(2, m, generator=draws) ** 2).long()


def assert_law(nodes, law):
    counts = torch.bincount(nodes.flatten(), minlength=len(law)).double()
    assert (counts[law == 0] == 0).all()
    there = law > 0
    assert chisquare(counts[there], law[there] / law.sum() * counts.sum()).pvalue > 1e-4


@pytest.mark.parametrize("exponent", [0, 0.75, 1, 2])
def test_law_is_degree_to_the_exponent(exponent):
    e = edges()
    degrees = torch.bincount(e.flatten(), minlength=N).double()
    law = torch.where(degrees > 0, degrees**exponent, 0)
    sampler = DegreeBiasedNegativeSampler(e, N, "cpu", exponent)
    assert_law(sampler.sample(100_000, generator=torch.Generator().manual_seed(1)), law)
    assert torch.allclose(sampler.probabilities, law / law.sum(), atol=1e-12)


def test_the_default_is_three_quarters_and_the_test_sees_another():
    sampler = DegreeBiasedNegativeSampler(edges(), N)
    degrees = torch.bincount(edges().flatten(), minlength=N).double()
    found = sampler.sample((20_000, 5), generator=torch.Generator().manual_seed(0))
    assert found.shape == (20_000, 5) and found.dtype == torch.int64
    assert_law(found, degrees**0.75 * (degrees > 0))
    with pytest.raises(AssertionError):
        assert_law(found, degrees**0.7 * (degrees > 0))


@pytest.mark.parametrize(("target", "context"), [(0, 1), (5, 0), (3, 3), (0, 11), (9, 10)])
def test_the_pair_is_left_out_and_the_rest_keeps_its_law(target, context):
    sampler = DegreeBiasedNegativeSampler(edges(), N)
    law = sampler.probabilities.clone()
    law[[target, context]] = 0
    pair = [torch.full((30_000,), v) for v in (target, context)]
    assert_law(sampler.sample((30_000, 3), *pair, torch.Generator().manual_seed(2)), law)
    only = sampler.probabilities.clone()
    only[context] = 0
    assert_law(sampler.sample(3, contexts=pair[1], generator=torch.Generator().manual_seed(2)), only)
    assert_law(sampler.sample((30_000, 3), *pair, torch.Generator().manual_seed(2), allow_pair=True), sampler.probabilities)


def test_rows_have_their_own_pairs():
    sampler = DegreeBiasedNegativeSampler(edges(), N)
    targets, contexts = torch.randint(N, (2, 5000), generator=torch.Generator().manual_seed(3))
    found = sampler.sample((5000, 8), targets, contexts, torch.Generator().manual_seed(4))
    assert not (found == targets[:, None]).any() and not (found == contexts[:, None]).any()


def test_an_overwhelming_hub_is_left_out_exactly():
    hub = torch.stack([torch.zeros(100_000, dtype=torch.int64), 1 + torch.arange(100_000) % 3])
    sampler = DegreeBiasedNegativeSampler(hub, 4, exponent=4)
    found = sampler.sample((3000, 4), torch.zeros(3000, dtype=torch.int64), generator=torch.Generator().manual_seed(0))
    assert_law(found, torch.tensor([0, 1, 1, 1]).double())


def test_whole_numbers_add_up_and_keep_the_smallest():
    ends = line_of_weights(torch.tensor([1e-30, 0.0, 1.0, 1e12]))
    assert ends.dtype == torch.int64 and ends.diff()[1] == 0 and (ends.diff()[[0, 2, 3]] > 0).all() and abs(int(ends[-1]) - 2**52) < 8


def test_csr_and_edge_index_agree_and_smoothing_reaches_all():
    e = edges().unique(dim=1)
    csr = Csr.from_edges(e[1], e[0], N, N)
    one, two = DegreeBiasedNegativeSampler(e, N), DegreeBiasedNegativeSampler(csr, N)
    assert one.ends.equal(two.ends) and one.probabilities[-1] == 0
    smooth = DegreeBiasedNegativeSampler(csr, N, smoothing=1)
    assert (smooth.probabilities > 0).all()
    assert_law(smooth.sample(50_000, generator=torch.Generator().manual_seed(0)), (degrees_of(e, N) + 1.0).double() ** 0.75)


def test_same_generator_same_negatives():
    sampler = DegreeBiasedNegativeSampler(edges(), N)
    a, b, c = (sampler.sample((9, 5), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert a.equal(b) and not a.equal(c) and sampler.sample(7).shape == (7,)


def test_what_is_refused():
    with pytest.raises(InputError, match="num_nodes"):
        DegreeBiasedNegativeSampler(edges(), 5)
    with pytest.raises(InputError, match="outside the graph"):
        DegreeBiasedNegativeSampler(torch.tensor([[0], [-1]]), 5)
    with pytest.raises(InputError, match="no edges"):
        DegreeBiasedNegativeSampler(torch.empty(2, 0, dtype=torch.int64), 5)
    with pytest.raises(InputError, match="two rows|sources, targets"):
        DegreeBiasedNegativeSampler(torch.zeros(5, 2, dtype=torch.int64), 5)
    with pytest.raises(ParameterError, match="exponent"):
        DegreeBiasedNegativeSampler(edges(), N, exponent=-1)
    sampler = DegreeBiasedNegativeSampler(edges(), N)
    with pytest.raises(InputError, match="(?s)different devices.*meta and cpu"):
        sampler.sample((3, 2), torch.zeros(3, dtype=torch.int64, device="meta"))
    for targets in (torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, N])):
        with pytest.raises(InputError, match="a node for each row"):
            sampler.sample((3, 2), targets)


def test_graphs_without_another_node():
    two = DegreeBiasedNegativeSampler(torch.tensor([[0], [1]]), 3)
    assert (two.sample((2, 9), torch.tensor([0, 1]), generator=torch.Generator().manual_seed(0)) == torch.tensor([[1], [0]])).all()
    with pytest.raises(InputError, match="(?s)nothing is left.*rows: +1"):
        two.sample((2, 9), torch.tensor([0, 1]), torch.tensor([0, 0]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_on_cuda():
    sampler = DegreeBiasedNegativeSampler(edges(), N, device="cuda")
    found = sampler.sample((30_000, 3), torch.zeros(30_000, dtype=torch.int64, device="cuda"), generator=torch.Generator().manual_seed(0))
    law = sampler.probabilities.cpu()
    law[0] = 0
    assert_law(found.cpu(), law)
    with pytest.raises(InputError, match="different devices"):
        sampler.sample((3, 2), torch.zeros(3, dtype=torch.int64))
