"""Opens sources of rows: lists, tables, files, folders, names on the Hub."""

import contextlib
import difflib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from trl.data.reading.errors import DataError
from trl.data.reading.files import BUILDERS, endings, reader_of
from trl.data.reading.folders import files_by_split, say_split
from trl.data.reading.lines import ORIGIN, broken_lines, left_out, left_out_of_folder, why_unreadable
from trl.data.reading.names import check_name, check_path

logger = logging.getLogger(__name__)

_FILES = "_trl_files"  # attribute of a stream: the files that it reads

UNREADABLE = (datasets.exceptions.DatasetsError, OSError, ValueError, TypeError, KeyError, EOFError)


def load(
    source: Any,
    split: str = "train",
    config: str | None = None,
    *,
    data_dir: str | None = None,
    data_files: Any = None,
    streaming: bool = False,
    skip_bad_rows: bool = False,
) -> Any:
    """Opens `source` as a data set.

    Args:
        source: a list of dicts, a dict of columns, a table of pandas, polars or pyarrow, a `datasets.Dataset`
            (returned as it is) or `DatasetDict`, or a string or path. A path leads to a .jsonl, .json, .csv, .tsv,
            .parquet, .arrow or .txt file (which may be packed: .jsonl.gz, .bz2, .xz, .zst), to a folder of such files,
            or to a folder that `save_to_disk` has written. Any other string is a name on the Hugging Face Hub, or a
            reader of `datasets` such as `json`.
        split: the split to read, "train" by default. It may be a slice, such as "train[:10%]". If there is no such
            split but only one other, that one is read. If there are several others, the only one whose name begins
            with "train" stands in for "train", and the only one that begins with "test", or else with "validation" or
            "eval", stands in for "test". A log line says so.
        config, data_dir, data_files: arguments of `datasets.load_dataset`; None by default.
        streaming: read rows only when they are asked for. False by default.
        skip_bad_rows: leave out the lines of a file (JSON lines, .csv, .tsv) that cannot be read; a log line names
            them. False by default. A file that is streamed is looked through once for such lines.

    Returns a `datasets.Dataset`. With `streaming`, or if `source` is a stream, it is a `datasets.IterableDataset`.
    Raises `DataError` if `source` cannot be read or has no rows.
    """
    if isinstance(source, datasets.IterableDatasetDict):
        return _take_stream(source, split, "the IterableDatasetDict")
    if isinstance(source, datasets.IterableDataset):
        return source
    if data_dir is not None or data_files is not None:
        dataset = _by_arguments(str(source), split, config, data_dir, data_files, streaming, skip_bad_rows)
    elif streaming and isinstance(source, str | os.PathLike):
        return _stream(source, split, config, skip_bad_rows)
    else:
        dataset = _open(source, split, config, skip_bad_rows)
    if isinstance(dataset, datasets.IterableDataset):
        return dataset
    if len(dataset) == 0:
        raise DataError(f"The data set {_name(source)} has no rows (split {split!r}): check the file or the split.")
    return dataset.to_iterable_dataset() if streaming else dataset


def _open(source: Any, split: str, config: str | None, skip: bool) -> datasets.Dataset:
    if isinstance(source, datasets.Dataset):
        return source
    if isinstance(source, datasets.DatasetDict):
        return _take(source, split, "the DatasetDict")
    if isinstance(source, Mapping):
        return from_columns(source)
    if _is_frame(source):
        return _from_frame(source)
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        if path.is_dir():
            return _from_folder(path, split, skip)
        if path.exists():
            return _from_file(path, split, skip)
        check_path(str(source) if isinstance(source, str) else str(path.absolute()))
        assert isinstance(source, str)
        return _from_hub(source, split, config)
    if isinstance(source, Iterable):
        return from_rows(list(source))
    raise DataError(
        f"Cannot read data from a {type(source).__name__}: give a list of dicts, a dict of columns, a path, "
        "a datasets.Dataset or a name on the Hub."
    )


def is_data_set(value: Any) -> bool:
    """Whether a value of a dictionary is a data set. If all are, the dictionary is not a table of columns."""
    if isinstance(value, str | os.PathLike | datasets.Dataset | datasets.IterableDataset) or _is_frame(value):
        return True
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _name(source: Any) -> str:
    return repr(str(source)) if isinstance(source, str | os.PathLike) else f"(a {type(source).__name__})"


# ---------------------------------------------------------------------------------------------------------------------
# Python objects


def _is_frame(source: Any) -> bool:
    """Whether `source` is a table of pandas, polars or pyarrow. None of these needs to be installed."""
    return type(source).__name__ in ("DataFrame", "Table") and type(source).__module__.split(".")[0] in _FRAMES


