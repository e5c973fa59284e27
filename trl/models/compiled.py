"""The parts of a model that `torch_compile` compiles."""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_tokenwise(model: nn.Module, **options: Any) -> int:
    """Compile, in place, the parts of each layer that act on single tokens; return their number. `options` go to
    `torch.compile`.

    These parts (norms, feed-forward) depend only on a batch's number of tokens, so they are compiled once for all
    lengths. Attention by segment and the chunked head read lengths that differ in every batch: they would be recompiled
    for each batch, until torch gives up and runs them uncompiled.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    parts = [part for layer in layers for part in layer.children() if _is_tokenwise(part)]
    for part in parts:
        # Not `part.compile`: all parts would share the code of `Module.__call__`, and with it torch's recompilation
        # limit.
        part.forward = types.MethodType(_compiled(type(part), tuple(sorted(options.items()))), part)
    return len(parts)


_found: dict[tuple[type, tuple], Any] = {}


def _compiled(cls: type[nn.Module], options: tuple) -> Any:
    """The compiled `forward` of a class, one for all layers."""
    if (cls, options) not in _found:
        _found[cls, options] = torch.compile(cls.forward, dynamic=True, **dict(options))
    return _found[cls, options]


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Within the context, the model's compiled parts run as they are: for callers that change layers inside of them,
    each of which would be compiled anew."""
    compiled = set(_found.values())
    parts = [each for each in model.modules() if getattr(vars(each).get("forward"), "__func__", None) in compiled]
    own = [part.forward for part in parts]
    for part in parts:
        del part.forward
    try:
        yield
    finally:
        for part, forward in zip(parts, own, strict=True):
            part.forward = forward


def _is_tokenwise(part: nn.Module) -> bool:
    """Whether a part acts on single tokens. Experts are excluded: their tokens are known only when the layer runs."""
    if not any(True for _ in part.parameters()) or "forward" in vars(part):
        return False
    modules = list(part.modules())
    names = {name.rpartition(".")[2] for name, _ in part.named_modules()}
    mixes = any(hasattr(each, "layer_idx") or "attention" in type(each).__name__.lower() for each in modules)
    return not mixes and not names & {"experts", "router", "gate"}
