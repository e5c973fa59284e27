"""What keeps a policy near the one that sampled: steps that change nothing, and rounds that end early."""

from typing import Any

import torch
from torch import Tensor


class Guards:
    """Watches the ratios of each optimizer step, over all micro-batches and ranks.

    A step whose mean ratio is above `ratio_threshold` is to change no weights. With `early_stopping` the further steps
    of a round are left out once the mean log-ratio of a step is 1.5 `target_kl` below zero.
    """

    def __init__(self, args: Any) -> None:
        if args.early_stopping and args.fp16:
            raise ValueError("early_stopping leaves out steps, which the loss scaler of fp16 cannot: train in bf16")
        self.args = args
        self.seen: Tensor | float = 0.0  # of the step so far: sums of ratios and of log-ratios, and tokens, [3]
        self.is_over = False  # whether the rest of the round is left out

    def begin_round(self) -> None:
        self.is_over = False

    def observe(self, ratio_N: Tensor, log_ratio_N: Tensor) -> None:
        """Take in a micro-batch of training."""
        count = ratio_N.new_full((), float(len(ratio_N)))
        self.seen = self.seen + torch.stack([ratio_N.detach().sum(), log_ratio_N.detach().sum(), count])

    def end_step(self, device: torch.device, ranks: int) -> bool:
        """Whether the step may change the weights."""
        seen, self.seen = torch.zeros(3, device=device) + self.seen, 0.0
        if ranks > 1:
            torch.distributed.all_reduce(seen)
        ratio, log_ratio, count = seen.tolist()
        if not count:
            return True
        args = self.args
        self.is_over = args.early_stopping and -log_ratio / count > 1.5 * args.target_kl
        return ratio / count <= args.ratio_threshold and not self.is_over

    def state(self) -> dict[str, Any]:
        return {"round_is_over": self.is_over}

    def load_state(self, state: dict[str, Any]) -> None:
        self.is_over = state.get("round_is_over", False)
