"""What each process does in `test_rounds.py`: rounds_worker.py OUT MODEL."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from tests.trainer import test_online

PAIRS = {"OnlineDPO": 3, "XPO": 1, "NashMD": 3}
CASES = [(method, prompts) for method in ("GRPO", "RLOO") for prompts in (1, 3)] + list(PAIRS.items())


def make(path, tokenizer, method, prompts, ranks):
    """Rounds of two steps, each taken twice: up to four prompts of two completions. One prompt leaves ranks without any
    completion to draw, and without rows to evaluate."""
    rows = test_online.PROMPTS[:prompts]
    return test_online.make(
        path, tokenizer, method, rows=rows, eval_rows=rows, per_device_train_batch_size=4 // ranks,
        gradient_accumulation_steps=1, num_generations=2, steps_per_generation=2, num_iterations=2, beta=0.05,
        max_steps=6, eval_strategy="steps", eval_steps=3, max_tokens_per_micro_batch=20, save_strategy="steps",
        save_steps=3, log_completions=True, num_completions_to_print=1, canned=method not in PAIRS,
    )  # fmt: skip


def lines(run):
    """What was logged, without clocks and sizes."""
    clocks = ("runtime", "per_second", "flos", "efficiency", "step_time")
    return [
        {name: value for name, value in line.items() if not any(clock in name for clock in clocks)}
        for line in run.state.log_history
    ]


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
    ranks = int(os.environ["WORLD_SIZE"])
    for method, prompts in CASES:
        name = f"{method}-{prompts}"
        whole = make(out / f"ranks-{name}", tokenizer, method, prompts, ranks)
        assert whole.args.world_size == ranks
        whole.train()
        resumed = make(out / f"resumed-{name}", tokenizer, method, prompts, ranks)
        resumed.train(resume_from_checkpoint=str(out / f"ranks-{name}" / "checkpoint-3"))
        if dist.get_rank() == 0:
            (out / f"{name}.json").write_text(json.dumps([lines(whole), lines(resumed)]))
    # A checkpoint within a round, by one process.
    other = make(out / "other", tokenizer, "RLOO", 3, ranks)
    other.train(resume_from_checkpoint=str(out / "alone-RLOO-3" / "checkpoint-3"))
    if dist.get_rank() == 0:
        (out / "other.json").write_text(json.dumps(lines(other)))
    dist.destroy_process_group()
