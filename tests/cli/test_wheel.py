"""What is installed: the wheel has every module, the mark of types, the command and the launcher's presets."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools import build_meta; build_meta.build_wheel('.'); build_meta.build_sdist('.')"
# In a wheel as it is, without unpacking it.
PRESETS = """
import sys
sys.path.insert(0, sys.argv[1])
import trl.cli.launch
assert trl.cli.launch.__file__.startswith(sys.argv[1])
print(trl.__version__, *trl.cli.launch.PRESETS)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and an sdist."""
    pytest.importorskip("setuptools", "77", "builds by pyproject.toml")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "trl", folder / "trl", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_wheel_is_whole(built: Path) -> None:
    (wheel,) = built.glob("trl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        scripts = next(name for name in inside if name.endswith("entry_points.txt"))
        assert "trl = trl.cli.main:main" in archive.read(scripts).decode()
    files = {str(path.relative_to(built)) for path in (built / "trl").rglob("*") if path.is_file()}
    assert files <= inside and "trl/py.typed" in files
    assert {name.split("/")[0] for name in inside} == {"trl", scripts.split("/")[0]}


def test_the_presets_are_in_the_wheel(built: Path) -> None:
    (wheel,) = built.glob("trl-*.whl")
    done = subprocess.run(
        [sys.executable, "-c", PRESETS, str(wheel)], cwd=built.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    version, *presets = done.stdout.split()
    assert wheel.name.startswith(f"trl-{version}-")
    assert {"single_gpu", "multi_gpu", "zero1", "zero2", "zero3", "fsdp1", "fsdp2"} <= set(presets)


def test_the_sdist_has_the_sources(built: Path) -> None:
    (sdist,) = built.glob("trl-*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "trl/py.typed", "trl/cli/launch.py"} <= inside
