"""What a row is: where data comes from, which shape it has, and what is wrong with a row that cannot be read."""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets

logger = logging.getLogger(__name__)

BUILDERS = {  # file name ending -> the reader of `datasets` for it
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


class DataError(ValueError):
    """A mistake in the data or in how it is described. The message says where it is and what to do about it."""


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load(source: Any, split: str = "train", config: str | None = None) -> datasets.Dataset:
    """Opens `source` as a data set.

    `source` is a list of dicts, a dict of columns, a `datasets.Dataset` (returned as it is) or `DatasetDict`, a path
    to a .jsonl, .json, .csv, .parquet or .txt file, a folder written by `save_to_disk`, a folder of such files, or
    else a name on the Hugging Face Hub (`config` is the configuration there). `split` may be a slice, such as
    `"train[:10%]"`. When the split is missing and there is only one, that one is read and a log line says so.

    Raises `DataError` when there is nothing to read.
    """
    dataset = _open(source, split, config)
    if len(dataset) == 0:
        raise DataError(f"The data set {_name(source)} has no rows (split {split!r}): check the file or the split.")
    return dataset


def _open(source: Any, split: str, config: str | None) -> datasets.Dataset:
    if isinstance(source, datasets.Dataset):
        return source
    if isinstance(source, datasets.DatasetDict):
        return _take(source, split, "the DatasetDict")
    if isinstance(source, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise DataError("A streaming data set has no length and cannot be counted; load it without `streaming=True`.")
    if isinstance(source, Mapping):
        return _from_columns(source)
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        if path.is_dir():
            return _from_folder(path, split)
        if path.exists():
            return _from_file(path, split)
        if not isinstance(source, str) or _looks_like_a_path(source):
            raise DataError(f"There is no file or folder {str(source)!r} (that is {path.absolute()}): check it.")
        return _from_hub(source, split, config)
    if isinstance(source, Iterable):
        return _from_rows(list(source))
    raise DataError(
        f"Cannot read data from a {type(source).__name__}: give a list of dicts, a dict of columns, a path, "
        "a datasets.Dataset or a name on the Hub."
    )


def _name(source: Any) -> str:
    return repr(str(source)) if isinstance(source, str | os.PathLike) else f"(a {type(source).__name__})"


def _looks_like_a_path(name: str) -> bool:
    # A name on the Hub is `name` or `owner/name`, and may contain dots.
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).suffix in BUILDERS or "\\" in name


def _from_rows(rows: list[Any]) -> datasets.Dataset:
    columns: dict[str, None] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(f"row {index}: a {type(row).__name__}, not a dict of fields such as {{'text': ...}}.")
        columns.update(dict.fromkeys(row))
    # Not `Dataset.from_list`, which keeps only the columns of the first row.
    return _from_columns({column: [row.get(column) for row in rows] for column in columns})


def _from_columns(columns: Mapping[str, Sequence[Any]]) -> datasets.Dataset:
    lengths = {column: len(values) for column, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"The columns have different lengths: {lengths}. Every row needs a value (or None) in each.")
    try:
        return datasets.Dataset.from_dict(dict(columns))
    except (TypeError, ValueError) as error:  # Arrow's errors are kinds of these
        column, row = _first_odd_value(columns)
        raise DataError(
            f"row {row}: `{column}` is not of the same type as in the rows before it ({error}). "
            "Give one type to every row of a column."
        ) from error


def _first_odd_value(columns: Mapping[str, Sequence[Any]]) -> tuple[str, int]:
    """The column that cannot be made, and the first row at which it cannot (by bisection)."""

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


def _from_file(path: Path, split: str) -> datasets.Dataset:
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise DataError(f"Cannot tell the format of {str(path)!r} by its ending; known are {', '.join(BUILDERS)}.")
    if path.stat().st_size == 0:
        raise DataError(f"The file {str(path)!r} is empty.")
    try:
        loaded = datasets.load_dataset(builder, data_files={"train": str(path)})
    except (datasets.exceptions.DatasetsError, OSError, ValueError, TypeError) as error:
        raise DataError(f"Cannot read {str(path)!r}: {_why_unreadable(path) or _root_cause(error)}") from error
    return _take(loaded, split, repr(str(path)))


def _why_unreadable(path: Path) -> str | None:
    """Names the line of a broken .jsonl file; None for other formats."""
    if path.suffix.lower() != ".jsonl":
        return None
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"line {number} is not a JSON object."
            except json.JSONDecodeError as error:
                return f"line {number} is not valid JSON ({error.msg}). Correct or remove the line."
    return "the lines do not agree on the type of a field. Give every field one type in all lines."


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def _from_folder(path: Path, split: str) -> datasets.Dataset:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        loaded = datasets.load_from_disk(str(path))
        # A lone Dataset on disk has no split name of its own: the request for a part of it still holds.
        if isinstance(loaded, datasets.Dataset):
            loaded = datasets.DatasetDict({_split_name(split): loaded})
        return _take(loaded, split, repr(str(path)))
    if not any(file.suffix.lower() in BUILDERS for file in path.rglob("*")):
        raise DataError(
            f"The folder {str(path)!r} holds neither a data set written by `save_to_disk` nor any file ending in "
            f"{', '.join(BUILDERS)}."
        )
    try:
        loaded = datasets.load_dataset(str(path))
    except (datasets.exceptions.DatasetsError, OSError, ValueError, TypeError) as error:
        raise DataError(f"Cannot read the files of the folder {str(path)!r}: {_root_cause(error)}") from error
    return _take(loaded, split, repr(str(path)))


def _from_hub(name: str, split: str, config: str | None) -> datasets.Dataset:
    try:
        return datasets.load_dataset(name, config, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        try:
            there = datasets.get_dataset_split_names(name, config)
        except (datasets.exceptions.DatasetsError, OSError, ValueError):
            there = []
        if there and _split_name(split) not in there:
            return datasets.load_dataset(name, config, split=_other_split(there, split, repr(name)))
        raise DataError(
            f"Cannot load {name!r}: it is neither a file nor a folder here, and as a data set on the Hub it failed "
            f"with: {_root_cause(error)}. Check the name, the network, or give a path."
        ) from error


def _split_name(split: str) -> str:
    return re.split(r"[\[+(]", split, maxsplit=1)[0].strip()


def _other_split(there: Sequence[str], split: str, what: str) -> str:
    """`split` with its name replaced by that of the only split there is."""
    if len(there) != 1:
        names = ", ".join(map(repr, there))
        raise DataError(f"{what} has no split {_split_name(split)!r}; it has {names}: name one of them.")
    logger.warning("%s has no split %r; its only split %r is read.", what, _split_name(split), there[0])
    return there[0] + split[len(_split_name(split)) :]


def _take(splits: Mapping[str, datasets.Dataset], split: str, what: str) -> datasets.Dataset:
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
    return taken[0] if len(taken) == 1 else datasets.concatenate_datasets(taken)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


@dataclass(frozen=True)
class Shape:
    """How the rows of a data set are read.

    `kind` is a kind of `READINGS`; `columns` maps each part of that reading to the column that holds it (absent
    optional parts are left out); `conversational` says that some part is a list of messages; `sentence` is one line
    for people: what was seen and how it is read.
    """

    kind: str
    columns: dict[str, str]
    conversational: bool
    sentence: str


class Part(NamedTuple):
    """A column that a reading wants: its possible names (`()`: any name), and the contents it may have."""

    name: str
    columns: tuple[str, ...]
    contents: tuple[str, ...]
    optional: bool = False


class Reading(NamedTuple):
    """One way of reading a row. `says` describes it, with the parts' names in braces."""

    kind: str
    says: str
    parts: tuple[Part, ...]


NAMED = "\0named"  # stands for the column that the user named with `dataset_text_field`
TEXT = "\0text"  # the same, also when it is the default

_TOOLS = (
    Part("tools", ("tools",), ("text", "structs", "other"), optional=True),
    Part("chat_template_kwargs", ("chat_template_kwargs",), ("struct", "other"), optional=True),
)
_MASK = ("integers", "booleans", "empty")

# The first reading whose columns are all there is taken. A further shape is one more entry here, and a function in
# `tokens` that turns its rows into text.
READINGS: tuple[Reading, ...] = (
    Reading(
        "tokens",
        "token ids in {input_ids}",
        (
            Part("input_ids", ("input_ids",), ("integers",)),
            Part("labels", ("labels",), _MASK, optional=True),
            Part("completion_mask", ("completion_mask",), _MASK, optional=True),
            Part("assistant_masks", ("assistant_masks",), _MASK, optional=True),
            Part("loss_mask", ("loss_mask",), _MASK, optional=True),
        ),
    ),
    Reading("text", "plain text in {text}", (Part("text", (NAMED,), ("text",)),)),
    Reading("messages", "conversations in {messages}", (Part("messages", (NAMED,), ("messages",)), *_TOOLS)),
    Reading(
        "prompt_completion",
        "prompts in {prompt} and their completions in {completion}",
        (
            Part("prompt", ("prompt",), ("text", "messages")),
            Part("completion", ("completion",), ("text", "messages")),
            *_TOOLS,
        ),
    ),
    Reading("messages", "conversations in {messages}", (Part("messages", ("messages",), ("messages",)), *_TOOLS)),
    Reading("text", "plain text in {text}", (Part("text", (TEXT,), ("text",)),)),
    Reading("messages", "conversations in {messages}", (Part("messages", (), ("messages",)), *_TOOLS)),
)

UNDERSTOOD = (
    "`text` (a string), `messages` (a list of {role, content}), `prompt` and `completion` (strings or such lists), "
    "or `input_ids` (with `labels` or a mask)"
)


def detect(dataset: datasets.Dataset, text_field: str = "text") -> Shape:
    """Finds how the rows of `dataset` are to be read. `text_field` names the column of text, or of conversations.

    Raises `DataError`, which lists the columns seen and the shapes understood, when no reading fits.
    """
    contents = {column: _contents(dataset, column) for column in dataset.column_names}
    for reading in READINGS:
        columns = _match(reading, contents, text_field)
        if columns is not None:
            conversational = any(contents[column] == "messages" for column in columns.values())
            sentence = _sentence(reading, columns, list(contents), text_field)
            return Shape(reading.kind, columns, conversational, sentence)
    seen = ", ".join(f"`{column}` ({_CONTENTS_IN_WORDS[content]})" for column, content in contents.items())
    raise DataError(
        f"Cannot read the rows: the columns are {seen or 'none'}. Understood are {UNDERSTOOD}. Rename a column, or "
        f"name the column of text or conversations with `dataset_text_field` (now {text_field!r})."
    )


def _match(reading: Reading, contents: Mapping[str, str], text_field: str) -> dict[str, str] | None:
    columns = {}
    for part in reading.parts:
        names: list[str] = list(part.columns) or list(contents)
        if part.columns == (TEXT,):
            names = [text_field]
        elif part.columns == (NAMED,):
            names = [text_field] if text_field != "text" else []
        fitting = [name for name in names if contents.get(name) in part.contents]
        if not part.columns and len(fitting) > 1:
            which = ", ".join(f"`{name}`" for name in fitting)
            raise DataError(
                f"Several columns hold conversations: {which}. Name the one to train on with `dataset_text_field`."
            )
        if fitting:
            columns[part.name] = fitting[0]
        elif not part.optional:
            return None
    return columns


def _sentence(reading: Reading, columns: Mapping[str, str], seen: Sequence[str], text_field: str) -> str:
    says = reading.says.format(**{part: f"`{column}`" for part, column in columns.items()})
    used = [part.name for part in reading.parts if part.optional and part.name in columns]
    if used:
        says += " with " + ", ".join(f"`{columns[part]}`" for part in used)
    ignored = [column for column in seen if column not in columns.values()]
    notes = [f"{', '.join(ignored)} ignored"] if ignored else []
    if text_field != "text" and text_field not in columns.values():
        why = "there is no such column" if text_field not in seen else "it cannot be read as text or conversations"
        notes.append(f"`dataset_text_field` {text_field!r} not used: {why}")
    return f"columns {', '.join(seen)}: read as {says}" + (f" ({'; '.join(notes)})" if notes else "")


_CONTENTS_IN_WORDS = {
    "text": "text",
    "messages": "messages",
    "from_value": "turns of {from, value}",
    "integers": "lists of numbers",
    "booleans": "lists of true and false",
    "structs": "lists of records",
    "struct": "records",
    "number": "numbers",
    "empty": "only None",
    "other": "something else",
}


def _contents(dataset: datasets.Dataset, column: str) -> str:
    """A key of `_CONTENTS_IN_WORDS`: what the column holds, by its feature, or else by its first value."""
    feature = dataset.features[column]
    if isinstance(feature, datasets.Value):
        if feature.dtype in ("string", "large_string"):
            return "text"
        return "empty" if feature.dtype == "null" else "number"
    if isinstance(feature, dict):
        return "struct"
    if isinstance(feature, datasets.List | datasets.LargeList):
        item = feature.feature
        if isinstance(item, dict):
            return _contents_of_records(item)
        if isinstance(item, datasets.Value) and item.dtype != "null":
            if item.dtype == "bool":
                return "booleans"
            return "integers" if item.dtype.startswith(("int", "uint")) else "other"
    return _contents_of_value(next((value for value in dataset[:100][column] if value), None))


def _contents_of_records(record: Iterable[str]) -> str:
    keys = set(record)
    if "role" in keys and keys & {"content", "tool_calls"}:
        return "messages"
    return "from_value" if {"from", "value"} <= keys else "structs"


def _contents_of_value(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "struct"
    if isinstance(value, list) and isinstance(value[0], Mapping):
        return _contents_of_records(value[0])
    return "other"


# ---------------------------------------------------------------------------------------------------------------------
# Values


def place(row: int, field: str) -> str:
    """How an error message names a field of a row."""
    return f"row {row}: `{field}`"


def text_of(value: Any, where: str) -> str:
    """The string of a text field. Raises `DataError`, which begins with `where`, for anything else."""
    if isinstance(value, str):
        return value
    if value is None:
        raise DataError(f"{where} is None. Fill it in, or remove such rows with `dataset.filter`.")
    raise DataError(f"{where} is a {type(value).__name__}, not a string. Convert the column to strings.")


def messages_of(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of messages as a chat template wants it: every role a string, every content a string.

    Contents given as blocks of text are joined; fields that are None are left out, since a table gives every message
    the fields of all others. Raises `DataError`, which begins with `where`, when a message cannot be read.
    """
    if value is None:
        raise DataError(f"{where} is None. Fill it in, or remove such rows with `dataset.filter`.")
    if not isinstance(value, list | tuple):
        raise DataError(f"{where} is a {type(value).__name__}, not a list of messages {{role, content}}.")
    if not value:
        raise DataError(f"{where} is an empty list. Remove such rows with `dataset.filter`.")
    # `place` ends in a backtick, so that the index goes inside it: `messages[3]`.
    field = where.removesuffix("`")
    return [_message_of(message, f"{field}[{index}]") for index, message in enumerate(value)]


def _message_of(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"{where}` is a {type(message).__name__}, not a message {{role, content}}.")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise DataError(f"{where}` has no `role`. Every message needs one, such as 'user' or 'assistant'.")
    cleaned = {key: without_none(item) for key, item in message.items() if item is not None}
    if isinstance(content, list) and all(isinstance(block, Mapping) and "text" in block for block in content):
        cleaned["content"] = "".join(block["text"] or "" for block in content)
    elif isinstance(content, list):
        raise DataError(f"{where}.content` has blocks that are not text. Only text can be trained on here.")
    elif content is None and not message.get("tool_calls"):
        raise DataError(f"{where}.content` is None. Give the message a text, or remove the row with `dataset.filter`.")
    elif content is not None and not isinstance(content, str):
        raise DataError(f"{where}.content` is a {type(content).__name__}, not a string. Convert it to one.")
    return cleaned


def without_none(value: Any) -> Any:
    """`value` without the None entries of its dicts: a table fills the keys that a record does not have with None."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value
