"""Saved activations: elsewhere, or fewer of them."""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Smaller tensors cost more to move than they free.
SMALLEST_OFFLOADED = 2**16


def on_host(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Keep what the forward pass saves on the accelerator in pinned host memory until the backward pass reads it.

    Parameters stay, and so does what is small or already on the host.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Any:
        stays = tensor.device.type == "cpu" or tensor.numel() < SMALLEST_OFFLOADED
        if stays or tensor.untyped_storage().data_ptr() in weights:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        return tensor.device, host

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


# Their outputs are kept: recomputing them is what checkpointing costs. Everything between is recomputed.
_EXPENSIVE = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def understand_selective(model: Any) -> None:
    """Let `gradient_checkpointing_kwargs={"selective": True}` mean: keep matrix products and attention, recompute the
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
