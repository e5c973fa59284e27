"""Prompts paired with completions of other prompts. KTO estimates the divergence from the reference on them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from trl.data.reading.errors import DataError

COLUMN = "kl_completion_ids"
STREAM_ROWS = 1000  # in a stream, rows exchange completions within blocks of this many rows


def mismatched(rows: Dataset | IterableDataset, *, seed: int, max_length: int | None) -> Dataset | IterableDataset:
    """Adds to each row a completion of another prompt, in the column `kl_completion_ids`.

    The completion is drawn once from the whole data set (in a stream: from a block of `STREAM_ROWS` rows), so that it
    does not depend on the batch or the rank.

    Args:
        rows: rows with `prompt_ids` and `completion_ids`. Rows that have the column already stay as they are.
        seed: the seed of the draw.
        max_length: the most tokens of a prompt with its new completion, which is cut to fit. None: no limit.

    Raises `DataError` if there is only one row.
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
    """For each row the index of another row, [rows], with another prompt if there is one. Each is drawn about once."""
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
    """The completions of the rows `drawn`, each cut so that it fits with its new prompt, but never to nothing."""
    chosen = [completions[index] for index in drawn]
    if max_length is None:
        return chosen
    pairs = zip(prompts, chosen, strict=True)
    return [completion[: max(max_length - len(prompt), 1)] for prompt, completion in pairs]
