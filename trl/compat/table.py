"""One table of older names: arguments, values, attributes and import paths.

An older name works, and prints its present name once. A name without an effect prints the reason. An unknown name is
an error that suggests the nearest one. Versions are those that have the name: `≤ 4.57` means that the next release
examined lacks it.

A new method adds its rows under the name of its config or trainer; a subclass inherits the rows of its bases.
Nothing heavy is imported here, because `import trl` reads this module.
"""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trl.methods import METHODS

# --- kinds of rows --------------------------------------------------------------------------------------------------


class Now(NamedTuple):
    """The argument has another name today, and optionally another form of value."""

    name: str
    versions: str
    note: str = ""  # added to the sentence in brackets
    value: Callable[[Any, Mapping[str, Any]], Any] | None = None  # from the old value and all arguments
    nothing: tuple = (None,)  # values that change nothing

    def sentence(self, old: str) -> str:
        return f"`{old}` is `{self.name}` today{f' ({self.note})' if self.note else ''}"


class InConfig(NamedTuple):
    """An argument of a trainer that is set in its config today."""

    name: str
    versions: str
    note: str = ""
    nothing: tuple = (None,)

    def sentence(self, old: str) -> str:
        return f"`{old}` is set in the trainer's config today, as `{self.name}`"


class Gone(NamedTuple):
    """The argument is ignored without changing results; or `act` has the effect in another way."""

    because: str
    versions: str
    act: Callable[[Any], None] | None = None
    nothing: tuple = (None,)

    def sentence(self, old: str) -> str:
        return f"`{old}` {'is elsewhere today' if self.act else 'has no effect'}: {self.because}"


class Refused(NamedTuple):
    """The argument asks for something that does not exist; ignoring it would change the result."""

    remedy: str
    versions: str
    nothing: tuple = (None,)

    def sentence(self, old: str) -> str:
        return f"`{old}` is gone: {self.remedy}"


Row = Now | InConfig | Gone | Refused


class ArgumentError(TypeError, ValueError):
    """An argument that does not exist, or that contradicts another."""


# --- values ---------------------------------------------------------------------------------------------------------


def _share_of_steps(ratio: Any, given: Mapping[str, Any]) -> float:
    if not 0 <= float(ratio) <= 1:
        raise ArgumentError(f"warmup_ratio={ratio}: a share of all steps lies between 0 and 1")
    # warmup_steps overrides the ratio. A ratio of exactly 1 would be read as one step.
    return given.get("warmup_steps") or min(float(ratio), math.nextafter(1.0, 0.0))


def _into(name: str, key: str) -> Callable[[Any, Mapping[str, Any]], Any]:
    """The value becomes one key of the mapping `name`."""

    def value(old: Any, given: Mapping[str, Any]) -> Any:
        mapping = given.get(name) or {}
        if not isinstance(mapping, Mapping):
            raise ArgumentError(f"put `{key}` into {name}={mapping!r}: both are given")
        return {key: old, **mapping}

    return value


def _organisation(old: str, given: Mapping[str, Any]) -> str:
    name = given.get("hub_model_id") or given.get("push_to_hub_model_id") or given.get("output_dir") or "model"
    return name if "/" in str(given.get("hub_model_id") or "") else f"{old}/{os.path.basename(os.path.normpath(name))}"


def _repository(old: str, given: Mapping[str, Any]) -> str:
    return given.get("hub_model_id") or old


def _always(value: Any) -> Callable[[Any, Mapping[str, Any]], Any]:
    return lambda old, given: value


def _logging_dir(folder: Any) -> None:
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)


def _mini_batches(count: Any, given: Mapping[str, Any]) -> int:
    """A mini-batch was an optimizer step; `steps_per_generation` counts the batches that steps accumulate."""
    return int(count) * int(given.get("gradient_accumulation_steps") or 1)


_OTHER_SAMPLER = "completions are sampled in this process"
_NO_VALUES = "REINFORCE has no value function; it was PPO's"
_POLICY = "pass the policy as the trainer's model (on the command line --model_name_or_path)"

# --- the table ------------------------------------------------------------------------------------------------------

# Arguments of preference configs, and of their trainers before.
_JUDGED: dict[str, Row] = {
    "label_pad_token_id": Gone(
        "trained tokens are marked by position, so no label is padded", "trl ≤ 0.28", nothing=(None, -100)
    ),
    "padding_value": Gone("padding is never read; pad_token sets the token", "trl ≤ 0.27"),
    "max_target_length": Gone("it concerned encoder-decoders; max_completion_length cuts completions", "trl ≤ 0.13"),
    "is_encoder_decoder": Refused(
        "train a causal language model; encoder-decoders are not supported", "trl ≤ 0.27", nothing=(None, False)
    ),
}
_REFERENCE: dict[str, Row] = {
    "force_use_ref_model": Gone(
        "a ref_model that is given is always the reference, also with an adapter", "trl ≤ 0.28", nothing=(None, False)
    ),
    "ref_model_init_kwargs": Refused(
        "load the reference with from_pretrained and pass it as ref_model; one given by name is loaded with "
        "model_init_kwargs",
        "trl ≤ 0.28",
        nothing=(None, {}),
    ),
    "model_adapter_name": Refused(
        "leave it out: the active adapter trains; model.set_adapter(...) activates another one",
        "trl ≤ 0.28",
    ),
    "ref_adapter_name": Refused(
        "leave it out if it names the trained adapter: a frozen copy of its start is kept; for another adapter, pass "
        "a model with it as ref_model",
        "trl ≤ 0.28",
    ),
}
_HEAD = "the head projects only trained tokens, a chunk at a time"

