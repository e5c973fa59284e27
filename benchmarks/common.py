"""What the drivers of the benchmarks share: processes of the two sides, alternating rounds, ratios and the table."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GIB = 2**30
Line = tuple[str, Callable[[dict[str, Any]], str]]  # of the table: a label, and what it says of a side


class Side:
    """A worker process: one library in one environment."""

    def __init__(
        self, name: str, python: str, worker: str, settings: dict[str, Any], folder: Path, ours: bool = False
    ) -> None:
        self.name = name
        file = folder / f"{name}.json"
        file.write_text(json.dumps({**settings, "output_dir": str(folder / f"{name}-out")}), encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
        if ours:
            further = os.environ.get("PYTHONPATH", "").split(os.pathsep)  # packages that the environment lacks
            environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *(each for each in further if each)])
        if settings["exact_memory"]:  # glibc: whatever is larger comes from the system and goes back to it
            environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
        self.log = folder / f"{name}.log"
        self.process = subprocess.Popen(
            [python, str(HERE / worker), str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log.open("w"), text=True, env=environment, cwd=folder)  # fmt: skip
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


def pythons(options: argparse.Namespace) -> dict[str, str]:
    """The interpreter of each side."""
    found = {"ours": sys.executable}
    if options.upstream:
        found["upstream"] = str(Path(options.upstream).expanduser().absolute())
    return found


def started(worker: str, settings: dict[str, Any], options: argparse.Namespace, folder: Path) -> dict[str, Side]:
    return {
        name: Side(name, python, worker, settings, folder, ours=name == "ours")
        for name, python in pythons(options).items()
    }


def model_of(options: argparse.Namespace) -> str:
    """The folder of the model that is asked for, or that of the demo."""
    if options.model is None:
        from trl.demo.model import demo_model

        return str(demo_model())
    return str(options.model)


def measured(
    worker: str, settings: dict[str, Any], options: argparse.Namespace, folder: Path
) -> tuple[dict[str, Side], dict[str, Any], dict[str, Any]]:
    """Both sides, what each says when it is ready, and at its end."""
    sides = started(worker, settings, options, folder)
    try:
        ready = {name: side.answer("ready") for name, side in sides.items()}
        return sides, ready, alternate(sides, options)
    finally:
        for side in sides.values():
            side.end()


def tell(report: dict[str, Any], show: Callable[[dict[str, Any]], None], options: argparse.Namespace) -> None:
    """Print the report, and write it where `--json` says."""
    show(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What both sides are told alike, whatever they train."""
    round_steps = (options.rounds + 1) * options.steps
    return {
        "layers": options.layers, "max_length": options.max_length, "batch_size": options.batch_size,
        "accumulation": options.accumulation, "steps": options.steps, "round_steps": round_steps,
        "total_steps": round_steps + (1 if options.profile else 0), "optim": options.optim, "seed": options.seed,
        "checkpointing": not options.no_checkpointing, "precision": options.precision, "device": options.device,
        "threads": options.threads, "lora": options.lora, "lora_r": options.lora_r, "profile": options.profile,
        "exact_memory": options.exact_memory,
    }  # fmt: skip


def alternate(
    sides: dict[str, Side], options: argparse.Namespace, before: Callable[[], None] = lambda: None
) -> dict[str, dict[str, Any]]:
    """Rounds in turn, the first a warm-up that is not kept; then what each side says at its end."""
    for number in range(options.rounds + 1):
        before()
        names = list(sides) if number % 2 else list(sides)[::-1]
        for name in names:
            found = sides[name].round()
            if number:
                sides[name].rounds.append(found)
        if number and not options.quiet:
            print(f"round {number}: " + ", ".join(f"{name} {side.rounds[-1]['seconds']:.2f} s"
                  for name, side in sides.items()), file=sys.stderr, flush=True)  # fmt: skip
    # One at a time: the last step may be profiled.
    ends = {}
    for name, side in sides.items():
        side.ask("finish")
        ends[name] = side.answer("finish")
    return ends


def side_report(side: Side, ready: dict[str, Any], end: dict[str, Any], tokens: int) -> dict[str, Any]:
    """What was measured of a side; `tokens` is what it would compute at least, in all measured rounds."""
    seconds = [found["seconds"] for found in side.rounds]
    positions = sum(found["positions"] for found in side.rounds)
    return {
        **{key: ready[key] for key in ("versions", "threads", "device", "attention", "trained_parameters")},
        "seconds": seconds,
        "cpu_seconds": [found["cpu_seconds"] for found in side.rounds],
        "median": statistics.median(seconds),
        "tokens_per_second": tokens / sum(seconds),
        "positions": positions,
        "efficiency": tokens / positions,
        "growth": end["growth"],
        "growth_how": end["how"],
        "losses": end["losses"],
        "profile": end["profile"],
        "built_in": ready["built_in"],
    }


