"""Older names of the arguments of a function."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from trl.compat.table import ArgumentError
from trl.notices import notify_once

Function = TypeVar("Function", bound=Callable[..., Any])


def older_words(**today: str) -> Callable[[Function], Function]:
    """A decorator: the function accepts each older name for the argument that `today` gives, and says so once.

    Raises ArgumentError if both are given.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def translated(*args: Any, **kwargs: Any) -> Any:
            for old in today.keys() & kwargs.keys():
                name = today[old]
                if name in kwargs:
                    raise ArgumentError(f"{function.__name__}: `{old}` and `{name}` are the same argument")
                notify_once(f"`{old}` of {function.__name__} is `{name}` today")
                kwargs[name] = kwargs.pop(old)
            return function(*args, **kwargs)

        return translated  # type: ignore[return-value]

    return decorate
