"""Iterative SFT on the best of several answers: the task, the reward and the curve of `grpo_instructions.py`.

In each round the model answers each prompt several times, the answer that follows most of its instruction is kept, and
the model is trained on what was kept. Dong et al. 2023, arXiv:2304.06767, call it RAFT.

    python examples/iterative_sft.py

says whether the mean reward on held-out prompts rose by more than the intervals leave to chance: the exit status is 1
if it did not. `curve.csv` and `curve.svg` stay in the output folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from grpo_instructions import NEW_WORDS, WORDS, Point, Size, follows, rows, svg, write_csv
from ppo_sentiment import mean_and_half, model_path

FULL = Size(steps=10, batch=64, held_out=48, evaluations=5)
QUICK = Size(steps=2, batch=8, held_out=4, evaluations=1)
ANSWERS = 4  # to each prompt
LENGTH = 40  # tokens of an answer, at most


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="SFT on the best of several answers; exits 1 if nothing is learned.")
    parser.add_argument("--model_name_or_path", help="a folder or a name [SmolLM2-135M-Instruct, as `trl demo` has it]")
    parser.add_argument("--output_dir", default="iterative-sft-instructions")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="two small rounds: whether it works, not whether it learns"
    )
    options = parser.parse_args(argv)
    size = QUICK if options.quick else FULL

    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from trl import IterativeSFTConfig, IterativeSFTTrainer

    name = model_path(options.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    args = IterativeSFTConfig(
        output_dir=options.output_dir,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=size.batch // ANSWERS,
        gradient_checkpointing=False,
        report_to="none",
        seed=options.seed,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    set_seed(options.seed)
    trainer = IterativeSFTTrainer(model, args, processing_class=tokenizer, peft_config=lora)

    @torch.no_grad()
    def answered(asked: list[dict[str, Any]], count: int) -> tuple[list[list[int]], list[list[int]], list[float]]:
        """Prompts and answers as token ids, `count` for each row in turn, and the reward of each answer."""
        texts = [
            tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in asked
        ]
        given = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        trainer.model.eval()
        drawn = trainer.model.generate(
            **given,
            do_sample=True,
            max_new_tokens=LENGTH,
            num_return_sequences=count,
            pad_token_id=tokenizer.pad_token_id,
        )[:, given["input_ids"].shape[1] :].tolist()
        answers = [
            ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else ids for ids in drawn
        ]
        prompts = [ids for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for _ in range(count)]
        words = [row["words"] for row in asked for _ in range(count)]
        return prompts, answers, follows(tokenizer.batch_decode(answers, skip_special_tokens=True), words)

    of_a_round = size.batch // ANSWERS
    train, held_out = rows(size.steps * of_a_round, WORDS, options.seed), rows(size.held_out, NEW_WORDS, options.seed)
    began = time.perf_counter()
    sampled, seen = [], [Point(0, *mean_and_half(answered(held_out, 1)[2]))]
    print(f"before: {seen[0]}", flush=True)
    for step in range(1, size.steps + 1):
        prompts, answers, rewards = answered(train[(step - 1) * of_a_round : step * of_a_round], ANSWERS)
        best = [max(range(at, at + ANSWERS), key=lambda each: rewards[each]) for at in range(0, len(rewards), ANSWERS)]
        found = trainer.step(
            input_ids=[prompts[each] + answers[each] for each in best],
            labels=[[-100] * len(prompts[each]) + answers[each] for each in best],
        )
        sampled.append(Point(step, sum(rewards) / len(rewards)))
        kept = sum(rewards[each] for each in best) / len(best)
        print(
            f"round {step}: reward {sampled[-1].reward:.3f}, of the kept {kept:.3f}, loss {found['loss']:.3f}",
            flush=True,
        )
        if step % (size.steps // size.evaluations) == 0:
            seen.append(Point(step, *mean_and_half(answered(held_out, 1)[2])))
            print(f"after {step} rounds: {seen[-1]}", flush=True)
    folder = Path(options.output_dir)
    trainer.save_model(str(folder / "model"))
    write_csv(folder / "curve.csv", sampled, seen)
    title = "Iterative SFT: one sentence, 5 to 12 words, two given words"
    (folder / "curve.svg").write_text(svg(sampled, seen, title, across="round"), encoding="utf-8")
    before, after = seen[0], seen[-1]
    rose = after.reward - after.half > before.reward + before.half
    print(f"\nMean reward on {size.held_out} held-out prompts, with its 95 % interval:\n")
    print(f"    before  {before}\n    after   {after}\n")
    print(f"The intervals {'do not overlap: it learned.' if rose else 'overlap: that it learned is not shown.'}")
    print(f"Took {time.perf_counter() - began:.0f} seconds.")
    return 0 if rose or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
