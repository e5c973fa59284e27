"""Losses given by name, as functions, or as `package.module:function`."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def named_loss(given: Any, known: Mapping[str, Any]) -> tuple[str, Any]:
    """Name and value of a loss: a name in `known`, a function, or "package.module:name".

    Raises ValueError for an unknown name.
    """
    if not isinstance(given, str):
        return getattr(given, "__name__", "loss"), given
    if given in known:
        return given, known[given]
    if ":" in given:
        module, _, name = given.partition(":")
        return given, getattr(importlib.import_module(module), name)
    raise ValueError(
        f"loss_type={given!r} is not one of {', '.join(known)}, nor a function (or 'package.module:function')"
    )


def loss_functions(types: Sequence[str | Callable], known: Mapping[str, Callable]) -> list[tuple[str, Callable]]:
    """Names and functions of several losses; see `named_loss`."""
    return [named_loss(each, known) for each in types]


def call_with_available(function: Callable, available: Mapping[str, Any]) -> Any:
    """Call a loss with those of the `available` values that its parameters name.

    Raises ValueError if a required parameter is not available.
    """
    wanted = inspect.signature(function).parameters
    missing = [name for name, each in wanted.items() if name not in available and each.default is each.empty]
    if missing:
        raise ValueError(
            f"the loss {getattr(function, '__name__', function)} needs {', '.join(missing)}; available are "
            f"{', '.join(sorted(available))}"
        )
    return function(**{name: available[name] for name in wanted if name in available})
