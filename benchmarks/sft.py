"""Supervised fine-tuning: this library against TRL 1.16, in one run.

Both sides train the same model on the same rows in the same order, with the same seed, batch size, optimizer settings
and gradient checkpointing, without packing. Each side is a process of its own in its own environment; the two are asked
in turn to train for a few steps, and whichever is not asked waits, so that both see the same machine. The rows are
tokenised by each side, and the run stops if tokens differ; then both train on our labels (TRL also trains on what a
chat template writes after the end of the last turn, often a newline; how many tokens differed is printed).

TRL 1.16 wants an environment of its own:

    python -m venv upstream
    upstream/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0 peft psutil
    python benchmarks/sft.py --upstream upstream/bin/python

Without `--upstream` this library runs alone. Without `--rows` the rows are made here: chats whose lengths are
distributed log-normally, as those of people are. Real ones: 999 instructions of the Alpaca shape are in the source
package of LLaMA-Factory,

    pip download --no-deps --no-binary :all: llamafactory==0.9.5
    tar xzf llamafactory-0.9.5.tar.gz
    python benchmarks/sft.py --upstream upstream/bin/python --rows llamafactory-0.9.5/data/alpaca_en_demo.json

On a GPU machine: `--device cuda --precision bf16` (autocast over fp32 weights). A folder with a configuration and a
tokenizer but no weights is given random ones, which is enough for speed and memory.

What is printed, per side:

    time        median over the rounds of the wall time of a round (the first, a warm-up, left out). The ratio is taken
                round by round, both sides having trained on the same rows, and its median, least and greatest shown;
                processor time (of all threads) tells the two apart where others use the machine too
    memory      highest resident memory (on a GPU: allocated) while training less that before the first step, with model
                and data in place; and the same without gradients and optimizer state, which both sides must have
    positions   what the model's forward pass computed, padding included, counted at its embedding
    efficiency  tokens of the rows over positions
    work        floating-point operations that the task needs at these settings, over time, as a share of what this
                machine's matrix products reach at the model's shapes. A token of a row costs 2 operations for each
                weight of the linear layers forward, 2 backward for the gradient of the input, 2 for that of a weight
                that trains, 2 more with checkpointing; a trained token the same (without checkpointing) for each weight
                of the head; attention is counted causally. Padding and needless work do not count
    loss        of every step, and the largest difference between the sides
"""

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
from common import Side

WORKER = "sft_worker.py"

WORDS = (
    "a about after again all also an and another any are as at be because been before being between both but by can "
    "change come could day did different do does down each end even every example few find first for found from get "
    "give go good great had has have he help her here him his home house how however i if important in into is it its "
    "just keep kind know large last learn left letter life light like line list little live long look made make many "
    "may mean might model more most move much must my name near need never new next night no not now number of off "
    "often old on once one only open or order other our out over own page paper part people place plan plant play "
    "point possible problem question quick rather read reason result right river run said same saw say school second "
    "see seem sentence set several she should show side simple small so some something soon sound spell still story "
    "study such system take tell than that the their them then there these they thing think this those thought three "
    "through time to together too tree try turn two under until up us use useful very want was water way we well went "
    "were what when where which while white who why will with without word work world would write year you young your"
).split()


