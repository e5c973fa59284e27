"""The recipe: how the rows of a data set become tokens. One reader serves every recipe, for tables and for streams."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import datasets
import numpy as np
import transformers
from transformers import PreTrainedTokenizerBase

from trl.data.reading import broken
from trl.data.reading.broken import KEPT
from trl.data.reading.errors import DataError
from trl.data.reading.formats import Shape
from trl.data.reading.lines import NO_ORIGIN, ORIGIN
from trl.data.reading.sources import UNREADABLE, as_shown, check_files, from_rows
from trl.data.report import Dropped
from trl.data.tokenizing import chat
from trl.data.tokenizing.encode import Encoder

CACHE_VERSION = 4  # raise it when the same options give other tokens, so that no stale cache is read
STREAM_BATCH = 100  # rows of a stream that are tokenised together


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How rows become tokens. The fields are the options of `prepare`.

    Args:
        shape: how the rows are read. None (the default) detects it.
        columns: which column holds which part, as in `{"prompt": "question"}` (see `formats.detect`). None (the
            default) goes by the columns' names.
        skip_bad_rows: leave out and count the rows that cannot be read. False (the default) raises `DataError`.

    A subclass names its `counters`: columns that travel beside the tokens until the report is written. `_dropped` is
    one of them, and `KEPT` for a row that stays. With `keeps_columns` the other columns of the rows stay too.
    """

    shape: Shape | None = None
    columns: Mapping[str, str] | None = None
    skip_bad_rows: bool = False

    counters: ClassVar[tuple[str, ...]]
    keeps_columns: ClassVar[bool] = False

    def rename(self, rows: Any, names: Sequence[str]) -> Any:
        """The rows (a table or a stream, with columns of these `names`) under the column names that `detect` reads."""
        return rows

    def detect(self, dataset: datasets.Dataset) -> Shape:
        """The shape of the rows, where it is not given. Raises `DataError` if the columns do not tell."""
        raise NotImplementedError

    def check(self, shape: Shape, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises `DataError` for options that do not fit the data."""
        if shape.conversational:
            chat.chat_template(tokenizer)  # so that no row is blamed for a missing template

    def check_parts(self, reports: Sequence[Any]) -> None:
        """Raises `DataError` if the data sets of a mix, which have these reports, do not go together."""

    def encoder(self, tokenizer: PreTrainedTokenizerBase, shape: Shape, first_row: int = 0) -> Encoder:
        """The function that tokenises a batch of rows. Rows are numbered from `first_row` on."""
        raise NotImplementedError

    def aggregate(
        self,
        table: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        shape: Shape,
        name: str,
        first_row: int = 0,
    ) -> tuple[datasets.Dataset, Any]:
        """The table without counters and dropped rows, and the report, which numbers the rows as the user does."""
        raise NotImplementedError

    def count(self, table: datasets.Dataset) -> dict[str, np.ndarray]:
        """The counters of a table by name, [rows] each, and the row numbers under `row`."""
        return {name: table.data.column(name).to_numpy() for name in (*self.counters, "row")}


@dataclass(frozen=True, kw_only=True)
class TrainedRecipe(Recipe):
    """A recipe for rows whose tokens are trained on.

    Args:
        max_length: the most tokens that a row may have, special ones included, at least 2. None (the default): no
            limit.
        truncation_mode: which end of a longer row stays: "keep_start" (the default) or "keep_end".
        add_eos: append the tokenizer's EOS to plain texts and plain completions that lack it (the default). A
            conversation stays as its chat template writes it.
    """

    max_length: int | None = None
    truncation_mode: str = "keep_start"
    add_eos: bool = True

    def check(self, shape: Shape, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise DataError(
                f"truncation_mode={self.truncation_mode!r} is not known: choose 'keep_start' or 'keep_end'."
            )
        if self.max_length is not None and self.max_length < 2:
            raise DataError(
                f"max_length={self.max_length} leaves nothing to predict: give at least 2, or None for no limit."
            )
        super().check(shape, tokenizer)


def check_limit(recipe: Recipe, option: str) -> None:
    """Raises `DataError` if an option of a recipe, a limit in tokens, is below 1."""
    value = getattr(recipe, option)
    if value is not None and value < 1:
        raise DataError(f"{option}={value} leaves nothing: give at least 1, or None for no limit.")


def prepare(
    recipe: Recipe,
    rows: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "train",
    num_proc: int | None = None,
    look_at: int = 1000,
    first_row: int = 0,
) -> tuple[Any, Any]:
    """Tokenises rows by a recipe.

    Args:
        recipe: how the rows become tokens.
        rows: a table or a stream. A stream is tokenised as it is read, in its order, in one pass.
        tokenizer: a tokenizer of transformers.
        name: what the report and the errors call the data set; "train" by default.
        num_proc: processes that tokenise a table. None (the default): this one.
        look_at: the first rows of a stream that its shape and its report are taken from; 1000 by default.
        first_row: the number of the first row of a stream, in the column `row`; 0 by default.

    Returns:
        The tokenised rows, a table or a stream as `rows` is, without the dropped ones, and the report of what was
        done. The result of a stream has `state_dict` and `load_state_dict`, which continue it with the rows that were
        still to come. At most one batch of rows is then tokenised a second time.

    Raises `DataError`, which names the row, the field and the remedy, for a row that cannot be read, for options that
    do not fit the data, and when no row is left.
    """
    if isinstance(rows, datasets.IterableDataset):
        return _prepare_stream(recipe, rows, tokenizer, name, look_at, first_row)
    shape, table, bad = tabulate(recipe, rows, tokenizer, num_proc, name)
    prepared, report = recipe.aggregate(table, tokenizer, shape, name)
    report.add_unreadable(bad)
    return prepared, report


def read_shape(recipe: Recipe, dataset: datasets.Dataset) -> tuple[datasets.Dataset, Shape]:
    """The rows of a table in plain values, under the names that the recipe reads, and their shape."""
    shown = as_shown(dataset)
    shown = recipe.rename(shown, shown.column_names)
    return shown, recipe.detect(shown) if recipe.shape is None else recipe.shape


def tabulate(
    recipe: Recipe,
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    num_proc: int | None = None,
    name: str = "train",
    first_row: int = 0,
) -> tuple[Shape, datasets.Dataset, list[int]]:
    """The first half of `prepare`, for a table: its shape, every row as tokens and counters, and the numbers of the
    rows that could not be read and are already left out. Rows are numbered from `first_row` on."""
    if len(dataset) == 0:
        raise DataError(f"{name}: the data set has no rows.")
    shown, shape = read_shape(recipe, dataset)
    shape = shape.with_template(bool(tokenizer.chat_template))
    recipe.check(shape, tokenizer)
    encoder = recipe.encoder(tokenizer, shape, first_row)
    wanted = shown.with_format(None)
    if not shape.formatting and not recipe.keeps_columns:  # a formatting function may read any column
        wanted = wanted.select_columns(list(dict.fromkeys(shape.columns.values())))
    setattr(wanted, ORIGIN, getattr(dataset, ORIGIN, NO_ORIGIN))
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
    parts = (CACHE_VERSION, dataset._fingerprint, transformers.__version__, vocabulary, special, own)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _prepare_stream(
    recipe: Recipe,
    stream: datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    look_at: int,
    first_row: int,
) -> tuple[datasets.IterableDataset, Any]:
    given, stream = stream, as_shown(stream)
    try:
        head = from_rows(list(stream.take(look_at)))
    except UNREADABLE:
        check_files(given)  # names the broken file
        raise
    if len(head) == 0:
        raise DataError(f"{name}: the stream has no rows.")
    setattr(head, ORIGIN, getattr(given, ORIGIN, NO_ORIGIN))
    shape, table, bad = tabulate(recipe, head, tokenizer, name=name)
    _, report = recipe.aggregate(table, tokenizer, shape, name)
    report.add_unreadable(bad)
    report.looked_at = len(head)
    encoder = recipe.encoder(tokenizer, shape, first_row)
    names = stream.column_names or head.column_names
    stream = recipe.rename(stream, names)
    features = encoder.features and datasets.Features(
        {column: feature for column, feature in encoder.features.items() if column not in recipe.counters}
    )
    prepared = stream.map(
        _KeptOnly(encoder),
        batched=True,
        batch_size=STREAM_BATCH,
        with_indices=True,
        remove_columns=stream.column_names or names,
        features=features,
    )
    return prepared, report


class _KeptOnly:
    """The encoder for a stream: dropped rows are left out, and so are the counters."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def __call__(self, batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        shape, recipe = self.encoder.shape, self.encoder.recipe
        # In a stream without column names a row may lack a field: it is then None.
        batch = {**{column: [None] * len(indices) for column in shape.columns.values()}, **batch}
        encode = broken.NumbersAsText(self.encoder, shape.numbers) if shape.numbers else self.encoder
        try:
            table = encode(batch, indices)
        except DataError:
            if not recipe.skip_bad_rows:
                raise
            tables = [each for each in broken.each_alone(encode, batch, indices) if not isinstance(each, DataError)]
            columns = tables[0] if tables else self.encoder.features or (*batch, *recipe.counters)
            table = {column: [row for each in tables for row in each[column]] for column in columns}
        kept = [position for position, dropped in enumerate(table["_dropped"]) if dropped == KEPT]
        return {
            column: [values[position] for position in kept]
            for column, values in table.items()
            if column not in recipe.counters
        }


def drop_rows(
    recipe: Recipe,
    table: datasets.Dataset,
    shape: Shape,
    name: str,
    first_row: int,
    reasons: Mapping[int, str],
    remedies: Mapping[int, str],
    main_parts: Sequence[str],
) -> tuple[datasets.Dataset, list[Dropped]]:
    """The table without counters and dropped rows, and what was dropped.

    `reasons` and `remedies` put the values of the counter `_dropped` into words. Raises `DataError` when no row is
    left; it names the columns of `main_parts`.
    """
    count = recipe.count(table)
    rows, why = count["row"] - first_row, count["_dropped"]
    kept = why == KEPT
    dropped: list[Dropped] = []
    for reason, words in reasons.items():
        which = rows[why == reason]
        if len(which):
            dropped.append({"reason": words, "count": len(which), "rows": which[:5].tolist()})
    if not kept.any():
        first = int(why[0])
        columns = [column for part, column in shape.columns.items() if part in main_parts]
        field = ", ".join(f"`{column}`" for column in columns or ["formatting_func"])
        each = "; ".join(f"{entry['reason']} ({entry['count']})" for entry in dropped)
        raise DataError(
            f"{name}: none of the {len(rows)} rows can be trained on: {each}. The first is row {rows[0]}, {field}: "
            f"{reasons[first]}. {remedies[first]}"
        )
    prepared = table.remove_columns([column for column in table.column_names if column in recipe.counters])
    return prepared if kept.all() else prepared.select(np.flatnonzero(kept)), dropped


def length_summary(lengths: np.ndarray) -> dict[str, int]:
    """Minimum, median, 95th percentile and maximum."""
    return {
        "min": int(lengths.min()),
        "median": round(float(np.median(lengths))),
        "p95": round(float(np.percentile(lengths, 95))),
        "max": int(lengths.max()),
    }
