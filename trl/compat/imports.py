"""Import paths and names of upstream, and their places here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from trl.compat.table import ABSENT, HELPERS, NAMES, PATHS, PLACES
from trl.notices import notify_once


class _Modules:
    """Finds the modules of `PATHS`."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in PATHS:
            home, _, last = name.rpartition(".")
            ours = (home == "trl" or home in PATHS) and not last.startswith("_")
            if ours and PathFinder.find_spec(name, path) is None:
                # `from home import last` looks for a module, since there is no such name.
                error = ModuleNotFoundError if last == last.lower() else ImportError
                raise error(absence(home, last))
            return None
        return _then(PathFinder.find_spec(name, path), _open) or ModuleSpec(name, _Old(), is_package=True)  # type: ignore[arg-type]


class _Old:
    """Loads a module without a file."""

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType | None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        _open(module)
        if PATHS[module.__name__]:
            notify_once(f"the module {module.__name__} is gone: {PATHS[module.__name__]}")


def _then(spec: ModuleSpec | None, act: Callable[[ModuleType], None]) -> ModuleSpec | None:
    """The spec of a module; after the module is executed, `act(module)` is called."""
    if spec is None or spec.loader is None:
        return None
    execute = spec.loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        act(module)

    spec.loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


def _open(module: ModuleType) -> None:
    """Make every public name of the library available in the module."""
    home = "trl.rewards" if module.__name__.startswith("trl.rewards.") else "trl"

    def __getattr__(name: str) -> Any:
        if not name.startswith("_"):
            public = importlib.import_module(home)
            if NAMES.get(name, name) in public.__all__:
                return getattr(public, name)
            place = PLACES.get((module.__name__.rpartition(".")[2], name)) or helper(name)
            if place:
                return getattr(importlib.import_module(place[0]), place[1])
        raise AttributeError(absence(module.__name__, name))

    module.__getattr__ = __getattr__  # type: ignore[method-assign]


def helper(name: str) -> tuple[str, str] | None:
    """The module of one of upstream's helpers, and its name there; None for other names."""
    if name.startswith("is_") and name.endswith("_available"):
        return HELPERS.get(name, ("trl.compat.helpers.packages", name))
    return HELPERS.get(name)


def instead(name: str) -> str | None:
    """A sentence on the replacement of upstream's name, module or command; None for an unknown one."""
    from fnmatch import fnmatchcase

    for patterns, sentence in ABSENT:
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return sentence
    return None


def absence(module: str, name: str) -> str:
    """The error message for a name that a module lacks, with the reason or the replacement."""
    from difflib import get_close_matches

    opening = f"module {module!r} has no attribute {name!r}"
    if sentence := instead(name):
        return f"{opening}: {sentence}"
    public = [*importlib.import_module("trl").__all__, *NAMES]
    if near := get_close_matches(name, public, n=1, cutoff=0.75):
        return f"{opening}; did you mean `{near[0]}`?"
    if module == "trl":
        return f"{opening}; `dir(trl)` lists the public names"
    return f"{opening}: only the public names of `trl` are available here, not the helpers of upstream's {module}"


def renamed(name: str) -> str | None:
    """The present name for an older public name, with one notice; None for other names."""
    if name in NAMES:
        notify_once(f"`{name}` is `{NAMES[name]}` today")
    return NAMES.get(name)


def install() -> None:
    if not any(isinstance(each, _Modules) for each in sys.meta_path):
        sys.meta_path.insert(0, _Modules())
