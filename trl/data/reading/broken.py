"""Rows that cannot be read: one error names them all, with their lines, or they are left out if the user asks so."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from trl.data.reading.errors import DataError
from trl.data.reading.lines import line_of

MOST = 20  # an error names at most this many rows
KEPT = 0  # the counter `_dropped` of a row that stays; other values are the reasons of a recipe

Encode = Callable[[Mapping[str, list[Any]], list[int]], dict[str, list[Any]]]


def mapped(
    encode: Encode,
    rows: datasets.Dataset,
    fingerprint: str | None = None,
    *,
    skip: bool = False,
    alone: bool = True,
    **options: Any,
) -> tuple[datasets.Dataset, list[int]]:
    """Applies `encode` to all rows, in batches.

    Args:
        encode: takes a batch (a dict of columns) and the numbers of its rows, and returns columns.
        rows: a table.
        fingerprint: names the result in the cache of `datasets`. None (the default) lets `datasets` choose.
        skip: leave out the rows for which `encode` raises `DataError`. The others keep their numbers. By default
            (False), one `DataError` names the first rows that cannot be read.
        alone: whether rows can be tried one by one (the default). If not, the first error is raised as it is.
        options: further arguments of `datasets.Dataset.map`.

    Returns the columns, and the numbers of the rows that were left out.
    """
    options = {"batched": True, "with_indices": True, **options}
    try:
        return rows.map(encode, new_fingerprint=fingerprint, **options), []
    except DataError as error:
        if not alone:
            raise
        looked = rows.map(
            _Faults(encode, skip),
            **{
                **options,
                "remove_columns": rows.column_names,
                "features": datasets.Features({"fault": datasets.Value("string")}),
                "new_fingerprint": _named(fingerprint, f"faults {skip}"),
            },
        )
        faults = {row: fault for row, fault in enumerate(looked["fault"]) if fault}
        if not faults:  # no single row causes the error
            raise
        if not skip or len(faults) == len(rows):
            raise DataError(sentence(faults, rows)) from error
    kept = np.array([row for row in range(len(rows)) if row not in faults])
    made = rows.select(kept).map(
        _Renumbered(encode, kept.tolist()), new_fingerprint=_named(fingerprint, "kept"), **options
    )
    return made, sorted(faults)


def sentence(faults: Mapping[int, str], rows: datasets.Dataset) -> str:
    """The message that says what is wrong with the rows. Faults begin with `row N`; equal ones share a line."""
    same: dict[str, list[int]] = {}
    for row, fault in sorted(faults.items())[:MOST]:
        same.setdefault(fault.removeprefix(f"row {row}"), []).append(row)
    lines = []
    for fault, which in same.items():
        also = f" The same holds for row {', '.join(map(str, which[1:]))}." if len(which) > 1 else ""
        lines.append(f"row {which[0]}{fault}{also}{line_of(rows, which)}")
    remedy = "skip_bad_rows=True (--skip_bad_rows) leaves such rows out."
    if len(faults) == 1:
        return lines[0]
    # Without `skip`, the search ends once `MOST` rows are found.
    count = f"{len(faults)} rows cannot be read."
    if len(faults) >= MOST:
        count = f"At least {count} These are the first {MOST}."
    return "\n  ".join([f"{count} {remedy}", *lines])


def each_alone(encode: Encode, batch: Mapping[str, list[Any]], indices: Sequence[int]) -> list[Any]:
    """The result of `encode` for each row by itself: its columns, or the `DataError` that it raises."""
    found: list[Any] = []
    for position, index in enumerate(indices):
        try:
            found.append(encode({column: [values[position]] for column, values in batch.items()}, [index]))
        except DataError as error:
            found.append(error)
    return found


def _named(fingerprint: str | None, what: str) -> str | None:
    return fingerprint and hashlib.sha256(f"{fingerprint} {what}".encode()).hexdigest()[:16]


class _Faults:
    """The fault of each row, None if it has none. Without `all`, rows after the first `MOST` faults are not tried."""

    def __init__(self, encode: Encode, all: bool) -> None:
        self.encode, self.all, self.found = encode, all, 0

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        nothing = [None] * len(indices)
        if self.found >= MOST and not self.all:
            return {"fault": nothing}
        try:
            self.encode(batch, indices)
            return {"fault": nothing}
        except DataError:
            each = each_alone(self.encode, batch, indices)
        faults = [str(found) if isinstance(found, DataError) else None for found in each]
        self.found += sum(fault is not None for fault in faults)
        return {"fault": faults}


class _Renumbered:
    """The encoder for a selection of rows, under the numbers that they had before."""

    def __init__(self, encode: Encode, numbers: list[int]) -> None:
        self.encode, self.numbers = encode, numbers

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        return self.encode(batch, [self.numbers[index] for index in indices])


class NumbersAsText:
    """The encoder, with the numbers of some columns turned into text.

    Whole numbers get no fraction: a column with gaps holds them as floats.
    """

    def __init__(self, encode: Encode, columns: Sequence[str]) -> None:
        self.encode, self.columns = encode, columns

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        texts = {column: [_text(value) for value in batch[column]] for column in self.columns}
        return self.encode({**batch, **texts}, indices)


def _text(value: Any) -> Any:
    if value is None or value != value:
        return None
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return str(int(value)) if whole else str(value)
