"""The memory of activations, measured on tensors that have shapes and no values.

A model of one layer and one of two are run forward and backward through the library's own engine under torch's
`FakeTensorMode`, while what is alive is counted. What a third layer would add is what the second did.
"""

import copy
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, PreTrainedConfig

from trl.data.batching.collate import Branch, Tree
from trl.engine.probe import attach_unprobed
from trl.engine.score import score
from trl.models.offload import enable_checkpointing


class Linear(NamedTuple):
    """A number of bytes that grows with the layers: `once + each * layers`."""

    once: float
    each: float

    def of(self, layers: int) -> float:
        return self.once + self.each * layers


def layers_of(config: PreTrainedConfig) -> int:
    return config.get_text_config().num_hidden_layers


def empty_model(config: PreTrainedConfig, layers: int | None, dtype: torch.dtype, adapter: Any = None) -> nn.Module:
    """The model on the meta device, which holds nothing; with `layers` of its layers, or all."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if layers is not None:
        if getattr(text, "layer_types", None):
            text.layer_types = list(text.layer_types)[:layers]
        text.num_hidden_layers = layers
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if adapter is not None:
            from peft import get_peft_model

            model = get_peft_model(model, copy.deepcopy(adapter))
    return model


def activations(
    config: PreTrainedConfig,
    trees: list[Tree],
    *,
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
    adapter: Any = None,
    checkpointing: bool = False,
) -> Linear:
    """Bytes alive at the peak of a forward and a backward pass over a micro-batch, beyond weights and gradients."""
    peaks = [_peak(config, layers, trees, dtype, autocast, adapter, checkpointing) for layers in (1, 2)]
    return Linear(2 * peaks[0] - peaks[1], peaks[1] - peaks[0])


def _peak(
    config: PreTrainedConfig,
    layers: int,
    trees: list[Tree],
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    adapter: Any,
    checkpointing: bool,
) -> float:
    model: Any = empty_model(config, layers, dtype, adapter)
    attachment = attach_unprobed(model)
    if checkpointing:
        enable_checkpointing(model)
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
    model.train()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = _fake_model(model, mode)
    batch = _fake(attachment.batch(trees), mode)
    with mode:
        for parameter in model.parameters():
            if parameter.requires_grad:  # gradients are counted elsewhere: adding to one that is there takes no more
                parameter.grad = torch.empty_like(parameter)
    alive = _Alive()
    cast = torch.autocast("cpu", autocast) if autocast is not None else nullcontext()
    with mode, alive:
        with cast:
            stats = score(model, batch, entropy=True)
        stats.logp_N.sum().backward()
    return float(alive.peak)


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while it is on, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {id(each.untyped_storage()) for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)}
        found = func(*args, **(kwargs or {}))
        for each in tree_iter(found):
            if isinstance(each, Tensor) and id(storage := each.untyped_storage()) not in given:
                self._add(storage)
        return found

    def _add(self, storage: Any) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.bytes -= size


def _fake_model(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The model with tensors of `mode` in place of its own; ties are kept."""
    twins: dict[int, Any] = {}
    with mode:
        for tensor in [*model.parameters(), *model.buffers()]:
            twin: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
            twins[id(tensor)] = twin
        return copy.deepcopy(model, twins)


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, dict):
        return {key: _fake(each, mode) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_fake(each, mode) for each in value)
    return value


def tree(row: int, prompt: int, completions: list[int], trained_root: bool = False) -> Tree:
    """A prompt of `prompt` tokens with completions of the given lengths."""
    branches = tuple(Branch([1] * length, [True] * length) for length in completions)
    return Tree(Branch([1] * prompt, [trained_root] * prompt), branches, row=row)
