"""Mixes: several data sets that are trained on as one. Each is read by its own shape."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from trl.data.reading.errors import DataError
from trl.data.reading.sources import load
from trl.data.tokenizing import recipe
from trl.data.tokenizing.recipe import Recipe
from trl.near import near

STREAM_ROWS = 10**12  # the first row of a streamed part is numbered by a multiple of it: no length is known


@dataclass
class DatasetConfig:
    """One data set of a mix.

    Args:
        path, name, data_dir, data_files, split: the arguments `source`, `config`, `data_dir`, `data_files` and `split`
            of `sources.load`.
        columns: a list of the columns to keep, or which column holds which part, as in `{"prompt": "question",
            "completion": "answer"}`. None (the default) keeps all.
        fraction: the share of the rows to take, above 0 and at most 1, drawn by the seed. None (the default): all.

    Raises `DataError` for any other fraction.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | dict[str, str] | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise DataError(f"{self.path}: fraction={self.fraction} is not a share of the rows: above 0, at most 1.")


@dataclass
class DatasetMixtureConfig:
    """A mix of data sets.

    Args:
        datasets: a `DatasetConfig`, a dict of its fields, or a path or name for each.
        streaming: read all of them as streams. False by default.
        test_split_size: the rows that are set aside for evaluation, from every data set its share: a share below 1, or
            a number. None (the default): none.

    Raises `DataError` for an entry that is not a data set.
    """

    datasets: list[Any] = field(
        default_factory=list,
        metadata={"help": 'Data sets trained on as one: files or names, or JSON like {"path": "a", "fraction": 0.5}.'},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read rows during training, in file order; needs max_steps."}
    )
    test_split_size: float | None = field(
        default=None,
        metadata={"help": "Rows to set aside for evaluation, drawn at random: a share below 1, or a number."},
    )

    def __post_init__(self) -> None:
        self.datasets = [_config(entry, number) for number, entry in enumerate(self.datasets)]


def _config(entry: Any, number: int) -> DatasetConfig:
    if isinstance(entry, DatasetConfig):
        return entry
    if isinstance(entry, str):
        return DatasetConfig(entry)
    if not isinstance(entry, Mapping):
        raise DataError(f"datasets[{number}] is a {type(entry).__name__}: give a dict with a `path`.")
    known = [part.name for part in dataclasses.fields(DatasetConfig)]
    for key in entry:
        if key not in known:
            nearest = near(str(key), known)
            meant = f" Did you mean {nearest!r}?" if nearest else ""
            raise DataError(f"datasets[{number}] has a field {key!r}; known are {', '.join(known)}.{meant}")
    if not entry.get("path"):
        raise DataError(f"datasets[{number}] has no `path`: a file, a folder or a name.")
    return DatasetConfig(**entry)


@dataclass
class MixturePart:
    """An opened data set of a mix: its rows, its name in reports, and the user's `columns` for it, if there are any."""

    rows: Any
    label: str
    columns: dict[str, str] | None = None


