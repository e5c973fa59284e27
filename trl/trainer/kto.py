"""Kahneman–Tversky optimisation: completions that are good or bad, each on its own."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trl.config import BaseConfig, PreferenceFields, ReferenceFields, RouterFields
from trl.data.batching import collate
from trl.data.batching.collate import Tree
from trl.data.report import DataReport
from trl.data.tokenizing.mismatched import COLUMN, mismatched
from trl.engine.forest import Batch
from trl.engine.head import TokenStats
from trl.engine.score import score
from trl.losses.call import call_with_available, loss_functions
from trl.losses.tokens import Metric, masked_mean_metric, mean_metric
from trl.losses.unpaired import LOSSES, kl_estimate
from trl.models.unwrap import evaluating
from trl.trainer.preference import ReferencedTrainer

from .attributes import shows
from .metrics import sums_device
from .step import Statistics, Step

WITHOUT_KL = ("apo_zero_unpaired",)


@dataclass
class KTOConfig(PreferenceFields, ReferenceFields, RouterFields, BaseConfig):
    """Options of `KTOTrainer`, in addition to `transformers.TrainingArguments`."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the model to zero."})
    beta: float = field(
        default=0.1, metadata={"help": "Scale of the log-ratios; larger keeps the policy closer to the reference."}
    )
    loss_type: str = field(
        default="kto", metadata={"help": "Loss of each completion.", "choices": ["kto", "apo_zero_unpaired"]}
    )
    desirable_weight: float = field(
        default=1.0, metadata={"help": "Weight of good completions; raise it if they are fewer than the bad ones."}
    )
    undesirable_weight: float = field(default=1.0, metadata={"help": "Weight of bad completions."})

    def __post_init__(self) -> None:
        loss_functions([self.loss_type], {name: LOSSES[name] for name in ("kto", "apo_zero_unpaired")})
        super().__post_init__()


