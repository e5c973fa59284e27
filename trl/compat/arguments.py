"""Translates older names of arguments, values, attributes and hooks to the present ones."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from transformers import TrainingArguments

from trl.compat.table import ARGUMENTS, HOOKS, KEYS, VALUES, ArgumentError, Gone, InConfig, Now, Refused, Row
from trl.near import near
from trl.notices import notify_once


def rows_of(cls: type, table: Mapping[str, Mapping[str, Any]] = ARGUMENTS) -> dict[str, Any]:
    """The rows of a class in `table`; its own rows override those of its bases."""
    return {old: row for part in reversed(cls.__mro__) for old, row in table.get(part.__name__, {}).items()}


def translate(cls: type, given: Mapping[str, Any], accepted: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The present arguments of `cls` from those `given`, and the arguments that belong to its config.

    `accepted` are the constructor's parameters. Raises ArgumentError for an unknown or refused name.
    """
    rows = rows_of(cls)
    today = {name: value for name, value in given.items() if name in accepted}
    in_config: dict[str, Any] = {}
    for old, value in given.items():
        row = rows.get(old)
        if old in accepted:
            # It may be in the signature only to keep its position.
            if isinstance(row, Refused) and value is not None:
                raise ArgumentError(f"{cls.__name__}: {row.sentence(old)}")
            continue
        if row is None or (isinstance(row, Now) and row.name not in accepted):
            raise ArgumentError(f"{cls.__name__} has no argument `{old}`{_hint(cls, old, accepted, rows)}")
        asks = not any(type(value) is type(each) and value == each for each in row.nothing)
        if isinstance(row, Refused) and asks:
            raise ArgumentError(f"{cls.__name__}: {row.sentence(old)}")
        if not asks:
            continue  # no notice needed
        notify_once(row.sentence(old))
        if isinstance(row, Gone) and row.act is not None:
            row.act(value)
        elif isinstance(row, InConfig):
            in_config[row.name] = value
        elif isinstance(row, Now):
            if row.value is not None:
                value = row.value(value, {**given, **today})
            elif given.get(row.name) is not None and given[row.name] != value:  # subclasses pass None on
                raise ArgumentError(
                    f"{cls.__name__}: {row.name}={given[row.name]!r} and {old}={value!r} are the same argument"
                )
            today[row.name] = value
    for name, values in rows_of(cls, VALUES).items():
        if isinstance(today.get(name), list):
            today[name] = [_value(cls, name, each, values) for each in today[name]]
        elif name in today:
            today[name] = _value(cls, name, today[name], values)
    for name, keys in rows_of(cls, KEYS).items():
        if isinstance(today.get(name), Mapping) and not keys.keys().isdisjoint(today[name]):
            for old in keys.keys() & today[name].keys():
                notify_once(f"`{old}` in {name} is `{keys[old]}` today")
            today[name] = {keys.get(key, key): value for key, value in today[name].items()}
    return today, in_config


def _value(cls: type, name: str, value: Any, values: Mapping[Any, Any]) -> Any:
    """The present form of a value of the argument `name`. Raises ArgumentError for a refused value."""
    if not (value is None or isinstance(value, str)) or value not in values:
        return value
    now = values[value]
    if isinstance(now, Refused):
        raise ArgumentError(f"{cls.__name__}: {now.sentence(f'{name}={value}')}")
    notify_once(f"{name}={value!r} is {now!r} today")
    return now


def _hint(cls: type, word: str, accepted: Iterable[str], rows: Mapping[str, Row]) -> str:
    config = getattr(cls, "config_class", None)
    if config is not None and word in config.__dataclass_fields__:
        return f"; set it in {config.__name__}"
    if isinstance(row := rows.get(word), Now):
        return f" (`{row.name}` today), and none called `{row.name}`"
    meant = [name for name in accepted if name != "self"] + list(rows)
    if config is not None:
        meant += [name for name in config.__dataclass_fields__ if name not in meant]
    match = near(word, meant)
    if match is None:
        return ""
    row = rows.get(match)
    today = row.name if isinstance(row, Now | InConfig) else match
    of_config = config and today not in accepted and today in config.__dataclass_fields__
    return f"; did you mean `{today}`{f' of {config.__name__}' if config and of_config else ''}?"


_adopted: set[type] = set()


def refuse_hooks(cls: type, instance: Mapping[str, Any] | None = None) -> None:
    """Raise ArgumentError if a trainer's class (or instance) overrides a hook of upstream that is never called here. A
    subclass that also overrides our hook may use the name for itself."""
    hooks = rows_of(cls, HOOKS)
    if not hooks:
        return
    parts = [part for part in cls.__mro__ if part.__module__.split(".")[0] != "transformers"]
    of_users = [vars(part) for part in parts if part.__module__.split(".")[0] != "trl"]
    for name, (ours, words) in hooks.items():
        given = [(part.__module__, vars(part)[name]) for part in parts if name in vars(part)]
        # A foreign function set on one of our classes comes from the user.
        found = any(getattr(each, "__module__", module).split(".")[0] != "trl" for module, each in given)
        found = found or name in (instance or {})
        if found and not any(each in names for each in ours for names in of_users):
            raise ArgumentError(f"{cls.__name__}.{name} is never called by this library: override {words}")