@dataclass
class Mixture:
    """Opened data sets that are trained on as one. `prepare` tokenises them."""

    parts: list[MixturePart]

    @property
    def streaming(self) -> bool:
        """Whether a part is a stream."""
        return any(isinstance(part.rows, datasets.IterableDataset) for part in self.parts)

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.parts)

    def prepare(
        self, wanted: Recipe, tokenizer: PreTrainedTokenizerBase, name: str = "train", num_proc: int | None = None
    ) -> tuple[Any, Any]:
        """Tokenises all parts by one recipe, each by its own shape.

        Args:
            wanted: the recipe. The `columns` of a part take precedence over those of the recipe.
            tokenizer, name, num_proc: as in `recipe.prepare`.

        Returns the parts one after the other, as one table, or as one stream if a part is a stream, and the report. The
        report has one for each part in `parts`. In a table, rows are numbered through all parts; in a stream, those
        of the n-th part, counted from 0, begin at n * `STREAM_ROWS`. Raises `DataError` as `recipe.prepare` does; it
        names the part.
        """
        columns = wanted.columns
        recipes = [dataclasses.replace(wanted, columns=part.columns or columns) for part in self.parts]
        if self.streaming:
            return self._prepare_stream(wanted, tokenizer, name, recipes)
        # All shapes are found before any rows are tokenised, so that a mistake in the last part shows at once.
        for part, own in zip(self.parts, recipes, strict=True):
            with _named(part):
                recipe.read_shape(own, part.rows)
        tables, reports, first_row = [], [], 0
        shape, all_bad = None, []
        for part, own in zip(self.parts, recipes, strict=True):
            with _named(part):
                shape, table, bad = recipe.tabulate(
                    own, part.rows, tokenizer, num_proc, f"{name}, {part.label}", first_row=first_row
                )
            reports.append(own.aggregate(table, tokenizer, shape, part.label, first_row)[1])
            reports[-1].add_unreadable(bad)
            all_bad += [first_row + row for row in bad]
            tables.append(table)
            first_row += len(part.rows)
        assert shape is not None
        wanted.check_parts(reports)
        table, note = _joined(wanted, tables)
        whole = dataclasses.replace(shape, sentence=f"a mix of {len(self.parts)} data sets{note}")
        prepared, report = wanted.aggregate(table, tokenizer, whole, name)
        report.add_unreadable(all_bad)
        report.parts = reports
        return prepared, report

    def _prepare_stream(
        self, wanted: Recipe, tokenizer: PreTrainedTokenizerBase, name: str, recipes: Sequence[Recipe]
    ) -> tuple[Any, Any]:
        streams, reports = [], []
        for number, (part, own) in enumerate(zip(self.parts, recipes, strict=True)):
            with _named(part):
                first_row = number * STREAM_ROWS
                stream, report = recipe.prepare(own, part.rows, tokenizer, name=part.label, first_row=first_row)
            streams.append(stream)
            reports.append(report)
        wanted.check_parts(reports)
        stream, note = _joined(wanted, streams)
        sentence = f"a mix of {len(self.parts)} streams, one after the other{note}"
        return stream, type(reports[0]).of_parts(reports, name, sentence)


