"""The plan of a training command, by its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl.cli import launch


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
