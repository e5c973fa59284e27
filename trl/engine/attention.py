"""Attention by segment, registered with transformers under one name.

A flat row (`engine.forest.flat`) passes `segments` as a keyword of the model's forward. Each segment attends to
`[its root's keys; its own keys]`, causally, aligned to the end; a root attends to itself alone. No mask of the row's
size exists on any device. Without `segments` (generation, padded batches, a user's own call) the attention is
transformers' own SDPA.

`B` rows, `Hq, Hk` query and key heads, `T` tokens of the row, `D` head size, `Lq, Lk` a segment's queries and keys.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from . import blocks, kernel
from .blocks import Scoring
from .device import kind_of

NAME = "trl_segments"


def segment_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that transformers builds before the layers run: None for a flat row, else that of SDPA.

    A row without a 2-D mask and without a cache needs no mask tensor: `segments` define the attention, and without them
    the row is causal. A layer's window is then applied by position, in the attention itself.
    """
    if attention_mask is None and q_length == kv_length:
        return None
    if q_length == 1 and attention_mask is not None and attention_mask.is_cuda:
        # Whether a mask leaves anything out is read on the host, which would wait at every token.
        allow_is_causal_skip = False
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: dict[str, Any] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention: query [B, Hq, T, D], key and value [B, Hk, T, D] -> ([B, T, Hq, D], None)."""
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings give fp32 queries and keys, while values are in half precision.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scale, dropout, sliding_window, softcap, s_aux)

    if segments is not None:
        if kwargs.get("position_bias") is not None:
            raise ValueError("attention by segment does not support a learned position bias")
        if "cu_query_M1" in segments and kernel.serves(query, value, scoring):
            return kernel.attend(query, key, value, segments, scoring), None
        return by_segment(query, key, value, segments["spans"], scoring).transpose(1, 2), None

    if attention_mask is None and query.shape[2] == key.shape[2]:
        if scoring.explicit or (sliding_window is not None and query.shape[2] > sliding_window):
            # A causal call without a mask tensor: each row is one segment.
            rows = [by_segment(query[b : b + 1], key[b : b + 1], value[b : b + 1], [(query.shape[2], -1)], scoring)
                    for b in range(query.shape[0])]  # fmt: skip
            return torch.cat(rows).transpose(1, 2), None
    if scoring.explicit:
        return _explicit(query, key, value, attention_mask, scoring).transpose(1, 2).contiguous(), None
    shared = attention_mask is None or attention_mask.shape[1] == 1  # one mask for all heads
    if query.shape[2] == 1 and key.shape[1] != query.shape[1] and shared:
        return _one_token(query, key, value, attention_mask, scoring), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def _one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """One query per row, with grouped heads: [B, Hq, 1, D], [B, Hk, L, D] -> [B, 1, Hq, D]. The heads of a group become
    queries of one head, so that keys and values are not repeated."""
    heads = query.shape[1]
    grouped = query.view(query.shape[0], key.shape[1], heads // key.shape[1], query.shape[3])
    out = F.scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask, dropout_p=scoring.dropout, scale=scoring.scale
    )
    return out.reshape(query.shape[0], 1, heads, value.shape[3])


def by_segment(query: Tensor, key: Tensor, value: Tensor, spans: list[tuple[int, int]], scoring: Scoring) -> Tensor:
    """Attention one segment at a time: query [1, Hq, T, D], key and value [1, Hk, T, D] -> [1, Hq, T, D].

    `spans` lists (length, root) in row order, see `engine.forest.flat`.
    """
    lengths = [length for length, _ in spans]
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    out = []
    for number, (_, root) in enumerate(spans):
        segment_key, segment_value = keys[number], values[number]
        if root >= 0:
            segment_key = torch.cat([keys[root], segment_key], dim=2)
            segment_value = torch.cat([values[root], segment_value], dim=2)
        out.append(_attend(queries[number], segment_key, segment_value, scoring))
    return torch.cat(out, dim=2)


def _attend(query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Causal attention aligned to the end: the last query sees the last key. query [1, Hq, Lq, D], Lq <= Lk."""
    if scoring.explicit:
        return _explicit(query, key, value, None, scoring)
    length, window = query.shape[2], scoring.window
    before = key.shape[2] - length
    if window is None or key.shape[2] <= window:
        return _attend_block(query, key, value, None, scoring)
    # Beyond the window, blocks of queries see only the keys they can reach: L * window scores, not L * L.
    block = max(window, 128)
    out = []
    for start in range(0, length, block):
        end = min(start + block, length)
        first_key = max(0, before + start - window + 1)
        reach = slice(first_key, before + end)
        out.append(_attend_block(query[:, :, start:end], key[:, :, reach], value[:, :, reach], window, scoring))
    return torch.cat(out, dim=2)


def _attend_block(query: Tensor, key: Tensor, value: Tensor, window: int | None, scoring: Scoring) -> Tensor:
    length, reach = query.shape[2], key.shape[2]
    square = length == reach and (window is None or length <= window)
    mask = None
    if not square and (length > 1 or (window is not None and reach > window)):
        query_position = torch.arange(reach - length, reach, device=query.device)[:, None]
        key_position = torch.arange(reach, device=query.device)
        mask = key_position <= query_position
        if window is not None:
            mask &= key_position > query_position - window
    grouped = query.shape[1] != key.shape[1]
    if grouped and mask is not None and kind_of(query.device) == "cuda":
        # With a mask, grouped heads would be computed by the slowest kernel.
        repeats = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), False
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=scoring.dropout,
        is_causal=mask is None and square and length > 1,
        scale=scoring.scale,
        enable_gqa=grouped,
    )


def _explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """Attention with score caps and sinks, which no fused kernel has. The mask is boolean or additive; without one the
    attention is causal, aligned to the end, within the window."""
    if not scoring.dropout and (mask is None or not mask.requires_grad):
        return blocks.attend(query, key, value, mask, scoring)
    return blocks.written_out(query, key, value, mask, scoring)


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, segment_mask)
