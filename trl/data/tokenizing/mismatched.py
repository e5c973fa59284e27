"""Prompts with completions of other prompts: what an estimate of the divergence from a reference is taken on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from trl.data.reading.errors import DataError

COLUMN = "kl_completion_ids"
STREAM_ROWS = 1000  # of a stream, the completion comes from one of so many rows


def mismatched(rows: Dataset | IterableDataset, *, seed: int, max_length: int | None) -> Dataset | IterableDataset:
    """The rows with a completion of another prompt beside their own, in the column `kl_completion_ids`.

    Which one is drawn once, by `seed`, out of the whole data set (of a stream: out of a thousand rows), so that it
    depends neither on the batch nor on the rank. It is cut so that prompt and completion have `max_length` tokens at
    most. Raises `DataError` when there is no other row to draw from.
    """
    if COLUMN in (rows.column_names or ()):
        return rows
    if isinstance(rows, IterableDataset):

        def together(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
            drawn = partners(columns["prompt_ids"], seed)
            return {**columns, COLUMN: cut(columns["prompt_ids"], columns["completion_ids"], drawn, max_length)}

        return rows.map(together, batched=True, batch_size=STREAM_ROWS)
    if len(rows) < 2:
        raise DataError("KTO compares completions with those of other prompts, and the data set has one row only.")
    prompts, completions = list(rows["prompt_ids"]), list(rows["completion_ids"])
    return rows.add_column(COLUMN, cut(prompts, completions, partners(prompts, seed), max_length))


def partners(prompts: Sequence[Sequence[int]], seed: int) -> np.ndarray:
    """For each row another one, of another prompt where there is one; each row is drawn about once."""
    count = len(prompts)
    generator = np.random.default_rng(seed)
    order = generator.permutation(count)
    drawn = np.empty(count, dtype=np.int64)
    drawn[order] = np.roll(order, -1)
    numbers: dict[tuple[int, ...], int] = {}
    group = np.array([numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts])
    if len(numbers) == 1:
        return drawn
    while len(alike := np.flatnonzero(group == group[drawn])):
        drawn[alike] = generator.integers(count, size=len(alike))
    return drawn


def cut(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], drawn: np.ndarray, max_length: int | None
) -> list[Sequence[int]]:
    chosen = [completions[index] for index in drawn]
    if max_length is None:
        return chosen
    pairs = zip(prompts, chosen, strict=True)
    return [completion[: max(max_length - len(prompt), 1)] for prompt, completion in pairs]
