"""The folders of the data room import in the order of the flow, and no modules import each other in a circle."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import trl.data

ROOT = Path(trl.data.__file__).parent
FLOORS = {
    "reading": 0,
    "report": 0,
    "tokenizing": 1,
    "batching": 2,
    "mixture": 2,
    "convert": 2,
    "inspection": 2,
    "reshape": 2,
}


def imports() -> dict[str, set[str]]:
    """Each module of the room, by its dotted name from here on, and the modules of the room that it imports."""
    paths = [path for path in sorted(ROOT.rglob("*.py")) if path.name != "__init__.py"]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("trl.data"):
                inner = node.module.removeprefix("trl.data").lstrip(".")
                imported |= {inner} | {f"{inner}.{alias.name}".lstrip(".") for alias in node.names}
        found[name] = imported & set(names)
    return found


def test_imports_run_along_the_flow() -> None:
    found = imports()
    assert {name.split(".")[0] for name in found} == set(FLOORS)
    assert "reading.errors" in found["batching.packing"] and "tokenizing.recipe" in found["mixture"]
    floors = {name: FLOORS[name.split(".")[0]] for name in found}
    assert [(one, other) for one, others in found.items() for other in others if floors[other] > floors[one]] == []


def test_there_is_no_circle() -> None:
    order = list(graphlib.TopologicalSorter(imports()).static_order())
    assert order.index("reading.errors") < order.index("reading.formats") < order.index("tokenizing.encode")
