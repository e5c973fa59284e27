"""Several data sets trained on as one: each is read by its own shape, and all are tokenised into one table."""

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


@dataclass
class DatasetConfig:
    """One data set of a mix. `path`, `name`, `data_dir`, `data_files` and `split` say what `sources.load` opens.

    `columns` is a list of those to keep, or says which column is which, as in `{"prompt": "question", "completion":
    "answer"}`. `fraction`, above 0 and at most 1, is the share of the rows to take, drawn by the seed.
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
    """A mix of data sets. `datasets` are `DatasetConfig`s or dicts of their fields. With `test_split_size` (a share of
    the rows, below 1, or their number) so many rows, of each data set its share, are set aside for evaluation."""

    datasets: list[Any] = field(
        default_factory=list,
        metadata={"help": 'Data sets trained on as one: files or names, or JSON like {"path": "a", "fraction": 0.5}.'},
    )
    streaming: bool = field(default=False, metadata={"help": "As dataset_streaming, for all data sets of the mix."})
    test_split_size: float | None = field(
        default=None, metadata={"help": "Rows of the mix set aside for evaluation: a share below 1, or a number."}
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
class Part:
    """A data set of a mix, opened: its rows, what it is called, and which column is which where the user says so."""

    rows: Any
    label: str
    columns: dict[str, str] | None = None


@dataclass
class Mixture:
    """Data sets to be trained on as one. `prepare` turns them into tokens."""

    parts: list[Part]

    @property
    def streaming(self) -> bool:
        return any(isinstance(part.rows, datasets.IterableDataset) for part in self.parts)

    def __len__(self) -> int:
        return sum(len(part.rows) for part in self.parts)

    def prepare(
        self, wanted: Recipe, tokenizer: PreTrainedTokenizerBase, name: str = "train", num_proc: int | None = None
    ) -> tuple[Any, Any]:
        """Tokenises all parts by one recipe, each by its own shape, one after the other.

        Returns one table, or one stream if a part is a stream, and its report, which has one for each part under
        `parts`. In a table, rows are numbered through all parts. `wanted`, `tokenizer`, `name` and `num_proc` are those
        of `recipe.prepare`. Raises `DataError` as it does, with the part that is meant.
        """
        columns = wanted.columns
        recipes = [dataclasses.replace(wanted, columns=part.columns or columns) for part in self.parts]
        if self.streaming:
            return self._prepare_stream(wanted, tokenizer, name, recipes)
        # All shapes are found before any rows are tokenised, so that a mistake in the last part shows at once.
        for part, own in zip(self.parts, recipes, strict=True):
            with _named(part):
                recipe.detect(own, part.rows)
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
        for part, own in zip(self.parts, recipes, strict=True):
            with _named(part):
                stream, report = recipe.prepare(own, part.rows, tokenizer, name=part.label)
            streams.append(stream)
            reports.append(report)
        wanted.check_parts(reports)
        stream, note = _joined(wanted, streams)
        sentence = f"a mix of {len(self.parts)} streams, one after the other{note}"
        return stream, type(reports[0]).of_parts(reports, name, sentence)


@contextlib.contextmanager
def _named(part: Part) -> Iterator[None]:
    """Errors in the data begin with the name of the part."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{part.label}: {error}") from error


def _joined(wanted: Recipe, parts: list[Any]) -> tuple[Any, str]:
    """The parts one after the other, and a remark for the report.

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


def is_stream(rows: Any) -> bool:
    """Whether the rows are a stream, or a mix of streams."""
    return isinstance(rows, datasets.IterableDataset) or isinstance(rows, Mixture) and rows.streaming


def load_mixture(config: DatasetMixtureConfig | Sequence[Any], seed: int = 0) -> dict[str, Mixture]:
    """Opens every data set of a mix. Returns `{"train": …}`, and `"test"` when some rows are set aside."""
    if not isinstance(config, DatasetMixtureConfig):
        config = DatasetMixtureConfig(datasets=list(config))
    if not config.datasets:
        raise DataError("The mix has no data sets: list at least one under `datasets`, with its `path`.")
    if config.streaming and config.test_split_size is not None:
        raise DataError(
            "test_split_size cannot be taken of streams, whose length is not known: set streaming to false."
        )
    parts = [_open(entry, config.streaming, seed + number) for number, entry in enumerate(config.datasets)]
    labels = [part.label for part in parts]
    for number, part in enumerate(parts):
        if labels.count(part.label) > 1:
            part.label = f"{part.label} ({number + 1})"
    if config.test_split_size is None:
        return {"train": Mixture(parts)}
    return _split(parts, config.test_split_size, seed)


def get_dataset(mixture_config: DatasetMixtureConfig) -> dict[str, Mixture]:
    """A mix of data sets by split, as upstream names it: every trainer takes its parts as data sets."""
    return load_mixture(mixture_config)


def _open(entry: DatasetConfig, streaming: bool, seed: int) -> Part:
    rows = load(
        entry.path,
        entry.split,
        entry.name,
        data_dir=entry.data_dir,
        data_files=entry.data_files,
        streaming=streaming,
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
    return Part(rows, entry.path, entry.columns if isinstance(entry.columns, dict) else None)


def _share(rows: Any, fraction: float, seed: int, path: str) -> Any:
    """So many of the rows, in their order; of a stream, each with this probability, by its number."""
    if isinstance(rows, datasets.IterableDataset):
        return rows.filter(_Drawn(fraction, seed), with_indices=True)
    count = round(fraction * len(rows))
    if count == 0:
        raise DataError(
            f"{path}: fraction={fraction} of {len(rows)} rows is none. Raise it, or leave the data set out."
        )
    return rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:count]))


class _Drawn:
    def __init__(self, fraction: float, seed: int):
        self.fraction, self.seed = fraction, seed

    def __call__(self, row: Mapping[str, Any], index: int) -> bool:
        return bool(np.random.default_rng([self.seed, index]).random() < self.fraction)


def _split(parts: list[Part], size: float, seed: int) -> dict[str, Mixture]:
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
