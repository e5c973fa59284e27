"""Completions with their rewards: on the screen, and one file a step in the output folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WIDTH = 400  # characters of a text on the screen


class Table:
    """Keeps completions in `folder`, one file a step: `completions_<step>.parquet` and, for reading by eye, `.jsonl`;
    those of an evaluation as `eval_completions_<step>`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, rows: Sequence[dict[str, Any]], step: int, mode: str) -> None:
        if not rows:
            return
        import pyarrow
        from pyarrow import parquet

        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / f"{'eval_' if mode == 'eval' else ''}completions_{step:05d}"
        plain = [{name: _plain(value) for name, value in row.items()} for row in rows]
        known = _read(place.with_suffix(".jsonl")) if mode == "eval" else []  # an evaluation has many batches
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*known, *plain])
        place.with_suffix(".jsonl").write_text(lines, encoding="utf-8")
        parquet.write_table(pyarrow.Table.from_pylist([*known, *plain]), place.with_suffix(".parquet"))

    @staticmethod
    def show(rows: Sequence[dict[str, Any]], step: int, limit: int | None = None, unique_prompts: bool = False) -> None:
        """Print the rows as a table, at most `limit` of them, or one of each prompt."""
        from rich.console import Console
        from rich.table import Table as Grid

        if unique_prompts:
            rows = list({row["prompt"]: row for row in reversed(rows)}.values())[::-1]
        rows = rows[:limit]
        if not rows:
            return
        names = [name for name in rows[0] if name not in ("step", "mode")]
        grid = Grid(title=f"step {step}", show_lines=True)
        for name in names:
            grid.add_column(name, overflow="fold")
        for row in rows:
            grid.add_row(*(_short(row[name]) for name in names))
        Console().print(grid)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    return text if len(text) <= WIDTH else f"{text[: WIDTH // 2]} … {text[-(WIDTH // 2) :]}"


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
