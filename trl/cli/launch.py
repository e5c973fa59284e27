"""Several processes: with options of `accelerate launch`, a command restarts itself through that launcher.

The command parses its own options first, so that an error in them is reported once, before anything starts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from trl.cli import UsageError, nearest

# Tells a command that a launcher has started it, so that it does not start another.
LAUNCHED = "TRL_LAUNCHED"
# Options of the launcher that the command sets itself.
RESERVED = {
    "help",
    "module",
    "no_python",
    "training_script",
    "training_script_args",
    "debug",
    "env",
    "vm",
    "config_file",
}
# Options that `torch.distributed.run` has too. Without an accelerator, `accelerate launch` starts only one process.
PLAIN = {
    *("cpu", "mixed_precision", "multi_gpu", "num_processes", "num_machines", "machine_rank"),
    *("main_process_ip", "main_process_port", "same_network"),
}


@cache
def options() -> Mapping[str, bool]:
    """The options of `accelerate launch` that are accepted, and whether each takes a value."""
    from accelerate.commands.launch import launch_command_parser

    known = {"accelerate_config": True}
    for action in launch_command_parser()._actions:
        for flag in action.option_strings:
            name = flag[2:].replace("-", "_")
            if flag.startswith("--") and action.dest not in RESERVED:
                known[name] = action.nargs != 0
    return known


def launched() -> bool:
    return LAUNCHED in os.environ or "LOCAL_RANK" in os.environ


def relaunch(command: str, argv: Sequence[str], settings: Mapping[str, Any], values: Mapping[str, Any]) -> int:
    """Start `trl <command> <argv>` in the processes that `settings` describe; return the exit status."""
    settings = {name: value for name, value in settings.items() if value not in (None, False)}
    child = ["-m", "trl.cli.main", command, *argv, *_for_the_trainer(settings, values)]
    environment = {**os.environ, LAUNCHED: "1"}
    written = None
    try:
        if _on_processors_alone(settings):
            count = _whole(settings, "num_processes")
            local = count // _whole(settings, "num_machines")
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local)))
            line = [*_torch_run(settings, local), *child]
        else:
            name = settings.get("accelerate_config")
            if name is not None:
                settings["accelerate_config"] = path = config_file(str(name))
                written = path if path != name else None
            line = [*_accelerate(settings), *child]
        return _wait([sys.executable, *line], environment)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_go_on(str(values.get("output_dir", "trainer_output")))) from None
    finally:
        if written:
            os.unlink(written)


def _for_the_trainer(settings: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Options of the trainer that follow from those of the launcher, unless `values` sets them."""
    words = []
    precision = str(settings.get("mixed_precision", "")).lower()
    if precision in ("bf16", "fp16", "no") and not {"bf16", "fp16"} & values.keys():
        words += [f"--{name}={str(name == precision).lower()}" for name in ("bf16", "fp16")]
    if "cpu" in settings and "use_cpu" not in values:
        words.append("--use_cpu")
    return words


def _whole(settings: Mapping[str, Any], name: str, default: int = 1) -> int:
    try:
        number = int(settings.get(name, default))
    except (TypeError, ValueError):
        raise UsageError(f"--{name}: needs a whole number, not `{settings[name]}`") from None
    if number < 0 or (number == 0 and name.startswith("num_")):
        raise UsageError(f"--{name}: {number} is too few")
    return number


def _on_processors_alone(settings: Mapping[str, Any]) -> bool:
    import torch

    several = _whole(settings, "num_processes") > 1 and settings.keys() <= PLAIN
    return several and ("cpu" in settings or not torch.accelerator.is_available())


