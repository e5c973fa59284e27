"""Whether optional packages are installed, under upstream's names `is_<package>_available`."""

import functools
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec


class TRLExperimentalWarning(UserWarning):
    """Upstream's warning about methods that may change. It is never raised here."""


def is_transformers_greater_than(current_version: str) -> bool:
    """Whether the installed transformers is newer than a version such as "4.57"."""
    from packaging.version import Version

    return Version(version("transformers")) > Version(current_version)


def _installed(package: str, min_version: str | None = None) -> bool:
    from packaging.version import Version

    if find_spec(package) is None:
        return False
    return min_version is None or Version(version(package)) >= Version(min_version)


def is_npu_available() -> bool:
    """Whether torch sees an Ascend NPU."""
    return _device("npu")


def is_xpu_available() -> bool:
    """Whether torch sees an Intel GPU."""
    return _device("xpu")


def _device(kind: str) -> bool:
    import torch

    device = getattr(torch, kind, None)
    return device is not None and bool(device.is_available())


_PACKAGES = {
    name: name
    for name in (
        *("aiohttp", "bitsandbytes", "deepspeed", "diffusers", "fastapi", "harbor", "jmespath", "joblib"),
        *("liger_kernel", "llm_blender", "math_verify", "mergekit", "openai", "openreward", "peft", "pydantic"),
        *("requests", "rich", "sklearn", "torchvision", "unsloth", "uvicorn", "vllm", "vllm_ascend", "wandb", "weave"),
    )
} | {"liger": "liger_kernel", "llmblender": "llm_blender", "pil": "PIL"}


@functools.cache
def __getattr__(name: str) -> Callable[..., bool]:
    package = name.removeprefix("is_").removesuffix("_available")
    if name != f"is_{package}_available" or package not in _PACKAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return functools.partial(_installed, _PACKAGES[package])
