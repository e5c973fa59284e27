"""Lines of files: the line of a row, lines that cannot be read, and copies of files without them."""

import contextlib
import csv
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl.data.reading.errors import DataError
from trl.data.reading.files import BUILDERS, DAMAGED, PACKED, derived, derived_folder, endings, lines

logger = logging.getLogger(__name__)

MOST = 20  # an error names at most this many broken lines of a file
# Attribute of a data set: the path of its file, the number of its first row in the file, and the numbers of the lines
# of the file that were left out.
ORIGIN = "_trl_origin"
NO_ORIGIN: tuple[Path | None, int, frozenset[int]] = (None, 0, frozenset())
_BLANK = b"\xef\xbb\xbf \t\r\n"  # bytes of a line that holds nothing; the first three mark UTF-8


def line_of(dataset: Any, rows: Sequence[int]) -> str:
    """The lines of a file at which rows of a data set begin, in brackets for an error message.

    The text is empty for rows that are not from a file.
    """
    path, first, left_out = getattr(dataset, ORIGIN, NO_ORIGIN)
    if path is None:
        return ""
    with contextlib.suppress(*DAMAGED, UnicodeDecodeError, csv.Error, IndexError):
        numbers = _line_numbers(path, left_out)
        return f" (line {', '.join(str(numbers[first + row]) for row in rows)} of {str(path)!r})"
    return f" (of {str(path)!r})"


def _line_numbers(path: Path, left_out: frozenset[int]) -> list[int]:
    """The line at which each row of a file begins, counted from 1. Empty if rows have no lines of their own."""
    if BUILDERS[endings(path)[0]] == "csv":
        numbers = [record.first for record in _records(_blanked(path, left_out), path) if record.fields]
        return numbers[1:]  # the first record names the columns
    return [number for number, _ in _filled(_blanked(path, left_out))] if _has_lines(path) else []


def _blanked(path: Path, left_out: frozenset[int]) -> Iterator[bytes]:
    """The lines of a file; those that are left out are blank, so that the others keep their numbers."""
    return (b"\n" if number in left_out else line for number, line in enumerate(lines(path), start=1))


