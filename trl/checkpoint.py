"""Atomic checkpoints, and which of them a run can resume from.

A checkpoint is written into a staging folder, listed in a manifest, synced to disk, then renamed. A folder named
`checkpoint-N` is therefore complete. A run killed while saving leaves a staging folder, which the next save removes;
earlier checkpoints stay as they are.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

MANIFEST = "manifest.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")
_STAGING = ".saving-"
_REPLACED = ".replaced-"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message gives the remedy."""


def staging_folder(final: Path) -> Path:
    """The folder in which the checkpoint `final` is written."""
    return final.parent / f"{_STAGING}{final.name}"


def published_name(folder: Path) -> str:
    """The final name of a folder, which may be a staging folder."""
    return folder.name.removeprefix(_STAGING)


def begin(final: Path) -> Path:
    """Remove the remains of a killed save and make the staging folder. Only one process calls this."""
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
    """Write the manifest, sync to disk, rename the staging folder to `final`. Only one process calls this, after all
    processes have written.

    `facts` are stored in the manifest, in addition to the files and their sizes in bytes.
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
    """The reason why a checkpoint cannot be resumed from, in one sentence, or None. A folder without a manifest passes
    if it holds a trainer state: it comes from another library."""
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
    """The facts published with a checkpoint; empty for a folder of another library."""
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.exists() else {}


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    if not output_dir.is_dir():
        return []
    return sorted((path for path in output_dir.iterdir() if _NAME.match(path.name)), key=_number)


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def step(folder: Path) -> int:
    """The optimizer step of a checkpoint."""
    state = folder / "trainer_state.json"
    if state.exists():
        return int(json.loads(state.read_text())["global_step"])
    return int(manifest(folder).get("step", 0))


def started(folder: Path) -> float:
    """The time at which the run of a checkpoint began, in seconds since 1970; 0 if it is not recorded."""
    try:
        return float(manifest(folder).get("started", 0.0))
    except ValueError:
        return 0.0


def fingerprint(dataset: Any) -> str | None:
    """Identifies a prepared data set: its length and a hash of the tokens of some rows. None for a stream."""
    if not isinstance(dataset, Dataset):
        return None
    rows = f"{len(dataset):,} rows"
    names = sorted(name for name in dataset.column_names if name.endswith("_ids"))
    if not names or not len(dataset) or dataset.format["type"] == "custom":
        return rows
    places = sorted({len(dataset) * index // 32 for index in range(32)})
    some = json.dumps(dataset.select_columns(names).with_format(None)[places])
    return f"{rows} ({hashlib.sha256(some.encode()).hexdigest()[:8]})"


def differences(folder: Path, run: Mapping[str, str | None]) -> str:
    """The known differences between a checkpoint's run and this run, as text; empty if there are none."""
    known = manifest(folder).get("run") or {}
    return "; ".join(
        f"{what}: {known[what]} there, {value} here"
        for what, value in run.items()
        if value is not None and known.get(what) not in (None, value)
    )


def earlier(output_dir: Path, run: Mapping[str, str | None]) -> list[str]:
    """Notices about what an earlier run left in the folder, for a run that starts from the beginning."""
    found = [folder for folder in checkpoints(output_dir) if problem(folder) is None]
    if found:
        newest = max(found, key=lambda folder: (started(folder), step(folder)))
        other = differences(newest, run)
        how = (
            f"it belongs to another run ({other}): use another output_dir to keep the two apart"
            if other
            else "to resume from it, pass resume_from_checkpoint=True (--resume_from_checkpoint)"
        )
        return [f"{output_dir} holds {newest.name} of an earlier run, and this run starts from the beginning; {how}"]
    result = [name for name in ("adapter_model.safetensors", "model.safetensors") if (output_dir / name).exists()]
    return (
        [f"{output_dir} holds {result[0]} of an earlier run: the result of this run will replace it"] if result else []
    )


_WEIGHTS = re.compile(r"^(model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin)(\.index\.json)?$")
_ADAPTER = re.compile(r"^adapter_(model\.(safetensors|bin)|config\.json)$")


def set_aside(folder: Path, adapter: bool, base: str = "") -> list[str]:
    """Move an earlier run's weights of the other kind into the subfolder `earlier`: a whole model's if an `adapter` was
    just saved, an adapter's if a whole model was. Otherwise the folder would open as the wrong one. The adapter's base
    model (`base`) stays where it is. Returns notices."""
    stale = [path for path in folder.iterdir() if (_WEIGHTS if adapter else _ADAPTER).match(path.name)]
    if not stale or (adapter and base and Path(base).resolve() == folder.resolve()):
        return []
    if adapter:  # a whole model's configuration goes with its weights
        stale += [path for name in ("config.json", "generation_config.json") if (path := folder / name).exists()]
    aside = folder / "earlier"
    aside.mkdir(exist_ok=True)
    for path in stale:
        os.replace(path, aside / path.name)
    names = ", ".join(sorted(path.name for path in stale))
    return [f"{names} in {folder} came from an earlier run: moved to {aside}"]


def resolve(
    output_dir: Path, resume: str | Path | bool, run: Mapping[str, str | None] | None = None
) -> tuple[Path, list[str]]:
    """The checkpoint to resume from, and notices about checkpoints that are skipped.

    `resume=True` means the newest complete checkpoint in `output_dir` whose model, data set and method match `run`; the
    run that began last goes first. A path must be a complete checkpoint; if it belongs to another run, a notice tells.
    Raises CheckpointError if there is none.
    """
    run = run or {}
    if resume is not True:
        folder = Path(str(resume))
        if fault := problem(folder):
            others = ", ".join(path.name for path in checkpoints(folder.parent)) or "none"
            raise CheckpointError(f"cannot resume from {folder}: {fault}. Checkpoints beside it: {others}")
        other = differences(folder, run)
        return folder, [f"{folder.name} belongs to another run ({other})"] if other else []
    passed = []
    found = checkpoints(output_dir)
    for folder in sorted(found, key=lambda path: (started(path), _number(path)), reverse=True):
        fault = problem(folder)
        if fault is None and not (other := differences(folder, run)):
            later = [path.name for path in found if _number(path) > _number(folder) and started(path) < started(folder)]
            if later:
                passed.append(f"{', '.join(later)} of a run that began earlier: skipped")
            return folder, passed
        if fault is not None:
            passed.append(f"{folder.name} is damaged ({fault}): trying the one before it")
        else:
            passed.append(f"{folder.name} belongs to another run ({other}): skipped")
    why = f" ({'; '.join(passed)}). Name a checkpoint to resume from it anyway, or leave" if passed else "; leave"
    raise CheckpointError(
        f"nothing to resume from: {output_dir} holds no complete checkpoint of this run{why} resume_from_checkpoint "
        "out to start from the beginning"
    )


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file atomically: `write(path)` writes it under another name, and it is renamed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(aside)
        _sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
