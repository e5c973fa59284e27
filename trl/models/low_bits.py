"""Half-precision weights that train without losing small updates.

A bfloat16 weight loses every update smaller than about 1/256 of it; at the learning rates of fine-tuning, that is
nearly all of them. bfloat16 is the upper half of float32. So the optimizer's state keeps the lower half of each
trainable weight, in two bytes: both halves together are a float32 weight, to the bit. An optimizer step joins them,
works in float32, and splits the result again. The model computes with the upper half, as autocast would.

float16 is not a half of float32, and a few optimizers write to the weights outside their step: in both cases weights
are held in float32 (`hold_in_float32`).
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .shards import is_partitioned

LOW_BITS = "low_bits"  # the key of the lower halves in an optimizer's state
CHUNK = 2**26  # weights joined at once, so that no second copy of the model ever exists
PIECE = 2**23  # weights split at once
# Packages whose optimizers treat each weight separately: their steps may see a few weights at a time.
BY_WEIGHT = ("torch.", "transformers.", "bitsandbytes.", "torchao.", "optimi.", "galore_torch.", "apollo_torch.")
# Classes of torch.optim and bitsandbytes that treat each number of a weight, or each block of them, by itself: a slice
# of a weight steps as it does within the weight.
BY_ELEMENT = ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Lion", "Adam8bit", "AdamW8bit", "Lion8bit", "RMSprop8bit",
              "Adam32bit", "AdamW32bit", "Lion32bit", "RMSprop32bit")  # fmt: skip
BLOCKS = (1, 256, 2048)  # numbers of a weight for one of a state: in a moment, and in the scales of an 8-bit moment
# Optimizers of `TrainingArguments.optim` that write to the weights in the backward pass or between steps.
OUTSIDE_THEIR_STEP = ("lomo", "adalomo", "schedule_free", "layerwise")


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 tensor whose upper half is `high` (bfloat16, rounded) and whose lower half is `low` (int16)."""
    bits = high.contiguous().view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return bits.add_(low).view(torch.float32)


