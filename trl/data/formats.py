"""What a row is: which shape the rows of a data set have, and what is wrong with a row that cannot be read."""

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import datasets

from .sources import DataError, load

__all__ = ["DataError", "Shape", "detect", "load", "messages_of", "place", "text_of", "without_none"]


@dataclass(frozen=True)
class Shape:
    """How the rows of a data set are read.

    `kind` is a kind of the readings tried; `columns` maps each part of that reading to the column that holds it (absent
    optional parts are left out); `conversational` says that the chat template is applied; `sentence` is one line for
    people: what was seen and how it is read. `formatting` is '' or says how a `formatting_func` is called: with a
    `row`, or with a `batch` of them. `numbers` are the columns whose numbers are read as text.
    """

    kind: str
    columns: dict[str, str]
    conversational: bool
    sentence: str
    formatting: str = ""
    numbers: tuple[str, ...] = ()

    def with_template(self, there_is_one: bool) -> "Shape":
        """Two strings, a question and its answer, are a conversation where the tokenizer has a chat template; so is a
        transcript."""
        if self.kind not in ("dialogue", "ranked", "transcripts") or self.conversational:
            return self
        if self.kind == "transcripts":
            how = "a conversation" if there_is_one else "text: the tokenizer has no template"
        else:
            how = (
                "a conversation of two turns" if there_is_one else "text under headings: the tokenizer has no template"
            )
        return replace(self, conversational=there_is_one, sentence=f"{self.sentence}, each row as {how}")


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

_SYSTEM = Part("system", ("system", "system_prompt"), ("text",), optional=True)
_TOOLS = (
    Part("tools", ("tools",), ("text", "structs", "other"), optional=True),
    Part("chat_template_kwargs", ("chat_template_kwargs",), ("struct", "other"), optional=True),
)
_MASK = ("integers", "booleans", "empty")
_TALK = ("messages", "from_value")
_SAID = (*_TALK, "turn")  # a completion that is of messages, of one or of several


def _conversations(*names: str) -> Reading:
    return Reading("messages", "conversations in {messages}", (Part("messages", names, _TALK), _SYSTEM, *_TOOLS))


def _dialogue(says: str, prompt: Sequence[str], further: Sequence[str], completion: Sequence[str]) -> Reading:
    """Two strings: what is asked, maybe with more to it, and what is answered."""
    parts = [Part("prompt", tuple(prompt), ("text",)), Part("completion", tuple(completion), ("text", "texts"))]
    if further:
        parts.insert(1, Part("input", tuple(further), ("text",), optional=True))
    return Reading("dialogue", says, (*parts, _SYSTEM))


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
    _conversations(NAMED),
    Reading(
        "prompt_completion",
        "prompts in {prompt} and their completions in {completion}",
        (
            Part("prompt", ("prompt",), ("text", "messages")),
            Part("completion", ("completion",), ("text", "messages")),
            *_TOOLS,
        ),
    ),
    _conversations("messages"),
    _conversations("conversations"),
    Reading("text", "plain text in {text}", (Part("text", (TEXT,), ("text",)),)),
    _conversations(),
    _dialogue(
        "instructions in {prompt} and what follows them in {completion}",
        ("instruction",),
        ("input", "context"),
        ("output", "response", "answer"),
    ),
    _dialogue(
        "questions in {prompt} and their answers in {completion}",
        ("question", "query"),
        ("context",),
        ("answer", "answers", "response", "output"),
    ),
    _dialogue(
        "prompts in {prompt} and the replies to them in {completion}",
        ("prompt", "input"),
        (),
        ("response", "output", "answer", "answers"),
    ),
)


def _number(*names: str) -> Part:
    return Part(names[0], names, ("number", "empty"), optional=True)


def _tokens(*names: str, optional: bool = False) -> Part:
    return Part(names[0], names, ("integers", "empty"), optional)


