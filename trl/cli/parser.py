"""Flags made from dataclasses: each field one flag, with its type, its help and its default.

A value may come from three places: the dataclass's default, a YAML file (`--config`), and the command line; the later
one wins. All three pass through the same conversion, so that `learning_rate: 1e-4` (text, to YAML) is a number too.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union

from trl.cli import UsageError, nearest

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")


class Parser:
    """Reads argv into one instance of each of `classes`. A field that two of them share is one flag."""

    def __init__(self, classes: Sequence[type], *, prog: str, description: str = "") -> None:
        self.classes = classes
        self.kinds: dict[str, Kind] = {}
        self.prog = prog
        self._argparse = _Argparse(
            prog=prog,
            description=description,
            allow_abbrev=False,
            usage=f"{prog} [--config FILE.yaml] [options]",
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
        )
        self._argparse.add_argument(
            "--config", metavar="FILE", help="a YAML file of these same options; the command line overrides it"
        )
        for cls in classes:
            title = (cls.__doc__ or cls.__name__).strip().splitlines()[0].rstrip(".")
            group = self._argparse.add_argument_group(title)
            hints = typing.get_type_hints(cls)
            for field in dataclasses.fields(cls):
                if field.init and field.name not in self.kinds:
                    kind = Kind(hints[field.name], field.metadata.get("choices", ()))
                    if kind.settable:
                        self.kinds[field.name] = kind
                        self._add(group, field, kind)

    def parse(self, argv: Sequence[str]) -> list[Any]:
        values = self.read(argv)
        instances = []
        for cls in self.classes:
            own = {field.name for field in dataclasses.fields(cls) if field.init}
            instances.append(cls(**{name: value for name, value in values.items() if name in own}))
        return instances

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """What argv and its YAML file say, converted; fields that neither names are absent."""
        flags = sorted(self._argparse._option_string_actions)
        given, unknown = self._argparse.parse_known_args([_with_underscores(word) for word in argv])
        typed = vars(given)
        if unknown:
            flag = unknown[0].split("=")[0]
            if not flag.startswith("-"):
                raise UsageError(f"`{flag}` belongs to no option; options begin with two dashes.")
            raise UsageError(f"there is no option {flag}{nearest(flag, flags)} `{self.prog} --help` lists them.")
        config = typed.pop("config", None)
        values: dict[str, Any] = {}
        if config is not None:
            for name, value in _read_yaml(config).items():
                if name not in self.kinds:
                    raise UsageError(f"{config}: there is no option `{name}`{nearest(str(name), self.kinds)}")
                values[name] = self._convert(name, value, where=f"{config}: {name}")
        for name, value in typed.items():
            values[name] = self._convert(name, value, where=f"--{name}")
        return values

    def _convert(self, name: str, value: Any, *, where: str) -> Any:
        try:
            return self.kinds[name].convert(value)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from None

    def _add(self, group: argparse._ArgumentGroup, field: dataclasses.Field[Any], kind: Kind) -> None:
        help_text = " ".join(str(field.metadata.get("help", "")).split()).replace("%", "%%")
        default = _default(field)
        if default not in (None, "", []):
            help_text += f" [{default}]".replace("%", "%%")
        # Absent flags stay absent from the result, or they would override the YAML file.
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": help_text.strip()}
        if kind.boolean:
            group.add_argument(f"--{field.name}", nargs="?", const=True, metavar="true|false", **options)
            group.add_argument(
                f"--no_{field.name}",
                dest=field.name,
                default=argparse.SUPPRESS,
                action="store_const",
                const=False,
                help=argparse.SUPPRESS,
            )
        elif kind.many:
            group.add_argument(f"--{field.name}", nargs="+", metavar="VALUE", **options)
        else:
            group.add_argument(f"--{field.name}", metavar=kind.metavar, **options)


class Kind:
    """What a field's type annotation admits, and how a word or a YAML value becomes it."""

    def __init__(self, hint: Any, choices: Sequence[Any] = ()) -> None:
        members = _members(hint)
        self.optional = type(None) in members
        members = [member for member in members if member is not type(None)]
        self.choices = list(choices) or [
            choice.value if isinstance(choice, enum.Enum) else choice
            for member in members
            for choice in _choices(member)
        ]
        plain = [member for member in members if not _choices(member)]
        # `Choice | str` is how transformers writes "one of these names": the names alone are right.
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
        self.mapping = any(typing.get_origin(member) is dict or member is dict for member in plain)
        # Objects that no word can stand for (a parallelism plan, a function) have no flag.
        self.settable = self.text or bool(self.choices) or self.mapping or self.many or self.either_boolean
        self.settable = self.settable or self.integer or self.number

    @property
    def metavar(self) -> str:
        if len(self.choices) > 8:
            return "NAME"
        if self.choices and not self.text:
            return "|".join(str(choice) for choice in self.choices)
        names = {"JSON": self.mapping, "NUMBER": self.number, "INTEGER": self.integer and not self.number}
        return "|".join(name for name, applies in names.items() if applies) or "VALUE"

    def convert(self, value: Any) -> Any:
        """`value` as the field wants it; ValueError, in words, when it cannot be that."""
        if isinstance(value, enum.Enum):
            return value
        # Where any text will do, "none" is a name like another (`report_to`); elsewhere it means None.
        nothing = ("null",) if self.text else ("null", "none")
        if value is None or (self.optional and isinstance(value, str) and value.lower() in nothing):
            if self.optional:
                return None
            raise ValueError(f"needs {self.wanted()}")
        if self.many:
            return self._list(value)
        if isinstance(value, list):
            raise ValueError(f"takes one value, not a list; it needs {self.wanted()}")
        if isinstance(value, dict):
            if self.mapping:
                return value
            raise ValueError(f"needs {self.wanted()}, not a mapping")
        return self._scalar(value)

    def _list(self, value: Any) -> Any:
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = _json(value)
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        if self.text and len(values) == 1 and isinstance(values[0], str):
            return values[0]
        return [self.element.convert(each) if self.element else each for each in values]

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
            kinds.append("one of " + ", ".join(str(choice) for choice in self.choices))
        if self.boolean:
            kinds.append("true or false")
        if self.number:
            kinds.append("a number")
        elif self.integer:
            kinds.append("a whole number")
        if self.mapping:
            kinds.append('JSON like {"key": value}')
        if self.many:
            kinds.append("one or more values")
        if self.text:
            kinds.append("text")
        return " or ".join(kinds)


class _Argparse(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _members(hint: Any) -> list[Any]:
    """The alternatives of a union, nested ones included; a plain type is its own only alternative."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [inner for member in typing.get_args(hint) for inner in _members(member)]
    return [hint]


def _choices(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    return list(hint) if isinstance(hint, type) and issubclass(hint, enum.Enum) else []


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if isinstance(field.default, enum.Enum):
        return field.default.value
    return None if field.default is dataclasses.MISSING else field.default


def _with_underscores(word: str) -> str:
    """`--learning-rate=1` as `--learning_rate=1`; values are left alone."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON ({error}): {text}") from None


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    if not Path(path).is_file():
        raise UsageError(f"--config: there is no file {path}.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold `option: value` lines, not a {type(content).__name__}.")
    return content
