"""`trl demo`: three training stages on a small real model, offline, on any machine.

SmolLM2-135M-Instruct learns to turn an order in natural language into one line of JSON, a ticket. The held-out rows
have customers and orders that training never shows. Then it learns from pairs of a right ticket and one with a mistake.
Last, it learns by reward alone to follow a change of the order, which no example shows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from trl.cli import CommandParser, check_folder, hide_library_notes, numbers
from trl.demo.stages import FULL, QUICK, dpo, grpo, quiet, sft
from trl.options import LIMITS


def run(argv: Sequence[str], command: str) -> int:
    parser = CommandParser(
        f"trl {command}",
        "Trains SmolLM2-135M-Instruct on this machine, offline, and evaluates it: about "
        f"{FULL.minutes} on two processor cores.\nThe exit status is 1 if it did not learn.",
        "example:\n  trl demo --quick --output_dir trl-demo",
    )
    parser.add_argument("--output_dir", default="trl-demo", help="folder for all output [trl-demo]")
    parser.add_argument("--quick", action="store_true", help="a sixth of the steps, to check that everything works")
    parser.add_argument(
        "--seed",
        type=numbers(LIMITS["seed"]),
        default=0,
        help="random seed of the rows, their order and the adapter [0]",
    )
    options = parser.parse_args(argv)
    check_folder(options.output_dir)
    size = QUICK if options.quick else FULL
    started = time.perf_counter()
    print(
        f"This teaches a language model of 135 million parameters to write orders as tickets, in {size.steps} steps,\n"
        f"in {size.preference_steps} more to prefer right ones to those with a mistake, and in {size.reward_steps} to "
        "follow changes of an order,\nby reward alone.\n"
        f"About {size.minutes} on two idle processor cores; nothing is downloaded.\n"
    )
    # Waiting threads sleep instead of spinning: a tenth slower on an idle machine, far faster on a busy one. Set
    # before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    hide_library_notes()
    quiet()
    folder = Path(options.output_dir)
    learned = all(stage(size, folder, options.seed) for stage in (sft, dpo, grpo))
    print(f"\nTook {time.perf_counter() - started:.0f} seconds.")
    return 0 if learned else 1
