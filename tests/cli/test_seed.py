"""The same command twice leaves the same adapter, bit for bit, whatever random numbers were drawn before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.helpers import chat_rows, labelled_rows, pair_rows, step_rows
from trl.cli.main import main
from trl.methods import METHODS

SHORT = ("--max_completion_length", 4)
JUDGED = (*SHORT, "--reward_funcs", "get_length_reward(target=3)")
TAUGHT = ("--teacher_model_name_or_path", "TINY")


def prompt_rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"]} for row in pair_rows(count)]


COMMANDS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "sft": (chat_rows, ()),
    "dpo": (pair_rows, ()),
    "kto": (labelled_rows, ()),
    "orpo": (pair_rows, ()),
    "cpo": (pair_rows, ()),
    "bco": (labelled_rows, ()),
    "reward": (pair_rows, ()),
    "prm": (step_rows, ()),
    "grpo": (prompt_rows, (*JUDGED, "--num_generations", 2)),
    "rloo": (prompt_rows, (*JUDGED, "--num_generations", 2)),
    "ppo": (prompt_rows, JUDGED),
    "online-dpo": (prompt_rows, JUDGED),
    "xpo": (prompt_rows, JUDGED),
    "nash-md": (prompt_rows, JUDGED),
    "gkd": (chat_rows, (*TAUGHT, "--max_new_tokens", 4, "--lmbda", 1)),
    "distillation": (prompt_rows, (*TAUGHT, *SHORT)),
    "minillm": (prompt_rows, (*TAUGHT, *SHORT, "--num_generations", 2)),
}
SLOW = ("nash-md", "gkd", "distillation", "minillm")


def test_every_command_is_here() -> None:
    assert set(COMMANDS) == {name for name, method in METHODS.items() if method.command}


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in COMMANDS]
)
def test_equal_seeds_give_equal_adapters(tiny_path: str, tmp_path: Path, command: str) -> None:
    make, options = COMMANDS[command]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make(4)))
    options = tuple(tiny_path if option == "TINY" else option for option in options)

    def trained(name: str, seed: int, drawn: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(drawn)
        arguments = (
            *(command, "--model_name_or_path", tiny_path, "--dataset_name", tmp_path / "rows.jsonl"),
            *("--output_dir", tmp_path / name, "--seed", seed, "--use_peft", "--lora_r", 2, "--lora_dropout", 0.2),
            *("--max_steps", 1, "--per_device_train_batch_size", 2, "--learning_rate", "1e-2", "--use_cpu"),
            *("--save_strategy", "no", "--report_to", "none", *options),
        )
        assert main([str(each) for each in arguments]) == 0
        files = sorted((tmp_path / name).glob("*.safetensors"))  # a value head has one of its own
        assert (tmp_path / name / "adapter_model.safetensors") in files
        return {f"{file.name}: {key}": weight for file in files for key, weight in load_file(file).items()}

    first, again = trained("first", 7, drawn=1), trained("again", 7, drawn=2)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    if command == "sft":
        other = trained("other", 8, drawn=1)
        assert not any(torch.equal(first[key], other[key]) for key in first if "lora_A" in key)
