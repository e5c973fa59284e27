"""The value function of a policy, as a part of its trainer."""

from pathlib import Path
from typing import Any

import torch

from trl.engine.probe import attach
from trl.models import liger, load, shards
from trl.models.unwrap import unwrap
from trl.models.value_head import (
    CRITIC_FOLDER,
    HEAD_FILE,
    add_critic,
    add_head,
    critic,
    head_weights,
    load_head,
    save_head,
    saved_head,
    value_head,
)
from trl.notices import notify_once

from .base import BaseTrainer
from .method import Component
from .reference import placed


class ValueFunction(Component):
    """What a state is expected to bring: a head on the policy's hidden states, or a critic.

    `value_model` is the critic: a model that scores, with one label, or its name or path. Without one, the policy's
    own head is used, the one saved with the policy, or a new one that begins with values of 0.
    """

    def __init__(self, value_model: Any = None) -> None:
        self.value_model = value_model
        self.description = ""

    def on_ready(self, trainer: BaseTrainer) -> None:
        base = unwrap(trainer.model)
        if self.value_model is not None:
            self._add_critic(trainer)
        elif value_head(base) is None:
            head = add_head(trainer.model, summary_dropout_prob=0.0, v_head_init_strategy="zero")
            name = getattr(base.config, "_name_or_path", "")
            if name and (weights := saved_head(name)) is not None:
                load_head(head, weights, name)
                notify_once(f"the value head in {name} is taken up")
        self._module(trainer).requires_grad_(True)  # an adapter put on later freezes what is beneath
        if trainer.is_fsdp_enabled and trainer.accelerator.mixed_precision == "no":
            value_head(base).to(base.dtype)  # FSDP shards weights of one dtype together
        count = sum(shards.whole_shape(each).numel() for each in self._module(trainer).parameters())
        what = "a head on the policy's hidden states"
        if self.value_model is not None:
            what = f"a model of its own ({type(unwrap(critic(base))).__name__})"
        self.description = f"value function: {what}, {count:,} parameters"

    def _add_critic(self, trainer: BaseTrainer) -> None:
        own = self.value_model
        if isinstance(own, str | Path):
            init_kwargs: Any = trainer.args.model_init_kwargs or {}
            own = load.load_scorer(own, **init_kwargs)
        inside = getattr(own, "pretrained_model", None)
        if inside is not None:
            raise ValueError("value_model has a value head of its own: give a model that scores, or leave it out")
        liger.patch(own, trainer.args)
        own = placed(trainer, own)
        found = attach(own, trainer.compute_loss_context_manager)
        if trainer.attachment.is_flat and not found.is_flat:
            raise ValueError(f"value_model cannot read the policy's flat rows: {found.reason}. Leave it out")
        trainer.attachment.serve_too(found, "the value model")
        add_critic(trainer.model, own)

    def _module(self, trainer: BaseTrainer) -> Any:
        base = unwrap(trainer.model)
        return critic(base) if critic(base) is not None else value_head(base)

    def report(self, trainer: BaseTrainer) -> list[str]:
        return [self.description]

    # --- what a checkpoint and the result keep of it --------------------------------------------------------------

    def state(self, trainer: BaseTrainer) -> dict[str, Any]:
        weights = head_weights(self._module(trainer))  # by all ranks together
        return {"value_function": weights} if trainer.args.process_index == 0 else {}

    def load_state(self, trainer: BaseTrainer, state: dict[str, Any]) -> None:
        if "value_function" not in state:
            return
        own = dict(self._module(trainer).named_parameters())
        with torch.no_grad(), shards.whole(own.values(), written=True):
            for name, weight in own.items():
                weight.copy_(state["value_function"][name])

    def save(self, trainer: BaseTrainer, folder: Path) -> None:
        module = self._module(trainer)
        weights = head_weights(module)
        if not trainer.args.should_save:
            return
        if self.value_model is None:
            save_head(weights, folder)
            notify_once(f"the value head is kept in {HEAD_FILE}, beside the policy's weights")
        else:
            unwrap(module).save_pretrained(folder / CRITIC_FOLDER, state_dict=weights)