def adopt(cls: type) -> None:
    """Make a class and its bases accept older names. Called from `__new__`, before `type.__call__` reads `__init__`, so
    that the generated `__init__` of a dataclass exists by then."""

    refuse_hooks(cls)
    for part in reversed(cls.__mro__):
        if part in _adopted or not issubclass(part, Adoptable):
            continue
        _adopted.add(part)
        if "__init__" in vars(part):
            setattr(part, "__init__", _translated(vars(part)["__init__"]))  # noqa: B010
        if "train" in vars(part):
            setattr(part, "train", _resuming(vars(part)["train"]))  # noqa: B010
        for old, row in ARGUMENTS.get(part.__name__, {}).items():
            fields = getattr(part, "__dataclass_fields__", {})
            if isinstance(row, Now) and row.value is None and old not in fields and not hasattr(part, old):
                setattr(part, old, _Attribute(row.name, row.sentence(old)))


class _Attribute:
    """An attribute under an older name: reads and sets the present one, with a notice."""

    def __init__(self, name: str, sentence: str) -> None:
        self.name, self.sentence = name, sentence

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            raise AttributeError(self.sentence)
        value = getattr(instance, self.name)
        notify_once(self.sentence)
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        notify_once(self.sentence)
        setattr(instance, self.name, value)


def _translated(init: Callable[..., None]) -> Callable[..., None]:
    import inspect

    parameters = list(inspect.signature(init).parameters.values())[1:]
    names = [parameter.name for parameter in parameters]
    # An `__init__` that takes *args or **kwargs passes them on; the next `__init__` translates.
    closed = all(
        parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) for parameter in parameters
    )
    places = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]

    @functools.wraps(init)
    def translated(self: Any, *args: Any, **kwargs: Any) -> None:
        by_place = dict(zip(places, args, strict=False))
        if closed and len(args) <= len(places) and by_place.keys().isdisjoint(kwargs):
            kwargs, in_config = translate(type(self), {**by_place, **kwargs}, names)
            args = ()
            if "args" in names and hasattr(self, "config_class"):
                kwargs["args"] = _config(self.config_class, kwargs.get("args"), in_config)
        init(self, *args, **kwargs)
        if hasattr(self, "report_to"):
            _without_wandb(self)

    return translated


def _config(cls: Any, config: Any, settings: Mapping[str, Any]) -> Any:
    """The trainer's config with `settings` applied; plain `TrainingArguments` are converted to the class `cls`."""

    fields = cls.__dataclass_fields__
    for name in settings:
        if name not in fields:
            raise ArgumentError(f"{cls.__name__} has no argument `{name}`{_hint(cls, name, fields, rows_of(cls))}")
    if isinstance(config, TrainingArguments) and not isinstance(config, Adoptable):
        notify_once(f"plain TrainingArguments are converted to {cls.__name__}, with their defaults")
        # Two of its defaults contradict those of all configs here.
        unwanted = ("remove_unused_columns", "logging_nan_inf_filter")
        names = [name for name, field in type(config).__dataclass_fields__.items() if field.init and name in fields]
        return cls(**{name: getattr(config, name) for name in names if name not in unwanted} | dict(settings))
    if settings and config is None:
        return cls(**settings)
    if settings:
        # Fields are processed when a config is made, so a new one is made; the caller's object stays in use.
        names = [name for name, field in type(config).__dataclass_fields__.items() if field.init]
        made = type(config)(**{name: getattr(config, name) for name in names} | dict(settings))
        config.__dict__.update(made.__dict__)
    return config


def _without_wandb(config: Any) -> None:
    if os.environ.get("WANDB_DISABLED", "").lower() not in ("true", "1", "on", "yes"):
        return
    if isinstance(config.report_to, list) and "wandb" in config.report_to:
        notify_once("WANDB_DISABLED is set: nothing is reported to wandb (report_to='none' does the same)")
        config.report_to = [each for each in config.report_to if each != "wandb"]


_flag_is_open = True  # the flag concerns the first run of a process


def _resuming(train: Callable[..., Any]) -> Callable[..., Any]:
    import inspect

    takes = "resume_from_checkpoint" in inspect.signature(train).parameters

    @functools.wraps(train)
    def resuming(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _flag_is_open
        if takes and _flag_is_open:
            _flag_is_open = False
            wish = resume_flag(sys.argv[1:])
            if wish and not args and "resume_from_checkpoint" not in kwargs:
                what = "the newest checkpoint" if wish is True else wish
                notify_once(f"--resume_from_checkpoint on the command line: training resumes from {what}")
                kwargs["resume_from_checkpoint"] = wish
        refuse_hooks(type(self), vars(self))
        return train(self, *args, **kwargs)

    return resuming


def resume_flag(argv: Iterable[str]) -> str | bool:
    """The value of `--resume_from_checkpoint`: a folder, True for the newest checkpoint, False for none or no flag."""
    words = list(argv)
    wish: str | bool = False
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag.replace("-", "_") != "__resume_from_checkpoint":
            continue
        if not equals:
            value = next((each for each in words[place + 1 : place + 2] if not each.startswith("-")), "true")
        plain = value.strip().lower()
        wish = True if plain in ("true", "last") else False if plain in ("", "false", "none") else value
    return wish


class _Signature:
    """That of `__init__`: `inspect.signature` of a class would show `__new__`'s, which takes anything."""

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        signature = inspect.signature(owner.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class Adoptable:
    """A class that can be spoken to in older words; see `trl.compat`."""

    __signature__ = _Signature()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        adopt(cls)
        return super().__new__(cls)
