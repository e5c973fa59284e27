"""Runs an example as a user types it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def quick(script: str, model: str, folder: Path) -> str:
    """What `examples/<script> --quick` prints; the example writes into `folder`."""
    done = subprocess.run(
        [sys.executable, f"examples/{script}", "--quick", "--model_name_or_path", model, "--output_dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
