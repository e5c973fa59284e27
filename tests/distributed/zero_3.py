"""What each of two processes does in `test_zero_3.py`, with DeepSpeed's ZeRO-3: zero_3.py CASES OUT TOKENIZER."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from tests.distributed.worker import deepspeed_settings, start_deepspeed
from tests.trainer import test_online
from tests.trainer.helpers import chat_rows, pair_rows, preference, sft, tiny, tiny_scorer
from trl.engine import head
from trl.models import shards
from trl.rollout.generate import InProcessSampler


def save_models(out, tokenizer):
    tied = tiny(tokenizer, tie_word_embeddings=True)
    models = {"base": tiny(tokenizer), "tied": tied, "scorer": tiny_scorer(tokenizer)}
    for name, model in models.items():
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)


def settings(name):
    """Small weights are cut up too, and few are fetched ahead."""
    found = deepspeed_settings(3, half=name == "bf16")
    found["deepspeed"]["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 100,
        "stage3_prefetch_bucket_size": 5000,
    }
    return found


def lora(*targets, **further):
    import peft

    return peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **further)


def make(name, out, path, tokenizer, batch, **further):
    """Five rows a step: of two processes one has an empty micro-batch."""
    further = {
        **{"per_device_train_batch_size": batch, "gradient_accumulation_steps": 2},
        **{"max_steps": 3, "learning_rate": 1e-3},
        **further,
    }
    base = str(out / "base")
    if name == "whole":  # an instance, not cut up as it was loaded
        return sft(path, tiny(tokenizer), tokenizer, chat_rows(5), **further)
    if name == "bf16":
        return sft(path, base, tokenizer, chat_rows(5), **{**further, "bf16": True})
    if name in ("sft", "tied"):
        model = str(out / ("tied" if name == "tied" else "base"))
        return sft(path, model, tokenizer, chat_rows(5), gradient_checkpointing=name == "tied", **further)
    if name == "lora":
        return sft(path, base, tokenizer, chat_rows(5), lora("q_proj", "lm_head"), **further)
    if name == "lora-head":
        return sft(path, base, tokenizer, chat_rows(5), lora("lm_head"), **further)
    if name == "lora-saved":
        saved = lora("q_proj", modules_to_save=["lm_head"])
        return sft(path, base, tokenizer, chat_rows(5), saved, **further)
    if name == "dpo":
        return preference("DPO", path, base, tokenizer, pair_rows(5), eval_rows=pair_rows(3), **SYNCED, **further)
    if name == "dpo-twin":
        return preference("DPO", path, base, tokenizer, pair_rows(5), peft_config=lora("q_proj", "v_proj"), **further)
    if name == "dpo-before":
        return preference("DPO", path, base, tokenizer, pair_rows(5), precompute_ref_log_probs=True, **further)
    if name == "reward":
        return preference("Reward", path, str(out / "scorer"), tokenizer, pair_rows(5), **further)
    run = test_online.make(
        path, tokenizer, model=base, rows=test_online.PROMPTS[:2], beta=0.1, max_tokens_per_micro_batch=20,
        max_completion_length=12, scale_rewards="none", **further,
    )  # fmt: skip
    run.sampler = InProcessSampler(tokenizer, max_rows=3)
    return run


SYNCED = {
    **{"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    **{"eval_strategy": "steps", "eval_steps": 1, "generate_during_eval": True, "max_completion_length": 8},
}
PARTS = ("lora", "lora-head")  # heads that are more than one layer
RESUMED = ("sft", "dpo", "grpo")
METRICS = ("loss", "eval_loss", "grad_norm", "entropy", "num_tokens", "reward", "rewards/margins")


def lines(run):
    found = [{key: line[key] for key in METRICS if key in line} for line in run.state.log_history]
    return [line for line in found if line]


def main(cases, out, tokenizer):
    start_deepspeed()
    head.CHUNK_ELEMENTS["cpu"] = 7 * len(tokenizer)  # tokens of a chunk: the ranks have different numbers of chunks
    found = {}
    for name in cases:
        saves = {"save_strategy": "steps", "save_steps": 2} if name in RESUMED else {}
        run = make(name, out, out / name, tokenizer, 2, **settings(name), **saves)
        run.train()
        assert shards.is_partitioned(run.model) and type(run.model_wrapped).__name__ == "DeepSpeedEngine"
        run.save_model(str(out / f"{name}-saved"))
        found[name] = {"lines": lines(run), "flat": run.attachment.is_flat, "head": run.attachment.head_reason}
        if saves:
            again = make(name, out, out / name, tokenizer, 2, **settings(name), **saves)
            again.train(resume_from_checkpoint=str(out / name / "checkpoint-2"))
            found[name]["resumed"] = lines(again)
    if dist.get_rank() == 0:
        (out / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1].split(","), Path(sys.argv[2]), AutoTokenizer.from_pretrained(sys.argv[3]))
