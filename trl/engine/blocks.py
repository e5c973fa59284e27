"""Attention whose scores no fused kernel computes (score caps, sinks), a block of queries at a time.

The scores of a block are computed, used and dropped; the backward pass computes them again. Memory grows with the row,
not with its square.

`B` rows, `Hq, Hk` query and key heads, `Lq, Lk` queries and keys, `D` head size. Within a block, `G` query heads share
a key head, `b` queries see `r` keys: `K = B * Hk` products of [G * b, r].
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .device import kind_of, of_kind

# Scores computed at once.
BLOCK_ELEMENTS = {"cpu": 2**19, "default": 2**25}
SHORTEST = 32  # queries of a block: fewer would leave matrix products idle


class Scoring(NamedTuple):
    """How one layer turns queries and keys into weights."""

    scale: float
    dropout: float = 0.0
    window: int | None = None  # a token sees itself and the window - 1 tokens before it
    softcap: float | None = None  # scores are bounded to softcap * tanh(score / softcap) (Gemma 2)
    sinks: Tensor | None = None  # [Hq], one extra logit per head without a value (gpt-oss)

    @property
    def explicit(self) -> bool:
        """Whether scores are changed in a way that fused kernels do not know."""
        return self.softcap is not None or self.sinks is not None


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """Attention by blocks of queries: [B, Hq, Lq, D], [B, Hk, Lk, D] -> [B, Hq, Lq, D]. Dropout is not applied.

    `mask` is boolean or additive, [B or 1, Hq or 1, Lq, Lk]; without one the attention is causal, aligned to the end,
    within the window. Softmax is taken in fp32.
    """
    return _Attend.apply(query, key, value, scoring.sinks, mask, scoring._replace(sinks=None))


class _Block(NamedTuple):
    """Queries of a block, and the keys that they can reach."""

    queries: slice
    keys: slice


def _blocks(query: Tensor, key: Tensor, mask: Tensor | None, window: int | None) -> Iterator[_Block]:
    window = window if mask is None else None
    rows, heads, length, _ = query.shape
    reach = key.shape[2]
    budget = of_kind(BLOCK_ELEMENTS, kind_of(query.device)) // (rows * heads)
    before = reach - length
    start = 0
    while start < length:
        # A window makes blocks of about its own length: a longer one would compute more than it uses.
        seen = reach if window is None else min(reach, window + max(window, 128))
        size = max(SHORTEST, budget // seen)
        size = size if window is None else min(size, max(window, 128))
        end = min(start + size, length)
        first, last = (0, reach) if mask is not None else (0, before + end)
        if window is not None:
            first = max(0, before + start - window + 1)
        yield _Block(slice(start, end), slice(first, last))
        start = end


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, mask: Tensor | None,
                scoring: Scoring) -> Tensor:  # fmt: skip
        ctx.scoring = scoring
        ctx.save_for_backward(query, key, value, sinks, mask)
        out = query.new_empty(*query.shape[:3], value.shape[3], dtype=value.dtype)
        for block in _blocks(query, key, mask, scoring.window):
            weights, _, _ = _weights(query, key, sinks, mask, scoring, block)
            part = torch.bmm(weights.flatten(1, 2).to(value.dtype), value[:, :, block.keys].flatten(0, 1))
            out[:, :, block.queries] = _apart(part, query, block)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, mask = ctx.saved_tensors
        scoring: Scoring = ctx.scoring
        grad_query = torch.empty_like(query)
        # Sums over blocks of queries, in fp32.
        grad_key, grad_value = (torch.zeros_like(each, dtype=torch.float32) for each in (key, value))
        grad_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=torch.float32)
        for block in _blocks(query, key, mask, scoring.window):
            weights, sunk, slope = _weights(query, key, sinks, mask, scoring, block, for_backward=True)
            keys, values = (each[:, :, block.keys].flatten(0, 1) for each in (key, value))
            grad_part = _together(grad, key, block)
            flat = weights.flatten(1, 2).to(value.dtype)
            grad_value[:, :, block.keys] += torch.bmm(flat.transpose(1, 2), grad_part).view_as(
                grad_value[:, :, block.keys]
            )
            # d weights, then d scores, in one tensor.
            slopes = torch.bmm(grad_part, values.transpose(1, 2)).float().view_as(weights)
            along = torch.linalg.vecdot(slopes, weights)[..., None]
            slopes = slopes.sub_(along).mul_(weights)
            if grad_sinks is not None and sunk is not None:
                by_head = (sunk * along).view(query.shape[0], query.shape[1], -1)
                grad_sinks -= by_head.sum((0, 2))
            if slope is not None:
                slopes.mul_(slope)
            if mask is not None and mask.dtype == torch.bool:
                # A query that sees nothing has equal weights, and no gradient.
                hidden = ~mask[:, :, block.queries, block.keys]
                slopes.view(*query.shape[:2], *hidden.shape[2:]).masked_fill_(hidden, 0.0)
            flat = slopes.mul_(scoring.scale).flatten(1, 2).to(query.dtype)
            grad_query[:, :, block.queries] = _apart(torch.bmm(flat, keys), query, block)
            grad_key[:, :, block.keys] += torch.bmm(flat.transpose(1, 2), _together(query, key, block)).view_as(
                grad_key[:, :, block.keys]
            )
        grad_sinks = None if grad_sinks is None or sinks is None else grad_sinks.to(sinks.dtype)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_sinks, None, None


def _together(tensor: Tensor, key: Tensor, block: _Block) -> Tensor:
    """A block of [B, Hq, Lq, D] by key heads: [K, G * b, D]."""
    part = tensor[:, :, block.queries]
    return part.reshape(part.shape[0] * key.shape[1], -1, part.shape[3])


def _apart(part: Tensor, query: Tensor, block: _Block) -> Tensor:
    """The inverse of `_together`: [K, G * b, D] -> [B, Hq, b, D]."""
    return part.view(*query.shape[:2], block.queries.stop - block.queries.start, -1)


def _weights(
    query: Tensor, key: Tensor, sinks: Tensor | None, mask: Tensor | None, scoring: Scoring, block: _Block,
    for_backward: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Weights of a block, [K, G, b, r]; the sinks' share of each query, [K, G, b, 1]; the slope of the score cap."""
    rows, heads = query.shape[:2]
    keys = key[:, :, block.keys].flatten(0, 1)
    part = _together(query, key, block)
    # Not `bmm`: selective checkpointing keeps what that returns.
    raw = torch.baddbmm(part.new_empty(()), part, keys.transpose(1, 2), beta=0, alpha=scoring.scale)
    size = block.queries.stop - block.queries.start
    scores = raw.float().view(rows, heads, size, -1)
    slope = None
    if scoring.softcap is not None:
        scores = scores.div_(scoring.softcap).tanh_()
        if for_backward:
            slope = (1 - scores.square()).view(rows * key.shape[1], -1, size, scores.shape[3])
        scores = scores.mul_(scoring.softcap)
    scores = _masked(scores, mask, scoring.window, block, key.shape[2] - query.shape[2])
    most = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1)
        most = torch.maximum(most, sink)
    weights = scores.sub_(most).exp_()
    total, sunk = weights.sum(-1, keepdim=True), None
    if sinks is not None:
        sunk = (sink - most).exp_()
        total = total + sunk
        sunk = (sunk / total).view(rows * key.shape[1], -1, size, 1)
    return weights.div_(total).view(rows * key.shape[1], -1, size, scores.shape[3]), sunk, slope


