"""Attention with score caps or sinks: a block of queries at a time against all scores at once.

    python benchmarks/attention.py [--lengths 1024 2048 4096] [--heads 16 8] [--size 128]

One layer, one sequence, forward and backward in float32 on the CPU. Each case runs in a process of its own, so that its
highest resident memory is its own; what a process holds before is taken off. Time is the best of the rounds.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

KINDS = {
    "softcap": {"softcap": 50.0},
    "sinks": {"sinks": True},
    "softcap, window 512": {"softcap": 50.0, "window": 512},
}


def highest() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def measured(way: str, kind: str, length: int, heads: list[int], size: int, rounds: int) -> dict[str, float]:
    import torch

    from trl.engine import blocks

    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, count, length, size, generator=generator).requires_grad_()
        for count in (heads[0], *heads[1:] * 2)
    )
    settings = dict(KINDS[kind])
    sinks = torch.randn(heads[0], generator=generator).requires_grad_() if settings.pop("sinks", False) else None
    scoring = blocks.Scoring(size**-0.5, sinks=sinks, **settings)
    function = {"blocks": blocks.attend, "at once": blocks.written_out}[way]
    function(*(each[:, :, :8] for each in (query, key, value)), None, scoring).sum().backward()  # a warm-up
    before, best = highest(), float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        function(query, key, value, None, scoring).sum().backward()
        best = min(best, time.perf_counter() - started)
    return {"growth": highest() - before, "seconds": best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--heads", type=int, nargs=2, default=[16, 8], help="of queries, and of keys")
    parser.add_argument("--size", type=int, default=128, help="of a head")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--case", nargs=3, metavar=("WAY", "KIND", "LENGTH"), help="one case, as JSON")
    options = parser.parse_args()
    if options.case:
        way, kind, length = options.case
        print(json.dumps(measured(way, kind, int(length), options.heads, options.size, options.rounds)))
        return
    print("| tokens | | MiB, at once : blocks | blocks ÷ at once | seconds, at once : blocks | at once ÷ blocks |")
    print("|---|---|---|---|---|---|")
    for length in options.lengths:
        for kind in KINDS:
            found = []
            for way in ("at once", "blocks"):
                command = [sys.executable, __file__, *sys.argv[1:], "--case", way, kind, str(length)]
                found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            plain, ours = found
            print(
                f"| {length:,} | {kind} | {plain['growth'] / 2**20:,.0f} : {ours['growth'] / 2**20:,.0f} "
                f"| {ours['growth'] / plain['growth']:.3f} | {plain['seconds']:.2f} : {ours['seconds']:.2f} "
                f"| {plain['seconds'] / ours['seconds']:.1f}× |",
                flush=True,
            )


if __name__ == "__main__":
    main()