_REFERENCES = (
    _number("ref_chosen_logps", "reference_chosen_logps"),
    _number("ref_rejected_logps", "reference_rejected_logps"),
)
_JUDGED = (_number("margin"), *_REFERENCES)
_LABEL = Part("label", ("label", "kto_tag"), ("number", "empty", "text"))
_ASKED = ("question", "query", "instruction", "input")
_FURTHER = Part("input", ("input", "context"), ("text",), optional=True)


def _two(contents: tuple[str, ...]) -> tuple[Part, Part]:
    """The preferred completion and the other one."""
    return (
        Part("chosen", ("chosen", "chosen_response", "chosen_messages"), contents),
        Part("rejected", ("rejected", "rejected_response", "rejected_messages"), contents),
    )


def _pairs(says: str, names: tuple[str, ...], prompt: tuple[str, ...], completion: tuple[str, ...]) -> Reading:
    says = f"{says} in {{prompt}}, answered in {{chosen}} and, worse, in {{rejected}}"
    extras = (_SYSTEM, *_TOOLS) if prompt != ("text",) or completion != ("text",) else ()
    return Reading("pairs", says, (Part("prompt", names, prompt), *_two(completion), *extras, *_JUDGED))


# Rows of two completions, of which one is preferred; read by `samples`.
PAIR_READINGS: tuple[Reading, ...] = (
    Reading(
        "tokens",
        "token ids in {chosen_ids} and, of the worse, in {rejected_ids}",
        (
            _tokens("prompt_ids", optional=True),
            _tokens("chosen_ids", "chosen_input_ids"),
            _tokens("rejected_ids", "rejected_input_ids"),
            _number("row"),
            *_JUDGED,
        ),
    ),
    _pairs("prompts", ("prompt",), ("text",), ("text",)),
    _pairs("prompts", ("prompt",), ("text", "turn", *_TALK), ("text", *_SAID)),
    _pairs("conversations", ("conversations", "messages"), _TALK, ("text", *_SAID)),
    _pairs("questions", _ASKED, ("text",), _SAID),
    Reading(
        "dialogue",
        "questions in {prompt}, answered in {chosen} and, worse, in {rejected}",
        (Part("prompt", _ASKED, ("text",)), _FURTHER, *_two(("text",)), _SYSTEM, *_JUDGED),
    ),
    Reading(
        "implicit",
        "conversations in {chosen} and, worse, in {rejected}; what they begin with alike is the prompt",
        (*_two(_TALK), _SYSTEM, *_TOOLS, *_JUDGED),
    ),
    Reading(
        "transcripts",
        "transcripts in {chosen} and, worse, in {rejected}; what they begin with alike is the prompt",
        (*_two(("transcript",)), _SYSTEM, *_JUDGED),
    ),
    Reading(
        "implicit",
        "texts in {chosen} and, worse, in {rejected}; what they begin with alike is the prompt",
        (*_two(("text",)), *_JUDGED),
    ),
    Reading(
        "ranked",
        "prompts in {prompt} and, of the answers in {responses}, the best against the worst by {scores}",
        (
            Part("prompt", ("prompt", *_ASKED), ("text", *_TALK)),
            _FURTHER,
            Part("responses", ("responses", "completions", "answers"), ("texts",)),
            Part("scores", ("scores", "ratings", "rewards"), ("integers", "floats", "empty")),
            _SYSTEM,
        ),
    ),
)

