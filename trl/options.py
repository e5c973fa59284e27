"""Two tables on options: the range of each number, and the condition under which an option has an effect. Both are
checked when a config is made and again when a trainer is made, before anything is loaded.

`LIMITS` applies to every field with that name. The rows of `UNUSED` belong to a class; a subclass overrides rows of its
bases (None: the option is read there). Only options that differ from their default are checked.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, NamedTuple


class Limit(NamedTuple):
    """The range of a number. `above` and `below` exclude the bound itself."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    note: str = ""  # the meaning of a special value

    def holds(self, value: float) -> bool:
        enough = value > self.least if self.above else value >= self.least
        few = value < self.most if self.below else value <= self.most
        return enough and few and not (self.whole and value != int(value))

    def wanted(self) -> str:
        words = []
        if self.least > -math.inf:
            words.append(f"above {self.least:g}" if self.above else f"{self.least:g} or more")
        if self.most < math.inf:
            words.append(f"below {self.most:g}" if self.below else f"at most {self.most:g}")
        kind = "a whole number" if self.whole else "a number"
        return f"{', '.join([kind, *words])}{f' ({self.note})' if self.note else ''}"


COUNT = Limit(1, whole=True)
NUMBER_OF = Limit(0, whole=True)  # 0 is allowed
POSITIVE = Limit(0, above=True)
WEIGHT = Limit(0)
SHARE = Limit(0, 1)

LIMITS: dict[str, Limit] = {
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("max_length", "max_prompt_length", "max_completion_length", "dataset_num_proc"),
            *("num_generations_eval", "generation_batch_size", "steps_per_generation", "num_iterations"),
            *("max_tokens_per_micro_batch", "max_cache_tokens", "num_completions_to_print"),
            *("precompute_ref_batch_size", "ref_model_sync_steps", "prompt_sample_size", "lora_r"),
            *("stop_after_constant_rounds", "eval_accumulation_steps", "torch_empty_cache_steps", "max_new_tokens"),
        ),
        COUNT,
    ),
    **dict.fromkeys(("dataloader_num_workers", "max_refills", "replay_buffer_size"), NUMBER_OF),
    **dict.fromkeys(("seed", "data_seed"), Limit(0, 2**32 - 1, whole=True)),
    "top_k": NUMBER_OF._replace(note="0 samples from all tokens"),
    "max_steps": Limit(-1, whole=True, note="-1 leaves it to num_train_epochs"),
    **dict.fromkeys(
        ("temperature", "repetition_penalty", "reward_timeout", "logging_steps", "eval_steps", "save_steps")
        + ("lora_alpha", "discopop_tau", "sapo_temperature_pos", "sapo_temperature_neg", "adam_epsilon"),
        POSITIVE,
    ),
    **dict.fromkeys(
        ("learning_rate", "num_train_epochs", "warmup_steps", "weight_decay", "max_grad_norm", "eval_delay", "beta")
        + ("epsilon", "epsilon_high", "desirable_weight", "undesirable_weight", "neftune_noise_alpha")
        + ("router_aux_loss_coef", "min_density_ratio", "max_density_ratio"),
        WEIGHT,
    ),
    **dict.fromkeys(("lmbda", "gamma"), SHARE),
    "kd_temperature": POSITIVE,
    "loss_top_k": NUMBER_OF._replace(note="0 compares all tokens"),
    **dict.fromkeys(("ref_model_mixup_alpha", "min_p", "label_smoothing", "top_entropy_quantile"), SHARE),
    "top_p": Limit(0, 1, above=True),
    **dict.fromkeys(("lora_dropout", "adam_beta1", "adam_beta2", "label_smoothing_factor"), Limit(0, 1, below=True)),
}


def check(config: Any) -> None:
    """Raise ValueError for the first number of `config` that is out of its range."""
    for field in fields(config):
        value, limit = getattr(config, field.name), LIMITS.get(field.name)
        if limit is None or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not limit.holds(value) and value != field.default:
            raise ValueError(f"{field.name}={value!r} is not possible: give {limit.wanted()}")


# --- options without effect -----------------------------------------------------------------------------------------