def _masked(scores: Tensor, mask: Tensor | None, window: int | None, block: _Block, before: int) -> Tensor:
    """Scores [B, Hq, b, r] with those that are not seen at the least number, in place."""
    least = torch.finfo(scores.dtype).min
    if mask is not None:
        mask = mask[:, :, block.queries, block.keys]
        return scores.masked_fill_(~mask, least) if mask.dtype == torch.bool else scores.add_(mask)
    if scores.shape[2] == 1 and (window is None or scores.shape[3] <= window):
        return scores
    query_position = torch.arange(before + block.queries.start, before + block.queries.stop, device=scores.device)
    key_position = torch.arange(block.keys.start, block.keys.stop, device=scores.device)
    hidden = key_position > query_position[:, None]
    if window is not None:
        hidden |= key_position <= query_position[:, None] - window
    return scores.masked_fill_(hidden, least)


def written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """The same with all scores at once, and with dropout: for layers that have it, and as the definition."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(2, 3)).float() * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    if mask is None:
        whole = _Block(slice(0, query.shape[2]), slice(0, key.shape[2]))
        scores = _masked(scores, None, scoring.window, whole, key.shape[2] - query.shape[2])
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    if scoring.sinks is not None:
        sinks = scoring.sinks.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = F.dropout(weights, scoring.dropout) if scoring.dropout else weights
    return weights.to(value.dtype) @ value