# Rows of one completion and whether it is wanted; or else of two, each of which makes a row.
UNPAIRED_READINGS: tuple[Reading, ...] = (
    Reading(
        "tokens",
        "token ids in {completion_ids}, wanted or not by {label}",
        (
            _tokens("prompt_ids"),
            _tokens("completion_ids"),
            _LABEL,
            _number("row"),
            _number("ref_logps"),
            _tokens("kl_completion_ids", optional=True),
            _number("ref_KL_logps"),
        ),
    ),
    Reading(
        "unpaired",
        "prompts in {prompt} and completions in {completion}, wanted or not by {label}",
        (
            Part("prompt", ("prompt",), ("text",)),
            Part("completion", ("completion",), ("text",)),
            _LABEL,
            _number("ref_logps", "reference_logps"),
        ),
    ),
    Reading(
        "unpaired",
        "prompts in {prompt} and completions in {completion}, wanted or not by {label}",
        (
            Part("prompt", ("prompt",), ("text", "turn", *_TALK)),
            Part("completion", ("completion",), ("text", *_SAID)),
            _LABEL,
            _SYSTEM,
            *_TOOLS,
            _number("ref_logps", "reference_logps"),
        ),
    ),
    Reading(
        "implicit",
        "conversations in {completion}, the last turn wanted or not by {label}",
        (Part("completion", ("messages", "conversations"), _TALK), _LABEL, _SYSTEM, *_TOOLS, _number("ref_logps")),
    ),
    Reading(
        "dialogue",
        "questions in {prompt} and answers in {completion}, wanted or not by {label}",
        (
            Part("prompt", ("prompt", *_ASKED), ("text",)),
            _FURTHER,
            Part("completion", ("answer", "response", "output"), ("text",)),
            _LABEL,
            _SYSTEM,
            _number("ref_logps"),
        ),
    ),
    *PAIR_READINGS,
)

# Rows of a solution in steps, each of which is judged.
STEP_READINGS: tuple[Reading, ...] = (
    Reading(
        "tokens",
        "token ids in {completion_ids}, whose steps end by {step_mask} and are right or not by {step_labels}",
        (
            _tokens("prompt_ids"),
            _tokens("completion_ids"),
            Part("step_mask", ("step_mask",), _MASK),
            Part("step_labels", ("step_labels",), _MASK),
            _number("row"),
        ),
    ),
    Reading(
        "steps",
        "prompts in {prompt} and steps in {completion}, right or not by {labels}",
        (
            Part("prompt", ("prompt", *_ASKED), ("text", "turn", *_TALK)),
            Part("completion", ("completions", "steps"), ("texts", "empty")),
            Part("labels", ("labels",), (*_MASK, "floats", "texts")),
            _SYSTEM,
            *_TOOLS,
        ),
    ),
)

UNDERSTOOD_PAIRS = (
    "`prompt`, `chosen` and `rejected` (strings, or lists of {role, content} or {from, value}), `chosen` and "
    "`rejected` alone (both with the prompt they share), `question` or `instruction`, `chosen` and `rejected`, "
    "`conversations` with `chosen` and `rejected`, or `prompt`, `responses` and `scores`"
)
UNDERSTOOD_UNPAIRED = (
    "`prompt`, `completion` and `label` (true or false), `messages` and `label`, `question`, `answer` and `label`, or "
    f"pairs: {UNDERSTOOD_PAIRS}"
)
UNDERSTOOD_STEPS = "`prompt`, `completions` (a list of steps) and `labels` (a list of true and false)"

UNDERSTOOD = (
    "`text` (a string), `messages` or `conversations` (a list of {role, content} or {from, value}), `prompt` and "
    "`completion` (strings or such lists), `instruction` and `output`, `question` and `answer`, or `input_ids` (with "
    "`labels` or a mask)"
)
IMAGE_COLUMNS = ("image", "images")
NO_IMAGES = "images are not supported yet"


