"""Loads models and tokenizers by name, path or adapter folder, in the requested dtype and bits, on the right device."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl.compat.words import older_words
from trl.notices import notify_once

from .adapters import require_peft
from .names import TOKENIZER, check_model, looks_local
from .names import ModelError as ModelError
from .shards import whole_shape

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


# --- by name, path or adapter folder ------------------------------------------------------------------------------


def adapter_base(path: str) -> str | None:
    """The base model of an adapter folder, or None if `path` is not an adapter folder."""
    config = Path(path).expanduser() / "adapter_config.json"
    if not config.exists():
        return None
    base = json.loads(config.read_text()).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{config} does not say which base model the adapter belongs to: set base_model_name_or_path")
    return base


def load_causal_lm(name_or_path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel | Any:
    """A causal language model, or a trainable `PeftModel` if the path is an adapter's folder.

    adapter                       the folder of an adapter for this model, in place of the base that its folder names
    dequantise                    True: a checkpoint of quantised weights is unpacked at loading
    dtype                         "auto" (default: the checkpoint's), a name, or a `torch.dtype`; also `torch_dtype`
    quantization_config           a `BitsAndBytesConfig` or a dictionary of its fields
    load_in_4bit, load_in_8bit    True: quantise with the usual settings
    device_map                    as in transformers; under a launcher, a map over several devices is dropped, because
                                  each process holds a whole model on its own device

    Other arguments go to `from_pretrained`. Raises `ModelError` with a remedy, ImportError for a missing package.
    """
    return load_of(AutoModelForCausalLM, name_or_path, **kwargs)


def load_of(kind: Any, name_or_path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel | Any:
    """A model of one of transformers' auto classes; arguments and errors are those of `load_causal_lm`."""
    kwargs = _placed(_quantised(_typed(kwargs)))
    adapter = kwargs.pop("adapter", None)
    if adapter is None:
        return _load(kind, str(name_or_path), kwargs)
    if not (Path(adapter).expanduser() / "adapter_config.json").exists():
        raise ModelError(f"{adapter} is not the folder of an adapter: it has no adapter_config.json")
    return _with_adapter(kind, str(name_or_path), str(Path(adapter).expanduser()), kwargs)


def load_scorer(
    name_or_path: str | os.PathLike, *, per_token: bool = False, num_labels: int = 1, **kwargs: Any
) -> PreTrainedModel | Any:
    """A model that scores sequences (with `per_token`, every token), with `num_labels` numbers each.

    A checkpoint without a scoring head gets a new one, with a notice. The adapter of a language model is merged into
    its base first, because its folder has no scoring head. Otherwise as `load_causal_lm`.
    """
    kind = AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification
    kwargs = {"num_labels": num_labels, **_placed(_quantised(_typed(kwargs)))}
    return _load(kind, str(name_or_path), kwargs)


def _load(kind: Any, name_or_path: str, kwargs: dict[str, Any]) -> PreTrainedModel | Any:
    base = adapter_base(name_or_path)
    if base is not None:
        return _with_adapter(kind, base, str(Path(name_or_path).expanduser()), kwargs)
    check_there(name_or_path, kwargs)
    kwargs = dict(kwargs)
    dequantise = kwargs.pop("dequantise", False)
    try:
        model, found = kind.from_pretrained(_expanded(name_or_path), output_loading_info=True, **kwargs)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the model {name_or_path!r}: {_first_sentence(error)}") from error
    except ImportError as error:
        # A quantised checkpoint has its own quantisation configuration.
        if "bitsandbytes" in str(error):
            _require_bitsandbytes(f"the model {name_or_path!r} is quantised", error)
        raise
    fresh = [key for key in found["missing_keys"] if key.split(".")[0] in ("score", "classifier")]
    if fresh:
        notify_once(
            f"{name_or_path} has no scoring head: a new one ({', '.join(sorted(fresh))}) is trained from the start"
        )
    return _dequantised(model, name_or_path, kwargs.get("dtype")) if dequantise else model


def load_tokenizer(name_or_path: str | os.PathLike, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model; an adapter folder without one falls back to its base model's. Raises
    `ModelError` with a remedy."""
    name_or_path = str(name_or_path)
    base = adapter_base(name_or_path)
    if base is not None and not (Path(name_or_path).expanduser() / "tokenizer_config.json").exists():
        _check_base(base, name_or_path)
        return load_tokenizer(base, **kwargs)
    check_there(name_or_path, kwargs, needs=TOKENIZER)
    try:
        return AutoTokenizer.from_pretrained(_expanded(name_or_path), **kwargs)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load a tokenizer from {name_or_path!r}: {_first_sentence(error)} "
            "Pass processing_class=, or save the tokenizer into the model's folder."
        ) from error


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer of a processor, since only text is trained on; a tokenizer is returned as it is."""
    tokenizer = getattr(processing_class, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return processing_class
    notify_once(f"only the tokenizer of the {type(processing_class).__name__} is used: training is on text")
    if not tokenizer.chat_template and getattr(processing_class, "chat_template", None):
        tokenizer.chat_template = processing_class.chat_template
    return tokenizer


def positions(name_or_path: str, **kwargs: Any) -> int | None:
    """The longest sequence that a model takes, in tokens, by its configuration; None if that does not say, or if it
    cannot be read (loading the model reports the error)."""
    path = adapter_base(name_or_path) or name_or_path
    wanted = {key: kwargs[key] for key in ("revision", "trust_remote_code", "max_position_embeddings") if key in kwargs}
    try:
        config = AutoConfig.from_pretrained(_expanded(path), **wanted).get_text_config()
    except (OSError, ValueError):
        return None
    return getattr(config, "max_position_embeddings", None)


def check_window(model: Any, max_length: int | None, **kwargs: Any) -> None:
    """Raise `ModelError` if `max_length` exceeds the model's positions. A model that is given by its name, with the
    arguments of `from_pretrained`, is not loaded for it."""
    if max_length is None:
        return
    stretched = "model_init_kwargs={'max_position_embeddings': ...}"
    if isinstance(model, str):
        window = positions(model, **kwargs)
    else:
        config: Any = getattr(model, "config", None)
        stretched = "from_pretrained(..., max_position_embeddings=...)"
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        window = getattr(text, "max_position_embeddings", None)
    if window and max_length > window:
        raise ModelError(
            f"max_length={max_length} is beyond the model's window of {window:,} tokens: lower max_length (its default "
            f"is the window), or take a model with a longer one ({stretched} stretches it)"
        )


def _with_adapter(kind: Any, base: str, folder: str, kwargs: dict[str, Any]) -> Any:
    peft = require_peft("an adapter folder was given")
    _check_base(base, folder)
    if adapter_base(base) is not None:
        raise ModelError(
            f"the adapter in {folder} sits on another adapter, {base}. Merge that one first "
            f"(trl merge --model_name_or_path {base} --output_dir ...) and name the merged folder in "
            "adapter_config.json"
        )
    model = _load(kind, base, kwargs)
    # An adapter trained with more tokens than the base has comes with its own, longer embeddings.
    rows = _saved_rows(Path(folder), model)
    if rows is not None and rows != whole_shape(model.get_input_embeddings().weight)[0]:
        with torch.random.fork_rng(devices=[]):  # the new rows are overwritten below
            model.resize_token_embeddings(rows, mean_resizing=False)
    if kind is AutoModelForCausalLM:
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    config = peft.PeftConfig.from_pretrained(folder)
    if config.task_type == "SEQ_CLS" and (Path(folder) / "tokenizer_config.json").exists():
        # A score is read at the last token that is not padding, and the base may pad with the end-of-text token.
        pad = load_tokenizer(folder).pad_token_id
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    notify_once(
        f"the adapter in {folder} belongs to a language model: it is merged into the weights below the scoring head"
    )
    config.task_type = None
    model = peft.PeftModel.from_pretrained(model, folder, config=config).merge_and_unload()
    for parameter in model.parameters():  # PEFT froze them
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def _saved_rows(folder: Path, model: Any) -> int | None:
    """Number of embedding rows that an adapter folder was trained with, or None if it is not recorded."""
    from safetensors import safe_open

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is each for each in ends)]
    path = folder / "adapter_model.safetensors"
    if path.exists():
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                if not any(key.startswith(f"base_model.model.{name}.") for name in names):
                    continue
                # The layer itself, with or without wrappers; or the matrix of an adapter on the embedding.
                if key.endswith(".weight") and ".lora_" not in key:
                    return file.get_slice(key).get_shape()[0]
                if key.endswith(".lora_embedding_A"):
                    return file.get_slice(key).get_shape()[1]
    # Single tokens that were trained, by their ids: only their rows are known to exist.
    trained = json.loads((folder / "adapter_config.json").read_text()).get("trainable_token_indices") or []
    lists = trained.values() if isinstance(trained, dict) else [trained]
    needed = 1 + max((index for each in lists for index in each), default=-1)
    # Not the shape of the weight, which a sharded weight does not have.
    return needed if needed > model.config.get_text_config().vocab_size else None


def _check_base(base: str, folder: str) -> None:
    if looks_local(base) and not Path(base).expanduser().exists():
        raise ModelError(
            f"the adapter in {folder} belongs to the model {base}, and there is no such folder (any more). Set "
            f"base_model_name_or_path in {Path(folder) / 'adapter_config.json'} to where that model is now, or load it "
            "yourself and pass PeftModel.from_pretrained(model, folder, is_trainable=True)"
        )


def _expanded(name_or_path: str) -> str:
    return str(Path(name_or_path).expanduser()) if name_or_path.startswith("~") else name_or_path


def check_there(name_or_path: str, kwargs: dict[str, Any], needs: tuple[str, ...] = ()) -> None:
    """Raise `ModelError` if there is no such model. With arguments that say how and where the Hub is asked, the loader
    reports what is wrong with a name on it."""
    own = ("token", "use_auth_token", "local_files_only", "cache_dir", "subfolder", "gguf_file")
    check_model(name_or_path, kwargs.get("revision"), needs, ask=not any(kwargs.get(name) for name in own))


def _first_sentence(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def loading_arguments(settings: Any) -> dict[str, Any]:
    """The arguments of `from_pretrained` from `ModelFields`; options that are not set are left out."""
    arguments: dict[str, Any] = {"dtype": settings.dtype}
    if settings.model_revision != "main":
        arguments["revision"] = settings.model_revision
    if settings.attn_implementation is not None:
        arguments["attn_implementation"] = settings.attn_implementation
    if settings.trust_remote_code:
        arguments["trust_remote_code"] = True
    return arguments


# --- dtype and bits -----------------------------------------------------------------------------------------------


def torch_dtype(value: Any) -> Any:
    """`value` as a `torch.dtype`, or "auto" (also for None). Raises `ModelError` for an unknown name."""
    if value is None or value == "auto" or isinstance(value, torch.dtype):
        return "auto" if value is None else value
    name = str(value).removeprefix("torch.")
    dtype = getattr(torch, _DTYPES.get(name, name), None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"dtype={value!r} is not one of auto, bfloat16, float16, float32, or a torch.dtype")
    return dtype


def _typed(kwargs: dict[str, Any]) -> dict[str, Any]:
    kwargs = dict(kwargs)
    old = kwargs.pop("torch_dtype", None)
    kwargs["dtype"] = torch_dtype(old if kwargs.get("dtype") is None else kwargs["dtype"])
    return kwargs


@older_words(model_config="model_args")
def quantization_config(model_args: Any) -> BitsAndBytesConfig | None:
    """The `BitsAndBytesConfig` that a `ModelConfig` describes, or None if it does not quantise.

    The compute dtype of 4-bit weights is `dtype`, or bfloat16 if that is "auto".
    """
    if model_args.load_in_4bit and model_args.load_in_8bit:
        raise ModelError("load_in_4bit and load_in_8bit are both set: choose one")
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return None
    _require_bitsandbytes(f"load_in_{4 if model_args.load_in_4bit else 8}bit is set")
    if model_args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = torch_dtype(model_args.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
        bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
    )


get_quantization_config = quantization_config  # upstream's name


def _quantised(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments with `quantization_config` as an object, from any of its forms."""
    kwargs = dict(kwargs)
    short: dict[str, Any] = {name: bool(kwargs.pop(name, False)) for name in ("load_in_4bit", "load_in_8bit")}
    config = kwargs.pop("quantization_config", None)
    if config is None and any(short.values()):
        from trl.config import ModelConfig

        dtype = kwargs["dtype"]
        config = quantization_config(ModelConfig(**short, dtype=None if dtype == "auto" else dtype))
    elif any(short.values()):
        raise ModelError("quantization_config is given and load_in_4bit or load_in_8bit is set: keep one of them")
    if isinstance(config, dict) and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        _require_bitsandbytes("quantization_config was given")
        config = BitsAndBytesConfig(**{key: value for key, value in config.items() if key != "quant_method"})
    if isinstance(config, BitsAndBytesConfig):
        _require_bitsandbytes("quantization_config was given")
    if config is not None:
        kwargs["quantization_config"] = config
    return kwargs


def _require_bitsandbytes(why: str, cause: Exception | None = None) -> None:
    if cause is not None or importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"{why}, which needs the extra `quantization`: pip install 'trl[quantization]'") from cause


def _dequantised(model: Any, name: str, dtype: Any) -> Any:
    """The model with plain weights in `dtype`, if its weights are quantised."""
    if not getattr(model, "is_quantized", False):
        return model
    try:
        plain = model.dequantize(dtype if isinstance(dtype, torch.dtype) else None)
    except NotImplementedError as error:
        raise ModelError(f"the weights of {name} are quantised, and transformers cannot unpack this format") from error
    # transformers (5.23) would pack the weights again when it saves them, which it cannot.
    plain._weight_conversions = [each for each in plain._weight_conversions or () if _is_reversible(each)]
    notify_once(f"the weights of {name} are quantised: they are unpacked")
    return plain


def _is_reversible(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


# --- place --------------------------------------------------------------------------------------------------------


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)


def _spread(device_map: Any) -> bool:
    return device_map is not None and not (isinstance(device_map, dict) and len(set(device_map.values())) == 1)


def _placed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments whose `device_map` fits: under a launcher, a map over several devices is dropped."""
    kwargs = dict(kwargs)
    if _processes() == 1:
        return kwargs
    if _spread(kwargs.get("device_map")):
        notify_once(
            f"device_map={kwargs['device_map']!r} is ignored: it spreads one model over all devices, and under a "
            "launcher each process holds a whole model on its own device"
        )
        del kwargs["device_map"]
    if "quantization_config" in kwargs and kwargs.get("device_map") is None and torch.cuda.is_available():
        # Weights are quantised at loading, so they must load on the right device.
        kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK") or 0)}
    return kwargs


def replace_device_map(model: nn.Module, device: torch.device | str | int) -> bool:
    """Move a model that was loaded with a device map (`device_map="auto"`) to one device, for a launcher.

    Removes accelerate's hooks and the map, moves the weights and ties tied weights again. Returns whether there was a
    map. Raises `ModelError` if the weights cannot be moved.
    """
    from accelerate.hooks import remove_hook_from_module

    device = torch.device(device)
    mapped = [module for module in model.modules() if vars(module).get("hf_device_map")]
    # Not by `hasattr`: a PeftModel shows the attributes of its base, and cannot delete them.
    hooked = [module for module in model.modules() if "_hf_hook" in vars(module)]
    if not mapped and not hooked:
        return False
    remedy = f"load it with device_map={{'': {device.index if device.index is not None else str(device)!r}}}"
    try:
        for module in hooked:
            remove_hook_from_module(module)
        elsewhere = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if elsewhere:
            raise ModelError(f"{elsewhere[0]} (and {len(elsewhere) - 1} more) are offloaded to the disk")
        model.to(device)
    except (ModelError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"the model was spread over devices by its device_map and cannot be moved to {device} "
            f"({_first_sentence(error)}): {remedy}"
        ) from error
    for module in mapped:
        # Trainer and accelerate read here that a quantised model is on the right device.
        if getattr(module, "is_quantized", False):
            module.hf_device_map = {"": device}  # type: ignore[assignment]
        else:
            del module.hf_device_map
        if hasattr(module, "tie_weights"):
            module.tie_weights()  # type: ignore[operator]
    return True