ARGUMENTS: dict[str, dict[str, Row]] = {
    "BaseConfig": {
        "evaluation_strategy": Now("eval_strategy", "transformers ≤ 4.46"),
        "warmup_ratio": Now(
            "warmup_steps",
            "transformers ≤ 5.0",
            "a number below 1 is a share of all steps",
            value=_share_of_steps,
        ),
        "no_cuda": Now("use_cpu", "transformers ≤ 4.57"),
        "per_gpu_train_batch_size": Now("per_device_train_batch_size", "transformers ≤ 4.57"),
        "per_gpu_eval_batch_size": Now("per_device_eval_batch_size", "transformers ≤ 4.57"),
        "adafactor": Now(
            "optim", "transformers ≤ 4.57", "optim='adafactor'", value=_always("adafactor"), nothing=(None, False)
        ),
        "group_by_length": Now(
            "train_sampling_strategy",
            "transformers ≤ 5.0",
            "'group_by_length'; it saves no padding on flat rows, which have none",
            value=_always("group_by_length"),
            nothing=(None, False),
        ),
        "include_inputs_for_metrics": Now(
            "include_for_metrics",
            "transformers ≤ 4.57",
            "a list that holds 'inputs'",
            value=lambda old, given: sorted({"inputs", *(given.get("include_for_metrics") or ())}),
            nothing=(None, False),
        ),
        "push_to_hub_token": Now("hub_token", "transformers ≤ 4.57"),
        "push_to_hub_model_id": Now("hub_model_id", "transformers ≤ 4.57", value=_repository),
        "push_to_hub_organization": Now(
            "hub_model_id", "transformers ≤ 4.57", "as organisation/name", value=_organisation
        ),
        "torchdynamo": Now("torch_compile_backend", "transformers ≤ 4.57"),
        "tpu_metrics_debug": Now(
            "debug",
            "transformers ≤ 4.57",
            "debug='tpu_metrics_debug'",
            value=_always("tpu_metrics_debug"),
            nothing=(None, False),
        ),
        "xpu_backend": Now("ddp_backend", "transformers ≤ 4.20"),
        "dispatch_batches": Now(
            "accelerator_config",
            "transformers ≤ 4.46",
            "a key of it",
            value=_into("accelerator_config", "dispatch_batches"),
        ),
        "split_batches": Now(
            "accelerator_config",
            "transformers ≤ 4.46",
            "a key of it",
            value=_into("accelerator_config", "split_batches"),
            nothing=(None, False),
        ),
        "fsdp_min_num_params": Now(
            "fsdp_config",
            "transformers ≤ 4.57",
            "its key min_num_params",
            value=_into("fsdp_config", "min_num_params"),
            nothing=(None, 0),
        ),
        "fsdp_transformer_layer_cls_to_wrap": Now(
            "fsdp_config",
            "transformers ≤ 4.57",
            "its key transformer_layer_cls_to_wrap",
            value=_into("fsdp_config", "transformer_layer_cls_to_wrap"),
        ),
        # Newer than the oldest transformers that is supported.
        "activation_checkpointing": Now("gradient_checkpointing", "transformers > 5.17"),
        "activation_checkpointing_kwargs": Now("gradient_checkpointing_kwargs", "transformers > 5.17"),
        "logging_dir": Gone(
            "TensorBoard's folder is the environment variable TENSORBOARD_LOGGING_DIR, and has been set to it",
            "transformers ≤ 5.0",
            act=_logging_dir,
        ),
        "overwrite_output_dir": Gone("nothing in the folder is overwritten or asked about", "transformers ≤ 4.57"),
        "save_safetensors": Gone("weights are always saved as safetensors", "transformers ≤ 4.57"),
        "fp16_backend": Gone("half precision is torch's autocast, set by bf16= or fp16=", "transformers ≤ 4.57"),
        "half_precision_backend": Gone(
            "half precision is torch's autocast, set by bf16= or fp16=", "transformers ≤ 4.57"
        ),
        "fp16_opt_level": Gone("it was Apex's; half precision is torch's autocast", "transformers ≤ 4.57"),
        "use_mps_device": Gone("an Apple GPU is used where there is one", "transformers ≤ 4.57"),
        "use_ipex": Gone("torch has Intel's optimisations itself", "transformers ≤ 4.46"),
        "jit_mode_eval": Gone("evaluation runs the model as it is", "transformers ≤ 4.57"),
        "use_legacy_prediction_loop": Gone("there is one loop of evaluation", "transformers ≤ 4.57"),
        "include_tokens_per_second": Gone("the log counts tokens as num_tokens", "transformers ≤ 4.57"),
        "mp_parameters": Gone("it was read by SageMaker's launcher alone", "transformers ≤ 4.57"),
        "tpu_num_cores": Gone("the launcher sets the number of cores", "transformers ≤ 4.57"),
        "ray_scope": Gone("it concerned Ray's search for hyper-parameters alone", "transformers ≤ 4.57"),
        "past_index": Refused(
            "no state is passed from one batch to the next", "transformers ≤ 4.57", nothing=(None, -1)
        ),
        "sharded_ddp": Refused("shard with fsdp= or deepspeed=", "transformers ≤ 4.20", nothing=(None, "", [])),
    },
    "SFTConfig": {
        "max_seq_length": Now("max_length", "trl 0.9 – 0.19"),
        "use_liger": Now("use_liger_kernel", "trl 0.10 – 0.17"),
        "dataset_batch_size": Gone("the batch size of tokenisation is chosen automatically", "trl 0.9 – 0.17"),
        "num_of_sequences": Gone("packing sees the whole data set and fills no buffer", "trl 0.9 – 0.17"),
        "chars_per_token": Gone("packing counts tokens and estimates nothing", "trl 0.9 – 0.17"),
    },
    "PreferenceFields": _JUDGED,
    "ReferenceFields": {
        **_REFERENCE,
        "base_model_attribute_name": Gone(_HEAD, "trl 0.17 – 0.28", nothing=(None, "model")),
        "use_liger_loss": Gone(_HEAD, "trl 0.17 – 0.27", nothing=(None, False)),
    },
    "DPOConfig": {
        "use_num_logits_to_keep": Gone(_HEAD, "trl 0.13 – 0.16", nothing=(None, False)),
        "use_logits_to_keep": Gone(_HEAD, "trl 0.15 – 0.28", nothing=(None, False)),
        "tools": Refused("give each row its tools, in a column `tools`", "trl 0.14 – 0.28", nothing=(None, [])),
    },
    "OnlineConfig": {
        "use_vllm": Refused(
            "completions are sampled in this process; leave it out",
            "trl 0.14 – 1.16",
            nothing=(None, False),
        ),
        "use_transformers_paged": Now("use_transformers_continuous_batching", "trl 0.20 – 1.16", nothing=(None, False)),
        "cache_implementation": Gone("the sampler has a cache of its own", "trl 0.16 – 1.16"),
        "ds3_gather_for_generation": Gone("sharded weights are gathered layer by layer", "trl 0.14 – 1.16"),
        "pad_to_multiple_of": Gone("flat rows are not padded", "trl 1.0 – 1.16"),
        "log_multimodal": Gone("there are no images yet", "trl 0.28 – 1.16"),
        "max_tool_calling_iterations": Gone("there are no tools yet", "trl 0.26 – 1.16"),
        "vllm_importance_sampling_correction": Gone(
            "it is on with rollout_correction=True, for any sampler", "trl 0.22 – 1.16"
        ),
        "vllm_importance_sampling_cap": Now("vllm_importance_sampling_clip_max", "trl 0.22 – 1.0"),
        "log_completions_hub_repo": Refused(
            "completions are kept in the output folder; upload that", "trl 0.26 – 1.16"
        ),
        **{
            old: Gone(_OTHER_SAMPLER, "trl 0.14 – 1.16")
            for old in (
                *("vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex"),
                *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"),
                *("vllm_group_port", "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_max_model_len"),
                *("vllm_tensor_parallel_size", "vllm_device", "vllm_dtype", "vllm_guided_decoding_regex"),
                "vllm_enable_prefix_caching",
            )
        },
        "wandb_log_unique_prompts": Now("log_unique_prompts", "trl 0.16 – 0.24"),
    },
    "GRPOConfig": {
        "cast_lm_head_to_fp32": Gone(
            "logits are always float32; the head's weights keep their dtype",
            "trl 0.23 – 1.16",
            nothing=(None, False),
        ),
    },
    "DistillationConfig": {
        "lmbda": Refused(
            "the student writes every completion; GKDTrainer trains on the data's completions too",
            "trl 1.0 – 1.5",
            nothing=(None, 1.0, 1),
        ),
        "use_teacher_server": Refused(
            "the teacher runs in this process: pass teacher_model", "trl 1.0 – 1.5", nothing=(None, False)
        ),
        "teacher_model_server_url": Refused("the teacher runs in this process: pass teacher_model", "trl 1.0 – 1.5"),
        "reverse_kl_top_1_mode": Refused(
            "with beta > 0 the student's most likely tokens are compared, and no sampled one",
            "trl 1.0 – 1.5",
            nothing=(None, "argmax"),
        ),
        "log_completions_steps": Gone("completions are printed in every round", "trl 1.0 – 1.9"),
        "vllm_sync_frequency": Gone(_OTHER_SAMPLER, "trl 1.0 – 1.9"),
        **{
            name: Gone("the tracker's own environment variables set it", "trl 1.0 – 1.5")
            for name in ("wandb_entity", "wandb_project", "wandb_run_group")
        },
    },
    # The trainer of 0.9 to 0.21 had names of its own, some of them PPO's.
    "RLOOConfig": {
        "kl_coef": Now("beta", "trl 0.9 – 0.21"),
        "rloo_k": Now("num_generations", "trl 0.9 – 0.21"),
        "cliprange": Now("epsilon", "trl 0.9 – 0.21"),
        "response_length": Now("max_completion_length", "trl 0.9 – 0.21"),
        "num_ppo_epochs": Now("num_iterations", "trl 0.9 – 0.21"),
        "normalize_advantage": Now("normalize_advantages", "trl 0.12 – 0.21"),
        "num_mini_batches": Now(
            "steps_per_generation",
            "trl 0.9 – 0.21",
            "times gradient_accumulation_steps",
            value=_mini_batches,
            nothing=(None, 1),
        ),
        "stop_token_id": Now(
            "generation_kwargs",
            "trl 0.9 – 0.21",
            "its key eos_token_id",
            value=_into("generation_kwargs", "eos_token_id"),
        ),
        "stop_token": Refused(
            "completions end at the model's end tokens, as with 'eos'; generation_kwargs={'stop_strings': [...]} adds "
            "others",
            "trl 0.9 – 0.21",
            nothing=(None, "eos"),
        ),
        "total_episodes": Refused(
            "it counted completions; max_steps or num_train_epochs says when training ends", "trl 0.9 – 0.21"
        ),
        "missing_eos_penalty": Refused(
            "mask_truncated_completions=True leaves unfinished completions out; a reward function that reads "
            "completion_ids can punish them",
            "trl 0.10 – 0.21",
        ),
        "non_eos_penalty": Refused(
            "mask_truncated_completions=True leaves unfinished completions out; a reward function that reads "
            "completion_ids can punish them",
            "trl 0.9",
            nothing=(None, False),
        ),
        "penalty_reward_value": Gone("it was read with non_eos_penalty alone", "trl 0.9", nothing=(None, -1)),
        "whiten_rewards": Refused(
            "normalize_advantages=True gives advantages mean 0 and deviation 1",
            "trl 0.9 – 0.21",
            nothing=(None, False),
        ),
        "normalize_reward": Refused(
            "normalize_advantages=True gives advantages mean 0 and deviation 1",
            "trl 0.12 – 0.21",
            nothing=(None, False),
        ),
        "token_level_kl": Gone("the divergence is summed over the completion either way", "trl 0.12 – 0.21"),
        "local_rollout_forward_batch_size": Gone(
            "the sampler sizes its batches by max_cache_tokens", "trl 0.9 – 0.21", nothing=(None, 64)
        ),
        "num_sample_generations": Gone(
            "log_completions=True prints completions and keeps them", "trl 0.9 – 0.21", nothing=(None, 0, 10)
        ),
        "exp_name": Gone("run_name names the run for trackers", "trl 0.9 – 0.21"),
        "sanity_check": Refused(
            "train on a slice of the rows, such as the split 'train[:1000]'", "trl 0.9", nothing=(None, False)
        ),
        "base_model": Refused(_POLICY, "trl 0.9"),
        "sft_model_path": Refused(_POLICY, "trl 0.9 – 0.21"),
        "reward_model_path": Refused(
            "pass the reward model among reward_funcs (on the command line --reward_model_name_or_path)",
            "trl 0.9 – 0.21",
        ),
        **{name: Gone(_NO_VALUES, "trl 0.9") for name in ("cliprange_value", "vf_coef", "gamma", "lam")},
    },
    "PPOConfig": {
        "response_length": Now("max_completion_length", "trl 0.9 – 1.12"),
        "num_ppo_epochs": Now("num_iterations", "trl 0.9 – 1.12"),
        "ppo_epochs": Now("num_iterations", "trl ≤ 0.11"),
        "init_kl_coef": Now("kl_coef", "trl ≤ 0.11"),
        "kl_estimator": Now("kl_penalty", "trl 0.17 – 1.12", nothing=(None, "k1")),
        "forward_batch_size": Now("mini_batch_size", "trl ≤ 0.11"),
        "log_with": Now("report_to", "trl ≤ 0.11"),
        "tracker_project_name": Now("project", "trl ≤ 0.11", nothing=(None, "trl")),
        "steps": Gone("a loop of your own ends where it ends, and max_steps ends train()", "trl ≤ 0.11"),
        "local_rollout_forward_batch_size": Gone(
            "the sampler sizes its batches by max_cache_tokens", "trl 0.9 – 1.12", nothing=(None, 64)
        ),
        "num_sample_generations": Gone(
            "log_completions=True prints completions and keeps them", "trl 0.9 – 1.12", nothing=(None, 0, 10)
        ),
        "exp_name": Gone("run_name names the run for trackers", "trl ≤ 0.27"),
        "task_name": Gone("run_name names the run for trackers", "trl ≤ 0.11"),
        "tracker_kwargs": Gone("trackers read their settings from the environment", "trl ≤ 0.11", nothing=(None, {})),
        "project_kwargs": Gone("output_dir and logging_dir say where things go", "trl ≤ 0.11", nothing=(None, {})),
        "accelerator_kwargs": Refused("accelerator_config takes them", "trl ≤ 0.11", nothing=(None, {})),
        **{
            name: Gone("it was read by trackers alone", "trl ≤ 0.11", nothing=(None, usual))
            for name, usual in (
                ("model_name", "gpt2"),
                ("reward_model", "sentiment-analysis:lvwerra/distilbert-imdb"),
            )
        },
        **{
            name: Gone("it follows from the other sizes", "trl ≤ 1.12")
            for name in (
                *("local_batch_size", "micro_batch_size", "local_mini_batch_size", "num_total_batches"),
                *("backward_batch_size", "global_backward_batch_size", "global_batch_size"),
            )
        },
        **{
            name: Gone(
                "nothing is kept on the device between steps that could be freed", "trl ≤ 0.11", nothing=(None, False)
            )
            for name in ("optimize_cuda_cache", "optimize_device_cache")
        },
        "world_size": Gone("the launcher says how many processes there are", "trl 0.7 – 1.12"),
        "base_model": Refused(_POLICY, "trl 0.9", nothing=(None, "EleutherAI/pythia-160m")),
        "sanity_check": Refused(
            "train on a slice of the rows, such as the split 'train[:1000]'", "trl 0.9", nothing=(None, False)
        ),
        "non_eos_penalty": Refused(
            "missing_eos_penalty is subtracted from the score of a completion that did not end",
            "trl 0.9",
            nothing=(None, False),
        ),
        "penalty_reward_value": Gone("it was read with non_eos_penalty alone", "trl 0.9", nothing=(None, -1)),
        "compare_steps": Gone("it was read with push_to_hub_if_best_kwargs alone", "trl ≤ 0.11", nothing=(None, 1)),
        "push_to_hub_if_best_kwargs": Refused(
            "call push_to_hub where the loop sees its best reward", "trl ≤ 0.11", nothing=(None, {})
        ),
        "is_encoder_decoder": Refused(
            "train a causal language model; encoder-decoders are not supported", "trl ≤ 0.11", nothing=(None, False)
        ),
        "is_peft_model": Gone("the model says whether it has an adapter", "trl ≤ 0.11", nothing=(None, False)),
        "use_text_environment": Refused("pass environment= to the trainer", "trl ≤ 0.11", nothing=(None, False)),
        "sft_model_path": Refused(_POLICY, "trl 0.9 – 1.12", nothing=(None, "EleutherAI/pythia-160m")),
        "reward_model_path": Refused(
            "pass the reward model as reward_model (on the command line --reward_model_name_or_path)",
            "trl 0.9 – 1.12",
            nothing=(None, "EleutherAI/pythia-160m"),
        ),
    },
    "OnlineTrainer": {
        "tools": Refused("tools are not supported yet", "trl 0.26 – 1.16"),
        "rollout_func": Refused("pass sampler=, an object with sync and generate", "trl 0.24 – 1.16"),
        "environment_factory": Refused("pass environment=, whose start(row) begins an episode", "trl 1.0 – 1.16"),
        "reward_model": Now("reward_funcs", "trl ≤ 0.16"),
    },
    "PPORounds": {
        "policy": Now("model", "trl 0.9 – 0.14"),
        "ref_policy": Now("ref_model", "trl 0.9 – 0.14"),
        "dataset": Now("train_dataset", "trl ≤ 0.11"),
        "config": Now("args", "trl ≤ 0.11"),
    },
    "RLOOTrainer": {
        "config": Now("args", "trl 0.9 – 0.21"),
        "policy": Now("model", "trl 0.9 – 0.21"),
        "ref_policy": Now("ref_model", "trl 0.9 – 0.21"),
        "data_collator": Refused("prompts are read from the column `prompt`, and nothing is padded", "trl 0.9 – 0.21"),
    },
    "OnlinePairsConfig": {
        "max_new_tokens": Now("max_completion_length", "trl 0.9 – 1.16"),
        "gpu_memory_utilization": Gone(_OTHER_SAMPLER, "trl 0.20 – 0.23"),
    },
    "OnlinePairsTrainer": {
        "data_collator": Refused("prompts are read from the column `prompt`, and nothing is padded", "trl 0.9 – 1.16"),
        "compute_metrics": Refused("no logits are kept; a reward function may log with log_metric", "trl 0.9 – 1.16"),
        "preprocess_logits_for_metrics": Refused("no logits are kept", "trl 0.9 – 1.16"),
        "reward_processing_class": Now("reward_processing_classes", "trl 0.12 – 0.23"),
    },
    "KTOConfig": {
        old: Gone("it belonged to the loss bco, which is BCOTrainer's today", "trl 0.9")
        for old in ("prompt_sample_size", "min_density_ratio", "max_density_ratio")
    },
    "ModelConfig": {
        "torch_dtype": Now("dtype", "trl < 1.0"),
    },
    "AnswerFields": {
        "torch_dtype": Now("dtype", "trl < 1.0"),
    },
    "ChatArguments": {
        "examples_path": Gone("a file of prompts is read from standard input: trl chat ... < FILE", "trl 0.8 – 0.18"),
        "verbose": Gone("the chat's settings are printed at its beginning", "trl 0.9 – 0.18"),
        "current_model": Gone("/save writes a model's chats into a folder of its own", "trl 0.8 – 0.18"),
        "generation_config": Refused(
            "set the options themselves: --temperature, --top_p, --max_new_tokens", "transformers chat"
        ),
    },
    "ScriptArguments": {
        "gradient_checkpointing_use_reentrant": Gone(
            "checkpointing without reentrance is the default; gradient_checkpointing_kwargs changes it", "trl ≤ 0.16"
        ),
        "ignore_bias_buffers": Gone("no mask is kept in a buffer that ranks would exchange", "trl ≤ 1.16"),
        "config": Gone("a YAML file is read by the command line: trl sft --config FILE", "trl 0.9 – 0.10"),
        "datasets": Refused("a mix is DatasetMixtureConfig(datasets=[...])", "trl 0.20 – 0.21", nothing=(None, [])),
        "sanity_check": Refused(
            "train on a slice of the rows, such as the split 'train[:1000]'", "trl 0.9 – 0.11", nothing=(None, False)
        ),
    },
    "BaseTrainer": {
        "tokenizer": Now("processing_class", "trl ≤ 0.15"),
        "model_init": Refused("pass the model itself: model=model_init()", "trl ≤ 0.11"),
    },
    "SFTTrainer": {
        "max_seq_length": InConfig("max_length", "trl ≤ 0.12"),
        "dataset_text_field": InConfig("dataset_text_field", "trl ≤ 0.12"),
        "packing": InConfig("packing", "trl ≤ 0.12"),
        "eval_packing": InConfig("eval_packing", "trl ≤ 0.12"),
        "dataset_num_proc": InConfig("dataset_num_proc", "trl ≤ 0.12"),
        "dataset_kwargs": InConfig("dataset_kwargs", "trl ≤ 0.12"),
        "model_init_kwargs": InConfig("model_init_kwargs", "trl ≤ 0.12"),
        "neftune_noise_alpha": InConfig("neftune_noise_alpha", "trl ≤ 0.11"),
        "infinite": Gone("max_steps or num_train_epochs says when training ends", "trl ≤ 0.11"),
        "dataset_batch_size": Gone("the batch size of tokenisation is chosen automatically", "trl ≤ 0.12"),
        "num_of_sequences": Gone("packing sees the whole data set and fills no buffer", "trl ≤ 0.12"),
        "chars_per_token": Gone("packing counts tokens and estimates nothing", "trl ≤ 0.12"),
    },
    "DPOTrainer": {
        **{
            name: InConfig(name, "trl ≤ 0.11")
            for name in (
                *("beta", "label_smoothing", "loss_type", "reference_free", "precompute_ref_log_probs"),
                *("max_length", "max_prompt_length", "truncation_mode", "disable_dropout", "dataset_num_proc"),
                *("generate_during_eval", "model_init_kwargs"),
            )
        },
        **_JUDGED,
        **_REFERENCE,
    },
    "KTOTrainer": {
        **{name: _REFERENCE[name] for name in ("model_adapter_name", "ref_adapter_name")},
        **{
            name: Refused("it weighed the prompts of the loss bco, which is BCOTrainer's today", "trl 0.9 – 0.28")
            for name in ("embedding_func", "embedding_tokenizer")
        },
    },
    "BCOTrainer": {name: _REFERENCE[name] for name in ("model_adapter_name", "ref_adapter_name")},
    "RewardTrainer": {"max_length": InConfig("max_length", "trl ≤ 0.11")},
    "IterativeSFTTrainer": {
        name: InConfig(name, "trl ≤ 0.19") for name in ("max_length", "truncation_mode", "optimize_device_cache")
    },
    "DistillationTrainer": {
        "data_collator": Refused("prompts are read from the column `prompt`, and nothing is padded", "trl 1.1 – 1.9"),
        **{
            name: Refused("no logits are kept that it could read", "trl 1.1 – 1.9")
            for name in ("compute_metrics", "preprocess_logits_for_metrics")
        },
    },
}

