"""GGUF files as plain model folders.

A GGUF file packs weights, tokenizer and chat template for llama.cpp. transformers can read one, but the model it
returns is marked as quantised and refuses to be saved. `convert` therefore copies the weights into a new model of the
same shape and writes an ordinary folder, which `from_pretrained` opens.
"""

from __future__ import annotations

import importlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Increased when the output of `convert` changes, so that folders of an older release are not reused.
FOLDER_VERSION = 1


def cache_dir() -> Path:
    """The cache folder: `TRL_CACHE`, or `~/.cache/trl`."""
    return Path(os.environ.get("TRL_CACHE") or Path.home() / ".cache" / "trl").expanduser()


def convert(gguf_file: str | Path, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write the model and tokenizer of `gguf_file` into `folder`, with weights in `dtype` (default: float32).

    The folder is written under another name and renamed at the end, so it is never incomplete. Raises FileNotFoundError
    without the file, and ImportError without the package `gguf`.
    """
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    gguf_file, folder = Path(gguf_file), Path(folder)
    dtype = dtype or torch.float32
    model = read(gguf_file)
    config = model.config
    model.to(dtype)
    # The configuration still has the dtype of before the cast.
    model.config.dtype = dtype
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )

    tokenizer = AutoTokenizer.from_pretrained(**_source(gguf_file))
    _split_digits_where_trained_so(tokenizer, gguf_file)
    tokenizer.model_max_length = config.max_position_embeddings

    def write(target: Path) -> None:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    return write_folder(folder, write)


def require_gguf(why: str) -> Any:
    """The `gguf` package; ImportError with the remedy if it is not installed. `why` begins its sentence."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError(f"{why} needs the package `gguf`: pip install gguf") from error


def read(gguf_file: Path) -> Any:
    """The model of a GGUF file in float32, as a plain model of transformers. Errors are those of `convert`."""
    import torch
    from transformers import AutoModelForCausalLM

    if not gguf_file.is_file():
        raise FileNotFoundError(f"There is no GGUF file at {gguf_file}.")
    require_gguf("Reading GGUF files")
    loaded = AutoModelForCausalLM.from_pretrained(**_source(gguf_file), dtype=torch.float32)
    left_out = ("quantization_config", "_model_name_or_path")
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key not in left_out}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    return model


def _source(gguf_file: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(gguf_file.parent),
        "gguf_file": gguf_file.name,
        "local_files_only": True,
    }


def write_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Let `write(path)` fill a temporary folder, then rename it to `folder`, which is thus never incomplete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        write(aside)
        for path in aside.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        try:
            aside.rename(folder)
        except OSError:
            # Another process finished first: its folder is as good as ours.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _split_digits_where_trained_so(tokenizer: Any, gguf_file: Path) -> None:
    """Restore the digit splitting that transformers drops when it reads the tokenizer of a SmolLM GGUF file.

    Without it, most texts tokenise the same, but spaces before a digit are grouped differently ("\\n\\n3").
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(gguf_file).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
