"""A `Run` from the options of a training command or the arguments of a trainer."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from trl.methods import METHODS
from trl.models.load import adapter_base, torch_dtype

from .run import COMPARED, Run

REFERENCED = ("dpo", "kto", "bco", "online-dpo", "xpo", "nash-md")
BUDGET = {"cpu": 1024, "default": 16384}  # of `rollout.pack`: tokens of a forward pass where none are given


def config_of(name: str, **kwargs: Any) -> PreTrainedConfig:
    """The configuration of a model by folder or name; of an adapter's base, where it is an adapter's folder."""
    return AutoConfig.from_pretrained(adapter_base(name) or name, **kwargs)


def quantised(config: PreTrainedConfig) -> tuple[int, bool]:
    """The bits of a checkpoint that is quantised already, or 0; whether the scales of its blocks are quantised too.
    Formats that training turns back into 16 bits (MXFP4, FP8) have 0."""
    found = getattr(config, "quantization_config", None) or {}
    about = found if isinstance(found, Mapping) else found.to_dict()
    if about.get("load_in_4bit") or about.get("load_in_8bit"):
        return 4 if about.get("load_in_4bit") else 8, bool(about.get("bnb_4bit_use_double_quant"))
    bits = about.get("bits") or about.get("w_bit") or 0
    return (8 if bits > 4 else 4) if bits else 0, False


def run_of(
    method: str,
    config: PreTrainedConfig,
    args: Any,
    *,
    adapter: Any = None,
    dtype: Any = None,
    bits: int = 0,
    nested: bool = False,
    teacher: PreTrainedConfig | None = None,
    frozen: tuple[PreTrainedConfig, ...] = (),
    critic: PreTrainedConfig | None = None,
    prompt: int | None = None,
    completion: int | None = None,
    processes: int = 1,
    sharding: str = "ddp",
    device: str = "cuda",
    trained: float = 1.0,
    rows: int | None = None,
    accumulation: int | None = None,
) -> Run:
    """A run by the trainer arguments `args` of a method. Lengths that are not given are the longest that they allow."""
    wanted = torch_dtype(dtype) if dtype not in (None, "auto") else getattr(config, "dtype", None)
    weights = wanted if isinstance(wanted, torch.dtype) else torch.float32
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    prompt, completion = lengths(method, config, args, prompt, completion)
    budget = getattr(args, "max_tokens_per_micro_batch", None)
    budget = budget if isinstance(budget, int) else None
    found = Run(
        config,
        method,
        dtype=weights,
        autocast=half,  # also over weights of the same dtype: PEFT's adapters are float32
        adapter=_adapter(method, adapter),
        bits=bits,
        nested=nested,
        rows=rows or args.per_device_train_batch_size * (2 if method in COMPARED else 1),
        accumulation=accumulation or args.gradient_accumulation_steps,
        processes=processes,
        sharding=sharding,
        prompt=prompt,
        completion=completion,
        trained=trained,
        budget=budget or BUDGET.get(device, BUDGET["default"]),
        generations=getattr(args, "num_generations", None) or 1,
        shares=bool(getattr(args, "share_prompt", True)),
        checkpointing=bool(args.gradient_checkpointing),
        offloading=bool(getattr(args, "activation_offloading", False)),
        optim=str(getattr(args.optim, "value", args.optim)),
        teacher=teacher,
        frozen=frozen,
        critic=critic,
        has_reference=_has_reference(method, args),
        head=METHODS[method].head,
        steps=args.max_steps if args.max_steps > 0 else None,
        device=device,
    )
    if budget is None or found.samples or found.tokens_of_micro_batch <= budget:
        return found
    rows = max(1, budget // found.tokens_of_row)
    return found.having(rows=rows, accumulation=-(-found.rows * found.accumulation // rows))


def _adapter(method: str, adapter: Any) -> Any:
    """The adapter as the method's trainer has it: a scoring head trains beside it."""
    task = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}.get(METHODS[method].head)
    if adapter is None or task is None:
        return adapter
    adapter = copy.deepcopy(adapter)
    adapter.task_type = task
    if adapter.target_modules == "all-linear" and adapter.exclude_modules is None:
        adapter.exclude_modules = ["score", "classifier"]
    return adapter


def lengths(
    method: str, config: PreTrainedConfig, args: Any, prompt: int | None, completion: int | None
) -> tuple[int, int]:
    """Tokens of a prompt and of a completion: as given, else the longest that the arguments allow."""
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    whole = getattr(args, "max_length", None) or window or 2048
    whole = min(whole, window or whole)
    asked = next((getattr(args, name, None) for name in ("max_completion_length", "max_new_tokens", "response_length")
                  if getattr(args, name, None)), None)  # fmt: skip
    if completion is None:
        completion = asked or whole // 2
    if prompt is None:
        prompt = getattr(args, "max_prompt_length", None) or max(1, whole - completion)
    return int(prompt), int(completion)


def _has_reference(method: str, args: Any) -> bool:
    if method in ("grpo", "rloo"):
        return bool(getattr(args, "beta", None))
    if method == "ppo":
        return getattr(args, "kl_coef", None) != 0.0
    if getattr(args, "reference_free", False) or getattr(args, "precompute_ref_log_probs", False):
        return False
    return method in REFERENCED
