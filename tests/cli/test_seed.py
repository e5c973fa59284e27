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

JUDGED = ("--num_generations", 2, "--max_completion_length", 4, "--reward_funcs", "get_length_reward(target=3)")
COMMANDS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "sft": (chat_rows, ()),
    "dpo": (pair_rows, ()),
    "kto": (labelled_rows, ()),
    "orpo": (pair_rows, ()),
    "cpo": (pair_rows, ()),
    "bco": (labelled_rows, ()),
    "reward": (pair_rows, ()),
    "prm": (step_rows, ()),
    "grpo": (pair_rows, JUDGED),
    "rloo": (pair_rows, JUDGED),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_equal_seeds_give_equal_adapters(tiny_path: str, tmp_path: Path, command: str) -> None:
    make, options = COMMANDS[command]
    rows = [{"prompt": row["prompt"]} for row in make(4)] if options else make(4)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def trained(name: str, seed: int, drawn: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(drawn)
        arguments = (
            *(command, "--model_name_or_path", tiny_path, "--dataset_name", tmp_path / "rows.jsonl"),
            *("--output_dir", tmp_path / name, "--seed", seed, "--use_peft", "--lora_r", 2, "--lora_dropout", 0.2),
            *("--max_steps", 1, "--per_device_train_batch_size", 2, "--learning_rate", "1e-2", "--use_cpu"),
            *("--save_strategy", "no", "--report_to", "none", *options),
        )
        assert main([str(each) for each in arguments]) == 0
        return load_file(tmp_path / name / "adapter_model.safetensors")

    first, again = trained("first", 7, drawn=1), trained("again", 7, drawn=2)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    if command == "sft":
        other = trained("other", 8, drawn=1)
        assert not any(torch.equal(first[key], other[key]) for key in first if "lora_A" in key)