class Needs(NamedTuple):
    """The option is read only if the option `name` is set, or is (a list: contains) one of `among`."""

    name: str
    among: tuple = ()

    def reason(self, config: Any, value: Any) -> str | None:
        found = getattr(config, self.name)
        words = [getattr(each, "value", each) for each in (found if isinstance(found, list) else [found])]
        if not self.among:
            return None if any(words) else f"without {self.name}"
        # A user's own function, or its path, may read any option.
        if any(word in self.among or callable(word) or ":" in str(word) for word in words):
            return None
        return f"with {self.name}={' + '.join(map(str, words)) or 'none'}, only with {_either(self.among)}"


class Except(NamedTuple):
    """The option is read unless the option `name` is one of `among`."""

    name: str
    among: tuple
    remedy: str = ""

    def reason(self, config: Any, value: Any) -> str | None:
        found = getattr(config, self.name)
        found = getattr(found, "value", found)
        remedy = f": {self.remedy}" if self.remedy else ""
        return f"with {self.name}={found}{remedy}" if found in self.among else None


class Never(NamedTuple):
    """The option is never read; it is accepted for older scripts."""

    because: str

    def reason(self, config: Any, value: Any) -> str | None:
        return f"here: {self.because}"


class Where(NamedTuple):
    """The option is read if `holds(config, value)`; else the reason is `reason_else`."""

    holds: Callable[[Any, Any], bool]
    reason_else: str

    def reason(self, config: Any, value: Any) -> str | None:
        return None if self.holds(config, value) else self.reason_else


class Given(NamedTuple):
    """The option is read if the trainer got the argument `what`."""

    what: str
    remedy: str = ""


Row = Needs | Except | Never | Where | Given | None

_EVALUATES = Given("eval_dataset", "eval_strategy says when to evaluate on it")
_MEASURES = Given("compute_metrics")
_NO_BETAS = ("adafactor", "sgd", "adagrad", "rmsprop", "lomo", "adalomo", "schedule_free_sgd")
# Losses of GRPO that clip the ratio at 1 - epsilon and 1 + epsilon_high: `trl.losses.policy`.
CLIP = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_FLAT = Never("flat rows have no padding, and padded rows are as wide as their longest")

