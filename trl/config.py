"""What a user sets. Field groups are dataclasses over `transformers.TrainingArguments`; each field is written once."""

import json
import os
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from trl import options
from trl.compat.arguments import Adoptable
from trl.notices import notify_once


@dataclass
class ScriptArguments(Adoptable):
    """Which data a command reads."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set: a file, a folder, or a name that `datasets` knows."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a named data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read rows as they are trained on, in their order; needs max_steps."}
    )


@dataclass
class RewardArguments(ScriptArguments):
    """Which data a command reads, and what judges completions."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: names of trl.rewards, package.module:function, file.py:function, or addresses."
        },
    )
    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model: a folder or a name; beside reward_funcs, one more of them."}
    )


@dataclass
class ModelConfig(Adoptable):
    """Which model a command loads, and which adapter it trains."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model: a folder, or a name on the Hub. An adapter's folder brings its base."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    dtype: str | None = field(
        default="auto",
        metadata={
            "help": "Weights in memory: `auto` as the checkpoint has them, or bfloat16, float16, float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention outside the engine; flat rows are computed by segment whatever is set here."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the checkpoint."})
    use_peft: bool | None = field(
        default=None,
        metadata={
            "help": "Train a LoRA adapter instead of all weights. Default: where an option of the adapter is set."
        },
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(
        default=32, metadata={"help": "Scale of the adapter (times 1/r, or 1/sqrt(r) with rsLoRA)."}
    )
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers to adapt, or `all-linear`. Default: PEFT's for the family."},
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of bare weights to adapt, as mixtures of experts keep them: `mlp.experts.gate_up_proj`."
        },
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of layers to train and save in full beside the adapter."}
    )
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "Task type written into the adapter's config."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by 1/sqrt(r) (rank-stabilised LoRA)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA (DoRA)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise frozen weights to 8 bits as they load."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantise frozen weights to 4 bits as they load; with --use_peft: QLoRA."}
    )
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Four-bit code: normal float or float.", "choices": ["nf4", "fp4"]}
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantise the scales of the 4-bit blocks too: 0.4 bits a weight less."}
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None, metadata={"help": "Type that 4-bit weights are stored as; FSDP wants that of the other weights."}
    )

    def __post_init__(self) -> None:
        options.check(self)
        of_adapter = [
            name for name in non_default(self) if name.startswith("lora_") or name in ("use_rslora", "use_dora")
        ]
        asked = [f"{name}={getattr(self, name)!r}" for name in of_adapter]
        if asked and self.use_peft is None:
            notify_once(
                f"{', '.join(asked)}: an adapter is trained, as with use_peft=True (use_peft=False: all weights)"
            )
        elif asked and not self.use_peft:
            notify_once(f"{', '.join(asked)} has no effect with use_peft=False")
        self.use_peft = bool(asked) if self.use_peft is None else self.use_peft
        for sentence in options.unused(self):
            notify_once(sentence)


@dataclass
class BaseConfig(Adoptable, TrainingArguments):
    """What all trainers share beyond `transformers.TrainingArguments`.

    Defaults that differ from transformers: `logging_steps=10`, activation checkpointing on, `bf16` on where the
    accelerator computes in it, `average_tokens_across_devices` always on (gradients do not depend on the split).
    """

    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Mixed precision in bfloat16. Default: where the accelerator has it. `true` works on a CPU too.",
            "nargs": "?",
            "const": True,
        },
    )
    gradient_checkpointing: bool | None = field(
        default=True,
        metadata={"help": "Recompute activations in the backward pass: less memory, a third more compute."},
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Has no effect: the data stage keeps exactly what training reads."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Has no effect: a loss that is not finite stops the run and names the row."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of `from_pretrained` when the model is given by name or path."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that comes with a checkpoint given by name or path."}
    )
    disable_dropout: bool = field(default=False, metadata={"help": "Set every dropout of the model to zero."})
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep saved activations in host memory between forward and backward pass."}
    )
    share_prompt: bool = field(
        default=True,
        metadata={"help": "Compute a prompt once for all that continues it (its dropout draw is shared too)."},
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.use_cpu = True  # or each process of a launcher would train alone
        accelerator = torch.accelerator.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = accelerator and not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        elif self.bf16 and not accelerator and not self.use_cpu:
            self.use_cpu = True
            notify_once("no accelerator here: bf16=True runs on the CPU, in bfloat16 autocast")
        options.check(self)
        # transformers calls it activation checkpointing from 5.2x on, and keeps the old name as an alias that warns.
        if hasattr(self, "activation_checkpointing"):
            for ours, theirs in (("", ""), ("_kwargs", "_kwargs")):
                if getattr(self, f"activation_checkpointing{theirs}") is None:
                    setattr(self, f"activation_checkpointing{theirs}", getattr(self, f"gradient_checkpointing{ours}"))
        super().__post_init__()
        for sentence in options.unused(self):
            notify_once(sentence)
        self.logging_nan_inf_filter = False  # it would hide from the check what it looks for


@dataclass
class RouterFields:
    """What a mixture of experts adds to the loss."""

    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={"help": "Weight of a mixture of experts' load-balancing term. Default: the model's configuration's."},
    )


@dataclass
class SequenceFields:
    """How rows become token sequences."""

    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest sequence in tokens; longer rows are cut and counted. Default: the model's window."},
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={"help": "Which end of a longer row stays.", "choices": ["keep_start", "keep_end"]},
    )
    columns: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "Which column is which: `question=prompt,reply=completion`, or as JSON. A column so named is "
            "read as one that bears the name."
        },
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave out rows that cannot be read, and count them, instead of stopping."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that prepare the data."})
    eos_token: str | None = field(default=None, metadata={"help": "End-of-sequence token, if not the tokenizer's."})
    pad_token: str | None = field(default=None, metadata={"help": "Padding token, if not the tokenizer's."})

    def __post_init__(self) -> None:
        if isinstance(self.columns, str):
            self.columns = _names(self.columns)
        super().__post_init__()  # type: ignore[misc]  # of the configuration that the fields are mixed into


def _names(columns: str) -> dict[str, str]:
    """`a=b,c=d`, or an object in JSON, as a dictionary."""
    try:
        found = (
            json.loads(columns)
            if columns.lstrip().startswith("{")
            else dict(pair.split("=") for pair in columns.replace(",", " ").split())
        )
    except ValueError as error:
        raise ValueError(
            f"columns={columns!r} cannot be read ({error}): write question=prompt,reply=completion, or the same as JSON"
        ) from error
    return {str(key).strip(): str(value).strip() for key, value in found.items()}


@dataclass
class PreferenceFields(SequenceFields):
    """How rows of prompts and judged completions become token sequences."""

    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens; a longer one loses its beginning. Default: any."}
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Longest completion in tokens; a longer one loses its end. Default: any."}
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata={"help": "Has no effect on flat rows; padded rows are as wide as their longest."}
    )
    generate_during_eval: bool = field(
        default=False,
        metadata={"help": "At each evaluation, write the answers to a few of its prompts into the folder `answers`."},
    )


@dataclass
class ReferenceFields:
    """Which policy the trained one is compared with, and how."""

    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Compute the reference's log-probs once, before the first step, and keep them on disk."},
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Rows a batch in that computation. Default: the training batch's."}
    )
    sync_ref_model: bool = field(
        default=False, metadata={"help": "Move the reference towards the policy as training goes on (TR-DPO)."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "Share of the policy in the reference after such a move."}
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Steps between two such moves."})


@dataclass
class RolloutFields:
    """How completions are drawn and judged."""

    num_generations: int = field(default=8, metadata={"help": "Completions of each prompt: a group."})
    num_generations_eval: int | None = field(
        default=None, metadata={"help": "Completions of each prompt in an evaluation. Default: as num_generations."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens; a longer one loses its beginning. Default: any."}
    )
    max_completion_length: int | None = field(default=512, metadata={"help": "Longest completion in tokens."})
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Completions drawn at once, on all devices. Default: those of a step."}
    )
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Batches (per device) that completions drawn at once are trained on in."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Times that each completion is trained on."})
    shuffle_dataset: bool | None = field(default=True, metadata={"help": "Draw the prompts in a new order each epoch."})
    temperature: float = field(default=1.0, metadata={"help": "What logits are divided by, in sampling and training."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens of this total probability."})
    top_k: int = field(default=0, metadata={"help": "Sample from so many of the likeliest tokens; 0: from all."})
    min_p: float | None = field(
        default=None, metadata={"help": "Sample from tokens at least this likely, relative to the likeliest."}
    )
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1, tokens that occurred are less likely."})
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of `generate`; they are stronger than the fields."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template, for every prompt."}
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={"help": "Tokens of a forward pass in training. Default: 1,024 on a CPU, 16,384 on an accelerator."},
    )
    max_cache_tokens: int | None = field(
        default=None, metadata={"help": "Tokens that the cache holds while completions are drawn."}
    )
    use_transformers_continuous_batching: bool = field(
        default=False,
        metadata={"help": "Let transformers' continuous batching draw, instead of the library's own sampler."},
    )
    transformers_continuous_batching_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of transformers' ContinuousBatchingConfig, as a dict or JSON."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function. Default: 1 each."}
    )
    reward_timeout: float = field(default=600.0, metadata={"help": "Seconds that a reward function may take."})
    dynamic_sampling: bool = field(
        default=False,
        metadata={"help": "Draw further prompts in place of those whose completions are all worth the same (DAPO)."},
    )
    max_refills: int = field(default=10, metadata={"help": "Times that dynamic_sampling draws again in a round."})
    replay_buffer_size: int = field(
        default=0,
        metadata={"help": "Groups of earlier rounds kept to be trained on in place of those worth the same; 0: none."},
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Do not train on completions that reached max_completion_length."}
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Print completions with their rewards, and keep them in the output folder."}
    )
    num_completions_to_print: int | None = field(default=None, metadata={"help": "How many to print. Default: all."})
    log_unique_prompts: bool = field(default=False, metadata={"help": "Print one completion of each prompt."})
    pass_threshold: float = field(
        default=1.0, metadata={"help": "Total reward from which a completion passes, for pass@k in evaluations."}
    )


def non_default(config: Any) -> dict[str, Any]:
    """The fields of a config that differ from its class's defaults."""
    return {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
