"""Wrappers that let strings act as message lists, and message lists act as strings.

A reward function is written for one of the two shapes and may get the other. `Text` is a string that also answers as a
message; `Messages` is a list that is compared as its text. Both record in `asked` that they were used as the other
shape. Uses that they cannot serve raise TypeError, AttributeError or KeyError; the caller then tries the other shape.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def text_of(value: Any, role: str = "assistant") -> str:
    """The text of a prompt or completion: the string itself, or the content of the last message with that role.

    Without such a message, the content of the last message. Content blocks are joined; None becomes ''.
    """
    if isinstance(value, str):
        return str(value)
    of_role = [message for message in value if message.get("role", role) == role]
    content = (of_role or list(value) or [{}])[-1].get("content")
    if isinstance(content, str):
        return str(content)
    return "".join(block.get("text") or "" for block in content or () if isinstance(block, Mapping))


def texts_of(values: Sequence[Any]) -> list[str]:
    """The texts of completions in either shape."""
    return [text_of(value) for value in values]


class Text(str):
    """A string that also acts as a conversation of one message: `text[-1]` is its last character, and
    `text[-1]["content"]` is the whole string.

    Iteration gives plain characters, so that a loop over messages fails instead of reading the text for each character.
    An empty string has an empty character at 0 and -1.
    """

    role: str
    asked: list[str]

    def __new__(cls, value: str, role: str = "assistant", asked: list[str] | None = None) -> "Text":
        self = super().__new__(cls, value)
        self.role, self.asked = role, [] if asked is None else asked
        return self

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._answer(key)
        if isinstance(key, slice):
            return super().__getitem__(key)
        return _Character("" if not self and key in (0, -1) else super().__getitem__(key), self)

    def get(self, key: str, default: Any = None) -> Any:
        """The `get` of a message."""
        return self._answer(key) if key in ("role", "content") else default

    def _answer(self, key: str) -> str:
        if key not in ("role", "content"):
            raise KeyError(key)
        self.asked.append(key)
        return self.role if key == "role" else str(self)


class _Character(str):
    """One character of a `Text`, which also acts as its only message."""

    text: Text

    def __new__(cls, value: str, text: Text) -> "_Character":
        self = super().__new__(cls, value)
        self.text = text
        return self

    def __getnewargs__(self) -> Any:
        return str(self), self.text

    def __getitem__(self, key: Any) -> Any:
        return self.text._answer(key) if isinstance(key, str) else super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self.text.get(key, default)


class Messages(list):
    """A list of messages that is searched for strings, and compared with strings, by its text. A plain list would never
    contain or equal a string."""

    def __init__(self, messages: Sequence[Mapping[str, Any]], role: str = "assistant", asked: list[str] | None = None):
        super().__init__(messages)
        self.role, self.asked = role, [] if asked is None else asked

    def _text(self) -> str:
        self.asked.append("text")
        return text_of(self, self.role)

    def __reduce__(self) -> Any:
        return Messages, (list(self), self.role, self.asked)

    def __contains__(self, item: object) -> bool:
        return item in self._text() if isinstance(item, str) else super().__contains__(item)

    def __eq__(self, other: object) -> bool:
        return self._text() == other if isinstance(other, str) else super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None


def shaped(values: Sequence[Any], role: str, messages: bool, asked: list[str]) -> list[Any]:
    """Prompts (`role="user"`) or completions (`"assistant"`) from either shape to that of `messages`."""
    if not messages:
        return [Text(text_of(value, role), role, asked) for value in values]
    return [
        Messages([{"role": role, "content": str(value)}] if isinstance(value, str) else value, role, asked)
        for value in values
    ]