def _torch_run(settings: Mapping[str, Any], local: int) -> list[str]:
    line = ["-m", "torch.distributed.run", "--nproc_per_node", str(local)]
    machines = _whole(settings, "num_machines")
    if machines == 1 and "main_process_port" not in settings:
        return [*line, "--standalone"]
    address = settings.get("main_process_ip", "127.0.0.1")
    port = _whole(settings, "main_process_port", 29500)
    rank = _whole(settings, "machine_rank", 0)
    line += ["--nnodes", str(machines), "--node_rank", str(rank)]
    return [*line, "--master_addr", str(address), "--master_port", str(port)]


def _accelerate(settings: Mapping[str, Any]) -> list[str]:
    line = ["-m", "accelerate.commands.launch"]
    takes_value = options()
    for name, value in settings.items():
        flag = "--config_file" if name == "accelerate_config" else f"--{name}"
        line += [flag, str(value)] if takes_value[name] else [flag]
    return line


def _wait(line: Sequence[str], environment: Mapping[str, str]) -> int:
    sys.stdout.flush()
    process = subprocess.Popen(line, env=dict(environment))
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:  # the launcher is interrupted too, and gives its processes time to end
        try:
            process.wait()
        except KeyboardInterrupt:
            _kill(process.pid)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _kill(pid: int) -> None:
    """Kill a process and all its children."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        # The parent first, since it would restart its children.
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def how_to_go_on(output_dir: str) -> str:
    """A sentence that names the newest checkpoint of an interrupted run and how to resume from it."""
    from trl import checkpoint

    found = [each for each in checkpoint.checkpoints(Path(output_dir)) if checkpoint.problem(each) is None]
    if not found:
        return f"{output_dir} holds no checkpoint yet: --save_steps sets how often one is written."
    newest = max(found, key=lambda each: (checkpoint.started(each), checkpoint.step(each)))
    return (
        f"The newest checkpoint is {newest}, of step {checkpoint.step(newest)}; the same command with "
        "--resume_from_checkpoint resumes from it."
    )


# --- configurations by name -----------------------------------------------------------------------------------------


def _deepspeed(stage: int) -> dict[str, Any]:
    return {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "deepspeed_multinode_launcher": "standard",
            "offload_optimizer_device": "none",
            "offload_param_device": "none",
            "zero_stage": stage,
            "zero3_init_flag": stage == 3,
            "zero3_save_16bit_model": stage == 3,
        },
    }


def _sharded(version: int, **more: Any) -> dict[str, Any]:
    return {
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": version,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_cpu_ram_efficient_loading": True,
            "fsdp_offload_params": False,
            # Whole weights, so that the saved model opens in one process.
            "fsdp_state_dict_type": "FULL_STATE_DICT",
            **more,
        },
    }


PRESETS: dict[str, dict[str, Any]] = {
    "single_gpu": {"distributed_type": "NO"},
    "multi_gpu": {"distributed_type": "MULTI_GPU"},
    "zero1": _deepspeed(1),
    "zero2": _deepspeed(2),
    "zero3": _deepspeed(3),
    "fsdp1": _sharded(
        1,
        fsdp_sharding_strategy="FULL_SHARD",
        fsdp_backward_prefetch="BACKWARD_PRE",
        fsdp_use_orig_params=True,
        fsdp_sync_module_states=True,
    ),
    "fsdp2": _sharded(2, fsdp_reshard_after_forward=True),
}


def config_file(name: str) -> str:
    """The file for `--accelerate_config`; a preset is written to a temporary file, for all GPUs. Raises UsageError."""
    if Path(name).expanduser().is_file():
        return str(Path(name).expanduser())
    if name not in PRESETS:
        raise UsageError(
            f"--accelerate_config: {name} is neither a file nor one of {', '.join(PRESETS)}{nearest(name, PRESETS)}"
        )
    import torch
    import yaml

    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 1
    content = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "bf16" if torch.accelerator.is_available() else "no",
        "num_machines": 1,
        "num_processes": 1 if name == "single_gpu" else max(1, devices),
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
        **PRESETS[name],
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", prefix=f"{name}-", delete=False, encoding="utf-8") as file:
        yaml.safe_dump(content, file)
    return file.name
