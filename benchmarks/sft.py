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
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

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


class Side:
    """A worker process: one library in one environment."""

    def __init__(self, name: str, python: str, settings: dict[str, Any], folder: Path, ours: bool) -> None:
        self.name = name
        file = folder / f"{name}.json"
        file.write_text(json.dumps({**settings, "output_dir": str(folder / f"{name}-out")}), encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
        if ours:
            environment["PYTHONPATH"] = str(HERE.parent)
        self.log = folder / f"{name}.log"
        self.process = subprocess.Popen(
            [python, str(HERE / "sft_worker.py"), str(file)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True, env=environment,
            cwd=folder)  # fmt: skip
        self.rounds: list[dict[str, Any]] = []

    def ask(self, request: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()

    def answer(self, kind: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
            raise SystemExit(f"the {self.name} worker ended with status {self.process.wait()}:\n{tail}")
        found = json.loads(line)
        assert found["kind"] == kind, found
        return found

    def round(self) -> dict[str, Any]:
        self.ask("round")
        return self.answer("round")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


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
    model = options.model
    if model is None:
        from trl.models.gguf import demo_model

        model = str(demo_model())
    rows = read_rows(options.rows) if options.rows else chats(options.seed_rows, options.seed)
    per_step = options.batch_size * options.accumulation
    round_steps = (options.rounds + 1) * options.steps
    total_steps = round_steps + (1 if options.profile else 0)
    # Packed rows are full ones: there are enough to fill every batch, however they are put together.
    wanted = total_steps * per_step * (options.max_length // 16 if options.packing else 1)
    rows = [rows[index % len(rows)] for index in range(wanted)]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        settings = {
            "model": model, "layers": options.layers, "rows_file": str(folder / "rows.jsonl"),
            "train_on": options.train_on, "max_length": options.max_length, "batch_size": options.batch_size,
            "accumulation": options.accumulation, "steps": options.steps, "round_steps": round_steps,
            "total_steps": total_steps, "learning_rate": options.learning_rate or (2e-4 if options.lora else 2e-5),
            "optim": options.optim, "seed": options.seed, "checkpointing": not options.no_checkpointing,
            "precision": options.precision, "device": options.device, "threads": options.threads, "lora": options.lora,
            "lora_r": options.lora_r, "profile": options.profile, "packing": options.packing,
        }  # fmt: skip
        pythons = {"ours": sys.executable}
        if options.upstream:
            pythons["upstream"] = str(Path(options.upstream).expanduser().absolute())
        sides = {name: Side(name, python, settings, folder, name == "ours") for name, python in pythons.items()}
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
    products = Side("products", sys.executable, {**settings, "shapes": shapes}, folder, True)

    rates = []
    for number in range(options.rounds + 1):
        products.ask("again")
        rates.append(products.answer("products")["rate"])
        names = list(sides) if number % 2 else list(sides)[::-1]
        for name in names:
            found = sides[name].round()
            if number:  # the first is the warm-up
                sides[name].rounds.append(found)
        if number and not options.quiet:
            print(f"round {number}: " + ", ".join(f"{name} {side.rounds[-1]['seconds']:.2f} s"
                  for name, side in sides.items()), file=sys.stderr, flush=True)  # fmt: skip
    products.end()
    # One at a time: the last step may be profiled.
    ends = {}
    for name, side in sides.items():
        side.ask("finish")
        ends[name] = side.answer("finish")

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
        seconds = [found["seconds"] for found in side.rounds]
        positions = sum(found["positions"] for found in side.rounds)
        report["sides"][name] = {
            **{key: ready[name][key] for key in ("versions", "threads", "device", "attention", "trained_parameters")},
            "seconds": seconds,
            "cpu_seconds": [found["cpu_seconds"] for found in side.rounds],
            "median": statistics.median(seconds),
            "tokens_per_second": tokens / sum(seconds),
            "positions": positions,
            "efficiency": tokens / positions,
            "share": statistics.median(w / s for w, s in zip(work, seconds, strict=True)) / rate,
            "growth": ends[name]["growth"],
            "growth_how": ends[name]["how"],
            "losses": ends[name]["losses"],
            "profile": ends[name]["profile"],
            "built_in": ready[name]["built_in"],
        }
    if "upstream" in sides:
        ours, upstream = report["sides"]["ours"], report["sides"]["upstream"]
        ratios = [u / o for o, u in zip(ours["seconds"], upstream["seconds"], strict=True)]
        report["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        report["cpu_ratio"] = sum(upstream["cpu_seconds"]) / sum(ours["cpu_seconds"])
        report["memory_ratio"] = ours["growth"] / upstream["growth"]
        report["memory_ratio_without_state"] = (ours["growth"] - state) / max(1, upstream["growth"] - state)
        pairs = zip(ours["losses"], upstream["losses"], strict=True)
        if not settings["packing"]:
            report["largest_loss_difference"] = max(abs(left - right) for left, right in pairs)
    return report


def show(report: dict[str, Any]) -> None:
    settings, sides = report["settings"], report["sides"]
    layers = f", first {settings['layers']} layers" if settings["layers"] else ""
    what = f"LoRA r={settings['lora_r']} on all linear layers" if settings["lora"] else "all weights"
    print(f"model {report['model']}{layers}; {what}; checkpointing {'on' if settings['checkpointing'] else 'off'}; "
          f"{settings['precision']}; batches of {settings['batch_size']} × {settings['accumulation']}; "
          f"{settings['optim']}")  # fmt: skip
    print(f"rows: {report['rows']}; {report['median_length']:.0f} tokens in the median, {report['longest']} at most; "
          f"loss on {settings['train_on']}: {report['trained_tokens']:,} of {report['tokens']:,} tokens")  # fmt: skip
    if report["labels_that_differed"]:
        print(f"upstream was given our labels in place of its own, {report['labels_that_differed']:,} tokens differed")
    for name, side in sides.items():
        versions = ", ".join(f"{key} {value}" for key, value in side["versions"].items())
        print(f"{name}: {versions}; {side['device']}, {side['threads']} threads; attention {side['attention']}; "
              f"{side['trained_parameters']:,} weights train")  # fmt: skip
    print(f"matrix products at the model's shapes: {report['rate'] / 1e9:.0f} GFLOP/s\n")
    gib = 2**30
    lines = [
        ("", lambda name, side: name),
        ("seconds a round (median)", lambda name, side: f"{side['median']:.2f}"),
        ("  least – greatest", lambda name, side: f"{min(side['seconds']):.2f} – {max(side['seconds']):.2f}"),
        ("processor seconds a round", lambda name, side: f"{statistics.median(side['cpu_seconds']):.2f}"),
        ("tokens of rows a second", lambda name, side: f"{side['tokens_per_second']:,.0f}"),
        ("share of matrix products", lambda name, side: f"{side['share']:.0%}"),
        ("memory growth, GiB", lambda name, side: f"{side['growth'] / gib:.2f}"),
        ("  without optimizer state", lambda name, side: f"{(side['growth'] - report['state']) / gib:.2f}"),
        ("positions computed", lambda name, side: f"{side['positions']:,}"),
        ("unique-token efficiency", lambda name, side: f"{side['efficiency']:.2f}"),
        ("first loss", lambda name, side: f"{side['losses'][0]:.4f}"),
        ("last loss", lambda name, side: f"{side['losses'][-1]:.4f}"),
    ]
    for label, value in lines:
        print(f"{label:28}" + "".join(f"{value(name, side):>18}" for name, side in sides.items()))
    if "ratio" in report:
        ratio = report["ratio"]
        print(f"\ntime      upstream / ours  {ratio['median']:.2f}× (rounds {ratio['min']:.2f} – {ratio['max']:.2f}); "
              f"processor time {report['cpu_ratio']:.2f}×")  # fmt: skip
        print(f"memory    ours / upstream  {report['memory_ratio']:.2f}×, without optimizer state "
              f"{report['memory_ratio_without_state']:.2f}×")  # fmt: skip
        if "largest_loss_difference" in report:
            print(f"loss      largest difference over {len(sides['ours']['losses'])} steps  "
                  f"{report['largest_loss_difference']:.1e}")  # fmt: skip
    for name, side in sides.items():
        print(f"losses {name}: " + " ".join(f"{loss:.4f}" for loss in side["losses"]))
    for name, side in sides.items():
        if side["profile"]:
            print(f"\nprofile of one step, {name}\n{side['profile']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", metavar="PYTHON", help="interpreter of an environment with TRL 1.16")
    parser.add_argument("--model", help="folder of a model (default: the demo's)")
    parser.add_argument("--layers", type=int, help="keep this many layers of the model")
    parser.add_argument("--rows", type=Path, help="JSON or JSON Lines of messages, or of the Alpaca shape")
    parser.add_argument("--seed-rows", type=int, default=512, metavar="N", help="chats to make when no rows are given")
    parser.add_argument("--train-on", choices=["completion", "all"], default="completion",
                        help="the last answer of a chat, or every token")  # fmt: skip
    parser.add_argument("--lora", action="store_true", help="train an adapter on all linear layers")
    parser.add_argument("--packing", action="store_true", help="rows packed into --max-length, best fit, on both sides")
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--no-checkpointing", action="store_true", help="keep activations instead of recomputing")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast, fp32 weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps a round")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, help="default: 2e-5, with --lora 2e-4")
    parser.add_argument("--optim", default="adamw_torch_fused")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--profile", action="store_true", help="profile one more step of each side")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--quiet", action="store_true", help="no line after each round")
    options = parser.parse_args()
    report = measure(options)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