_PAIRS_OF_KTO = Refused("train with KTOTrainer, which reads pairs as two rows each", "trl ≤ 0.9")

# Older values of arguments that kept their name; for a list, values of its entries.
VALUES: dict[str, dict[str, dict[Any, Any]]] = {
    "BaseConfig": {"optim": {"adamw_hf": "adamw_torch"}, "report_to": {None: "none"}},
    "SFTConfig": {
        "dataset_text_field": {None: "text"},
        "packing_strategy": {"ffd": "bfd", "bfd-requeue": "bfd_split"},
        "loss_type": {None: "nll", "chunked_nll": "nll"},
    },
    "DPOConfig": {"loss_type": {"aot_pair": "aot_unpaired", "kto_pair": _PAIRS_OF_KTO}},
    "CPOConfig": {"loss_type": {"kto_pair": _PAIRS_OF_KTO}},
    "KTOConfig": {"loss_type": {"bco": Refused("train with BCOTrainer", "trl 0.9")}},
    "PPOConfig": {"kl_penalty": {"k1": "kl"}},
}

# Keys of arguments that are mappings.
KEYS: dict[str, dict[str, dict[str, str]]] = {
    "BaseConfig": {"model_init_kwargs": {"torch_dtype": "dtype", "use_auth_token": "token"}},
    "TeacherFields": {"teacher_model_init_kwargs": {"torch_dtype": "dtype", "use_auth_token": "token"}},
}

