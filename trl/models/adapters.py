"""Adapters: adding one, making one trainable, quantised weights beneath one, and frozen copies of one."""

import contextlib
import copy
import importlib
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trl.compat.words import older_words
from trl.notices import notify_once

from .shards import local_weights
from .unwrap import unwrap
from .value_head import critic, value_head


def require_peft(why: str) -> Any:
    """The `peft` package; ImportError that names the extra if it is not installed. `why` begins its sentence."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ImportError(f"{why}, which needs the extra `peft`: pip install 'trl[peft]'") from error


@older_words(model_config="model_args")
def lora_config(model_args: Any) -> Any:
    """The `LoraConfig` that a `ModelConfig` describes, or None if it describes no adapter."""
    if not model_args.use_peft:
        return None
    targets = _targets(model_args.lora_target_modules)
    peft = require_peft("--use_peft trains a LoRA adapter")
    dropout, parameters = model_args.lora_dropout, model_args.lora_target_parameters
    if parameters and dropout:
        notify_once(
            f"lora_dropout={dropout} is left out: an adapter of lora_target_parameters is added to the weight itself, "
            "so it has no input to drop"
        )
        dropout = 0.0
    return peft.LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=dropout,
        target_modules=targets,
        **({"target_parameters": parameters} if parameters else {}),
        modules_to_save=model_args.lora_modules_to_save,
        task_type=model_args.lora_task_type,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        bias="none",
    )


get_peft_config = lora_config


def _targets(names: Any) -> Any:
    """`lora_target_modules` as PEFT reads it: a list of names, `all-linear`, or a regular expression for whole names. A
    single entry that is not a plain name is such an expression."""
    if names is None or isinstance(names, str):
        return names
    if list(names) == ["all-linear"]:
        return names[0]
    odd = [name for name in names if not re.fullmatch(r"[\w.-]+", name)]
    if odd and len(names) > 1:
        raise ValueError(
            f"lora_target_modules: {odd[0]!r} is not a plain name, and several entries must all be plain names. "
            "Write one regular expression for whole names instead, such as '.*\\.(q|v)_proj'"
        )
    return odd[0] if odd else list(names)


def wrap(model: nn.Module, peft_config: Any) -> nn.Module:
    """The model with a new trainable adapter; its own weights are frozen. ValueError if it has an adapter already."""
    peft = require_peft("peft_config was given")
    if isinstance(model, peft.PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model already carries an adapter: leave peft_config out to train it, "
            "or merge it first (model.merge_and_unload()) to put a new one on"
        )
    if peft_config.peft_type == "LORA" and peft_config.lora_dropout and _adapts_stacked_experts(model, peft_config):
        notify_once(
            f"lora_dropout={peft_config.lora_dropout} is left out: the adapter of stacked experts is added to the "
            "weight itself, so it has no input to drop"
        )
        peft_config = copy.copy(peft_config)
        peft_config.lora_dropout = 0.0
    try:
        return peft.get_peft_model(model, peft_config)
    except ValueError as error:
        if "specify `target_modules`" not in str(error) and "No `target_modules` passed" not in str(error):
            raise
        raise ValueError(
            f"PEFT has no default layers for {type(model).__name__}: name them by "
            "lora_target_modules (LoraConfig(target_modules=...)); all-linear takes every linear layer"
        ) from error


def _adapts_stacked_experts(model: nn.Module, peft_config: Any) -> bool:
    """Whether PEFT turns targets into parameters that hold all experts of a layer, in this family."""
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return False  # older versions of PEFT do not
    converted = copy.deepcopy(peft_config)
    try:
        mapping = conversion.get_model_conversion_mapping(model)
        conversion.convert_peft_config_for_transformers(converted, model=model, conversions=mapping)
    except ValueError:
        return False  # PEFT says it itself
    return bool(converted.target_parameters)


def for_training(model: nn.Module, peft_config: Any = None) -> nn.Module:
    """The model ready for training: with the new adapter or its own one trainable, quantised weights prepared.

    Call it before the engine is attached, because the engine's probe runs the model.
    """
    if peft_config is not None:
        model = wrap(model, peft_config)
    elif release_adapter(model):
        notify_once("the model was loaded with a frozen adapter inside: the adapter is made trainable")
    prepare_quantised(model)
    return model


def trainable(model: nn.Module) -> tuple[int, int]:
    """The number of trainable parameters and of all parameters."""
    train = total = 0
    for parameter in model.parameters():
        # A sharded parameter counts whole; a packed 4-bit one counts its unpacked weights.
        count = getattr(parameter, "ds_numel", None) or parameter.numel()
        if type(parameter).__name__ == "Params4bit":
            count *= 2 * parameter.element_size()
        total += count
        train += count if parameter.requires_grad else 0
    return train, total


# --- adapters inside a transformers model --------------------------------------------------------------------------


def _injected(model: nn.Module) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False)) and not hasattr(model, "get_base_model")


def release_adapter(model: Any) -> bool:
    """Make an adapter trainable that `AutoModelForCausalLM.from_pretrained(adapter_folder)` has loaded frozen.

    transformers puts such an adapter into the model itself, for inference, without a `PeftModel` around it. Training
    would then silently change nothing. Returns whether there was a frozen one.
    """
    if not _injected(model) or any(parameter.requires_grad for parameter in model.parameters()):
        return False
    active = model.active_adapters()
    model.set_adapter(active[0] if len(active) == 1 else active)
    for name in active:
        model.peft_config[name].inference_mode = False
    return any(parameter.requires_grad for parameter in model.parameters())


def restore_adapter(model: Any, folder: str | Path) -> bool:
    """Load the weights of an adapter folder into the adapter that transformers put into the model.

    `Trainer` resumes a `PeftModel` and a whole model, but not this. Returns False for every other model. ValueError if
    the folder has weights that the adapter lacks.
    """
    if not _injected(model):
        return False
    from safetensors.torch import load_file

    peft = require_peft("the model carries an adapter")
    saved = load_file(Path(folder) / "adapter_model.safetensors")
    weights = {key.removeprefix("base_model.model."): value for key, value in saved.items()}
    found = peft.set_peft_model_state_dict(model, weights, adapter_name=model.active_adapters()[0])
    if found.unexpected_keys:
        raise ValueError(f"{folder} holds weights that this model's adapter lacks: {found.unexpected_keys[:3]}")
    return True


# --- resuming -------------------------------------------------------------------------------------------------------


def active_config(model: Any) -> Any:
    """The configuration of the adapter that trains, or None."""
    if not has_adapter(model):
        return None
    return model.peft_config[_active(model)]


_SHAPING = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias")


def check_resumed(folder: Path, config: Any) -> None:
    """Raise ValueError if a checkpoint's adapter differs from the run's, `config` (None: the run trains no adapter)."""
    path = folder / "adapter_config.json"
    if not path.exists():
        whole = any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*"))
        if config is not None and whole:
            raise ValueError(
                f"{folder.name} holds a whole model, and this run trains an adapter: leave out peft_config "
                "(--use_peft), or name a checkpoint of an adapter"
            )
        return
    if config is None:
        raise ValueError(
            f"{folder.name} holds an adapter, and this run trains the whole model: pass the peft_config that it was "
            "trained with (--use_peft), or name a checkpoint of the whole model"
        )
    saved, ours = json.loads(path.read_text()), config.to_dict()
    for name in _SHAPING:
        there, here = saved.get(name), ours.get(name)
        here = getattr(here, "value", here)
        if name in saved and there != here:
            option = f"--{name if name.startswith(('lora', 'use')) else f'lora_{name}'}"
            raise ValueError(
                f"{folder.name} holds an adapter with {name}={there}, and this run asks for {name}={here}: resume with "
                f"{name}={there} ({option} {there}), or start anew in another output_dir"
            )


# --- quantised weights --------------------------------------------------------------------------------------------


def is_quantised(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return bool(getattr(base, "is_quantized", False))


def prepare_quantised(model: Any) -> bool:
    """Prepare a quantised model for training. Returns False for a model that is not quantised.

    Only an adapter can train, because rounded weights cannot take a gradient step: ValueError without one. The weights
    beneath it are not upcast. Normalisations compute in float32 for any dtype of their weights, and the engine's head
    sums in float32. Float32 copies of embeddings, norms and head would cost memory (four bytes for each of V x H
    weights, and float32 activations after every norm) and change the log-probs by less than the quantisation does.

    The adapter's matrices are kept in bfloat16 if the quantised layers compute in it. That is the QLoRA recipe
    (Dettmers et al. 2023, arXiv:2305.14314, section 3: one storage type, one 16-bit compute type); a float32 adapter
    would turn the input of every adapted layer into float32. DoRA's magnitudes stay in float32, because they are large
    numbers that change little. Layers in `modules_to_save` stay in the checkpoint's dtype.

    Call it again after PEFT has loaded an adapter's weights (a resumed run), because PEFT turns them into float32.
    """
    if not is_quantised(model):
        return False
    if not any(parameter.requires_grad for parameter in _adapter_parameters(model)):
        quantizer = getattr(model, "hf_quantizer", None)
        if getattr(quantizer, "is_qat_trainable", False):
            return True
        raise ValueError(
            "the model is quantised, and rounded weights cannot be trained. Pass peft_config=LoraConfig() "
            "(--use_peft) to train an adapter on it, or load it without quantization_config to train all of it"
        )
    _keep_gradients(model)
    if compute_dtype(model) == torch.bfloat16:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_" in name and "magnitude" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return True


def compute_dtype(model: Any) -> torch.dtype:
    """The dtype in which quantised layers multiply."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config: Any = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    if getattr(config, "load_in_4bit", False):
        return config.bnb_4bit_compute_dtype
    return base.dtype


