"""Ctrl-C: what is said, and that a second one ends everything at once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from trl import checkpoint

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts python in the test's folder, in a group of its own, where Ctrl-C is what it is in a terminal."""
    started = []

    def run(*arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job of a shell may ignore it
        )
        started.append(process)
        return process

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(condition: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def test_an_interrupted_run_names_its_newest_checkpoint(
    start: Start, tiny_path: str, rows_file: Path, tmp_path: Path
) -> None:
    process = start(
        *("-m", "trl.cli.main", "sft", "--model_name_or_path", tiny_path, "--dataset_name", rows_file, "--use_cpu"),
        *("--output_dir", "out", "--max_steps", 100_000, "--save_steps", 2, "--save_total_limit", 3, "--use_peft"),
        *("--per_device_train_batch_size", 1, "--report_to", "none", "--disable_tqdm", "true"),
    )
    until(lambda: process.poll() is not None or bool(checkpoint.checkpoints(tmp_path / "out")))
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    newest = max(checkpoint.checkpoints(tmp_path / "out"), key=checkpoint.step)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == (
        f"trl sft: interrupted. The newest checkpoint is out/{newest.name}, of step {checkpoint.step(newest)}; the "
        "same command with --resume_from_checkpoint resumes from it."
    )
    assert "Traceback" not in errors


def test_an_interrupted_run_without_a_checkpoint(tmp_path: Path) -> None:
    from trl.cli.launch import how_to_go_on

    folder = str(tmp_path / "out")
    assert how_to_go_on(folder) == f"{folder} holds no checkpoint yet: --save_steps sets how often one is written."


def test_a_second_interrupt_ends_a_command_that_is_still_cleaning_up(start: Start, tmp_path: Path) -> None:
    (tmp_path / "command.py").write_text("""
import atexit, sys, time, types
from trl.cli.main import main

def run(argv, name):
    atexit.register(lambda: time.sleep(600))  # as a tracker does that waits for its server
    print("begun", flush=True)
    time.sleep(600)

sys.modules["trl.cli.train"] = types.SimpleNamespace(run=run)
sys.exit(main(["sft"]))
""")
    process = start("command.py")
    assert process.stdout.readline() == "begun\n"
    os.killpg(process.pid, signal.SIGINT)
    assert [process.stderr.readline() for _ in range(2)] == ["\n", "trl sft: interrupted\n"]
    time.sleep(0.5)
    assert process.poll() is None  # it is cleaning up
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == -signal.SIGINT


def test_a_second_interrupt_ends_all_processes_of_a_launcher(start: Start, tmp_path: Path) -> None:
    """The launcher and the process that it has started pay no attention to the first one."""
    (tmp_path / "rank.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('begun', flush=True)\ntime.sleep(600)"
    )
    (tmp_path / "launcher.py").write_text(
        "import signal, subprocess, sys\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "subprocess.run([sys.executable, 'rank.py'])"
    )
    (tmp_path / "command.py").write_text(
        "import os, sys\nfrom trl.cli.launch import _wait\n"
        "try:\n    _wait([sys.executable, 'launcher.py'], os.environ)\n"
        "except KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    process = start("command.py")
    assert process.stdout.readline() == "begun\n"
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) == 2
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None and all(each.is_running() for each in below)  # the grace time
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    until(lambda: all(not each.is_running() or each.status() == psutil.STATUS_ZOMBIE for each in below), 30)
