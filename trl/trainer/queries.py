"""What a loop of one's own hands in: queries a batch at a time, rows of token ids, numbers."""

from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader

from trl.data.batching.batches import RowBatches
from trl.data.reading import sources

TEXTS = ("query", "prompt", "text")


class Queries:
    """Batches of queries, in a new order each time it is iterated. Rows that fill no whole batch are left out."""

    def __init__(self, dataset: Any, batch_size: int, args: Any, collate: Callable | None = None) -> None:
        self.batches = RowBatches(
            len(dataset),
            batch_size,
            shuffle=True,
            seed=args.seed,
            ranks=args.world_size,
            rank=args.process_index,
            drop_last=True,
        )
        if not len(self.batches):
            raise ValueError(
                f"{len(dataset)} queries make no batch of {batch_size}: give more, or a smaller batch_size"
            )
        self.loader = DataLoader(dataset, batch_sampler=self.batches, collate_fn=collate or as_columns)
        self.passes = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.batches.set_epoch(self.passes)
        self.passes += 1
        yield from self.loader


def as_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns, with token ids as tensors, [T] each."""
    found = {name: [row[name] for row in rows] for name in rows[0]}
    return {**found, "input_ids": [torch.as_tensor(ids) for ids in found["input_ids"]]}


def of_texts(dataset: datasets.Dataset, tokenizer: Any, length: int, num_proc: int | None = None) -> datasets.Dataset:
    """A data set of texts with `input_ids`, the first `length` tokens of each, and `query`, what they say. One that has
    `input_ids` stays as it is."""
    if "input_ids" in dataset.column_names:
        return dataset
    texts = [
        name
        for name, feature in dataset.features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    column = next((name for name in TEXTS if name in texts), next(iter(texts), None))
    if column is None:
        raise ValueError(
            f"no column of the queries holds texts or `input_ids`; the columns are {', '.join(dataset.column_names)}"
        )

    def tokenised(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        ids = [each[:length] for each in tokenizer(rows[column])["input_ids"]]
        return {"input_ids": ids, "query": tokenizer.batch_decode(ids, skip_special_tokens=True)}

    found = dataset.map(tokenised, batched=True, num_proc=num_proc, desc="Tokenising queries")
    return found.filter(lambda ids: len(ids) > 0, input_columns="input_ids")


def opened(dataset: Any, args: Any) -> Any:
    """None as the data set of `query_dataset`; names, files and rows of texts as data sets; anything else as it is."""
    if dataset is None:
        return default(args)
    rows = isinstance(dataset, list) and bool(dataset) and isinstance(dataset[0], Mapping)
    if isinstance(dataset, str | PathLike) or (rows and "input_ids" not in dataset[0]):
        return sources.load(dataset)
    return dataset


def default(args: Any) -> datasets.Dataset:
    """The data set that `query_dataset` names. ValueError, which names the arguments, if it cannot be loaded."""
    try:
        return sources.load(args.query_dataset)
    except Exception as error:  # of the hub, of a file, of its format
        reason = " ".join(str(error).split())
        raise ValueError(
            f"no dataset= is given, and query_dataset={args.query_dataset!r} cannot be loaded: {reason} Pass dataset=, "
            "or a file or a data set within reach as query_dataset in the config."
        ) from error


def token_rows(values: Any, what: str, pad: int | None, vocabulary: int | None = None) -> list[list[int]]:
    """Rows of token ids: of a list of 1-D tensors, of one, or of a batch [B, T], whose padding is left out. `what` they
    are is for the error. ValueError for an id that is not below `vocabulary`."""
    if isinstance(values, torch.Tensor) and values.dim() < 2:
        values = [values]
    if not isinstance(values, torch.Tensor | list | tuple):
        raise ValueError(f"{what}: a list of 1-D tensors of token ids is wanted, not a {type(values).__name__}")
    rows = [each.tolist() if isinstance(each, torch.Tensor) else list(each) for each in values]
    if isinstance(values, torch.Tensor):
        rows = [_unpadded(row, pad) for row in rows]
    for place, row in enumerate(rows):
        if not row or not all(isinstance(each, int) for each in row):
            kind = "has no tokens" if not row else "is not a row of token ids"
            raise ValueError(f"{what} {place} {kind}: each is a 1-D tensor of one token id or more")
        if vocabulary is not None and not 0 <= min(row) <= max(row) < vocabulary:
            raise ValueError(f"{what} {place} has a token id outside the model's vocabulary, 0 to {vocabulary - 1:,}")
    return rows


def _unpadded(row: list[int], pad: int | None) -> list[int]:
    """A row without its padding, at either end; of tokens that pad and end a text, one stays."""
    start, end = 0, len(row)
    while start < end and row[start] == pad:
        start += 1
    while end > start + 1 and row[end - 1] == pad and row[end - 2] == pad:
        end -= 1
    return row[start:end]


def numbers(scores: Any) -> torch.Tensor:
    """Scores as a tensor [S], fp32: of tensors with one number each, of numbers, or of one tensor."""
    values = scores.flatten().tolist() if isinstance(scores, torch.Tensor) else list(scores)
    found = []
    for place, value in enumerate(values):
        number = torch.as_tensor(value, dtype=torch.float32).flatten()
        if number.numel() != 1 or not bool(torch.isfinite(number).all()):
            raise ValueError(f"score {place} is {value!r}: each response has one finite number")
        found.append(float(number))
    return torch.tensor(found)


def listed(values: Any, name: str) -> list[Any]:
    """The rows of an argument, also of a column of a data set. ValueError if it is no list."""
    if isinstance(values, str | torch.Tensor | dict) or not hasattr(values, "__getitem__"):
        raise ValueError(f"{name} must be a list with an entry for each row, not a {type(values).__name__}")
    return list(values[:])


def strings(values: Any, name: str) -> list[str]:
    """The texts of an argument. ValueError if an entry is no string."""
    found = listed(values, name)
    for place, each in enumerate(found):
        if not isinstance(each, str):
            raise ValueError(f"{name} {place} is a {type(each).__name__}: texts are strings")
    return found


def check_lengths(rows: list[list[int]], others: list[list[int]], name: str) -> None:
    """ValueError if `others`, the argument `name`, has not an entry for each token id of `rows`."""
    if len(rows) != len(others):
        raise ValueError(f"{name}: here are {len(others)} for {len(rows)} rows of input_ids")
    for place, (row, other) in enumerate(zip(rows, others, strict=True)):
        if len(row) != len(other):
            raise ValueError(f"{name} {place} has {len(other)} entries for {len(row)} token ids")
