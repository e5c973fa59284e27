"""All that is measured on a GPU, in one run of about seven minutes, the most important first.

    python benchmarks/gpu.py --assets FOLDER --out FOLDER --upstream upstream/bin/python

The folder of assets has `tokenizer` (SmolLM2's), `stories15m` (a small trained model), `alpaca_en_demo.json`,
`dpo_en_demo.json` (see `sft.py` and `preference.py`) and `short_pairs.json` (prompt, chosen and rejected as texts of at
most 240 tokens). Models of a billion weights are made on the device: random weights of a real shape, which is enough
for time and memory. `--upstream-packages` takes a folder with TRL 1.16 in place of an environment of its own.

    python benchmarks/gpu.py --parts sft-lora sft-qlora --assets FOLDER --out FOLDER --upstream upstream/bin/python

runs parts on a model of Llama 3's 8B shape instead (`large.py` says what each is, and runs one by itself): the library
first, then TRL 1.16, each for 200 seconds at most, so that a part takes less than nine minutes with the model's making.
The part `sampler` is `rollout.py`. Parts need the folder `tokenizer` alone, and packages that `pip install` brings: trl
with the extras `peft` and `quantization`, and for the other side trl==1.16.0, peft and bitsandbytes.

What measures neither time nor memory runs at once, and the rest one after another. Each step has a limit, and no step
starts that cannot end before `--seconds`. `log.txt` and `results.json` in the folder of results are written after each.
"""

import argparse
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}  # fmt: skip
DRY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
       "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}  # fmt: skip
VOCABULARIES = {"1b": 49152, "1b-128k": 128256}
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False}  # fmt: skip
APART = ["env", "-u", "PYTHONPATH"]  # which finds this library
PARTS = ("sft-full", "sft-lora", "sft-qlora", "dpo-lora", "grpo-update", "sampler")
IMPORTS = """
import subprocess, sys, time
def seconds(line):
    began = time.perf_counter()
    subprocess.run([sys.executable, '-c', line], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began
for line in ('pass', 'import torch', 'import trl', 'from trl import SFTTrainer', 'from trl import GRPOTrainer'):
    print(f'{line:28} {min(seconds(line) for _ in range(3)):.2f} s')
"""


class Step(NamedTuple):
    """A command, and the seconds it may take."""

    name: str
    command: list[str]
    limit: int


class Running:
    """A step under way, its output in a file."""

    def __init__(self, step: Step, work: Path, environment: dict[str, str]) -> None:
        self.step, self.file, self.began = step, work / f"{step.name}.txt", time.monotonic()
        (work / f"{step.name}.json").unlink(missing_ok=True)  # of an earlier run
        self.process = subprocess.Popen(step.command, stdout=self.file.open("w"), stderr=subprocess.STDOUT,
                                        cwd=work, env=environment, start_new_session=True)  # fmt: skip

    def end(self, until: float) -> str:
        """Wait for it until `until`, or its own limit; what became of it."""
        try:
            status = self.process.wait(max(0.0, min(until, self.began + self.step.limit) - time.monotonic()))
            outcome = f"status {status}"
        except subprocess.TimeoutExpired:
            outcome = "stopped at its limit"
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # workers too
        except ProcessLookupError:
            pass
        self.process.wait()
        return f"{outcome}, {time.monotonic() - self.began:.0f} s"


