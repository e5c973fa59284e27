"""Contrastive preference optimisation and its kin (SimPO, AlphaPO): pairs without a reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from trl.config import BaseConfig, PreferenceFields, RouterFields
from trl.data.batching.collate import Tree
from trl.engine.forest import Batch
from trl.engine.score import score
from trl.losses.call import call_with_available, loss_functions
from trl.losses.reference_free import LOSSES, MEAN_LOGP, alpha_reward
from trl.losses.tokens import Metric, masked_mean_metric, mean_metric, seq_mean, seq_sum
from trl.notices import notify_once

from .attributes import shows
from .dpo import pair_batch
from .preference import ReferenceFreeTrainer
from .step import Step


@dataclass
class CPOConfig(PreferenceFields, RouterFields, BaseConfig):
    """Options of `CPOTrainer`, in addition to `transformers.TrainingArguments`."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the model to zero."})
    beta: float = field(default=0.1, metadata={"help": "Scale of the log-probs."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Assumed share of pairs with the wrong preference label."}
    )
    loss_type: str = field(
        default="sigmoid",
        metadata={"help": "Loss of each pair; alphapo is simpo with alpha.", "choices": [*sorted(LOSSES), "alphapo"]},
    )
    cpo_alpha: float = field(
        default=1.0, metadata={"help": "Weight of the chosen completion's negative log-likelihood."}
    )
    simpo_gamma: float = field(default=0.5, metadata={"help": "Target reward margin of simpo."})
    alpha: float = field(
        default=0.0, metadata={"help": "Alpha of AlphaPO's reward, (1 - p^-alpha) / alpha; 0: the log-prob."}
    )

    def __post_init__(self) -> None:
        if self.loss_type == "alphapo":
            if self.cpo_alpha not in (0.0, 1.0):
                notify_once(f"cpo_alpha={self.cpo_alpha!r} has no effect with loss_type=alphapo, which sets it to 0")
            self.loss_type = "simpo"
            self.cpo_alpha = 0.0
        if self.loss_type == "kto_pair":
            raise ValueError("loss_type kto_pair is gone: use KTOTrainer on pairs, which it reads as two rows each")
        loss_functions([self.loss_type], LOSSES)
        super().__post_init__()


@shows(
    *("beta", "label_smoothing", "loss_type", "cpo_alpha", "alpha", "simpo_gamma", "generate_during_eval"),
    fixed=("max_length", "max_completion_length"),
)
class CPOTrainer(ReferenceFreeTrainer):
    """Trains a causal language model on pairs by its own log-probs. Xu et al. 2024, arXiv:2401.08417; SimPO:
    Meng et al. 2024, arXiv:2405.14734; AlphaPO: Gupta et al. 2025, arXiv:2501.03884.
    """

    config_class = CPOConfig
    method = "cpo"

    @staticmethod
    def batch(rows: Sequence[Any], to_batch: Callable[[list[Tree]], Batch]) -> Batch:
        return pair_batch(rows, to_batch)

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"pairs": batch["row_S"].shape[0] // 2, "chosen_tokens": batch["chosen_tokens"]}

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        args, balance = self.args, self.router_aux_loss_coef
        stats = score(model, batch, mean_logit=True, router=balance > 0)
        assert stats.mean_logit_N is not None
        sum_S = seq_sum(stats.logp_N, stats.seq_N, stats.sequences)
        logp_S = seq_mean(stats.logp_N, stats.seq_N, stats.sequences) if args.loss_type in MEAN_LOGP else sum_S
        chosen_P, rejected_P = logp_S.view(-1, 2).unbind(1)
        chosen_reward_P = alpha_reward(chosen_P, alpha=args.alpha)
        rejected_reward_P = alpha_reward(rejected_P, alpha=args.alpha)
        (_, function), *_ = loss_functions([args.loss_type], LOSSES)
        loss_P = call_with_available(
            function,
            {
                "chosen_reward_P": chosen_reward_P,
                "rejected_reward_P": rejected_reward_P,
                "chosen_logp_P": chosen_P,
                "rejected_logp_P": rejected_P,
                "beta": args.beta,
                "label_smoothing": args.label_smoothing,
                "simpo_gamma": args.simpo_gamma,
                "alpha": args.alpha,
            },
        )
        nll = -sum_S.view(-1, 2)[:, 0].sum()
        chosen_N = stats.seq_N % 2 == 0
        margin_P = args.beta * (chosen_reward_P - rejected_reward_P).detach()
        metrics = {
            "rewards/chosen": mean_metric(args.beta * chosen_reward_P),
            "rewards/rejected": mean_metric(args.beta * rejected_reward_P),
            "rewards/accuracies": mean_metric((margin_P > 0).float()),
            "rewards/margins": mean_metric(margin_P),
            "logps/chosen": mean_metric(chosen_P),
            "logps/rejected": mean_metric(rejected_P),
            "logits/chosen": masked_mean_metric(stats.mean_logit_N, chosen_N),
            "logits/rejected": masked_mean_metric(stats.mean_logit_N, ~chosen_N),
            "nll_loss": Metric(nll.detach(), float(batch["chosen_tokens"])),
        }
        pairs = loss_P.sum()
        if stats.aux is not None:
            pairs = pairs + balance * stats.aux * chosen_P.shape[0]
            metrics["aux_loss"] = mean_metric(stats.aux)
        return {"pairs": pairs, "chosen_tokens": args.cpo_alpha * nll}, metrics
