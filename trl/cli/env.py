"""`trl env`: versions and devices, for a bug report."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import trl
from trl.cli import CommandParser

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "tokenizers",
    "peft",
    "bitsandbytes",
    "safetensors",
    "numpy",
    "deepspeed",
    "liger-kernel",
    "vllm",
    "gguf",
)


def run(argv: Sequence[str], command: str) -> int:
    description = "Prints versions and devices, to paste into a bug report."
    CommandParser(f"trl {command}", description, "example:\n  trl env").parse_args(argv)
    for name, value in facts():
        print(f"- {name}: {value}")
    return 0


def facts() -> Iterator[tuple[str, str]]:
    yield "trl", f"{trl.__version__} ({Path(trl.__file__).parent})"
    yield "Platform", platform.platform()
    yield "Python", sys.version.split()[0]
    for package in PACKAGES:
        yield package, _version(package)
    yield from _devices()
    yield "Processor cores", str(os.cpu_count())
    yield "Accelerate config", _accelerate_config()
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith("TRL_")}
    settings |= {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS") if name in os.environ}
    yield "Settings", ", ".join(f"{name}={value}" for name, value in settings.items()) or "none"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> Iterator[tuple[str, str]]:
    try:
        import torch
    except ImportError as error:
        yield "Devices", f"unknown: torch does not load ({error})"
        return
    if not torch.accelerator.is_available():
        yield "Devices", "cpu"
    elif torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield "Devices", ", ".join(names)
        yield "CUDA", f"{torch.version.cuda or torch.version.hip} (bfloat16: {torch.cuda.is_bf16_supported()})"
    else:
        yield "Devices", f"{torch.accelerator.device_count()} x {torch.accelerator.current_accelerator()}"


def _accelerate_config() -> str:
    """The settings of `accelerate config` on one line, or "none"."""
    cache = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    path = Path(cache).expanduser() / "accelerate" / "default_config.yaml"
    if not path.is_file():
        return "none"
    import yaml

    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return f"{path} cannot be read as YAML"
    return ", ".join(f"{name}: {value}" for name, value in sorted(content.items())) if content else "empty"
