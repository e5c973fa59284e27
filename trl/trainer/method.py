"""What a method supplies to its trainer, and what it may.

A method overrides `rows` (how the data set is read), `batch` (what rows become), `counts` (what the loss is averaged
over) and `loss` (sums, and metrics). The other hooks do nothing unless a method needs them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trl.config import BaseConfig
from trl.data.batching.collate import Tree
from trl.engine.forest import Batch, trained
from trl.engine.score import score
from trl.losses.tokens import Metric, seq_sum
from trl.models import load

from .planned import Planned
from .step import Statistics, Step


class Component:
    """A part of a trainer with a state of its own, such as a reference model. Its methods are given the trainer."""

    def on_ready(self, trainer: Any) -> None:
        """The trainer is made but for its method's `on_ready`."""

    def report(self, trainer: Any) -> list[str]:
        """Lines of the report before step 1."""
        return []

    def state(self, trainer: Any) -> dict[str, Any]:
        """Its part of `method_state`."""
        return {}

    def load_state(self, trainer: Any, state: dict[str, Any]) -> None:
        """Restore what `state` returned, out of the state of the whole method."""

    def save(self, trainer: Any, folder: Path) -> None:
        """Write into the model's folder what `save_pretrained` does not. All ranks call it."""

    def check_evaluation(self, trainer: Any, dataset: Any) -> None:
        """An error if this data set cannot be evaluated on now."""


class Method(Planned):
    """The hooks of a method, of which `BaseTrainer` is made. `self` is the trainer."""

    config_class: type[BaseConfig]
    method: str  # how the command line and the folders call it
    components: Sequence[Component] = ()  # parts with a state of their own, such as a reference model
    # Whether a batch is made of token ids and labels alone, so that collators of transformers can make one.
    takes_grids = True
    takes_lengths = True  # whether the lengths of rows are known beforehand

    # --- data -----------------------------------------------------------------------------------------------------

    def rows(self, dataset: Any, name: str) -> tuple[Any, Any]:
        """The data set as this method trains on it, tokenised, and what was found on the way."""
        raise NotImplementedError

    prepared_columns: frozenset[str] = frozenset({"input_ids", "loss_mask", "row"})

    def is_prepared(self, dataset: Any) -> bool:
        """Whether the data set is one that `rows` has made."""
        return isinstance(dataset, Dataset) and self.prepared_columns <= set(dataset.column_names)

    @staticmethod
    def batch(rows: Sequence[Any], to_batch: Callable[[list[Tree]], Batch]) -> Batch:
        """Prepared rows -> a batch: their trees as `to_batch` lays them out, and what else the loss reads of a row."""
        raise NotImplementedError

    def rewritten(self, batches: list[Batch], training: bool) -> list[Batch]:
        """The micro-batches of an optimizer step, or the batch of an evaluation, as the method trains on them: those of
        the data, unless it puts others in their place. Every rank calls it, also without rows."""
        return batches

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many items of each kind that the loss is averaged over this batch has: its trained tokens, unless a
        method differs."""
        return {"tokens": trained(batch)}

    def before_step(self, model: nn.Module, batches: list[Batch], training: bool) -> Statistics:
        """Statistics over the micro-batches of an optimizer step, or over one batch of an evaluation."""
        return Statistics()

    def forget_step(self) -> None:
        """The step under way is taken again: drop what `loss` has noted of it."""

    def before_evaluation(self, dataloader: DataLoader) -> dict[str, Any]:
        """Statistics over the whole data set of an evaluation: entries of `Step.shared` for all its batches."""
        return {}

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        """The loss as sums, each to be divided by the count of its kind over the whole optimizer step and then added;
        and metrics under their logged names."""
        raise NotImplementedError

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """Metrics that are made of the means of others."""
        return {}

    def on_ready(self) -> None:
        """Called once, at the end of the construction."""

    def method_state(self) -> dict[str, Any]:
        """What a checkpoint must keep of the method itself: tensors, numbers and strings. What all ranks have alike may
        be left to the first rank: a rank is given what it has not written itself from there."""
        return {name: value for each in self.components for name, value in each.state(self).items()}

    def joined_state(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state for a run on another number of ranks than those whose `method_state` is given: the first rank's,
        unless each has a part of the whole."""
        return states[0]

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `method_state`."""
        for each in self.components:
            each.load_state(self, state)

    # --- the model ------------------------------------------------------------------------------------------------

    def load_model(self, name: str, **kwargs: Any) -> Any:
        """The model that goes by a name or path."""
        return load.load_causal_lm(name, **kwargs)

    def adapter_config(self, peft_config: Any) -> Any:
        """The adapter's configuration, as the method needs it."""
        return peft_config

    numbers_of_sequences = "log-probs"

    def sums_of_sequences(self, model: nn.Module, batch: Batch) -> Tensor:
        """A number for each sequence, [S], that is not finite where the model's outputs are not."""
        stats = score(model, batch)
        return seq_sum(stats.logp_N, stats.seq_N, stats.sequences)