# Public names that have another name today.
NAMES = {
    **{f"{method}ScriptArguments": "ScriptArguments" for method in ("SFT", "DPO", "Reward")},
    "PPOv2Config": "PPOConfig",
    "PPOv2Trainer": "PPOTrainer",
    "GMPOTrainer": "GRPOTrainer",
    "GRPOWithReplayBufferTrainer": "GRPOTrainer",
}


# Names of upstream that this library lacks, by pattern, and their replacements. The first match counts.
_RELEASE = "this release has no"
ABSENT: tuple[tuple[tuple[str, ...], str], ...] = (
    (("distillation",), "the command `trl` runs it, as in `trl distillation --help`"),
    (
        (
            *("*Distillation*", "*distillation*", "GOLD*", "gold*", "SDFT*", "sdft*", "SDPO*", "sdpo*"),
            *("IWOPD*", "iw_opd*", "teacher_sync", "loss_utils"),
        ),
        "a teacher of GKDTrainer, DistillationTrainer or MiniLLMTrainer is another model in this process, with the "
        "student's tokenizer",
    ),
    (
        ("A2PO*", "a2po*", "TPO*", "tpo*", "AsyncGRPO*", "async_grpo*", "async_rollout*", "vllm_client"),
        f"{_RELEASE} such trainer; GRPOTrainer is the nearest",
    ),
    (
        ("Judge", "*Judge"),
        "FunctionJudge makes a judge of a function; derive others from BasePairwiseJudge",
    ),
    (("GeometricMixtureWrapper",), "NashMDTrainer mixes logits in its sampler, trl.rollout.two_models.MixtureSampler"),
    (("*DDPO*", "*ddpo*", "AlignProp*", "alignprop*", "*StableDiffusion*"), "diffusion models are not supported"),
    (
        (
            *("TextEnvironment*", "TextHistory", "environment*", "harbor*", "Harbor*", "open*reward*", "Open*Reward*"),
            *("openenv", "generate_rollout_completions"),
        ),
        "tools are not supported yet; environment= of a trainer takes an environment of your own",
    ),
    (("*Vision*", "*multimodal*", "*pixel_values*", "strip_images*"), "this library trains on text alone"),
    (("VLLM*", "vllm*", "generation"), "completions are sampled in this process; no server is needed"),
    (("merge_models", "MergeConfig"), "import it from trl.callbacks.merging"),
    (
        ("sft", "dpo", "kto", "reward", "grpo", "rloo", "distillation", "env"),
        "the command `trl` runs it, as in `trl sft --help`",
    ),
    (("generate_model_card",), "use create_model_card of a trainer"),
    (("chat", "ChatArguments"), "use the command `trl chat`, or trl.rollout.chat in Python"),
    (("PAPO*", "papo"), "this library trains on text alone"),
    (
        ("DPPO*", "dppo", "GFPO*", "gfpo", "GroupFilterFunc", "SSD*", "ssd", "A2PO*"),
        f"{_RELEASE} such trainer; GRPOTrainer is the nearest",
    ),
    (
        ("*_chat_template", "*_chat_template_*", "*_schema", "*_template"),
        "no chat templates are kept here; chat_template_path and clone_chat_template take one from a tokenizer",
    ),
    (
        ("prepare_deepspeed", "prepare_fsdp"),
        "trainers prepare the reference; for a model of your own use accelerator.prepare_model",
    ),
    (
        ("*lm_head*", "forward_masked_logits", "FusedCausalLMOutput", "CausalLMOutput*FlatLogits"),
        "the head of every model projects only trained tokens, a chunk at a time, without a patch",
    ),
    (("neftune_post_forward_hook",), "set neftune_noise_alpha in the trainer's config"),
    (("ReplayBuffer",), "set replay_buffer_size in GRPOConfig, which keeps groups of earlier rounds"),
    (("PolicyAndValueWrapper",), "values come from a head on the policy, which PPOTrainer adds"),
    (("OnPolicyConfig", "OnpolicyRuntimeConfig", "OnlineTrainerState"), "PPOConfig and RLOOConfig have its fields"),
    (("get_trackio_space_url", "*comet*"), "use create_model_card of a trainer, which names the tracker's run"),
    (("*event_loop_in_daemon",), "a reward function may be a coroutine; trainers run it in an event loop of their own"),
    (("ensure_master_addr_port",), "`accelerate launch` and torchrun set the address and the port"),
    (("global_then_local_main_first",), "use accelerate.PartialState().main_process_first()"),
    (
        ("YamlConfigParser", "SftArgumentParser", "_hf_argparser"),
        "use TrlParser, which reads the command line and a YAML file",
    ),
    (("get_git_commit_hash", "print_env"), "`trl env` prints the versions"),
    (("skills", "*_skill", "*_skills"), "this library has no skills to install; `trl --help` lists what it does"),
    (("PeftSavingCallback",), "trainers save an adapter as an adapter, at every checkpoint"),
    (("PPODecorators",), "PPOTrainer keeps nothing on the device between steps that it could free"),
    (("truncate_with_protected_tokens",), "max_prompt_length cuts prompts and keeps their ends"),
    (
        ("trl_sanitze_kwargs_for_tagging", "*to_hf*"),
        "use push_to_hub of a trainer, which uploads the model with its card and its tags",
    ),
    (
        ("OffloadActivations",),
        "set activation_offloading=True in the trainer's config, or enter get_act_offloading_ctx_manager(model)",
    ),
    (("ProfilingContext",), "use profiling_context(trainer, name)"),
    (
        ("enable_selective_activation_checkpointing",),
        "set gradient_checkpointing_kwargs={'selective': True} in the trainer's config",
    ),
    (
        ("add_hooks", "remove_hooks", "iter_params", "get_all_parameters"),
        "use unwrap_model_for_generation, which gathers sharded weights",
    ),
    (("maybe_gather_lm_head_ctx",), "use trl.models.shards.whole(parameters), which gathers what ZeRO-3 has sharded"),
    (("MultitaskPrompt*",), "import it from peft"),
    (
        ("*byte_offsets", "*_byte_level_tokenizer", "piece_byte_len"),
        "it aligned the tokens of two tokenizers; here teacher and student share one",
    ),
    (
        (
            "randn_tensor",
            "PerPromptStatTracker",
            "auxiliary_modules",
            "sd_utils",
            "aesthetic_scorer",
            "*pipeline_step*",
        ),
        "diffusion models are not supported",
    ),
    (("PreferenceCollator",), "use DataCollatorForPreference"),
    (("DistributedBackend",), "use accelerate's PartialState or Accelerator"),
    (("shift_tokens_right",), "it concerned encoder-decoders, which are not supported"),
    (
        ("get_high_entropy_mask",),
        "set top_entropy_quantile in GRPOConfig, which trains on tokens of high entropy alone",
    ),
)


