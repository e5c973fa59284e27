"""Direct preference optimisation and its family: a loss on the log-ratios of two completions of one prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trl.config import BaseConfig, PreferenceFields, ReferenceFields, RouterFields
from trl.data.batching import collate
from trl.data.batching.collate import Tree
from trl.engine.forest import Batch
from trl.engine.head import TokenStats
from trl.engine.score import score
from trl.losses.call import call_with_available, loss_functions
from trl.losses.preference import DIVERGENCES, DIVERGING, LOSSES, NEED_STEP, PER_TOKEN, StepPairs, ld, wpo_weight
from trl.losses.tokens import Metric, masked_mean_metric, mean_metric, seq_sum
from trl.models.unwrap import evaluating
from trl.trainer.preference import ReferencedTrainer

from .attributes import shows
from .step import Statistics, Step


@dataclass
class DPOConfig(PreferenceFields, ReferenceFields, RouterFields, BaseConfig):
    """Options of `DPOTrainer`, in addition to `transformers.TrainingArguments`."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the model to zero."})
    beta: float = field(
        default=0.1, metadata={"help": "Scale of the log-ratios; larger keeps the policy closer to the reference."}
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "Loss of each pair; several losses are added up.", "choices": sorted(LOSSES)},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each loss in loss_type, in order. Default: 1 each."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Assumed share of pairs with the wrong preference label."}
    )
    ld_alpha: float | None = field(
        default=None,
        metadata={"help": "Weight, 0 to 1, of the tokens beyond the length of the shorter completion (LD-DPO)."},
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={"help": "Divergence from the reference (f-DPO).", "choices": sorted(DIVERGENCES)},
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "Alpha of alpha_divergence."})
    use_weighting: bool = field(
        default=False, metadata={"help": "Weigh pairs by their likelihood under the policy (WPO)."}
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of the discopop loss."})
    rpo_alpha: float | None = field(
        default=None, metadata={"help": "Weight of the chosen completion's negative log-likelihood (RPO); adds `sft`."}
    )
    reference_free: bool = field(default=False, metadata={"help": "Use no reference model: its log-probs are 0."})
    padding_free: bool = field(default=False, metadata={"help": "No effect: flat rows are never padded."})

    def __post_init__(self) -> None:
        given: Any = self.loss_type
        self.loss_type = [given] if isinstance(given, str) or callable(given) else list(given)
        weights = self.loss_weights
        if weights is not None and len(weights) != len(self.loss_type):
            raise ValueError(f"loss_weights has {len(weights)} entries for {len(self.loss_type)} losses")
        if self.rpo_alpha is not None and "sft" not in self.loss_type:
            self.loss_weights = [*(weights or [1.0] * len(self.loss_type)), self.rpo_alpha]
            self.loss_type = [*self.loss_type, "sft"]
        elif self.rpo_alpha is not None and self.rpo_alpha != (weights or [1.0])[-1]:
            raise ValueError(
                "rpo_alpha adds the loss `sft`, which loss_type holds already: set its loss_weights instead"
            )
        if self.f_divergence_type not in DIVERGENCES:
            raise ValueError(f"f_divergence_type={self.f_divergence_type!r} is not one of {', '.join(DIVERGENCES)}")
        self._check()
        super().__post_init__()

    def _check(self) -> None:
        names = [name for name, _ in loss_functions(self.loss_type, LOSSES)]
        if self.f_divergence_type != "reverse_kl" and (
            wrong := [n for n in names if n in LOSSES and n not in DIVERGING]
        ):
            raise ValueError(
                f"f_divergence_type={self.f_divergence_type!r} does not go with loss_type {', '.join(wrong)}: the "
                f"divergence's constant cancels in a difference alone. It goes with {', '.join(sorted(DIVERGING))}"
            )
        if self.use_weighting and (wrong := sorted(NEED_STEP & set(names))):
            raise ValueError(f"use_weighting weighs pairs, which {', '.join(wrong)} takes apart: leave one of them out")
        if "exo_pair" in names and not 0 < self.label_smoothing < 1:
            raise ValueError("loss_type exo_pair needs label_smoothing above 0; its paper recommends 1e-3")
        if "robust" in names and not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"loss_type robust needs label_smoothing in [0, 0.5), not {self.label_smoothing}")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha={self.ld_alpha} is a share of a token's weight, 0 to 1")
        if self.reference_free and (self.precompute_ref_log_probs or self.sync_ref_model):
            raise ValueError(
                "reference_free asks for no reference: leave out precompute_ref_log_probs and sync_ref_model"
            )


