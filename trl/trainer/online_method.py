"""What a method supplies that learns from the model's own completions, beyond `method.py`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trl.models.unwrap import unwrap
from trl.rollout.rounds import RoundSizes, round_sizes
from trl.rollout.traces import Columns, ScoredTrace, TrainingTrace

from .method import Method


class OnlineMethod(Method):
    """The hooks of such a method, of which `OnlineTrainer` is made. `self` is the trainer."""

    round_sizes: RoundSizes
    args: Any
    model: Any
    accelerator: Any
    reference: Any

    takes_grids = False
    takes_lengths = False
    prepared_columns = frozenset({"prompt", "prompt_ids", "row"})
    least_generations = 1  # completions of each prompt that `credit` needs at least
    whole_groups = False  # whether a group is sampled and judged on one rank, and no step cuts it
    together = 1  # traces in turn that the loss reads in one forward pass
    needs_rewards = True  # whether the method learns nothing without reward functions

    def credit(self, traces: Sequence[ScoredTrace], generations: int) -> Tensor:
        """The advantage of each trace, [S], fp32. Traces come in groups of `generations` of one prompt.

        Where the tokens of a trace differ, the column `advantages` of its holder has them, and the number given here is
        any that is not zero.
        """
        raise NotImplementedError

    def has_no_gradient(self, trace: TrainingTrace) -> bool:
        """Whether every coefficient of the trace is zero, so that it need not be forwarded."""
        return not trace.trained

    def parts_of(self) -> tuple[Any, ...]:
        """The parts of the trainer that have a state of their own."""
        return (self.reference,)

    def trains(self, place: int) -> bool:
        """Whether the trace at this place of its group is trained on."""
        return True

    @staticmethod
    def sizes_of_rounds(args: Any, accumulation: int) -> RoundSizes:
        return round_sizes(args, accumulation)

    def kl_in_reward(self) -> bool:
        return False

    def divergence_of(self, columns: Columns) -> float:
        """The divergence of a trace from the reference, where it is a part of the reward."""
        return kl_of_trace(columns)

    @property
    def scoring_temperature(self) -> float:
        """What logits are divided by for the log-probs that the loss reads."""
        return self.args.temperature

    def needs_reference(self) -> bool:
        return self.args.beta != 0.0

    def is_on_policy(self) -> bool:
        """Whether every step trains the policy that sampled its traces: one step a round, and nothing replayed."""
        return self.round_sizes.parts * self.args.num_iterations == 1 and not self.args.replay_buffer_size

    def is_below_fp32(self) -> bool:
        """Whether products are rounded to less than fp32, so that a sampler's log-probs differ from the engine's."""
        half = (torch.float16, torch.bfloat16)
        return (
            self.accelerator.mixed_precision != "no"
            or getattr(unwrap(self.model), "is_quantized", False)
            or any(parameter.dtype in half for parameter in self.model.parameters())
        )

    def needs_old(self) -> bool:
        """Whether the trainer computes log-probs of its own for what the sampler wrote: where a ratio is taken to them
        and the sampler's would make another one of it before anything has moved."""
        return not self.is_on_policy() and self.is_below_fp32()


def kl_of_trace(columns: Columns) -> float:
    """The divergence of a trace from the reference, as the policy's own tokens estimate it."""
    logps, own = columns.get("old_logps", columns["logps"]), columns.get("mask", slice(None))
    return float(logps[own].sum(dtype=np.float64) - columns["ref_logps"][own].sum(dtype=np.float64))
