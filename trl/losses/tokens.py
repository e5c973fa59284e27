"""Reductions over ragged length, and metrics as sums and counts.

`N` trained tokens, `S` sequences. Masked tokens are not there, so no function takes a mask.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Metric(NamedTuple):
    """A number that can still be joined with those of other micro-batches and ranks: a mean, as a total and a count
    that are divided once, or the smallest or largest of all values."""

    total: Tensor  # scalar; of no items 0, as "min" inf, as "max" -inf
    items: Tensor | float
    kind: str = "mean"  # or "min" or "max"


def _summable(values: Tensor) -> Tensor:
    """The values in fp32 at least: in half precision a sum of some hundred log-probs would be off by whole nats."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def seq_sum(values_N: Tensor, seq_N: Tensor, sequences: int) -> Tensor:
    """Sum over each sequence's tokens, in fp32 at least: [N] -> [S]. A sequence without trained tokens sums to zero."""
    values_N = _summable(values_N)
    return values_N.new_zeros(sequences).index_add(0, seq_N, values_N)


def seq_mean(values_N: Tensor, seq_N: Tensor, sequences: int) -> Tensor:
    """Mean over each sequence's tokens: [N] -> [S]. A sequence without trained tokens has mean zero."""
    return seq_sum(values_N, seq_N, sequences) / seq_count(seq_N, sequences).clamp(min=1)


def seq_count(seq_N: Tensor, sequences: int) -> Tensor:
    """How many tokens each sequence has: [N] -> [S], integers."""
    return seq_N.new_zeros(sequences).index_add(0, seq_N, torch.ones_like(seq_N))


def mean(values: Tensor) -> Metric:
    """The mean of all entries, as total and count."""
    return Metric(_summable(values.detach()).sum(), float(values.numel()))


def smallest(values: Tensor) -> Metric:
    """The smallest of all entries."""
    values = _summable(values.detach())
    return Metric(values.min() if len(values) else values.new_tensor(torch.inf), float(values.numel()), "min")


def largest(values: Tensor) -> Metric:
    """The largest of all entries."""
    values = _summable(values.detach())
    return Metric(values.max() if len(values) else values.new_tensor(-torch.inf), float(values.numel()), "max")


def position(seq_N: Tensor, sequences: int) -> Tensor:
    """The place of each token among the trained tokens of its sequence, from 0 on: [N] -> [N]. A sequence's tokens are
    consecutive, and sequences in their order."""
    length_S = seq_count(seq_N, sequences)
    start_S = length_S.cumsum(0) - length_S
    return torch.arange(len(seq_N), device=seq_N.device) - start_S[seq_N]


def bounded_exp(values: Tensor, limit: float) -> Tensor:
    """`exp(values)` up to `limit`, and its tangent there beyond it, so that the result is finite and grows, and the
    gradient is at most `exp(limit)` and never of another sign."""
    return values.clamp(max=limit).exp() * (1 + (values - limit).relu())


def masked_mean_metric(values: Tensor, place: Tensor) -> Metric:
    """The mean of the values at `place`, without asking the device how many they are."""
    return Metric((values.detach() * place).sum(), place.sum())
