"""Imports run downward, and `import trl` is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
    **dict.fromkeys(("losses", "data", "config", "compat", "options", "methods", "near", "notices", "version"), 0),
    **dict.fromkeys(("engine", "models", "checkpoint"), 1),
    **dict.fromkeys(("rewards",), 2),
    **dict.fromkeys(("rollout",), 3),
    **dict.fromkeys(("trainer",), 4),
    **dict.fromkeys(("demo", "callbacks"), 5),
    **dict.fromkeys(("cli",), 6),
}
# Arrows that would run downward and are still wrong: what computes numbers knows no loss.
FORBIDDEN = {("engine", "losses"), ("rollout", "losses")}


def modules() -> list[Path]:
    return sorted(path for path in (ROOT / "trl").rglob("*.py") if path != ROOT / "trl" / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "trl").with_suffix("").parts[0]


def imported(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported anywhere in a module of `package`, functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def violations(source: str, path: Path) -> list[str]:
    room = room_of(path)
    found = []
    for line, name in imported(source, path.relative_to(ROOT).parts[:-1]):
        top, *rest = name.split(".")
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        if top != "trl":
            if room == "losses" and top != "torch" and top not in sys.stdlib_module_names:
                found.append(f"{where}; losses import torch alone")
            continue
        target = rest[0] if rest else ""
        if target == room:
            continue
        if target not in LAYERS:
            # A public name taken from the package itself may come from any room: only the top floor may do that.
            if LAYERS[room] < 5:
                found.append(f"{where}: name the module it lives in")
        elif LAYERS[target] > LAYERS[room]:
            found.append(f"{where}, which is a floor above")
        elif room == "losses" or (room, target) in FORBIDDEN:
            found.append(f"{where}; {room} must not know {target}")
    return found


def test_imports_run_downward() -> None:
    assert [fault for path in modules() for fault in violations(path.read_text(), path)] == []


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_has_a_floor(path: Path) -> None:
    assert room_of(path) in LAYERS


@pytest.mark.parametrize(
    ("source", "where", "word"),
    [
        ("from ..trainer import base", "trl/engine/x.py", "above"),
        ("from trl.trainer.sft import SFTTrainer", "trl/data/x.py", "above"),
        ("def f():\n    import trl.cli.main", "trl/trainer/x.py", "above"),
        ("from trl.losses.sft import nll", "trl/engine/x.py", "must not know"),
        ("import transformers", "trl/losses/x.py", "torch alone"),
        ("from trl import SFTTrainer", "trl/models/x.py", "name the module"),
        ("from . import load", "trl/models/x.py", ""),
        ("from trl.losses.sft import nll", "trl/trainer/x.py", ""),
        ("import torch, math\nfrom .tokens import seq_sum", "trl/losses/x.py", ""),
    ],
)
def test_the_walk_sees_what_it_should(source: str, where: str, word: str) -> None:
    found = violations(source, ROOT / where)
    assert len(found) == (1 if word else 0)
    assert all(word in fault for fault in found)


def test_import_trl_is_cheap() -> None:
    heavy = ("torch", "transformers", "numpy")
    code = f"import sys, trl, trl.cli.main; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]"
