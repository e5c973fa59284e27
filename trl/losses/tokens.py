"""Reductions over ragged length, and metrics as sums and counts.

`N` trained tokens, `S` sequences. Masked tokens are left out beforehand, so no function takes a mask.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Metric(NamedTuple):
    """A number that can be combined across micro-batches and ranks: a mean, kept as total and count, or a minimum or
    maximum."""

    total: Tensor  # scalar; without items: 0, inf for "min", -inf for "max"
    items: Tensor | float
    kind: str = "mean"  # or "min" or "max"


def _summable(values: Tensor) -> Tensor:
    """The values in fp32 at least: in half precision, a sum of some hundred log-probs would be off by whole nats."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def seq_sum(values_N: Tensor, seq_N: Tensor, sequences: int) -> Tensor:
    """Sum over each sequence's tokens, in fp32 at least: [N] -> [S]. A sequence without trained tokens sums to zero."""
    values_N = _summable(values_N)
    return values_N.new_zeros(sequences).index_add(0, seq_N, values_N)


def seq_mean(values_N: Tensor, seq_N: Tensor, sequences: int) -> Tensor:
    """Mean over each sequence's tokens: [N] -> [S]. A sequence without trained tokens has mean zero."""
    return seq_sum(values_N, seq_N, sequences) / seq_count(seq_N, sequences).clamp(min=1)


def seq_count(seq_N: Tensor, sequences: int) -> Tensor:
    """Number of tokens of each sequence: [N] -> [S], integers."""
    return seq_N.new_zeros(sequences).index_add(0, seq_N, torch.ones_like(seq_N))


def mean_metric(values: Tensor) -> Metric:
    """The mean of all entries, as total and count."""
    return Metric(_summable(values.detach()).sum(), float(values.numel()))


def smallest(values: Tensor) -> Metric:
    """The smallest of all entries."""
    values = _summable(values.detach())
    return Metric(values.min() if len(values) else values.new_full((), torch.inf), float(values.numel()), "min")


def largest(values: Tensor) -> Metric:
    """The largest of all entries."""
    values = _summable(values.detach())
    return Metric(values.max() if len(values) else values.new_full((), -torch.inf), float(values.numel()), "max")


def position(seq_N: Tensor, sequences: int) -> Tensor:
    """The index of each token among the trained tokens of its sequence: [N] -> [N]. The tokens of a sequence must be
    consecutive, and the sequences in order."""
    length_S = seq_count(seq_N, sequences)
    start_S = length_S.cumsum(0) - length_S
    return torch.arange(len(seq_N), device=seq_N.device) - start_S[seq_N]


def bounded_exp(values: Tensor, limit: float) -> Tensor:
    """`exp(values)` up to `limit`, the tangent at `limit` beyond. The result is finite and increasing, and the gradient
    is positive and at most `exp(limit)`."""
    return values.clamp(max=limit).exp() * (1 + (values - limit).relu())


def masked_mean_metric(values: Tensor, place: Tensor) -> Metric:
    """The mean of the values where `place` is true, without waiting for the device to count them."""
    return Metric((values.detach() * place).sum(), place.sum())
