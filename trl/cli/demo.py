"""`trl demo`: the whole job on a small real model, offline, on whatever machine this is.

SmolLM2-135M-Instruct learns to turn an order, phrased as people phrase it, into one line of JSON. It cannot do so
before; the rows it is judged on hold customers and orders that it never saw in training. Then it learns from pairs, of
a right ticket and one with a mistake, to keep the two apart. Last it learns from its own tickets and how right they are
what nobody showed it: to hear out who changes an order.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from trl.cli import hide_library_notes
from trl.demo.stages import FULL, QUICK, dpo, grpo, quiet, sft


def run(argv: Sequence[str], command: str) -> int:
    parser = argparse.ArgumentParser(
        prog=f"trl {command}",
        description="Train SmolLM2-135M-Instruct on this machine, offline, and see what it learned: about "
        f"{FULL.minutes} on two processor cores. The exit status is 1 if it did not learn.",
    )
    parser.add_argument("--output_dir", default="trl-demo", help="where everything is written [trl-demo]")
    parser.add_argument("--quick", action="store_true", help="a sixth of the steps: a check that everything works")
    parser.add_argument("--seed", type=int, default=0, help="for the rows, the adapter and their order [0]")
    options = parser.parse_args(argv)
    size = QUICK if options.quick else FULL
    started = time.perf_counter()
    print(
        f"This teaches a language model of 135 million parameters to write orders as tickets, in {size.steps} steps,\n"
        f"in {size.preference_steps} more to prefer right ones to those with a mistake, and in {size.reward_steps} to "
        "follow changes of an order,\nby reward alone.\n"
        f"About {size.minutes} on two idle processor cores; nothing is downloaded.\n"
    )
    # Waiting threads sleep instead of spinning: a tenth slower on an idle machine, far faster on one that does
    # something else as well. Read when torch is loaded, which has not happened yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    hide_library_notes()
    quiet()
    folder = Path(options.output_dir)
    learned = all(stage(size, folder, options.seed) for stage in (sft, dpo, grpo))
    print(f"\nTook {time.perf_counter() - started:.0f} seconds.")
    return 0 if learned else 1
