"""Padding, log-probs and sampling filters on padded tensors. Dimensions: `B` rows, `T` columns, `V` vocabulary."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trl.compat.words import older_words

# --- padding --------------------------------------------------------------------------------------------------------


def pad(
    tensors: Sequence[Tensor],
    padding_value: float = 0,
    padding_side: str = "right",
    pad_to_multiple_of: int | None = None,
) -> Tensor:
    """The tensors as one, [number of tensors, *largest shape]; all have the same number of dimensions.

    The first dimension of a tensor is filled up on `padding_side` ("right" or "left"), and its size rises to a multiple
    of `pad_to_multiple_of` (None: no multiple). The other dimensions are filled up at their ends.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r} is neither 'left' nor 'right'")
    if not tensors:
        raise ValueError("there is no tensor to pad: give at least one")
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    if pad_to_multiple_of:
        shape[0] = math.ceil(shape[0] / pad_to_multiple_of) * pad_to_multiple_of
    padded = tensors[0].new_full((len(tensors), *shape), padding_value)
    for place, tensor in zip(padded, tensors, strict=True):
        start = shape[0] - len(tensor) if padding_side == "left" else 0
        place[(slice(start, start + len(tensor)), *(slice(size) for size in tensor.shape[1:]))] = tensor
    return padded


def pad_to_length(tensor: Tensor, length: int, pad_value: float, dim: int = -1) -> Tensor:
    """The tensor with `dim` filled up at its end with `pad_value`; unchanged if it is as long as `length` or longer."""
    missing = length - tensor.shape[dim]
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_full(shape, pad_value)], dim)