def _from_frame(frame: Any) -> datasets.Dataset:
    library = type(frame).__module__.split(".")[0]
    try:
        return _FRAMES[library](frame)
    except (TypeError, ValueError) as error:  # Arrow's errors are subclasses of these
        raise DataError(
            f"Cannot read the {library} table: {error}. Give every column one type, or pass "
            "`frame.to_dict('records')`, a list of rows."
        ) from error


_FRAMES: dict[str, Callable[[Any], datasets.Dataset]] = {
    "pandas": lambda frame: datasets.Dataset.from_pandas(frame, preserve_index=False),
    "polars": datasets.Dataset.from_polars,
    "pyarrow": datasets.Dataset,
}


def as_shown(dataset: Any) -> Any:
    """The rows of a table or stream in plain values, as `dataset[0]` shows them.

    A transform that the user has set is applied once. Class labels become their names.
    """
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom":
        logger.warning("the data set has a transform: it is applied once, before training, and its result is kept")
        dataset = dataset.with_format(None).map(
            _Shown(dataset),
            batched=True,
            with_indices=True,
            remove_columns=dataset.column_names,
            # The fingerprint of the data set covers its transform. Hashing the function would hash the rows too.
            new_fingerprint=hashlib.sha256(f"shown {dataset._fingerprint}".encode()).hexdigest()[:16],
            desc="Applying the transform",
        )
    labels = {
        column: list(feature.names)
        for column, feature in (dataset.features or {}).items()
        if isinstance(feature, datasets.ClassLabel)
    }
    if not labels:
        return dataset
    features = datasets.Features({**dataset.features, **dict.fromkeys(labels, datasets.Value("string"))})
    return dataset.with_format(None).map(_Named(labels), batched=True, features=features)


class _Shown:
    """The rows of a data set, by their numbers, with its transform applied."""

    def __init__(self, dataset: datasets.Dataset):
        self.dataset = dataset

    def __call__(self, batch: Any, indices: list[int]) -> dict[str, Any]:
        return dict(self.dataset[indices])


class _Named:
    """Class labels to their names. A missing label stays None."""

    def __init__(self, names: dict[str, list[str]]):
        self.names = names

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            column: [None if label is None or label < 0 else names[label] for label in batch[column]]
            for column, names in self.names.items()
        }


def from_rows(rows: Sequence[Any]) -> datasets.Dataset:
    """A table of rows, each a dict. A row that lacks a column has None in it. Raises `DataError` for other rows."""
    columns: dict[str, None] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"row {index}: a {type(row).__name__}, not a dict of fields such as {{'text': ...}}.")
        columns.update(dict.fromkeys(row))
    # Not `Dataset.from_list`, which keeps only the columns of the first row.
    return from_columns({column: [row.get(column) for row in rows] for column in columns})


def from_columns(columns: Mapping[str, Sequence[Any]]) -> datasets.Dataset:
    """A table of columns. Raises `DataError` if their lengths differ, or if a column mixes types."""
    lengths = {column: len(values) for column, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"The columns have different lengths: {lengths}. Every row needs a value (or None) in each.")
    try:
        return datasets.Dataset.from_dict(dict(columns))
    except (TypeError, ValueError) as error:  # Arrow's errors are subclasses of these
        column, row = _first_odd_value(columns)
        values = [value for value in columns[column] if value is not None]
        for kind in (list, Mapping):
            if values and all(isinstance(value, kind) for value in values):
                # Arguments of tools, and contents that are text in one row and blocks in another, have no single type.
                with contextlib.suppress(TypeError, ValueError):
                    return datasets.Dataset.from_dict(dict(columns), on_mixed_types="use_json")
        raise DataError(
            f"row {row}: `{column}` is not of the same type as in the rows before it ({error}). "
            "Give one type to every row of a column."
        ) from error


def _first_odd_value(columns: Mapping[str, Sequence[Any]]) -> tuple[str, int]:
    """The first column that Arrow cannot hold, and its first row of another type (by bisection)."""

    def readable(values: Sequence[Any]) -> bool:
        try:
            datasets.Dataset.from_dict({"column": values})
        except (TypeError, ValueError):
            return False
        return True

    column = next(column for column, values in columns.items() if not readable(values))
    good, bad = 0, len(columns[column])
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if readable(columns[column][:middle]) else (good, middle)
    return column, bad - 1


# ---------------------------------------------------------------------------------------------------------------------
# Files and folders


def _from_file(
    path: Path, split: str, skip: bool = False, copy: tuple[Path, frozenset[int]] | None = None
) -> datasets.Dataset:
    """The rows of a file. With `skip`, those of a `copy` (see `left_out`) if the file itself cannot be read."""
    builder, file, options = reader_of(path if copy is None else copy[0])
    try:
        with _quiet():
            loaded = _validated(datasets.load_dataset(builder, data_files={"train": str(file)}, **options))
    except UNREADABLE as error:
        if "corresponds to no data" in str(error):  # a table of nothing but the names of its columns
            raise DataError(f"The data set {str(path)!r} has no rows: check the file.") from error
        if skip and (copy := left_out(path)) is not None:
            return _from_file(path, split, copy=copy)
        raise DataError(f"Cannot read {str(path)!r}: {why_unreadable(path) or _root_cause(error)}") from error
    return _take(loaded, split, repr(str(path)), (path, copy[1] if copy else frozenset()))


