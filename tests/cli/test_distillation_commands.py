"""The commands that learn from a teacher, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .conftest import Command

FEW = (
    *("--max_steps", 2, "--per_device_train_batch_size", 2, "--logging_steps", 1, "--learning_rate", "1e-2"),
    *("--report_to", "none", "--output_dir", "out", "--dataset_name"),
)


@pytest.fixture(scope="module")
def teacher(tiny_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A wider model with the same tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    config = AutoConfig.from_pretrained(tiny_path)
    config.hidden_size, config.head_dim = 96, 24
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("command", "options"), [
    ("gkd", ("--max_new_tokens", 5, "--lmbda", 0.5, "--seq_kd", "--use_peft")),
    ("distillation", ("--max_completion_length", 5, "--beta", 0.5, "--loss_top_k", 20)),
    ("minillm", ("--max_completion_length", 5, "--num_generations", 2, "--gamma", 0.9)),
])  # fmt: skip
def test_a_command_trains_on_a_teacher(
    trl_here: Command, tiny_path: str, teacher: str, rows_file: Path, tmp_path: Path, command: str, options: tuple
) -> None:
    rows = [{"prompt": [row["messages"][0]]} for row in map(json.loads, rows_file.read_text().splitlines())]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = trl_here(
        *(command, "--model_name_or_path", tiny_path, "--teacher_model_name_or_path", teacher, *options, *FEW),
        *(rows_file if command == "gkd" else "prompts.jsonl", "--teacher_model_init_kwargs", '{"dtype": "bfloat16"}'),
    )
    assert answer.returncode == 0, answer.stderr
    assert f"teacher: {teacher}, " in answer.stdout and "in bfloat16" in answer.stdout
    log = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert all(line["grad_norm"] > 0 for line in log if "loss" in line)
    assert f"The trained {'adapter' if command == 'gkd' else 'model'} is in out" in answer.stdout


def test_a_missing_teacher_is_told_before_anything_is_loaded(
    trl_here: Command, empty_path: str, rows_file: Path
) -> None:
    answer = trl_here("distillation", "--model_name_or_path", empty_path, *FEW, rows_file)
    assert answer.returncode != 0
    assert (
        "teacher_model is missing: pass a model, a name or a path, or set teacher_model_name_or_path" in answer.stderr
    )
