"""Online direct preference optimisation: DPO on two completions of the policy, compared as they are sampled."""

from dataclasses import dataclass

from torch import Tensor, nn

from trl.engine.forest import Batch
from trl.losses.tokens import Metric, mean_metric

from .online_pairs import OnlinePairsConfig, OnlinePairsTrainer
from .step import Step


@dataclass
class OnlineDPOConfig(OnlinePairsConfig):
    """Options of `OnlineDPOTrainer`, in addition to `transformers.TrainingArguments`."""


class OnlineDPOTrainer(OnlinePairsTrainer):
    """Trains a causal language model on pairs of its own completions.

    Rows have a `prompt` (a string or messages) and whatever columns reward functions read. See `OnlinePairsTrainer` for
    the arguments. Guo et al. 2024, arXiv:2402.04792.
    """

    config_class = OnlineDPOConfig
    method = "online-dpo"

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        pairs = self.compared(model, batch)
        loss_P, metrics = self.preference_loss(pairs)
        kl_S = (pairs.logp_S - pairs.ref_logp_S).detach()
        metrics["objective/non_score_reward"] = mean_metric(-self.beta * kl_S)
        return {"pairs": self.with_balance(loss_P.sum(), pairs.is_trained_P, pairs.stats, metrics)}, metrics

    def metrics_of_round(self, score_S: Tensor, ended_S: Tensor) -> dict[str, Tensor]:
        first_P, second_P = score_S.view(-1, 2).unbind(1)
        return {
            "objective/scores": score_S,
            "objective/scores_margin": (first_P - second_P).abs(),
            "val/contain_eos_token": ended_S,
        }

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        found = super().derived(means)
        parts = [means.get(f"objective/{name}") for name in ("scores", "non_score_reward")]
        if parts[0] is not None and parts[1] is not None:
            found["objective/rlhf_reward"] = parts[0] + parts[1]
        return found
