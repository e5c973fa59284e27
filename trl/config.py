"""Options of commands and trainers: field groups over `transformers.TrainingArguments`. Each field is written once."""

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
class DataFields:
    """The data that a command reads."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set: a file, a folder, or a name that `datasets` knows."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a named data set."})


@dataclass
class ScriptArguments(DataFields, Adoptable):
    """The data that a command reads, and its splits."""

    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    dataset_streaming: bool = field(
        default=False,
        metadata={"help": "Read rows during training, in file order; needs max_steps. The same as streaming."},
    )


@dataclass
class RewardArguments(ScriptArguments):
    """The data that a command reads, and the reward functions."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: names of trl.rewards, package.module:function, file.py:function, or addresses."
        },
    )
    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model: a folder or a name; used in addition to reward_funcs."}
    )


@dataclass
class ModelFields:
    """The model that a command loads."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model: a folder, or a name on the Hub. An adapter's folder also loads its base."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model on the Hub."})
    dtype: str | None = field(
        default="auto",
        metadata={
            "help": "Dtype of the weights: `auto` for the checkpoint's, or bfloat16, float16, float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention implementation outside training; flat rows always use attention by segment."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with the checkpoint."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise frozen weights to 8 bits at loading."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantise frozen weights to 4 bits at loading (QLoRA, with use_peft)."}
    )
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "4-bit data type: normal float or float.", "choices": ["nf4", "fp4"]}
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantise the scales of the 4-bit blocks too; saves 0.4 bits a weight."}
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None, metadata={"help": "Storage dtype of 4-bit weights; FSDP needs the dtype of the other weights."}
    )


@dataclass
class ModelConfig(ModelFields, Adoptable):
    """The model that a command loads, and the adapter that it trains."""

    use_peft: bool | None = field(
        default=None,
        metadata={"help": "Train a LoRA adapter instead of all weights. Default: only if a LoRA option is set."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(
        default=32, metadata={"help": "Scale of the adapter: alpha / r, or alpha / sqrt(r) with rsLoRA."}
    )
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers to adapt, or `all-linear`. Default: PEFT's for the family."},
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={"help": "Names of weights to adapt that are no layers, such as `mlp.experts.gate_up_proj`."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of layers to train and save in full, in addition to the adapter."}
    )
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "Task type written into the adapter's config."})
    use_rslora: bool = field(default=False, metadata={"help": "Rank-stabilised LoRA: scale by 1/sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA: weight-decomposed LoRA."})

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
    """Options of all trainers, in addition to `transformers.TrainingArguments`.

    Defaults that differ from transformers: `logging_steps=10`; activation checkpointing is on; `bf16` is on if the
    accelerator supports it; `average_tokens_across_devices` is always on (gradients do not depend on the split).
    """

    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Mixed precision in bfloat16. Default: if the accelerator supports it. `true` also works on a CPU.",
            "nargs": "?",
            "const": True,
        },
    )
    gradient_checkpointing: bool | None = field(
        default=True,
        metadata={"help": "Recompute activations in the backward pass: less memory, a third more compute."},
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "No effect: preprocessing keeps exactly the columns that training reads."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "No effect: a loss that is not finite stops the run and names the row."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of `from_pretrained`, for a model given by name or path."}
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
        metadata={"help": "Compute a prompt once for all its completions; they then share its dropout mask."},
    )

    max_tokens_per_micro_batch: int | str | None = field(
        default=None,
        metadata={
            "help": "Maximum tokens in a forward pass of training: a step is cut into micro-batches by it, with the "
            "same gradient. `auto`: as suits the device. Default: the batch size; of completions that are sampled "
            "1,024 tokens on a CPU, 16,384 on an accelerator."
        },
    )
    log_all: bool = field(
        default=False, metadata={"help": "Show all metrics on the screen, not those alone that matter for the method."}
    )
    verbose: bool = field(
        default=False, metadata={"help": "Show the messages and short loading bars of other libraries."}
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.use_cpu = True  # otherwise each process of a launcher would train alone
        accelerator = torch.accelerator.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = accelerator and not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        elif self.bf16 and not accelerator and not self.use_cpu:
            self.use_cpu = True
            notify_once("no accelerator here: bf16=True runs on the CPU, in bfloat16 autocast")
        self.max_tokens_per_micro_batch = tokens_or_auto(self.max_tokens_per_micro_batch)
        options.check(self)
        # transformers calls it activation checkpointing from 5.2x on, and keeps the old name as an alias that warns.
        if hasattr(self, "activation_checkpointing"):
            for ours, theirs in (("", ""), ("_kwargs", "_kwargs")):
                if getattr(self, f"activation_checkpointing{theirs}") is None:
                    setattr(self, f"activation_checkpointing{theirs}", getattr(self, f"gradient_checkpointing{ours}"))
        super().__post_init__()
        for sentence in options.unused(self):
            notify_once(sentence)
        self.logging_nan_inf_filter = False  # it would hide losses that are not finite from the check


@dataclass
class RouterFields:
    """The load-balancing term of a mixture of experts."""

    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={"help": "Weight of a mixture of experts' load-balancing loss. Default: the model configuration's."},
    )


@dataclass
class SequenceFields:
    """How rows become token sequences."""

    max_length: int | None = field(
        default=None,
        metadata={"help": "Maximum sequence length in tokens; longer rows are cut. Default: the model's window."},
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={"help": "The end of a longer row that is kept.", "choices": ["keep_start", "keep_end"]},
    )
    columns: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "New names of columns: `question=prompt,reply=completion`, or JSON. The column `question` is then "
            "read as `prompt`."
        },
    )
    skip_bad_rows: bool = field(
        default=False,
        metadata={"help": "Skip and count rows, and lines of files, that cannot be read, instead of stopping."},
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that preprocess the data."})
    eos_token: str | None = field(default=None, metadata={"help": "End-of-sequence token. Default: the tokenizer's."})
    pad_token: str | None = field(default=None, metadata={"help": "Padding token. Default: the tokenizer's."})

    def __post_init__(self) -> None:
        if isinstance(self.columns, str):
            self.columns = columns_of(self.columns)
        super().__post_init__()  # type: ignore[misc]  # of the configuration that the fields are mixed into


def tokens_or_auto(tokens: int | str | None) -> int | str | None:
    """A number of tokens as it is given on a command line, or the word `auto`."""
    if not isinstance(tokens, str) or tokens == "auto":
        return tokens
    try:
        return int(tokens.replace(",", "").replace("_", ""))
    except ValueError:
        raise ValueError(f"max_tokens_per_micro_batch={tokens!r}: give a number of tokens, or auto") from None


def columns_of(columns: str) -> dict[str, str]:
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
    """How rows of prompts and labelled completions become token sequences."""

    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Maximum prompt length in tokens, cut at the beginning. Default: no limit."}
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Maximum completion length in tokens, cut at the end. Default: no limit."}
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata={"help": "No effect: flat rows are not padded, others are as wide as the longest."}
    )
    generate_during_eval: bool = field(
        default=False,
        metadata={"help": "At each evaluation, write completions of a few prompts into the folder `answers`."},
    )


@dataclass
class ReferenceFields:
    """The reference model."""

    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Compute the reference's log-probs once, before the first step, and store them on disk."},
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Batch size of that computation. Default: that of training."}
    )
    sync_ref_model: bool = field(
        default=False, metadata={"help": "Move the reference towards the policy during training (TR-DPO)."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "Weight of the policy in each update of the reference."}
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "Steps between updates of the reference."})


@dataclass
class TeacherFields:
    """The teacher of a distillation."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher: a folder, or a name on the Hub; with the student's tokenizer."}
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a teacher on the Hub."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of `from_pretrained` for a teacher given by name. Default dtype: its own."},
    )


