"""From rows to a table of tokens: the options of a preparation, each declared once, and the one pass over the data."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import datasets
import numpy as np
import transformers
from transformers import PreTrainedTokenizerBase

from trl.data.reading import broken
from trl.data.reading.broken import KEPT
from trl.data.reading.formats import Shape
from trl.data.reading.sources import ORIGIN, DataError, as_shown, from_rows
from trl.data.report import DataReport, Dropped
from trl.data.tokenizing import chat
from trl.data.tokenizing.encode import Encoder

RECIPE = 4  # raise it when the same options come to give other tokens, so that no stale cache is read


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How rows become tokens. The fields are the options of `prepare` and `prepare_stream`.

    `shape` is how the rows are read; it is detected when it is not given, with `columns`, which says which column holds
    which part (see `formats.detect`). `max_length` is in tokens, special ones included (None: no limit);
    `truncation_mode` says which end stays, `keep_start` or `keep_end`. `add_eos` appends the tokenizer's EOS to plain
    text and plain completions that lack it; a conversation is what its chat template makes of it. `skip_bad_rows`
    leaves out rows that cannot be read, and counts them.
    """

    shape: Shape | None = None
    columns: Mapping[str, str] | None = None
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    add_eos: bool = True
    skip_bad_rows: bool = False

    def detect(self, dataset: datasets.Dataset) -> Shape:
        """The shape of the rows, where it is not given."""
        raise NotImplementedError

    def check(self, shape: Shape, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises `DataError` for options that do not fit the data."""
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise DataError(
                f"truncation_mode={self.truncation_mode!r} is not known: choose 'keep_start' or 'keep_end'."
            )
        if self.max_length is not None and self.max_length < 2:
            raise DataError(
                f"max_length={self.max_length} leaves nothing to predict: give at least 2, or None for no limit."
            )
        if shape.conversational:
            chat.chat_template(tokenizer)  # so that a missing one is not blamed on a row

    def encoder(self, tokenizer: PreTrainedTokenizerBase, shape: Shape, first_row: int = 0) -> Encoder:
        """What tokenises a batch of rows, which are numbered from `first_row` on."""
        raise NotImplementedError

    def aggregate(
        self,
        table: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        shape: Shape,
        name: str,
        first_row: int = 0,
    ) -> tuple[datasets.Dataset, DataReport]:
        """Takes the counters off the table and the dropped rows out of it, and writes the report, which numbers the
        rows as the user does."""
        raise NotImplementedError


def prepare(
    recipe: Recipe,
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[datasets.Dataset, DataReport]:
    """The rows as `recipe` makes them, those left out gone, and the report of what was done."""
    shape, table, bad = tabulate(recipe, dataset, tokenizer, num_proc, name)
    prepared, report = recipe.aggregate(table, tokenizer, shape, name)
    count_bad(report, bad)
    return prepared, report


def count_bad(report: DataReport, bad: Sequence[int]) -> None:
    """Puts rows that could not be read, and were left out, into the report."""
    if bad:
        report.rows_read += len(bad)
        report.dropped.insert(0, {"reason": broken.SKIPPED, "count": len(bad), "rows": list(bad[:5])})


def tabulate(
    recipe: Recipe,
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    num_proc: int | None = None,
    name: str = "train",
    first_row: int = 0,
) -> tuple[Shape, datasets.Dataset, list[int]]:
    """The first half of `prepare`: every row as tokens and counters, and the numbers of those that could not be read
    and are left out already. Rows are numbered from `first_row` on."""
    if len(dataset) == 0:
        raise DataError(f"{name}: the data set has no rows.")
    dataset = as_shown(dataset)
    shape = recipe.detect(dataset) if recipe.shape is None else recipe.shape
    shape = shape.with_template(bool(tokenizer.chat_template))
    recipe.check(shape, tokenizer)
    encoder = recipe.encoder(tokenizer, shape, first_row)
    wanted = dataset.with_format(None)
    if not shape.formatting:  # which may read any column
        wanted = wanted.select_columns(list(dict.fromkeys(shape.columns.values())))
    setattr(wanted, ORIGIN, getattr(dataset, ORIGIN, (None, 0)))
    table, bad = broken.mapped(
        broken.NumbersAsText(encoder, shape.numbers) if shape.numbers else encoder,
        wanted,
        fingerprint(encoder, wanted),
        skip=recipe.skip_bad_rows,
        alone=shape.formatting != "batch",
        remove_columns=wanted.column_names,
        features=encoder.features,
        num_proc=num_proc,
        desc=f"Tokenising {name}",
    )
    return shape, table, bad


def fingerprint(encoder: Encoder, dataset: datasets.Dataset) -> str:
    """Names the result in the cache of `datasets`, which by itself takes seconds to hash a large vocabulary."""
    tokenizer, recipe = encoder.tokenizer, encoder.recipe
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    options = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    options["formatting_func"] = datasets.fingerprint.Hasher.hash(options.get("formatting_func"))
    special = (type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.chat_template)
    own = (type(recipe).__name__, encoder.shape, encoder.first_row, sorted(options.items()))
    parts = (RECIPE, dataset._fingerprint, transformers.__version__, vocabulary, special, own)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def prepare_stream(
    recipe: Recipe,
    stream: datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    name: str = "train",
    look_at: int = 1000,
) -> tuple[datasets.IterableDataset, DataReport]:
    """`prepare` for a stream: rows are tokenised as they are asked for, in their order, in one pass.

    The shape and the report are those of the first `look_at` rows, and the report says so. `state_dict` and
    `load_state_dict` of the result continue it where it was, with the same rows to come; at most one batch of rows is
    then tokenised a second time.
    """
    stream = as_shown(stream)
    head = from_rows(list(stream.take(look_at)))
    if len(head) == 0:
        raise DataError(f"{name}: the stream has no rows.")
    shape, table, bad = tabulate(recipe, head, tokenizer, name=name)
    _, report = recipe.aggregate(table, tokenizer, shape, name)
    count_bad(report, bad)
    report.looked_at = len(head)
    encoder = recipe.encoder(tokenizer, shape)
    prepared = stream.map(
        _KeptOnly(encoder),
        batched=True,
        batch_size=100,
        with_indices=True,
        remove_columns=stream.column_names or head.column_names,
        features=datasets.Features({column: encoder.features[column] for column in without_counters(encoder.features)}),
    )
    return prepared, report


class _KeptOnly:
    """The rows of a stream that have something to train on, without the counters."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        # A row that lacks a field, in a stream that does not know its columns, has it as None.
        shape = self.encoder.shape
        batch = {**{column: [None] * len(indices) for column in shape.columns.values()}, **batch}
        encode = broken.NumbersAsText(self.encoder, shape.numbers) if shape.numbers else self.encoder
        try:
            table = encode(batch, indices)
        except DataError:
            if not self.encoder.recipe.skip_bad_rows:
                raise
            tables = [each for each in broken.each_alone(encode, batch, indices) if not isinstance(each, DataError)]
            table = {column: [row for each in tables for row in each[column]] for column in self.encoder.features}
        kept = [position for position, dropped in enumerate(table["_dropped"]) if dropped == KEPT]
        return {column: [table[column][position] for position in kept] for column in without_counters(table)}


def without_counters(columns: Any) -> list[str]:
    """The names of those columns that are not counters."""
    return [column for column in columns if not column.startswith("_")]


def counters(table: datasets.Dataset) -> dict[str, np.ndarray]:
    """The counters of a table, by name, and the numbers of its rows under `row`."""
    names = [column for column in table.column_names if column.startswith("_")]
    return {name: table.data.column(name).to_numpy() for name in (*names, "row")}


def left(
    table: datasets.Dataset,
    count: Mapping[str, np.ndarray],
    shape: Shape,
    name: str,
    first_row: int,
    reasons: Mapping[int, str],
    remedies: Mapping[int, str],
    main_parts: Sequence[str],
) -> tuple[datasets.Dataset, list[Dropped]]:
    """The table without counters and dropped rows, and what was dropped. Raises `DataError` when nothing is left."""
    rows, why = count["row"] - first_row, count["_dropped"]
    kept = why == KEPT
    dropped: list[Dropped] = []
    for reason, words in reasons.items():
        which = rows[why == reason]
        if len(which):
            dropped.append({"reason": words, "count": len(which), "rows": which[:5].tolist()})
    if not kept.any():
        first = int(why[0]) if len(rows) else next(iter(reasons))
        columns = [column for part, column in shape.columns.items() if part in main_parts]
        field = ", ".join(f"`{column}`" for column in columns or ["formatting_func"])
        each = "; ".join(f"{entry['reason']} ({entry['count']})" for entry in dropped)
        raise DataError(
            f"{name}: none of the {len(rows)} rows can be trained on: {each}. The first is row 0, {field}: "
            f"{reasons[first]}. {remedies[first]}"
        )
    prepared = table.select_columns(without_counters(table.column_names))
    return prepared if kept.all() else prepared.select(np.flatnonzero(kept)), dropped


def spread(lengths: np.ndarray) -> dict[str, int]:
    """The shortest, the middle, the longest but for one in twenty, and the longest."""
    return {
        "min": int(lengths.min()),
        "median": round(float(np.median(lengths))),
        "p95": round(float(np.percentile(lengths, 95))),
        "max": int(lengths.max()),
    }