class UnpairedTrainer(ReferencedTrainer):
    """What the methods share whose rows are one completion and a label."""

    kind = "unpaired"
    prepared_columns = frozenset({"prompt_ids", "completion_ids", "label", "row"})
    ref_columns: tuple[str, ...] = ("ref_logps",)
    loss_type: Any  # a name in LOSSES, or a function

    @staticmethod
    def batch(rows: Sequence[Any], to_batch: Callable[[list[Tree]], Batch]) -> Batch:
        return unpaired_batch(rows, to_batch)

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"rows": batch["row_S"].shape[0]}

    def reference_values(self, batch: Batch, score: Callable[[Batch], TokenStats]) -> Tensor:
        return self.sequence_logp(score(batch))[:, None]

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        balance = self.router_aux_loss_coef
        stats = score(model, batch, entropy=True, mean_logit=True, router=balance > 0)
        assert stats.entropy_N is not None and stats.mean_logit_N is not None
        policy_S, label_S = self.sequence_logp(stats), batch["label_S"]
        if self.reference.is_column or "ref_logp_S" in batch:
            ref_S = batch["ref_logp_S"]
        else:
            ref_S = self.reference_values(batch, self.reference.ask(model))[:, 0]
        ratio_S = policy_S - ref_S
        (_, function), *_ = loss_functions([self.loss_type], LOSSES)
        loss_S = call_with_available(
            function, {"logratio_S": ratio_S, "label_S": label_S, **self.settings(batch, policy_S, step)}
        )
        total = loss_S.sum()
        reward_S = self.args.beta * ratio_S.detach()
        metrics = {"entropy": mean_metric(stats.entropy_N)}
        for which, place_S in (("chosen", label_S), ("rejected", ~label_S)):
            metrics[f"rewards/{which}"] = masked_mean_metric(reward_S, place_S)
            metrics[f"logps/{which}"] = masked_mean_metric(policy_S, place_S)
            metrics[f"logits/{which}"] = masked_mean_metric(stats.mean_logit_N, place_S[stats.seq_N])
        if stats.aux is not None:
            total = total + balance * stats.aux * len(policy_S)
            metrics["aux_loss"] = mean_metric(stats.aux)
        return {"rows": total}, {**metrics, **self.further_metrics(step)}

    def settings(self, batch: Batch, policy_S: Tensor, step: Step) -> dict[str, Any]:
        """What losses may ask for beside log-ratios and labels."""
        return {"beta": self.args.beta}

    def further_metrics(self, step: Step) -> dict[str, Metric]:
        return {}

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        if "rewards/chosen" not in means or "rewards/rejected" not in means:
            return {}
        return {"rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}


@shows("desirable_weight", "undesirable_weight", fixed=("loss_type",))
class KTOTrainer(UnpairedTrainer):
    """Trains a causal language model on completions with a label, good or bad. Pairs are read as two rows.

    The reference point of the loss, an estimate of how far the policy is from the reference, is taken on completions of
    other prompts, over the whole optimizer step and all ranks before its first backward pass. Ethayarajh et al. 2024,
    arXiv:2402.01306.
    """

    config_class = KTOConfig
    method = "kto"

    @property
    def ref_columns(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("ref_logps", "ref_KL_logps") if self.needs_kl() else ("ref_logps",)

    def is_prepared(self, dataset: Any) -> bool:
        return super().is_prepared(dataset) and (not self.needs_kl() or COLUMN in dataset.column_names)

    @property
    def calculate_KL(self) -> bool:  # noqa: N802 upstream's name
        return self.needs_kl()

    def needs_kl(self) -> bool:
        return self.args.loss_type not in WITHOUT_KL

    def rows(self, dataset: Any, name: str) -> tuple[Any, DataReport]:
        rows, report = super().rows(dataset, name)
        if self.needs_kl():
            rows = mismatched(rows, seed=self.args.seed, max_length=self.args.max_length or self.window())
        return rows, report

    @staticmethod
    def batch(rows: Sequence[Any], to_batch: Callable[[list[Tree]], Batch]) -> Batch:
        batch = unpaired_batch(rows, to_batch)
        if all(COLUMN in row for row in rows):
            rows = [rows[index] for index in collate.by_prompt(rows)]
            batch["kl"] = to_batch(collate.under_prompts(rows, (COLUMN,)))
            batch["both"] = to_batch(collate.under_prompts(rows, ("completion_ids", COLUMN)))
            if all("ref_KL_logps" in row for row in rows):
                batch["ref_kl_logp_S"] = torch.tensor([row["ref_KL_logps"] for row in rows], dtype=torch.float32)
        return batch

    def reference_values(self, batch: Batch, score: Callable[[Batch], TokenStats]) -> Tensor:
        if not self.needs_kl():
            return super().reference_values(batch, score)
        return self.sequence_logp(score(batch["both"])).view(-1, 2)

    def before_step(self, model: nn.Module, batches: list[Batch], training: bool) -> Statistics:
        """In training the estimate of the step; in an evaluation `before_evaluation` has taken it."""
        return self._estimate(model, batches) if training and self.needs_kl() else Statistics()

    def before_evaluation(self, dataloader: Any) -> dict[str, Any]:
        if not self.needs_kl():
            return {}
        cut = (self.budget.cut(self, [batch], equally=False) for batch in dataloader)
        return dict(self._estimate(self.model, (each for batches in cut for each in batches)).shared)

    def _estimate(self, model: nn.Module, batches: Iterable[Batch]) -> Statistics:
        """The reference point over all batches and ranks, a scalar, and what the reference says of each batch."""
        sums = torch.zeros(2, dtype=torch.float64, device=sums_device(self.args.device))
        columns = []
        for batch in batches:
            moved = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                with evaluating(model):
                    policy_S = self.sequence_logp(score(model, moved["kl"]))
                if self.reference.is_column:
                    ref_S = moved["ref_kl_logp_S"]
                else:
                    own_S, ref_S = self.reference_values(moved, self.reference.ask(model)).unbind(1)
                    columns.append({"ref_logp_S": own_S})
            total = (policy_S - ref_S).to(sums.device).double().sum()
            sums += torch.stack([total, sums.new_full((), float(len(policy_S)))])
        if self.args.world_size > 1:
            torch.distributed.all_reduce(sums)
        return Statistics({"kl": kl_estimate((sums[0] / sums[1].clamp(min=1)).float())}, columns)

    def settings(self, batch: Batch, policy_S: Tensor, step: Step) -> dict[str, Any]:
        return {
            "beta": self.args.beta,
            "kl": step.shared.get("kl", policy_S.new_zeros(())),
            "desirable_weight": self.args.desirable_weight,
            "undesirable_weight": self.args.undesirable_weight,
        }

    def further_metrics(self, step: Step) -> dict[str, Metric]:
        return {"kl": mean_metric(step.shared["kl"])} if self.needs_kl() else {}


def unpaired_batch(rows: Sequence[Any], to_batch: Callable[[list[Tree]], Batch]) -> Batch:
    """Labelled completions as a batch, with `label_S`, and `ref_logp_S` where the rows have it."""
    rows = [rows[index] for index in collate.by_prompt(rows)]
    batch = to_batch(collate.under_prompts(rows, ("completion_ids",)))
    batch["tokens"] = collate.tokens_of(rows, ("completion_ids",))
    batch["label_S"] = torch.tensor([bool(row["label"]) for row in rows], dtype=torch.bool)
    if all("ref_logps" in row for row in rows):
        batch["ref_logp_S"] = torch.tensor([row["ref_logps"] for row in rows], dtype=torch.float32)
    return batch
