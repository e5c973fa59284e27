"""Reward functions by name, for the command line."""

import ast
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from . import FACTORIES, REWARDS

# `name`, `package.module.name`, `package.module:name`, `folder/file.py:name`, with or without arguments in brackets.
_FORM = re.compile(r"(?P<where>[^()]+?)\s*(?P<arguments>\(.*\))?\s*", re.DOTALL)
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def is_function(name: str) -> bool:
    """Whether `name` has the form of a reward function's name, not of a model or an address."""
    match = _FORM.fullmatch(name)
    if match is None or name.startswith(("http://", "https://")):
        return False
    where = match["where"]
    if where in REWARDS or match["arguments"] is not None or ":" in where:
        return True
    return _DOTTED.fullmatch(where) is not None and not Path(where).exists()


def check_names(names: Sequence[Any]) -> None:
    """Raise ValueError, with a remedy, for the first name of a reward function that does not exist."""
    for name in names:
        if isinstance(name, str) and is_function(name):
            find(name)


@cache
def find(name: str) -> Callable[..., Any]:
    """The reward function named `name`: one of `REWARDS`, `package.module:function`, `package.module.function` or
    `file.py:function`.

    With arguments in brackets, as in `get_regex_reward(pattern="yes")`, the result of that call. Raises ValueError with
    a remedy.
    """
    match = _FORM.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of a reward function: write package.module:function")
    where, arguments = match["where"], match["arguments"]
    found = REWARDS[where] if where in REWARDS else _imported(where)
    if arguments is None and where not in FACTORIES:
        return found
    positional, named = _arguments(name, arguments or "()")
    if not positional and not named:
        named = FACTORIES.get(where, {})
    try:
        inspect.signature(found).bind(*positional, **named)
    except TypeError as error:
        raise ValueError(
            f"the reward function {name!r} cannot be made: {error}. "
            f"Write its arguments in brackets: {where}{inspect.signature(found)}"
        ) from error
    return found(*positional, **named)


def _arguments(name: str, written: str) -> tuple[list[Any], dict[str, Any]]:
    try:
        call = ast.parse(f"f{written}", mode="eval").body
        assert isinstance(call, ast.Call)
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        return [ast.literal_eval(argument) for argument in call.args], named
    except (SyntaxError, ValueError, AssertionError) as error:
        raise ValueError(
            f"the arguments of the reward function {name!r} are not plain values: write strings in quotes, as in "
            'get_regex_reward(pattern="yes")'
        ) from error


def _imported(where: str) -> Callable[..., Any]:
    if ":" in where:
        place, attribute = where.rsplit(":", 1)
    else:
        place, _, attribute = where.rpartition(".")
    if not place:
        near = difflib.get_close_matches(where, REWARDS, 1)
        raise ValueError(
            f"there is no reward function {where!r}{f': did you mean {near[0]!r}?' if near else ''} The library "
            f"has {', '.join(sorted(REWARDS))}; name others as package.module:function or "
            "file.py:function"
        )
    module = _module_of_file(place) if place.endswith(".py") else _module(place, where)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            near = difflib.get_close_matches(part, names, 1)
            raise ValueError(
                f"{place} has no function {attribute!r}{f': did you mean {near[0]!r}?' if near else ''}"
                f"{'' if near or not names else ': it has ' + ', '.join(sorted(names)[:10])}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{where} is a {type(found).__name__}, not a function")
    return found


def _module(place: str, where: str) -> Any:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python script.py` does for modules next to the script
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not (place == error.name or place.startswith(f"{error.name}.")):
            raise  # the module exists, but one of its imports does not
        raise ValueError(
            f"the reward function {where!r} cannot be found: there is no module {error.name!r} in the working folder "
            "or among the installed packages"
        ) from error


def _module_of_file(place: str) -> Any:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"there is no file {place} to take a reward function from")
    name = f"trl_rewards_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
