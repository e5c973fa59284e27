"""`--auto`: a training command sets what fits the device, by the plan of its run."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from trl.cli import UsageError


@dataclasses.dataclass
class AutoArguments:
    """What a training command sets by itself."""

    auto: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Set the size of micro-batches (and, if need be, checkpointing and offloading) by the plan of the "
            "run, so that it fits the device with the same gradient."
        },
    )
    gpu_memory: float | None = dataclasses.field(
        default=None, metadata={"help": "With auto: memory to fill, in GiB. Default: all of the device's."}
    )


def chosen(command: str, auto: AutoArguments, script: Any, model: Any, config: Any) -> tuple[dict[str, Any], str]:
    """Options that fit the device, by name, and a sentence that says so."""
    import torch

    from trl.cli.planned import planned
    from trl.plan import Card
    from trl.plan.advice import fitted

    if auto.gpu_memory is not None and auto.gpu_memory <= 0:
        raise UsageError(f"--gpu_memory: {auto.gpu_memory:g} is too small")
    on_gpu = torch.cuda.is_available() and not config.use_cpu
    room = auto.gpu_memory
    if room is None:
        room = _gpu_room() if on_gpu else _host_room()
    found = planned(command, script, model, config, _launched(), device="cuda" if on_gpu else "cpu")
    found.card = Card(room, 0.0, 0.0)
    options, changed = fitted(found)
    peak = f"{changed.peak.total / 2**30:.2f} GiB expected at most, of {room:.1f} GiB"
    named = ", ".join(f"{name}={value}" for name, value in options.items())
    if not changed.fits():
        least = f"{named}, the least that a step can take" if options else "nothing can be changed"
        return options, f"auto: {least}: {'; '.join(changed.advice())}"
    if not options:
        return {}, f"auto: the run fits as it is, {peak}"
    return options, f"auto: {named} (the gradient is the same); {peak}"


def _launched() -> dict[str, Any]:
    """The processes of this run and what is divided among them, as the launcher's options say it."""
    found: dict[str, Any] = {"num_processes": int(os.environ.get("WORLD_SIZE", "1"))}
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        found["use_fsdp"] = True
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        found["zero_stage"] = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    return found


def _gpu_room() -> float:
    import torch

    return float(torch.cuda.mem_get_info()[1]) / 2**30


def _host_room() -> float:
    import psutil

    return float(psutil.virtual_memory().available) / 2**30
