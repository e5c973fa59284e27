"""`trl completion`: what a shell is offered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trl.cli import train
from trl.cli.completion import candidates

from .conftest import Command


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["sf"], ["sft"]),
        (["--ver"], ["--version"]),
        (["sft", "--learning_r"], ["--learning_rate"]),
        (["sft", "--dataloader_num_w"], ["--dataloader_num_workers"]),
        (["sft", "--num_proc"], ["--num_processes"]),
        (["sft", "--packing_strategy", "b"], ["bfd", "bfd_split"]),
        (["sft", "--config", ""], []),  # a file: the shell's own completion
        (["config", "sf"], ["sft"]),
        (["plan", "sf"], ["sft"]),
        (["completion", ""], ["bash", "fish", "zsh"]),
        (["data", "conv"], ["convert"]),
        (["data", "--model_n"], ["--model_name_or_path"]),
        (["demo", "--qu"], ["--quick"]),
        (["absent", "--x"], []),
    ],
)
def test_candidates(words: list[str], found: list[str]) -> None:
    train.training_parser("sft")  # which fills the cache
    assert candidates(words) == found


@pytest.mark.usefixtures("cache")
def test_without_a_cache_the_most_used_options_are_offered() -> None:
    assert candidates(["sft", "--learning_r"]) == ["--learning_rate"]
    assert candidates(["sft", "--dataloader_num_w"]) == []


@pytest.mark.parametrize(
    ("shell", "typed"),
    [
        (
            ["bash", "-c"],
            "{script}\nCOMP_WORDS=(trl data --rows 3 --ma); COMP_CWORD=4; _trl; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        ),
        (["fish", "-c"], "{script}\ncomplete -C 'trl data --rows 3 --ma'"),
        # Outside of its line editor zsh has no `compadd`: here it prints what it is given.
        (
            ["zsh", "-fc"],
            'compdef() {{ }}; compadd() {{ print -l -- "$@" }}; _files() {{ }}\n{script}\n'
            "words=(trl data --rows 3 --ma) CURRENT=5; _trl",
        ),
    ],
    ids=["bash", "fish", "zsh"],
)
def test_a_shell_completes(trl_command: Command, shell: list[str], typed: str) -> None:
    if shutil.which(shell[0]) is None:
        pytest.skip(f"{shell[0]} is not installed")
    script = trl_command("completion", shell[0]).stdout
    found = subprocess.run(
        [*shell, typed.format(script=script)],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    words = [word for word in found.stdout.split() if word != "--"]
    assert words == ["--max_completion_length", "--max_length", "--max_prompt_length"], found.stderr


def test_a_shell_that_is_not_known(trl_here: Command) -> None:
    answer = trl_here("completion", "tcsh")
    assert answer.returncode == 2 and "bash" in answer.stderr
