"""GRPO on instructions that can be checked: SmolLM2-135M-Instruct learns to write the sentence it was asked for.

Each prompt asks for one sentence of 5 to 12 words that contains two given words. Whether a completion follows it is
decided by a few lines of code, in the manner of IFEval (Zhou et al. 2023, arXiv:2311.07911): nobody writes an answer
for the model to copy, and no other model judges. The held-out prompts ask for words that no training prompt holds.

    python examples/grpo_instructions.py

writes the prompts, prints the `trl grpo` command and runs it, and says whether the mean reward on the held-out prompts
rose by more than the intervals leave to chance: the exit status is 1 if it did not. The reward function can be named on
a command line, as `--reward_funcs examples/grpo_instructions.py:follows`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEAST, MOST = 5, 12  # words of the sentence
WORDS = """
    apple artist basket bicycle bird boat bottle bread bridge brother button camera candle castle chair city clock
    coat coffee desert doctor door dragon farmer fire flower forest garden glass guitar hammer horse house island
    jacket kitchen ladder lake lamp letter lion market mirror moon mountain mouse ocean orange painter paper
    pencil piano pilot planet pocket queen river road sailor school shadow shoe silver singer sister snow soldier
    soup star stone storm street sugar table teacher tower train tree village wall water window winter wolf
""".split()
NEW_WORDS = """
    airport ball beach blanket butter carpet cloud cousin dentist engine feather grandmother hat honey hotel king
    library museum needle owl pepper rabbit rope scientist ship spoon sunset tiger umbrella valley violin wheel
""".split()
PHRASES = (
    "Write one sentence of {least} to {most} words that contains the words '{a}' and '{b}'.",
    "Use the words '{a}' and '{b}' in one sentence of {least} to {most} words.",
    "I need a single sentence with the words '{a}' and '{b}'. It should have {least} to {most} words.",
    "Put '{a}' and '{b}' into one sentence. Use at least {least} and at most {most} words.",
)


@dataclass(frozen=True)
class Size:
    """How long the run is."""

    steps: int
    batch: int  # completions a step
    held_out: int  # prompts
    evaluations: int  # after the one at the start


FULL = Size(steps=20, batch=64, held_out=32, evaluations=4)
QUICK = Size(steps=2, batch=16, held_out=4, evaluations=1)
GENERATIONS = 8


# --- the task ---------------------------------------------------------------------------------------------------------


def follows(completions: Sequence[Any], words: Sequence[Sequence[str]], **_: Any) -> list[float]:
    """The share of the instruction that each completion follows: each word it asks for, the length, one sentence."""
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    rewards = []
    for text, wanted in zip(texts, words, strict=True):
        held = checks(text, wanted)
        rewards.append(sum(held) / len(held))
    return rewards


def checks(text: str, wanted: Iterable[str]) -> list[bool]:
    """Each of the things that an instruction asks for, and whether `text` has it."""
    text = text.strip()
    said = re.findall(r"[\w'’-]+", text.lower())
    # One sentence: it begins with a capital, its only full stop is its end, and it stays on its line.
    one_sentence = re.fullmatch(r"[A-Z][^.!?\n]*[.!?]", text) is not None
    return [*(word in said for word in wanted), LEAST <= len(said) <= MOST, one_sentence]


def rows(count: int, words: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Prompts that ask for two of `words`, and the words themselves for the reward function. No pair occurs twice."""
    generator = random.Random(seed)
    pairs: dict[tuple[str, ...], None] = {}
    while len(pairs) < count:
        pairs.setdefault(tuple(sorted(generator.sample(words, 2))))
    found = []
    for a, b in pairs:
        text = generator.choice(PHRASES).format(a=a, b=b, least=LEAST, most=MOST)
        found.append({"prompt": [{"role": "user", "content": text}], "words": [a, b]})
    return found


# --- the run ----------------------------------------------------------------------------------------------------------