def _filled(each: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    return ((number, line) for number, line in enumerate(each, start=1) if line.strip(_BLANK))


def _has_lines(path: Path) -> bool:
    """Whether every line of a file is a row in JSON, as far as its first line tells."""
    ending, _ = endings(path)
    if BUILDERS[ending] != "json":
        return False
    _, first = next(_filled(lines(path)), (0, b""))
    # The first line of a list over several lines is no row, and neither is that of an object.
    return not first.lstrip(_BLANK).startswith(b"[") if ending == ".jsonl" else _fault_of_object(first) is None


class _Record(NamedTuple):
    """A record of a table: its first and last line, and the number of its fields."""

    first: int
    last: int
    fields: int


def _records(each: Iterable[bytes], path: Path) -> Iterator[_Record]:
    reader = csv.reader(
        (line.decode("utf-8-sig") for line in each), delimiter="\t" if endings(path)[0] == ".tsv" else ","
    )
    before = 0
    for record in reader:
        yield _Record(before + 1, reader.line_num, len(record))
        before = reader.line_num


# ---------------------------------------------------------------------------------------------------------------------
# Lines that cannot be read


class _Broken(NamedTuple):
    """Lines of a file that cannot be read: the first and the last of them, their fault, and the remedy."""

    first: int
    last: int
    fault: str
    remedy: str


def left_out(path: Path) -> tuple[Path, frozenset[int]] | None:
    """A copy of a file, in the cache, whose broken lines are blank, and the numbers of these lines. A log line names
    them. None if no line is broken, if all are, or if the rows have no lines of their own."""
    try:
        broken = _broken_lines(path)
        numbers = frozenset(number for each in broken for number in range(each.first, each.last + 1))
        if not broken or not any(True for number, _ in _filled(lines(path)) if number not in numbers):
            return None
        ending, packing = endings(path)
        copy = derived(path, "without_broken_lines", path.stem if packing else path.name, _blanked(path, numbers))
    except (*DAMAGED, csv.Error):
        return None
    count = "1 line cannot be read and is" if len(broken) == 1 else f"{len(broken):,} lines cannot be read and are"
    logger.warning("%s: %s left out by skip_bad_rows: %s", path, count, _faults(broken))
    return copy, numbers


def left_out_of_folder(path: Path, files: Sequence[Path]) -> Path | None:
    """A folder in the cache that is the one at `path`, with copies in the place of those of its `files` that have
    broken lines. None if no file has any."""
    copies = {file: made[0] for file in files if (made := left_out(file)) is not None}
    return derived_folder(path, "without_broken_lines", copies) if copies else None


def _faults(broken: Sequence[_Broken]) -> str:
    more = f" And {len(broken) - MOST} more." if len(broken) > MOST else ""
    return " ".join(f"line {each.first} {each.fault}." for each in broken[:MOST]) + more


def _broken_lines(path: Path) -> list[_Broken]:
    """The lines of a file that cannot be read. Empty if the rows have no lines of their own."""
    kind = BUILDERS[endings(path)[0]]
    if kind == "csv":
        return _broken_records(path)
    if kind == "text":
        return [_not_utf8(number, error) for number, _, error in _decoded(path) if error is not None]
    return _broken_objects(path) if _has_lines(path) else []


def _decoded(path: Path) -> Iterator[tuple[int, bytes, UnicodeDecodeError | None]]:
    """The lines of a file with their numbers, and why a line is not UTF-8; such a line is blank."""
    for number, line in enumerate(lines(path), start=1):
        try:
            line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            yield number, b"\n", error
        else:
            yield number, line, None


def _not_utf8(number: int, error: UnicodeDecodeError) -> _Broken:
    byte = error.object[error.start]
    return _Broken(number, number, f"is not UTF-8 (byte 0x{byte:02x})", "Save the file as UTF-8.")


def _broken_objects(path: Path) -> list[_Broken]:
    found = []
    for number, line, error in _decoded(path):
        if error is not None:
            found.append(_not_utf8(number, error))
        elif line.strip(_BLANK) and (fault := _fault_of_object(line)) is not None:
            found.append(_Broken(number, number, fault, "Correct or remove the line."))
    return found


def _fault_of_object(line: bytes) -> str | None:
    """What is wrong with a line that should be an object in JSON. None if nothing is."""
    try:
        value = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_each_once)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return f"is not valid JSON ({error.msg})"
    except UnicodeDecodeError:
        return "is not UTF-8"
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is no character"
    except DataError as error:
        return str(error)
    return None if isinstance(value, dict) else "is not a JSON object"


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of an object. The readers of `datasets` refuse a field that stands twice, which Python's does not."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise DataError(f"has the field {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _broken_records(path: Path) -> list[_Broken]:
    found, decoded = [], []
    for number, line, error in _decoded(path):
        decoded.append(line)
        if error is not None:
            found.append(_not_utf8(number, error))
    wanted = 0
    for record in _records(decoded, path):
        wanted = wanted or record.fields
        if record.fields > wanted:
            fault = f"has {record.fields} fields, but the first line names {wanted} columns"
            remedy = "Put quotes around a field that contains the separator."
            found.append(_Broken(record.first, record.last, fault, remedy))
    return sorted(found)


# ---------------------------------------------------------------------------------------------------------------------
# Files that cannot be read


def broken_lines(path: Path) -> str | None:
    """What is wrong with the broken lines of a file, and the remedies. None if there are none."""
    broken = _broken_lines(path)
    if not broken:
        return None
    remedies = " ".join(dict.fromkeys(each.remedy for each in broken))
    return f"{_faults(broken)} {remedies} skip_bad_rows=True (--skip_bad_rows) leaves such lines out."


def why_unreadable(path: Path) -> str | None:
    """Why a file cannot be read, with the broken lines of a text file. None if the reason is not known."""
    ending, _ = endings(path)
    if ending == ".parquet":
        return "it is not a whole Parquet file. Copy or download it again."
    if ending == ".arrow":
        return "it is not a whole Arrow file. Copy or write it again."
    try:
        if (faults := broken_lines(path)) is not None:
            return faults
        content = b"".join(lines(path))
    except csv.Error as error:
        return f"it is not a table ({error})."
    except DAMAGED as error:
        return f"{PACKED} ({error})."
    if BUILDERS[ending] == "csv":
        return None if content.strip(_BLANK) else "it has no line with names of columns."
    if BUILDERS[ending] != "json":
        return None
    if _has_lines(path):
        return "the lines do not agree on the type of a field. Give every field one type in all lines."
    return _broken_json(content)


def _broken_json(content: bytes) -> str:
    """What is wrong with a file that is one list in JSON."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        return f"line {number} is not UTF-8 (byte 0x{content[error.start]:02x}). Save the file as UTF-8."
    except json.JSONDecodeError as error:
        return f"line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). Correct the file."
    if isinstance(value, list):
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                return f"row {index} is a {type(item).__name__}, not an object of fields such as {{'text': ...}}."
        return "the rows do not agree on the type of a field. Give every field one type in all rows."
    return f"it holds a {type(value).__name__}. Give a list of objects, one a row."
