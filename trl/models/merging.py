"""Merges an adapter into its base model, writes the result, and checks what was written."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from trl.data.tokenizing.chat import end_tokens
from trl.notices import notify_once

from .adapters import require_peft, without
from .agreement import LARGEST, gap, outputs, probe_rows
from .gguf import write_folder
from .load import ModelError, adapter_base, load_of, load_tokenizer, torch_dtype
from .saving import mend_generation_config

_KINDS = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}


@dataclasses.dataclass
class Merged:
    """What was merged. The gaps are root mean squares of differences of logits, relative to the logits.

    `effect` is what the adapter changes; `gap` what the merged weights change of that; `rounding` what their dtype
    changes; `written` is the gap between the model in memory and the one that was written and opened again.
    """

    folder: str
    base: str
    adapter: str
    dtype: str
    effect: float
    gap: float
    rounding: float
    written: float
    tied: bool


class MergeError(ValueError):
    """A merged model does not compute what the adapter's model does; nothing was written."""


def merge_adapter(
    adapter: str | Path,
    output_dir: str | Path,
    *,
    base: str | Path | None = None,
    dtype: Any = "auto",
    compute_dtype: Any = "float32",
    device: Any = None,
    max_shard_size: str = "5GB",
    **kwargs: Any,
) -> Merged:
    """Write the model that an adapter's folder and its base make together, with its tokenizer.

    The written model is opened again. Its logits must be those of the base with its adapter, else `MergeError` is
    raised and nothing is left: `output_dir` appears whole or not at all.

    base             the base model; by default the one that the adapter's folder names
    dtype            of the written weights; "auto": the base checkpoint's
    compute_dtype    of the models that are compared. "auto" takes the checkpoint's, in half the memory of float32, and
                     compares less sharply. Each weight is merged in float32 in any case.
    device           where it is computed; default: the CPU

    A base whose weights are quantised is unpacked first. Other arguments go to `from_pretrained`. Raises `ModelError`
    with a remedy, also if `output_dir` exists.
    """
    folder = new_folder(output_dir)
    found = merge_in_memory(adapter, base=base, compute_dtype=compute_dtype, device=device, **kwargs)
    target = torch_dtype(dtype)
    target = stored_dtype(found.base, **kwargs) if target == "auto" else target
    rounding, written = write_model(
        found.model, found.tokenizer, folder, dtype=target, rows=found.rows, max_shard_size=max_shard_size
    )
    return Merged(
        folder=str(folder),
        base=found.base,
        adapter=str(adapter),
        dtype=str(target).removeprefix("torch."),
        effect=found.effect,
        gap=found.gap,
        rounding=rounding,
        written=written,
        tied=found.tied,
    )


class InMemory(NamedTuple):
    """A merged model, what it was made of, and the rows that it was compared on; the gaps are those of `Merged`."""

    model: Any
    tokenizer: Any
    base: str
    rows: torch.Tensor
    effect: float
    gap: float
    tied: bool


def merge_in_memory(
    adapter: str | Path,
    *,
    base: str | Path | None = None,
    compute_dtype: Any = "float32",
    device: Any = None,
    **kwargs: Any,
) -> InMemory:
    """The base of an adapter with the adapter merged in, compared with the two; arguments and errors are those of
    `merge_adapter`."""
    adapter = Path(adapter).expanduser()
    path = adapter / "adapter_config.json"
    if not path.exists():
        what = "a whole model" if (adapter / "config.json").exists() else "not the folder of an adapter"
        raise ModelError(f"{adapter} is {what}: there is no adapter_config.json, so there is nothing to merge")
    settings = json.loads(path.read_text())
    base = str(base or adapter_base(str(adapter)))
    model = _opened(adapter, settings, base, compute_dtype, **kwargs)
    model = model.to(device) if device is not None else model
    rows = probe_rows(model.get_input_embeddings().weight.shape[0], _trained_tokens(settings))
    wanted = outputs(model, rows)
    with without(model):
        effect = gap(outputs(model, rows), wanted)
    model, tied = fold(model)
    found = gap(outputs(model, rows), wanted)
    check("merging", found, model.dtype)
    code = {name: kwargs[name] for name in ("trust_remote_code",) if name in kwargs}
    tokenizer = load_tokenizer(adapter if (adapter / "tokenizer_config.json").exists() else base, **code)
    _take_ends(model, tokenizer)
    return InMemory(model, tokenizer, base, rows, effect, found, tied)


