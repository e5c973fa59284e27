"""Options of `accelerate launch`: what a command is started again as."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trl.cli import UsageError, launch

from .conftest import Command


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been started: the line, without the interpreter, and its environment."""
    seen: list[Any] = []

    def wait(line: list[str], environment: dict[str, str]) -> int:
        assert line[0] == sys.executable
        seen[:] = [line[1:], environment]
        return 7

    monkeypatch.setattr(launch, "_wait", wait)
    return seen


def test_options_come_from_accelerate() -> None:
    known = launch.options()
    for name in ("num_processes", "main_process_port", "mixed_precision", "num_machines", "accelerate_config"):
        assert known[name] is True
    assert known["multi_gpu"] is known["use_fsdp"] is False
    assert known.keys().isdisjoint(launch.RESERVED)


def test_accelerate_launch(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    settings = {"num_processes": "4", "main_process_port": 29511, "mixed_precision": "bf16", "multi_gpu": True}
    assert launch.relaunch("sft", ["--max_steps", "3"], settings, {}) == 7
    line, environment = started
    assert line == [
        *("-m", "accelerate.commands.launch", "--num_processes", "4", "--main_process_port", "29511"),
        *("--mixed_precision", "bf16", "--multi_gpu"),
        *("-m", "trl.cli.main", "sft", "--max_steps", "3", "--bf16=true", "--fp16=false"),
    ]
    assert environment[launch.LAUNCHED] == "1"
    # What the trainer was told is left alone.
    launch.relaunch("sft", ["--fp16"], settings, {"fp16": True})
    assert started[0][-1] == "--fp16"


def test_processes_without_an_accelerator(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    child = ["-m", "trl.cli.main", "sft"]
    launch.relaunch("sft", [], {"num_processes": 2}, {})
    assert started[0] == ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", *child]
    settings = {"num_processes": 4, "num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1"}
    launch.relaunch("sft", [], settings, {})
    assert started[0] == [
        *("-m", "torch.distributed.run", "--nproc_per_node", "2", "--nnodes", "2", "--node_rank", "1"),
        *("--master_addr", "10.0.0.1", "--master_port", "29500", *child),
    ]
    # One process, or what torch's launcher does not know, is accelerate's.
    for settings in ({"num_processes": 1}, {"num_processes": 2, "use_fsdp": True}):
        launch.relaunch("sft", [], settings, {})
        assert started[0][1] == "accelerate.commands.launch"


def test_numbers_that_cannot_be_meant() -> None:
    for value in ("two", "-1", "0"):
        with pytest.raises(UsageError, match="--num_processes"):
            launch.relaunch("sft", [], {"num_processes": value}, {})


@pytest.mark.parametrize("name", sorted(launch.PRESETS))
def test_accelerate_understands_the_presets(name: str) -> None:
    from accelerate.commands.config import load_config_from_file

    path = launch.config_file(name)
    try:
        config = load_config_from_file(path)
    finally:
        os.unlink(path)
    assert config.distributed_type == launch.PRESETS[name]["distributed_type"]
    assert config.num_processes >= 1


def test_a_preset_lives_as_long_as_the_command(started: list[Any], tmp_path: Path) -> None:
    launch.relaunch("sft", [], {"accelerate_config": "fsdp2"}, {})
    line = started[0]
    assert line[2] == "--config_file" and "fsdp2" in line[3]
    assert not Path(line[3]).exists()
    own = tmp_path / "own.yaml"
    own.write_text("{}")
    launch.relaunch("sft", [], {"accelerate_config": str(own)}, {})
    assert started[0][3] == str(own) and own.exists()
    with pytest.raises(UsageError, match="fsdp3 is neither a file nor one of .*; did you mean fsdp"):
        launch.config_file("fsdp3")


@pytest.mark.slow
def test_one_process_through_the_launcher(
    trl_command: Command, tiny_path: str, rows_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("num_processes: 1\nmixed_precision: bf16\nmax_steps: 1\n")
    answer = trl_command(
        *("sft", "--config", "run.yaml", "--model_name_or_path", tiny_path, "--dataset_name", rows_file),
        *("--output_dir", "out", "--per_device_train_batch_size", 2),
    )
    assert answer.returncode == 0, answer.stderr
    assert "bfloat16 autocast" in answer.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_together(trl_command: Command, tiny_path: str, rows_file: Path, tmp_path: Path) -> None:
    common = ("sft", "--model_name_or_path", tiny_path, "--dataset_name", rows_file, "--use_cpu")
    common += ("--max_steps", 2, "--logging_steps", 1, "--warmup_ratio", 0.5)
    both = trl_command(*common, "--output_dir", "two", "--per_device_train_batch_size", 2, "--num_processes", 2)
    assert both.returncode == 0, both.stderr
    assert "× 2 processes)" in both.stdout
    assert both.stdout.count("`warmup_ratio` is `warmup_steps` today") == 1
    assert both.stdout.count("The trained model is in two") == 1
    manifest = [json.loads(path.read_text()) for path in (tmp_path / "two" / "checkpoint-2").glob("*.json")]
    assert 2 in [content.get("world_size") for content in manifest]
    # The same rows a step in one process give the same losses.
    alone = trl_command(*common, "--output_dir", "one", "--per_device_train_batch_size", 4)
    assert alone.returncode == 0, alone.stderr
    losses = []
    for folder in ("one", "two"):
        state = json.loads((tmp_path / folder / "checkpoint-2" / "trainer_state.json").read_text())
        losses.append([line["loss"] for line in state["log_history"] if "loss" in line])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    # A process that cannot go on ends the command, with its sentence.
    failed = trl_command(*common[:3], "--dataset_name", "absent.jsonl", "--num_processes", 2)
    assert failed.returncode == 1
    assert "absent.jsonl" in failed.stderr
