"""Learning from rewards (GRPO): whole optimizer steps of this library against TRL 1.16, in one run.

A step draws completions of some prompts, judges them, and trains on them once: on-policy, without a reference, at
temperature 1, 8 completions of each prompt. Both sides train the same weights with the same prompts, in the same order,
with the same reward function, batch size, optimizer settings, attention (SDPA) and gradient checkpointing; completions
end where the model ends them, or at a greatest length. Each side is a process of its own in its own environment; the
two are asked in turn for a few steps, and whichever is not asked waits, so that both see the same machine. How to make
the environment of TRL 1.16 is in `sft.py`.

    python benchmarks/grpo.py --upstream upstream/bin/python --data long --rows dpo_en_demo.json --no-checkpointing
    python benchmarks/grpo.py --upstream upstream/bin/python --data short --rows alpaca_en_demo.json --no-checkpointing

    --data long     prompts of 240 to 400 tokens, completions of at most 96: what is saved is above all the prompt,
                    which TRL computes for each of its completions
    --data short    prompts of 40 to 56 tokens, completions of at most 160

Rows are those of `sft.py` or `preference.py`, whose docstrings say where to get these two; their answers are not read.
A prompt comes once. Without `--rows` prompts are made of random words. A model cut by `--layers` no longer ends its
completions: for a quick look alone.

The reward is the number of different characters, and a little for the place in the group, so that every group has
spread: this library does not forward completions whose advantage is zero, and is to gain nothing by it here.
`--binary-reward` gives 1 to what ends with a full stop, else 0; groups without spread then occur.

The two sides draw different completions, since they use random numbers in different ways. Lengths are alike in the
mean alone; so times are compared for a round, and for each token drawn. The warm-up is different: there both sides
draw, but train on completions that were drawn here, with this library's sampler. The loss of such a step says little
(with ratios of one it is a sum of advantages), its gradient's norm depends on everything: both are compared.
`--injected` does so in all steps and draws nothing: what is then measured is training alone.

What is printed, per side:

    time        median over the rounds of the wall time of a round (the first, a warm-up, left out); the ratio is taken
                round by round, and its median, least and greatest shown. Drawing is from prompts to advantages; the
                rest of a round is training. Processor time counts all threads
    tokens      of the completions, up to and with the one that ends them; how many completions were cut
    memory      highest resident memory (on a GPU: allocated) of drawing and training less that before the first step,
                with the model in place; and the same without gradients and optimizer state
    positions   what all forward passes computed, those of drawing included, counted at the embedding
    efficiency  tokens that these passes need, over positions: each prompt twice (drawing, training), and so each token
                of a completion, but for its last, which nothing is drawn after
    loss        of every step
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import common
from preference import prompt_of, read_pairs, save_model
from sft import WORDS, read_rows

WORKER = "grpo_worker.py"
PROMPT_TOKENS = {"long": (240, 400), "short": (40, 56)}
COMPLETION_TOKENS = {"long": 96, "short": 160}
Row = dict[str, Any]


def made_prompts(count: int, words: tuple[int, int], seed: int) -> list[Any]:
    """Questions of so many random words."""
    draw = random.Random(seed)
    return [
        [{"role": "user", "content": " ".join(draw.choice(WORDS) for _ in range(draw.randint(*words))) + "?"}]
        for _ in range(count)
    ]


def read_prompts(path: Path) -> list[Any]:
    """The prompts of a JSON or JSON Lines file, whatever its rows have for answers."""
    text = path.read_text(encoding="utf-8")
    first = json.loads(text)[0] if text.lstrip().startswith("[") else json.loads(text.splitlines()[0])
    if "messages" in first or {"instruction", "output"} <= set(first):
        return [row["messages"][:-1] for row in read_rows(path)]
    return [prompt_of(row) for row in read_pairs(path)]


def prompt_rows(prompts: list[Any], tokenizer: Any, options: argparse.Namespace) -> list[Row]:
    """Prompts of the lengths asked for, each once, as messages and as token ids, in the order both sides take them."""
    from datasets import Dataset, disable_caching, disable_progress_bars

    from trl.data.tokenizing.prompts import prepare_prompts

    disable_caching()
    disable_progress_bars()
    prompts = list({json.dumps(prompt): prompt for prompt in prompts}.values())
    random.Random(options.seed).shuffle(prompts)
    prepared, _ = prepare_prompts(Dataset.from_list([{"prompt": prompt} for prompt in prompts]), tokenizer)
    low, high = options.prompt_tokens
    high = min(high, options.max_length - options.max_completion_length)
    rows = [row for row in prepared.to_list() if low <= len(row["prompt_ids"]) <= high]
    if not rows:
        raise SystemExit(f"none of {len(prompts)} prompts has {low} to {high} tokens: see --prompt-tokens")
    return rows


def draw_completions(rows: list[Row], model: Path, tokenizer: Any, options: argparse.Namespace) -> list[Any]:
    """Pairs of a prompt's token ids and its completions, drawn with this library's sampler."""
    import torch
    from transformers import AutoModelForCausalLM

    from trl.engine.probe import attach
    from trl.rollout.generate import InProcessSampler
    from trl.rollout.types import Request, Sampling

    if options.threads:
        torch.set_num_threads(options.threads)
    drawing = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(options.device)
    attach(drawing)
    prompts = list(dict.fromkeys(tuple(row["prompt_ids"]) for row in rows))
    requests = [Request(prompt, options.generations, (options.seed, at)) for at, prompt in enumerate(prompts)]
    sampling = Sampling(max_new_tokens=options.max_completion_length, stop_ids=(tokenizer.eos_token_id,))
    sampler = InProcessSampler()
    sampler.sync(drawing, 0)
    drawn = sampler.generate(requests, sampling)
    return [(list(prompt), [each.ids for each in group]) for prompt, group in zip(prompts, drawn, strict=True)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    model = common.model_of(options)
    tokenizer = AutoTokenizer.from_pretrained(model)
    low, high = options.prompt_tokens
    prompts = read_prompts(options.rows) if options.rows else made_prompts(256, (max(1, low - 30), high), options.seed)
    rows = prompt_rows(prompts, tokenizer, options)
    found = len(rows)
    settings = common.settings_of(options)
    per_step, left = divmod(options.batch_size * options.accumulation, options.generations)
    if left or not per_step:
        raise SystemExit("--batch-size × --accumulation must be a multiple of --generations")
    given_steps = settings["total_steps"] if options.injected else options.steps
    rows = [rows[index % found] for index in range(settings["total_steps"] * per_step)]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(options, model, tokenizer, folder / Path(model).name)
        given = draw_completions(rows[: given_steps * per_step], folder / Path(model).name, tokenizer, options)
        (folder / "given.json").write_text(json.dumps(given), encoding="utf-8")
        (folder / "rows.json").write_text(json.dumps([{"prompt": row["prompt"]} for row in rows]), encoding="utf-8")
        settings |= {
            "model": str(folder / Path(model).name), "rows_file": str(folder / "rows.json"), "method": options.method,
            "given_file": str(folder / "given.json"), "given_steps": given_steps, "injected": options.injected,
            "data": options.data, "learning_rate": options.learning_rate, "lora_dropout": 0.0,
            "generations": options.generations, "max_completion_length": options.max_completion_length,
            "binary_reward": options.binary_reward, "prompts": per_step,
        }  # fmt: skip
        sides, ready, ends = common.measured(WORKER, settings, options, folder)

    per_round = per_step * options.steps
    measured = rows[per_round : per_round * (options.rounds + 1)]
    report: dict[str, Any] = {
        "settings": {key: value for key, value in settings.items() if not key.endswith("_file") and key != "model"},
        "model": Path(model).name,
        "rows": options.rows.name if options.rows else "generated",
        "rows_found": found,
        "rows_measured": len(measured),
        "median_prompt": statistics.median(len(row["prompt_ids"]) for row in measured),
        "digits": 3,
        "state": 4 * 3 * ready["ours"]["trained_parameters"],  # gradient and two moments, fp32
        "sides": {name: side_report(side, ready[name], ends[name], measured, options) for name, side in sides.items()},
    }
    common.compare(report, losses=options.injected)
    compare_drawn(report, given_steps)
    return report


def side_report(side: common.Side, ready: dict[str, Any], end: dict[str, Any], rows: list[Row],
                options: argparse.Namespace) -> dict[str, Any]:  # fmt: skip
    """What was measured of a side, and of its drawing and training apart."""
    rounds = side.rounds
    tokens = [found["tokens"] for found in rounds]
    in_prompts = sum(len(row["prompt_ids"]) for row in rows)
    completions = sum(found["completions"] for found in rounds)
    needed = in_prompts + sum(tokens) + (0 if options.injected else in_prompts + sum(tokens) - completions)
    drawing = [found["drawing"] for found in rounds]
    return {
        **common.side_report(side, ready, end, needed),
        "drawing": drawing,
        "training": [found["seconds"] - spent for found, spent in zip(rounds, drawing, strict=True)],
        "tokens": tokens,
        "completions": completions,
        "cut": sum(found["cut"] for found in rounds),
        "gradients": end["gradients"],
        "without_spread": statistics.mean(end["without_spread"][options.steps :][: options.rounds * options.steps]),
    }


def ratios(ours: list[float], upstream: list[float]) -> dict[str, float]:
    found = [theirs / own for own, theirs in zip(ours, upstream, strict=True)]
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def a_token(side: dict[str, Any], what: str) -> list[float]:
    """Seconds for each token of a completion, round by round."""
    return [spent / tokens for spent, tokens in zip(side[what], side["tokens"], strict=True)]


def compare_drawn(report: dict[str, Any], given_steps: int) -> None:
    """Put into the report how times for each token compare, and what both sides make of the same completions."""
    if "upstream" not in report["sides"]:
        return
    ours, upstream = report["sides"]["ours"], report["sides"]["upstream"]
    parts = ("seconds", "training") if report["settings"]["injected"] else ("seconds", "drawing", "training")
    report["token_ratios"] = {what: ratios(a_token(ours, what), a_token(upstream, what)) for what in parts}
    same = {name: list(zip(ours[name], upstream[name], strict=True))[:given_steps] for name in ("losses", "gradients")}
    report["same_steps"] = given_steps
    report["same_loss"] = max(abs(left - right) for left, right in same["losses"])
    # Completions that are all equal have next to no gradient.
    report["same_gradient"] = max(abs(left - right) / max(right, 1e-3) for left, right in same["gradients"])


def show(report: dict[str, Any]) -> None:
    settings = report["settings"]
    reward = "ends with a full stop" if settings["binary_reward"] else "different characters"
    print(f"grpo, {settings['prompts']} prompts × {settings['generations']} completions a step, at most "
          f"{settings['max_completion_length']} tokens; reward: {reward}; learning rate {settings['learning_rate']:g}",
          end="; ")  # fmt: skip
    common.show_model(report)
    print(f"rows: {report['rows']}, {report['rows_found']} of these lengths, {report['rows_measured']} measured; "
          f"prompts of {report['median_prompt']:.0f} tokens in the median")  # fmt: skip
    if settings["injected"]:
        print("completions given to both sides: drawing is not measured")
    common.show_sides(report)
    print()
    rounds = len(report["sides"]["ours"]["seconds"])
    further: list[common.Line] = [
        ("  drawing (median)", lambda side: f"{statistics.median(side['drawing']):.2f}"),
        ("  training (median)", lambda side: f"{statistics.median(side['training']):.2f}"),
        ("completion tokens a round", lambda side: f"{sum(side['tokens']) / rounds:,.0f}"),
        ("  of a completion", lambda side: f"{sum(side['tokens']) / side['completions']:.1f}"),
        ("  completions cut", lambda side: f"{side['cut']} of {side['completions']}"),
        ("ms a completion token", lambda side: f"{1000 * sum(side['seconds']) / sum(side['tokens']):.2f}"),
        ("  drawing", lambda side: f"{1000 * sum(side['drawing']) / sum(side['tokens']):.2f}"),
        ("  training", lambda side: f"{1000 * sum(side['training']) / sum(side['tokens']):.2f}"),
        ("groups without spread", lambda side: f"{side['without_spread']:.2f}"),
    ]
    common.show_table(report, "needed tokens a second", further)
    common.show_comparison(report)
    if "token_ratios" in report:
        names = {"seconds": "whole step", "drawing": "drawing", "training": "training"}
        print("upstream / ours, for each completion token: " + "; ".join(
            f"{names[what]} {ratio['median']:.2f}× ({ratio['min']:.2f} – {ratio['max']:.2f})"
            for what, ratio in report["token_ratios"].items()))  # fmt: skip
        steps = report["same_steps"]
        print(f"the same completions in {steps} step{'s' if steps > 1 else ''}: losses equal to "
              f"{report['same_loss']:.1e}, norms of gradients to {report['same_gradient']:.1e} (relative)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["long", "short"], default="long", help="which prompts, see above")
    parser.add_argument("--rows", type=Path, help="JSON or JSON Lines of prompts with answers")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, metavar=("LOW", "HIGH"),
                        help="prompts of these lengths (default: by --data)")  # fmt: skip
    parser.add_argument("--max-completion-length", type=int, help="default: by --data")
    parser.add_argument("--generations", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--binary-reward", action="store_true", help="0 or 1: groups without spread occur")
    parser.add_argument("--injected", action="store_true", help="draw nothing: train on the same completions")
    common.add_options(parser, batch_size=8, steps=1, rounds=3)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.set_defaults(method="grpo", accumulation=2)
    options = parser.parse_args()
    options.prompt_tokens = options.prompt_tokens or PROMPT_TOKENS[options.data]
    options.max_completion_length = options.max_completion_length or COMPLETION_TOKENS[options.data]
    common.tell(measure(options), show, options)


if __name__ == "__main__":
    main()
