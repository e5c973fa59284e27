"""One optimizer step, as its losses see it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
