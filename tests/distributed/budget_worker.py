"""What each process does in `test_budget.py`: budget_worker.py OUT MODEL."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from tests.distributed.worker import adapted
from tests.trainer import test_online
from tests.trainer.helpers import chat_rows, first_gradient, labelled_rows, pair_rows, preference, sft, tiny
from tests.trainer.test_budget import Limited

# And the tokens that the second rank can hold.
CASES = {"sft": 120, "lora": 120, "dpo-aot": 250, "kto": 120, "grpo": 18}


def make(name, path, tokenizer, ranks, **settings):
    """Eight rows a step, or three prompts."""
    settings = {"per_device_train_batch_size": 8 // ranks, "max_steps": 1, **settings}
    if name == "grpo":
        settings = {"gradient_accumulation_steps": 1, "num_generations": 4, "beta": 0.1, **settings}
        return test_online.make(path, tokenizer, rows=test_online.PROMPTS[:2], **settings)
    if name in ("sft", "lora"):
        model = tiny(tokenizer)
        return sft(path, adapted(model) if name == "lora" else model, tokenizer, chat_rows(8), **settings)
    method, rows = ("DPO", pair_rows) if name == "dpo-aot" else ("KTO", labelled_rows)
    if method == "DPO":
        settings["loss_type"] = "aot"
    return preference(method, path, tiny(tokenizer), tokenizer, rows(8), ref_model=tiny(tokenizer, seed=1), **settings)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
    ranks = int(os.environ["WORLD_SIZE"])
    for name, tokens in CASES.items():
        for late in (False, True):
            run = make(name, out / "run", tokenizer, ranks, max_tokens_per_micro_batch=10**5)
            assert run.args.world_size == ranks
            limited = Limited(run, tokens if dist.get_rank() == 1 else 10**6, late)
            gradient = first_gradient(run)
            found = [limited.failures, run.budget.tokens, max(limited.seen), run.state.log_history[0]]
            (out / f"{name}-{late}-{dist.get_rank()}.json").write_text(json.dumps(found))
            torch.save(gradient, out / f"{name}-{late}-{dist.get_rank()}.pt")
    # Without a budget the ranks would wait for one another.
    run = make("sft", out / "run", tokenizer, ranks)
    Limited(run, 60)
    try:
        run.train()
    except torch.OutOfMemoryError as error:
        (out / f"refused {dist.get_rank()}.txt").write_text(str(error))
    dist.destroy_process_group()
