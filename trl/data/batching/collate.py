"""What the engine is fed: prompts as roots, the continuations of a prompt as branches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Branch(NamedTuple):
    """A run of tokens, and which of them are trained.

    `ids` are token ids, length L. `mask` has length L too; truthy means that the loss is taken on predicting this
    token from those before it. `row` is the index of the row in the user's data set where it is not that of the tree.
    """

    ids: Sequence[int]
    mask: Sequence[bool | int]
    row: int | None = None


class Tree(NamedTuple):
    """One prompt and what grows from it.

    Every branch continues the root. A plain sequence is a root alone. A root that has branches and trained tokens is a
    sequence of its own, before them. `row` is the index of the row in the user's data set, for error messages; -1 when
    there is none.
    """

    root: Branch
    branches: tuple[Branch, ...] = ()
    row: int = -1


def sequences(rows: Sequence[Mapping[str, Any]]) -> list[Tree]:
    """Rows with `input_ids`, `loss_mask` and `row` (as `tokens.prepare` makes them) to one tree each, root only.

    `labels` that were added to the rows since (-100 where not trained) are stronger than `loss_mask`.

    A packed row (as `packing.packed` makes them: with `lengths`, and a list under `row`) gives one tree for each piece.
    """
    trees = []
    for row in rows:
        ids, mask, lengths = row["input_ids"], trained_mask(row), row.get("lengths")
        start = 0
        for length, number in [(len(ids), row["row"])] if lengths is None else zip(lengths, row["row"], strict=True):
            end = start + int(length)
            # Nothing stands before the first token, so nothing can predict it.
            root = Branch(ids=ids[start:end], mask=[False, *mask[start + 1 : end]])
            trees.append(Tree(root=root, row=int(number)))
            start = end
    return trees


def trained_mask(row: Mapping[str, Any]) -> list[bool]:
    """Which tokens of a prepared row are trained: as its labels say, if it has any, else its `loss_mask`."""
    if row.get("labels") is None:
        return list(row["loss_mask"])
    ids, labels = row["input_ids"], row["labels"]
    if len(ids) != len(labels) or any(label not in (-100, token) for token, label in zip(ids, labels, strict=True)):
        raise ValueError(
            f"row {row.get('row', -1)}: `labels` must repeat `input_ids`, with -100 where no loss is taken, not shifted"
        )
    return [label != -100 for label in labels]


class PaddableRow(dict):
    """A prepared row as collators of transformers know rows: `input_ids`, `attention_mask` and `labels` (-100 where not
    trained). The other columns can be asked for by name, but are in no list of keys: a tokenizer pads all keys."""

    def __init__(self, row: Mapping[str, Any], labels: bool = True) -> None:
        ids, mask = list(row["input_ids"]), [1] * len(row["input_ids"])
        super().__init__(input_ids=ids, attention_mask=mask)
        if labels:
            self["labels"] = self.labels(row)
        self.row = row

    @staticmethod
    def labels(row: Mapping[str, Any]) -> list[int]:
        return [token if kept else -100 for token, kept in zip(row["input_ids"], trained_mask(row), strict=True)]

    def __missing__(self, key: str) -> Any:
        return self.row[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self or key in self.row else default


def labelled(batch: Mapping[str, Any], rows: Sequence[int]) -> list[Tree]:
    """What a collator of transformers makes (`input_ids` and `labels` [B, L], maybe `attention_mask`) to trees.

    Padding is what the attention mask leaves out; a token is trained where its label is not -100. Rows that stand one
    after the other in a single row (`DataCollatorWithFlattening`) begin where `position_ids` is 0.
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
    """An order of the rows in which equal prompts (`prompt_ids`) stand together, the earliest first."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(tuple(row["prompt_ids"]), []).append(index)
    return [index for group in groups.values() for index in group]


def tokens_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> int:
    """Tokens of the rows, each prompt counted once in each row, whatever rows share a batch."""
    return sum(len(row["prompt_ids"]) + sum(len(row[column]) for column in columns) for row in rows)


def under_prompts(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    trained: Callable[[Sequence[int]], Sequence[bool]] = lambda ids: [True] * len(ids),
) -> list[Tree]:
    """Rows with `prompt_ids`, `row` and the completions in `columns` to one tree for each run of equal prompts.

    The branches are the completions, row by row, each row's in the order of `columns`; `trained` says which tokens of a
    completion are trained.
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
