"""Forward passes over the traces of a round, whose results become columns of the traces."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trl.engine.forest import Batch
from trl.engine.head import TokenStats
from trl.engine.score import score
from trl.models.unwrap import evaluating
from trl.rollout.traces import Columns, TrainingTrace, trees


def by_policy(model: nn.Module, batch: Batch, **asked: Any) -> TokenStats:
    """A batch scored by the policy as it samples, without dropout."""
    with evaluating(model):
        return score(model, batch, **asked)


def scored(
    trainer: Any,
    ask: Callable[..., TokenStats],
    names: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Columns],
) -> list[Columns]:
    """Results of a forward pass by `ask` for every token of the traces; `names` says which becomes which column."""
    blank = []
    for row, own in zip(rows, columns, strict=True):
        length = len(own["ids"])
        blank.append(TrainingTrace(int(row["row"]), row["prompt_ids"], length, 0.0, length, {"ids": own["ids"]}))

    def take() -> list[Columns]:
        found: list[Columns] = []
        for group in trainer._micro_batches(blank):
            batch = trainer._prepare_inputs(trainer._collate.to_batch(trees(group)))
            with torch.no_grad(), trainer.compute_loss_context_manager():
                stats = ask(batch, temperature=trainer.scoring_temperature)
            lengths = [each.length for each in group]
            parts = {name: getattr(stats, of).float().cpu().split(lengths) for name, of in names.items()}
            found += [{name: part[place].numpy().copy() for name, part in parts.items()} for place in range(len(group))]
        return found

    return trainer.budget.fitted(trainer, trainer.mode, take)
