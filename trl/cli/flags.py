"""The options of a command as plain data: made of dataclasses, and kept in the user's cache folder.

`trl sft --help` and a wrong command line need the names, types and help texts of two hundred fields, but not
transformers, which defines half of them and takes seconds to load. `remembered` stores what was read of the classes,
under a key of all that it depends on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import hashlib
import json
import os
import sys
import tempfile
import typing
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import trl
from trl.cli.values import Kind
from trl.compat.table import VALUES, Now

# The libraries whose classes become options, each with the file that defines them.
SOURCES = {"transformers": "training_args.py", "accelerate": "commands/launch.py"}
LAYOUT = 1  # raise it when the stored form changes


@dataclasses.dataclass
class Flag:
    """An option. `title` names its group, `help` ends with the default, `default` is as in YAML."""

    name: str
    title: str
    help: str
    default: Any
    kind: Kind


@dataclasses.dataclass
class Older:
    """An older name of an option: the present name, if there is one, and whether the value keeps its form."""

    name: str | None
    same_value: bool


@dataclasses.dataclass
class Flags:
    """All options of a command.

    Args:
        fields: option -> its description, in the order of the classes. A field that two classes share is one option.
        older: older name -> what it is today.
        older_values: option -> older values, which the classes translate.
        foreign: another program's options, and whether each takes a value.
    """

    fields: dict[str, Flag]
    older: dict[str, Older]
    older_values: dict[str, list[str | None]]
    foreign: Mapping[str, bool] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, classes: Sequence[type], foreign: Mapping[str, bool] | None = None) -> Flags:
        """The options that the fields of dataclasses make."""
        from trl.compat.arguments import rows_of

        found = cls({}, {}, {}, foreign or {})
        for each in classes:
            hints = typing.get_type_hints(each)
            for field in dataclasses.fields(each):
                if field.init and field.name not in found.fields:
                    kind = Kind(hints[field.name], field.metadata.get("choices", ()))
                    if kind.settable:
                        found.fields[field.name] = _flag(each, field, kind)
            for name, values in rows_of(each, VALUES).items():
                found.older_values[name] = [word for word in values if word is None or isinstance(word, str)]
        for each in classes:
            for word, row in rows_of(each).items():
                if word not in found.fields and word not in found.older and word != "config":
                    same = isinstance(row, Now) and row.value is None
                    found.older[word] = Older(row.name if isinstance(row, Now) else None, same)
        return found

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values."""
        fields = {name: {**vars(flag), "kind": flag.kind.to_dict()} for name, flag in self.fields.items()}
        return {**dataclasses.asdict(dataclasses.replace(self, fields={})), "fields": fields}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Flags:
        """The options from what `to_dict` gave. Raises KeyError or TypeError for anything else."""
        fields = {
            name: Flag(**{**flag, "kind": Kind.from_dict(flag["kind"])}) for name, flag in content["fields"].items()
        }
        older = {word: Older(**row) for word, row in content["older"].items()}
        return cls(fields, older, dict(content["older_values"]), dict(content["foreign"]))


def _flag(cls: type, field: dataclasses.Field[Any], kind: Kind) -> Flag:
    text = " ".join(str(field.metadata.get("help", "")).split())
    if kind.choices and "|" not in kind.metavar:
        # The flag itself does not show the choices. Long lists of other libraries are in their documentation.
        if names := field.metadata.get("choices", ()):
            text += f" One of: {', '.join(map(str, names))}."
    default = _default(field)
    if default not in (None, "", []) and not (kind.boolean and default is False):
        text += f" [{_shown(default)}]"
    return Flag(field.name, _origin(cls, field.name), text.strip(), default, kind)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if isinstance(field.default, enum.Enum):
        return field.default.value
    return None if field.default is dataclasses.MISSING else field.default


def _shown(default: Any) -> str:
    """A default as on the command line."""
    words = default if isinstance(default, (list, tuple)) else [default]
    return " ".join(str(word) if str(word).strip() else repr(word) for word in words)


def _origin(cls: type, name: str) -> str:
    """The title of a field's group: the first sentence of the class that defines it, and its name."""
    source = next(part for part in cls.__mro__ if name in part.__dict__.get("__annotations__", {}))
    if not source.__module__.startswith("trl"):
        library = source.__module__.partition(".")[0]
        return f"{library}.{source.__name__}" if library == "transformers" else _sentence(source)
    return f"{_sentence(source)} ({source.__name__})"


def _sentence(cls: type) -> str:
    return (cls.__doc__ or cls.__name__).strip().splitlines()[0].rstrip(".")


# --- the cache ------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The folder of stored options: `TRL_CACHE`, or `trl` in the user's cache folder (`XDG_CACHE_HOME`)."""
    if chosen := os.environ.get("TRL_CACHE"):
        return Path(chosen).expanduser() / "options"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trl" / "options"


def remembered(name: str, make: Callable[[], Flags]) -> Flags:
    """The options `name`: from the cache if they were stored under the present key, else from `make`, then stored. A
    cache that cannot be read or written changes nothing."""
    key = _key()
    flags = stored(name, key)
    if flags is None:
        flags = make()
        with contextlib.suppress(OSError):
            _write(_path(name), json.dumps({"key": key, "flags": flags.to_dict()}, default=str))
    return flags


def stored(name: str, key: str | None = None) -> Flags | None:
    """The options `name` in the cache, or None if they are not there under `key` (default: the present one)."""
    try:
        content = json.loads(_path(name).read_text(encoding="utf-8"))
        return Flags.from_dict(content["flags"]) if content["key"] == (key or _key()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # there is no such file yet, or another program wrote it


def _path(name: str) -> Path:
    return cache_folder() / f"{name}.json"


def _write(path: Path, text: str) -> None:
    """The file appears whole, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def _key() -> str:
    """What the options depend on: Python, the sources of this package, and the libraries that define the rest."""
    package = Path(trl.__file__).parent
    parts: list[Any] = [LAYOUT, sys.version, str(package)]
    for folder, folders, files in os.walk(package):
        folders.sort()
        parts += [_state(os.path.join(folder, name)) for name in sorted(files) if name.endswith(".py")]
    for library, file in SOURCES.items():
        spec = find_spec(library)  # finds the package without running it
        where = spec.submodule_search_locations if spec is not None else None
        parts += [library, _version(library), *(_state(os.path.join(each, file)) for each in where or ())]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _state(path: str) -> tuple[str, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return path, 0, 0
    return path, found.st_mtime_ns, found.st_size


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"
