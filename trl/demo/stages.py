"""The three stages of the demo: supervised fine-tuning, preferences, rewards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl.demo.orders import changed_rows, order_rows, pair_rows, right_parts


@dataclass(frozen=True)
class Size:
    """The length of the demo, and its criteria of success."""

    minutes: str
    steps: int
    held_out: int
    reloaded: int
    # Success: at least this share of the held-out tickets is exactly right,
    exact_match: float
    # and the held-out loss is at most this share of the loss before training.
    loss_ratio: float
    preference_steps: int
    pairs: int  # held out
    # Success: the policy's own reward ranks at least this share of the held-out pairs correctly.
    accuracy: float
    reward_steps: int
    completions: int  # a step
    changed: int  # held-out orders that are changed
    # Success: the mean reward on held-out orders rises by at least this.
    reward_gain: float


FULL = Size("eight minutes", steps=32, held_out=48, reloaded=16, exact_match=0.7, loss_ratio=0.25,
            preference_steps=16, pairs=32, accuracy=0.8,
            reward_steps=12, completions=32, changed=24, reward_gain=0.05)  # fmt: skip

QUICK = Size("a minute and a half", steps=4, held_out=4, reloaded=2, exact_match=0.0, loss_ratio=0.5,
             preference_steps=1, pairs=4, accuracy=0.5,
             reward_steps=1, completions=8, changed=2, reward_gain=-1.0)  # fmt: skip

BATCH = 8
LEARNING_RATE = 2e-3
PREFERENCE_LEARNING_RATE = 2e-4
REWARD_LEARNING_RATE = 5e-4
GENERATIONS = 8  # completions of a prompt
NEW_TOKENS = 40  # of a ticket at most


def sft(size: Size, folder: Path, seed: int) -> bool:
    """Supervised fine-tuning: evaluate, train, evaluate, save, merge, reload. Returns whether the model learned."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from trl import SFTConfig, SFTTrainer
    from trl.demo.model import demo_model
    from trl.models.adapters import require_peft

    peft = require_peft("the demo trains a LoRA adapter")

    train_rows, held_out = order_rows(size.steps * BATCH, size.held_out, seed)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.jsonl", train_rows)
    write(folder / "held_out.jsonl", held_out)
    truth = [row["messages"][-1]["content"] for row in held_out]

    say("The model")
    base = demo_model(lambda: print("Unpacking the model, once: about half a minute ..."))
    print(f"{base}")
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = SFTTrainer(
        model=str(base),
        args=SFTConfig(
            output_dir=str(folder / "adapter"),
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            warmup_steps=size.steps // 20,
            assistant_only_loss=True,
            **of_every_stage(size.steps, seed),
        ),
        train_dataset=train_rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )

    say(f"Before: {len(held_out)} orders of customers that training never mentions")
    before, loss_before = answers(trainer.model, tokenizer, held_out), held_out_loss(trainer)
    print(f"held-out loss {loss_before:.3f}, tickets exactly right {exact(before, truth):.0%}")

    say("Training")
    trainer.train()

    say("After")
    after, loss_after = answers(trainer.model, tokenizer, held_out), held_out_loss(trainer)
    print(f"{'':<24}{'before':>10}{'after':>10}")
    print(f"{'held-out loss':<24}{loss_before:>10.3f}{loss_after:>10.3f}")
    print(f"{'tickets exactly right':<24}{exact(before, truth):>10.0%}{exact(after, truth):>10.0%}")
    for row, old, new, right in list(zip(held_out, before, after, truth, strict=True))[:3]:
        print(f"\n  order   {row['messages'][1]['content']}")
        print(f"  before  {on_one_line(old)}")
        print(f"  after   {on_one_line(new)}   ({'right' if new == right else 'wrong'})")

    say("Saved, merged, reloaded")
    trainer.save_model()
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype="float32").merge_and_unload()
    model.save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    del model
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").to(trainer.model.device)
    gap = logit_gap(trainer.model, merged, tokenizer, held_out[: size.reloaded])
    same = answers(merged, tokenizer, held_out[: size.reloaded]) == after[: size.reloaded]
    print(f"{folder / 'adapter'}   the adapter, to load with peft on the model it was trained on")
    print(f"{folder / 'merged'}    model and adapter in one, reloaded with plain transformers:")
    verdict = "the same" if same else "DIFFERENT"
    print(f"  {verdict} answers to {size.reloaded} orders; logits differ by {gap:.1e} at most")

    faults = []
    if exact(after, truth) < size.exact_match:
        faults.append(
            f"{exact(after, truth):.0%} of the tickets are right, at least {size.exact_match:.0%} were expected"
        )
    if loss_after > size.loss_ratio * loss_before:
        faults.append(f"the held-out loss should have fallen to {size.loss_ratio * loss_before:.3f} or less")
    if not same or gap > 1e-2:
        faults.append("the reloaded model differs from the trained model")
    if faults:
        print(f"\nThe demo FAILED: {'; '.join(faults)}.")
        return False
    print("\nIt learned. The same by hand:\n")
    print(
        f"    trl sft --model_name_or_path {base} \\\n"
        f"        --dataset_name {folder / 'train.jsonl'} --assistant_only_loss \\\n"
        f"        --use_peft --lora_target_modules all-linear --learning_rate {LEARNING_RATE} \\\n"
        f"        --gradient_checkpointing false --num_train_epochs 1 --output_dir {folder / 'again'}"
    )
    return True


