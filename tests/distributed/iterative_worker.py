"""What each process does in `test_iterative_sft.py`: iterative_worker.py OUT MODEL."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from tests.trainer.helpers import DEFAULTS, tiny
from trl import IterativeSFTConfig, IterativeSFTTrainer

TEXTS = ["One two three four.", "A longer text about a river, and a boat on it.", "Yes, no.", "Seven eight", "Red blue",
         "A house stood on the hill.", "No."]  # fmt: skip
SHARES = {"uneven": (5, 2), "none": (7, 0)}  # texts of each rank
CASES = {"full": {}, "lora": {}, "bf16": {"bf16": True}, "bf16 weights": {}}


def make(path, tokenizer, case, **settings):
    import peft

    config = IterativeSFTConfig(**{**DEFAULTS, "output_dir": str(path), **CASES[case], **settings})
    model = tiny(tokenizer)
    if case == "bf16 weights":
        model = model.to(torch.bfloat16)
    if case == "lora":
        torch.manual_seed(5)
        lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    return IterativeSFTTrainer(model, config, processing_class=tokenizer)


def two_steps(trainer, texts):
    """The results of two calls, and the weights that train after them."""
    found = [trainer.step(texts=texts) for _ in range(2)]
    return found, {name: each.detach() for name, each in trainer.model.named_parameters() if each.requires_grad}


def main(out, tokenizer):
    rank = dist.get_rank()
    for name, (first, _) in SHARES.items():
        mine = TEXTS[:first] if rank == 0 else TEXTS[first:]
        for case in CASES:
            trainer = make(out / "run", tokenizer, case, per_device_train_batch_size=2, gradient_accumulation_steps=4)
            assert trainer.args.world_size == 2
            found, weights = two_steps(trainer, mine)
            if rank == 0:
                torch.save(weights, out / f"{name} {case}.pt")
            (out / f"{name} {case} {rank}.json").write_text(json.dumps([found, trainer.state.log_history]))
    # A mistake of one rank's stops both, and the next call goes on.
    trainer = make(out / "run", tokenizer, "full", per_device_train_batch_size=2)
    try:
        trainer.step(texts=TEXTS[:3] if rank == 0 else ["one", 2])
    except ValueError as error:
        (out / f"refused {rank}.txt").write_text(str(error))
    steps = trainer.step(texts=TEXTS[:5] if rank == 0 else TEXTS[5:])["steps"]
    assert steps == trainer.state.global_step == 3, steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2]))
    dist.destroy_process_group()
