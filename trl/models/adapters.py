"""Adapters: putting one on, and what of a model trains."""

import importlib
from typing import Any

from torch import nn


def require_peft(why: str) -> Any:
    """The `peft` package, or an error that names the extra."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ImportError(f"{why}, which needs the extra `peft`: pip install 'trl[peft]'") from error


def lora_config(settings: Any) -> Any:
    """The `LoraConfig` that a `ModelConfig` describes, or None when it does not ask for an adapter."""
    if not settings.use_peft:
        return None
    peft = require_peft("--use_peft trains a LoRA adapter")
    targets = settings.lora_target_modules
    return peft.LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=settings.lora_modules_to_save,
        task_type=settings.lora_task_type,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        bias="none",
    )


def wrap(model: nn.Module, peft_config: Any) -> nn.Module:
    """The model with a new trainable adapter; its own weights are frozen."""
    peft = require_peft("peft_config was given")
    if isinstance(model, peft.PeftModel):
        raise ValueError(
            "the model already carries an adapter: leave peft_config out to train it, "
            "or merge it first (model.merge_and_unload()) to put a new one on"
        )
    return peft.get_peft_model(model, peft_config)


def trainable(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable parameters and of all parameters."""
    train = total = 0
    for parameter in model.parameters():
        # A sharded parameter counts whole, a 4-bit one as what it stands for.
        count = getattr(parameter, "ds_numel", None) or parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        train += count if parameter.requires_grad else 0
    return train, total
