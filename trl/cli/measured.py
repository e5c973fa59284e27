"""`trl plan --measure`: how fast a run is on this machine, by three of its steps."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from trl.cli import UsageError

STEPS = 3
OWN = {
    "max_steps": str(STEPS), "logging_steps": "1", "save_strategy": "no", "eval_strategy": "no", "report_to": "none",
    "disable_tqdm": "true",
}  # fmt: skip


def tokens_per_second(method: str, argv: Sequence[str], values: Mapping[str, Any]) -> float:
    """Tokens that a process trains on in a second: the mean of all steps but the first, which starts everything up.
    The training command runs in a process of its own and leaves nothing behind. Raises UsageError where it fails."""
    if not values.get("dataset_name") and not values.get("datasets"):
        raise UsageError("--measure trains three steps, so that it needs --dataset_name (and a model with weights).")
    with tempfile.TemporaryDirectory() as folder:
        own = [word for name, value in {**OWN, "output_dir": folder}.items() for word in (f"--{name}", value)]
        done = subprocess.run(
            [sys.executable, "-m", "trl.cli.main", method, *argv, *own], capture_output=True, text=True
        )
    rates = [float(each) for each in re.findall(r"tokens_per_second=([0-9.e+]+)", done.stdout)]
    if done.returncode or len(rates) < 2:
        lines = (done.stderr or done.stdout).strip().splitlines()
        words = [line for line in lines if not line.startswith("(TRL_DEBUG")]
        raise UsageError(f"--measure: the run of three steps failed: {words[-1] if words else 'it said nothing'}")
    return sum(rates[1:]) / len(rates[1:])
