"""The guide's scripts under `accelerate launch`, as written, with two processes of a CPU.

They load their models with `device_map="auto"`. Where that spreads a model over GPUs, accelerate refuses it in a
distributed run, and the map is dropped (tests/models/test_load.py).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trl import checkpoint

from .conftest import Guide, changes, lay_out, log_of, newest_step, shell

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def folder(guide: Guide, hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts, and the file that `accelerate config` writes after the answers that the guide gives."""
    found = lay_out(hub, tmp_path_factory.mktemp("launches") / "work")
    for name in ("sft_train.py", "dpo_train.py", "ppo_train.py", "grpo_train.py"):
        (found / name).write_text(guide.text(f"# {name}"), encoding="utf-8")
    (block,) = (block for block in guide.blocks if "accelerate config\n" in block.text)
    answers = dict(re.findall(r"^# - (\w+): (\w+)$", block.text, re.M))
    assert answers == {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",
        "num_processes": "4",
        "mixed_precision": "bf16",
    }
    answers |= {"num_processes": "2", "num_machines": "1", "use_cpu": "true"}
    file = found / "home" / "accelerate" / "default_config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("".join(f"{name}: {value}\n" for name, value in answers.items()))
    return found


@pytest.fixture(scope="module")
def sft_output(folder: Path, guide: Guide) -> str:
    return shell(folder, guide.text("accelerate launch sft_train.py"))


def check_two_processes(output: Path, steps: int) -> list[dict[str, float]]:
    """The log of a run that two processes wrote together."""
    assert newest_step(output) == steps
    last = output / f"checkpoint-{steps}"
    assert checkpoint.manifest(last)["world_size"] == 2
    return log_of(last)


def test_sft_train_in_two_processes(folder: Path, sft_output: str) -> None:
    assert "(2 a batch × 4 accumulated × 2 processes)" in sft_output
    assert len(check_two_processes(folder / "sft_output", 6)) == 6  # 24 rows, 16 a step, 3 times
    assert changes(folder / "sft_output" / "checkpoint-3", folder / "sft_final") > 0


def test_dpo_train_in_two_processes(folder: Path, guide: Guide, sft_output: str) -> None:
    shell(folder, guide.text("accelerate launch dpo_train.py"))
    check_two_processes(folder / "dpo_output", 2)
    assert changes(folder / "sft_final", folder / "dpo_final") > 0


def test_sft_train_with_options_of_the_launcher(folder: Path, guide: Guide, sft_output: str) -> None:
    """The same run as before, with the launcher's options typed."""
    before = log_of(folder / "sft_output" / "checkpoint-6")
    out = shell(folder, guide.text("CUDA_VISIBLE_DEVICES=0,1,2,3 accelerate launch"))
    assert "× 2 processes)" in out
    again = check_two_processes(folder / "sft_output", 6)
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in before], rel=1e-3)


def test_ppo_train_in_two_processes(folder: Path, sft_output: str) -> None:
    """The guide launches two scripts; the other two can be launched as they are."""
    out = shell(folder, "accelerate launch ppo_train.py")
    assert len(re.findall(r"^step=\d+ ", out, re.M)) == 3  # a batch of four on each process, three times


def test_grpo_train_in_two_processes(folder: Path) -> None:
    shell(folder, "accelerate launch grpo_train.py")
    lines = check_two_processes(folder / "grpo_output", newest_step(folder / "grpo_output"))
    assert all("reward" in line for line in lines)