def command(model: str, folder: Path, size: Size, seed: int) -> list[str]:
    """What is typed to train, with an evaluation before the first step and after the last."""
    return [
        *("trl", "grpo"),
        *("--model_name_or_path", model),
        *("--dataset_name", str(folder / "data")),
        *("--reward_funcs", f"{os.path.relpath(__file__)}:follows"),
        *("--use_peft", "--lora_target_modules", "all-linear", "--learning_rate", "5e-4"),
        *("--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "2"),
        *("--num_generations", str(GENERATIONS), "--per_device_train_batch_size", str(size.batch)),
        *("--max_completion_length", "40", "--max_steps", str(size.steps), "--gradient_checkpointing", "false"),
        *("--eval_on_start", "--eval_strategy", "steps", "--eval_steps", str(size.steps // size.evaluations)),
        *("--num_generations_eval", "4", "--per_device_eval_batch_size", "16"),
        *("--logging_steps", "1", "--seed", str(seed), "--output_dir", str(folder / "model")),
    ]


def typed(arguments: Sequence[str]) -> str:
    """A command as one types it, an option or two a line."""
    text = shlex.join(arguments)
    lines = [""]
    for part in re.split(r" (?=--)", text):
        if lines[-1] and len(lines[-1]) + len(part) > 90:
            lines.append("")
        lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n        ".join(lines)


def run(arguments: Sequence[str]) -> int:
    """Runs a `trl` command with this Python, whether or not it is on the search path. Its exit status."""
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ  # waiting threads sleep; faster where others work too
    return subprocess.run([sys.executable, "-m", "trl.cli.main", *arguments[1:]], env=environment).returncode


@dataclass(frozen=True)
class Point:
    """The mean reward at a step; of an evaluation, with half the width of its 95 % interval."""

    step: int
    reward: float
    half: float = 0.0

    def __str__(self) -> str:
        return f"{self.reward:.3f} ± {self.half:.3f}"


def curves(folder: Path) -> tuple[list[Point], list[Point], float]:
    """Training rewards, held-out rewards, and the share of held-out completions that follow in every point at the end,
    from the log that the last checkpoint in `folder` keeps."""
    last = max(folder.glob("checkpoint-*/trainer_state.json"), key=lambda file: int(file.parent.name.split("-")[1]))
    log = json.loads(last.read_text(encoding="utf-8"))["log_history"]
    trained = [Point(line["step"], line["reward"]) for line in log if "reward" in line]
    held_out = [
        Point(line["step"], line["eval_reward"], line["eval_reward_ci95"]) for line in log if "eval_reward" in line
    ]
    return trained, held_out, next(line["eval_pass@1"] for line in reversed(log) if "eval_pass@1" in line)


def write_csv(file: Path, trained: Sequence[Point], held_out: Sequence[Point], **further: Mapping[int, float]) -> None:
    """One line a step: training reward, held-out reward, half the width of its interval, and `further` columns by step;
    empty where there is none."""
    by_step = ({each.step: each for each in trained}, {each.step: each for each in held_out})
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["step", "train_reward", "eval_reward", "eval_reward_ci95", *further])
        for step in sorted({*by_step[0], *by_step[1]}):
            train, held = by_step[0].get(step), by_step[1].get(step)
            rest = [column.get(step) for column in further.values()]
            writer.writerow([step, train and train.reward, held and held.reward, held and held.half, *rest])


# --- the picture ------------------------------------------------------------------------------------------------------


def svg(
    trained: Sequence[Point],
    held_out: Sequence[Point],
    title: str,
    *,
    axis: str = "mean reward",
    across: str = "optimizer step",
    what: str = "prompts",
    right: tuple[str, Mapping[int, float]] | None = None,
) -> str:
    """The two curves as a picture: training rewards, and held-out rewards with whiskers for their intervals. `right` is
    a curve by step with an axis of its own, and what it is."""
    left, top, wide, high = 64, 44, 600, 280  # the frame of the curves
    last = max(each.step for each in [*trained, *held_out]) or 1

    def x(step: float) -> float:
        return left + wide * step / last

    def y(reward: float) -> float:
        return top + high * (1 - reward)

    def text(at: float, down: float, content: str, anchor: str = "middle", more: str = "") -> str:
        return f'<text x="{at:.1f}" y="{down:.1f}" text-anchor="{anchor}"{more}>{content}</text>'

    def line(points: Iterable[tuple[float, float]], style: str) -> str:
        places = " ".join(f"{at:.1f},{down:.1f}" for at, down in points)
        return f'<polyline points="{places}" fill="none" {style}/>'

    blue, grey, red, dashes = "#1f5fa8", "#8a8a8a", "#b5482a", 'stroke-width="1.5" stroke-dasharray="5 4"'
    margin = 64 if right else 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + wide + margin} {top + high + 56}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#222">',
        '<rect width="100%" height="100%" fill="white"/>',
        text(left + wide / 2, 26, title, more=' font-size="16"'),
    ]
    for tenths in range(0, 11, 2):
        level = y(tenths / 10)
        parts += [line([(left, level), (left + wide, level)], 'stroke="#e4e4e4"')]
        parts += [text(left - 9, level + 4, f"{tenths / 10:.1f}", "end")]
    spacing = next((each for each in (1, 2, 5, 10, 20, 50, 100, 200, 500) if last <= 10 * each), last)
    for step in range(0, last + 1, spacing):
        parts += [line([(x(step), top + high), (x(step), top + high + 5)], 'stroke="#222"')]
        parts += [text(x(step), top + high + 20, str(step))]
    parts += [
        line([(left, top), (left, top + high), (left + wide, top + high)], 'stroke="#222"'),
        text(left + wide / 2, top + high + 42, across),
        text(0, 0, axis, more=f' transform="translate(18 {top + high / 2}) rotate(-90)"'),
        line([(x(each.step), y(each.reward)) for each in trained], f'stroke="{grey}" stroke-width="1.5"'),
        line([(x(each.step), y(each.reward)) for each in held_out], f'stroke="{blue}" stroke-width="2.5"'),
    ]
    for each in held_out:
        low, high_end, at = y(each.reward - each.half), y(each.reward + each.half), x(each.step)
        whisker = [(at - 5, low), (at + 5, low), (at, low), (at, high_end), (at - 5, high_end), (at + 5, high_end)]
        parts += [line(whisker, f'stroke="{blue}" stroke-width="1.5"')]
        parts += [f'<circle cx="{at:.1f}" cy="{y(each.reward):.1f}" r="4" fill="{blue}"/>']
    if right is not None:
        label, values = right
        most = max(1.0, *values.values())
        parts += [line([(x(step), y(value / most)) for step, value in values.items()], f'stroke="{red}" {dashes}')]
        parts += [text(left + wide + 9, y(tenths / 10) + 4, f"{most * tenths / 10:.1f}", "start")
                  for tenths in range(0, 11, 2)]  # fmt: skip
        parts += [text(0, 0, label, more=f' transform="translate({left + wide + 52} {top + high / 2}) rotate(90)"')]
    names = [(blue, f"held-out {what}, 95 % interval"), *([(grey, f"training {what}")] if trained else [])]
    names += [(red, right[0])] if right else []
    for place, (colour, name) in enumerate(names):
        level = top + high - 20 * len(names) + 20 * place
        parts += [
            line([(left + wide - 240, level), (left + wide - 212, level)], f'stroke="{colour}" stroke-width="2.5"')
        ]
        parts += [text(left + wide - 204, level + 4, name, "start")]
    return "\n".join([*parts, "</svg>"]) + "\n"