def _take_ends(model: Any, tokenizer: Any) -> None:
    """Let the model's own `generate` stop where the tokenizer's texts and turns end: an adapter that was trained with
    another chat template comes with the tokenizer alone."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    own = config.eos_token_id
    known = list(own) if isinstance(own, list) else [] if own is None else [own]
    missing = sorted(end_tokens(tokenizer) - set(known))
    if missing:
        config.eos_token_id = [*missing, *known]
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(missing)))
        notify_once(f"the tokenizer's texts and turns end with {names}: the model's generation_config takes that over")


def new_folder(path: str | Path) -> Path:
    """The path of a folder that is about to be made. Raises `ModelError` if it exists and is not empty."""
    folder = Path(path).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} exists already: name another folder, or remove it first")
    return folder


def _opened(adapter: Path, settings: dict[str, Any], base: str, compute_dtype: Any, **kwargs: Any) -> Any:
    """The base with its adapter, quantised weights unpacked. Raises `ModelError` for an adapter that has no weights to
    merge, or that belongs to another kind of model."""
    peft = require_peft("merging an adapter")
    task = settings.get("task_type") or "CAUSAL_LM"
    if task not in _KINDS:
        raise ModelError(f"the adapter in {adapter} is for {task}; {', '.join(_KINDS)} are merged here")
    config = peft.PeftConfig.from_pretrained(adapter)
    if getattr(config, "is_prompt_learning", False):
        raise ModelError(
            f"the adapter in {adapter} ({settings.get('peft_type')}) consists of virtual tokens, which are no part of "
            "the weights: there is nothing to merge, and the adapter must be loaded with its base"
        )
    labels = _labels(adapter) if task != "CAUSAL_LM" else None
    more = {"num_labels": labels} if labels else {}
    model = load_of(_KINDS[task], base, adapter=adapter, dtype=compute_dtype, dequantise=True, **more, **kwargs)
    if not hasattr(model.base_model, "merge_and_unload"):
        raise ModelError(f"PEFT cannot merge an adapter of the kind {settings.get('peft_type')}")
    return model


def _labels(adapter: Path) -> int | None:
    """The number of labels of an adapter's scoring head, or None if it has none."""
    from safetensors import safe_open

    path = adapter / "adapter_model.safetensors"
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        heads = [key for key in file.keys() if key.endswith((".score.weight", ".classifier.weight"))]
        return file.get_slice(heads[0]).get_shape()[0] if heads else None


def _trained_tokens(settings: dict[str, Any]) -> list[int]:
    trained = settings.get("trainable_token_indices") or []
    return [each for part in (trained.values() if isinstance(trained, dict) else [trained]) for each in part]


def stored_dtype(name: str, **kwargs: Any) -> torch.dtype:
    """The dtype of a checkpoint's weights; that of its other weights if some are quantised."""
    wanted = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
    config = AutoConfig.from_pretrained(name, **wanted)
    found = config.get_text_config().dtype or config.dtype
    return torch_dtype(found) if found is not None else torch.float32


# --- merging in memory --------------------------------------------------------------------------------------------


def fold(model: Any) -> tuple[Any, bool]:
    """The model with its adapter's changes in its own weights, and whether embeddings and head are still one matrix.

    PEFT adds a change to a weight in place. Where embeddings and head share one matrix and the adapter changes one of
    the two alone, that would change the other too, and so would reading the saved model, which ties them again. They
    are parted before, and tied again after if they are still equal; else the configuration says that they are not.
    Each weight is merged in float32 and keeps its dtype.
    """
    peft = require_peft("merging an adapter")
    dtype = next(model.get_base_model().parameters()).dtype
    tied = _part(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        if dtype != torch.float32:
            for layer in [
                each for each in model.modules() if isinstance(each, peft.tuners.tuners_utils.BaseTunerLayer)
            ]:
                layer.float()
                layer.merge(safe_merge=True)
                layer.to(dtype)
        merged = model.merge_and_unload(safe_merge=True)
    _round(merged, dtype)
    if tied:
        one, other = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
        tied = one.shape == other.shape and gap(one.float(), other.float()) <= 1e-6
        _set_tied(merged, tied)
        if tied:
            merged.tie_weights()
        else:
            notify_once("the adapter changes embeddings and head differently: the merged model has one matrix for each")
    return merged, tied


def _part(model: Any) -> bool:
    """Give the head a matrix of its own if it shares that of the embeddings. Returns whether it did."""
    base = model.get_base_model()
    head = base.get_output_embeddings()
    if head is None:
        return False
    shared = innermost(base.get_input_embeddings()).weight
    head = innermost(head)
    if head.weight is not shared:
        return False
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=False)
    return True


def innermost(module: Any) -> Any:
    """The layer of the base model inside the wrappers that PEFT puts around it."""
    while True:
        inner = getattr(module, "original_module", None) or getattr(module, "base_layer", None)
        inner = inner or getattr(getattr(module, "token_adapter", None), "base_layer", None)
        if inner is None:
            return module
        module = inner


def _set_tied(model: Any, tied: bool) -> None:
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied


# --- writing ------------------------------------------------------------------------------------------------------


def write_model(
    model: Any, tokenizer: Any, folder: Path, *, dtype: torch.dtype, rows: torch.Tensor, max_shard_size: str = "5GB"
) -> tuple[float, float]:
    """Write model and tokenizer into a new folder, open them again and compare. The model is rounded to `dtype`.

    Returns the gap that rounding makes and the gap between the rounded model and the opened one. Raises `MergeError`,
    and leaves no folder, if the opened model computes something else.
    """
    exact, computes = outputs(model, rows), model.dtype
    gaps: list[float] = []

    def write(target: Path) -> None:
        _round(model, dtype)
        mend_generation_config(model)
        model.save_pretrained(target, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(target)
        _round(model, computes)
        here = outputs(model, rows)
        device = next(model.parameters()).device
        again = type(model).from_pretrained(target, dtype=computes).to(device)
        gaps.extend((gap(here, exact), gap(outputs(again, rows), here)))
        check("writing", gaps[1], computes)

    write_folder(folder, write)
    return gaps[0], gaps[1]


def _round(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights, and them alone: buffers (rotary frequencies) keep their precision."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    for config in (model.config, model.config.get_text_config()):
        config.dtype = dtype


def check(what: str, found: float, dtype: torch.dtype) -> None:
    """Raise `MergeError` if a gap is larger than rounding in `dtype` explains."""
    largest = LARGEST.get(dtype, LARGEST[torch.bfloat16])
    if not found <= largest:
        raise MergeError(
            f"the logits changed by {found:.1e} of their size in {what}, and rounding explains {largest:.0e}: nothing "
            "was written. A damaged adapter, a full disk or an adapter that PEFT cannot merge are possible reasons"
        )
