"""The plan of a training command, by its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl.cli import UsageError, launch


def planned(method: str, script: Any, model: Any, args: Any, elsewhere: Mapping[str, Any], **about: Any) -> Any:
    """The plan of a training command by its options; `about` are further arguments of `plan.reading.run_of`."""
    from trl.models.adapters import lora_config
    from trl.plan import plan
    from trl.plan.reading import config_of, quantised, run_of
    from trl.plan.run import TAUGHT
    from trl.rewards.named import is_function

    config = config_of(model.model_name_or_path, trust_remote_code=model.trust_remote_code)
    bits, nested = quantised(config)
    if model.load_in_4bit and model.load_in_8bit:
        raise UsageError("load_in_4bit and load_in_8bit are both set: choose one.")
    if model.load_in_4bit or model.load_in_8bit:
        bits, nested = 4 if model.load_in_4bit else 8, model.use_bnb_nested_quant
    if bits and not model.use_peft:
        raise UsageError("the model is quantised, and rounded weights cannot be trained: --use_peft trains an adapter.")
    processes = int(elsewhere.get("num_processes", 1))
    if processes < 1:
        raise UsageError(f"--num_processes: {processes} is too few.")
    judges = [getattr(script, "reward_model_name_or_path", None), *(getattr(script, "reward_funcs", None) or ())]
    judges = [each for each in judges if each and not is_function(each) and "://" not in each]
    teacher = getattr(args, "teacher_model_name_or_path", None)
    run = run_of(
        method,
        config,
        args,
        adapter=lora_config(model),
        dtype=model.dtype,
        bits=bits,
        nested=nested,
        teacher=config_of(teacher) if teacher else None,
        frozen=tuple(map(config_of, judges)),
        processes=processes,
        sharding=_sharding(elsewhere),
        **about,
    )
    found = plan(run)
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    if window and (getattr(args, "max_length", None) or 0) > window:
        found.notes.append(f"rows are planned with {window:,} tokens at most, the model's window; max_length is more")
    if getattr(config, "quantization_config", None) and not bits:
        found.notes.append(f"the checkpoint is quantised in a format that is planned as {run.dtype} weights")
    if method in TAUGHT and not teacher:
        found.notes.append("no teacher is counted: --teacher_model_name_or_path names it")
    return found


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