def chats(count: int, seed: int) -> list[dict[str, Any]]:
    """Conversations of random words, one in five with two exchanges; lengths are log-normal."""
    draw = random.Random(seed)

    def text(median: float, spread: float, longest: int) -> str:
        length = min(longest, max(3, round(median * math.exp(draw.gauss(0.0, spread)))))
        words = [draw.choice(WORDS) for _ in range(length)]
        for at in range(0, length, 12):
            words[at] = words[at].capitalize()
        return " ".join(words) + "."

    rows = []
    for _ in range(count):
        messages = []
        for _ in range(2 if draw.random() < 0.2 else 1):
            messages.append({"role": "user", "content": text(22, 0.8, 400)})
            messages.append({"role": "assistant", "content": text(110, 0.8, 700)})
        rows.append({"messages": messages})
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON or JSON Lines file, of messages or of the Alpaca shape, as messages that end with an answer."""
    text = path.read_text(encoding="utf-8")
    raw = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    rows = []
    for row in raw:
        if "messages" in row:
            messages = row["messages"]
        elif "instruction" in row:
            question = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
        else:
            raise SystemExit(f"{path}: a row must have `messages`, or `instruction` and `output`; found {sorted(row)}")
        while messages and messages[-1]["role"] != "assistant":
            messages = messages[:-1]
        if messages and messages[-1]["content"].strip():
            rows.append({"messages": messages})
    return rows


def needed_work(ready: dict[str, Any], tokens: list[int], trained: list[int], checkpointing: bool) -> float:
    """Floating-point operations that these rows need, see the top."""
    full = not ready["adapter_parameters"]
    layers = sum(rows * columns for rows, columns in ready["linear_shapes"])
    head = math.prod(ready["head_shape"])
    again = 2 if checkpointing else 0
    work = sum(tokens) * ((6 if full else 4) + again) * layers
    work += sum(tokens) * (6 + again) * ready["adapter_parameters"]
    work += sum(trained) * (6 if ready["head_trains"] else 4) * head
    # Scores and their use: 2 products of length² / 2 entries a layer, twice as much backward.
    work += sum(length**2 for length in tokens) * (6 + again) * ready["attention_width"] * ready["attention_layers"]
    return float(work)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    model = common.model_of(options)
    rows = read_rows(options.rows) if options.rows else chats(options.seed_rows, options.seed)
    per_step = options.batch_size * options.accumulation
    settings = common.settings_of(options)
    # Packed rows are full ones: there are enough to fill every batch, however they are put together.
    wanted = settings["total_steps"] * per_step * (options.max_length // 16 if options.packing else 1)
    rows = [rows[index % len(rows)] for index in range(wanted)]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        settings |= {
            "model": model, "rows_file": str(folder / "rows.jsonl"), "train_on": options.train_on,
            "learning_rate": options.learning_rate or (2e-4 if options.lora else 2e-5), "packing": options.packing,
        }  # fmt: skip
        sides = common.started(WORKER, settings, options, folder)
        try:
            return run(sides, settings, options, per_step, folder)
        finally:
            for side in sides.values():
                side.end()


def run(
    sides: dict[str, Side], settings: dict[str, Any], options: argparse.Namespace, per_step: int, folder: Path
) -> dict[str, Any]:
    ready = {name: side.answer("ready") for name, side in sides.items()}
    sides["ours"].ask(f"labels write {folder / 'labels.json'}")
    data, differ = sides["ours"].answer("labels"), 0
    if "upstream" in sides:
        # Each side packs by its own lights: the same tokens in other company.
        what = "write upstream.json" if options.packing else f"read {folder / 'labels.json'}"
        sides["upstream"].ask(f"labels {what}".replace("upstream.json", str(folder / "upstream.json")))
        found = sides["upstream"].answer("labels")
        if found.get("rows"):
            raise SystemExit(f"{found['rows']} rows became other tokens upstream")
        differ = found.get("differ", 0)
    per_round = per_step * options.steps
    spans = [slice(at * per_round, (at + 1) * per_round) for at in range(options.rounds + 1)]
    batches = len(data["tokens"]) // options.batch_size
    shapes = [(sum(data["tokens"]) // batches, *shape) for shape in ready["ours"]["layer_shapes"]]
    shapes.append((sum(data["trained"]) // batches, *ready["ours"]["head_shape"]))
    products = Side("products", sys.executable, WORKER, {**settings, "shapes": shapes}, folder, ours=True)

    rates = []

    def measure_products() -> None:
        products.ask("again")
        rates.append(products.answer("products")["rate"])

    ends = common.alternate(sides, options, before=measure_products)
    products.end()

    rate = statistics.median(rates)
    measured = range(1, options.rounds + 1)
    tokens = sum(sum(data["tokens"][spans[at]]) for at in measured)
    trained = sum(sum(data["trained"][spans[at]]) for at in measured)
    work = [needed_work(ready["ours"], data["tokens"][spans[at]], data["trained"][spans[at]],
            settings["checkpointing"]) for at in measured]  # fmt: skip
    state = 4 * 3 * ready["ours"]["trained_parameters"]  # gradient and two moments, fp32
    report: dict[str, Any] = {
        "settings": {key: value for key, value in settings.items() if key not in ("rows_file", "model")},
        "model": Path(settings["model"]).name,
        "rows": options.rows.name if options.rows else f"generated, {options.seed_rows} chats",
        "rate": rate,
        "tokens": tokens,
        "trained_tokens": trained,
        "labels_that_differed": differ,
        "longest": max(data["tokens"]),
        "median_length": statistics.median(data["tokens"]),
        "state": state,
        "sides": {},
    }
    for name, side in sides.items():
        found = common.side_report(side, ready[name], ends[name], tokens)
        found["share"] = statistics.median(w / s for w, s in zip(work, found["seconds"], strict=True)) / rate
        report["sides"][name] = found
    common.compare(report, losses=not settings["packing"])
    return report


def show(report: dict[str, Any]) -> None:
    common.show_model(report)
    print(f"rows: {report['rows']}; {report['median_length']:.0f} tokens in the median, {report['longest']} at most; "
          f"loss on {report['settings']['train_on']}: {report['trained_tokens']:,} of {report['tokens']:,} "
          "tokens")  # fmt: skip
    if report["labels_that_differed"]:
        print(f"upstream was given our labels in place of its own, {report['labels_that_differed']:,} tokens differed")
    common.show_sides(report)
    print(f"matrix products at the model's shapes: {report['rate'] / 1e9:.0f} GFLOP/s\n")
    share: common.Line = ("share of matrix products", lambda side: f"{side['share']:.0%}")
    common.show_table(report, "tokens of rows a second", [share])
    common.show_comparison(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_options(parser, batch_size=8, steps=3, rounds=5)
    parser.add_argument("--rows", type=Path, help="JSON or JSON Lines of messages, or of the Alpaca shape")
    parser.add_argument("--seed-rows", type=int, default=512, metavar="N", help="chats to make when no rows are given")
    parser.add_argument("--train-on", choices=["completion", "all"], default="completion",
                        help="the last answer of a chat, or every token")  # fmt: skip
    parser.add_argument("--packing", action="store_true", help="rows packed into --max-length, best fit, on both sides")
    parser.add_argument("--learning-rate", type=float, help="default: 2e-5, with --lora 2e-4")
    options = parser.parse_args()
    common.tell(measure(options), show, options)


if __name__ == "__main__":
    main()
