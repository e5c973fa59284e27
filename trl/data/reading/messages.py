"""Texts and messages of a row, in the form that chat templates read."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trl.data.reading.errors import DataError

NO_IMAGES = "images are not supported yet"


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def place(row: int, field: str) -> str:
    """The name of a field of a row in error messages."""
    return f"row {row}: `{field}`"


def text_of(value: Any, where: str) -> str:
    """The string of a text field. Raises `DataError`, which begins with `where`, for anything else."""
    if isinstance(value, str):
        return value
    if value is None:
        raise DataError(f"{where} is None. Fill it in, or remove such rows with `dataset.filter`.")
    raise DataError(f"{where} is a {type(value).__name__}, not a string. Convert the column to strings.")


def answer_of(value: Any, where: str) -> str:
    """The answer to a question: a string, the first of several, or the field `text` of a record.

    Raises `DataError`, which begins with `where`, for anything else.
    """
    if isinstance(value, Mapping) and "text" in value:
        value = value["text"]
    if isinstance(value, list | tuple):
        if not value:
            raise DataError(f"{where} is an empty list: there is no answer. Remove such rows with `dataset.filter`.")
        value = value[0]
    return text_of(value, where)


def dialogue_of(prompt: str, further: str | None, system: str | None) -> list[dict[str, Any]]:
    """The messages before the answer: a question, maybe with an input, after a system message, if there is one."""
    asked = f"{prompt}\n\n{further}" if further and further.strip() else prompt
    return with_system(system, [{"role": "user", "content": asked}])


def headed_text(prompt: str, further: str | None, system: str | None) -> str:
    """The same as `dialogue_of`, as text, for a tokenizer without a chat template."""
    given = f"### Input:\n{further}\n\n" if further and further.strip() else ""
    before = f"{system}\n\n" if system and system.strip() else ""
    return f"{before}### Instruction:\n{prompt}\n\n{given}### Response:\n"


def with_system(system: str | None, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` after a system message, unless `system` is empty or they begin with a system message already."""
    if not system or not system.strip() or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]


# The names that other data sets give to roles.
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "chatbot", "bing", "bard", "model", "ai", "bot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response", "function"), "tool"),
    "system": "system",
    "developer": "developer",
}


# The fields of a message that say whether it is trained on (in data for LLaMA-Factory, OpenAI, Axolotl).
FLAGS = ("loss_weight", "weight", "train", "training")


def pop_flags(messages: list[dict[str, Any]], where: str) -> list[bool] | None:
    """Removes the fields of `FLAGS` from the messages. Returns which messages are trained on, one entry for each.

    Returns None if there are no flags, or if every message has one and all are true: the options decide then. Raises
    `DataError`, which begins with `where`, for a flag other than 0 and 1, and for a true flag on a message that is not
    the assistant's.
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
    """A list of messages as chat templates expect it: every role and every content is a string.

    Turns of {from, value} become messages. Blocks of text are joined. The arguments of tool calls are parsed if they
    are JSON in a string. Fields that are None are left out, because a table gives every message the fields of all
    others. Raises `DataError`, which begins with `where`, if a message cannot be read.
    """
    if value is None:
        raise DataError(f"{where} is None. Fill it in, or remove such rows with `dataset.filter`.")
    if not isinstance(value, list | tuple):
        raise DataError(f"{where} is a {type(value).__name__}, not a list of messages {{role, content}}.")
    if not value:
        raise DataError(f"{where} is an empty list. Remove such rows with `dataset.filter`.")
    # `where` ends in a backtick. The index belongs before it: `messages[3]`.
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
    """The fields of a message whose content is a list of blocks: the joined texts, the reasoning, the tool calls."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Any] = []
    for block in blocks:
        kind = str(block.get("type")) if isinstance(block, Mapping) else ""
        if "image" in kind:
            raise DataError(f"{where}.content` holds an image, and {NO_IMAGES}. Remove the row, or keep its text.")
        # LLaMA-Factory writes {type, value}, not {type, text}.
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
    # Some templates have a role `function`. In turns of {from, value} it is a tool's answer.
    return role if role == "function" else ROLES.get(role.lower(), role)


def _message_of_turn(turn: Mapping[str, Any], field: str, index: int) -> dict[str, Any]:
    where = f"{field}[{index}]"
    speaker, value = turn["from"], turn.get("value")
    role = ROLES.get(str(speaker).lower())
    if role is None:
        raise DataError(f"{where}.from` is {speaker!r}, which is not a known role. Known are {', '.join(ROLES)}.")
    if not isinstance(value, str):
        what = "None" if value is None else f"a {type(value).__name__}, not a string"
        raise DataError(f"{where}.value` is {what}. Give the turn a text, or remove the row with `dataset.filter`.")
    if speaker not in ("function_call", "tool_call"):
        return {"role": role, "content": value}
    return {"role": role, "tool_calls": _calls_of(value, f"{where}.value")}


def _calls_of(value: str, where: str) -> list[Any]:
    """Tool calls from JSON in a string: one call or a list of calls."""
    try:
        calls = json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}` is a tool call, but not valid JSON ({error.msg}). Correct the row.") from error
    calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
    return [_call_of(call, where) for call in calls]


def _call_of(call: Any, where: str) -> Any:
    """A tool call with its arguments as a dict. OpenAI gives them as JSON in a string, which templates quote again."""
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
    """`value` without the None entries of its dicts. A table fills the keys that a record lacks with None."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value
