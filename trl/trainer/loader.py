"""Rows on their way to the model: batches in the layout of the model, their order, streams."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict
from torch.utils.data import DataLoader, IterableDataset

from trl.data.batching.batches import RowBatches, StreamBatches
from trl.data.batching.collate import PaddableRow, Tree, labelled
from trl.data.mixture import Mixture
from trl.data.reading import sources
from trl.engine.forest import Batch, gridded, padded, unshared, with_labels
from trl.engine.score import Attachment
from trl.models import vocabulary
from trl.notices import notify_once
from trl.rollout.rounds import StepSampler

SOURCE = "source"


class Source:
    """The rows of a batch, by which it can be cut. Whatever moves a batch leaves them alone."""

    __slots__ = ("rows",)

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = list(rows)


class Collate:
    """Rows of a prepared data set -> a batch in the layout of the model. Picklable: it may run in a worker process.

    With `labels`, the padded layout and the grid of labels that functions of the user's own read beside logits. `users`
    is a collator of the user's own, in the way of transformers; `raw` says that it reads rows as they were given.
    """

    def __init__(
        self,
        batch: Callable[[Sequence[Any], Callable[[list[Tree]], Batch]], Batch],
        users: Callable | None,
        share_prompt: bool,
        labels: bool = False,
        raw: bool = False,
    ) -> None:
        self.batch, self.users, self.share_prompt, self.labels, self.raw = batch, users, share_prompt, labels, raw
        self.attachment: Attachment | None = None  # known when the model is in place
        self.tokens_without_row: vocabulary.TokensWithoutRow | None = None

    def __call__(self, rows: Sequence[Any]) -> Batch:
        if self.users is not None and len(rows):
            batch = self.taken(self._by_users(rows), [int(row.get("row", -1)) for row in rows])
        else:
            batch = self.batch(rows, self.to_batch)
        return {**batch, SOURCE: Source(rows)}

    def to_batch(self, trees: list[Tree]) -> Batch:
        assert self.attachment is not None
        if self.tokens_without_row is not None:
            for tree in trees:
                for branch in (tree.root, *tree.branches):
                    self.tokens_without_row.check(branch.ids, f"row {tree.row}")
        if self.labels:
            return with_labels(padded(trees, self.attachment.pad_id))
        return self.attachment.batch(trees if self.share_prompt else unshared(trees))

    def taken(self, batch: Mapping[str, Any], rows: Sequence[int]) -> Batch:
        """What a collator or a loader of the user's own made, as a batch."""
        trees = labelled(batch, rows)
        # A function that reads the batch wants the grids that were made for it, and what came with them.
        if self.labels and len(batch["input_ids"]) == len(rows):
            return gridded(dict(batch), rows)
        return self.to_batch(trees)

    def _by_users(self, rows: Sequence[Any]) -> Mapping[str, Any]:
        assert self.users is not None
        if self.raw:
            return self.users(rows)
        paddable = [PaddableRow(row) for row in rows]
        try:
            return self.users(paddable)
        except ValueError as error:
            # `tokenizer.pad` pads everything but labels: what calls it makes labels itself, or leaves them as they are.
            if "labels" not in str(error):
                raise
        batch = self.users([PaddableRow(row, labels=False) for row in rows])
        if batch.get("labels") is not None:
            return batch
        labels = torch.full_like(batch["input_ids"], -100)
        flat = [label for row in paddable for label in row["labels"]]
        labels[batch["attention_mask"].bool()] = torch.tensor(flat)
        return {**batch, "labels": labels}


class BatchStream(IterableDataset):
    """The batches of a stream, as torch's loader and `Trainer` want them.

    A resumed run reads the stream from the beginning and drops what was trained on: the order is the stream's own.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def train_split(splits: dict[str, Any]) -> Any:
    """What to train on of a dictionary: its split `train`. A dictionary of columns is a data set by itself."""
    if not all(map(sources.is_data_set, splits.values())):
        return splits
    whole = isinstance(splits, DatasetDict | IterableDatasetDict)
    dataset = sources.load(splits, "train") if whole else splits.get("train")
    if dataset is None:
        raise ValueError(
            f"train_dataset is a dictionary of the data sets {', '.join(map(str, splits))}: pass one of them, or join "
            "them with datasets.concatenate_datasets"
        )
    taken = next((name for name in splits if splits[name] is dataset), "train")
    others = ", ".join(str(name) for name in splits if name != taken)
    notify_once(
        f"train_dataset is a dictionary of splits: `{taken}` is trained on" + f", and not {others}" * bool(others)
    )
    return dataset


def prepared(trainer: Any, dataset: Any, name: str) -> Any:
    """A data set as its trainer's method reads it, or each of a dictionary of them."""
    if dataset is None:
        return None
    if name == "train" and isinstance(dataset, dict):
        dataset = train_split(dataset)
    if isinstance(dataset, dict) and all(map(sources.is_data_set, dataset.values())):
        return {key: trainer._prepared(value, f"{name} {key}") for key, value in dataset.items()}
    if not isinstance(dataset, Mixture):
        dataset = sources.load(dataset, skip_bad_rows=getattr(trainer.args, "skip_bad_rows", False))
    if trainer._users_rows or trainer.is_prepared(dataset) or any(dataset is each for each in trainer.prepared_streams):
        return dataset
    with trainer.args.main_process_first(desc="preparing the data"):
        rows, trainer.reports[name] = trainer.rows(dataset, name)
    if not isinstance(rows, Dataset):
        trainer.prepared_streams.append(rows)
    if trainer._without_row is not None:
        trainer._without_row.check_dataset(rows, name)
    return rows


