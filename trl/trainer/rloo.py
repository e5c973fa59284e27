"""REINFORCE leave-one-out: each completion against the mean of the others of its prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trl.engine.forest import Batch
from trl.engine.score import score
from trl.losses.advantages import leave_one_out, total_reward
from trl.losses.policy import SEQUENCES, clip, ratio
from trl.losses.tokens import Metric, largest, mean_metric, seq_sum, smallest
from trl.rollout.traces import ScoredTrace, TrainingTrace

from .attributes import shows
from .online import OnlineTrainer
from .online_config import OnlineConfig
from .step import Step


@dataclass
class RLOOConfig(OnlineConfig):
    """Options of `RLOOTrainer`, in addition to `transformers.TrainingArguments`."""

    least_generations = 2

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    num_generations: int = field(default=2, metadata={"help": "Number of completions of each prompt: a group."})
    beta: float = field(
        default=0.05, metadata={"help": "Weight of the KL to the reference in the reward; 0: no reference model."}
    )
    epsilon: float = field(default=0.2, metadata={"help": "Lower clipping range: clip ratios below 1 - epsilon."})
    epsilon_high: float | None = field(
        default=None, metadata={"help": "Upper clipping range: clip ratios above 1 + epsilon_high. Default: epsilon."}
    )
    normalize_advantages: bool = field(
        default=False, metadata={"help": "Normalise advantages to mean 0 and standard deviation 1 over the round."}
    )
    reward_clip_range: tuple[float, float] | None = field(
        default=None, metadata={"help": "Range to clip rewards to, before the KL is subtracted."}
    )

    def __post_init__(self) -> None:
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon
        super().__post_init__()


@shows("epsilon_high", "normalize_advantages", "reward_clip_range", epsilon_low="epsilon")
class RLOOTrainer(OnlineTrainer):
    """Trains a causal language model on completions of its own, by REINFORCE with the group's others as a baseline.

    The divergence from the reference is a part of the reward. Ahmadian et al. 2024, arXiv:2402.14740.
    """

    config_class = RLOOConfig
    method = "rloo"

    def kl_in_reward(self) -> bool:
        return True

    def needs_old(self) -> bool:
        # The divergence in the reward is a difference to log-probs of the engine.
        return super().needs_old() or (self.is_below_fp32() and self.needs_reference())

    def credit(self, traces: Sequence[ScoredTrace], generations: int) -> Tensor:
        reward_S, kl_S = total_reward(self.rewards_of(traces), self.rewards.weights), self.kl_of(traces)
        if self.args.reward_clip_range is not None:
            reward_S = reward_S.clamp(*self.args.reward_clip_range)
        if kl_S is not None:
            reward_S = reward_S - self.args.beta * kl_S
        return leave_one_out(reward_S, num_generations=generations, normalize=self.args.normalize_advantages)

    def has_no_gradient(self, trace: TrainingTrace) -> bool:
        still = trace.advantage == 0.0 and self.router_aux_loss_coef == 0.0
        return super().has_no_gradient(trace) or still

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        args, balance = self.args, self.router_aux_loss_coef
        stats = score(model, batch, entropy=True, temperature=args.temperature, router=balance > 0)
        assert stats.entropy_N is not None
        old_N = stats.logp_N.detach() if step.on_policy else batch["old_logp_N"]
        ratio_S = ratio(seq_sum(stats.logp_N - old_N, stats.seq_N, stats.sequences))
        # An advantage is the same for all tokens of a sequence; one without trained tokens has none.
        advantage_S = torch.zeros_like(ratio_S).index_copy(0, stats.seq_N, batch["advantage_N"])
        loss_S = clip(ratio_N=ratio_S, advantage_N=advantage_S, epsilon=args.epsilon, epsilon_high=args.epsilon_high)
        total = loss_S.sum()
        low_S = ((ratio_S < 1 - args.epsilon) & (advantage_S < 0)).float()
        high_S = ((ratio_S > 1 + args.epsilon_high) & (advantage_S > 0)).float()
        metrics = {
            "entropy": mean_metric(stats.entropy_N),
            "clip_ratio/low_mean": mean_metric(low_S),
            "clip_ratio/high_mean": mean_metric(high_S),
            "clip_ratio/region_mean": mean_metric(torch.maximum(low_S, high_S)),
            "clip_ratio/low_min": smallest(low_S),
            "clip_ratio/high_max": largest(high_S),
        }
        if stats.aux is not None:
            total = total + balance * stats.aux * stats.sequences
            metrics["aux_loss"] = mean_metric(stats.aux)
        return {SEQUENCES: total}, metrics
