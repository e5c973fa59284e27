"""Runs a worker of these tests as several gloo processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(worker, *arguments, ranks=2, timeout=500):
    """Run the file of `worker`, a module, with `arguments` in `ranks` processes. Returns the completed launcher."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
         "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", worker.__file__,
         *map(str, arguments)],
        env={**environment, "PYTHONFAULTHANDLER": "1"}, cwd=ROOT, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def launch(worker, *arguments, ranks=2, timeout=500):
    """As `run`, and assert that it exits with 0. A failure shows what the processes printed."""
    done = run(worker, *arguments, ranks=ranks, timeout=timeout)
    said = done.stderr.split("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")[0]
    assert done.returncode == 0, said[-8000:]