UNUSED: dict[str, dict[str, Row]] = {
    "ModelFields": dict.fromkeys(
        ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"), Needs("load_in_4bit")
    ),
    "BaseConfig": {
        "remove_unused_columns": Never("preprocessing keeps exactly the columns that training reads"),
        "logging_nan_inf_filter": Never("a loss that is not finite stops the run and names the row"),
        "average_tokens_across_devices": Never("gradients never depend on how rows are split among devices"),
        "padding_free": Never("flat rows are never padded"),
        "pad_to_multiple_of": _FLAT,
        "dataloader_in_order": Never("rows come in the order of (seed, epoch)"),
        "label_names": Never("preprocessing names its columns itself"),
        "label_smoothing_factor": Never("only SFT smooths labels"),
        "neftune_noise_alpha": Never("only SFT adds noise to embeddings"),
        "gradient_checkpointing_kwargs": Needs("gradient_checkpointing"),
        "liger_kernel_config": Needs("use_liger_kernel"),
        "dataloader_persistent_workers": Needs("dataloader_num_workers"),
        "logging_steps": Needs("logging_strategy", ("steps",)),
        "save_steps": Needs("save_strategy", ("steps",)),
        "save_total_limit": Except("save_strategy", ("no",)),
        "save_only_model": Except("save_strategy", ("no",)),
        "eval_steps": Needs("eval_strategy", ("steps",)),
        "eval_delay": Except("eval_strategy", ("no",)),
        "greater_is_better": Needs("metric_for_best_model"),
        "hub_strategy": Needs("push_to_hub"),
        "hub_always_push": Needs("push_to_hub"),
        "run_name": Needs("report_to"),
        **dict.fromkeys(
            ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), Needs("report_to", ("trackio",))
        ),
        "warmup_steps": Except("lr_scheduler_type", ("constant",), "constant_with_warmup has a warmup"),
        **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), Except("optim", _NO_BETAS)),
        "optim_target_modules": Where(
            lambda config, value: str(getattr(config.optim, "value", config.optim)).startswith(("galore", "apollo")),
            "without optim=galore_... or apollo_...",
        ),
        "per_device_eval_batch_size": _EVALUATES,
        "eval_on_start": _EVALUATES,
        "batch_eval_metrics": _MEASURES,
        "include_for_metrics": _MEASURES,
        "eval_accumulation_steps": _MEASURES,
    },
    "SFTConfig": {
        "label_smoothing_factor": None,
        "neftune_noise_alpha": None,
        "packing_strategy": Where(lambda config, value: bool(config.packing or config.eval_packing), "without packing"),
        "eval_packing": _EVALUATES,
        "share_prompt": Never("each row of SFT is one sequence, so no prompt is shared"),
    },
    "IterativeSFTConfig": {
        "packing": Given("eval_dataset", "evaluation rows alone are packed; those of a step have no padding as it is"),
        "eval_steps": _EVALUATES,
        "eval_delay": Never("eval_steps says when step evaluates"),
        "num_train_epochs": Never("each call of step trains on its rows once"),
        **dict.fromkeys(
            ("save_strategy", "save_steps", "save_total_limit", "save_only_model"),
            Never("the loop is your own: call save_model where it should save"),
        ),
    },
    "PreferenceFields": {"generate_during_eval": _EVALUATES},
    "ReferenceFields": {
        "precompute_ref_batch_size": Needs("precompute_ref_log_probs"),
        "ref_model_mixup_alpha": Needs("sync_ref_model"),
        "ref_model_sync_steps": Needs("sync_ref_model"),
    },
    "DPOConfig": {
        "label_smoothing": Needs("loss_type", ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired")),
        "discopop_tau": Needs("loss_type", ("discopop",)),
        "f_alpha_divergence_coef": Needs("f_divergence_type", ("alpha_divergence",)),
    },
    "BCOConfig": dict.fromkeys(
        ("prompt_sample_size", "min_density_ratio", "max_density_ratio"), Given("embedding_func")
    ),
    "CPOConfig": {
        "label_smoothing": Needs("loss_type", ("sigmoid", "simpo")),
        "simpo_gamma": Needs("loss_type", ("simpo",)),
    },
    "OnlineConfig": {
        "max_length": Never("max_prompt_length cuts prompts, max_completion_length completions"),
        "truncation_mode": Never("max_prompt_length keeps the end of a prompt"),
        "auto_find_batch_size": Never("max_tokens_per_micro_batch bounds a forward pass, whatever the batch size"),
        "torch_empty_cache_steps": Never("the sampler keeps one cache for all rounds"),
        "sync_ref_model": Needs("beta"),
        "num_generations_eval": _EVALUATES,
        "pass_threshold": _EVALUATES,
        "max_refills": Needs("dynamic_sampling"),
        "num_completions_to_print": Needs("log_completions"),
        "log_unique_prompts": Needs("log_completions"),
        "transformers_continuous_batching_config": Needs("use_transformers_continuous_batching"),
    },
    "PPOConfig": {
        "sync_ref_model": None,
        **dict.fromkeys(
            ("target", "horizon"), Where(lambda config, value: config.adap_kl_ctrl is not False, "with a fixed kl_coef")
        ),
        "target_kl": Needs("early_stopping"),
        "use_score_norm": Needs("use_score_scaling"),
    },
    "OnlinePairsConfig": {"max_length": None, "sync_ref_model": None},
    "NashMDConfig": {"loss_type": Never("the loss is the paper's")},
    "GKDConfig": {
        "loss_type": Never("the loss is the divergence from the teacher, which beta selects"),
        "label_smoothing_factor": Never("a teacher's distribution is not smoothed"),
        "neftune_noise_alpha": Never("only SFT adds noise to embeddings"),
        **dict.fromkeys(
            ("temperature", "max_new_tokens"),
            Where(lambda config, value: config.writes, "with lmbda=0 and seq_kd=False: no completion is sampled"),
        ),
        "seq_kd": Where(lambda config, value: config.lmbda < 1, "with lmbda=1: the student writes every completion"),
    },
    "DistillationConfig": {
        **dict.fromkeys(
            ("precompute_ref_log_probs", "sync_ref_model", "precompute_ref_batch_size")
            + ("ref_model_mixup_alpha", "ref_model_sync_steps"),
            Never("a teacher takes the place of the reference"),
        ),
        **dict.fromkeys(
            ("reward_weights", "reward_timeout", "pass_threshold", "stop_after_constant_rounds"),
            Never("no reward function judges the completions"),
        ),
        "loss_add_tail": Needs("loss_top_k"),
    },
    "MiniLLMConfig": {"gamma": Needs("rkl_advantage"), "length_normalization": Needs("gamma")},
    "GRPOConfig": {
        "epsilon": Needs("loss_type", (*CLIP, "gmpo", "cispo")),
        "epsilon_high": Where(
            lambda config, value: value == config.epsilon or config.loss_type in (*CLIP, "gmpo", "cispo"),
            f"with this loss_type, only with {', '.join(CLIP)}, gmpo or cispo",
        ),
        "delta": Needs("loss_type", CLIP),
        "importance_sampling_level": Where(
            lambda config, value: (
                config.loss_type not in ("gmpo", "vespo") or bool(config.beta and config.use_bias_correction_kl)
            ),
            "with loss_type gmpo or vespo, which read the ratio of each token",
        ),
        **dict.fromkeys(("sapo_temperature_pos", "sapo_temperature_neg"), Needs("loss_type", ("sapo",))),
        **dict.fromkeys(
            ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), Needs("loss_type", ("vespo",))
        ),
        **dict.fromkeys(
            ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
            Needs("use_adaptive_entropy"),
        ),
        "use_bias_correction_kl": Needs("beta"),
        **dict.fromkeys(
            (f"vllm_importance_sampling_{part}" for part in ("mode", "clip_max", "clip_min")),
            Needs("rollout_correction"),
        ),
    },
}