def make_models(folder: Path, tokenizer: Path, dry: bool, large: bool) -> None:
    """Folders with random weights: those of a billion weights, or the large one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    for name, size in {"8b": 128256}.items() if large else VOCABULARIES.items():
        if (folder / name / "tokenizer.json").exists():
            continue  # of an earlier run
        config = AutoConfig.from_pretrained(tokenizer)
        for key, value in (DRY if dry else LARGE if large else SHAPE).items():
            setattr(config, key, value)
        config.vocab_size = 49200 if dry and size > 49152 else size
        torch.manual_seed(0)
        with torch.device("cpu" if dry else "cuda"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / name)
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} weights", flush=True)


def interpreter(packages: Path, work: Path) -> str:
    """A Python in which the packages of a folder come first."""
    file = work / "python-upstream"
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(str(Path(each).absolute()) for each in [packages, *others] if each and each != ".")
    file.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" "$@"\n', encoding="utf-8")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def plan(options: argparse.Namespace, work: Path, upstream: str | None) -> tuple[list[Step], list[Step]]:
    """Steps that run at once, and those that run one after another."""
    assets, dry = options.assets.absolute(), options.dry

    def step(limit: int, name: str, script: str, *rest: Any, json_file: bool = True) -> Step:
        command = [sys.executable, str(HERE / script), *map(str, rest)]
        return Step(name, [*command, "--json", str(work / f"{name}.json")] if json_file else command, limit)

    device = ["--device", "cpu" if dry else "cuda"]
    small = ["--model", assets / "stories15m"]
    pairs = ["--rows", assets / "short_pairs.json"]
    checks = [
        step(110, "layouts", "gpu_check.py", "layouts", *small, *pairs, *device, "--count", 2 if dry else 32),
        step(110, "steps", "gpu_check.py", "steps", *small, *device),
        step(110, "greedy", "gpu_check.py", "greedy", *small, *device),
    ]
    alpaca, dpo = ["--rows", assets / "alpaca_en_demo.json"], ["--rows", assets / "dpo_en_demo.json"]
    for method, rows in (("dpo", pairs), ("sft", alpaca)):
        steps = 2 if dry else 200
        settings = ["--method", method, *rows, *small, "--steps", steps, *device]
        checks.append(step(200, f"low-{method}", "low_precision.py", *settings))
    both = ["--precision", "fp32" if dry else "bf16", "--quiet", *device]
    both += ["--upstream", upstream] if upstream else []
    big, wide = ["--model", work / "1b"], ["--model", work / "1b-128k"]

    def size(batch: int, steps: int, rounds: int) -> list[Any]:
        return ["--batch-size", 2 if dry else batch, "--steps", 1 if dry else steps, "--rounds", 1 if dry else rounds]

    keep = "--no-checkpointing"
    packing = ["--packing", "--max-length", 128 if dry else 1024]
    sft: list[Any] = ["sft.py", *alpaca, *both]
    timed = [
        step(90, "sft", *sft, *big, *size(16, 4, 3)),
        step(100, "dpo", "preference.py", "--method", "dpo", "--data", "long", *dpo, *both, *big, *size(8, 2, 3)),
        step(110, "grpo", "grpo.py", "--data", "short", *alpaca, *both, *big, keep, *size(32, 1, 2),
             "--generations", 2 if dry else 8, "--max-completion-length", 8 if dry else 128),
        step(90, "sft-kept", *sft, *big, keep, *size(16, 4, 3)),
        step(40, "head", "gpu_check.py", "head", *device, *(["--tokens", 64, "--vocabulary", 500] if dry else [])),
        step(90, "sft-packed", *sft, *big, *packing, *size(8, 2, 3)),
        step(90, "sft-128k", *sft, *wide, *size(16, 4, 2)),
        step(90, "sft-kept-packed", *sft, *big, keep, *packing, *size(8, 2, 2)),
        Step("imports-ours", [sys.executable, "-c", IMPORTS], 60),
    ]  # fmt: skip
    if upstream:
        timed.append(Step("imports-upstream", [*APART, upstream, "-c", IMPORTS], 60))
    return checks, timed


def parts(options: argparse.Namespace, work: Path, upstream: str | None, peak: float | None) -> list[Step]:
    """The steps of the parts that are asked for, one after another."""
    dry, model = options.dry, str(work / "8b")
    device = ["--device", "cpu" if dry else "cuda", *(["--peak", str(peak)] if peak else [])]
    few = ["--steps", "1", "--warm-up", "1"] if dry else []
    found = []
    for part in options.parts:
        if part == "sampler":
            many = ["--prompts", "2", "--generations", "2", "--max-new-tokens", "4"] if dry else [
                "--prompts", "8", "--generations", "8", "--max-new-tokens", "256", "--dtype", "bfloat16"]  # fmt: skip
            command = [sys.executable, str(HERE / "rollout.py"), "--model", model, *device[:2], *many, "--rounds", "1"]
            found.append(Step(part, [*command, "--json", str(work / f"{part}.json")], 400))
            continue
        sides = {"ours": [sys.executable]} | ({"upstream": [*APART, upstream]} if upstream else {})
        for side, python in sides.items():
            name = f"{part}-{side}"
            command = [*python, str(HERE / "large.py"), part, "--model", model, *device, *few]
            found.append(Step(name, [*command, "--json", str(work / f"{name}.json")], 200))
    return found


def peak_of_card() -> float | None:
    """Dense bf16 operations of the first card in TFLOP/s, by its data sheet, or None."""
    import torch

    from trl.plan.cards import CARDS

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name().lower()
    known = [card for key, card in CARDS.items() if all(word in name for word in key.split("-"))]
    return known[-1].tflops if known else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu-work"), help="folder of models made here")
    parser.add_argument("--upstream", help="interpreter of an environment with TRL 1.16")
    parser.add_argument("--upstream-packages", type=Path, help="folder with TRL 1.16, in place of an interpreter")
    parser.add_argument("--seconds", type=int, help="for all steps together [450, with --parts 530 for each]")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[], help="parts on the 8B shape, and nothing else")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone")
    parser.add_argument("--dry", action="store_true", help="tiny settings on the CPU: whether the commands are right")
    parser.add_argument("--make", action="store_true", help="make the models and end")
    options = parser.parse_args()
    seconds = options.seconds or (530 * len(options.parts) or 450)
    work, until = options.work.absolute(), time.monotonic() + seconds
    work.mkdir(parents=True, exist_ok=True)
    if options.make:
        return make_models(work, options.assets / "tokenizer", options.dry, bool(options.parts))
    options.out.mkdir(parents=True, exist_ok=True)
    upstream = options.upstream
    if options.upstream_packages:
        upstream = interpreter(options.upstream_packages, work)
    if options.parts:
        checks, timed = [], parts(options, work, upstream, peak_of_card())
    else:
        checks, timed = plan(options, work, upstream)
    if options.dry:  # a slow machine
        checks, timed = ([each._replace(limit=600) for each in steps] for steps in (checks, timed))
    others = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each and each != "."]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *others]), "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    results: dict[str, Any] = {}

    def note(running: Running) -> None:
        outcome = running.end(until)
        name = running.step.name
        output = running.file.read_text(errors="replace")
        lines = [line for line in output.splitlines() if "Loading weights" not in line]
        text = f"\n## {name}: {outcome}\n" + "\n".join(lines) + "\n"
        with (options.out / "log.txt").open("a") as log:
            log.write(text)
        print(f"\n## {name}: {outcome}\n" + "\n".join(line[:160] for line in lines[-24:]), flush=True)
        found = work / f"{name}.json"
        results[name] = {"outcome": outcome, "found": json.loads(found.read_text()) if found.exists() else None}
        (options.out / "results.json").write_text(json.dumps(results, indent=1))

    def wanted(step: Step) -> bool:
        return not options.only or step.name in options.only

    assets, out = str(options.assets.absolute()), str(options.out.absolute())
    command = [sys.executable, str(Path(__file__).resolve()), "--make", "--assets", assets, "--out", out]
    command += ["--work", str(work), *(["--dry"] if options.dry else [])]
    command += ["--parts", *options.parts] if options.parts else []
    made = Running(Step("models", command, 120), work, environment)
    few = {**environment, "OMP_NUM_THREADS": "1" if options.dry else "2"}
    if options.dry:  # two cores: one at a time
        note(made)
        for each in filter(wanted, checks):
            note(Running(each, work, few))
    else:
        under_way = [Running(each, work, few) for each in filter(wanted, checks)]
        for running in [made, *under_way]:
            note(running)
    for each in filter(wanted, timed):
        if time.monotonic() < until - 10:
            note(Running(each, work, environment))
    print(f"\n{until - time.monotonic():.0f} s left")


if __name__ == "__main__":
    main()