def dpo(size: Size, folder: Path, seed: int) -> bool:
    """Preferences: train the adapter further on pairs. Returns whether held-out pairs are ranked correctly."""
    from transformers import set_seed

    from trl import DPOConfig, DPOTrainer

    train_rows, held_out = pair_rows(size.preference_steps * BATCH, size.pairs, seed)
    write(folder / "pairs.jsonl", train_rows)
    write(folder / "held_out_pairs.jsonl", held_out)
    set_seed(seed)
    say("Preferences: a right ticket and one with a mistake")
    trainer = DPOTrainer(
        model=str(folder / "adapter"),
        args=DPOConfig(
            output_dir=str(folder / "preferred"),
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=PREFERENCE_LEARNING_RATE,
            # Without `sft`, right tickets would become less likely too, only less so than wrong ones.
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, 1.0],
            **of_every_stage(size.preference_steps, seed),
        ),
        train_dataset=train_rows,
        eval_dataset=held_out,
    )
    before, after = trained(trainer)
    gaps = [found["eval_logps/chosen"] - found["eval_logps/rejected"] for found in (before, after)]
    accuracy = after["eval_rewards/accuracies"]
    print(f"\n{'':<40}{'before':>10}{'after':>10}")
    print(f"{'log-prob, right less wrong ticket':<40}{gaps[0]:>10.2f}{gaps[1]:>10.2f}")
    print(f"{'held-out pairs told apart by the reward':<40}{before['eval_rewards/accuracies']:>10.0%}{accuracy:>10.0%}")
    if accuracy < size.accuracy or gaps[1] <= gaps[0]:
        print(f"\nThe demo FAILED: {size.accuracy:.0%} of the pairs were expected to be told apart, by a wider margin.")
        return False
    print("\nIt learned. The same by hand:\n")
    print(
        f"    trl dpo --model_name_or_path {folder / 'adapter'} \\\n"
        f"        --dataset_name {folder / 'pairs.jsonl'} --learning_rate {PREFERENCE_LEARNING_RATE} \\\n"
        f"        --loss_type sigmoid sft --loss_weights 1 1 \\\n"
        f"        --gradient_checkpointing false --num_train_epochs 1 --output_dir {folder / 'preferred_again'}"
    )
    return True


