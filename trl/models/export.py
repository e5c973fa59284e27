"""Writes models for other programs: safetensors or GGUF, checked by opening what was written."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from .agreement import probe_rows
from .gguf_writing import TYPES, architecture_of, write_gguf
from .load import ModelError, adapter_base, load_of, load_tokenizer, torch_dtype
from .merging import merge_in_memory, new_folder, stored_dtype, write_model

FORMATS = ("safetensors", "gguf")
_GGUF = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclasses.dataclass
class Exported:
    """What was written, and the gaps that `Merged` explains; those of the adapter are None for a whole model."""

    path: str
    format: str
    dtype: str
    source: str
    rounding: float
    written: float
    base: str | None = None
    effect: float | None = None
    gap: float | None = None


def export_model(
    source: str | Path,
    output: str | Path,
    *,
    format: str = "safetensors",
    dtype: Any = "auto",
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    pre: str | None = None,
    device: Any = None,
    max_shard_size: str = "5GB",
    **kwargs: Any,
) -> Exported:
    """Write a model, or a base with an adapter merged in, into the new folder (safetensors) or file (GGUF) `output`.

    What was written is opened again. Its logits must be those of the model in memory, else `MergeError` is raised and
    nothing is left.

    source     a folder or a name; an adapter's folder is merged into `base`, by default the one that it names
    adapter    an adapter that is merged into `source`
    dtype      "auto": the checkpoint's. safetensors: a name or `torch.dtype`; GGUF: f32, f16, bf16 or q8_0
    pre        GGUF: see `write_gguf`

    Quantised weights are unpacked first. Other arguments go to `from_pretrained`. Raises `ModelError` with a remedy
    for an architecture or a tokenizer that the format cannot hold, and if `output` exists.
    """
    if format not in FORMATS:
        raise ModelError(f"format={format!r} is not one of {', '.join(FORMATS)}")
    path = new_file(output) if format == "gguf" else new_folder(output)
    kind = str(dtype).lower() if format == "gguf" and str(dtype).lower() in TYPES else None
    if format == "gguf" and kind is None and isinstance(dtype, str) and re.fullmatch(r"i?q\w+", dtype.lower()):
        raise ModelError(
            f"dtype={dtype!r} is not written here: {', '.join(TYPES)} are. Export f16 and let llama.cpp's "
            "llama-quantize make smaller types of it"
        )
    target = None if kind else torch_dtype(dtype)
    if adapter is not None:
        source, base = adapter, base or source
    is_adapter = (Path(source).expanduser() / "adapter_config.json").exists()
    name = str(base or adapter_base(str(source))) if is_adapter else str(source)
    if format == "gguf" and (config := _config(name)) is not None:
        architecture_of(config)  # before weights are read
    facts: dict[str, Any] = {}
    if is_adapter:
        found = merge_in_memory(source, base=base, device=device, **kwargs)
        model, tokenizer, rows = found.model, found.tokenizer, found.rows
        facts = {"base": found.base, "effect": found.effect, "gap": found.gap}
    else:
        model = load_of(_kind(name), name, dtype=torch.float32, dequantise=True, **kwargs)
        model = model.to(device) if device is not None else model
        code = {each: kwargs[each] for each in ("trust_remote_code",) if each in kwargs}
        tokenizer, rows = load_tokenizer(name, **code), probe_rows(model.get_input_embeddings().weight.shape[0])
    target = stored_dtype(name, **kwargs) if target == "auto" else target
    if format == "gguf":
        kind = kind or _GGUF.get(target) or str(target)  # type: ignore[arg-type]
        gaps = write_gguf(model, tokenizer, path, rows=rows, kind=kind, name=Path(str(source)).name, pre=pre)
    else:
        assert isinstance(target, torch.dtype)
        gaps = write_model(model, tokenizer, path, dtype=target, rows=rows, max_shard_size=max_shard_size)
    written = kind or str(target).removeprefix("torch.")
    return Exported(str(path), format, written, str(source), *gaps, **facts)


def new_file(path: str | Path) -> Path:
    """The path of a GGUF file that is about to be made. Raises `ModelError` if it exists, or is no such name."""
    file = Path(path).expanduser()
    if file.suffix != ".gguf":
        raise ModelError(f"a GGUF file is one file: give its name, such as {file / 'model.gguf'}")
    if file.exists():
        raise ModelError(f"{file} exists already: name another file, or remove it first")
    return file


def _config(name: str) -> Any:
    """A model's configuration; None if it cannot be read, which loading the model reports."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        return None


def _kind(name: str) -> Any:
    names = getattr(_config(name), "architectures", None) or [""]
    scores = names[0].endswith("ForSequenceClassification")
    return AutoModelForSequenceClassification if scores else AutoModelForCausalLM
