"""Proximal policy optimisation: rewards of completions, spread over their tokens by a value function."""

from typing import Any

from torch import nn

from .ppo_config import PPOConfig as PPOConfig
from .ppo_rounds import PPORounds
from .ppo_steps import PPOStepTrainer


class PPOTrainer(PPORounds):
    """Trains a causal language model on completions of its own, by PPO with a value function.

    `reward_model` and `reward_funcs` judge: models, functions, names. Without a `value_model`, a model that scores, the
    value function is a head on the policy's hidden states. With `config=` (or a model in the second place) the trainer
    is one for a loop of one's own, `PPOStepTrainer`. Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019,
    arXiv:1909.08593.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        by_place = len(args) > 1 and isinstance(args[1], nn.Module)
        if cls is PPOTrainer and (by_place or "config" in kwargs or ("dataset" in kwargs and "args" not in kwargs)):
            return PPOStepTrainer(*args, **kwargs)
        return super().__new__(cls)
