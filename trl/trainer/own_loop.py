"""Optimizer steps of a trainer whose loop is the user's own: no data loader, no epochs, no end that is known."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import set_seed

from trl.models import saving
from trl.models.offload import enable_checkpointing

from . import construct, report


class OwnLoop:
    """Prepares the trainer's model and optimizer as `Trainer.train` does, and takes one step at a time.

    The model is wrapped at the first step, so that what was set on the trainer until then counts.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.model: nn.Module | None = None

    def begin(self) -> nn.Module:
        """The model as it trains. The report is printed before the first step."""
        if self.model is not None:
            return self.model
        trainer = self.trainer
        saving.try_saving(trainer.model, trainer.processing_class, trainer.args)
        set_seed(trainer.args.seed)
        report.show(trainer)
        construct.forget_evaluation(trainer)
        if trainer.args.gradient_checkpointing:
            enable_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs)
        steps = trainer.args.max_steps if trainer.args.max_steps > 0 else 1
        self.model, _ = trainer._prepare_for_training(steps, None, None)
        trainer._check_what_users_made(None)
        self.model.zero_grad()
        return self.model

    def step(self, backward: Callable[[nn.Module], Tensor]) -> float:
        """One optimizer step. `backward` runs the backward passes on the model that it is given and returns the loss,
        which is returned here as a number. Raises `NonFiniteError`, the weights untouched, if it or the gradient is not
        finite."""
        trainer, args = self.trainer, self.trainer.args
        model = self.begin()
        model.train()
        loss = backward(model)
        trainer._tr_loss = loss
        norm = trainer._clip_grad_norm(model) if args.max_grad_norm else None
        norm = trainer._get_grad_norm(model, grad_norm=norm)
        trainer.optimizer.step()
        if not trainer.accelerator.optimizer_step_was_skipped:
            trainer.lr_scheduler.step()
        model.zero_grad()
        trainer.state.global_step += 1
        found = loss.item()
        trainer.grad_norm = float(norm) if norm is not None else math.nan
        return found

    @property
    def learning_rate(self) -> float:
        assert self.trainer.optimizer is not None
        return self.trainer.optimizer.param_groups[0]["lr"]
