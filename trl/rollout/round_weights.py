"""Weights in the form in which completions are drawn fastest: sharded ones held whole, adapters merged."""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trl.engine.linear import product
from trl.models.compiled import uncompiled
from trl.models.shards import is_sharded

from .exchange import anyone

SHARE = 0.5  # of the free memory that whole weights may take; keys and values come beside them


@contextlib.contextmanager
def held_whole(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the context, without gradients, every rank holds whole copies of the weights that FSDP2 has sharded.

    They are gathered once, not layer by layer for every token, and ranks may call the model unequally often. All ranks
    enter together. Weights stay sharded if a rank has too little free memory, and before the model's first forward
    pass, which completes FSDP's set-up. They are sharded again afterwards, also after an exception.
    """
    modules = [each for each in model.modules() if isinstance(each, FSDPModule)]
    states: list[Any] = [each._get_fsdp_state() for each in modules]
    if not modules or any(each._is_root is None for each in states) or anyone(not _fits(modules, device), device):
        yield
        return
    groups = [group for state in states for group in _groups(state)]
    kept = [group.post_forward_mesh_info for group in groups]
    try:
        for group in groups:
            group.post_forward_mesh_info = None  # does not shard again after a forward pass
        for module in modules:
            module.unshard()
        yield
    except BaseException:
        if hasattr(modules[0], "reset_iter_state"):
            modules[0].reset_iter_state()  # a forward pass that has not ended would keep its weights
        raise
    finally:
        for group, own in zip(groups, kept, strict=True):
            group.post_forward_mesh_info = own
        for module in modules:
            module.reshard()


@contextlib.contextmanager
def adapter_merged(model: nn.Module) -> Iterator[None]:
    """Within the context, without gradients, layers with a LoRA adapter compute one product, not three.

    Their merged weights are copies beside the model's own, which are not touched: as much memory again as the adapted
    layers take; without it nothing is merged. A layer whose adapter is switched off, or another one on, within the
    context computes as ever.

    Merged are plain LoRA layers over float32 weights, in full float32 precision: log-probs are then the policy's up to
    rounding. bfloat16 has 8 bits: a merged weight loses what is smaller than 1/512 of it, so completions would
    come from another policy than the one that trains. Quantised and sharded layers and DoRA are not merged.
    """
    layers = _plain_lora(model)
    if layers and sum(4 * each.weight.numel() for each in layers) > SHARE * _free(layers[0].weight.device):
        layers = []
    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _Merged(layer)
    try:
        with uncompiled(model) if layers else contextlib.nullcontext():
            yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _plain_lora(model: nn.Module) -> list[Any]:
    """The layers whose active adapters can be merged exactly."""
    exact = torch.get_float32_matmul_precision() == "highest"
    if "peft" not in sys.modules or not exact or is_sharded(model):
        return []
    from peft.tuners.lora.layer import Linear

    found: list[Any] = [each for each in model.modules() if type(each) is Linear and not each.disable_adapters]
    return [each for each in found if not each.merged and _can_merge(each, each.get_base_layer())]


def _can_merge(layer: Any, base: nn.Module) -> bool:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    special = any(layer.lora_bias.get(name) or name in layer.lora_variant for name in names)
    if not names or special or type(base) is not nn.Linear or base.weight.is_meta:
        return False
    if torch.is_autocast_enabled(base.weight.device.type):
        return False
    weights = [base.weight, *(part[name].weight for name in names for part in (layer.lora_A, layer.lora_B))]
    return all(type(each) is nn.Parameter and each.dtype == torch.float32 and each.numel() for each in weights)


class _Merged:
    """The forward pass of a layer by one merged weight, `x` [..., in features] to [..., out features]."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.names = layer, list(layer.active_adapters)
        self.own = vars(layer).get("forward") or functools.partial(type(layer).forward, layer)
        base = layer.get_base_layer()
        self.bias = base.bias
        self.weight = base.weight.detach()
        for name in self.names:
            if name in layer.lora_A:
                down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
                self.weight = torch.addmm(self.weight, up, down, alpha=layer.scaling[name])

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        changed = layer.disable_adapters or layer.active_adapters != self.names
        if changed or args or kwargs or torch.is_grad_enabled() or x.dtype != torch.float32:
            return self.own(x, *args, **kwargs)
        return product(x, self.weight, self.bias)


def _groups(state: Any) -> list[Any]:
    """The groups of weights of a module; torch up to 2.12 has at most one."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []


def _fits(modules: list[Any], device: torch.device) -> bool:
    """Whether the whole weights, in the dtype that they are gathered in, take at most `SHARE` of what is free."""
    dtype = modules[0]._get_fsdp_state()._mp_policy.param_dtype
    weights = {id(each): each for module in modules for each in module.parameters() if isinstance(each, DTensor)}
    size = sum(each.numel() * (dtype or each.dtype).itemsize for each in weights.values())
    return size <= SHARE * _free(device)


def _free(device: torch.device) -> float:
    """Bytes of free memory, of those that this process may take."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    import psutil

    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
