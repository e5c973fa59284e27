"""Losses given by name, as functions, or as `package.module:function`."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def loss_functions(types: Sequence[str | Callable], known: Mapping[str, Callable]) -> list[tuple[str, Callable]]:
    """Names and functions of losses given by name, as a callable, or as "package.module:function"."""
    found = []
    for each in types:
        if callable(each):
            found.append((getattr(each, "__name__", "loss"), each))
        elif each in known:
            found.append((each, known[each]))
        elif ":" in each:
            module, _, name = each.partition(":")
            found.append((each, getattr(importlib.import_module(module), name)))
        else:
            raise ValueError(
                f"loss_type={each!r} is not one of {', '.join(known)}, nor a function (or 'package.module:function')"
            )
    return found


def call_with_available(function: Callable, available: Mapping[str, Any]) -> Any:
    """A loss called with those of the available numbers and settings that it names."""
    wanted = inspect.signature(function).parameters
    missing = [name for name, each in wanted.items() if name not in available and each.default is each.empty]
    if missing:
        raise ValueError(
            f"the loss {getattr(function, '__name__', function)} asks for {', '.join(missing)}; there are "
            f"{', '.join(sorted(available))}"
        )
    return function(**{name: available[name] for name in wanted if name in available})
