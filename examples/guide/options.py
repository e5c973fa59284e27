"""The flags that all scripts of this folder have, and what stands for a name that is not given."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

# Half precision where it is fast.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


def parse(description: str, *, model: str | None = None, steps: int = 20) -> argparse.Namespace:
    """Reads the flags. Without `model`, the demo's small model stands for the model that is not named."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model_name_or_path", default=model, help=f"a name or a folder [{model or 'the demo model'}]")
    parser.add_argument("--dataset_name", help="a name, a file or a folder [rows made by the script, or prepared]")
    parser.add_argument("--max_steps", type=int, default=steps, help="optimizer steps [%(default)s]")
    parser.add_argument("--load_in_4bit", action="store_true", help="4-bit weights without a GPU too (sft_train.py)")
    parser.add_argument("--reward_model", help="a text classifier with the label POSITIVE (ppo_train.py)")
    # A launcher and `--resume_from_checkpoint` add words of their own, which the library reads.
    options, _ = parser.parse_known_args()
    if options.model_name_or_path is None:
        from trl.demo.model import demo_model

        options.model_name_or_path = str(demo_model())
    return options


def need(path: str, script: str) -> str:
    """`path`, which an earlier script leaves behind."""
    if not Path(path).exists():
        sys.exit(f"{path} is not there: run {script} first, in this folder.")
    return path
