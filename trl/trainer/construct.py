"""A model and a tokenizer on their way into a trainer: opened, checked, and made ready to train."""

import atexit
import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

from accelerate.utils import DynamoBackend
from torch import nn
from transformers.trainer_utils import set_seed

from trl import outputs, screen
from trl.engine.graph import all_take_part
from trl.models import adapters, liger, load, low_bits, saving, shards, vocabulary
from trl.models.compiled import compile_tokenwise
from trl.models.shards import keep_precision
from trl.notices import notify_once
from trl.trainer.loader import set_special_tokens


def opened(
    model: Any,
    args: Any,
    processing_class: Any,
    quantization_config: Any,
    peft_config: Any,
    load_model: Callable[..., Any],
) -> tuple[Any, Any]:
    """The model and its tokenizer, loaded where they are given by name, with the chat template and the special tokens
    that `args` name."""
    if args.n_gpu > 1:
        notify_once(
            f"{args.n_gpu} GPUs are visible and one is used: nn.DataParallel is never entered. "
            "Start the script with `accelerate launch` to train on all of them."
        )
        args._n_gpu = 1
    if args.world_size > 1:
        wait_at_exit()
    liger.check(args)

    assert args.model_init_kwargs is None or isinstance(args.model_init_kwargs, dict)
    init_kwargs = dict(args.model_init_kwargs or {})
    set_seed(args.seed)  # a new scoring head is drawn while the model loads
    if args.trust_remote_code and isinstance(model, str):
        init_kwargs["trust_remote_code"] = True
    if quantization_config is not None:
        init_kwargs["quantization_config"] = quantization_config
    if not args.verbose:
        screen.fold_library_notes()
    if args.output_dir and (problem := outputs.folder_problem(args.output_dir)):
        raise ValueError(f"output_dir: {problem}")
    if isinstance(model, str):
        load.check_there(model, init_kwargs)
    load.check_window(model, getattr(args, "max_length", None), **init_kwargs)
    if isinstance(model, str):
        if processing_class is None:
            names = ("revision", "trust_remote_code")
            kwargs = {name: init_kwargs[name] for name in names if name in init_kwargs}
            processing_class = load.load_tokenizer(model, **kwargs)
        model = load_model(model, **init_kwargs)
    elif init_kwargs:
        raise ValueError(f"{', '.join(init_kwargs)} are for a model given by name or path; this one is already loaded")
    elif args.world_size > 1 and load.replace_device_map(model, args.device):
        notify_once(f"the model's device_map is dropped: each of the {args.world_size} processes holds it whole")
    if processing_class is None:
        processing_class = load.load_tokenizer(model.config._name_or_path)
    tokenizer = load.tokenizer_of(processing_class)
    if getattr(args, "chat_template_path", None):
        model, tokenizer, added = vocabulary.use_chat_template(model, tokenizer, args.chat_template_path)
        vocabulary.check_added_tokens(model, peft_config, added)
    set_special_tokens(tokenizer, getattr(args, "eos_token", None), getattr(args, "pad_token", None))
    vocabulary.check_special_tokens(model, tokenizer)
    return model, tokenizer


def ready_to_train(model: Any, args: Any, peft_config: Any) -> Any:
    """The model with its adapter, in the precision that it trains in. ValueError if nothing would train."""
    set_seed(args.seed)  # the adapter is the same whether or not the model was loaded here
    model = adapters.for_training(model, peft_config)
    held = low_bits.hold_in_float32(model, getattr(args.optim, "value", args.optim), bool(args.bf16 or args.fp16))
    if held:
        notify_once(held)
    liger.patch(model, args)
    saving.mend_generation_config(model)
    if args.disable_dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    _check_something_trains(model)
    if args.gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
        # A frozen embedding would leave a checkpointed layer without an input that asks for gradients.
        model.enable_input_require_grads()
    return model


def configure_sharding(accelerator: Any, args: Any) -> None:
    """Settings of FSDP and ZeRO-3 without which numbers or checkpoints would be wrong."""
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        keep_precision(accelerator.state.fsdp_plugin)
    if shards.zero_3_is_planned():
        if args.activation_offloading:
            raise ValueError(
                "activation_offloading keeps what the forward pass saves, gathered weights too, so that nothing of "
                "ZeRO-3's sharding is left: use gradient_checkpointing in its place"
            )
        # A checkpoint without it holds parts that no `from_pretrained` opens.
        settings = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        settings["stage3_gather_16bit_weights_on_model_save"] = True


def compiled(model: nn.Module, accelerator: Any) -> int | None:
    """Compile what keeps its shape from batch to batch, where that is asked for: the number of parts.

    accelerate would compile the whole model, which torch gives up after some batches: each has other segments.
    """
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend == DynamoBackend.NO:
        return None
    options = plugin.to_kwargs()
    plugin.backend = DynamoBackend.NO
    # `TrainingArguments` puts the wish into the environment, where every later run of the process would find it.
    os.environ.pop("ACCELERATE_DYNAMO_BACKEND", None)
    return compile_tokenwise(model, backend=options["backend"], mode=options.get("mode"))


def spare_search(trainer: Any) -> None:
    """Where DistributedDataParallel would look in each step for weights without a gradient, and there are none, let it
    not look. transformers has it look for those of every adapter."""
    handler = getattr(trainer.accelerator, "ddp_handler", None)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    chosen = trainer.args.ddp_find_unused_parameters is not None
    if handler is None or sharded or chosen or trainer.args.world_size == 1:
        return
    if handler.find_unused_parameters:
        handler.find_unused_parameters = not all_take_part(trainer.model)


def forget_evaluation(trainer: Any) -> None:
    """Let accelerate wrap a model that an evaluation has prepared.

    An evaluation before training prepares the model without DistributedDataParallel and marks it as prepared, so that
    it would never be wrapped: each process would train on its own gradients. Goes when accelerate (1.15) keeps the two
    apart.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if trainer.args.world_size > 1 and not sharded and trainer.model_wrapped is trainer.model:
        trainer.model._is_accelerate_prepared = False
        trainer.accelerator._models = [each for each in trainer.accelerator._models if each is not trainer.model]


@cache
def wait_at_exit() -> None:
    """Have Python wait at its end until the threads of gloo have put down the tensors of the last collective.

    A thread that does so while the interpreter is taken down aborts the process (pytorch/pytorch#190489), and the
    launcher reports a run that ended well as failed. Goes when torch looks whether Python is ending.
    """
    atexit.register(time.sleep, 0.2)


def _check_something_trains(model: nn.Module) -> None:
    count, total = adapters.trainable(model)
    if count:
        return
    remedy = "set requires_grad on what should train, or pass peft_config= to train an adapter"
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        remedy = (
            "it carries an adapter that was loaded for inference: pass the adapter's folder as the model, "
            "or load it with PeftModel.from_pretrained(base, folder, is_trainable=True)"
        )
    raise ValueError(f"0 of {total:,} parameters would train. {remedy[0].upper()}{remedy[1:]}.")