def _validated(loaded: datasets.DatasetDict) -> datasets.DatasetDict:
    """`loaded`, after a check that its strings are UTF-8. The JSON reader does not check; later reads would fail."""
    for part in loaded.values():
        for batch in part.data.table.to_batches():
            batch.validate(full=True)
    return loaded


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back the log lines of `datasets`: our own error messages say what is wrong."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _from_folder(path: Path, split: str, skip: bool = False) -> datasets.Dataset:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        try:
            loaded = datasets.load_from_disk(str(path))
        except UNREADABLE as error:
            raise DataError(
                f"Cannot read the data set saved in {str(path)!r}: {_root_cause(error)} Save or copy it again."
            ) from error
        # A single Dataset on disk has no split name. A slice such as "train[:10]" still applies to it.
        if isinstance(loaded, datasets.Dataset):
            loaded = datasets.DatasetDict({_split_name(split): loaded})
        return _take(loaded, split, repr(str(path)))
    files = _files_below(path)
    if not files:
        raise DataError(
            f"The folder {str(path)!r} holds neither a data set written by `save_to_disk` nor any file ending in "
            f"{', '.join(BUILDERS)}."
        )
    try:
        with _quiet():
            parts = files_by_split(path, files)
            loaded = _validated(datasets.load_dataset(str(path), data_files=parts))
    except UNREADABLE as error:
        if skip and (copy := left_out_of_folder(path, files)) is not None:
            return _from_folder(copy, split)
        for file in files:
            _from_file(file, "train")  # raises an error that names the broken file
        raise DataError(
            f"Cannot read the files of the folder {str(path)!r} as one data set, though each can be read by itself: "
            f"{_root_cause(error)}. Give all of them the same columns, or read one."
        ) from error
    say_split(path, parts, list(loaded), _split_name(split))
    return _take(loaded, split, repr(str(path)))


def _files_below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if endings(file)[0] in BUILDERS)


# ---------------------------------------------------------------------------------------------------------------------
# Names


def _from_hub(name: str, split: str, config: str | None) -> datasets.Dataset:
    check_name(name)
    try:
        with _quiet():
            return datasets.load_dataset(name, config, split=split)
    except UNREADABLE as error:
        try:
            there = datasets.get_dataset_split_names(name, config)
        except UNREADABLE:
            there = []
        if there and _split_name(split) not in there:
            return datasets.load_dataset(name, config, split=_other_split(there, split, repr(name)))
        raise DataError(
            f"Cannot load {name!r}, which is no file or folder here, as a data set on the Hub: {_root_cause(error)}. "
            "Check the name, the network, or give a path."
        ) from error


def _by_arguments(
    name: str, split: str, config: str | None, data_dir: str | None, data_files: Any, streaming: bool, skip: bool
) -> Any:
    """Loads a name with `data_files` or `data_dir`, as `datasets.load_dataset` does."""
    if skip:
        data_files = _each_file(data_files, lambda path: str(copy[0]) if (copy := left_out(path)) else str(path))
    try:
        with _quiet():
            loaded = datasets.load_dataset(name, config, data_dir=data_dir, data_files=data_files, streaming=streaming)
    except UNREADABLE as error:
        _each_file(data_files, lambda path: _from_file(path, "train"))  # raises an error that names the broken file
        what = f"data_files={data_files!r}" if data_files is not None else f"data_dir={data_dir!r}"
        raise DataError(f"Cannot load {name!r} with {what}: {_root_cause(error)}. Check the paths.") from error
    return (_take_stream if streaming else _take)(loaded, split, repr(name))


def _each_file(data_files: Any, function: Callable[[Path], Any]) -> Any:
    """`data_files` (a path, a list, or one of these for each split), with `function` applied to each file here."""
    if isinstance(data_files, Mapping):
        return {split: _each_file(files, function) for split, files in data_files.items()}
    if isinstance(data_files, Sequence) and not isinstance(data_files, str):
        return [_each_file(file, function) for file in data_files]
    here = data_files is not None and endings(data_files)[0] in BUILDERS and Path(data_files).is_file()
    return function(Path(data_files)) if here else data_files


