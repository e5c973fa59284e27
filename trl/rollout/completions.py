"""Completions with their rewards: on the screen, and one file a step in the output folder."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

WIDTH = 400  # characters of a text on the screen
OWN = frozenset({"step", "mode", "prompt", "completion", "advantage"})  # columns that are no extras


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
    def show(
        rows: Sequence[dict[str, Any]],
        step: int,
        limit: int | None = None,
        unique_prompts: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Print the rows, at most `limit` of them, or one of each prompt: under each prompt its completions, with their
        rewards, the total of these, and the advantage.

        `weights` are those of the reward functions, by name; the total is the sum of the rewards times them.
        """
        from rich import get_console

        if unique_prompts:
            rows = list({row["prompt"]: row for row in reversed(rows)}.values())[::-1]
        for prompt, same in groupby(rows[:limit], key=lambda row: row["prompt"]):
            get_console().print(_grid(readable(prompt), list(same), step, dict(weights or {})))


def _grid(prompt: str, rows: Sequence[dict[str, Any]], step: int, weights: dict[str, float]) -> Any:
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(
        title=Text(f"step {step}, prompt: {_short(prompt)}"), title_justify="left", show_lines=True, expand=True
    )
    grid.add_column("completion", overflow="fold", ratio=1)
    extra = [name for name in rows[0] if name not in {*OWN, *weights}]
    for name in [*(["rewards"] if weights else []), *extra, "advantage"]:
        grid.add_column(name, justify="right", overflow="fold")
    for row in rows:
        given = {name: row[name] for name in weights if row.get(name) is not None}
        lines = [f"{name} {_short(value)}" + (f" × {weights[name]:g}" if len(weights) > 1 else "")
                 for name, value in given.items()]  # fmt: skip
        total = [f"total {_short(sum(weights[name] * value for name, value in given.items()))}"] * (len(weights) > 1)
        cells = [readable(row["completion"]), *(["\n".join([*lines, *total])] if weights else [])]
        cells += [readable(row[name]) for name in extra] + [row.get("advantage", "")]
        grid.add_row(*(Text(_short(cell)) for cell in cells))
    return grid


def readable(value: Any) -> Any:
    """Messages, also as JSON, as `role: text`, a line each; other values as they are."""
    if isinstance(value, str) and value.startswith("[{"):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if not isinstance(value, list) or not all(isinstance(each, dict) and "content" in each for each in value):
        return value
    return "\n".join(f"{each.get('role', 'text')}: {each['content']}" for each in value)


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
