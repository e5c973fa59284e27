"""Saved activations: offloaded to the host, or fewer of them (selective checkpointing)."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.attention.varlen
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Smaller tensors cost more to move than they free.
SMALLEST_OFFLOADED = 2**16


@contextlib.contextmanager
def on_host(model: nn.Module) -> Iterator[None]:
    """Keep activations that the forward pass saves in pinned host memory until the backward pass reads them.

    Parameters and tensors that are small, sharded or already on the host are not moved.
    """
    with _weights(model) as weights:

        def pack(tensor: Tensor) -> Any:
            stays = isinstance(tensor, DTensor) or tensor.device.type == "cpu" or tensor.numel() < SMALLEST_OFFLOADED
            if stays or tensor.untyped_storage().data_ptr() in weights:
                return tensor
            return _to_host(tensor)

        with torch.autograd.graph.saved_tensors_hooks(pack, _from_host):
            yield


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return tensor.device, host


def _from_host(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, host = packed
    return host.to(device, non_blocking=True)


@contextlib.contextmanager
def _weights(model: nn.Module) -> Iterator[set[int]]:
    """The addresses of the model's weights in memory. A weight sharded by FSDP2 has one only while its module has it
    gathered; later the memory may hold something else."""
    weights = _addresses(model)
    gathered: dict[nn.Module, set[int]] = {}

    def before(module: nn.Module, *_: Any) -> None:
        gathered[module] = _addresses(module) - weights
        weights.update(gathered[module])

    def after(module: nn.Module, *_: Any) -> None:
        weights.difference_update(gathered.pop(module, ()))

    hooks = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Registered after FSDP's own hooks, so called after them.
            hooks.append(module.register_forward_pre_hook(before))
            hooks.append(module.register_forward_hook(after, always_call=True))
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()


def _addresses(module: nn.Module) -> set[int]:
    whole = (parameter for parameter in module.parameters() if not isinstance(parameter, DTensor))
    return {parameter.untyped_storage().data_ptr() for parameter in whole}


# Outputs of these are kept, because recomputing them is the cost of checkpointing. All others are recomputed.
_EXPENSIVE = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,  # of torch.nn.attention.varlen
}


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def understand_selective(model: Any) -> None:
    """Support `gradient_checkpointing_kwargs={"selective": True}`: keep matrix products and attention, recompute the
    rest (torch's selective activation checkpointing)."""
    # The name that `Trainer` calls; transformers renamed it in 5.2x.
    renamed = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing_enable" if renamed else "gradient_checkpointing_enable"
    setattr(model, name, functools.partial(_enable, getattr(model, name)))


def _enable(original: Any, kwargs: dict[str, Any] | None = None, **named: Any) -> Any:
    for key in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        kwargs = named.pop(key, None) or kwargs
    kwargs = dict(kwargs or {})
    if kwargs.pop("selective", False):
        kwargs["use_reentrant"] = False
        kwargs["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    return original(kwargs or None, **named)


def enable_checkpointing(model: Any, options: dict[str, Any] | None = None) -> None:
    """Recompute activations in the backward pass; transformers renames its method from 5.2x on."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