def split(whole: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as bfloat16, rounded to the nearest, and the rounding error, as int16."""
    bits = whole.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = (bits - (high << 16)).to(torch.int16)
    return high.to(torch.int16).view(torch.bfloat16), low


def split_into(whole: Tensor, high: Tensor, low: Tensor) -> None:
    """`split` into two tensors that are there, a piece at a time."""
    if not high.is_contiguous():  # pieces would be copies
        upper, lower = split(whole)
        high.copy_(upper)
        low.copy_(lower)
        return
    for part in slices(whole.numel(), PIECE):
        upper, lower = split(whole.view(-1)[part])
        high.view(-1)[part] = upper
        low.view(-1)[part] = lower


def slices(count: int, most: int) -> list[slice]:
    """Slices of `count` numbers that have at most about `most` each and do not cut the largest of `BLOCKS`. They are
    about equally long: an optimizer may treat a very short weight in another way."""
    size = -(-count // max(1, -(-count // most)))
    size = max(1, -(-size // BLOCKS[-1])) * BLOCKS[-1]
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def updates_in_float32(optimizer: Optimizer) -> Optimizer:
    """Make an optimizer, in place, keep the lower halves of its bfloat16 weights in its state; return it.

    Moments of such weights are then float32, because the optimizer sees float32 weights and gradients. Memory: 2 bytes
    per weight for the lower half, and 8 bytes for each of at most `CHUNK` weights during a step. A larger weight steps
    in slices where the optimizer is one of `BY_ELEMENT`, and else as a whole. Optimizers of packages outside
    `BY_WEIGHT` see all their weights in one step.
    """
    half = [p for group in optimizer.param_groups for p in group["params"] if p.dtype == torch.bfloat16]
    if not half or isinstance(optimizer, _InFloat32):
        return optimizer
    if hasattr(optimizer, "check_overrides"):
        optimizer.check_overrides()  # bitsandbytes looks weights up by identity at its first step
    for p in half:  # Adagrad creates its state before the first step
        state = optimizer.state.get(p, {})
        state.update({k: v.float() for k, v in state.items() if isinstance(v, Tensor) and v.dtype == torch.bfloat16})
    kind = type(optimizer)
    optimizer.__class__ = type(kind.__name__, (_InFloat32, kind), {"__module__": kind.__module__})
    return optimizer


class _InFloat32(Optimizer):
    """A mixin before an optimizer's own class: its steps see float32 weights."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        places = [
            (group["params"], place)
            for group in self.param_groups
            for place, p in enumerate(group["params"])
            if p.grad is not None
        ]
        grads = [params[place].grad for params, place in places]
        try:
            for start, end in self._chunks(places):
                # Every optimizer skips weights without a gradient; they keep their place in the groups.
                for number, (params, place) in enumerate(places):
                    params[place].grad = grads[number] if start <= number < end else None
                params, place = places[start]
                if _half_size(params[place]) > CHUNK and self._takes_slices(params[place]):
                    self._step_on_slices(params, place)
                else:
                    self._step_on_whole_weights(places[start:end])
        finally:
            for (params, place), grad in zip(places, grads, strict=True):
                params[place].grad = grad
        return loss

    def _chunks(self, places: list[tuple[list[Any], int]]) -> Iterator[tuple[int, int]]:
        """Ranges of the weights that step together. One that is larger than `CHUNK` is alone."""
        if not type(self).__module__.startswith(BY_WEIGHT):
            yield 0, len(places)
            return
        start = used = 0
        for number, (params, place) in enumerate(places):
            size = _half_size(params[place])
            if number > start and used + size > CHUNK:
                yield start, number
                start, used = number, 0
            used += size
        yield start, len(places)

    def _takes_slices(self, p: Tensor) -> bool:
        kind = type(self).__mro__[2]
        known = kind.__name__ in BY_ELEMENT and kind.__module__.startswith(("torch.optim.", "bitsandbytes.optim."))
        # Paged states know their place on the host as a whole.
        return known and not getattr(self, "is_paged", False) and _local(p).is_contiguous()

    def _step_on_whole_weights(self, places: list[tuple[list[Any], int]]) -> None:
        """A step on some weights, with float32 weights in their place."""
        replaced = []
        for params, place in places:
            p = params[place]
            if p.dtype == torch.bfloat16:
                params[place] = self._whole(p)
                replaced.append((params, place, p))
        try:
            super().step()
        finally:
            for params, place, _ in replaced:
                params[place].grad = None
            for params, place, p in replaced:
                stand_in, params[place] = params[place], p
                low = torch.empty(_local(p).shape, dtype=torch.int16, device=p.device)
                split_into(_local(stand_in.detach()), _local(p), low)
                self.state[p] = {**self.state.pop(stand_in, {}), LOW_BITS: _like(p, low)}

    def _whole(self, p: Any) -> nn.Parameter:
        """A float32 weight that has the state and the gradient of a bfloat16 one."""
        state = self.state.pop(p, {})
        low = state.pop(LOW_BITS, None)
        stand_in = nn.Parameter(_like(p, _local(p).float() if low is None else join(_local(p), _local(low))))
        stand_in.grad = p.grad.float()
        if state:
            self.state[stand_in] = state
        return stand_in

    def _step_on_slices(self, params: list[Any], place: int) -> None:
        """A step on one large weight: on float32 copies of its slices, one after the other, in its place."""
        p = params[place]
        high_E, grad_E = _local(p).view(-1), _local(p.grad).reshape(-1)
        count = high_E.numel()
        before = {key: _local(value) for key, value in self.state.pop(p, {}).items()}
        low_E = before.pop(LOW_BITS) if LOW_BITS in before else torch.zeros_like(high_E, dtype=torch.int16)
        low_E = low_E.view(-1)
        after: dict[str, Any] = {}
        try:
            for part in slices(count, CHUNK):
                stand_in = params[place] = nn.Parameter(join(high_E[part], low_E[part]))
                stand_in.grad = grad_E[part].float()
                if before:
                    self.state[stand_in] = {key: _of_slice(value, part, count) for key, value in before.items()}
                try:
                    super().step()
                finally:
                    found = self.state.pop(stand_in, {})
                stand_in.grad = None
                split_into(stand_in.detach(), high_E[part], low_E[part])
                for key, value in found.items():
                    after[key] = _with_slice(after.get(key, before.get(key)), value, part, count)
        finally:
            params[place] = p
            for key, value in {**before, **after, LOW_BITS: low_E}.items():
                of_weight = isinstance(value, Tensor) and value.numel() == count
                self.state[p][key] = _like(p, value.view(_local(p).shape)) if of_weight else value

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        super().load_state_dict(state_dict, *args, **kwargs)
        # Loading casts state to the dtype of its weight, also float32 moments and lower halves: restore them.
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        weights = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, p in zip(saved_ids, weights, strict=True):
            if p.dtype != torch.bfloat16:
                continue
            for key, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor) and key in self.state[p]:
                    self.state[p][key] = value.detach().to(self.state[p][key].device, copy=True)


