"""Commands as a user types them, in a process of their own or in this one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trl import notices
from trl.cli.main import main

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def trl_command(tmp_path: Path) -> Command:
    """`trl_command("sft", "--max_steps", 3)` runs `trl sft --max_steps 3` in an empty folder."""
    program = Path(sys.executable).parent / "trl"

    def run(*arguments: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(program), *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def trl_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The same in this process, which has loaded everything: for what a process of its own does not change."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        typed = [*map(str, arguments)]
        notices._printed.clear()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(typed)
        return subprocess.CompletedProcess(typed, status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def empty_path(tmp_path: Path) -> str:
    """A folder that passes for a model's, of which nothing can be loaded."""
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return str(folder)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Eight short chats."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What comes after {number}?"},
                {"role": "assistant", "content": f"After {number} comes {number + 1}."},
            ]
        }
        for number in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
