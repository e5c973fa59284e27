"""Files of rows: their formats and their compression."""

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from trl.data.reading.errors import DataError
from trl.data.reading.names import BUILDERS as BUILDERS
from trl.data.reading.names import endings as endings

# By the endings of COMPRESSIONS.
OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path, mode: io.BufferedReader(pa.input_stream(str(path), compression="zstd")),
}
DAMAGED = (OSError, EOFError, lzma.LZMAError)  # errors of files that are not whole
PACKED = "it is not a whole file of the compression that its ending names. Copy or download it again"


def reader_of(path: Path) -> tuple[str, Path, dict[str, Any]]:
    """The reader of `datasets` for a file, the path that it should open, and its options.

    Raises `DataError` for an unknown ending and for an empty file.
    """
    ending, _ = endings(path)
    if ending not in BUILDERS:
        raise DataError(f"Cannot tell the format of {str(path)!r} by its ending; known are {', '.join(BUILDERS)}.")
    if path.stat().st_size == 0:
        raise DataError(f"The file {str(path)!r} is empty.")
    return BUILDERS[ending], _without_zstandard(path), {"sep": "\t"} if ending == ".tsv" else {}


def _without_zstandard(path: Path) -> Path:
    """The path of the unpacked file in the cache for a .zst file; any other path as it is.

    `datasets` itself needs one more package to read .zst.
    """
    if path.suffix.lower() != ".zst":
        return path
    try:
        return derived(path, "unpacked", path.stem, lines(path))
    except OSError as error:
        raise DataError(f"Cannot read {str(path)!r}: {PACKED} ({error}).") from error


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked, each with its end."""
    with OPENERS.get(endings(path)[1], open)(path, "rb") as file:
        yield from file


def derived(path: Path, what: str, name: str, content: Iterable[bytes]) -> Path:
    """A file in the folder `what` of the cache, made of the file at `path`. `content` is read if it is not there."""
    facts = path.stat()
    key = hashlib.sha256(f"{path.absolute()} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:16]
    target = Path(datasets.config.HF_DATASETS_CACHE) / what / f"{key}-{name}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f"{target.name}.{os.getpid()}")
        try:
            with aside.open("wb") as file:
                file.writelines(content)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        aside.replace(target)
    return target


def derived_folder(path: Path, what: str, copies: Mapping[Path, Path]) -> Path:
    """A folder in the folder `what` of the cache: links to the files below `path`, and to the `copies` that stand in
    for some of them. The copy of a packed file is not packed."""
    key = hashlib.sha256(repr((str(path.absolute()), sorted(copies.values()))).encode()).hexdigest()[:16]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / what / key
    for file in path.rglob("*"):
        if file.is_dir():
            continue
        name = file.relative_to(path)
        link = folder / (name.with_suffix("") if file in copies and endings(file)[1] else name)
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to(copies.get(file, file).absolute())
    return folder
