"""What the engine is fed: prompts as roots, the continuations of a prompt as branches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


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

    A packed row (as `packing.packed` makes them: with `lengths`, and a list under `row`) gives one tree for each piece.
    """
    trees = []
    for row in rows:
        ids, mask, lengths = row["input_ids"], row["loss_mask"], row.get("lengths")
        start = 0
        for length, number in [(len(ids), row["row"])] if lengths is None else zip(lengths, row["row"], strict=True):
            end = start + int(length)
            # Nothing stands before the first token, so nothing can predict it.
            root = Branch(ids=ids[start:end], mask=[False, *mask[start + 1 : end]])
            trees.append(Tree(root=root, row=int(number)))
            start = end
    return trees


def labelled(batch: Mapping[str, Any], rows: Sequence[int]) -> list[Tree]:
    """What a collator of transformers makes (`input_ids` and `labels` [B, L], maybe `attention_mask`) to trees.

    Padding is what the attention mask leaves out; a token is trained where its label is not -100.
    """
    if "input_ids" not in batch or "labels" not in batch:
        raise ValueError(f"the data collator must return input_ids and labels; it returned {sorted(batch)}")
    trees = []
    for number, row in enumerate(rows):
        keep = slice(None) if batch.get("attention_mask") is None else batch["attention_mask"][number].bool()
        ids, labels = batch["input_ids"][number][keep], batch["labels"][number][keep]
        mask = (labels != -100).tolist()
        mask[:1] = [False]
        trees.append(Tree(root=Branch(ids=ids.tolist(), mask=mask), row=row))
    return trees


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
