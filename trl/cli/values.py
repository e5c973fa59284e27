"""Values of options: what a field takes, and how typed words and YAML become it."""

from __future__ import annotations

import enum
import json
import types
import typing
from collections.abc import Collection, Sequence
from typing import Any, Literal, Union

from trl.cli import nearest

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")


class Kind:
    """The values that a field's type annotation admits, and the conversion of a word or YAML value to it."""

    def __init__(self, hint: Any, choices: Sequence[Any] = ()) -> None:
        members = _members(hint)
        self.optional = type(None) in members
        members = [member for member in members if member is not type(None)]
        self.choices = list(choices) or [
            choice.value if isinstance(choice, enum.Enum) else choice
            for member in members
            for choice in choices_of(member)
        ]
        plain = [member for member in members if not choices_of(member)]
        # transformers writes "one of these names" as `Choice | str`: only the names are valid.
        self.text = (str in plain or any(member is Any for member in plain)) and not (
            self.choices and all(isinstance(choice, str) for choice in self.choices)
        )
        self.boolean = bool in plain and self.text is False
        self.either_boolean = bool in plain or False in self.choices
        self.integer = int in plain
        self.number = float in plain
        lists = [member for member in plain if typing.get_origin(member) in (list, tuple) or member is list]
        self.many = bool(lists)
        self.element = Kind(typing.get_args(lists[0])[0]) if lists and typing.get_args(lists[0]) else None
        self.mapping = any(typing.get_origin(member) is dict or member in (dict, Any) for member in plain)
        # Objects that cannot be written as a word (a parallelism plan, a function) have no flag.
        self.settable = self.text or bool(self.choices) or self.mapping or self.many or self.either_boolean
        self.settable = self.settable or self.integer or self.number

    def to_dict(self) -> dict[str, Any]:
        """The kind as JSON values."""
        return {**vars(self), "element": self.element and self.element.to_dict()}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Kind:
        """The kind from what `to_dict` gave."""
        kind = cls.__new__(cls)
        vars(kind).update(stored, element=stored["element"] and cls.from_dict(stored["element"]))
        return kind

    @property
    def metavar(self) -> str:
        if len(self.choices) > 8:
            return "NAME"
        if self.choices and not self.text:
            return "|".join(str(choice) for choice in self.choices)
        names = {"JSON": self.mapping, "NUMBER": self.number, "INTEGER": self.integer and not self.number}
        return "|".join(name for name, applies in names.items() if applies) or "VALUE"

    def convert(self, value: Any, older: Collection[Any] = ()) -> Any:
        """`value` converted to the field's type. Raises ValueError with a sentence. Entries of lists may also be words
        in `older`, which are translated later."""
        if isinstance(value, enum.Enum):
            return value
        # In a text field "none" is a name (`report_to`); elsewhere it means None.
        nothing = ("null",) if self.text else ("null", "none")
        if value is None or (self.optional and isinstance(value, str) and value.lower() in nothing):
            if self.optional:
                return None
            raise ValueError(f"needs {self.wanted()}")
        if self.many:
            return self._list(value, older)
        if isinstance(value, list):
            raise ValueError(f"takes one value, not a list; it needs {self.wanted()}")
        if isinstance(value, dict):
            if self.mapping:
                return value
            raise ValueError(f"needs {self.wanted()}, not a mapping")
        return self._scalar(value)

    def _list(self, value: Any, older: Collection[Any]) -> Any:
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            value = value[0]
        # "[qv]_proj" is a name, or a regular expression.
        if isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]"):
            value = _json(value)
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if self.text and len(values) == 1 and isinstance(values[0], str):
            return values[0]
        if self.choices and (
            odd := [each for each in values if not (self._names(each) or isinstance(each, str) and each in older)]
        ):
            raise ValueError(f"needs {self.wanted()}, not `{odd[0]}`{nearest(str(odd[0]), map(str, self.choices))}")
        return [self.element.convert(each) if self.element else each for each in values]

    def _names(self, word: Any) -> bool:
        """Whether the word is one of the choices, or the name of a function: "package.module:function"."""
        return word in self.choices or (isinstance(word, str) and ":" in word)

    def _scalar(self, value: Any) -> Any:
        word = str(value).strip()
        if value is False and "no" in self.choices:
            # YAML reads a bare `no` as false: `save_strategy: no`.
            return "no"
        if isinstance(value, bool) or (self.either_boolean and word.lower() in TRUE[:1] + FALSE[:1]):
            if not self.either_boolean:
                raise ValueError(f"needs {self.wanted()}, not {word.lower()}")
            return value if isinstance(value, bool) else word.lower() == "true"
        for choice in self.choices:
            if word == str(choice):
                return choice
        if self.choices and ":" in word and all(isinstance(choice, str) for choice in self.choices):
            return word  # "package.module:function": the config decides whether the field takes functions
        if self.boolean and word.lower() in TRUE + FALSE:
            return word.lower() in TRUE
        if self.integer:
            try:
                return int(word)
            except ValueError:
                pass
        if self.number:
            try:
                return float(word)
            except ValueError:
                pass
        if self.mapping and word.startswith("{"):
            return _json(word)
        if self.text:
            return value if isinstance(value, str) else word
        hint = nearest(word, map(str, self.choices)) if self.choices else ""
        raise ValueError(f"needs {self.wanted()}, not `{word}`{hint}")

    def wanted(self) -> str:
        kinds = []
        if self.choices:
            kinds.append(("some" if self.many else "one") + " of " + ", ".join(map(str, self.choices)))
        if self.boolean:
            kinds.append("true or false")
        if self.number:
            kinds.append("a number")
        elif self.integer:
            kinds.append("a whole number")
        if self.mapping:
            kinds.append('JSON like {"key": value}')
        if self.many and not self.choices:
            kinds.append("one or more values")
        if self.text:
            kinds.append("text")
        return " or ".join(kinds)


def _members(hint: Any) -> list[Any]:
    """The members of a union, nested ones included; a plain type is its only member."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [inner for member in typing.get_args(hint) for inner in _members(member)]
    return [hint]


def choices_of(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    return list(hint) if isinstance(hint, type) and issubclass(hint, enum.Enum) else []


def yaml_value(value: Any) -> Any:
    """A word as YAML reads it, for an option of unknown type: a number, true or false, JSON, or text."""
    if not isinstance(value, str):
        return value
    if value.lower() == "none":
        return None
    import yaml

    try:
        read = yaml.safe_load(value)
        return float(read) if isinstance(read, str) else read  # `1e-4` is text to YAML
    except (ValueError, yaml.YAMLError):
        return value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON ({error}): {text}") from None
