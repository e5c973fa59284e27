"""Norms, rotary embeddings and activations of a model by liger-kernel. Its losses are never used: the engine has a
chunked head of its own, which liger's `forward` would replace.
"""

import importlib
import inspect
import os
from typing import Any

from trl.notices import notify_once

from .unwrap import unwrap

LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def check(args: Any) -> None:
    """Refuse `use_liger_kernel` where it cannot run, before anything is loaded, and take liger's losses out of
    `liger_kernel_config`: `transformers.Trainer` patches the model again when training begins, by the same settings.

    Raises ValueError on a device without Triton, ImportError without the package.
    """
    if not args.use_liger_kernel:
        return
    if args.device.type in ("cpu", "mps") and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"use_liger_kernel: liger-kernel's Triton kernels need a GPU, and this run is on {args.device.type}. Leave "
            "it out (TRITON_INTERPRET=1 runs them in Triton's interpreter, very slowly, for a test)"
        )
    _families()
    asked = args.liger_kernel_config or {}
    if left_out := sorted(name for name in LOSSES if asked.get(name)):
        notify_once(
            f"liger_kernel_config: {' and '.join(left_out)} left out, because the library's own head computes the loss "
            "in chunks and never holds all logits"
        )
    args.liger_kernel_config = {**asked, **LOSSES}


def patch(model: Any, args: Any) -> None:
    """Have liger-kernel run the parts of this model that it has kernels for, where `args` ask for it. Idempotent.

    Norms and feed-forward parts are patched in this instance, under its adapter; copies of it are patched too. Rotary
    embeddings are a function of the model's family, which liger replaces for all models of the family in this process.
    Raises ValueError for a part that liger does not know in this family.
    """
    if not args.use_liger_kernel:
        return
    base = unwrap(model)
    family = base.config.model_type
    apply = _families().get(family)
    if apply is None:
        notify_once(f"use_liger_kernel: liger-kernel has no kernels for models of type {family}; it runs unchanged")
        return
    parts = {name: each.default for name, each in inspect.signature(apply).parameters.items() if name != "model"}
    asked = args.liger_kernel_config
    if unknown := sorted(asked.keys() - parts.keys() - LOSSES.keys()):
        raise ValueError(
            f"liger_kernel_config: {', '.join(unknown)} unknown for models of type {family}; known are "
            f"{', '.join(name for name in parts if name not in LOSSES)}"
        )
    parts |= {name: value for name, value in asked.items() if name in parts}
    try:
        apply(model=base, **parts)
    except TypeError as error:
        raise ValueError(
            f"use_liger_kernel: liger-kernel cannot patch {type(base).__name__} ({error}): leave it out"
        ) from error
    base._trl_liger = [name for name, value in parts.items() if value]


def patched(model: Any) -> list[str]:
    """The parts of a model that liger-kernel runs, by its names."""
    return getattr(unwrap(model), "_trl_liger", [])


def _families() -> dict[str, Any]:
    """The function that patches a model, by the type of the model."""
    try:
        importlib.import_module("liger_kernel")
        return importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        remedy = "which needs the extra `liger`: pip install 'trl[liger]'"
        if error.name != "liger_kernel":
            remedy = f"which cannot be imported here ({error}): pip install --upgrade 'trl[liger]'"
        raise ImportError(f"use_liger_kernel patches the model by liger-kernel, {remedy}") from error
