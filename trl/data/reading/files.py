"""Files of rows: their formats, the line of a row, and what is wrong with a file that cannot be read."""

import bz2
import contextlib
import csv
import gzip
import hashlib
import json
import lzma
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from trl.data.reading.errors import DataError

BUILDERS = {  # ending of the file name -> the reader of `datasets`
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path, mode: pa.input_stream(str(path), compression="zstd"),
}
MOST_LINES = 20  # an error names at most this many broken lines of a file
ORIGIN = "_trl_origin"  # attribute of a data set: the path of its file, and the number of its first row in the file


def endings(name: str | Path) -> tuple[str, str]:
    """The ending of a file name that tells the format (".jsonl"), and the ending of its compression (".gz"), or ""."""
    path = Path(name)
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in OPENERS else (last, "")


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
    facts = path.stat()
    key = hashlib.sha256(f"{path.absolute()} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:16]
    target = Path(datasets.config.HF_DATASETS_CACHE) / "unpacked" / f"{key}-{path.stem}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f"{target.name}.{os.getpid()}")
        try:
            with OPENERS[".zst"](path, "rb") as packed, aside.open("wb") as unpacked:
                while block := packed.read(1 << 20):
                    unpacked.write(block)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise DataError(f"Cannot read {str(path)!r}: {_PACKED} ({error}).") from error
        aside.replace(target)
    return target


def line_of(dataset: Any, rows: Sequence[int]) -> str:
    """The lines of a file at which rows of a data set begin, in brackets for an error message.

    The text is empty for rows that are not from a file.
    """
    path, first = getattr(dataset, ORIGIN, (None, 0))
    if path is None:
        return ""
    with contextlib.suppress(OSError, EOFError, lzma.LZMAError, UnicodeDecodeError, csv.Error, IndexError):
        numbers = _line_numbers(path)
        return f" (line {', '.join(str(numbers[first + row]) for row in rows)} of {str(path)!r})"
    return f" (of {str(path)!r})"


def _line_numbers(path: Path) -> list[int]:
    """The line at which each row of a file begins, counted from 1. Empty if rows have no lines of their own."""
    ending, packing = endings(path)
    if BUILDERS[ending] not in ("json", "csv"):
        return []
    with OPENERS.get(packing, open)(path, "rb") as file:
        lines = file.read().decode("utf-8-sig").splitlines(keepends=True)
    if BUILDERS[ending] == "csv":
        numbers, before = [], 0
        reader = csv.reader(lines, delimiter="\t" if ending == ".tsv" else ",")
        for record in reader:
            if record:
                numbers.append(before + 1)
            before = reader.line_num
        return numbers[1:]  # the first record names the columns
    filled = [number for number, line in enumerate(lines, start=1) if line.strip()]
    return filled if filled and lines[filled[0] - 1].lstrip().startswith("{") else []


_PACKED = "it is not a whole file of the compression that its ending names. Copy or download it again"


def why_unreadable(path: Path) -> str | None:
    """Why a file cannot be read, with the broken line of a text file. None if the reason is not known."""
    ending, packing = endings(path)
    if ending == ".parquet":
        return "it is not a whole Parquet file. Copy or download it again."
    if ending == ".arrow":
        return "it is not a whole Arrow file. Copy or write it again."
    try:
        with OPENERS.get(packing, open)(path, "rb") as file:
            lines = file.read().split(b"\n")
    except (OSError, EOFError, lzma.LZMAError) as error:
        return f"{_PACKED} ({error})."
    for number, line in enumerate(lines, start=1):
        try:
            line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            return f"line {number} is not UTF-8 (byte 0x{byte:02x}). Save the file as UTF-8."
    if ending == ".jsonl":
        return _broken_line(lines)
    if ending == ".json":
        return _broken_json(b"\n".join(lines).decode("utf-8-sig"), lines)
    return _broken_table(lines, "\t" if ending == ".tsv" else ",") if BUILDERS[ending] == "csv" else None


def _broken_line(lines: Sequence[bytes]) -> str:
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip() and not isinstance(json.loads(line), dict):
                found.append(f"line {number} is not a JSON object.")
        except json.JSONDecodeError as error:
            found.append(f"line {number} is not valid JSON ({error.msg}). Correct or remove the line.")
    if found:
        more = f" And {len(found) - MOST_LINES} more." if len(found) > MOST_LINES else ""
        return " ".join(found[:MOST_LINES]).replace(" Correct or remove the line. ", " ") + more
    return "the lines do not agree on the type of a field. Give every field one type in all lines."


def _broken_json(text: str, lines: Sequence[bytes]) -> str:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        with contextlib.suppress(json.JSONDecodeError):
            if isinstance(json.loads(lines[0]), dict):  # JSON lines in a file that is named .json
                return _broken_line(lines)
        return f"line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). Correct the file."
    if isinstance(value, list):
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                return f"row {index} is a {type(item).__name__}, not an object of fields such as {{'text': ...}}."
        return "the rows do not agree on the type of a field. Give every field one type in all rows."
    return f"it holds a {type(value).__name__}. Give a list of objects, one a row."


def _broken_table(lines: Sequence[bytes], separator: str) -> str | None:
    if not any(line.strip() for line in lines):
        return "it has no line with names of columns."
    wanted = lines[0].count(separator.encode())
    for number, line in enumerate(lines, start=1):
        found = line.count(separator.encode())
        if found > wanted and b'"' not in line:
            return (
                f"line {number} has {found + 1} fields, but the first line names {wanted + 1} columns. Put quotes "
                "around a field that contains the separator."
            )
    return None