def detect(
    dataset: datasets.Dataset,
    text_field: str = "text",
    columns: Mapping[str, str] | None = None,
    formatting_func: Callable[[Any], Any] | None = None,
    readings: Sequence[Reading] = READINGS,
    understood: str = UNDERSTOOD,
) -> Shape:
    """Finds how the rows of `dataset` are to be read: by the first of `readings` that fits, which are described by
    `understood`. `text_field` names the column of text, or of conversations.

    `columns` says which column holds which part, as in `{"prompt": "question", "completion": "answer"}`; parts have the
    names that such a column is known by. `formatting_func` makes of a row a text or a list of messages, or of a batch
    of rows (a dict of lists) a list of texts; it is called on the first rows to see which. Either overrides what would
    have been found.

    Raises `DataError`, which lists the columns seen and the shapes understood, when no reading fits.
    """
    if formatting_func is not None:
        return _detect_formatting(dataset, formatting_func)
    contents = {column: _contents(dataset, column) for column in dataset.column_names}
    if columns:
        return _detect_named(dataset, contents, columns, readings, understood)
    for column, content in contents.items():
        if content == "images" or (column in IMAGE_COLUMNS and content != "empty"):
            raise DataError(
                f"The column `{column}` holds images, and {NO_IMAGES}. To train on the text alone, remove it with "
                f"`dataset.remove_columns({column!r})`."
            )
    for numbers in (False, True):  # a column of numbers is taken for text only where nothing else fits
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
    conversational = any(contents[column] in _SAID for column in columns.values())
    numbers = tuple(column for part, column in columns.items() if part in _TEXTS and contents[column] == "number")
    if numbers:
        which = ", ".join(f"`{column}`" for column in numbers)
        sentence += f"; numbers in {which} read as text"
    if reading.kind == "messages" and (flag := _flag_of(dataset, columns["messages"])):
        sentence += f"; `{flag}` of a message says whether it is trained on"
    return Shape(reading.kind, columns, conversational, sentence, numbers=numbers)


def _flag_of(dataset: datasets.Dataset, column: str) -> str | None:
    """The field by which messages say whether they are trained on, if the first rows use one."""
    for talk in dataset.with_format(None).select_columns([column])[:100][column]:
        for message in talk or ():
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


_TEXTS = ("prompt", "input", "completion")  # the parts of a question and its answer, which may be numbers


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
    """`columns` as the user writes it, which is part -> column, or column -> part where only that can be meant."""
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
    """The reading of which `named` (part -> column) names parts, all of those that it cannot do without."""
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
        for part in reading.parts:  # what is not named may be there under its own name
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
            wrong = wrong or f"`{column}` holds {_CONTENTS_IN_WORDS[contents[column]]}, and what is wanted is {may}"
            continue
        # Not in the order in which the user happened to name them.
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
    """A key of `_CONTENTS_IN_WORDS`: what the column holds, by its feature, or else by its first value."""
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
    return "turn" if _contents_of_records(record) in _TALK else "struct"


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
# A function of the user's


def _detect_formatting(dataset: datasets.Dataset, function: Callable[[Any], Any]) -> Shape:
    plain = dataset.with_format(None)
    calling, value = "row", None
    try:
        value = function(plain[0])
        by_row = isinstance(value, str) or is_talk(value)
    except Exception:  # it may expect a batch
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
            value = call_formatting(function, plain[0], 0)  # raises, and says why, if it was this that failed
            check_formatted(value, 0)
    name = getattr(function, "__name__", type(function).__name__)
    talk = not isinstance(value, str)
    what = "conversations" if talk else "texts"
    sentence = f"columns {', '.join(dataset.column_names)}: read as the {what} that formatting_func `{name}` makes"
    return Shape("messages" if talk else "text", {}, talk, sentence, calling)


TRANSCRIPT = "\n\nHuman:"  # how a conversation that is written out as text begins


