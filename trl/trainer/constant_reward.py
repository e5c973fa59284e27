"""The end of a run whose rewards do not move: the option `stop_after_constant_rounds`."""

from collections.abc import Sequence
from typing import Any

from trl.losses.advantages import total_reward
from trl.notices import notify_once
from trl.rollout.traces import ScoredTrace

from .method import Component


class ConstantReward(Component):
    """Counts the rounds in a row in which every completion got the same total reward, and ends training after
    `stop_after_constant_rounds` of them. All ranks know all rewards, and decide alike."""

    def __init__(self) -> None:
        self.value: float | None = None  # the reward of the rounds that are counted
        self.rounds = 0

    def look(self, trainer: Any, traces: Sequence[ScoredTrace]) -> None:
        """Counts a round by the traces that were sampled for it. One without any reward is not counted."""
        limit = trainer.args.stop_after_constant_rounds
        if limit is None or not trainer.rewards.names or not traces:
            return
        totals = total_reward(trainer.rewards_of(traces), trainer.rewards.weights)
        totals = totals[~totals.isnan()]
        if not len(totals):
            return
        low, high = totals.min().item(), totals.max().item()
        self.rounds = 0 if low != high else self.rounds + 1 if low == self.value else 1
        self.value = low if low == high else None
        if self.rounds < limit:
            return
        trainer.control.should_training_stop = True
        if trainer.is_world_process_zero():
            names = ", ".join(trainer.rewards.names)
            notify_once(
                f"training ends after step {trainer.state.global_step + 1}: every completion of the last "
                f"{self.rounds} rounds got the reward {low:g}, from which nothing is learnt "
                f"(stop_after_constant_rounds={limit}). Check {names} on the completions that log_completions shows, "
                "give easier or harder prompts, or raise the temperature"
            )

    def state(self, trainer: Any) -> dict[str, Any]:
        return {"constant_reward": (self.value, self.rounds)}

    def load_state(self, trainer: Any, state: dict[str, Any]) -> None:
        self.value, self.rounds = state.get("constant_reward", (None, 0))
