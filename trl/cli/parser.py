"""Flags from dataclasses: one flag for each field, with its type, help and default.

A value comes from the command line, else from a YAML file (`--config`), else from the dataclass's default. The first
two are converted alike, so that `learning_rate: 1e-4` (text, in YAML) becomes a number too.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from trl.cli import UsageError, nearest
from trl.cli.flags import Flag, Flags
from trl.cli.values import FALSE, TRUE, Kind, yaml_value
from trl.compat.table import ArgumentError
from trl.near import near

# Text flags that may stand without a value, which is then "true".
BARE = ("resume_from_checkpoint",)


class Parser:
    """Parses argv into one instance of each of `classes`. A field that two classes share is one flag.

    common     the options that `--help` shows, by group, each with a help text or "" for the field's own; default: all
    notes      paragraphs at the end of the help
    foreign    returns another program's options and whether each takes a value; called only for an unknown option
    flags      the options of `classes`, if they are known already; the classes are then needed by `instances` alone

    Raises UsageError for a wrong command line.
    """

    def __init__(
        self,
        classes: Sequence[type] = (),
        *,
        prog: str,
        description: str = "",
        common: Mapping[str, Mapping[str, str]] | None = None,
        notes: Sequence[str] = (),
        foreign: Callable[[], Mapping[str, bool]] | None = None,
        flags: Flags | None = None,
    ) -> None:
        flags = Flags.of(classes) if flags is None else flags
        self.classes = classes
        self.flags = flags
        self.kinds: dict[str, Kind] = {name: flag.kind for name, flag in flags.fields.items()}
        self.older = flags.older
        self.prog, self.description, self.notes = prog, description, notes
        self.foreign = foreign
        # Words that belong to no option, if they are collected; else they are an error.
        self.stray: list[str] | None = None
        self._groups: dict[str, list[argparse.Action]] = {"Everywhere": []}
        self._argparse = _Argparse(prog=prog, add_help=False, allow_abbrev=False)
        self._options = self._argparse.add_argument_group()
        self._add_flag(
            "Everywhere",
            "--config",
            metavar="FILE",
            help="YAML file of the same options; the command line overrides it",
        )
        for flag in flags.fields.values():
            self._add(flag)
        for word in flags.older:
            self._add_older(word)
        self.common = {title: dict(options) for title, options in (common or {}).items()}
        self._add_flag("Everywhere", "-h", "--help", action="store_true", help=self._help_on_help())
        if self.common:
            text = f"all {len(self.kinds)} options, grouped by where they come from"
            self._add_flag("Everywhere", "--help_all", action="store_true", help=text).option_strings = ["--help-all"]

    def parse(self, argv: Sequence[str]) -> list[Any]:
        return self.instances(self.read(argv))

    def instances(self, values: Mapping[str, Any], classes: Sequence[type] = ()) -> list[Any]:
        """One instance of each class (default: those of the parser). The classes translate older names of options, with
        a notice."""
        from trl.compat.arguments import rows_of

        instances = []
        for cls in classes or self.classes:
            own = {field.name for field in dataclasses.fields(cls) if field.init}
            own |= (
                rows_of(cls).keys() & self.older.keys()
            )  # an older name of one class may be a present name of another
            try:
                instances.append(cls(**{name: value for name, value in values.items() if name in own}))
            except ArgumentError as error:
                raise UsageError(str(error)) from None
        return instances

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """The converted values from argv and its YAML file; other fields are absent."""
        return self.read_apart(argv)[0]

    def read_apart(self, argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """The result of `read`, the foreign options, and argv without them."""
        words = [_with_underscores(word) for word in argv]
        for flag, everything in (("-h", False), ("--help", False), ("--help_all", True)):
            if flag in words:
                print(self.help(everything))
                raise SystemExit(0)
        words, foreign = self._without_foreign(words)
        given, stray = self._argparse.parse_known_args(words)
        if self.stray is not None:
            self.stray = stray
        elif stray:
            raise UsageError(f"`{stray[0]}` belongs to no option; options begin with two dashes.")
        typed = vars(given)
        config = typed.pop("config", None)
        values: dict[str, Any] = {}
        if config is not None:
            values, elsewhere, problems = self.read_file(config)
            if problems:
                raise UsageError(problems[0])
            foreign = elsewhere | foreign
        # The command line overrides the file, also if one uses an older name of the option.
        values = {name: value for name, value in values.items() if not any(self._same(name, each) for each in typed)}
        for name, value in typed.items():
            values[name] = self._convert(name, value, where=f"--{name}")
        return values, foreign, words

    def read_file(self, path: str) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """The converted values of a YAML file, the foreign options in it, and a sentence for each wrong line."""
        content = read_yaml(path)
        content.pop("env", None)
        values, foreign, problems = {}, {}, []
        for name, value in content.items():
            if name in self.kinds or name in self.older:
                try:
                    values[name] = self._convert(name, value, where=f"{path}: {name}")
                except UsageError as error:
                    problems.append(str(error))
            elif self.foreign is not None and name in self.foreign():
                foreign[name] = value
            else:
                problems.append(f"{path}: there is no option `{name}`{nearest(str(name), self.kinds)}")
        return values, foreign, problems

    def help(self, everything: bool) -> str:
        formatter = argparse.HelpFormatter(self.prog, max_help_position=34, width=110)
        formatter.add_usage(f"{self.prog} [--config FILE.yaml] [options]", [], [])
        formatter.add_text(self.description)
        actions = {action.dest: action for group in self._groups.values() for action in group}
        shown: set[str] = set()
        for title, options in self.common.items():
            formatter.start_section(title)
            for name in options:
                if name in actions:
                    action = copy.copy(actions[name])
                    action.help = options[name] or action.help
                    formatter.add_argument(action)
                    shown.add(name)
            formatter.end_section()
        for title, group in self._groups.items():
            rest = [action for action in group if action.dest not in shown]
            if rest and (everything or not self.common or title == "Everywhere"):
                formatter.start_section(title)
                formatter.add_arguments(rest)
                formatter.end_section()
        for note in self.notes:
            formatter.add_text(note)
        return formatter.format_help().rstrip()

    def _help_on_help(self) -> str:
        return "the most used options" if self.common else "this text"

    def _without_foreign(self, words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """argv without foreign options, and the foreign options. Raises UsageError for an unknown option."""
        known = self._argparse._option_string_actions
        own: list[str] = []
        foreign: dict[str, Any] = {}
        rest = list(words)
        while rest:
            word = rest.pop(0)
            flag, equals, value = word.partition("=")
            if not flag.startswith("--") or flag in known:
                own.append(word)
                continue
            theirs = self.foreign() if self.foreign is not None else {}
            name = flag[2:]
            if name not in theirs and self.stray is not None:
                own.append(word)
                continue
            if name not in theirs:
                # A misspelt older name is answered with the present name.
                meanings = {old: row.name or old for old, row in self.older.items()}
                meanings |= {each: each for each in [*self.kinds, *theirs]}
                meanings |= {each[2:]: each[2:] for each in known if each[2:] not in self.older}
                # Compared without the dashes, which all flags share.
                match = near(name, meanings)
                meant = f"; did you mean --{meanings[match]}?" if match else "."
                raise UsageError(f"there is no option {flag}{meant} `{self.prog} --help` lists them.")
            takes = theirs[name]
            if not equals and rest and (not rest[0].startswith("--") if takes else rest[0].lower() in TRUE + FALSE):
                equals, value = "=", rest.pop(0)
            if takes and not equals:
                raise UsageError(f"{flag} needs a value.")
            foreign[name] = value if takes else value.lower() not in FALSE
        return own, foreign

    def _same(self, one: str, other: str) -> bool:
        """Whether two names set the same field, one of them an older name. Keys of one mapping do not conflict."""
        today = [self._today(word) for word in (one, other)]
        return today[0] == today[1] and not (today[0] in self.kinds and self.kinds[today[0]].mapping)

    def _convert(self, name: str, value: Any, *, where: str) -> Any:
        kind = self._kind(name)
        today = self._today(name)
        older = self.flags.older_values.get(today, ())
        if (value is None or isinstance(value, str)) and value in older:
            return value
        if today in BARE and isinstance(value, bool):
            return str(value).lower()
        try:
            return kind.convert(value, older) if kind is not None else yaml_value(value)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from None

    def _kind(self, name: str) -> Kind | None:
        """The kind of an option; None for an older name whose type is not known."""
        if name in self.kinds:
            return self.kinds[name]
        row = self.older[name]
        kind = self.kinds.get(row.name) if row.name else None
        return kind if kind is not None and (row.same_value or kind.number) else None

    def _today(self, name: str) -> str:
        row = self.older.get(name)
        return row.name if row is not None and row.name else name

    def _add_flag(self, title: str, *flags: str, **options: Any) -> argparse.Action:
        # Absent flags stay absent from the result; a default would override the YAML file.
        action = self._options.add_argument(*flags, default=argparse.SUPPRESS, **options)
        self._groups.setdefault(title, []).append(action)
        return action

    def _add(self, flag: Flag) -> None:
        text = flag.help.replace("%", "%%")
        self._add_flag(flag.title, f"--{flag.name}", dest=flag.name, help=text, **_shape(flag.name, flag.kind))
        if flag.kind.boolean:
            self._add_no(flag.name)

    def _add_older(self, word: str) -> None:
        kind = self._kind(word)
        shape = {"nargs": "?", "const": True} if kind is None else _shape(self._today(word), kind)
        self._argparse.add_argument(f"--{word}", dest=word, default=argparse.SUPPRESS, **shape)
        if kind is None or kind.boolean:
            self._add_no(word)

    def _add_no(self, name: str) -> None:
        self._argparse.add_argument(
            f"--no_{name}", dest=name, default=argparse.SUPPRESS, action="store_const", const=False
        )


class TrlParser(Parser):
    """The parser for your own scripts, under upstream's name: one instance of each dataclass, from the command line and
    the YAML file of `--config`, whose `env:` holds environment variables."""

    def __init__(self, dataclass_types: type | Sequence[type], prog: str | None = None, description: str = "") -> None:
        classes = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)
        super().__init__(classes, prog=prog or Path(sys.argv[0]).name, description=description)

    def parse_args_and_config(
        self,
        args: Sequence[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
    ) -> tuple[Any, ...]:
        """The instances; with `return_remaining_strings` also the list of words that belong to no option. A wrong
        command line ends the process with status 2; `fail_with_unknown_args=False` ignores unknown words."""
        argv = sys.argv[1:] if args is None else list(args)
        self.stray = [] if return_remaining_strings or not fail_with_unknown_args else None
        try:
            set_environment(argv)
            instances = self.parse(argv)
        except UsageError as error:
            print(f"{self.prog}: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        return (*instances, self.stray) if return_remaining_strings else tuple(instances)

    parse_args_into_dataclasses = parse_args_and_config


def _shape(name: str, kind: Kind) -> dict[str, Any]:
    """Arguments of `add_argument`: the number of values of a flag, and how `--help` shows them."""
    if kind.boolean:
        return {"nargs": "?", "const": True, "metavar": "true|false"}
    if name in BARE or (kind.either_boolean and kind.text and not kind.choices):
        return {"nargs": "?", "const": "true", "metavar": kind.metavar}
    return {"nargs": "+", "metavar": "VALUE"} if kind.many else {"metavar": kind.metavar}


class _Argparse(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _with_underscores(word: str) -> str:
    """`--learning-rate=1` as `--learning_rate=1`; values are left alone."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def read_yaml(path: str) -> dict[str, Any]:
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


def set_environment(argv: Sequence[str]) -> None:
    """Set the environment variables of the YAML file's `env:`, before anything that reads them is loaded."""
    import os

    words = [_with_underscores(word) for word in argv]
    path = None
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag == "--config":
            path = value if equals else next(iter(words[place + 1 :]), None)
    if path is None or not Path(path).is_file():
        return  # reported when the options are parsed
    variables = read_yaml(path).get("env") or {}
    if not isinstance(variables, dict):
        raise UsageError(f"{path}: env holds `NAME: value` lines, not a {type(variables).__name__}.")
    for name, value in variables.items():
        if value is None or isinstance(value, (dict, list)):
            raise UsageError(f"{path}: env: {name} needs one value.")
        os.environ[str(name)] = str(value).lower() if isinstance(value, bool) else str(value)