def flush_left(mask: Tensor, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Move the entries where `mask` [B, T] is not zero to the left, in `mask` and in each of `tensors` [B, T].

    What the mask leaves out becomes zero, and columns that no row needs are cut. Returns the mask alone if it is given
    alone, else a tuple of the mask and the tensors.
    """
    return _flushed(mask, tensors, left=True)


def flush_right(mask: Tensor, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
    """As `flush_left`, to the right."""
    return _flushed(mask, tensors, left=False)


def _flushed(mask: Tensor, tensors: Sequence[Tensor], left: bool) -> Tensor | tuple[Tensor, ...]:
    kept = mask != 0
    width = int(kept.sum(1).max()) if len(mask) else 0
    order = (~kept if left else kept).to(torch.uint8).argsort(dim=1, stable=True)
    columns = slice(width) if left else slice(mask.shape[1] - width, None)
    moved = [(each * kept.to(each.dtype)).gather(1, order)[:, columns] for each in (mask, *tensors)]
    return tuple(moved) if tensors else moved[0]


# --- log-probs and entropy ------------------------------------------------------------------------------------------


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probs of the entries `index` under `softmax(logits / temperature)`, in nats and in the dtype of the logits.

    `logits` are [..., V], `index` is [...] or [..., K]; the result has the shape of `index`. Where `row_mask` [...] is
    zero the result is zero. The sums are taken in fp32 at least.
    """
    several = index.dim() == logits.dim()
    places = index if several else index.unsqueeze(-1)
    scaled = _exact(logits) / temperature
    logp = scaled.gather(-1, places) - scaled.logsumexp(-1, keepdim=True)
    if row_mask is not None:
        logp = logp.masked_fill(row_mask.unsqueeze(-1) == 0, 0.0)
    return (logp if several else logp.squeeze(-1)).to(logits.dtype)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_log_softmax` for an `index` [...], and the entropy [...] of the same distributions, both in nats."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_requires_grad):
        entropy = entropy_from_logits(logits / temperature)
        if row_mask is not None:
            entropy = entropy.masked_fill(row_mask == 0, 0.0)
    return selective_log_softmax(logits, index, temperature, row_mask), entropy


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy of `softmax(logits)` over the last dimension, [..., V] -> [...], in nats and in the dtype of the logits.

    `chunk_size` rows are computed at a time. The sums are taken in fp32 at least.
    """
    parts = []
    for part in logits.reshape(-1, logits.shape[-1]).split(chunk_size):
        logp = _exact(part).log_softmax(-1)
        parts.append(-(logp.exp() * logp.nan_to_num(neginf=0.0)).sum(-1))
    entropy = torch.cat(parts) if parts else logits.new_zeros(0)
    return entropy.to(logits.dtype).reshape(logits.shape[:-1])


def logprobs_from_logits(logits: Tensor, labels: Tensor, gather: bool = True) -> Tensor:
    """Log-probs of the `labels` [B, T] under `softmax(logits)` [B, T, V]; of the whole vocabulary if not `gather`."""
    return selective_log_softmax(logits, labels) if gather else logits.log_softmax(-1)


def dft_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Dynamic fine-tuning, for `compute_loss_func`: the cross-entropy of a token times its probability, held fixed.

    The mean over the labels [B, T] that are not -100, or the sum divided by `num_items_in_batch`. Wu et al. 2025,
    arXiv:2508.05629, equation 9.
    """
    target = labels[:, 1:]
    trained = target != -100
    logp = selective_log_softmax(outputs.logits[:, :-1], target.masked_fill(~trained, 0))[trained]
    total = -(logp.detach().exp() * logp).sum()
    return total / (trained.sum() if num_items_in_batch is None else num_items_in_batch)


def log1mexp(x: Tensor) -> Tensor:
    """`log(1 - exp(x))` for x < 0, exact near both ends; any shape."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# --- sampling and the ends of completions ---------------------------------------------------------------------------


def top_k_top_p_filtering(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    filter_value: float = -math.inf,
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """Set the logits [B, V] of tokens that sampling must not draw to `filter_value`.

    `top_k` > 0 keeps that many tokens. `top_p` < 1 keeps the most likely tokens until their probability reaches it.
    `min_tokens_to_keep` tokens stay in any case.
    """
    vocabulary = logits.shape[-1]
    if top_k > 0:
        smallest = logits.topk(min(max(top_k, min_tokens_to_keep), vocabulary), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, filter_value)
    if 0 <= top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = _exact(ordered).softmax(-1)
        dropped = probability.cumsum(-1) - probability >= top_p
        dropped[..., :min_tokens_to_keep] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), filter_value)
    return logits


def first_true_indices(bools: Tensor, dtype: torch.dtype = torch.long) -> Tensor:
    """The position of the first True of each row, [..., T] -> [...]; T for a row without one."""
    width = bools.shape[-1]
    columns = torch.arange(width, dtype=dtype, device=bools.device)
    return torch.where(bools, columns, width).amin(-1).to(dtype) if width else bools.sum(-1).to(dtype)


@older_words(stop_token_id="stop_token_ids")
def truncate_right(input_ids: Tensor, stop_token_ids: int | Sequence[int], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """The ids [B, T] with padding after the first stop token of each row, and the mask [B, T] of what is left."""
    stops = torch.as_tensor(stop_token_ids, device=input_ids.device).reshape(-1)
    last = first_true_indices(torch.isin(input_ids, stops)).unsqueeze(-1)
    mask = torch.arange(input_ids.shape[-1], device=input_ids.device) <= last
    return input_ids.masked_fill(~mask, pad_token_id), mask.long()


def truncate_response(stop_token_id: int, pad_token_id: int, responses: Tensor) -> Tensor:
    """The ids [B, T] with padding after the first stop token of each row."""
    return truncate_right(responses, stop_token_id, pad_token_id)[0]


# --- bounds ---------------------------------------------------------------------------------------------------------


def clip_by_value(x: Tensor, tensor_min: float | Tensor, tensor_max: float | Tensor) -> Tensor:
    """The values between two bounds, which may be tensors of their shape."""
    low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (tensor_min, tensor_max))
    return x.clamp(low, high)


def get_exp_cap(value: Tensor, decimal: int = 4) -> Tensor:
    """The largest exponent whose exp is finite in the dtype of `value`, [1], rounded down to `decimal` places."""
    scale = 10**decimal
    exact = math.floor(math.log(torch.finfo(value.dtype).max) * scale) / scale
    cap = torch.tensor([exact], dtype=value.dtype, device=value.device)
    return cap if cap.double().item() <= exact else torch.nextafter(cap, torch.zeros_like(cap))


def cap_exp(value: Tensor, cap: float | Tensor = -1) -> Tensor:
    """`exp(value)`, with the value at most `cap`; a negative cap stands for `get_exp_cap`."""
    cap = get_exp_cap(value) if float(cap) < 0 else cap
    return functional.hardtanh(value, -math.inf, float(cap)).exp()
