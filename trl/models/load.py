"""Models and tokenizers by name, path or adapter folder."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .adapters import require_peft


class ModelError(ValueError):
    """A model that cannot be loaded or trained, with what to do about it."""


def adapter_base(path: str) -> str | None:
    """The base model of an adapter folder, or None when `path` is not one."""
    config = Path(path) / "adapter_config.json"
    if not config.exists():
        return None
    base = json.loads(config.read_text()).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{config} does not say which base model the adapter belongs to: set base_model_name_or_path")
    return base


def load_causal_lm(name_or_path: str, **kwargs: Any) -> PreTrainedModel | Any:
    """A causal language model, or a trainable `PeftModel` when the path is an adapter's folder.

    Weights keep the checkpoint's dtype unless `dtype` says otherwise. Raises `ModelError` with a remedy.
    """
    kwargs = dict(kwargs)
    dtype = kwargs.pop("torch_dtype", None) if "dtype" not in kwargs else kwargs.pop("dtype")
    kwargs["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else (dtype or "auto")
    base = adapter_base(name_or_path)
    if base is not None:
        peft = require_peft("an adapter folder was given")
        return peft.PeftModel.from_pretrained(load_causal_lm(base, **kwargs), name_or_path, is_trainable=True)
    _check_path(name_or_path)
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
    except OSError as error:
        raise ModelError(f"cannot load the model {name_or_path!r}: {_first_sentence(error)}") from error


def load_tokenizer(name_or_path: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model; an adapter folder without one falls back to its base model's."""
    base = adapter_base(name_or_path)
    if base is not None and not (Path(name_or_path) / "tokenizer_config.json").exists():
        return load_tokenizer(base, **kwargs)
    _check_path(name_or_path)
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load a tokenizer from {name_or_path!r}: {_first_sentence(error)} "
            "Pass processing_class=, or save the tokenizer into the model's folder."
        ) from error


def _check_path(name_or_path: str) -> None:
    path = Path(name_or_path).expanduser()
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if looks_local and not path.exists():
        raise ModelError(f"no model folder at {name_or_path}")
    if path.is_dir() and not (path / "config.json").exists() and not (path / "adapter_config.json").exists():
        raise ModelError(f"{name_or_path} is a folder without config.json or adapter_config.json: not a saved model")


def _first_sentence(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