def is_talk(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def call_formatting(function: Callable[[Any], Any], argument: Any, row: int) -> Any:
    """`function(argument)`; its own mistakes become a sentence that names the row."""
    try:
        return function(argument)
    except Exception as error:
        raise DataError(
            f"row {row}: formatting_func fails with {type(error).__name__}: {error}. The row has the fields "
            f"{', '.join(argument)}."
        ) from error


def check_formatted(value: Any, row: int) -> Any:
    if isinstance(value, str) or is_talk(value):
        return value
    what = f"a list of {len(value)}" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
    what = "None" if value is None else what
    raise DataError(
        f"row {row}: formatting_func returned {what}. It must return a string or a list of messages for a row, or a "
        "list of strings, one for each row, for a dict of columns."
    )


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


def answer_of(value: Any, where: str) -> str:
    """The answer to a question: a string, the first of several, or what is under `text` in a record of them."""
    if isinstance(value, Mapping) and "text" in value:
        value = value["text"]
    if isinstance(value, list | tuple):
        if not value:
            raise DataError(f"{where} is an empty list: there is no answer. Remove such rows with `dataset.filter`.")
        value = value[0]
    return text_of(value, where)


def dialogue_of(prompt: str, further: str | None, system: str | None) -> list[dict[str, Any]]:
    """The messages before the answer, of a question that is a string with maybe more to it."""
    asked = f"{prompt}\n\n{further}" if further and further.strip() else prompt
    return with_system(system, [{"role": "user", "content": asked}])


def headed_text(prompt: str, further: str | None, system: str | None) -> str:
    """The same as text, for a tokenizer without a chat template."""
    given = f"### Input:\n{further}\n\n" if further and further.strip() else ""
    before = f"{system}\n\n" if system and system.strip() else ""
    return f"{before}### Instruction:\n{prompt}\n\n{given}### Response:\n"


def with_system(system: str | None, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` after a system message, unless there is none to say, or they begin with their own."""
    if not system or not system.strip() or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]


# The names that other data give to those who speak.
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "chatbot", "bing", "bard", "model", "ai", "bot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response", "function"), "tool"),
    "system": "system",
    "developer": "developer",
}


# The fields by which other data say of a message whether it is trained on (LLaMA-Factory, OpenAI, Axolotl).
FLAGS = ("loss_weight", "weight", "train", "training")


def pop_flags(messages: list[dict[str, Any]], where: str) -> list[bool] | None:
    """Takes the fields of `FLAGS` off the messages: which of these are trained on, or None where they do not say.

    Flags that are all true, with some on messages of others than the assistant, leave it to the options; so does their
    absence. Raises `DataError`, which begins with `where`, for a weight that is neither 0 nor 1, and where messages of
    others are to be trained on one by one.
    """
    found: dict[int, bool] = {}
    for index, message in enumerate(messages):
        for flag in FLAGS:
            if flag not in message:
                continue
            value = message.pop(flag)
            if not isinstance(value, int | float) or value not in (0, 1):
                raise DataError(
                    f"{where.removesuffix('`')}[{index}].{flag}` is {value!r}. A message is trained on or not: give 1 "
                    "or 0 (true or false), or remove the field."
                )
            found[index] = bool(value)
    if not found or all(found.values()) and len(found) == len(messages):
        return None
    for index, on in found.items():
        if on and messages[index]["role"] != "assistant":
            raise DataError(
                f"{where.removesuffix('`')}[{index}]` has the role {messages[index]['role']!r} and is marked to be "
                "trained on. Only the assistant's messages can be trained on one by one: mark it 0 (false), or remove "
                f"the fields {', '.join(FLAGS)} to train on all tokens."
            )
    return [message["role"] == "assistant" and found.get(index, True) for index, message in enumerate(messages)]


def messages_of(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of messages as a chat template wants it: every role a string, every content a string.

    Turns of {from, value} become messages. Contents given as blocks of text are joined; the arguments of tool calls,
    where they are JSON in a string, are read; fields that are None are left out, since a table gives every message the
    fields of all others. Raises `DataError`, which begins with `where`, when a message cannot be read.
    """
    if value is None:
        raise DataError(f"{where} is None. Fill it in, or remove such rows with `dataset.filter`.")
    if not isinstance(value, list | tuple):
        raise DataError(f"{where} is a {type(value).__name__}, not a list of messages {{role, content}}.")
    if not value:
        raise DataError(f"{where} is an empty list. Remove such rows with `dataset.filter`.")
    # `place` ends in a backtick, so that the index goes inside it: `messages[3]`.
    field = where.removesuffix("`")
    return [_message_of(message, field, index) for index, message in enumerate(value)]


def _message_of(message: Any, field: str, index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"{field}[{index}]` is a {type(message).__name__}, not a message {{role, content}}.")
    role, content = message.get("role"), message.get("content")
    if role is None and "from" in message:
        return _message_of_turn(message, field, index)
    if not isinstance(role, str) or not role:
        raise DataError(f"{field}[{index}]` has no `role`. Every message needs one, such as 'user' or 'assistant'.")
    if len(message) == 2 and isinstance(content, str):  # nothing to clean, as in most messages
        return {"role": _role(role), "content": content}
    where = f"{field}[{index}]"
    cleaned = {key: without_none(item) for key, item in message.items() if item is not None}
    cleaned["role"] = _role(role)
    if isinstance(content, list):
        cleaned.update(_of_blocks(content, where))
    elif content is None and not message.get("tool_calls"):
        raise DataError(f"{where}.content` is None. Give the message a text, or remove the row with `dataset.filter`.")
    elif content is not None and not isinstance(content, str):
        raise DataError(f"{where}.content` is a {type(content).__name__}, not a string. Convert it to one.")
    if cleaned.get("tool_calls"):
        cleaned["tool_calls"] = [
            _call_of(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(cleaned["tool_calls"])
        ]
    return cleaned


def _of_blocks(blocks: Sequence[Any], where: str) -> dict[str, Any]:
    """The fields of a message whose content is a list of blocks: its texts joined, its reasoning, its tool calls."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Any] = []
    for block in blocks:
        kind = str(block.get("type")) if isinstance(block, Mapping) else ""
        if "image" in kind:
            raise DataError(f"{where}.content` holds an image, and {NO_IMAGES}. Remove the row, or keep its text.")
        # A block may have a `value` in place of a `text`: LLaMA-Factory writes {type, value}.
        value = block.get("value") if isinstance(block, Mapping) else None
        if isinstance(block, Mapping) and "text" in block and not isinstance(value, str):
            texts.append(block["text"] or "")
        elif kind in ("text", "reasoning") and isinstance(value, str):
            (texts if kind == "text" else thoughts).append(value)
        elif kind == "tool_call" and isinstance(value, str):
            calls += _calls_of(value, f"{where}.content")
        else:
            raise DataError(f"{where}.content` has blocks that are not text. Only text can be trained on here.")
    found: dict[str, Any] = {"content": "".join(texts)}
    if thoughts:
        found["reasoning_content"] = "".join(thoughts)
    return {**found, "tool_calls": calls} if calls else found


def _role(role: str) -> str:
    # `function` is a role of its own to some templates; in turns of {from, value} it is a tool's answer.
    return role if role == "function" else ROLES.get(role.lower(), role)


def _message_of_turn(turn: Mapping[str, Any], field: str, index: int) -> dict[str, Any]:
    where = f"{field}[{index}]"
    speaker, value = turn["from"], turn.get("value")
    role = ROLES.get(str(speaker).lower())
    if role is None:
        raise DataError(f"{where}.from` is {speaker!r}, who is not known. Known are {', '.join(ROLES)}.")
    if not isinstance(value, str):
        what = "None" if value is None else f"a {type(value).__name__}, not a string"
        raise DataError(f"{where}.value` is {what}. Give the turn a text, or remove the row with `dataset.filter`.")
    if speaker not in ("function_call", "tool_call"):
        return {"role": role, "content": value}
    return {"role": role, "tool_calls": _calls_of(value, f"{where}.value")}


def _calls_of(value: str, where: str) -> list[Any]:
    """Tool calls that are JSON in a string: one, or a list of them."""
    try:
        calls = json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}` is a tool call, but not valid JSON ({error.msg}). Correct the row.") from error
    calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
    return [_call_of(call, where) for call in calls]


def _call_of(call: Any, where: str) -> Any:
    """A tool call whose arguments are a dict: OpenAI writes them as JSON in a string, and templates write JSON too."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise DataError(f"{where}` is a {type(call).__name__}, not a call {{function: {{name, arguments}}}}.")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        read = json.loads(arguments) if arguments.strip() else {}
    except json.JSONDecodeError as error:
        inner = ".function" if function is not call else ""
        raise DataError(
            f"{where}{inner}.arguments` is not valid JSON ({error.msg}). Correct it, or remove the row."
        ) from error
    function = {**function, "arguments": read}
    return {**call, "function": function} if "function" in call else function


def without_none(value: Any) -> Any:
    """`value` without the None entries of its dicts: a table fills the keys that a record does not have with None."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value
