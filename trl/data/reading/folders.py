"""The files of a folder by split. Their names say which split they are: `eval.jsonl`, `test/part.jsonl`."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets

logger = logging.getLogger(__name__)

NAMED = 3  # files that a sentence names
TRAIN = "train"
OF_ANOTHER = re.compile(r"(?<![A-Za-z])(test|testing|eval|evaluation|val|valid|validation|dev)(?![A-Za-z])")


def files_by_split(folder: Path, files: Sequence[Path]) -> dict[str, list[str]] | None:
    """The files of each split of a folder, if `datasets` would leave out some that are meant, else None.

    `datasets` reads the files whose names are those of splits, and no others once there is such a one. Without a split
    "train" the others are taken for it, if they are of the same format and not named after another split. A log line
    says which files are not read.
    """
    read = _as_read(folder)
    known = {file.resolve() for part in read.values() for file in part}
    rest = [file for file in files if file.resolve() not in known]
    if not rest:
        return None
    kinds = {file.suffix for part in read.values() for file in part}
    apart = any(OF_ANOTHER.search(str(file.relative_to(folder))) for file in rest)
    if TRAIN not in read and {file.suffix for file in rest} <= kinds and not apart:
        others = {name: list(map(str, part)) for name, part in read.items()}
        return {TRAIN: [str(file.resolve()) for file in rest], **others}
    why = "no split is called so" if {file.suffix for file in rest} <= kinds else "the other files have another format"
    logger.warning("%r: not read, because %s: %s.", str(folder), why, _names(folder, rest))
    return None


def say_split(folder: Path, splits: Mapping[str, Sequence[str]] | None, there: Sequence[str], split: str) -> None:
    """A log line on the splits of a folder, if there are several, and the one that is read."""
    if len(there) < 2:
        return
    files = splits or {name: list(map(str, part)) for name, part in _as_read(folder).items()}
    parts = [f"{name!r} ({_names(folder, [Path(file) for file in files.get(name, ())])})" for name in there]
    read = f"; {split!r} is read" if split in there else ""
    logger.warning("%r has the splits %s and %s%s.", str(folder), ", ".join(parts[:-1]), parts[-1], read)


def _as_read(folder: Path) -> dict[str, list[Path]]:
    """The files of each split, as `datasets` finds them."""
    found = datasets.load_dataset_builder(str(folder)).config.data_files or {}
    return {str(split): [Path(str(file)) for file in files] for split, files in found.items()}


def _names(folder: Path, files: Sequence[Path]) -> str:
    """The names of files in a folder, the first of them."""
    base = folder.resolve()
    names = [str(file.resolve().relative_to(base)) if base in file.resolve().parents else str(file) for file in files]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(sorted(names)[:NAMED]) + more
