"""Callbacks for `transformers.Trainer`."""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback


class SyncRefModelCallback(TrainerCallback):
    """Moves `ref_model` towards the trained model every `ref_model_sync_steps` steps, with the weight
    `ref_model_mixup_alpha`; both are read from the trainer's arguments (TR-DPO, Gorbatovski et al. 2024,
    arXiv:2404.09656, equation 6).

    For your own training loops: the trainers here do it themselves with `sync_ref_model=True`. `accelerator` unwraps
    the trained model.
    """

    def __init__(self, ref_model: nn.Module, accelerator: Any = None) -> None:
        self.ref_model, self.accelerator = ref_model, accelerator

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            model = kwargs["model"]
            model = self.accelerator.unwrap_model(model) if self.accelerator is not None else model
            self.sync_target_model(model, self.ref_model, args.ref_model_mixup_alpha)

    @staticmethod
    def sync_target_model(model: nn.Module, target_model: nn.Module, alpha: float) -> None:
        """`target = (1 - alpha) target + alpha model`, parameter by parameter."""
        with torch.no_grad():
            for target, source in zip(target_model.parameters(), model.parameters(), strict=True):
                target.lerp_(source.to(target.device, target.dtype), alpha)
