"""Checkpoints that appear whole or not at all, and the state that makes a resumed run the uninterrupted one.

A checkpoint is written into a staging folder beside its place, synced to disk, listed in a manifest, then renamed. What
is called `checkpoint-N` is therefore complete; a run killed while saving leaves a staging folder that the next save
removes, and every earlier checkpoint as it was.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")
_STAGING = ".saving-"
_REPLACED = ".replaced-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with what to do about it."""


def staging_folder(final: Path) -> Path:
    """Where the checkpoint that will be called `final` is written."""
    return final.parent / f"{_STAGING}{final.name}"


def published_name(folder: Path) -> str:
    """What a folder is called once it is in place, if it is one that is being written."""
    return folder.name.removeprefix(_STAGING)


def begin(final: Path) -> Path:
    """Remove what a killed save left behind and make the staging folder. One process calls this."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(f"{_STAGING}*"):
        shutil.rmtree(leftover)
    for replaced in final.parent.glob(f"{_REPLACED}*"):
        original = replaced.parent / replaced.name.removeprefix(_REPLACED)
        if original.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(original)  # killed between the two renames of `publish`
    staging = staging_folder(final)
    staging.mkdir()
    return staging


def publish(final: Path, **facts: Any) -> None:
    """Manifest, sync, rename: the staging folder becomes `final`. One process calls this, after all have written.

    `facts` are kept in the manifest beside the list of files and their sizes in bytes.
    """
    staging = staging_folder(final)
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    manifest = {**facts, "files": {str(path.relative_to(staging)): path.stat().st_size for path in files}}
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, staging / MANIFEST]:
        _sync(path)
    for folder in {path.parent for path in files} | {staging}:
        _sync(folder)
    if final.exists():
        replaced = final.parent / f"{_REPLACED}{final.name}"
        final.rename(replaced)
        staging.rename(final)
        shutil.rmtree(replaced)
    else:
        staging.rename(final)
    _sync(final.parent)


def problem(folder: Path) -> str | None:
    """Why this checkpoint cannot be resumed from, in one sentence, or None. Folders without a manifest pass if they
    hold a trainer state: they come from another library."""
    if not folder.is_dir():
        return f"{folder} is not a folder"
    manifest = folder / MANIFEST
    if not manifest.exists():
        return None if (folder / "trainer_state.json").exists() else f"{folder} holds no trainer state"
    try:
        expected = json.loads(manifest.read_text())["files"]
    except (ValueError, KeyError):
        return f"{manifest} cannot be read"
    for name, size in expected.items():
        path = folder / name
        if not path.exists():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, the manifest says {size}"
    return None


def manifest(folder: Path) -> dict[str, Any]:
    """The facts that were published with a checkpoint; empty for folders of another library."""
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.exists() else {}


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), path) for path in output_dir.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def resolve(output_dir: Path, resume: str | Path | bool) -> tuple[Path, list[str]]:
    """The checkpoint to resume from, checked, and sentences on those passed over.

    `True` means the newest complete one of `output_dir`; a path must itself be complete.
    """
    if resume is not True:
        folder = Path(str(resume))
        if fault := problem(folder):
            others = ", ".join(path.name for path in checkpoints(folder.parent)) or "none"
            raise CheckpointError(f"cannot resume from {folder}: {fault}. Checkpoints beside it: {others}")
        return folder, []
    passed = []
    for folder in reversed(checkpoints(output_dir)):
        fault = problem(folder)
        if fault is None:
            return folder, passed
        passed.append(f"{folder.name} is damaged ({fault}): trying the one before it")
    raise CheckpointError(
        f"nothing to resume from: {output_dir} holds no complete checkpoint"
        + (f" ({'; '.join(passed)})" if passed else "; leave resume_from_checkpoint out to start from the beginning")
    )


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` write a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    write(aside)
    _sync(aside)
    os.replace(aside, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
