"""Weights sharded among processes, by FSDP or by DeepSpeed's ZeRO-3."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


def keep_precision(plugin: Any) -> None:
    """Make accelerate's FSDP plugin keep the dtype of outputs and reduce gradients in fp32.

    Accelerate's mixed-precision policy casts outputs to half precision; a sum of a few hundred log-probs is then off by
    whole nats.
    """
    policy = plugin.mixed_precision_policy
    if plugin.fsdp_version == 2:
        policy = dataclasses.replace(policy or MixedPrecisionPolicy(), output_dtype=None, reduce_dtype=torch.float32)
    elif policy is not None:
        policy = dataclasses.replace(policy, reduce_dtype=torch.float32)
    plugin.mixed_precision_policy = policy


def is_sharded(model: nn.Module) -> bool:
    """Whether weights are gathered by all ranks together."""
    return (
        any(isinstance(each, FullyShardedDataParallel) for each in model.modules())
        or any(isinstance(each, DTensor) for each in model.parameters())
        or is_partitioned(model)
    )


def without_ddp(model: nn.Module) -> nn.Module:
    """The model without its DDP wrapper. DDP synchronises buffers in each call, so ranks that call it unequally often
    would wait for each other. Wrappers of sharded weights stay."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 has partitioned the weights: this process holds a part of each weight."""
    return any(_is_part(each) for each in model.parameters())


def _is_part(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Tensor) -> torch.Size:
    """The full shape of a weight, partitioned or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def local_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights by name; for sharded weights, this process's part. Memory is shared."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # weights left gathered by a forward pass are copies
    return {name: _local(weight) for name, weight in model.named_parameters()}


def _local(weight: Any) -> Tensor:
    if isinstance(weight, DTensor):
        return weight.to_local()
    if _is_part(weight):
        if weight.ds_status.name == "AVAILABLE":
            weight.partition()  # small weights that ZeRO-3 keeps gathered are copies
        return weight.ds_tensor
    return weight


# --- DeepSpeed's ZeRO-3 -------------------------------------------------------------------------------------------


def zero_3_is_planned() -> bool:
    """Whether this process trains with ZeRO-3. transformers then partitions each model at loading."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


@contextlib.contextmanager
def loaded_whole() -> Iterator[None]:
    """Within the context, models load whole also under ZeRO-3, so that ranks may call them unequally often."""
    from transformers.integrations import deepspeed as integration

    before = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = before


def whole(parameters: Iterable[Tensor], *, written: bool = False) -> contextlib.AbstractContextManager[Any]:
    """Within the context, weights partitioned by ZeRO-3 are whole; all ranks must enter it together. With `written`,
    the first rank's changes to them are kept."""
    parts = [each for each in parameters if _is_part(each)]
    if not parts:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parts, modifier_rank=0 if written else None)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Forward passes of a model partitioned by ZeRO-3, before DeepSpeed has put its own hooks on it.

    Layers are gathered one at a time, the rest (embeddings, norms, head) for the whole context. All ranks must call the
    model equally often. Does nothing for any other model.
    """
    if not is_partitioned(model) or any("ds_inflight_param_registry" in vars(each) for each in model.modules()):
        yield
        return
    layers, rest = _layers(model)
    held: list[Any] = []

    def enter(layer: nn.Module, *_: Any) -> None:
        held.append(whole(each for each in layer.parameters() if id(each) not in outside))
        held[-1].__enter__()

    def leave(*_: Any) -> None:
        held.pop().__exit__(None, None, None)

    outside = {id(each) for each in rest}
    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    hooks += [layer.register_forward_hook(leave, always_call=True) for layer in layers]
    try:
        with whole(rest):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _layers(model: nn.Module) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """The members of the outermost module lists, and the parameters outside of them."""
    layers: list[nn.Module] = []
    rest: dict[int, nn.Parameter] = {}

    def walk(module: nn.Module) -> None:
        rest.update((id(each), each) for each in module.parameters(recurse=False))
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                layers.extend(child)
            else:
                walk(child)

    walk(model)
    return layers, list(rest.values())


def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the model's `state_dict`, sorted by name; each weight is whole while it is yielded."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in sorted(model.state_dict().items()):
        weight = parameters.get(name)
        if weight is not None and _is_part(weight):
            with whole([weight]):
                yield name, weight.detach()
        else:
            yield name, tensor


def deep_copy(model: nn.Module) -> nn.Module:
    """A copy with its own weights; weights partitioned by ZeRO-3 are partitioned in the copy too."""
    new: dict[int, Any] = {}
    for weight in model.parameters():
        if not _is_part(weight):
            continue
        with whole([weight]):
            new[id(weight)] = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        convert: Any = weight.convert_to_zero_parameters  # type: ignore[attr-defined]
        convert(param_list=[new[id(weight)]])
    return copy.deepcopy(model, new)


def inference_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings for a model that only runs forward, from the `settings` of the trained model.

    Values of `auto` are resolved only when training begins; they are left out.
    """
    kept: dict[str, Any] = {name: settings[name] for name in ("zero_optimization", "bf16", "fp16") if name in settings}
    kept = {name: {key: value for key, value in part.items() if value != "auto"} for name, part in kept.items()}
    kept["zero_optimization"].pop("offload_optimizer", None)
    return {**kept, "train_micro_batch_size_per_gpu": 1}


def gathered_by_its_call(module: nn.Module) -> bool:
    """Whether the module's own hooks gather its weights when it is called."""
    return isinstance(module, FSDPModule) or is_partitioned(module)
