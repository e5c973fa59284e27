"""Saves everything but the weights once before the first step, so that a run does not fail at its first save."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trl.notices import notify_once

from .adapters import has_adapter


def mend_generation_config(model: Any) -> None:
    """Make the generation configuration pass the check that transformers makes when it saves a model.

    Some published ones fail it. transformers saves them unless they change, and a trainer changes them: it writes the
    tokenizer's end and padding tokens into them. Raises ValueError if the configuration cannot be mended.
    """
    config = getattr(model, "generation_config", None)
    if config is None or has_adapter(model) or not getattr(model, "can_generate", lambda: False)():
        return
    first = _refusal(config)
    if first is None:
        return
    sampled, config.do_sample = config.do_sample, True  # sampling options were set to be used
    if _refusal(config) is None:
        notify_once(
            "the model's generation_config has sampling options without do_sample=True, which transformers refuses to "
            "save: do_sample is set to True"
        )
        return
    config.do_sample = sampled
    raise ValueError(
        f"the model's generation_config cannot be saved: {first} Correct model.generation_config, or reset it: "
        "model.generation_config = GenerationConfig()"
    )


def _refusal(config: Any) -> str | None:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def try_saving(model: Any, tokenizer: Any, args: Any) -> None:
    """Save everything but the weights into a temporary folder. ValueError names the part that cannot be saved."""
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
            except Exception as error:  # any error would occur again after training
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(f"the {what} cannot be saved, so the training would be lost: {reason}") from error


def push_folder(folder: str | Path, repository: str, *, private: bool | None = None) -> str:
    """Upload a model's folder to a repository on the Hub, which is made if need be; returns its address. ValueError
    with the command to try again."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(folder_path=str(folder), repo_id=repository)
    except (OSError, ValueError) as error:  # the package's errors are among these
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{folder} is written, and was not pushed to {repository}: {reason} To try again: "
            f"hf upload {repository} {folder}"
        ) from error
    return address
