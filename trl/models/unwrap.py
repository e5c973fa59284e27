"""The model inside its wrappers, and its heads."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

SCALAR_HEAD = "score"  # transformers' name for the head of a decoder that classifies


def unwrap(model: Any) -> Any:
    """The transformers model inside its wrappers (DDP, FSDP, torch.compile, PEFT)."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def scalar_head(base: Any) -> nn.Module | None:
    """The head of a model that scores sequences or tokens, or None for a language model."""
    return getattr(base, SCALAR_HEAD, None) or getattr(base, "classifier", None)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context, the model is in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def without_value_head(model: Any) -> Any:
    """The model of a wrapper with a value head, which is a part of that model; any other model as it is."""
    return model.pretrained_model if hasattr(model, "v_head") and hasattr(model, "pretrained_model") else model