class FDivergenceType(str, enum.Enum):
    """Names of f_divergence_type, as scripts of 0.9 to 0.28 write them."""

    REVERSE_KL = "reverse_kl"
    JS_DIVERGENCE = "js_divergence"
    ALPHA_DIVERGENCE = "alpha_divergence"


# Names that exist only in some modules of upstream, and their places here.
PLACES: dict[tuple[str, str], tuple[str, str]] = {
    ("sft_trainer", "DataCollatorForLanguageModeling"): (
        "trl.data.batching.collators",
        "DataCollatorForLanguageModeling",
    ),
    ("dpo_trainer", "DataCollatorForPreference"): ("trl.data.batching.collators", "DataCollatorForPreference"),
    ("reward_trainer", "DataCollatorForPreference"): ("trl.data.batching.collators", "DataCollatorForPairs"),
    ("kto_trainer", "DataCollatorForUnpairedPreference"): (
        "trl.data.batching.collators",
        "DataCollatorForUnpairedPreference",
    ),
    ("utils", "DatasetConfig"): ("trl.data.mixture", "DatasetConfig"),
    **{
        (module, name): ("trl.callbacks.merging", name)
        for module in ("mergekit_utils", "merge_model_callback")
        for name in ("MergeConfig", "merge_models")
    },
    ("dataset_formatting", "FORMAT_MAPPING"): ("trl.compat.helpers.rows", "FORMAT_MAPPING"),
}

