"""Whether optional packages are installed, under upstream's names `is_<package>_available`."""

import functools
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


class TRLExperimentalWarning(UserWarning):
    """Upstream's warning about methods that may change. It is never raised here."""


def is_transformers_greater_than(current_version: str) -> bool:
    """Whether the installed transformers is newer than a version such as "4.57"."""
    return is_package_greater_than("transformers", current_version)


def is_package_greater_than(package: str, current_version: str) -> bool:
    """Whether an installed package is newer than a version; False if it is not installed."""
    from packaging.version import Version

    try:
        return Version(version(package)) > Version(current_version)
    except PackageNotFoundError:
        return False


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
def __getattr__(name: str) -> Callable[[], bool]:
    package = name.removeprefix("is_").removesuffix("_available")
    if name != f"is_{package}_available" or package not in _PACKAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lambda: find_spec(_PACKAGES[package]) is not None