def _half_size(p: Any) -> int:
    """Numbers of a bfloat16 weight on this process, 0 of another one."""
    return _local(p).numel() if p.dtype == torch.bfloat16 else 0


def _of_slice(value: Any, part: slice, count: int) -> Any:
    """What of a weight's state belongs to a slice of its `count` numbers; memory is shared."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value.clone() if isinstance(value, Tensor) else value
    block = _block(value, count)
    return value if block is None else value.view(-1)[part.start // block : -(-part.stop // block)]


def _with_slice(whole: Any, value: Any, part: slice, count: int) -> Any:
    """The state of a weight with that of one of its slices in it. `whole` is None where the slice is the first."""
    block = _block(value, part.stop - part.start) if isinstance(value, Tensor) and value.ndim else None
    if block is None:
        return value
    if whole is None:
        whole = value.new_empty(-(-count // block))
    into = _of_slice(whole, part, count)
    if into.data_ptr() != value.data_ptr():
        into.copy_(value.view(-1))
    return whole


def _block(value: Tensor, count: int) -> int | None:
    """For how many numbers of a weight of `count` a state has one, or None: then it is a table for all of them."""
    return next((block for block in BLOCKS if value.numel() == -(-count // block)), None)


def _local(tensor: Any) -> Tensor:
    """This process's part of a tensor sharded by FSDP2, else the tensor; memory is shared."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(p: Any, local: Tensor) -> Tensor:
    """A process's part as a tensor sharded like `p`."""
    if not isinstance(p, DTensor):
        return local.view(p.shape)
    return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def hold_in_float32(model: nn.Module, optim: str, autocast: bool) -> str | None:
    """Cast trainable half-precision weights to float32 if their lower halves cannot be kept.

    `optim` is `TrainingArguments.optim`. Without `autocast`, all weights become float32, because layers multiply
    tensors of one dtype. Returns the reason in one sentence, or None if nothing was cast.
    """
    outside = any(name in optim for name in OUTSIDE_THEIR_STEP)
    wanted = (torch.float16, torch.bfloat16) if outside else (torch.float16,)
    found = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()
                    if p.requires_grad and p.dtype in wanted})  # fmt: skip
    if not found or is_partitioned(model):  # ZeRO-3 keeps float32 copies itself
        return None
    # In a quantised model only the adapter trains, and its layers cast their inputs to its dtype.
    if autocast or getattr(model, "is_quantized", False):
        for p in model.parameters():
            if p.requires_grad and p.dtype in wanted:
                p.data = p.data.float()
    else:
        model.float()
    why = f"optim={optim!r} writes to them outside its step" if outside else "float16 has too few bits for updates"
    return f"trainable {' and '.join(found)} weights are held in float32, because {why}"
