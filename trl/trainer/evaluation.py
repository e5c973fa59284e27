"""An evaluation: the sums that its loss is made of, a loss of the user's own, and what may be kept."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trl.engine.forest import Batch
from trl.losses.tokens import Metric

from . import overrides
from .step import Step

_PART = "loss over "  # the means that add up to the loss of an evaluation

LARGEST_KEPT_LOGITS = 2**31  # bytes


def refuse_to_keep(trainer: Any, logits: Tensor) -> None:
    """ValueError where `compute_metrics` would keep more logits than memory is likely to hold. It gets what
    `preprocess_logits_for_metrics` makes of each batch, and whole logits only if they are few."""
    if trainer.preprocess_logits_for_metrics is not None or trainer.args.batch_eval_metrics:
        return
    rows = len(trainer.callback_handler.eval_dataloader.dataset)
    kept = rows * logits[0].numel() * logits.element_size()
    if kept > LARGEST_KEPT_LOGITS:
        raise ValueError(
            f"compute_metrics would keep {kept / 2**30:.1f} GiB of logits ({rows} rows of {tuple(logits.shape[1:])}"
            "). Pass preprocess_logits_for_metrics=, for instance lambda logits, labels: logits.argmax(-1), "
            "or set batch_eval_metrics=True"
        )


def part(kind: str) -> str:
    """The name of the metric that is the loss's part averaged over `kind`."""
    return f"{_PART}{kind}"


def parts(sums: dict[str, Tensor], counts: Mapping[str, float]) -> dict[str, Metric]:
    """The sums of a loss as metrics, whose means add up to the loss of an evaluation."""
    return {part(kind): Metric(total.detach(), float(counts[kind])) for kind, total in sums.items()}


def with_loss(found: dict[str, float]) -> dict[str, float]:
    """The metrics of an evaluation, with the loss in place of its parts."""
    own = [value for name, value in found.items() if name.startswith(_PART)]
    rest = {name: value for name, value in found.items() if not name.startswith(_PART)}
    # None where a `prediction_step` of the user's own does without ours.
    return {**rest, "loss": sum(own)} if own else rest


def predicted(trainer: Any, model: nn.Module, inputs: Batch, prediction_loss_only: bool) -> tuple[Tensor, Any, Any]:
    """The loss of a batch, and logits and labels where a `compute_metrics` reads them. Adds to the sums of the
    evaluation."""
    logits = labels = None
    whole = trainer.rewritten([trainer._taken(inputs)], training=False)
    [inputs] = whole
    keeps_logits = "labels" in inputs and trainer.compute_metrics is not None and not prediction_loss_only

    def take() -> Tensor:
        batches = whole if keeps_logits else trainer.budget.cut(trainer, whole, equally=False)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            found = trainer.before_step(model, batches, training=False)
            shared = {**trainer._of_evaluation, **found.shared}
            step = Step(trainer._counted(inputs), batches, False, shared)
            return sum_of_losses(trainer, model, found.beside(batches), step)

    loss = trainer.budget.fitted(trainer, "eval", take)
    with torch.no_grad(), trainer.compute_loss_context_manager():
        if keeps_logits:
            batch = trainer._prepare_inputs(inputs)
            labels = batch["labels"]
            grid = {key: batch[key] for key in ("input_ids", "attention_mask")}
            logits = model(**grid, use_cache=False).logits
            refuse_to_keep(trainer, logits)
            # Without the stand-in of an empty batch.
            rows = batch["row_S"].shape[0]
            labels, logits, inputs["input_ids"] = labels[:rows], logits[:rows], inputs["input_ids"][:rows]
    return loss, logits, labels


def sum_of_losses(trainer: Any, model: nn.Module, batches: list[Batch], step: Step) -> Tensor:
    """The loss of an evaluation's batch that may be cut, and `step` is about; adds to the sums of the evaluation."""
    total = torch.zeros((), device=trainer.args.device)
    for batch in map(trainer._prepare_inputs, batches):
        counts = trainer.counts(batch)
        if overrides.has_own_loss(trainer):
            loss = own_evaluation(trainer, model, batch, trainer._counted(batch), next(iter(counts.values())))
            total += loss * (batch["row_S"].shape[0] / step.count(overrides.ROWS))
            continue
        sums, metrics = trainer.loss(model, batch, step)
        trainer._add("eval", {**metrics, **parts(sums, counts)})
        total += torch.stack([each / step.count(kind) for kind, each in sums.items()]).sum()
    return total


def own_evaluation(trainer: Any, model: nn.Module, batch: Batch, counts: dict[str, Tensor], items: int) -> Tensor:
    """The user's own loss on a batch as its share of `counts`, also added to the loss of the evaluation.

    `items` are those of the first kind in the batch.
    """
    before, trainer.mode = trainer.under_way, "eval"
    trainer.under_way = Step(counts, [batch], False, trainer._of_evaluation)
    try:
        with overrides.completed(trainer):
            share = trainer.compute_loss(model, batch, num_items_in_batch=trainer.under_way.count(None))
    finally:
        trainer.under_way, trainer.mode = before, "train"
    by_rows = trainer.own_weight == overrides.ROWS
    whole = counts[overrides.ROWS if by_rows else next(iter(counts))]
    add_own(trainer, share.detach() * whole, batch["row_S"].shape[0] if by_rows else items)
    return share


def add_own(trainer: Any, total: Tensor, items: int) -> None:
    """Add to the loss of an evaluation by the user's own loss; also on a rank without rows, where both are 0."""
    trainer._add("eval", {part("own"): Metric(total, float(items))})
