"""Nash learning by mirror descent: the policy against a geometric mixture of itself and the reference."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trl.engine.forest import Batch
from trl.engine.score import score
from trl.losses.online_preference import nash_md
from trl.losses.tokens import Metric, masked_mean_metric, seq_count, seq_sum
from trl.rewards.verdicts import Verdicts
from trl.rollout.generate import InProcessSampler
from trl.rollout.traces import ScoredTrace, TrainingTrace
from trl.rollout.two_models import InTurn, MixtureSampler

from .online_pairs import OnlinePairsConfig, OnlinePairsTrainer
from .step import Step


@dataclass
class NashMDConfig(OnlinePairsConfig):
    """Options of `NashMDTrainer`, in addition to `transformers.TrainingArguments`."""

    mixture_coef: list[float] | float = field(
        default=0.5,
        metadata={"help": "Share of the reference in the mixture; a list has one for each epoch."},
    )

    scheduled = ("beta", "mixture_coef")

    def _is_possible(self, name: str, value: Any) -> bool:
        if name == "mixture_coef":
            return isinstance(value, int | float) and 0 <= value <= 1
        return super()._is_possible(name, value)

    def _wanted(self, name: str) -> str:
        return "shares from 0 to 1" if name == "mixture_coef" else super()._wanted(name)


class NashMDTrainer(OnlinePairsTrainer):
    """Trains a causal language model to be preferred to a mixture of itself and the reference.

    The policy learns from its own completions, by how likely they are preferred to the mixture's: under a judge with
    `return_scores` as it says, under rewards by the model of Bradley and Terry. `sampler` writes the policy's
    completions. See `OnlinePairsTrainer` for the arguments. Munos et al. 2023, arXiv:2312.00886.
    """

    config_class = NashMDConfig
    method = "nash-md"
    together = 1  # the mixture's completion is read by the judge alone
    asks_probabilities = True

    @property
    def mixture_coef(self) -> float:
        """The share of the reference in the mixture in this epoch."""
        return self.of_epoch("mixture_coef")

    def on_ready(self) -> None:
        super().on_ready()
        own = InProcessSampler(self.processing_class, max_cache_tokens=self.args.max_cache_tokens)
        assert self.reference.policy is not None
        mixture = MixtureSampler(own, self.reference.policy, lambda: self.mixture_coef)
        self.sampler = InTurn(self.sampler, mixture)

    def trains(self, place: int) -> bool:
        return place == 0

    def has_no_gradient(self, trace: TrainingTrace) -> bool:
        return not trace.trained

    def probabilities(self, score_S: Tensor) -> Tensor:
        """The chance that the policy's completion is preferred, [S] -> [P]; 1/2 where nothing is known."""
        first_P, second_P = score_S.view(-1, 2).unbind(1)
        return (first_P if isinstance(self.rewards, Verdicts) else torch.sigmoid(first_P - second_P)).nan_to_num(0.5)

    def credit(self, traces: Sequence[ScoredTrace], generations: int) -> Tensor:
        """How far the chance to be preferred is from 1/2, for the policy's completions; 0 for the mixture's."""
        ahead_P = self.probabilities(self.scores_of(traces)) - 0.5
        return torch.stack([ahead_P, torch.zeros_like(ahead_P)], 1).flatten()

    def counts_of(self, traces: Sequence[TrainingTrace]) -> dict[str, float]:
        return {"completions": sum(each.trained > 0 for each in traces)}

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        stats = score(model, batch, router=self.router_aux_loss_coef > 0)
        seq_N, sequences = stats.seq_N, stats.sequences
        ref_logp_N = batch["ref_logp_N"]
        preference_S = ref_logp_N.new_zeros(sequences).index_copy(0, seq_N, batch["advantage_N"])
        trained_S = seq_count(seq_N, sequences) > 0
        loss_S = nash_md(
            logp_N=stats.logp_N,
            ref_logp_N=ref_logp_N,
            seq_N=seq_N,
            sequences=sequences,
            preference_S=preference_S,
            beta=self.beta,
        )
        logp_S = seq_sum(stats.logp_N, seq_N, sequences).detach()
        ref_logp_S = seq_sum(ref_logp_N, seq_N, sequences)
        values = {
            "loss/kl": logp_S - ref_logp_S,
            "loss/score": preference_S * logp_S,
            "objective/entropy": -logp_S,
            "logps/chosen": logp_S,
            "logps/rejected": ref_logp_S,
            "rewards/margins": logp_S - ref_logp_S,
            "rewards/accuracies": (logp_S > ref_logp_S).float(),
        }
        metrics = {name: masked_mean_metric(value, trained_S) for name, value in values.items()}
        metrics |= {name: Metric(logp_S.new_full((), getattr(self, name)), 1.0) for name in ("beta", "mixture_coef")}
        return {"completions": self.with_balance(loss_S.sum(), trained_S, stats, metrics)}, metrics

    def metrics_of_round(self, score_S: Tensor, ended_S: Tensor) -> dict[str, Tensor]:
        found = super().metrics_of_round(score_S, ended_S)
        names = ("val/model_contain_eos_token", "val/ref_contain_eos_token")
        first_P, second_P = score_S.view(-1, 2).unbind(1)
        return {
            **{name: found[name] for name in names},
            "rewards/chosen": first_P,
            "rewards/rejected": second_P,
            "rewards/probabilities": self.probabilities(score_S),
        }