def compare(report: dict[str, Any], losses: bool = True) -> None:
    """Put into the report how the sides compare, if there are two."""
    if "upstream" not in report["sides"]:
        return
    ours, upstream, state = report["sides"]["ours"], report["sides"]["upstream"], report["state"]
    ratios = [u / o for o, u in zip(ours["seconds"], upstream["seconds"], strict=True)]
    report["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    report["cpu_ratio"] = sum(upstream["cpu_seconds"]) / sum(ours["cpu_seconds"])
    report["memory_ratio"] = ours["growth"] / upstream["growth"]
    report["memory_ratio_without_state"] = (ours["growth"] - state) / max(1, upstream["growth"] - state)
    if losses:
        pairs = zip(ours["losses"], upstream["losses"], strict=True)
        report["largest_loss_difference"] = max(abs(left - right) for left, right in pairs)


def show_model(report: dict[str, Any]) -> None:
    settings = report["settings"]
    layers = f", first {settings['layers']} layers" if settings["layers"] else ""
    what = f"LoRA r={settings['lora_r']} on all linear layers" if settings["lora"] else "all weights"
    print(f"model {report['model']}{layers}; {what}; checkpointing {'on' if settings['checkpointing'] else 'off'}; "
          f"{settings['precision']}; batches of {settings['batch_size']} × {settings['accumulation']}; "
          f"{settings['optim']}")  # fmt: skip


def show_sides(report: dict[str, Any]) -> None:
    for name, side in report["sides"].items():
        versions = ", ".join(f"{key} {value}" for key, value in side["versions"].items())
        print(f"{name}: {versions}; {side['device']}, {side['threads']} threads; attention {side['attention']}; "
              f"{side['trained_parameters']:,} weights train")  # fmt: skip


def show_table(report: dict[str, Any], rate: str, further: Sequence[Line] = (), after: Sequence[Line] = ()) -> None:
    """A column for each side; `rate` names tokens a second, `further` stands behind times, `after` behind positions."""
    sides, digits = report["sides"], report.get("digits", 2)
    lines: list[Line] = [
        ("seconds a round (median)", lambda side: f"{side['median']:.2f}"),
        ("  least – greatest", lambda side: f"{min(side['seconds']):.2f} – {max(side['seconds']):.2f}"),
        ("processor seconds a round", lambda side: f"{statistics.median(side['cpu_seconds']):.2f}"),
        (rate, lambda side: f"{side['tokens_per_second']:,.0f}"),
        *further,
        ("memory growth, GiB", lambda side: f"{side['growth'] / GIB:.2f}"),
        ("  without optimizer state", lambda side: f"{(side['growth'] - report['state']) / GIB:.2f}"),
        ("positions computed", lambda side: f"{side['positions']:,}"),
        *after,
        ("unique-token efficiency", lambda side: f"{side['efficiency']:.{digits}f}"),
        ("first loss", lambda side: f"{side['losses'][0]:.4f}"),
        ("last loss", lambda side: f"{side['losses'][-1]:.4f}"),
    ]
    print(f"{'':28}" + "".join(f"{name:>18}" for name in sides))
    for label, value in lines:
        print(f"{label:28}" + "".join(f"{value(side):>18}" for side in sides.values()))


def show_comparison(report: dict[str, Any]) -> None:
    sides = report["sides"]
    if "ratio" in report:
        ratio = report["ratio"]
        print(f"\ntime      upstream / ours  {ratio['median']:.2f}× (rounds {ratio['min']:.2f} – {ratio['max']:.2f}); "
              f"processor time {report['cpu_ratio']:.2f}×")  # fmt: skip
        print(f"memory    ours / upstream  {report['memory_ratio']:.2f}×, without optimizer state "
              f"{report['memory_ratio_without_state']:.2f}×")  # fmt: skip
        if "largest_loss_difference" in report:
            print(f"loss      largest difference over {len(sides['ours']['losses'])} steps  "
                  f"{report['largest_loss_difference']:.1e}")  # fmt: skip
    digits = 4 if report.get("digits", 2) < 3 else 6
    for name, side in sides.items():
        print(f"losses {name}: " + " ".join(f"{loss:.{digits}f}" for loss in side["losses"]))
    for name, side in sides.items():
        if side["profile"]:
            print(f"\nprofile of one step, {name}\n{side['profile']}")


def add_options(parser: argparse.ArgumentParser, *, batch_size: int, steps: int, rounds: int) -> None:
    """Options that mean the same in every benchmark."""
    parser.add_argument("--upstream", metavar="PYTHON", help="interpreter of an environment with TRL 1.16")
    parser.add_argument("--model", help="folder of a model (default: the demo's)")
    parser.add_argument("--layers", type=int, help="keep this many layers of the model")
    parser.add_argument("--lora", action="store_true", help="train an adapter on all linear layers")
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--no-checkpointing", action="store_true", help="keep activations instead of recomputing")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast, fp32 weights")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps a round")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--optim", default="adamw_torch_fused")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--exact-memory", action="store_true",
                        help="CPU: freed memory goes back to the system at once on both sides: memory growth is what "
                             "training holds, not what the allocator keeps; slower")  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="profile one more step of each side")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--quiet", action="store_true", help="no line after each round")
