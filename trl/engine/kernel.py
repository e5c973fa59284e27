"""All segments of a row in one call of torch's variable-length kernel (FlashAttention), on CUDA in half precision.

`Hq, Hk` query and key heads, `T` tokens of the row, `D` head size, `M` segments, `R` roots with branches, `B` tokens of
branches.
"""

import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from .blocks import Scoring
from .device import has_flash_attention

# torch 2.11's kernel needs as many key heads as query heads; later kernels group them.
_GROUPS_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
_BACKWARD = ("grad_out query key value out lse cu_seq_q cu_seq_k max_q max_k is_causal rng_state scale "
             "window_size").split()  # fmt: skip


def serves(query: Tensor, value: Tensor, scoring: Scoring) -> bool:
    """Whether the kernel computes this layer."""
    return (
        has_flash_attention(query.device)
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
        and scoring.dropout == 0.0
        and scoring.softcap is None
        and (scoring.sinks is None or _gives_parts())
    )


@functools.cache
def _gives_parts() -> bool:
    """Whether forward and backward pass can be called apart, as sinks and shared prompts need it."""
    operation = getattr(torch.ops.torch_attn, "_varlen_attn_backward", None)
    return operation is not None and [each.name for each in operation.default._schema.arguments] == _BACKWARD


def attend(query: Tensor, key: Tensor, value: Tensor, segments: dict[str, Any], scoring: Scoring) -> Tensor:
    """Attention by segment: [1, H, T, D] -> [1, T, Hq, D]. Lengths stay on the device."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if key.shape[1] != query.shape[1] and not _GROUPS_HEADS:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    sees_all = scoring.window is None or scoring.window >= segments["longest_key"]
    window = (-1 if scoring.window is None else scoring.window - 1, 0)
    longest = segments["longest_query"]
    own = _Part(segments["cu_query_M1"], segments["cu_query_M1"], longest, longest, window)
    roots = None
    if segments["key_index"] is not None:
        if sees_all and "branch_index" in segments and _gives_parts():
            part = _Part(segments["cu_branch_R1"], segments["cu_root_R1"], segments["longest_branch"],
                         segments["longest_root"], window=(-1, -1))  # fmt: skip
            roots = _Roots(part, segments["branch_index"], segments["root_index"])
        else:
            key, value = (each.index_select(0, segments["key_index"]) for each in (key, value))
            own = own._replace(cu_key=segments["cu_key_M1"], longest_key=segments["longest_key"])
    if roots is not None or scoring.sinks is not None:
        return _Joined.apply(query, key, value, scoring.sinks, own, roots, scoring.scale)[None]
    return own.forward(query, key, value, scoring.scale, lse=False)[0][None]


class _Part(NamedTuple):
    """One call of the kernel."""

    cu_query: Tensor
    cu_key: Tensor
    longest_query: int
    longest_key: int
    window: tuple[int, int]  # (-1, 0) is causal, (-1, -1) sees everything

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float, lse: bool) -> tuple[Tensor, Any]:
        """Outputs [T, Hq, D], and with `lse` the log-sum-exp of each query's scores, [Hq, T]."""
        further: dict[str, Any] = {"enable_gqa": True} if key.shape[1] != query.shape[1] else {}
        if lse:
            further["return_aux"] = AuxRequest(lse=True)
        found = varlen_attn(query, key, value, *self[:4], scale=scale, window_size=self.window, **further)
        return found if isinstance(found, tuple) else (found, None)

    def backward(self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
                 scale: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of queries, keys and values, from weights `exp(score - lse)` and the outputs that they gave."""
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
        return torch.ops.torch_attn._varlen_attn_backward(
            grad, query, key, value, out, lse, *self[:4], self.window == (-1, 0), no_dropout, scale, list(self.window)
        )


class _Roots(NamedTuple):
    """The call for branches on their roots, and the rows of both in the flat row."""

    part: _Part
    rows: Tensor  # [B]
    keys: Tensor

    def of(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return query.index_select(0, self.rows), key.index_select(0, self.keys), value.index_select(0, self.keys)


class _Joined(torch.autograd.Function):
    """A softmax whose parts are computed apart: over a segment's own keys, over those of its root, and its sink.

    Each part gives outputs and the log-sum-exp of its scores, by which they are joined. The kernel's backward pass
    takes outputs and log-sum-exp from outside: with those of the whole softmax, the gradients of a part are exactly its
    share. The keys of a root are read once for all its branches, and their gradients are added up within the kernel, in
    float32.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, own: _Part,
                roots: _Roots | None, scale: float) -> Tensor:  # fmt: skip
        out, lse_HT = own.forward(query, key, value, scale, lse=True)
        if roots is not None:
            of_roots, lse_HB = roots.part.forward(*roots.of(query, key, value), scale, lse=True)
            own_HB = lse_HT.index_select(1, roots.rows)
            whole_HB = torch.logaddexp(own_HB, lse_HB)
            both = out.index_select(0, roots.rows).float() * _share(own_HB, whole_HB)
            both += of_roots.float() * _share(lse_HB, whole_HB)
            out = out.index_copy(0, roots.rows, both.to(out.dtype))
            lse_HT = lse_HT.index_copy(1, roots.rows, whole_HB)
        if sinks is not None:
            whole_HT = torch.logaddexp(lse_HT, sinks.float()[:, None])
            out = (out.float() * _share(lse_HT, whole_HT)).to(out.dtype)
            lse_HT = whole_HT
        ctx.save_for_backward(query, key, value, sinks, out, lse_HT)
        ctx.own, ctx.roots, ctx.scale = own, roots, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse_HT = ctx.saved_tensors
        own, roots, grad = ctx.own, ctx.roots, grad.contiguous()
        grads = list(own.backward(grad, query, key, value, out, lse_HT, ctx.scale))
        if roots is not None:
            of_branches = [each.index_select(0, roots.rows) for each in (grad, out)]
            parts = roots.part.backward(
                of_branches[0], *roots.of(query, key, value), of_branches[1],
                lse_HT.index_select(1, roots.rows), ctx.scale,
            )  # fmt: skip
            for place, (part, index) in enumerate(zip(parts, (roots.rows, roots.keys, roots.keys), strict=True)):
                both = grads[place].index_select(0, index).float() + part.float()
                grads[place] = grads[place].index_copy(0, index, both.to(part.dtype))
        grad_sinks = None
        if sinks is not None:
            along_HT = torch.linalg.vecdot(grad.float(), out.float()).T
            grad_sinks = -((sinks.float()[:, None] - lse_HT).exp() * along_HT).sum(1).to(sinks.dtype)
        return *grads, grad_sinks, None, None, None


def _share(part_HT: Tensor, whole_HT: Tensor) -> Tensor:
    """The share of the whole softmax that a part has, [T, Hq, 1]."""
    return (part_HT - whole_HT).exp().T[..., None]
