"""The weight of the KL in the reward, fixed or steered; and running moments of scores."""

from typing import Any

import torch
from torch import Tensor

from trl.losses.value import moments


class FixedKLController:
    """A weight that stays as it is."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current: float, n_steps: int) -> None:
        """Nothing: the weight is fixed."""


class AdaptiveKLController:
    """A weight that rises while the divergence is above its target and falls while it is below, by at most a fifth of
    the completions over the horizon. Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        self.value, self.target, self.horizon = init_kl_coef, target, horizon

    def update(self, current: float, n_steps: int) -> None:
        """`current` is the mean divergence of `n_steps` completions, in nats."""
        error = min(max(current / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon


def kl_controller(args: Any) -> FixedKLController | AdaptiveKLController:
    """The controller that the options of PPO ask for."""
    if args.adap_kl_ctrl:
        return AdaptiveKLController(args.kl_coef, args.target, args.horizon)
    return FixedKLController(args.kl_coef)


class RunningMoments:
    """Mean and standard deviation of all scores so far."""

    def __init__(self) -> None:
        self.seen = torch.zeros(3, dtype=torch.float64)

    def update(self, values: Tensor) -> None:
        """Take in the scores of a round, [S], the same on every rank."""
        self.seen = self.seen + moments(values).cpu()

    @property
    def mean(self) -> float:
        count, total, _ = self.seen.tolist()
        return total / max(count, 1.0)

    @property
    def std(self) -> float:
        count, _, squares = self.seen.tolist()
        return max((squares - count * self.mean**2) / max(count - 1, 1.0), 0.0) ** 0.5 if count > 1 else 1.0

    def state(self) -> dict[str, Any]:
        return {"score_moments": self.seen}

    def load_state(self, state: dict[str, Any]) -> None:
        self.seen = state.get("score_moments", self.seen)
