"""The plan of a training command, and `--auto`: the command sets what fits the device by it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from trl.cli import UsageError, launch


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
    if not changed.fits():
        said = list(found.advice())
        return {}, f"auto: {'; '.join(said[:2])}"
    if not options:
        return {}, f"auto: the run fits as it is, {peak}"
    named = ", ".join(f"{name}={value}" for name, value in options.items())
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


def planned(method: str, script: Any, model: Any, args: Any, elsewhere: Mapping[str, Any], **about: Any) -> Any:
    """The plan of a training command by its options; `about` are further arguments of `plan.reading.run_of`."""
    from trl.models.adapters import lora_config
    from trl.plan import plan
    from trl.plan.reading import config_of, run_of

    judge = getattr(script, "reward_model_name_or_path", None)
    teacher = getattr(args, "teacher_model_name_or_path", None)
    run = run_of(
        method,
        config_of(model.model_name_or_path, trust_remote_code=model.trust_remote_code),
        args,
        adapter=lora_config(model),
        dtype=model.dtype,
        bits=4 if model.load_in_4bit else 8 if model.load_in_8bit else 0,
        nested=model.use_bnb_nested_quant,
        teacher=config_of(teacher) if teacher else None,
        frozen=(config_of(judge),) if judge else (),
        processes=int(elsewhere.get("num_processes", 1)),
        sharding=_sharding(elsewhere),
        **about,
    )
    return plan(run)


def _sharding(elsewhere: Mapping[str, Any]) -> str:
    """What the launcher's options divide among processes."""
    name = str(elsewhere.get("accelerate_config", ""))
    found = next((each for each in ("zero1", "zero2", "zero3", "fsdp2") if each in name.replace("_", "")), None)
    stage = elsewhere.get("zero_stage")
    if found is None and stage is not None:
        return f"zero{stage}"
    if found is None and elsewhere.get("use_fsdp"):
        return "fsdp2"
    if found is None and name and name not in launch.PRESETS:
        from trl.cli.parser import read_yaml

        kind = str(read_yaml(name).get("distributed_type", "")).lower()
        return {"fsdp": "fsdp2", "deepspeed": "zero3"}.get(kind, "ddp")
    return found or "ddp"
