"""What each process does in `test_distillation.py`: distillation_worker.py OUT MODEL."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from tests.distributed.rounds_worker import lines
from tests.trainer import test_distillation, test_online
from tests.trainer.helpers import chat_rows, first_gradient

CASES = {
    "student": ("GKD", {"lmbda": 1.0}),
    "teacher": ("GKD", {"lmbda": 0.0, "seq_kd": True}),
    "data": ("GKD", {"lmbda": 0.0}),
    "distillation": ("Distillation", {}),
    "minillm": ("MiniLLM", {}),
}


def make(path, tokenizer, name, ranks, **settings):
    """Five rows, so that a rank's last batch is empty; their completions by the sampler of the process."""
    method, more = CASES[name]
    rows = chat_rows(5) if method == "GKD" else test_online.PROMPTS[:3]
    size = {"per_device_train_batch_size": 8 // ranks, "gradient_accumulation_steps": 1}
    if method == "GKD" and ranks > 1:
        size = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    return test_distillation.make(
        path, tokenizer, method, rows=rows, eval_rows=rows, canned=False, **{**more, **size, **settings}
    )


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
    ranks = int(os.environ["WORLD_SIZE"])
    for name in CASES:
        run = make(out / "run", tokenizer, name, ranks)
        assert run.args.world_size == ranks
        gradient = first_gradient(run)
        found = run.evaluate()["eval_loss"]
        if dist.get_rank() == 0:
            torch.save(gradient, out / f"{name}.pt")
            (out / f"{name}.json").write_text(json.dumps([lines(run)[0], found]))
    # A run of some rounds, and the same from a checkpoint within.
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    for name in ("student", "minillm"):
        further = {"steps_per_generation": 4, "per_device_train_batch_size": 2} if name == "minillm" else {}
        whole = make(out / f"whole-{name}", tokenizer, name, ranks, **settings, **further)
        whole.train()
        again = make(out / f"again-{name}", tokenizer, name, ranks, **settings, **further)
        again.train(resume_from_checkpoint=str(out / f"whole-{name}" / "checkpoint-2"))
        if dist.get_rank() == 0:
            (out / f"resumed-{name}.json").write_text(json.dumps([lines(whole), lines(again)]))
    dist.destroy_process_group()
