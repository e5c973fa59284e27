"""A `Run` from the options of a training command or the arguments of a trainer."""

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from trl.methods import METHODS
from trl.models.load import adapter_base, torch_dtype

from .run import Run

REFERENCED = ("dpo", "kto", "bco", "online-dpo", "xpo", "nash-md", "ppo")


def config_of(name: str, **kwargs: Any) -> PreTrainedConfig:
    """The configuration of a model by folder or name; of an adapter's base, where it is an adapter's folder."""
    return AutoConfig.from_pretrained(adapter_base(name) or name, **kwargs)


def run_of(
    method: str,
    config: PreTrainedConfig,
    args: Any,
    *,
    adapter: Any = None,
    dtype: Any = None,
    bits: int = 0,
    nested: bool = False,
    frozen: tuple[PreTrainedConfig, ...] = (),
    prompt: int | None = None,
    completion: int | None = None,
    processes: int = 1,
    sharding: str = "ddp",
) -> Run:
    """A run by the trainer arguments `args` of a method. Lengths that are not given are the longest that they allow."""
    wanted = torch_dtype(dtype) if dtype not in (None, "auto") else getattr(config, "dtype", None)
    weights = wanted if isinstance(wanted, torch.dtype) else torch.float32
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    prompt, completion = lengths(method, config, args, prompt, completion)
    beta = getattr(args, "beta", None)
    return Run(
        config,
        method,
        dtype=weights,
        autocast=half if half != weights else None,
        adapter=adapter,
        bits=bits,
        nested=nested,
        rows=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        processes=processes,
        sharding=sharding,
        prompt=prompt,
        completion=completion,
        budget=getattr(args, "max_tokens_per_micro_batch", None) or 16384,
        generations=getattr(args, "num_generations", None) or 1,
        checkpointing=bool(args.gradient_checkpointing),
        offloading=bool(getattr(args, "activation_offloading", False)),
        optim=str(getattr(args.optim, "value", args.optim)),
        frozen=frozen,
        has_reference=_has_reference(method, args, beta),
        head=METHODS[method].head,
        steps=args.max_steps if args.max_steps > 0 else None,
    )


def lengths(
    method: str, config: PreTrainedConfig, args: Any, prompt: int | None, completion: int | None
) -> tuple[int, int]:
    """Tokens of a prompt and of a completion: as given, else the longest that the arguments allow."""
    window = getattr(config.get_text_config(), "max_position_embeddings", None) or 2048
    whole = getattr(args, "max_length", None) or window
    asked = next((getattr(args, name, None) for name in ("max_completion_length", "max_new_tokens", "response_length")
                  if getattr(args, name, None)), None)  # fmt: skip
    if completion is None:
        completion = asked or whole // 2
    if prompt is None:
        prompt = getattr(args, "max_prompt_length", None) or max(1, whole - completion)
    return int(prompt), int(completion)


def _has_reference(method: str, args: Any, beta: float | None) -> bool:
    if method in ("grpo", "rloo"):
        return bool(beta)
    if getattr(args, "reference_free", False) or getattr(args, "precompute_ref_log_probs", False):
        return False
    return method in REFERENCED
