"""Exploratory preference optimisation: one completion of the policy, one of the reference, and a bonus for optimism."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from trl.engine.forest import Batch
from trl.losses.online_preference import xpo_bonus
from trl.losses.tokens import Metric, masked_mean_metric
from trl.rollout.generate import InProcessSampler
from trl.rollout.two_models import InTurn, ReferenceSampler

from .online_pairs import OnlinePairsConfig, OnlinePairsTrainer
from .step import Step


@dataclass
class XPOConfig(OnlinePairsConfig):
    """Options of `XPOTrainer`, in addition to `transformers.TrainingArguments`."""

    alpha: list[float] | float = field(
        default=1e-5,
        metadata={"help": "Weight of the exploration bonus; a list has one for each epoch."},
    )

    scheduled = ("beta", "alpha")

    def _is_possible(self, name: str, value: Any) -> bool:
        return super()._is_possible(name, value) or (name == "alpha" and value == 0)


class XPOTrainer(OnlinePairsTrainer):
    """Trains a causal language model on pairs of a completion of its own and one of the reference.

    Rows have a `prompt` (a string or messages) and whatever columns reward functions read. `sampler` writes the first
    completions. See `OnlinePairsTrainer` for the arguments. Xie et al. 2024, arXiv:2405.21046.
    """

    config_class = XPOConfig
    method = "xpo"

    @property
    def alpha(self) -> float:
        """The weight of the exploration bonus in this epoch."""
        return self.of_epoch("alpha")

    def on_ready(self) -> None:
        super().on_ready()
        own = InProcessSampler(self.processing_class, max_cache_tokens=self.args.max_cache_tokens)
        assert self.reference.policy is not None
        self.sampler = InTurn(self.sampler, ReferenceSampler(own, self.reference.policy))

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        pairs = self.compared(model, batch)
        loss_P, metrics = self.preference_loss(pairs)
        other_logp_P = pairs.logp_S.view(-1, 2)[:, 1]
        bonus_P = xpo_bonus(other_logp_P=other_logp_P, alpha=self.alpha) * pairs.is_trained_P
        metrics["loss/dpo"] = masked_mean_metric(loss_P, pairs.is_trained_P)
        metrics["loss/xpo"] = masked_mean_metric(bonus_P, pairs.is_trained_P)
        metrics["alpha"] = Metric(bonus_P.new_full((), self.alpha), 1.0)
        total = (loss_P + bonus_P).sum()
        return {"pairs": self.with_balance(total, pairs.is_trained_P, pairs.stats, metrics)}, metrics