def lengths_of(dataset: Dataset) -> np.ndarray:
    """Tokens of each prepared row."""
    total = np.zeros(len(dataset), dtype=np.int64)
    columns = [name for name in dataset.column_names if name == "input_ids" or name.endswith("_ids")]
    place = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
        for name in columns:
            total[place : place + len(table)] += pc.list_value_length(table[name]).to_numpy().astype(np.int64)
        place += len(table)
    return total


def set_special_tokens(tokenizer: Any, eos: str | None, pad: str | None) -> None:
    """Set end and padding tokens by name; without a padding token the end token stands in (masks go by position)."""
    for what, token in (("eos_token", eos), ("pad_token", pad)):
        if token is None:
            continue
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise ValueError(f"{what}={token!r} is not in the tokenizer's vocabulary")
        setattr(tokenizer, what, token)
    if getattr(tokenizer, "pad_token", None) is None and getattr(tokenizer, "eos_token", None) is not None:
        tokenizer.pad_token = tokenizer.eos_token


def row_loader(dataset: Any, batches: Any, collate: Callable, args: Any) -> DataLoader:
    """A loader of the rows of a data set in the order of `batches`, with the worker settings of `args`."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        persistent_workers=args.dataloader_persistent_workers and args.dataloader_num_workers > 0,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )


IN_ITS_OWN_ORDER = "a stream is read in its own order: {} needs a data set that is loaded whole"


def stream_loader(dataset: Any, batch_size: int, collate: Callable, args: Any, is_training: bool) -> DataLoader:
    """A loader of this rank's batches of a stream.

    In training it has no end: `Trainer` counts the batches of a pass whose length it does not know, so that a run
    resumed in a later pass would begin the first one again.
    """
    if is_training and args.train_sampling_strategy == "group_by_length":
        raise ValueError(IN_ITS_OWN_ORDER.format("train_sampling_strategy='group_by_length'"))
    if is_training and "epoch" in (args.eval_strategy, args.save_strategy, args.logging_strategy):
        notify_once("a stream has no epochs: what is asked for once an epoch comes at the end; count in steps")
    stream = StreamBatches(
        dataset,
        batch_size,
        ranks=args.world_size,
        rank=args.process_index,
        drop_last=is_training and args.dataloader_drop_last,
        forever=is_training,
    )
    return DataLoader(BatchStream(stream), batch_size=None, collate_fn=collate)


def batches_of(dataset: Any, batch_size: int, args: Any, is_training: bool) -> RowBatches:
    """The order of the rows of a data set, and this rank's share of it."""
    return RowBatches(
        len(dataset),
        batch_size,
        shuffle=is_training and args.train_sampling_strategy != "sequential",
        seed=args.seed if args.data_seed is None else args.data_seed,
        ranks=args.world_size,
        rank=args.process_index,
        drop_last=is_training and args.dataloader_drop_last,
        lengths=lengths_of(dataset) if is_training and args.train_sampling_strategy == "group_by_length" else None,
        step_rows=batch_size * args.gradient_accumulation_steps * args.world_size,
    )


def stream_of_rounds(dataset: Any, prompts: int, turns: int, collate: Callable, args: Any) -> DataLoader:
    """A loader of a stream's prompts, a round at a time, each followed by placeholders for its further `turns`.

    Every rank gets all prompts of the round: the samples of one prompt may be drawn on several.
    """
    stream = StreamBatches(dataset, prompts, drop_last=args.dataloader_drop_last, forever=True)
    return DataLoader(BatchStream(StepSampler(stream, turns)), batch_size=None, collate_fn=collate)


def rounds_of(dataset: Any, prompts: int, args: Any) -> RowBatches:
    """The order of the prompts of a data set, a round at a time, for every rank alike."""
    return RowBatches(
        len(dataset),
        prompts,
        shuffle=bool(args.shuffle_dataset) and args.train_sampling_strategy != "sequential",
        seed=args.seed if args.data_seed is None else args.data_seed,
        drop_last=args.dataloader_drop_last,
    )


def check_order(strategy: str, takes_lengths: bool, trainer: str) -> None:
    """ValueError for a `train_sampling_strategy` that the named trainer cannot follow."""
    if strategy == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy='batch_rebalance' is not supported: the rows of a step are a run of the "
            "epoch's order here. Use 'group_by_length' for ranks of about equal work, or 'random'"
        )
    if strategy == "group_by_length" and not takes_lengths:
        raise ValueError(
            f"train_sampling_strategy='group_by_length' has no meaning for {trainer}: the lengths of its completions "
            "are not known beforehand; leave it out"
        )
