"""The shape of the rows of a data set, from its columns, from the user's `columns`, or from a formatting function."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets

from trl.data.reading.errors import DataError
from trl.data.reading.messages import FLAGS, NO_IMAGES, is_conversation
from trl.data.reading.readings import (
    COMPLETION_CONTENTS,
    MESSAGE_CONTENTS,
    NAMED,
    READINGS,
    TEXT,
    UNDERSTOOD,
    Part,
    Reading,
)


@dataclass(frozen=True)
class Shape:
    """How the rows of a data set are read.

    Args:
        kind: the kind of the reading (see `readings`).
        columns: part of the reading -> column that holds it. Optional parts may be absent.
        conversational: whether the chat template is applied.
        sentence: one line for people, about the columns and how they are read.
        formatting: how the user's `formatting_func` is called: with a "row" or with a "batch" of rows. "" (the
            default): there is none.
        numbers: columns whose numbers are read as text; none by default.
    """

    kind: str
    columns: dict[str, str]
    conversational: bool
    sentence: str
    formatting: str = ""
    numbers: tuple[str, ...] = ()

    def with_template(self, there_is_one: bool) -> "Shape":
        """The shape for a tokenizer with a chat template, or without one.

        Where there is one, a question and its answer that are strings are a conversation, and so is a transcript.
        """
        if self.kind == "prompts" and there_is_one and not self.conversational:
            hint = "the model has a chat template: give lists of messages to use it"
            return replace(self, sentence=f"{self.sentence} ({hint})")
        if self.kind not in ("dialogue", "ranked", "transcripts") or self.conversational:
            return self
        if self.kind == "transcripts":
            how = "a conversation" if there_is_one else "text: the tokenizer has no template"
        else:
            how = (
                "a conversation of two turns" if there_is_one else "text under headings: the tokenizer has no template"
            )
        return replace(self, conversational=there_is_one, sentence=f"{self.sentence}, each row as {how}")


IMAGE_COLUMNS = ("image", "images")


def detect(
    dataset: datasets.Dataset,
    text_field: str = "text",
    columns: Mapping[str, str] | None = None,
    formatting_func: Callable[[Any], Any] | None = None,
    readings: Sequence[Reading] | None = None,
    understood: str = UNDERSTOOD,
) -> Shape:
    """Finds how the rows of a table are read.

    Args:
        dataset: the table.
        text_field: the column of text or of conversations; "text" by default.
        columns: which column holds which part, as in `{"prompt": "question", "completion": "answer"}`. A part has the
            names that its column is known by. None (the default) goes by the columns' names.
        formatting_func: takes a row and returns a text or a list of messages, or takes a batch of rows (a dict of
            lists) and returns a list of texts. It is called on the first rows to find out which. None by default. It
            takes precedence over `columns`.
        readings: the readings to try; the first that fits is taken. None (the default): those of rows for SFT.
        understood: describes the readings in the error message.

    Raises `DataError`, which lists the columns and the shapes that are understood, if no reading fits.
    """
    if formatting_func is not None:
        return _detect_formatting(dataset, formatting_func)
    readings = READINGS if readings is None else readings
    contents = {column: _contents(dataset, column) for column in dataset.column_names}
    if columns:
        return _detect_named(dataset, contents, columns, readings, understood)
    for column, content in contents.items():
        if content == "images" or (column in IMAGE_COLUMNS and content != "empty"):
            raise DataError(
                f"The column `{column}` holds images, and {NO_IMAGES}. To train on the text alone, remove it with "
                f"`dataset.remove_columns({column!r})`."
            )
    for numbers in (False, True):  # a column of numbers is read as text only if nothing else fits
        for reading in readings:
            found = _match(reading, contents, text_field, numbers and reading.kind == "dialogue")
            if found is not None:
                sentence = _sentence(reading, found, list(contents), text_field)
                return _shape(reading, found, contents, dataset, sentence)
    if readings is READINGS:
        remedy = (
            "columns={'prompt': ..., 'completion': ...}, or name the column of text or conversations with "
            f"`dataset_text_field` (now {text_field!r})."
        )
    else:
        parts = [part.name for part in readings[1].parts if not part.optional]
        remedy = f"columns={{{', '.join(f'{part!r}: ...' for part in parts)}}}."
    raise DataError(
        f"Cannot read the rows: the columns are {_columns_in_words(contents)}. Understood are {understood}. Say which "
        f"column is which with `columns`, as in {remedy}"
    )


def _shape(
    reading: Reading,
    columns: dict[str, str],
    contents: Mapping[str, str],
    dataset: datasets.Dataset,
    sentence: str,
) -> Shape:
    conversational = any(contents[column] in COMPLETION_CONTENTS for column in columns.values())
    numbers = tuple(column for part, column in columns.items() if part in _TEXTS and contents[column] == "number")
    if numbers:
        which = ", ".join(f"`{column}`" for column in numbers)
        sentence += f"; numbers in {which} read as text"
    if reading.kind == "messages" and (flag := _flag_of(dataset, columns["messages"])):
        sentence += f"; `{flag}` of a message says whether it is trained on"
    return Shape(reading.kind, columns, conversational, sentence, numbers=numbers)


def _flag_of(dataset: datasets.Dataset, column: str) -> str | None:
    """The field of messages that says whether they are trained on, if the first rows have one."""
    for messages in dataset.with_format(None).select_columns([column])[:100][column]:
        for message in messages or ():
            for flag in FLAGS:
                if isinstance(message, Mapping) and message.get(flag) is not None:
                    return flag
    return None


def _columns_in_words(contents: Mapping[str, str]) -> str:
    return ", ".join(f"`{column}` ({_CONTENTS_IN_WORDS[what]})" for column, what in contents.items()) or "none"


def _match(
    reading: Reading, contents: Mapping[str, str], text_field: str, numbers: bool = False
) -> dict[str, str] | None:
    columns: dict[str, str] = {}
    for part in reading.parts:
        names: list[str] = list(part.columns) or list(contents)
        if part.columns == (TEXT,):
            names = [text_field]
        elif part.columns == (NAMED,):
            names = [text_field] if text_field != "text" else []
        fitting = [name for name in names if _fits(contents.get(name), part, numbers) and name not in columns.values()]
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


_TEXTS = ("prompt", "input", "completion")  # parts that may be numbers, read as text


def _fits(content: str | None, part: Part, numbers: bool = False) -> bool:
    if numbers and content == "number" and part.name in _TEXTS:
        content = "text"
    return content in part.contents or (content == "transcript" and "text" in part.contents)


def _sentence(reading: Reading, columns: Mapping[str, str], seen: Sequence[str], text_field: str) -> str:
    sentence, notes = _reads_as(reading, columns, seen)
    if text_field != "text" and text_field not in columns.values():
        why = "there is no such column" if text_field not in seen else "it cannot be read as text or conversations"
        notes.append(f"`dataset_text_field` {text_field!r} not used: {why}")
    return sentence + (f" ({'; '.join(notes)})" if notes else "")


def _reads_as(reading: Reading, columns: Mapping[str, str], seen: Sequence[str]) -> tuple[str, list[str]]:
    says = reading.says.format(**{part: f"`{column}`" for part, column in columns.items()})
    used = [part.name for part in reading.parts if part.optional and part.name in columns]
    if used:
        says += " with " + ", ".join(f"`{columns[part]}`" for part in used)
    ignored = [column for column in seen if column not in columns.values()]
    return f"columns {', '.join(seen)}: read as {says}", [f"{', '.join(ignored)} ignored"] if ignored else []


def part_to_column(named: Mapping[str, str], there: Sequence[str]) -> dict[str, str]:
    """The user's `columns` as part -> column. The user may also write column -> part, if no other reading is possible.

    `there` are the names of the columns.
    """
    known = set(there)
    if not set(named.values()) <= known and set(named) <= known:
        return {part: column for column, part in named.items()}
    return dict(named)


def _detect_named(
    dataset: datasets.Dataset,
    contents: Mapping[str, str],
    named: Mapping[str, str],
    readings: Sequence[Reading],
    understood: str,
) -> Shape:
    """The shape by the first reading that has all parts in `named` (part -> column) and misses no part it needs."""
    named = part_to_column(named, list(contents))
    for column in named.values():
        if column not in contents:
            near = difflib.get_close_matches(str(column), list(contents), n=1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            there = _columns_in_words(contents)
            raise DataError(f"columns={dict(named)} names `{column}`, but the columns are {there}.{meant}")
    wrong = ""
    for reading in readings:
        parts = {name: part for part in reading.parts for name in (*_names(part), part.name)}
        if any(key not in parts for key in named):
            continue
        found = {parts[key].name: column for key, column in named.items()}
        numbers = readings is READINGS and reading.kind in ("dialogue", "prompt_completion")
        for part in reading.parts:  # a part that is not named may have a column under its own name
            for name in _names(part):
                if part.name not in found and _fits(contents.get(name), part, numbers) and name not in found.values():
                    found[part.name] = name
        if any(part.name not in found and not part.optional for part in reading.parts):
            continue
        bad = [
            part
            for part in reading.parts
            if part.name in found and not _fits(contents[found[part.name]], part, numbers)
        ]
        if bad:
            column = found[bad[0].name]
            may = " or ".join(dict.fromkeys(_CONTENTS_IN_WORDS[content] for content in bad[0].contents))
            wrong = wrong or f"`{column}` holds {_CONTENTS_IN_WORDS[contents[column]]}, but {may} is needed"
            continue
        # In the order of the reading, not in that of `columns`.
        found = {part.name: found[part.name] for part in reading.parts if part.name in found}
        sentence, notes = _reads_as(reading, found, list(contents))
        notes.insert(0, f"as `columns` says: {', '.join(f'{key} is {column}' for key, column in named.items())}")
        return _shape(reading, found, contents, dataset, f"{sentence} ({'; '.join(notes)})")
    if wrong:
        raise DataError(f"columns={dict(named)} does not fit the data: {wrong}.")
    known = sorted({name for reading in readings for part in reading.parts for name in (*_names(part), part.name)})
    for key in named:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"columns={dict(named)}: no row has a part {key!r}; parts are {', '.join(known)}.{meant}")
    raise DataError(f"columns={dict(named)} does not describe a whole row. Understood are {understood}.")


def _names(part: Part) -> tuple[str, ...]:
    return tuple(name for name in part.columns if not name.startswith("\0"))


_CONTENTS_IN_WORDS = {
    "text": "text",
    "transcript": "text",
    "messages": "messages",
    "turn": "single messages",
    "from_value": "turns of {from, value}",
    "integers": "lists of numbers",
    "floats": "lists of numbers",
    "booleans": "lists of true and false",
    "texts": "lists of texts",
    "images": "images",
    "structs": "lists of records",
    "struct": "records",
    "number": "numbers",
    "empty": "only None",
    "other": "something else",
}


def _contents(dataset: datasets.Dataset, column: str) -> str:
    """What the column holds, as a key of `_CONTENTS_IN_WORDS`: by its feature, or else by its first value."""
    feature = dataset.features[column]
    if isinstance(feature, datasets.Image):
        return "images"
    if isinstance(feature, datasets.Value):
        if feature.dtype in ("string", "large_string"):
            first = dataset.with_format(None).select_columns([column])[:1][column]
            return "transcript" if first and str(first[0]).startswith(TRANSCRIPT) else "text"
        return "empty" if feature.dtype == "null" else "number"
    if isinstance(feature, dict):
        return _contents_of_record(feature)
    if isinstance(feature, datasets.List | datasets.LargeList):
        item = feature.feature
        if isinstance(item, datasets.Image):
            return "images"
        if isinstance(item, dict):
            return _contents_of_records(item)
        if isinstance(item, datasets.Value) and item.dtype != "null":
            if item.dtype == "bool":
                return "booleans"
            if item.dtype in ("string", "large_string"):
                return "texts"
            if item.dtype.startswith("float"):
                return "floats"
            return "integers" if item.dtype.startswith(("int", "uint")) else "other"
    first = dataset.with_format(None).select_columns([column])[:100][column]
    return _contents_of_value(next((value for value in first if value), None))


def _contents_of_record(record: Mapping[str, Any]) -> str:
    if set(record) == {"bytes", "path"}:
        return "images"
    if isinstance(record.get("text"), datasets.List):  # {text: [...], answer_start: [...]}, as in SQuAD
        return "texts"
    return "turn" if _contents_of_records(record) in MESSAGE_CONTENTS else "struct"


def _contents_of_records(record: Iterable[str]) -> str:
    keys = set(record)
    if "role" in keys and keys & {"content", "tool_calls"}:
        return "messages"
    if keys == {"bytes", "path"}:
        return "images"
    return "from_value" if {"from", "value"} <= keys else "structs"


def _contents_of_value(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return _contents_of_record(value)
    if isinstance(value, list) and isinstance(value[0], Mapping):
        return _contents_of_records(value[0])
    return "other"


# ---------------------------------------------------------------------------------------------------------------------
# The user's formatting function


def _detect_formatting(dataset: datasets.Dataset, function: Callable[[Any], Any]) -> Shape:
    plain = dataset.with_format(None)
    calling, value = "row", None
    try:
        value = function(plain[0])
        by_row = isinstance(value, str) or is_conversation(value)
    except Exception:  # the function may expect a batch
        by_row = False
    if not by_row:
        size = min(2, len(plain))
        try:
            batch = function(plain[:size])
        except Exception:
            batch = None
        if isinstance(batch, list | tuple) and len(batch) == size and all(isinstance(text, str) for text in batch):
            calling, value = "batch", batch[0]
        else:
            value = call_formatting(function, plain[0], 0)  # raises an error with the reason, if the call fails
            check_formatted(value, 0)
    name = getattr(function, "__name__", type(function).__name__)
    conversational = not isinstance(value, str)
    what = "conversations" if conversational else "texts"
    sentence = f"columns {', '.join(dataset.column_names)}: read as the {what} that formatting_func `{name}` makes"
    return Shape("messages" if conversational else "text", {}, conversational, sentence, calling)


TRANSCRIPT = "\n\nHuman:"  # the beginning of a conversation that is written out as text


def call_formatting(function: Callable[[Any], Any], argument: Any, row: int) -> Any:
    """`function(argument)`. Raises `DataError`, which names the row, for any error in it."""
    try:
        return function(argument)
    except Exception as error:
        raise DataError(
            f"row {row}: formatting_func fails with {type(error).__name__}: {error}. The row has the fields "
            f"{', '.join(argument)}."
        ) from error


def check_formatted(value: Any, row: int) -> Any:
    """The value that a formatting function returned for a row. Raises `DataError` if it is no text and no messages."""
    if isinstance(value, str) or is_conversation(value):
        return value
    what = f"a list of {len(value)}" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
    what = "None" if value is None else what
    raise DataError(
        f"row {row}: formatting_func returned {what}. It must return a string or a list of messages for a row, or a "
        "list of strings, one for each row, for a dict of columns."
    )
