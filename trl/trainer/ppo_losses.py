"""The losses of PPO on a micro-batch, and what the log says of them."""

from typing import Any, NamedTuple

from torch import Tensor

from trl.engine.forest import Batch
from trl.engine.head import TokenStats
from trl.losses import value
from trl.losses.policy import clip, ratio
from trl.losses.tokens import Metric, mean_metric


class ClippedLosses(NamedTuple):
    """Numbers of each trained token, [N]."""

    policy_N: Tensor
    value_N: Tensor
    ratio_N: Tensor
    log_ratio_N: Tensor
    further: dict[str, Tensor]  # what is logged in addition

    def metrics(self) -> dict[str, Metric]:
        """The metrics of the log, means over tokens."""
        log_ratio_N, ratio_N = self.log_ratio_N, self.ratio_N
        found = {
            "loss/policy_avg": self.policy_N,
            "loss/value_avg": self.value_N,
            "policy/approxkl_avg": 0.5 * log_ratio_N.square(),
            "policy/policykl_avg": -log_ratio_N,
            "val/ratio": ratio_N,
            "val/ratio_squared": ratio_N.square(),
            **self.further,
        }
        return {name: mean_metric(values) for name, values in found.items()}


def clipped_losses(stats: TokenStats, batch: Batch, args: Any) -> ClippedLosses:
    """The clipped losses of policy and value function (`losses.policy.clip`, `losses.value.clipped_error`). `stats` has
    entropies and values; the batch has the columns of `trainer.returns`."""
    assert stats.entropy_N is not None and stats.value_N is not None
    log_ratio_N, advantage_N = stats.logp_N - batch["old_logp_N"], batch["advantage_N"]
    ratio_N = ratio(log_ratio_N)
    policy_N = clip(ratio_N=ratio_N, advantage_N=advantage_N, epsilon=args.cliprange, epsilon_high=args.cliprange)
    valued = {
        "value_N": stats.value_N,
        "old_value_N": batch["old_value_N"],
        "return_N": batch["return_N"],
        "cliprange_value": args.cliprange_value,
    }
    further = {
        "policy/clipfrac_avg": (policy_N > -ratio_N * advantage_N).float(),
        "policy/entropy_avg": stats.entropy_N,
        "val/clipfrac_avg": value.is_clipped(**valued),
        "val/error": (stats.value_N - batch["return_N"]).square(),
        "val/value": stats.value_N,
    }
    return ClippedLosses(policy_N, value.clipped_error(**valued), ratio_N, log_ratio_N, further)