@shows(
    *("label_smoothing", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting", "discopop_tau"),
    fixed=("padding_free", "reference_free"),
    loss_types="loss_type",
)
class DPOTrainer(ReferencedTrainer):
    """Trains a causal language model on pairs of a better and a worse completion.

    `model` and `ref_model` are names, folders (an adapter's too), models or `PeftModel`s; without `ref_model` the
    reference is the model as it is at the start. The data are pairs in any of the shapes that `data.preference` reads.
    The rest as in `transformers.Trainer`. Rafailov et al. 2023, arXiv:2305.18290.
    """

    config_class = DPOConfig
    method = "dpo"
    kind = "pairs"
    ref_columns = ("ref_chosen_logps", "ref_rejected_logps")

    def needs_reference(self) -> bool:
        return not self.args.reference_free

    @property
    def loss_weights(self) -> list[float]:
        return self.args.loss_weights or [1.0] * len(self.args.loss_type)

    def reference_options(self) -> Any:
        return self.args.ld_alpha

    @staticmethod
    def batch(rows: Sequence[Any], to_batch: Callable[[list[Tree]], Batch]) -> Batch:
        return pair_batch(rows, to_batch)

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"pairs": batch["row_S"].shape[0] // 2, "chosen_tokens": batch["chosen_tokens"]}

    def sequence_logp(self, stats: TokenStats) -> Tensor:
        if self.args.ld_alpha is None:
            return super().sequence_logp(stats)
        return ld(stats.logp_N, seq_N=stats.seq_N, sequences=stats.sequences, ld_alpha=self.args.ld_alpha)

    def reference_values(self, batch: Batch, score: Callable[[Batch], TokenStats]) -> Tensor:
        return self.sequence_logp(score(batch)).view(-1, 2)

    def before_step(self, model: nn.Module, batches: list[Batch], training: bool) -> Statistics:
        """Losses that sort the pairs sort those of the whole optimizer step (in evaluation, of the batch)."""
        names = {name for name, _ in loss_functions(self.args.loss_type, LOSSES)}
        if not names & NEED_STEP or (len(batches) == 1 and self.args.world_size == 1):
            return Statistics()
        found: list[Tensor] = []
        columns: list[dict[str, Any]] = []
        for batch in batches:
            moved = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager(), evaluating(model):
                policy_S = self.sequence_logp(score(model, moved))
                ref_S = self._reference_logp(model, moved, policy_S)
            found.append(torch.stack([policy_S, ref_S], 1))
            columns.append({"ref_logp_S": ref_S})
        # Pairs × (policy chosen, reference chosen, policy rejected, reference rejected).
        own = torch.cat(found).view(-1, 4)
        offset = 0
        if self.args.world_size > 1:
            counts = [torch.zeros((), dtype=torch.long, device=own.device) for _ in range(self.args.world_size)]
            torch.distributed.all_gather(counts, torch.tensor(len(own), device=own.device))
            sizes = [int(count) for count in counts]
            wide = own.new_zeros(max(sizes), 4)
            wide[: len(own)] = own
            parts = [torch.empty_like(wide) for _ in sizes]
            torch.distributed.all_gather(parts, wide)
            offset = sum(sizes[: self.args.process_index])
            own = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        for column, batch in zip(columns, batches, strict=True):
            column["pairs_before"] = offset
            offset += batch["row_S"].shape[0] // 2
        kinds = ("chosen_logp_P", "chosen_ref_logp_P", "rejected_logp_P", "rejected_ref_logp_P")
        return Statistics(shared=dict(zip(kinds, own.unbind(1), strict=True)), columns=columns)

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        args = self.args
        balance = self.router_aux_loss_coef
        stats = score(
            model, batch, entropy=True, top1=True, mean_logit=True, sum_sq=args.use_weighting, router=balance > 0
        )
        assert stats.entropy_N is not None and stats.top1_N is not None and stats.mean_logit_N is not None
        policy_S = self.sequence_logp(stats)
        ref_S = self._reference_logp(model, batch, policy_S)
        chosen_P, rejected_P = policy_S.view(-1, 2).unbind(1)
        ref_chosen_P, ref_rejected_P = ref_S.view(-1, 2).unbind(1)
        tokens_S = seq_sum(torch.ones_like(stats.logp_N), stats.seq_N, stats.sequences)
        chosen_tokens_P, rejected_tokens_P = tokens_S.view(-1, 2).unbind(1)
        available: dict[str, Any] = {
            "chosen_logp_P": chosen_P,
            "rejected_logp_P": rejected_P,
            "chosen_ref_logp_P": ref_chosen_P,
            "rejected_ref_logp_P": ref_rejected_P,
            "chosen_logratio_P": chosen_P - ref_chosen_P,
            "rejected_logratio_P": rejected_P - ref_rejected_P,
            "chosen_nll_P": -seq_sum(stats.logp_N, stats.seq_N, stats.sequences).view(-1, 2)[:, 0],
            "chosen_tokens_P": chosen_tokens_P,
            "rejected_tokens_P": rejected_tokens_P,
            "step": StepPairs(**step.shared, offset=batch["pairs_before"]) if "pairs_before" in batch else None,
            "beta": args.beta,
            "label_smoothing": args.label_smoothing,
            "discopop_tau": args.discopop_tau,
            "f_alpha_divergence_coef": args.f_alpha_divergence_coef,
        }
        for side in ("chosen", "rejected"):
            ratio = {**available, "logratio_P": available[f"{side}_logratio_P"]}
            available[f"{side}_score_P"] = call_with_available(DIVERGENCES[args.f_divergence_type], ratio)
        weight_P: Tensor | float = 1.0
        if args.use_weighting:
            assert stats.sum_sq_N is not None
            weight_P = wpo_weight(stats.logp_N, stats.sum_sq_N, seq_N=stats.seq_N, sequences=stats.sequences)
        pair_loss, token_loss = policy_S.new_zeros(()), policy_S.new_zeros(())
        functions = loss_functions(args.loss_type, LOSSES)
        for (name, function), weight in zip(functions, self.loss_weights, strict=True):
            loss_P = call_with_available(function, available)
            if name in PER_TOKEN:
                token_loss = token_loss + weight * loss_P.sum()
            else:
                pair_loss = pair_loss + weight * (loss_P * weight_P).sum()
        metrics = pair_metrics(stats, chosen_P, rejected_P, args.beta * (policy_S - ref_S))
        if stats.aux is not None:
            pair_loss = pair_loss + balance * stats.aux * chosen_P.shape[0]
            metrics["aux_loss"] = mean_metric(stats.aux)
        return {"pairs": pair_loss, "chosen_tokens": token_loss}, metrics

    def _reference_logp(self, model: nn.Module, batch: Batch, policy_S: Tensor) -> Tensor:
        if not self.needs_reference():
            return torch.zeros_like(policy_S)
        if self.reference.is_column or "pairs_before" in batch:
            return batch["ref_logp_S"]
        return self.reference_values(batch, self.reference.ask(model)).flatten()


def pair_batch(
    rows: Sequence[Any],
    to_batch: Callable[[list[Tree]], Batch],
    trained: Callable[[Sequence[int]], Sequence[bool]] | None = None,
) -> Batch:
    """Pairs as a batch: under each prompt the chosen and the rejected completion, in turn.

    Beside the layout: `chosen_tokens` (how many), and what the rows have of `margin_P` and `ref_logp_S`.
    """
    rows = [rows[index] for index in collate.by_prompt(rows)]
    options = {} if trained is None else {"trained": trained}
    columns = ("chosen_ids", "rejected_ids")
    batch = to_batch(collate.under_prompts(rows, columns, **options))
    batch["tokens"] = collate.tokens_of(rows, columns)
    batch["chosen_tokens"] = sum(len(row["chosen_ids"]) for row in rows)
    if all("margin" in row for row in rows):
        batch["margin_P"] = torch.tensor([float(row["margin"]) for row in rows])
    if all("ref_chosen_logps" in row for row in rows):
        both = [(row["ref_chosen_logps"], row["ref_rejected_logps"]) for row in rows]
        batch["ref_logp_S"] = torch.tensor(both, dtype=torch.float32).flatten()
    return batch


def pair_metrics(stats: TokenStats, chosen_P: Tensor, rejected_P: Tensor, reward_S: Tensor) -> dict[str, Metric]:
    """What is logged of pairs, under upstream's names. Rewards are implicit ones: beta times the log-ratio."""
    chosen_reward_P, rejected_reward_P = reward_S.detach().view(-1, 2).unbind(1)
    chosen_N = stats.seq_N % 2 == 0
    metrics = {
        "rewards/chosen": mean_metric(chosen_reward_P),
        "rewards/rejected": mean_metric(rejected_reward_P),
        "rewards/accuracies": mean_metric((chosen_reward_P > rejected_reward_P).float()),
        "rewards/margins": mean_metric(chosen_reward_P - rejected_reward_P),
        "logps/chosen": mean_metric(chosen_P),
        "logps/rejected": mean_metric(rejected_P),
    }
    if stats.entropy_N is not None:
        metrics["entropy"] = mean_metric(stats.entropy_N)
    for which, place_N in (("chosen", chosen_N), ("rejected", ~chosen_N)):
        if stats.mean_logit_N is not None:
            metrics[f"logits/{which}"] = masked_mean_metric(stats.mean_logit_N, place_N)
    if stats.top1_N is not None:
        metrics["mean_token_accuracy"] = masked_mean_metric(stats.top1_N, chosen_N)
    return metrics
