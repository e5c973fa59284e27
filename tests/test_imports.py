"""Imports run downward, and `import trl` is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
    **dict.fromkeys(("losses", "data", "config", "compat", "hub", "options", "methods", "near", "notices"), 0),
    **dict.fromkeys(("outputs", "screen", "version"), 0),
    **dict.fromkeys(("engine", "models", "checkpoint"), 1),
    **dict.fromkeys(("rewards", "plan"), 2),
    **dict.fromkeys(("rollout",), 3),
    **dict.fromkeys(("trainer",), 4),
    **dict.fromkeys(("demo", "callbacks", "helpers", "evaluate"), 5),
    **dict.fromkeys(("cli",), 6),
}
# Arrows that would run downward and are still wrong: what computes numbers knows no loss.
FORBIDDEN = {("engine", "losses"), ("rollout", "losses")}


def modules() -> list[Path]:
    return sorted(path for path in (ROOT / "trl").rglob("*.py") if path != ROOT / "trl" / "__init__.py")


def room_of(path: Path) -> str:
    return floor_of(path.relative_to(ROOT / "trl").with_suffix("").parts)


def floor_of(parts: Sequence[str]) -> str:
    """Of compat the helpers have a floor of their own: nothing below may need them."""
    return "helpers" if tuple(parts[:2]) == ("compat", "helpers") else parts[0]


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
        target = floor_of(rest) if rest else ""
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


def imported_modules(path: Path) -> set[str]:
    """The modules of this library that a module imports, at its top or in its functions."""
    names = {".".join(each.relative_to(ROOT).with_suffix("").parts) for each in modules()}
    found = set()
    for _, name in imported(path.read_text(), path.relative_to(ROOT).parts[:-1]):
        candidates = [name, name.rpartition(".")[0]]
        found |= {each for each in candidates if each in names}
    return found


def test_no_modules_import_one_another_in_a_circle() -> None:
    arrows = {".".join(path.relative_to(ROOT).with_suffix("").parts): imported_modules(path) for path in modules()}
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(arrows[name] - {name}):
                walk(other, [*trail, name])
            done.add(name)

    for name in arrows:
        walk(name, [])


LONG = {"compat/table.py": 1000}  # tables


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONG.get(str(path.relative_to(ROOT / "trl")), 500)


def test_static_imports_are_in_step_with_the_public_names() -> None:
    """Type checkers read the imports under TYPE_CHECKING, and Python the table."""
    import trl

    tree = ast.parse((ROOT / "trl" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    static = {
        alias.name: f"trl.{node.module}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert static == trl._HOMES
    assert trl.__all__ == sorted([*static, "__version__"])


def test_import_trl_is_cheap() -> None:
    heavy = ("torch", "transformers", "numpy")
    code = f"import sys, trl, trl.cli.main; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]"