def _adapter_parameters(model: Any) -> list[nn.Parameter]:
    peft = require_peft("a quantised model trains an adapter")
    if isinstance(model, peft.PeftModel):
        return list(model.parameters())
    if not _injected(model):
        return []
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]
    return [parameter for layer in layers for parameter in layer.parameters()]


def _keep_gradients(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking weights for inference on a CPU. It does so when a layer runs without gradients
    (an evaluation is enough); the layer then uses a kernel without a backward pass, and passes no gradient any more.
    """
    try:
        import bitsandbytes as bnb
        from bitsandbytes.nn import modules as layers
    except ImportError:
        return
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            weight: Any = module.weight
            state: Any = getattr(weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                unpack = layers._convert_weight_packed_for_cpu_inverse
                weight.data, weight.quant_state = unpack(weight.data, state)
                module.quant_state = weight.quant_state
        elif isinstance(module, bnb.nn.Linear8bitLt):
            _log_casts_once()


def _log_casts_once() -> None:
    """Log a line of bitsandbytes once that it would log in every 8-bit layer of every forward pass."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(each, _Once) for each in logger.filters):
        logger.addFilter(_Once())


class _Once(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self.seen
        self.seen.add(message)
        return new


# --- one model, two policies --------------------------------------------------------------------------------------

TWIN = "reference"  # the name of the frozen copy of an adapter


def _switches(model: nn.Module) -> list[Any]:
    """The layers of an adapter, and the modules that are trained in full with it."""
    peft = require_peft("the model carries an adapter")
    kinds = (peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.other.AuxiliaryTrainingWrapper)
    return [module for module in model.modules() if isinstance(module, kinds)]


def has_adapter(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def is_untouched(model: Any) -> bool:
    """Whether the adapter does not change the model's outputs yet, so that "adapter off" is the model as it is now.

    This holds for a new LoRA adapter (its B is zero). It does not hold for a trained one, nor for one that starts as a
    part of the weights (PiSSA, OLoRA, LoftQ). Prompt learning counts as untouched: its virtual tokens are switched off.
    """
    if getattr(model.peft_config[_active(model)], "is_prompt_learning", False):
        return True
    added = [
        parameter for key, parameter in model.named_parameters() if ".lora_B." in key or ".lora_embedding_B." in key
    ]
    copies = [layer for layer in _switches(model) if hasattr(layer, "modules_to_save")]
    equal = all(
        torch.equal(saved, original)
        for layer in copies
        for module in layer.modules_to_save.values()
        for saved, original in zip(module.parameters(), layer.original_module.parameters(), strict=True)
    )
    return bool(added) and equal and not any(parameter.any() for parameter in added)


def trains_beneath(model: Any) -> list[str]:
    """Names of trainable weights outside the adapter, whose training "adapter off" does not undo: biases
    (`bias="all"`), or layers of the base that the user made trainable. A value function changes no log-prob."""
    own = {each for part in (value_head, critic) for each in getattr(part(unwrap(model)), "parameters", tuple)()}
    for layer in _switches(model):
        for name, parameter in layer.named_parameters():
            if not {"base_layer", "original_module"} & set(name.split(".")):
                own.add(parameter)
    if getattr(model.peft_config[_active(model)], "is_prompt_learning", False):
        own.update(model.prompt_encoder.parameters())
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter not in own]


@contextlib.contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """Within the context, the model without its adapter."""
    if _injected(model):
        model.disable_adapters()  # type: ignore[operator]
        try:
            yield
        finally:
            model.enable_adapters()  # type: ignore[operator]
    else:
        with model.disable_adapter():  # type: ignore[operator]
            yield


def add_twin(model: Any) -> None:
    """Add a frozen copy of the model's adapter in its present state, as the adapter `TWIN`."""
    name = _active(model)
    config = copy.copy(model.peft_config[name])
    config.inference_mode = True
    config.init_lora_weights = True  # overwritten below; other initialisations change the weights beneath
    training = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        if _injected(model):
            model.add_adapter(config, TWIN)
            model.set_adapter(name)
        else:
            model.add_adapter(TWIN, config)
    for parameter in model.parameters():
        parameter.requires_grad_(training.get(parameter, False))
    with torch.no_grad():
        for ours, twin in _twins(dict(model.named_parameters()), name):
            twin.data = ours.detach().to(copy=True)


def _active(model: Any) -> str:
    active = model.active_adapters() if callable(model.active_adapters) else model.active_adapters
    if len(active) != 1:
        raise ValueError(f"{len(active)} adapters are active ({', '.join(active)}); only one can be trained at a time")
    return active[0]


def _twins(named: Mapping[str, torch.Tensor], name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of a weight of the adapter `name` and the same weight of its twin."""
    for key, parameter in named.items():
        if f".{name}" in key:
            twin = named.get(f".{TWIN}".join(key.rsplit(f".{name}", 1)))
            if twin is not None:
                yield parameter, twin


def twin_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: weight for key, weight in local_weights(model).items() if f".{TWIN}" in key}


@contextlib.contextmanager
def as_twin(model: nn.Module) -> Iterator[None]:
    """Within the context, the twin acts in place of the adapter. Unlike `set_adapter`, it leaves `requires_grad` as it
    is."""
    layers = [(layer, layer._active_adapter) for layer in _switches(model)]
    for layer, _ in layers:
        layer._active_adapter = [TWIN]  # layers without an adapter of this name ignore it
    try:
        yield
    finally:
        for layer, active in layers:
            layer._active_adapter = active


@contextlib.contextmanager
def twin_hidden(model: Any) -> Iterator[None]:
    """Within the context, the model has no twin: for saving."""
    config = getattr(model, "peft_config", {}).pop(TWIN, None)
    if config is None:
        yield
        return
    hook = model.register_state_dict_post_hook(_leave_twin_out)
    try:
        yield
    finally:
        hook.remove()
        model.peft_config[TWIN] = config


def _leave_twin_out(model: nn.Module, state: dict[str, Any], prefix: str, about: Any) -> None:
    # PEFT (0.21) leaves out other adapters by their config, but the config of the twin is hidden.
    for key in [key for key in state if f".{TWIN}." in key or key.endswith(f".{TWIN}")]:
        del state[key]


def adapter_of_twin(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the adapter, under the names of its twin's weights (`twin_weights`)."""
    weights = local_weights(model)
    places = {id(twin): ours for ours, twin in _twins(weights, _active(model))}
    return {key: places[id(weight)] for key, weight in weights.items() if id(weight) in places}