@contextlib.contextmanager
def _named(part: MixturePart) -> Iterator[None]:
    """Puts the name of the part at the beginning of a `DataError`."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{part.label}: {error}") from error


def _joined(wanted: Recipe, parts: list[Any]) -> tuple[Any, str]:
    """The parts as one table or stream, one after the other, and a remark for the report.

    A recipe that keeps all columns fills those that a part lacks with None. Otherwise a column that not all parts have
    is left out, and the remark names it.
    """
    note = ""
    if not wanted.keeps_columns:
        columns = dict.fromkeys(column for part in parts for column in part.column_names)
        common = [column for column in columns if all(column in part.column_names for part in parts)]
        missing = ", ".join(f"`{column}`" for column in columns if column not in common)
        note = f" ({missing} left out: not all of them have it)" if missing else ""
        parts = [part.select_columns(common) for part in parts]
    try:
        return datasets.concatenate_datasets(parts), note
    except (TypeError, ValueError) as error:  # Arrow's errors are subclasses of these
        raise DataError(
            f"The columns of the mix do not fit together: {error}. Keep those that reward functions read, with "
            "`columns: [...]` of each data set, and give each of them one type."
        ) from error


def prepare(
    wanted: Recipe,
    rows: Any,
    tokenizer: PreTrainedTokenizerBase,
    name: str = "train",
    num_proc: int | None = None,
) -> tuple[Any, Any]:
    """Tokenises a table, a stream or a `Mixture` by a recipe, as `recipe.prepare` and `Mixture.prepare` say."""
    if isinstance(rows, Mixture):
        return rows.prepare(wanted, tokenizer, name, num_proc)
    return recipe.prepare(wanted, rows, tokenizer, name=name, num_proc=num_proc)


def columns_of(rows: Any, renamed: Mapping[str, str]) -> set[str] | None:
    """The columns of a table, a stream or a `Mixture`, before and after they are renamed. A row of a `Mixture` has None
    in the columns that only other parts have. None where the columns are not known."""
    if isinstance(rows, Mixture):
        found = [columns_of(part.rows, part.columns or renamed) for part in rows.parts]
        return None if None in found else {column for columns in found for column in columns or ()}
    names = getattr(rows, "column_names", None)
    return {*names, *renamed, *renamed.values()} if isinstance(names, list) else None


def is_stream(rows: Any) -> bool:
    """Whether the rows are a stream, or a mix of streams."""
    return isinstance(rows, datasets.IterableDataset) or isinstance(rows, Mixture) and rows.streaming


def load_mixture(
    config: DatasetMixtureConfig | Sequence[Any], seed: int = 0, skip_bad_rows: bool = False
) -> dict[str, Mixture]:
    """Opens every data set of a mix.

    Args:
        config: a `DatasetMixtureConfig`, or a list of its `datasets`.
        seed: the seed of the rows that `fraction` and `test_split_size` draw; 0 by default.
        skip_bad_rows: as in `sources.load`.

    Returns `{"train": Mixture}`, with "test" too if rows are set aside. Raises `DataError` for a mix without data sets,
    for one that cannot be opened, and for a split of a stream.
    """
    if not isinstance(config, DatasetMixtureConfig):
        config = DatasetMixtureConfig(datasets=list(config))
    if not config.datasets:
        raise DataError("The mix has no data sets: list at least one under `datasets`, with its `path`.")
    if config.streaming and config.test_split_size is not None:
        raise DataError(
            "test_split_size cannot be taken of streams, whose length is not known: set streaming to false."
        )
    parts = [
        _open(entry, config.streaming, seed + number, skip_bad_rows) for number, entry in enumerate(config.datasets)
    ]
    labels = [part.label for part in parts]
    for number, part in enumerate(parts):
        if labels.count(part.label) > 1:
            part.label = f"{part.label} ({number + 1})"
    if config.test_split_size is None:
        return {"train": Mixture(parts)}
    return _split(parts, config.test_split_size, seed)


def get_dataset(mixture_config: DatasetMixtureConfig) -> dict[str, Mixture]:
    """`load_mixture`, under the name that it has in upstream TRL. Every trainer takes the mixes as data sets."""
    return load_mixture(mixture_config)


def _open(entry: DatasetConfig, streaming: bool, seed: int, skip_bad_rows: bool) -> MixturePart:
    rows = load(
        entry.path,
        entry.split,
        entry.name,
        data_dir=entry.data_dir,
        data_files=entry.data_files,
        streaming=streaming,
        skip_bad_rows=skip_bad_rows,
    )
    if isinstance(entry.columns, list):
        missing = [column for column in entry.columns if column not in (rows.column_names or entry.columns)]
        if missing:
            raise DataError(
                f"{entry.path}: columns names {', '.join(map(repr, missing))}, but there are "
                f"{', '.join(map(repr, rows.column_names))}."
            )
        rows = rows.select_columns(entry.columns)
    if entry.fraction is not None and entry.fraction < 1:
        rows = _share(rows, entry.fraction, seed, entry.path)
    return MixturePart(rows, entry.path, entry.columns if isinstance(entry.columns, dict) else None)


def _share(rows: Any, fraction: float, seed: int, path: str) -> Any:
    """A share of the rows, in their order. In a stream, each row is kept with this probability, drawn by its number."""
    if isinstance(rows, datasets.IterableDataset):
        return rows.filter(_IsDrawn(fraction, seed), with_indices=True)
    count = round(fraction * len(rows))
    if count == 0:
        raise DataError(
            f"{path}: fraction={fraction} of {len(rows)} rows is none. Raise it, or leave the data set out."
        )
    return rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:count]))


class _IsDrawn:
    """Whether the row with this number of a stream is kept."""

    def __init__(self, fraction: float, seed: int):
        self.fraction, self.seed = fraction, seed

    def __call__(self, row: Mapping[str, Any], index: int) -> bool:
        return bool(np.random.default_rng([self.seed, index]).random() < self.fraction)


def _split(parts: list[MixturePart], size: float, seed: int) -> dict[str, Mixture]:
    total = sum(len(part.rows) for part in parts)
    share = size if size < 1 else size / total
    if not 0 < share < 1:
        raise DataError(
            f"test_split_size={size} of {total} rows leaves none on one side: give a share below 1, or fewer."
        )
    train, test = [], []
    for number, part in enumerate(parts):
        order = np.random.default_rng([seed, number]).permutation(len(part.rows))
        aside = round(share * len(order))
        test.append(dataclasses.replace(part, rows=part.rows.select(np.sort(order[:aside]))))
        train.append(dataclasses.replace(part, rows=part.rows.select(np.sort(order[aside:]))))
    found = {"train": [part for part in train if len(part.rows)], "test": [part for part in test if len(part.rows)]}
    for side, some in found.items():
        if not some:
            raise DataError(f"test_split_size={size} of {total} rows leaves none for {side}.")
    return {side: Mixture(some) for side, some in found.items()}
