"""Sharded weights held whole while completions are drawn."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

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
