"""Callbacks on weights: a reference that follows the policy, an average over the run."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from trl.models.shards import is_partitioned, is_sharded
from trl.notices import notify_once


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


class BEMACallback(TrainerCallback):
    """Keeps a moving average of the trained weights, freed of its lag, and saves it in the folder `bema` at the end.

    With t steps taken, the average moves by `(lag + multiplier t) ** -ema_power` (at least `min_ema_multiplier`) of the
    way to the weights every `update_freq` steps, and the weights' distance from their start is added to it, times
    `(lag + multiplier t) ** -bias_power`. Before the step `update_after` nothing is averaged; there the start is taken.
    The copy is on `device`. Block and Zhang 2025, arXiv:2508.00180, algorithm 1.

    A run that is resumed begins its average anew, and says so. ValueError for sharded weights.
    """

    def __init__(
        self,
        update_freq: int = 400,
        ema_power: float = 0.5,
        bias_power: float = 0.2,
        lag: int = 10,
        update_after: int = 0,
        multiplier: float = 1.0,
        min_ema_multiplier: float = 0.0,
        device: str = "cpu",
    ) -> None:
        if update_freq < 1:
            raise ValueError(f"update_freq={update_freq}: give a number of steps, 1 or more")
        self.update_freq, self.ema_power, self.bias_power, self.lag = update_freq, ema_power, bias_power, lag
        self.update_after, self.multiplier, self.min_ema_multiplier = update_after, multiplier, min_ema_multiplier
        self.device = device
        self.running_model: Any = None
        self._start: dict[str, Tensor] = {}
        self._average: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model = whole(model)
        if is_sharded(model) or is_partitioned(model):
            raise ValueError("BEMACallback keeps whole weights, and these are sharded: leave it out")
        if state.global_step:
            notify_once(f"the average of BEMACallback begins anew at step {state.global_step}")
        self.running_model = copy.deepcopy(model).to(self.device)
        self._take_start(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        since = state.global_step - self.update_after
        if since == 0:
            self._take_start(whole(model))
        elif since > 0 and since % self.update_freq == 0:
            self._update(whole(model), state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.running_model.save_pretrained(Path(args.output_dir) / "bema")

    def _trained(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that train, in float32 on the device of the average."""
        return {
            name: weight.detach().to(self.device, torch.float32)
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }

    def _take_start(self, model: nn.Module) -> None:
        self._start = {name: weight.clone() for name, weight in self._trained(model).items()}
        self._average = {name: weight.clone() for name, weight in self._start.items()}

    @torch.no_grad()
    def _update(self, model: nn.Module, step: int) -> None:
        age = self.lag + self.multiplier * step
        share, ahead = max(age**-self.ema_power, self.min_ema_multiplier), age**-self.bias_power
        running = dict(self.running_model.named_parameters())
        for name, weight in self._trained(model).items():
            self._average[name].lerp_(weight, share)
            running[name].copy_(self._average[name] + ahead * (weight - self._start[name]))


def whole(model: Any) -> Any:
    """The model without wrappers for several processes; an adapter stays on."""
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) and not hasattr(model, "config") else model
