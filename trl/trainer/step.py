"""One optimizer step, as its losses see it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trl.engine.forest import Batch


@dataclass(frozen=True)
class Statistics:
    """What a method takes of all micro-batches of a step before the first backward pass."""

    shared: Mapping[str, Any] = field(default_factory=dict)  # one value for all micro-batches: `Step.shared`
    columns: Sequence[Mapping[str, Any]] = ()  # one mapping for each micro-batch, whose entries it gets
    counts: Mapping[str, Tensor] = field(default_factory=dict)  # items of kinds that are known only now

    def beside(self, batches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches with their own columns."""
        if not self.columns:
            return list(batches)
        return [{**batch, **own} for batch, own in zip(batches, self.columns, strict=True)]


@dataclass(frozen=True)
class Step:
    """An optimizer step, or one batch of an evaluation.

    `counts` are the items of each kind that its loss is divided by, over all micro-batches and ranks, at least 1 each.
    `batches` are this rank's micro-batches. `shared` holds what `before_step` found. `on_policy`: the policy that is
    trained is the one that sampled what it trains on.
    """

    counts: Mapping[str, Tensor]
    batches: Sequence[Batch] = ()
    training: bool = True
    shared: Mapping[str, Any] = field(default_factory=dict)
    on_policy: bool = True

    def count(self, kind: str | None) -> Tensor:
        """Items of a kind; None: of the first."""
        return self.counts[next(iter(self.counts)) if kind is None else kind]


def counts_of_all(found: Sequence[Mapping[str, int]], device: torch.device, ranks: int) -> dict[str, Tensor]:
    """The counts of a step out of those of this rank's micro-batches, at least one: summed over them and over ranks."""
    totals = torch.tensor([float(sum(counts[kind] for counts in found)) for kind in found[0]], device=device)
    if ranks > 1:
        torch.distributed.all_reduce(totals)
    return dict(zip(found[0], totals.clamp(min=1), strict=True))
