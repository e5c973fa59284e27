"""The scripts of examples/guide, one after the other in one folder, with few steps of a small model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "examples" / "guide"
pytestmark = pytest.mark.slow


def run(folder: Path, script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *flags],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guide")


@pytest.fixture(scope="module")
def after_sft(folder: Path, smol2_path: str) -> Path:
    """The folder once data are prepared and the first script has trained."""
    early = run(folder, "sft_train.py", "--model_name_or_path", smol2_path)
    assert early.returncode == 1 and "data/sft_dataset is not there: run prepare_data.py first" in early.stderr
    for script, flags in (
        ("prepare_data.py", ()),
        ("sft_train.py", ("--model_name_or_path", smol2_path, "--max_steps", "2")),
    ):
        done = run(folder, script, *flags)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def losses(output: Path, step: int) -> list[float]:
    history = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    return [line["loss"] for line in history if "loss" in line]


def test_sft_train_and_resume(after_sft: Path, smol2_path: str) -> None:
    assert len(losses(after_sft / "sft_output", 2)) == 2
    assert (after_sft / "sft_final" / "adapter_model.safetensors").is_file()
    flags = ("--model_name_or_path", smol2_path, "--max_steps", "3", "--resume_from_checkpoint")
    done = run(after_sft, "sft_train.py", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(after_sft / "sft_output", 3)) == 3 and len(re.findall(" loss=", done.stdout)) == 1


def test_dpo_train(after_sft: Path) -> None:
    done = run(after_sft, "dpo_train.py", "--max_steps", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = losses(after_sft / "dpo_output", 2)
    assert first == pytest.approx(0.6931, abs=1e-3) and second != first
    assert (after_sft / "dpo_final" / "adapter_model.safetensors").is_file()


def test_ppo_train(after_sft: Path) -> None:
    done = run(after_sft, "ppo_train.py", "--max_steps", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^step=\d+ ", done.stdout, re.M)) == 2  # a line a batch
    assert (after_sft / "ppo_final" / "adapter_model.safetensors").is_file()


def test_grpo_train(folder: Path, smol2_path: str) -> None:
    done = run(folder, "grpo_train.py", "--model_name_or_path", smol2_path, "--max_steps", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 completions each" in done.stdout
    assert (folder / "grpo_final" / "model.safetensors").is_file()


def test_merge(after_sft: Path) -> None:
    done = run(after_sft, "merge.py")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    gap = re.search(r"differ from those of the adapter's model by (\S+)", done.stdout)
    assert gap is not None and float(gap[1]) < 1e-3
    assert (after_sft / "merged_model" / "model.safetensors").is_file()
