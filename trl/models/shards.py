"""Weights that processes share out among themselves, by FSDP."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def keep_precision(plugin: Any) -> None:
    """Let accelerate's FSDP plugin compute as its mixed precision says, but give out numbers as they are and add up
    gradients in fp32.

    Accelerate's policy casts whatever leaves the model to half precision: log-probs, whose sum over a few hundred
    tokens is then off by whole nats.
    """
    policy = plugin.mixed_precision_policy
    if plugin.fsdp_version == 2:
        policy = dataclasses.replace(policy or MixedPrecisionPolicy(), output_dtype=None, reduce_dtype=torch.float32)
    elif policy is not None:
        policy = dataclasses.replace(policy, reduce_dtype=torch.float32)
    plugin.mixed_precision_policy = policy


def is_sharded(model: nn.Module) -> bool:
    """Whether weights are gathered by all ranks together."""
    return any(isinstance(each, FullyShardedDataParallel) for each in model.modules()) or any(
        isinstance(each, DTensor) for each in model.parameters()
    )


def without_ddp(model: nn.Module) -> nn.Module:
    """The model as it computes without DDP, which sends buffers from rank to rank when it is called: ranks that call it
    different numbers of times would wait for one another. Wrappers of sharded weights stay."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def local_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights by name; of those that FSDP2 shards, this process's part. Memory is shared."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what a forward pass without a backward pass leaves gathered is a copy
    return {
        name: weight.to_local() if isinstance(weight, DTensor) else weight for name, weight in model.named_parameters()
    }
