"""The chunked language-model head: numbers per trained token, without `[N, V]` logits in memory.

The logits of a few hundred tokens at a time are computed, measured and dropped; the backward pass uses the closed form
of their gradient. Peak memory does not depend on the number of tokens.

`N` trained tokens, `C` tokens of a chunk, `V` vocabulary, `H` hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trl.models.shards import gathered_by_its_call

from .device import kind_of, most_chunks, of_kind
from .measures import MEASURES, Chunk, Comparison, logp_slope

# Logits computed at once: enough to keep a matrix product busy, without more memory than that.
CHUNK_ELEMENTS = {"cpu": 2**23, "default": 2**26}


class TokenStats(NamedTuple):
    """The results of a forward pass, one entry per trained token. See `engine.score.score`."""

    logp_N: Tensor  # log-prob of the trained token, fp32
    seq_N: Tensor  # index of its sequence
    sequences: int  # number of sequences in the batch (S)
    entropy_N: Tensor | None = None  # entropy of the predicted distribution, in nats
    mean_logp_N: Tensor | None = None  # mean over the vocabulary of log-probs (label smoothing)
    top1_N: Tensor | None = None  # 1.0 where the trained token is the most likely one
    mean_logit_N: Tensor | None = None  # mean over the vocabulary of the (scaled) logits
    sum_sq_N: Tensor | None = None  # sum over the vocabulary of squared probabilities
    divergence_N: Tensor | None = None  # divergence from another model's distribution
    other_logp_N: Tensor | None = None  # log-prob of the trained token under that model
    aux: Tensor | None = None  # load-balancing term of a mixture of experts
    value_N: Tensor | None = None  # value of the state before the token


@dataclass(frozen=True)
class Readout:
    """How raw head outputs become logits, and which measures are taken.

    logits = scale * raw, bounded to softcap * tanh(logits / softcap) if there is a softcap, divided by temperature.
    `extras` are names in `MEASURES`, returned in this order; the first ones, `grads`, carry a gradient, and so does
    the log-prob with `logp_grad`. `comparison` is what some measures compare with.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    extras: tuple[str, ...] = ()
    grads: tuple[str, ...] = ()
    comparison: Comparison | None = None
    logp_grad: bool = True

    def __post_init__(self) -> None:
        if self.extras[: len(self.grads)] != self.grads:
            raise ValueError(f"extras {self.extras} must begin with those that carry a gradient, {self.grads}")

    @property
    def with_gradient(self) -> slice:
        """The columns, the log-prob first, that carry a gradient."""
        return slice(0 if self.logp_grad else 1, 1 + len(self.grads))

    def at(self, span: slice) -> "Readout":
        """The readout of a chunk: what it compares with is of these trained tokens."""
        return self if self.comparison is None else replace(self, comparison=replace(self.comparison, span=span))

    def logits(self, raw_CV: Tensor) -> Tensor:
        logits_CV = raw_CV.float()
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        if self.softcap is not None:
            logits_CV = torch.tanh(logits_CV / self.softcap) * self.softcap
        if self.temperature != 1.0:
            logits_CV = logits_CV / self.temperature
        return logits_CV

    def through(self, grad_CV: Tensor, logits_CV: Tensor) -> Tensor:
        """Gradient with respect to the raw outputs, from the gradient with respect to the logits (overwritten)."""
        if self.softcap is not None:
            grad_CV *= 1 - (logits_CV * (self.temperature / self.softcap)) ** 2
        slope = self.scale / self.temperature
        return grad_CV if slope == 1.0 else grad_CV.mul_(slope)


def _full_precision(device: torch.device) -> torch.autocast:
    """Autocast off: casts are explicit here, and sums over the vocabulary are taken in fp32."""
    return torch.autocast(device.type, enabled=False)


def _measured(chunk: Chunk, readout: Readout) -> list[Tensor]:
    """The log-prob of each target, then the extras; each [C]."""
    return [chunk.logp_C, *(MEASURES[name].of(chunk) for name in readout.extras)]


def _slopes(chunk: Chunk, readout: Readout) -> Iterator[Tensor]:
    """The gradient of each differentiable column with respect to the logits, [C, V], in order, one at a time."""
    if readout.logp_grad:
        yield logp_slope(chunk)
    for name in readout.grads:
        slope = MEASURES[name].slope
        assert slope is not None
        yield slope(chunk)


def _logits_grad(raw_CV: Tensor, target_C: Tensor, readout: Readout, grads: Sequence[Tensor | None]) -> Tensor:
    """Gradient with respect to the raw outputs, [C, V], from the gradients of the differentiable columns, each [C]."""
    logits_CV = readout.logits(raw_CV)
    grad_CV = torch.zeros_like(logits_CV)
    for slope_CV, grad_C in zip(_slopes(Chunk(logits_CV, target_C, readout.comparison), readout), grads, strict=False):
        if grad_C is not None:
            grad_CV += slope_CV.mul_(grad_C[:, None])
    return readout.through(grad_CV, logits_CV)