def grpo(size: Size, folder: Path, seed: int) -> bool:
    """Rewards: train the adapter further on its own tickets. Returns whether the reward has risen."""
    from transformers import set_seed

    from trl import GRPOConfig, GRPOTrainer

    train_rows, held_out = changed_rows(size.reward_steps * size.completions // GENERATIONS, size.changed, seed)
    write(folder / "changed.jsonl", train_rows)
    write(folder / "held_out_changed.jsonl", held_out)
    set_seed(seed)
    say("Rewards: orders that are changed, and how right the model's own tickets are")
    trainer = GRPOTrainer(
        model=str(folder / "preferred"),
        reward_funcs=right_parts,
        args=GRPOConfig(
            output_dir=str(folder / "rewarded"),
            num_generations=GENERATIONS,
            num_generations_eval=2,
            max_completion_length=NEW_TOKENS,
            per_device_train_batch_size=size.completions,
            per_device_eval_batch_size=size.changed,
            learning_rate=REWARD_LEARNING_RATE,
            **of_every_stage(size.reward_steps, seed),
        ),
        train_dataset=train_rows,
        eval_dataset=held_out,
    )
    before, after = trained(trainer)
    (old, old_half), (new, new_half) = [(found["eval_reward"], found["eval_reward_ci95"]) for found in (before, after)]
    rewards = [f"{old:.3f} ± {old_half:.3f}", f"{new:.3f} ± {new_half:.3f}"]
    print(f"\n{'':<40}{'before':>16}{'after':>16}")
    print(f"{'mean reward: share of parts right':<40}{rewards[0]:>16}{rewards[1]:>16}")
    print(f"{'tickets exactly right':<40}{before['eval_pass@1']:>16.0%}{after['eval_pass@1']:>16.0%}")
    print(f"On {len(held_out)} held-out orders, two tickets drawn for each; ±: the 95 % interval.")
    if new - old < size.reward_gain:
        print(f"\nThe demo FAILED: the mean reward should have risen by {size.reward_gain} or more.")
        return False
    if new + new_half < old - old_half:
        print("\nThe demo FAILED: the mean reward has fallen.")
        return False
    print(f"\nIt learned. Everything is in {folder}. The same by hand:\n")
    print(
        f"    trl grpo --model_name_or_path {folder / 'preferred'} \\\n"
        f"        --dataset_name {folder / 'changed.jsonl'} --reward_funcs {__name__}.{right_parts.__name__} \\\n"
        f"        --num_generations {GENERATIONS} --per_device_train_batch_size {size.completions} \\\n"
        f"        --max_completion_length {NEW_TOKENS} --learning_rate {REWARD_LEARNING_RATE} \\\n"
        f"        --gradient_checkpointing false --num_train_epochs 1 --output_dir {folder / 'rewarded_again'}"
    )
    return True


def trained(trainer: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Train and save; the metrics on the held-out rows before and after."""
    before = trainer.evaluate()
    trainer.progress.tells_commands = False  # the stage does
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    return before, after


def of_every_stage(steps: int, seed: int) -> dict[str, Any]:
    """Options that the stages share."""
    return {
        "max_steps": steps,
        "gradient_checkpointing": False,
        # On a CPU, bfloat16 is faster if the processor supports it, and far slower if not.
        "bf16": False,
        "model_init_kwargs": {"dtype": "float32"},
        "logging_steps": max(1, steps // 8),
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
    }


def write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8")


def answers(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], new_tokens: int = NEW_TOKENS) -> list[str]:
    """The model's greedy completion of each row's prompt."""
    import torch

    was_training = model.training
    model.eval()
    texts: list[str] = []
    for start in range(0, len(rows), 24):
        inputs = prompts(tokenizer, rows[start : start + 24]).to(model.device)
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, use_cache=True)
        texts += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return texts


def prompts(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> Any:
    return tokenizer.apply_chat_template(
        [row["messages"][:-1] for row in rows],
        add_generation_prompt=True,
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
        return_dict=True,
        return_tensors="pt",
    )


def logit_gap(model: Any, other: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> float:
    """The largest difference between two models' logits of the first answer token."""
    import torch

    model.eval()
    other.eval()
    inputs = prompts(tokenizer, rows).to(model.device)
    with torch.no_grad():
        return float((model(**inputs).logits[:, -1] - other(**inputs).logits[:, -1]).abs().max())


def held_out_loss(trainer: Any) -> float:
    return float(trainer.evaluate()["eval_loss"])


def exact(texts: Sequence[str], truth: Sequence[str]) -> float:
    return sum(text == right for text, right in zip(texts, truth, strict=True)) / len(truth)


def on_one_line(text: str, width: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 4]} ..."


def say(heading: str) -> None:
    print(f"\n== {heading} ==", flush=True)


def quiet() -> None:
    """Disable all progress bars but that of training."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()
