"""Hand-worked values, float64 gradient checks, limits."""

import math

import torch

from trl.losses.sft import LOSSES, dft, nll
from trl.losses.tokens import largest, mean_metric, position, seq_count, seq_mean, seq_sum, smallest


def test_sums_and_means_over_ragged_sequences():
    values_N, seq_N = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([0, 0, 2, 2])
    assert seq_sum(values_N, seq_N, 3).tolist() == [3.0, 0.0, 13.0]
    assert seq_mean(values_N, seq_N, 3).tolist() == [1.5, 0.0, 6.5]


def test_reductions_do_not_depend_on_the_order_of_tokens():
    generator = torch.Generator().manual_seed(0)
    values_N, seq_N = torch.rand(20, generator=generator), torch.randint(0, 4, (20,), generator=generator)
    order = torch.randperm(20, generator=generator)
    torch.testing.assert_close(seq_sum(values_N[order], seq_N[order], 4), seq_sum(values_N, seq_N, 4))


def test_half_precision_is_summed_in_full_precision():
    """In bf16 a sum of 300 times -1.0078125 would stop at -256."""
    values_N, seq_N = torch.full((300,), -1.0078125, dtype=torch.bfloat16), torch.zeros(300, dtype=torch.long)
    assert seq_sum(values_N, seq_N, 1).tolist() == [-302.34375] and seq_mean(values_N, seq_N, 1).item() == -1.0078125
    assert mean_metric(values_N).total.item() == -302.34375
    assert seq_sum(values_N.double(), seq_N, 1).dtype == torch.float64


def test_smallest_and_largest():
    assert smallest(torch.tensor([2.0, -1.0, 3.0])) == (-1.0, 3.0, "min")
    assert largest(torch.tensor([2.0, -1.0, 3.0])) == (3.0, 3.0, "max")
    assert smallest(torch.zeros(0)) == (torch.inf, 0.0, "min") and largest(torch.zeros(0)) == (-torch.inf, 0.0, "max")


def test_an_empty_batch_sums_to_zero():
    assert seq_mean(torch.zeros(0), torch.zeros(0, dtype=torch.long), 2).tolist() == [0.0, 0.0]


def test_counts_and_places_of_tokens():
    seq_N = torch.tensor([0, 0, 2, 2, 2, 3])
    assert seq_count(seq_N, 5).tolist() == [2, 0, 3, 1, 0]
    assert position(seq_N, 5).tolist() == [0, 1, 0, 1, 2, 0]
    assert position(seq_N[:0], 0).shape == (0,) and seq_count(seq_N[:0], 0).shape == (0,)


def test_mean_keeps_sum_and_count_and_no_graph():
    metric = mean_metric(torch.tensor([1.0, 2.0, 6.0], requires_grad=True))
    assert metric.total.item() == 9.0 and metric.items == 3.0 and not metric.total.requires_grad


def test_nll_of_known_probabilities():
    logp_N = torch.tensor([math.log(0.5), math.log(0.25), 0.0])
    torch.testing.assert_close(nll(logp_N=logp_N), torch.tensor([0.693147, 1.386294, 0.0]))


def test_dft_of_known_probabilities():
    logp_N = torch.tensor([math.log(0.5), math.log(0.25), 0.0])
    torch.testing.assert_close(dft(logp_N=logp_N), torch.tensor([0.346574, 0.346574, 0.0]))


def test_the_likelihood_in_dft_is_a_constant():
    """d/dz of -p log p with p held fixed is p (p - 1) for the target's own logit: the 1/p weight is gone."""
    logits = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    dft(logp_N=logits.log_softmax(-1)[:1]).sum().backward()
    p = logits.softmax(-1)[0].item()
    assert math.isclose(logits.grad[0].item(), p * (p - 1), rel_tol=1e-12)


def test_gradients_in_float64():
    logp_N = -torch.rand(5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: nll(logp_N=x), (logp_N,))


def test_what_exists_is_named():
    assert set(LOSSES) == {"nll", "dft"}