# Helpers that upstream offers beside its trainers: the module of each, and its name there if that is another one. They
# are importable from `trl` and from every path below, and are no public names.
_HELPERS = {
    "trl.compat.helpers.collators": "DPODataCollatorWithPadding RewardDataCollatorWithPadding DataCollatorForChatML",
    "trl.compat.helpers.models": """
        SUPPORTED_ARCHITECTURES get_kbit_device_map create_model_from_path get_config_model_id prepare_peft_model
        peft_module_casting_to_bf16 use_adapter hash_module disable_dropout_in_model enable_gradient_checkpointing
        disable_gradient_checkpointing unwrap_model_for_generation get_act_offloading_ctx_manager
        empty_cache forward get_reward generate batch_generation respond_to_batch compute_flops_per_token compute_mfu
        adjusted_mfu get_peak_flops get_peak_flops_per_device""",
    "trl.compat.helpers.older": """
        GMPOConfig GRPOWithReplayBufferConfig SftScriptArguments DpoScriptArguments
        FDivergenceConstants init_zero_verbose
        suppress_experimental_warning RewardFunc RolloutFunc EnvironmentFactory DatasetType""",
    "trl.compat.helpers.packages": """
        TRLExperimentalWarning is_transformers_greater_than is_npu_available is_xpu_available""",
    "trl.compat.helpers.profiling": "profiling_context profiling_decorator",
    "trl.compat.helpers.records": """
        WANDB_PADDING split_tensor_dict shuffle_sequence_dict flatten_dict stack_dicts convert_to_scalar stats_to_np
        remove_none_values identity exact_div strtobool get_callable_name is_async_callable compute_accuracy
        print_prompt_completions_sample print_rich_table shuffle_tensor_dict=shuffle_sequence_dict""",
    "trl.compat.helpers.rows": """
        RepeatSampler RepeatRandomSampler=RepeatSampler get_dataset_column_names truncate_dataset pack_examples
        ConstantLengthDataset conversations_formatting_function instructions_formatting_function
        get_formatting_func_from_dataset decode_and_strip_padding add_bos_token_if_needed add_eos_token_if_needed
        repeat_iterable_dataset""",
    "trl.compat.helpers.statistics": """
        nanmin nanmax nanstd masked_mean masked_var masked_whiten whiten get_global_statistics RunningMoments
        LengthSampler""",
    "trl.compat.helpers.templates": """
        has_generation_markers is_chat_template_prefix_preserving is_chat_template_stop_token_trained
        get_training_chat_template supports_tool_calling add_response_schema parse_response setup_chat_format
        ChatMlSpecialTokens FORMAT_MAPPING SIMPLE_CHAT_TEMPLATE SIMPLE_SFT_CHAT_TEMPLATE SIMPLE_QUERY_CHAT_TEMPLATE""",
    "trl.compat.helpers.tensors": """
        pad pad_to_length flush_left flush_right selective_log_softmax selective_log_softmax_and_entropy
        entropy_from_logits logprobs_from_logits dft_loss log1mexp top_k_top_p_filtering first_true_indices
        truncate_right truncate_response clip_by_value get_exp_cap cap_exp""",
    "trl.data.tokenizing.chat": "common_prefix_length",
    "trl.models.value_head": "ValueHead",
    "trl.models.with_value_head": "PreTrainedModelWrapper=AutoModelForCausalLMWithValueHead",
    "trl.config": "BaseConfig",
    "trl.trainer.base": "BaseTrainer",
    "transformers": "set_seed",
    "contextlib": "NoOpManager=nullcontext",
    "peft": "prepare_model_for_kbit_training",
}
HELPERS: dict[str, tuple[str, str]] = {
    word.partition("=")[0]: (home, word.rpartition("=")[2])
    for home, words in _HELPERS.items()
    for word in words.split()
}