def _outputs(readout: Readout, count: int, device: torch.device) -> list[Tensor]:
    return [torch.empty(count, dtype=torch.float32, device=device) for _ in range(1 + len(readout.extras))]


def _mark(ctx: Any, readout: Readout, outputs: list[Tensor]) -> tuple[Tensor, ...]:
    differentiable = {id(each) for each in outputs[readout.with_gradient]}
    ctx.mark_non_differentiable(*(each for each in outputs if id(each) not in differentiable))
    return tuple(outputs)


def _spans(count: int, vocabulary: int, device: torch.device) -> list[slice]:
    size = max(1, of_kind(CHUNK_ELEMENTS, kind_of(device)) // vocabulary)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class _LinearHead(torch.autograd.Function):
    """A plain linear head. A frozen head computes its gradient in the forward pass, while the logits exist:
    d logp / d hidden needs only the logits and the weight, and the backward pass multiplies it by the gradient of the
    loss. A trained head recomputes its logits in the backward pass, because d weight needs the gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_N: Tensor,
                readout: Readout, dtype: torch.dtype) -> tuple[Tensor, ...]:  # fmt: skip
        head_trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        slopes = 0 if head_trains or not ctx.needs_input_grad[0] else readout.logp_grad + len(readout.grads)
        weight, bias = weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)
        outputs = _outputs(readout, hidden_NH.shape[0], hidden_NH.device)
        slopes_NH = [torch.empty_like(hidden_NH) for _ in range(slopes)]
        with _full_precision(hidden_NH.device):
            for span in _spans(hidden_NH.shape[0], weight_VH.shape[0], hidden_NH.device)[: most_chunks()]:
                logits_CV = readout.logits(F.linear(hidden_NH[span].to(dtype), weight, bias))
                chunk = Chunk(logits_CV, target_N[span], readout.at(span).comparison)
                for output_N, column_C in zip(outputs, _measured(chunk, readout), strict=True):
                    output_N[span] = column_C
                if slopes:
                    for slope_NH, slope_CV in zip(slopes_NH, _slopes(chunk, readout), strict=True):
                        slope_NH[span] = readout.through(slope_CV, logits_CV).to(dtype) @ weight
        ctx.readout, ctx.dtype, ctx.slopes = readout, dtype, slopes
        if slopes:
            ctx.save_for_backward(*slopes_NH)
        else:
            ctx.save_for_backward(hidden_NH, weight_VH, bias_V, target_N)
        return _mark(ctx, readout, outputs)

    @staticmethod
    def backward(ctx: Any, *grads_N: Tensor | None) -> tuple[Tensor | None, ...]:
        readout, dtype = ctx.readout, ctx.dtype
        grads_N = grads_N[readout.with_gradient]
        if ctx.slopes:
            grad_NH = None
            for slope_NH, grad_N in zip(ctx.saved_tensors, grads_N, strict=False):
                if grad_N is not None:
                    part_NH = slope_NH * grad_N[:, None].to(slope_NH.dtype)
                    grad_NH = part_NH if grad_NH is None else grad_NH + part_NH
            return grad_NH, None, None, None, None, None
        hidden_NH, weight_VH, bias_V, target_N = ctx.saved_tensors
        weight, bias = weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)
        grad_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        grad_VH: Tensor | None = None
        grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for span in _spans(hidden_NH.shape[0], weight_VH.shape[0], hidden_NH.device)[: most_chunks()]:
            hidden_CH = hidden_NH[span].to(dtype)
            chunk_grads = [None if grad_N is None else grad_N[span] for grad_N in grads_N]
            grad_CV = _logits_grad(F.linear(hidden_CH, weight, bias), target_N[span], readout.at(span), chunk_grads)
            if grad_V is not None:
                grad_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(dtype)
            if grad_NH is not None:
                grad_NH[span] = grad_CV @ weight
            if not ctx.needs_input_grad[1]:
                continue
            if grad_VH is None:
                grad_VH = (grad_CV.T @ hidden_CH).float()
            elif dtype == torch.float32:
                grad_VH.addmm_(grad_CV.T, hidden_CH)
            else:
                grad_VH += grad_CV.T @ hidden_CH
        if ctx.needs_input_grad[1]:
            grad_VH = torch.zeros_like(weight_VH) if grad_VH is None else grad_VH.to(weight_VH.dtype)
        grad_V = None if grad_V is None or bias_V is None else grad_V.to(bias_V.dtype)
        return grad_NH, grad_VH, grad_V, None, None, None


class _Logits(torch.autograd.Function):
    """The same measures on logits computed elsewhere, [C, V] -> each [C]."""

    @staticmethod
    def forward(ctx: Any, raw_CV: Tensor, target_C: Tensor, readout: Readout) -> tuple[Tensor, ...]:
        ctx.readout = readout
        ctx.save_for_backward(raw_CV, target_C)
        with _full_precision(raw_CV.device):
            chunk = Chunk(readout.logits(raw_CV), target_C, readout.comparison)
            return _mark(ctx, readout, _measured(chunk, readout))

    @staticmethod
    def backward(ctx: Any, *grads_C: Tensor | None) -> tuple[Tensor | None, ...]:
        raw_CV, target_C = ctx.saved_tensors
        grad_CV = _logits_grad(raw_CV, target_C, ctx.readout, grads_C[ctx.readout.with_gradient])
        return grad_CV.to(raw_CV.dtype), None, None


def plain_linear(head: Any) -> nn.Linear | None:
    """The head as a linear layer, or None if it is more than that (adapters, quantised or offloaded weights).

    For a head listed in PEFT's `modules_to_save`, its active copy.
    """
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        active = getattr(head, "active_adapters", None) or []
        disabled = getattr(head, "disable_adapters", False)
        chosen = [name for name in active if name in head.modules_to_save]
        head = head.modules_to_save[chosen[0]] if chosen and not disabled else head.original_module
    if gathered_by_its_call(head):
        # Its hooks gather the weight, and have done so by now (see `token_stats`).
        return head if type(head).forward is nn.Linear.forward else None
    if type(head) is not nn.Linear or head.weight.is_meta or head._forward_hooks or head._forward_pre_hooks:
        return None
    return head


def compute_dtype(head: nn.Module, hidden: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else that of the head's weights."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    weight = getattr(head, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) else hidden.dtype


def token_stats(
    head: nn.Module, hidden_NH: Tensor, target_N: Tensor, readout: Readout, vocabulary: int
) -> list[Tensor]:
    """Log-prob of each trained token, then the extras of `readout`; each [N], fp32.

    The hidden states `hidden_NH` predict the tokens `target_N`. Any head works. A plain linear layer is used by its
    weight; any other head (LoRA or DoRA on it, quantised or offloaded weights) is called on chunks, and recomputed in
    the backward pass.

    A head whose own hooks gather its weights (ZeRO-3, FSDP2 around the head) is called once, and the chunks run within
    that call: the hooks fire once in the forward and once in the backward pass, for any number of tokens. Ranks gather
    together, so they must gather equally often.
    """
    linear = plain_linear(head)
    head = head if linear is None else linear
    if not gathered_by_its_call(head):
        return _token_stats(head, linear, hidden_NH, target_N, readout, vocabulary)
    forward = head.forward

    def chunks(hidden_NH: Tensor) -> tuple[Tensor, ...]:  # hooks on gradients look into a tuple, not into a list
        return tuple(_token_stats(forward, linear, hidden_NH, target_N, readout, vocabulary))

    before = vars(head).get("forward")
    head.forward = chunks
    try:
        return list(head(hidden_NH))
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def _token_stats(head: Callable[[Tensor], Tensor], linear: nn.Linear | None, hidden_NH: Tensor, target_N: Tensor,
                 readout: Readout, vocabulary: int) -> list[Tensor]:  # fmt: skip
    if linear is not None:
        hidden_NH = hidden_NH.to(linear.weight.device)
        target_N = target_N.to(hidden_NH.device)
        weight_VH: Any = linear.weight
        if hasattr(weight_VH, "full_tensor"):
            # Sharded apart from the model's root. Each rank has the gradient of its own tokens; ranks are averaged.
            from torch.distributed.tensor import Partial

            weight_VH = weight_VH.full_tensor(grad_placements=[Partial("avg")] * weight_VH.device_mesh.ndim)
        dtype = compute_dtype(linear, hidden_NH)
        return list(_LinearHead.apply(hidden_NH, weight_VH, linear.bias, target_N, readout, dtype))

    def chunk(hidden_CH: Tensor, target_C: Tensor, readout: Readout) -> tuple[Tensor, ...]:
        raw_CV = head(hidden_CH)
        return _Logits.apply(raw_CV, target_C.to(raw_CV.device), readout)

    target_N = target_N.to(hidden_NH.device)
    spans = _spans(hidden_NH.shape[0], vocabulary, hidden_NH.device) or [slice(0, 0)]
    parts = []
    for span in spans:
        if torch.is_grad_enabled():
            parts.append(checkpoint(chunk, hidden_NH[span], target_N[span], readout.at(span), use_reentrant=False))
        else:
            parts.append(chunk(hidden_NH[span], target_N[span], readout.at(span)))
    return [torch.cat(column) for column in zip(*parts, strict=True)]
