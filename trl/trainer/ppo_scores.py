"""Rewards of completions as the scores that PPO learns from."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .kl_control import RunningMoments


class ScoreScaling:
    """Takes penalties off rewards, scales by their running deviation, and clips, as the settings ask."""

    def __init__(self, args: Any) -> None:
        self.args, self.running = args, RunningMoments()

    def scores(self, reward_S: Tensor, finished: Sequence[bool], *, learns: bool) -> Tensor:
        """The scores [S] of completions. `finished`: whether each ended by itself; `learns`: whether the round is one
        of training, which the running moments take in."""
        args, score_S = self.args, reward_S
        if args.missing_eos_penalty is not None:
            score_S = score_S - args.missing_eos_penalty * torch.tensor([float(not each) for each in finished])
        if args.use_score_scaling:
            if learns:
                self.running.update(score_S)
            mean = self.running.mean if args.use_score_norm else 0.0
            score_S = (score_S - mean) / (self.running.std + torch.finfo(score_S.dtype).eps)
        return score_S if args.score_clip is None else score_S.clamp(-args.score_clip, args.score_clip)

    def state(self) -> dict[str, Any]:
        return self.running.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.running.load_state(state)
