"""Reductions over ragged length, and metrics as sums and counts.

`N` trained tokens, `S` sequences. Masked tokens are not there, so no function takes a mask.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Metric(NamedTuple):
    """A mean that can still be added to others: totals and counts of all micro-batches and ranks, divided once."""

    total: Tensor  # scalar
    items: Tensor | float


def seq_sum(values_N: Tensor, seq_N: Tensor, sequences: int) -> Tensor:
    """Sum over each sequence's tokens: [N] -> [S]. A sequence without trained tokens sums to zero."""
    return values_N.new_zeros(sequences).index_add(0, seq_N, values_N)


def seq_mean(values_N: Tensor, seq_N: Tensor, sequences: int) -> Tensor:
    """Mean over each sequence's tokens: [N] -> [S]. A sequence without trained tokens has mean zero."""
    return seq_sum(values_N, seq_N, sequences) / seq_count(seq_N, sequences).clamp(min=1)


def seq_count(seq_N: Tensor, sequences: int) -> Tensor:
    """How many tokens each sequence has: [N] -> [S], integers."""
    return seq_N.new_zeros(sequences).index_add(0, seq_N, torch.ones_like(seq_N))


def mean(values: Tensor) -> Metric:
    """The mean of all entries, as total and count."""
    detached = values.detach()
    return Metric(detached.sum(), float(detached.numel()))


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
