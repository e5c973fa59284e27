"""Micro-batches by a budget of tokens: their speed, and a run on a machine with too little memory for the user's own.

    python benchmarks/budget.py --method sft --layers 4 --steps 200
    python benchmarks/budget.py --method dpo --layers 4 --steps 200
    python benchmarks/budget.py --method sft --layers 4 --steps 12 --capped 0.6

The same rows are trained on in the same steps by two processes, which take their steps in turn:

    fixed    per_device_train_batch_size=2, gradient_accumulation_steps=8
    auto     the same, with max_tokens_per_micro_batch=auto

Printed: seconds a step, the ratio of the two step by step (median, least, greatest), processor seconds, the largest
difference between losses. With `--capped SHARE`:

    free      per_device_train_batch_size=16, an adapter, no checkpointing: memory as it is
    capped    the same, where the system refuses memory beyond that share of what `free` took

The memory is the process's address space beyond that before the first step (CPU). The second run must finish, with the
losses of the first. The two run one after the other.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import HERE, model_of
from preference import made_pairs
from sft import chats

SIZES = {"fixed": (2, 8), "auto": (2, 8), "free": (16, 1), "capped": (16, 1)}


def space() -> int:
    """Bytes of this process's address space, now."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def train(options: argparse.Namespace) -> dict[str, Any]:
    """One side, in a process of its own."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    import trl

    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(model_of(options), dtype=torch.float32)
    model.model.layers = model.model.layers[: options.layers]
    model.config.num_hidden_layers = options.layers
    rows = chats(16 * 32, 0) if options.method == "sft" else made_pairs(16 * 32, 0)
    name = {"sft": "SFT", "dpo": "DPO"}[options.method]
    batch, accumulation = SIZES[options.side]
    peak = [0]
    times: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            sys.stdin.readline()  # its turn; at once where there are no turns
            times.append(time.perf_counter())
            if len(times) == 1:
                self.start = space()
                if options.bytes:
                    limit = self.start + options.bytes
                    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times[-1] = time.perf_counter() - times[-1]
            answers.write("a step\n")
            answers.flush()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            highest = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmPeak" in line)
            peak[0] = int(highest.split()[1]) * 1024 - self.start

    config = getattr(trl, f"{name}Config")(
        output_dir=str(options.folder / options.side), max_steps=options.steps, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, logging_steps=1, save_strategy="no", report_to="none",
        learning_rate=1e-4, max_length=options.max_length, use_cpu=True, bf16=False, seed=0, disable_tqdm=True,
        max_tokens_per_micro_batch="auto" if options.side == "auto" else None,
        gradient_checkpointing=not options.capped,
    )  # fmt: skip
    trainer = getattr(trl, f"{name}Trainer")(
        model, args=config, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(model_of(options)),
        callbacks=[Watch()], peft_config=LoraConfig(r=8, target_modules="all-linear") if options.capped else None,
    )  # fmt: skip
    begun = time.process_time()
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "losses": [line["loss"] for line in lines],
        "norms": [line["grad_norm"] for line in lines],
        "seconds": times,
        "processor": time.process_time() - begun,
        "peak": peak[0],
        "tokens": trainer.budget.tokens,
    }


class Run:
    """One side: a process that trains, a step for each line that it is sent if `in_turn`."""

    def __init__(self, options: argparse.Namespace, side: str, size: int = 0, in_turn: bool = False) -> None:
        self.side, self.found = side, options.folder / f"{side}.json"
        self.log = options.folder / f"{side}.log"
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"}
        if options.capped:
            environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
        further = ["--side", side, "--found", str(self.found), "--bytes", str(size)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], *further], env=environment, text=True, stderr=self.log.open("w"),
            stdin=subprocess.PIPE if in_turn else subprocess.DEVNULL, stdout=subprocess.PIPE,
        )  # fmt: skip

    def step(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        if not self.process.stdout.readline():
            self.end()

    def end(self) -> dict[str, Any]:
        self.process.communicate()
        log = self.log.read_text()
        if self.process.returncode:
            raise SystemExit(f"{self.side} ended with status {self.process.returncode}:\n{log[-3000:]}")
        notices = [line for line in log.splitlines() if "memory ran out" in line]
        print(*notices, sep="\n", end="\n" * bool(notices))
        return json.loads(self.found.read_text())


def in_turn(options: argparse.Namespace, names: tuple[str, str]) -> list[dict[str, Any]]:
    sides = [Run(options, name, in_turn=True) for name in names]
    for number in range(options.steps):
        for side in sides if number % 2 else sides[::-1]:
            side.step()
    return [side.end() for side in sides]


def compare(first: dict[str, Any], second: dict[str, Any], names: tuple[str, str]) -> None:
    far = max(abs(a - b) for a, b in zip(first["losses"], second["losses"], strict=True))
    norm = max(abs(a - b) / a for a, b in zip(first["norms"], second["norms"], strict=True))
    print(f"losses of {len(first['losses'])} steps: {first['losses'][0]:.4f} -> {first['losses'][-1]:.4f}; "
          f"largest difference {far:.1e}, of gradient norms {norm:.1e} (relative)")  # fmt: skip
    for name, side in zip(names, (first, second), strict=True):
        middle = statistics.median(side["seconds"])
        print(f"{name:8} {middle:8.3f} s a step, {side['processor']:8.1f} processor seconds, "
              f"{side['peak'] / 2**20:8,.0f} MiB at most, budget {side['tokens']}")  # fmt: skip
    ratios = [a / b for a, b in zip(first["seconds"][1:], second["seconds"][1:], strict=True)]
    if ratios:
        print(f"{names[0]} / {names[1]}: {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}); "
              f"of processor seconds {first['processor'] / second['processor']:.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["sft", "dpo"], default="sft")
    parser.add_argument("--model", help="folder of a model (default: the demo's)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--capped", type=float, metavar="SHARE", help="a share of the memory that the step needs")
    for hidden in ("side", "found", "folder"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        if options.side:
            Path(options.found).write_text(json.dumps(train(options)))
        elif options.capped:
            free = Run(options, "free").end()
            capped = Run(options, "capped", int(free["peak"] * options.capped)).end()
            compare(free, capped, ("free", "capped"))
        else:
            compare(*in_turn(options, ("fixed", "auto")), ("fixed", "auto"))


if __name__ == "__main__":
    main()
