"""Online DPO on instructions that can be checked: the task, the reward and the curve of `grpo_instructions.py`.

Two completions of each prompt are sampled; the one that follows more of the instruction is the chosen one.

    python examples/online_dpo.py

writes the prompts, prints the `trl online-dpo` command and runs it, and says whether the mean reward on the held-out
prompts rose by more than the intervals leave to chance: the exit status is 1 if it did not.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import grpo_instructions
from grpo_instructions import Size

FULL = Size(steps=24, batch=64, held_out=32, evaluations=4)
QUICK = Size(steps=2, batch=8, held_out=4, evaluations=1)


def command(model: str, folder: Path, size: Size, seed: int) -> list[str]:
    """What is typed to train, with an evaluation before the first step and after the last. Batches count prompts."""
    return [
        *("trl", "online-dpo"),
        *("--model_name_or_path", model),
        *("--dataset_name", str(folder / "data")),
        *("--reward_funcs", f"{os.path.relpath(grpo_instructions.__file__)}:follows"),
        *("--use_peft", "--lora_target_modules", "all-linear", "--learning_rate", "5e-4"),
        *("--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "2", "--beta", "0.1"),
        *("--per_device_train_batch_size", str(size.batch // 2), "--temperature", "1.0"),
        *("--max_completion_length", "40", "--max_steps", str(size.steps), "--gradient_checkpointing", "false"),
        *("--eval_on_start", "--eval_strategy", "steps", "--eval_steps", str(size.steps // size.evaluations)),
        *("--per_device_eval_batch_size", "16", "--logging_steps", "1", "--seed", str(seed)),
        *("--output_dir", str(folder / "model")),
    ]


def main(argv: list[str] | None = None) -> int:
    return grpo_instructions.main(argv, command=command, name="Online DPO", full=FULL, quick=QUICK, generations=2)


if __name__ == "__main__":
    sys.exit(main())