_ROWS = (("rows",), "`rows`, which returns the data set as the method trains on it")
_BATCH = (("batch", "rows"), "`batch`, which makes a batch of prepared rows (and `rows`, which prepares them)")
_LOSS = (("loss", "compute_loss"), "`loss`, which returns sums and metrics (or `compute_loss`)")
_REFERENCE_LOGPS = (("reference_values", "loss"), "`reference_values`, or `loss`")
_DRAWING = (
    ("sampler", "credit", "collect"),
    "`credit`, which gets all traces of a round with their rewards; pass sampler= or reward_funcs= for the rest",
)
_GENERATION = (("sampler",), "`generate` of a sampler and set it as the attribute `sampler`")
_JUDGED_LOSS = {
    **dict.fromkeys(("_compute_loss", "get_batch_loss_metrics", "concatenated_forward", "get_batch_logps"), _LOSS),
    **dict.fromkeys(("concatenated_inputs", "tokenize_row", "build_tokenized_answer"), _BATCH),
    "store_metrics": _LOSS,
}

# Methods of upstream's trainers that only upstream's code calls: overriding one has no effect here. With each: our
# methods that a subclass may override instead (one of them suffices), and a sentence.
HOOKS: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "BaseTrainer": {
        "_set_signature_columns_if_needed": _ROWS,
        "_remove_unused_columns": _ROWS,
        "_get_num_items_in_batch": (("counts", "get_batch_samples"), "`counts`, what the loss is averaged over"),
    },
    "SFTTrainer": dict.fromkeys(
        ("_prepare_dataset", "_prepare_non_packed_dataloader", "_prepare_packed_dataloader"), _ROWS
    ),
    "DPOTrainer": {
        **_JUDGED_LOSS,
        "_prepare_dataset": _ROWS,
        "process_row": _ROWS,
        "dpo_loss": _LOSS,
        **dict.fromkeys(
            ("compute_ref_log_probs", "compute_reference_log_probs", "_precompute_ref_logps"), _REFERENCE_LOGPS
        ),
    },
    "KTOTrainer": {
        **_JUDGED_LOSS,
        "_prepare_dataset": _ROWS,
        "kto_loss": _LOSS,
        **dict.fromkeys(
            ("compute_ref_log_probs", "compute_reference_log_probs", "_precompute_ref_logps"), _REFERENCE_LOGPS
        ),
        **dict.fromkeys(
            ("_compute_kl_logps", "compute_kl_logps"), (("before_step", "loss"), "`before_step`, or `loss`")
        ),
    },
    "BCOTrainer": {
        **_JUDGED_LOSS,
        "bco_loss": _LOSS,
        "compute_reference_log_probs": _REFERENCE_LOGPS,
    },
    "CPOTrainer": {**_JUDGED_LOSS, "cpo_loss": _LOSS},
    "ORPOTrainer": {**_JUDGED_LOSS, "odds_ratio_loss": _LOSS},
    "GKDTrainer": {
        "generalized_jsd_loss": _LOSS,
        "generate_on_policy_outputs": (("rewritten",), "`rewritten`, which puts other answers in the rows' place"),
    },
    "MiniLLMTrainer": dict.fromkeys(("_single_step_decomposition_loss", "_compute_advantage"), _LOSS),
    "RewardTrainer": {"_prepare_dataset": _ROWS},
    "PRMTrainer": {"tokenize_row": _ROWS},
    "OnlineTrainer": {
        "_generate_and_score_completions": _DRAWING,
        "_calculate_rewards": (("credit",), "`credit`, which gets all rewards, or pass reward_funcs"),
        **dict.fromkeys(("_generate", "_generate_single_turn"), _GENERATION),
        "_tokenize_prompts": _ROWS,
        **dict.fromkeys(
            (
                *("_compute_loss", "compute_liger_loss", "_get_per_token_logps_and_entropies", "_get_per_token_logps"),
                *("get_high_entropy_mask", "get_off_policy_mask", "get_gamma_weights"),
            ),
            _LOSS,
        ),
    },
}

