"""All segments of a row in one call of torch's variable-length kernel (FlashAttention), on CUDA in half precision.

`Hq, Hk` query and key heads, `T` tokens of the row, `K` keys (those of shared prompts repeated), `D` head size,
`M` segments.
"""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from .blocks import Scoring

# torch 2.11's kernel needs as many key heads as query heads; later kernels group them.
_GROUPS_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
_BACKWARD = ("grad_out query key value out lse cu_seq_q cu_seq_k max_q max_k is_causal rng_state scale "
             "window_size").split()  # fmt: skip


def exists_on(device: torch.device) -> bool:
    """Whether the kernel runs on this device."""
    return device.type == "cuda" and _card_serves(device)


def serves(query: Tensor, value: Tensor, scoring: Scoring) -> bool:
    """Whether the kernel computes this layer."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and scoring.dropout == 0.0
        and scoring.softcap is None
        and (scoring.sinks is None or _gives_parts())
        and _card_serves(query.device)
    )


@functools.cache
def _card_serves(device: torch.device) -> bool:
    # FlashAttention needs compute capability 8.0 (Ampere) or newer.
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _gives_parts() -> bool:
    """Whether forward and backward pass can be called apart, as sinks need it."""
    operation = getattr(torch.ops.torch_attn, "_varlen_attn_backward", None)
    return operation is not None and [each.name for each in operation.default._schema.arguments] == _BACKWARD


def attend(query: Tensor, key: Tensor, value: Tensor, segments: dict[str, Any], scoring: Scoring) -> Tensor:
    """Attention by segment: [1, H, T, D] -> [1, T, Hq, D]. Lengths stay on the device."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if segments["key_index"] is not None:
        key, value = key.index_select(0, segments["key_index"]), value.index_select(0, segments["key_index"])
    if key.shape[1] != query.shape[1] and not _GROUPS_HEADS:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    lengths = [segments[name] for name in ("cu_query_M1", "cu_key_M1", "longest_query", "longest_key")]
    if scoring.sinks is not None:
        out = _WithSinks.apply(query, key, value, scoring.sinks, lengths, scoring._replace(sinks=None))
    else:
        out, _ = _forward(query, key, value, lengths, scoring)
    return out[None]


def _window(scoring: Scoring) -> tuple[int, int]:
    return -1 if scoring.window is None else scoring.window - 1, 0


def _forward(query: Tensor, key: Tensor, value: Tensor, lengths: list[Any], scoring: Scoring,
             lse: bool = False) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Outputs [T, Hq, D], and with `lse` the log-sum-exp of each query's scores, [Hq, T]."""
    further: dict[str, Any] = {"enable_gqa": True} if key.shape[1] != query.shape[1] else {}
    if lse:
        further["return_aux"] = AuxRequest(lse=True)
    found = varlen_attn(query, key, value, *lengths, scale=scoring.scale, window_size=_window(scoring), **further)
    return found if isinstance(found, tuple) else (found, None)  # type: ignore[return-value]


def _backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, lengths: list[Any],
              scoring: Scoring) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values, from weights `exp(score - lse)` and the outputs that they gave."""
    window = _window(scoring)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return torch.ops.torch_attn._varlen_attn_backward(
        grad.contiguous(), query, key, value, out, lse, *lengths, window == (-1, 0), no_dropout, scoring.scale,
        list(window),
    )  # fmt: skip


class _WithSinks(torch.autograd.Function):
    """Softmax with one more score for each head, its sink, that has no value (gpt-oss).

    The sink joins the log-sum-exp that the kernel returns and scales its outputs down. The kernel's backward pass takes
    both from outside: weights and gradients are then those of the whole softmax, exactly.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, lengths: list[Any],
                scoring: Scoring) -> Tensor:  # fmt: skip
        out, lse_HT = _forward(query, key, value, lengths, scoring, lse=True)
        assert lse_HT is not None
        whole_HT = torch.logaddexp(lse_HT, sinks.float()[:, None])
        out = (out * (lse_HT - whole_HT).exp().T[..., None]).to(out.dtype)
        cu_query, cu_key, *longest = lengths
        ctx.save_for_backward(query, key, value, sinks, out, whole_HT, cu_query, cu_key)
        ctx.longest, ctx.scoring = longest, scoring
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse_HT, cu_query, cu_key = ctx.saved_tensors
        lengths = [cu_query, cu_key, *ctx.longest]
        grads = _backward(grad, query, key, value, out, lse_HT, lengths, ctx.scoring)
        along_TH = torch.linalg.vecdot(grad.float(), out.float())
        sunk_HT = (sinks.float()[:, None] - lse_HT).exp()
        grad_sinks = -(sunk_HT * along_TH.T).sum(1)
        return *grads, grad_sinks.to(sinks.dtype), None, None
