"""Trees, the input of the engine: prompts are roots, and the completions of a prompt are its branches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Branch(NamedTuple):
    """A run of tokens, and which of them are trained.

    Args:
        ids: L token ids.
        mask: L values. Truthy means that the loss is taken on predicting this token from those before it.
        row: the index of the row in the user's data set, if it is not that of the tree. None by default.
    """

    ids: Sequence[int]
    mask: Sequence[bool | int]
    row: int | None = None


class Tree(NamedTuple):
    """A prompt and its completions.

    Every branch continues the root. A plain sequence is a root alone. A root with branches and trained tokens is a
    sequence of its own, which comes before theirs.

    Args:
        root: the prompt.
        branches: its completions; none by default.
        row: the index of the row in the user's data set, for error messages; -1 (the default) if there is none.
    """

    root: Branch
    branches: tuple[Branch, ...] = ()
    row: int = -1


def sequences(rows: Sequence[Mapping[str, Any]]) -> list[Tree]:
    """One tree, a root alone, for each row with `input_ids`, `loss_mask` and `row` (from `prepare_sequences`).

    `labels` in a row (-100 where not trained) take precedence over `loss_mask`. A packed row (from `packing.packed`,
    with `lengths`, and a list in `row`) gives one tree for each piece.
    """
    trees = []
    for row in rows:
        ids, mask, lengths = row["input_ids"], trained_mask(row), row.get("lengths")
        start = 0
        for length, number in [(len(ids), row["row"])] if lengths is None else zip(lengths, row["row"], strict=True):
            end = start + int(length)
            # No token stands before the first one, so it cannot be predicted.
            root = Branch(ids=ids[start:end], mask=[False, *mask[start + 1 : end]])
            trees.append(Tree(root=root, row=int(number)))
            start = end
    return trees


def trained_mask(row: Mapping[str, Any]) -> list[bool]:
    """Which tokens of a prepared row are trained: by its `labels`, if it has any, else by its `loss_mask`.

    Raises `ValueError` if the labels are not the tokens themselves or -100.
    """
    if row.get("labels") is None:
        return list(row["loss_mask"])
    ids, labels = row["input_ids"], row["labels"]
    if len(ids) != len(labels) or any(label not in (-100, token) for token, label in zip(ids, labels, strict=True)):
        raise ValueError(
            f"row {row.get('row', -1)}: `labels` must repeat `input_ids`, with -100 where no loss is taken, not shifted"
        )
    return [label != -100 for label in labels]


class PaddableRow(dict):
    """A prepared row for collators of transformers, with `input_ids`, `attention_mask` and `labels`.

    A label is the token, or -100 where it is not trained. The other columns can be read by name, but are not among the
    keys, because a tokenizer pads all keys.
    """

    def __init__(self, row: Mapping[str, Any], labels: bool = True) -> None:
        ids, mask = list(row["input_ids"]), [1] * len(row["input_ids"])
        super().__init__(input_ids=ids, attention_mask=mask)
        if labels:
            self["labels"] = self.labels(row)
        self.row = row

    @staticmethod
    def labels(row: Mapping[str, Any]) -> list[int]:
        """The labels of a prepared row: its tokens, or -100 where they are not trained."""
        return [token if kept else -100 for token, kept in zip(row["input_ids"], trained_mask(row), strict=True)]

    def __missing__(self, key: str) -> Any:
        return self.row[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The value of any column of the row, or `default`."""
        return self[key] if key in self or key in self.row else default


def labelled(batch: Mapping[str, Any], rows: Sequence[int]) -> list[Tree]:
    """The batch of a collator of transformers, as one tree for each row.

    Args:
        batch: `input_ids` and `labels` [B, L], maybe `attention_mask` [B, L], which is 0 at padding. A token is trained
            if its label is not -100. Rows one after another in a single row (`DataCollatorWithFlattening`) begin where
            `position_ids` [1, L] is 0.
        rows: the index of each row in the user's data set.

    Raises `ValueError` for a batch without these keys, with another number of rows, or with labels that differ from
    `input_ids`.
    """
    trees = []
    for number, (ids, labels) in enumerate(zip(*_pieces(batch, len(rows)), strict=True)):
        mask = labels != -100
        mask[:1] = False
        if not np.array_equal(labels[mask], ids[mask]):
            raise ValueError(
                f"row {rows[number]}: the data collator returned labels that differ from input_ids: a causal model is "
                "trained on the tokens themselves, not shifted (masked language modelling is not; set mlm=False)"
            )
        trees.append(Tree(root=Branch(ids=ids.tolist(), mask=mask.tolist()), row=rows[number]))
    return trees


def _pieces(batch: Mapping[str, Any], count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids and labels of each row, without padding."""
    if "input_ids" not in batch or "labels" not in batch:
        raise ValueError(f"the data collator must return input_ids and labels; it returned {sorted(batch)}")
    ids: Any = np.asarray(batch["input_ids"])
    labels: Any = np.asarray(batch["labels"])
    if batch.get("attention_mask") is not None:
        keep = np.asarray(batch["attention_mask"]).astype(bool)
        ids, labels = ([row[kept] for row, kept in zip(grid, keep, strict=True)] for grid in (ids, labels))
    elif len(ids) == 1 and batch.get("position_ids") is not None:
        starts = np.flatnonzero(np.asarray(batch["position_ids"])[0] == 0)[1:]
        ids, labels = np.split(ids[0], starts), np.split(labels[0], starts)
    if len(ids) != count:
        raise ValueError(
            f"the data collator returned {len(ids)} rows of {count}: return one row for each (packing=True packs rows)"
        )
    return list(ids), list(labels)


def by_prompt(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """An order of the rows in which equal prompts (`prompt_ids`) are neighbours, the earliest first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(tuple(row["prompt_ids"]), []).append(index)
    return [index for group in groups.values() for index in group]


def tokens_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> int:
    """The number of tokens in `prompt_ids` and in the completions of `columns`. A prompt counts once in each row."""
    return sum(len(row["prompt_ids"]) + sum(len(row[column]) for column in columns) for row in rows)


def under_prompts(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    trained: Callable[[Sequence[int]], Sequence[bool]] = lambda ids: [True] * len(ids),
) -> list[Tree]:
    """One tree for each run of rows with equal prompts.

    Args:
        rows: rows with `prompt_ids`, `row`, and completions (token ids) in `columns`.
        columns: the columns of completions. The branches of a tree are the completions row by row, in this order.
        trained: takes the token ids of a completion and returns which of them are trained; all by default.
    """
    trees: list[Tree] = []
    prompt: Sequence[int] | None = None
    for row in rows:
        branches = tuple(Branch(row[column], trained(row[column]), int(row["row"])) for column in columns)
        if trees and row["prompt_ids"] == prompt:
            trees[-1] = trees[-1]._replace(branches=trees[-1].branches + branches)
        else:
            prompt = row["prompt_ids"]
            trees.append(Tree(Branch(prompt, [False] * len(prompt)), branches, int(row["row"])))
    return trees
