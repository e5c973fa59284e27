"""What is saved beside the weights, tried before the first step: a run must not fail at its first save."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trl.notices import notify_once

from .adapters import has_adapter


def mend_generation_config(model: Any) -> None:
    """Make sure that the generation configuration passes the check that transformers makes when it saves a model.

    Published ones exist that do not: transformers saves them as long as nobody changes them, and a trainer does, since
    it writes the tokenizer's end and padding tokens into them.
    """
    config = getattr(model, "generation_config", None)
    if config is None or has_adapter(model) or not getattr(model, "can_generate", lambda: False)():
        return
    first = _refusal(config)
    if first is None:
        return
    sampled, config.do_sample = config.do_sample, True  # settings of sampling were meant to be used
    if _refusal(config) is None:
        notify_once(
            "the model's generation_config has settings of sampling without do_sample=True, which transformers does "
            "not save: do_sample is set to True"
        )
        return
    config.do_sample = sampled
    raise ValueError(
        f"the model's generation_config cannot be saved: {first} Put it right in model.generation_config, or reset it: "
        "model.generation_config = GenerationConfig()"
    )


def _refusal(config: Any) -> str | None:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def try_saving(model: Any, tokenizer: Any, args: Any) -> None:
    """Write all that is saved beside the weights into a folder that is thrown away. An error names what failed."""
    parts: dict[str, Callable[[str], Any]] = {}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if has_adapter(model):
        for config in model.peft_config.values():
            parts["adapter's configuration"] = config.save_pretrained
    elif hasattr(base, "config"):
        parts["model's configuration"] = base.config.save_pretrained
    if hasattr(tokenizer, "save_pretrained"):
        parts["tokenizer"] = tokenizer.save_pretrained
    parts["trainer's arguments"] = lambda folder: torch.save(args, Path(folder) / "training_args.bin")
    with tempfile.TemporaryDirectory() as folder:
        for what, save in parts.items():
            try:
                save(folder)
            except Exception as error:  # whatever it is, it would come again after the training
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(f"the {what} cannot be saved, so that the training would be lost: {reason}") from error
