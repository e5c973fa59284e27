"""Flags from dataclasses: one flag for each field, with its type, help and default.

A value comes from the command line, else from a YAML file (`--config`), else from the dataclass's default. The first
two are converted alike, so that `learning_rate: 1e-4` (text, in YAML) becomes a number too.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from trl.cli import UsageError, nearest, no_option, with_underscores
from trl.cli.flags import Flag, Flags
from trl.cli.values import FALSE, TRUE, Kind, yaml_value
from trl.options import Limit

# Text flags that may stand without a value, which is then "true".
BARE = ("resume_from_checkpoint",)


class Parser:
    """Parses argv into one instance of each of `classes`. A field that two classes share is one flag.

    common     the options that `--help` shows, by group, each with a help text or "" for the field's own; default: all
    notes      paragraphs at the end of the help
    foreign    returns another program's options and whether each takes a value; called only for an unknown option
    flags      the options of `classes`, if they are known already; the classes are then needed by `instances` alone
    limits     the range of each number, checked before anything is loaded; the default of an option is always possible
    programs   the commands whose `--help` lists the options; default: `prog`

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
        limits: Mapping[str, Limit] | None = None,
        programs: Sequence[str] = (),
    ) -> None:
        flags = Flags.of(classes) if flags is None else flags
        self.classes = classes
        self.flags = flags
        self.kinds: dict[str, Kind] = {name: flag.kind for name, flag in flags.fields.items()}
        self.older = flags.older
        self.prog, self.description, self.notes = prog, description, notes
        self.foreign, self.limits, self.programs = foreign, limits or {}, tuple(programs) or (prog,)
        # Words of argv and of the file that belong to no option, if they are collected; else they are an error.
        self.stray: list[str] | None = None
        self.stray_of_file: list[str] = []
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
            for field in dataclasses.fields(cls):
                has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
                if field.init and not has_default and field.name not in values:
                    raise UsageError(f"--{field.name} is missing. `{self.prog} --help` says what it is.")
            try:
                instances.append(cls(**{name: value for name, value in values.items() if name in own}))
            except ValueError as error:  # a class refuses values that are impossible, or do not go together
                raise UsageError(str(error)) from error
        return instances

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """The converted values from argv and its YAML file; other fields are absent."""
        return self.read_apart(argv)[0]

    def read_apart(self, argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """The result of `read`, the foreign options, and argv without them."""
        words = [with_underscores(word) for word in argv]
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
            elif self.stray is not None:
                self.stray_of_file += [f"--{name}", str(value)]
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
                raise no_option(flag, meanings, *self.programs)
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
            found = kind.convert(value, older) if kind is not None else yaml_value(value)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from None
        limit = self.limits.get(today)
        if limit is not None and isinstance(found, int | float) and not isinstance(found, bool):
            usual = self.flags.fields[today].default if today in self.flags.fields else None
            if not limit.holds(found) and found != usual:
                raise UsageError(f"{where}: {found} is not possible: give {limit.wanted()}")
        return found

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
    the YAML file of `--config`, whose `env:` holds environment variables.

    dataclass_types      a dataclass or several; the releases up to 0.11 call it `parsers`
    ignore_extra_args    ignore words and lines of the file that belong to no option, as `fail_with_unknown_args=False`
    prog, description    name of the program and first paragraph of its `--help`

    Raises ValueError for a dataclass with a field `config`, which is the option of the file.
    """

    def __init__(
        self,
        dataclass_types: type | Iterable[type] | None = None,
        ignore_extra_args: bool = False,
        *,
        parsers: type | Iterable[type] | None = None,
        prog: str | None = None,
        description: str = "",
    ) -> None:
        if parsers is not None and dataclass_types is not None:
            raise ValueError("parsers is the older name of dataclass_types: give one of the two")
        given = parsers if dataclass_types is None else dataclass_types
        classes = [given] if isinstance(given, type) else list(given or ())
        for cls in classes:
            if "config" in (each.name for each in dataclasses.fields(cls)):
                raise ValueError(
                    f"{cls.__name__} has a field `config`, and --config is the YAML file of all options: name the "
                    "field otherwise"
                )
        super().__init__(classes, prog=prog or Path(sys.argv[0]).name, description=description)
        self.ignore_extra_args = ignore_extra_args
        self.preset: dict[str, Any] = {}

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """The instances. A wrong command line ends the process with status 2.

        With `return_remaining_strings` they are followed by a list of the words that belong to no option, lines of the
        file (as `--name value`) before those of argv; with `separate_remaining_strings` by a list of each.
        `fail_with_unknown_args=False` ignores such words.
        """
        argv = sys.argv[1:] if args is None else list(args)
        collects = return_remaining_strings or self.ignore_extra_args or not fail_with_unknown_args
        self.stray, self.stray_of_file = ([] if collects else None), []
        try:
            set_environment(argv)
            instances = self.instances(self.preset | self.read(argv))
        except UsageError as error:
            print(f"{self.prog}: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        if not return_remaining_strings:
            return tuple(instances)
        of_argv = self.stray or []
        rest = (self.stray_of_file, of_argv) if separate_remaining_strings else ([*self.stray_of_file, *of_argv],)
        return (*instances, *rest)

    parse_args_into_dataclasses = parse_args_and_config

    def parse_dict(self, args: Mapping[str, Any], allow_extra_keys: bool = False) -> tuple[Any, ...]:
        """The instances from a mapping of options. Raises ValueError for an option that does not exist, unless
        `allow_extra_keys`, and for a wrong value."""
        known = {name: value for name, value in args.items() if name in self.kinds or name in self.older}
        if len(known) < len(args) and not allow_extra_keys:
            odd = next(name for name in args if name not in known)
            raise ValueError(f"there is no option {odd}{nearest(odd, self.kinds)}")
        try:
            return tuple(self.instances({name: self._convert(name, known[name], where=name) for name in known}))
        except UsageError as error:
            raise ValueError(str(error)) from error

    def parse_yaml_file(self, yaml_file: str | os.PathLike, allow_extra_keys: bool = False) -> tuple[Any, ...]:
        """`parse_dict` of a YAML or JSON file."""
        try:
            return self.parse_dict(read_yaml(str(yaml_file)), allow_extra_keys)
        except UsageError as error:
            raise ValueError(str(error)) from error

    parse_json_file = parse_yaml_file

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """Other defaults than those of the dataclasses. Returns those that belong to no option, as `--name value`."""
        known = {name: value for name, value in values.items() if name in self.kinds or name in self.older}
        self.preset |= {name: self._convert(name, value, where=name) for name, value in known.items()}
        return [word for name in values if name not in known for word in (f"--{name}", str(values[name]))]


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


def read_yaml(path: str) -> dict[str, Any]:
    """The options in a YAML file. Raises UsageError for a file that holds something else, or an option twice."""
    import yaml

    if not Path(path).is_file():
        raise UsageError(f"--config: there is no file {path}.")
    try:
        tree = yaml.compose(text := Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text in UTF-8: {error}.") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold `option: value` lines, not a {type(content).__name__}.")
    if twice := list(_repeated(tree)):
        places = "; ".join(f"`{name}` stands on line {first} and on line {second}" for name, first, second in twice)
        raise UsageError(f"{path}: {places}: keep one of them.")
    return content


def _repeated(node: Any) -> Iterator[tuple[str, int, int]]:
    """The keys that a YAML mapping, or one within it, has twice, with their lines. A reader of YAML keeps the last."""
    pairs = [(key, value) for key, value in node.value if key.value != "<<"] if node.id == "mapping" else []
    lines: dict[str, int] = {}
    for key, _ in pairs:
        line, name = key.start_mark.line + 1, str(key.value)
        if name in lines:
            yield name, lines[name], line
        lines[name] = line
    for inner in [value for _, value in pairs] if pairs else node.value if node.id == "sequence" else []:
        yield from _repeated(inner)


def set_environment(argv: Sequence[str]) -> None:
    """Set the environment variables of the YAML file's `env:`, before anything that reads them is loaded."""
    words = [with_underscores(word) for word in argv]
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