_FILES = {command.replace("-", "_"): row for command, row in METHODS.items()}
# Modules of upstream that are elsewhere here, with a remark if upstream has dropped the path too. Each has the public
# names of `trl`; modules of `trl.rewards` have the public names of `trl.rewards`.
PATHS = {
    "trl.trainer": "",
    **{f"trl.trainer.{method}_{part}": "" for method in _FILES for part in ("trainer", "config")},
    "trl.trainer.model_config": "",
    **{f"trl.trainer.{part}": "" for part in ("utils", "callbacks", "base_config", "base_trainer")},
    **{f"trl.{part}": "" for part in ("data_utils", "chat_template_utils", "models", "models.utils", "import_utils")},
    "trl.trainer.judges": "",
    "trl.experimental": "",
    "trl.experimental.judges": "",
    "trl.experimental.judges.judges": "",
    "trl.experimental.utils": "",
    "trl.experimental.merge_model_callback": "",
    "trl.mergekit_utils": "",
    **{f"trl.experimental.{method}": "" for method, row in _FILES.items() if row.experimental},
    **{
        f"trl.experimental.{method}.{method}_{part}": ""
        for method, row in _FILES.items()
        if row.experimental
        for part in ("trainer", "config")
    },
    **{f"trl.rewards.{part}_rewards": "" for part in ("accuracy", "format", "other")},
    "trl.scripts": "",
    "trl.scripts.utils": "",
    "trl.core": "its names are in `trl` today",
    "trl.commands": "its names are in `trl` today",
    "trl.commands.cli_utils": "its names are in `trl` today",
    "trl.extras": "its names are in `trl` today",
    "trl.extras.dataset_formatting": "its names are in `trl` today",
    "trl.extras.best_of_n_sampler": "its names are in `trl` today",
    "trl.extras.profiling": "",
    "trl.utils": "its names are in `trl` today",
    "trl.env_utils": "its names are in `trl` today",
    **{f"trl.models.{part}": "" for part in ("modeling_base", "modeling_value_head", "activation_offloading")},
    **{f"trl.trainer.ppov2_{part}": "PPOTrainer is in `trl` today" for part in ("trainer", "config")},
    "trl.experimental.ppo.modeling_value_head": "",
    "trl.experimental.winrate_callback": "",
    **{f"trl.experimental.bema_for_ref_model{part}": "" for part in ("", ".callback", ".dpo_trainer")},
    **{f"trl.experimental.gspo_token{part}": "" for part in ("", ".grpo_trainer")},
    **{
        f"trl.experimental.{method}{part}": ""
        for method in ("gmpo", "grpo_with_replay_buffer")
        for part in ("", f".{method}_config", f".{method}_trainer")
    },
}