def _stream(source: str | os.PathLike, split: str, config: str | None, skip: bool) -> datasets.IterableDataset:
    path = Path(source).expanduser()
    what = repr(str(source))
    if path.is_file():
        copy, numbers = (left_out(path) if skip else None) or (path, frozenset())
        builder, file, options = reader_of(copy)
        try:
            with _quiet():
                loaded = datasets.load_dataset(builder, data_files={"train": str(file)}, streaming=True, **options)
        except UNREADABLE as error:
            raise DataError(f"Cannot read {str(path)!r}: {why_unreadable(path) or _root_cause(error)}") from error
        rows = _take_stream(loaded, split, what)
        setattr(rows, _FILES, [path])
        if split == _split_name(split):  # the stream begins with the file
            setattr(rows, ORIGIN, (path, 0, numbers))
        return rows
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _from_folder(path, split).to_iterable_dataset()
    check_path(str(source))
    if not path.exists():
        check_name(str(source))
    files = _files_below(path) if path.is_dir() else []
    if skip:
        source = left_out_of_folder(path, files) or source
    try:
        with _quiet():
            parts = files_by_split(Path(source), _files_below(Path(source))) if files else None
            loaded = datasets.load_dataset(str(source), config, data_files=parts, streaming=True)
    except UNREADABLE as error:
        check_files(files)
        raise DataError(f"Cannot stream {what}: {_root_cause(error)}. Check the name, or give a path.") from error
    if files:
        say_split(Path(source), parts, list(loaded), _split_name(split))
    rows = _take_stream(loaded, split, what)
    setattr(rows, _FILES, files)
    return rows


def check_files(source: Any) -> None:
    """Raises a `DataError` that names the broken file, if one of these files, or of those that a stream reads, has
    lines that cannot be read."""
    for file in source if isinstance(source, list) else getattr(source, _FILES, []):
        if (faults := broken_lines(file)) is not None:
            raise DataError(f"Cannot read {str(file)!r}: {faults}")


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def _split_name(split: str) -> str:
    return re.split(r"[\[+(]", split, maxsplit=1)[0].strip()


# What may replace a missing split: the only split whose name begins like this, the earlier beginning first. No "train"
# replaces a "test": an evaluation on training rows would tell nothing.
STAND_INS = {"train": ("train",), "test": ("test", "validation", "eval")}


def _other_split(there: Sequence[str], split: str, what: str) -> str:
    """`split` with its name replaced by that of the only split, or of the only split that can stand in for it.

    Raises `DataError` if there is no such split.
    """
    wanted = _split_name(split)
    if len(there) == 1:
        found = there[0]
        logger.warning("%s has no split %r; its only split %r is read.", what, wanted, found)
    else:
        for beginning in STAND_INS.get(wanted, ()):
            candidates = [name for name in there if name.startswith(beginning)]
            if candidates:
                break
        else:
            candidates = []
        if len(candidates) != 1:
            names = ", ".join(map(repr, there))
            near = difflib.get_close_matches(wanted, there, n=1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{what} has no split {wanted!r}; it has {names}: name one of them.{meant}")
        found = candidates[0]
        logger.warning("%s has no split %r; %r stands in for it.", what, wanted, found)
    return found + split[len(wanted) :]


def _take(
    splits: Mapping[str, datasets.Dataset], split: str, what: str, file: tuple[Path, frozenset[int]] | None = None
) -> datasets.Dataset:
    """The rows of a split. `file` is what `ORIGIN` needs of a file: its path, and the lines that were left out."""
    if not splits:
        raise DataError(f"{what} has no splits at all.")
    if _split_name(split) not in splits:
        split = _other_split(list(splits), split, what)
    try:
        lengths = {name: len(part) for name, part in splits.items()}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise DataError(f"Cannot understand the split {split!r}: {error}") from error
    taken = []
    for part in parts:
        rows = splits[part.splitname]
        start, stop = part.from_ or 0, len(rows) if part.to is None else part.to
        taken.append(rows if (start, stop) == (0, len(rows)) else rows.select(range(start, stop)))
        if file is not None and len(parts) == 1:
            setattr(taken[0], ORIGIN, (file[0], start, file[1]))
    return taken[0] if len(taken) == 1 else datasets.concatenate_datasets(taken)


def _take_stream(splits: Mapping[str, Any], split: str, what: str) -> datasets.IterableDataset:
    if _split_name(split) not in splits:
        split = _other_split(list(splits), split, what)
    rows, part = splits[_split_name(split)], split[len(_split_name(split)) :]
    if not part:
        return rows
    bounds = re.fullmatch(r"\[(\d*):(\d*)\]", part)
    if bounds is None:
        raise DataError(
            f"Cannot take {split!r} of a stream: it has no length, so that only row numbers counted from its "
            "beginning are known, as in 'train[100:200]'."
        )
    start, stop = int(bounds[1] or 0), bounds[2]
    rows = rows.skip(start) if start else rows
    return rows.take(max(int(stop) - start, 0)) if stop else rows