def check_trackers(config: Any) -> None:
    """Check the trackers in `report_to`: ImportError for one that is not installed, ValueError for an unknown one."""
    from transformers import integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    names = [config.report_to] if isinstance(config.report_to, str) else config.report_to or []
    for name in set(names) - {"none", "all"}:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"report_to={name!r} is not one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
        package = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}.get(name, name)
        if not getattr(integrations, f"is_{package}_available", lambda: True)():
            install = {"azure_ml": "azureml-sdk", "comet_ml": "comet_ml", "flyte": "flytekit"}.get(name, name)
            raise ImportError(
                f"report_to={name!r} needs the package {install}, which is not installed: pip install {install}, or "
                "leave it out (report_to='none')"
            )


def rows_of(cls: type) -> dict[str, Row]:
    """The rows of a class; its own rows override those of its bases."""
    return {name: row for part in reversed(cls.__mro__) for name, row in UNUSED.get(part.__name__, {}).items()}


def unused(config: Any) -> list[str]:
    """A sentence for each option that was set and has no effect in this config."""
    found = []
    for name, row, value in _set(config):
        if row is not None and not isinstance(row, Given) and (reason := row.reason(config, value)):
            found.append(f"{_shown(name, value)} has no effect {reason}")
    return found


def unused_by_trainer(config: Any, given: Mapping[str, Any]) -> list[str]:
    """As `unused`, for options that need an argument of the trainer; `given` holds its arguments."""
    return [
        f"{_shown(name, value)} has no effect without {row.what}{f': {row.remedy}' if row.remedy else ''}"
        for name, row, value in _set(config)
        if isinstance(row, Given) and row.what in given and given[row.what] is None
    ]


def _set(config: Any) -> list[tuple[str, Row, Any]]:
    """The fields that have a row and differ from their default."""
    rows, found = rows_of(type(config)), []
    for field in fields(config):
        if field.name not in rows:
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(config, field.name)
        if getattr(value, "value", value) != getattr(default, "value", default):
            found.append((field.name, rows[field.name], value))
    return found


def _shown(name: str, value: Any) -> str:
    return f"{name}={getattr(value, 'value', value)!r}"


def _either(words: tuple) -> str:
    return f"{', '.join(map(str, words[:-1]))} or {words[-1]}" if len(words) > 1 else str(words[0])