# --- the script -------------------------------------------------------------------------------------------------------


def main(
    argv: Sequence[str] | None = None,
    *,
    command: Callable[[str, Path, Size, int], list[str]] = command,
    name: str = "GRPO",
    full: Size = FULL,
    quick: Size = QUICK,
    generations: int = GENERATIONS,
) -> int:
    """The whole run; other methods on the same task give their command, name, sizes and completions of a prompt."""
    parser = argparse.ArgumentParser(
        description=f"{name} on instructions that can be checked; exits 1 if nothing is learned."
    )
    output = f"{name.lower().replace(' ', '-')}-instructions"
    parser.add_argument("--model_name_or_path", help="a folder or a name [SmolLM2-135M-Instruct, as `trl demo` has it]")
    parser.add_argument("--output_dir", default=output, help="where everything is written")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts, the adapter and what is drawn [0]")
    parser.add_argument("--quick", action="store_true", help="two small steps: whether it works, not whether it learns")
    options = parser.parse_args(argv)
    size = quick if options.quick else full
    started = time.perf_counter()
    model = options.model_name_or_path
    if model is None:
        from trl.demo.model import demo_model

        model = str(demo_model())
    folder = Path(options.output_dir)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    prompts = size.steps * size.batch // generations
    parts = {"train": rows(prompts, WORDS, options.seed), "test": rows(size.held_out, NEW_WORDS, options.seed)}
    for split, part in parts.items():
        (folder / "data" / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in part), encoding="utf-8"
        )

    arguments = command(model, folder, size, options.seed)
    print(f"    {typed(arguments)}\n", flush=True)
    status = run(arguments)
    if status != 0:
        return status

    trained, held_out, passed = curves(folder / "model")
    write_csv(folder / "curve.csv", trained, held_out)
    title = f"{name}: one sentence, 5 to 12 words, two given words"
    (folder / "curve.svg").write_text(svg(trained, held_out, title), encoding="utf-8")
    before, after = held_out[0], held_out[-1]
    rose = after.reward - after.half > before.reward + before.half
    print(f"\nMean reward on {size.held_out} held-out prompts, with its 95 % interval:\n")
    print(f"    before  {before}\n    after   {after}   ({passed:.0%} of the completions follow in every point)\n")
    print(f"The intervals {'do not overlap: it learned.' if rose else 'overlap: that it learned is not shown.'}")
    print(f"The curve is in {folder / 'curve.svg'} and {folder / 'curve.csv'}, the model in {folder / 'model'}.")
    print(f"Took {time.perf_counter() - started:.0f} seconds.")
    return 0 if rose or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