@dataclass
class SamplingFields:
    """How completions are sampled."""

    temperature: float = field(default=1.0, metadata={"help": "Softmax temperature, for sampling and training."})
    top_p: float = field(
        default=1.0, metadata={"help": "Nucleus sampling: total probability of the tokens sampled from."}
    )
    top_k: int = field(default=0, metadata={"help": "Number of most likely tokens to sample from; 0: all."})
    min_p: float | None = field(
        default=None, metadata={"help": "Minimum probability of a sampled token, relative to the most likely token."}
    )
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1, repeated tokens become less likely."})
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "More arguments of `generate`; they override the fields."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of the chat template, for every prompt."}
    )
    max_cache_tokens: int | None = field(
        default=None, metadata={"help": "Maximum tokens in the key-value cache during sampling."}
    )


@dataclass
class SamplerFields(SamplingFields):
    """How completions of many prompts are sampled."""

    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Maximum prompt length in tokens, cut at the beginning. Default: no limit."}
    )
    use_transformers_continuous_batching: bool = field(
        default=False,
        metadata={"help": "Sample with transformers' continuous batching instead of the library's own sampler."},
    )
    transformers_continuous_batching_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Fields of transformers' ContinuousBatchingConfig, as a dict or JSON."}
    )


@dataclass
class RolloutFields(SamplerFields):
    """How completions are sampled and scored."""

    num_generations: int = field(default=8, metadata={"help": "Number of completions of each prompt: a group."})
    num_generations_eval: int | None = field(
        default=None, metadata={"help": "Number of completions of each prompt in evaluation. Default: num_generations."}
    )
    max_completion_length: int | None = field(default=512, metadata={"help": "Maximum completion length in tokens."})
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Completions sampled in a round, on all devices. Default: those of one step."}
    )
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Per-device batches trained on each sampled round."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Number of times that each completion is trained on."})
    shuffle_dataset: bool | None = field(default=True, metadata={"help": "Use the prompts in a new order each epoch."})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function. Default: 1 each."}
    )
    reward_timeout: float = field(default=600.0, metadata={"help": "Time limit of a reward function, in seconds."})
    dynamic_sampling: bool = field(
        default=False,
        metadata={"help": "Replace prompts whose completions all have the same reward by other prompts (DAPO)."},
    )
    max_refills: int = field(default=10, metadata={"help": "Maximum attempts of dynamic_sampling in a round."})
    replay_buffer_size: int = field(
        default=0,
        metadata={"help": "Number of earlier groups kept to replace groups with equal rewards; 0: none."},
    )
    stop_after_constant_rounds: int | None = field(
        default=None,
        metadata={
            "help": "End training once every completion of this many rounds in a row got the same total reward: "
            "nothing is learnt from it. Default: never."
        },
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Do not train on completions that reach max_completion_length."}
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Print completions with their rewards, and save them in the output folder."}
    )
    num_completions_to_print: int | None = field(
        default=None, metadata={"help": "Number of completions to print. Default: all."}
    )
    log_unique_prompts: bool = field(default=False, metadata={"help": "Print only one completion of each prompt."})
    pass_threshold: float = field(
        default=1.0, metadata={"help": "Minimum total reward at which a completion passes, for pass@k in evaluation."}
    )


def non_default(config: Any) -> dict[str, Any]:
    """The fields of a config that differ from its class's defaults."""
    return {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
