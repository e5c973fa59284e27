"""Faster matrix products on a CPU, in two cases.

Few rows, as in decoding: PyTorch multiplies fp32 matrices with MKL, but oneDNN, which it ships too, is faster if one
matrix has few rows. Decoding steps of 4 to 64 rows were 1.14 to 1.20 times as fast (135M parameters, an AMD processor
with AVX-512).

Half precision on a processor without instructions for it: PyTorch's own products are up to a hundred times slower than
in fp32. Products of fp32 copies are as exact, since kernels for bfloat16 also sum in fp32 and round once at the end. A
training step of a 135M model's first two layers took 3.1 s instead of 43.6 s (a processor with AVX2 only).
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trl.models.compiled import uncompiled

# oneDNN compiles and caches code for each number of rows, so rows are padded to a multiple of STEP, up to MOST.
STEP, MOST = 8, 64
HALF = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """Within the context, without gradients, the model's plain linear layers multiply few rows with oneDNN.

    Where a CPU has no instructions for half precision, products are those of `half_products`, with fp32 copies of the
    weights that are made once and kept for the length of the context: twice the memory of the weights more.
    Parts that `torch_compile` has compiled run as they are.

    Results are equal up to rounding. Other layers (such as quantised ones), dtypes, devices and builds of PyTorch are
    not affected.
    """
    changed = [each for each in model.modules() if isinstance(each, nn.Linear) and _may_change(each)]
    for module in changed:
        module.forward = _Forward(module)  # type: ignore[method-assign, assignment]
    try:
        with uncompiled(model) if changed else contextlib.nullcontext():
            yield
    finally:
        for module in changed:
            del module.forward


@functools.cache
def _is_there() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _may_change(module: nn.Linear) -> bool:
    """Whether oneDNN may serve this layer. Checked once, so that other layers keep their own forward."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and module.weight.device.type == "cpu"
        and (module.weight.dtype == torch.float32 or module.weight.dtype in HALF)
    )


class _Forward:
    """The forward pass of one layer, `x` [..., in features] to [..., out features]."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self.copied: list[Any] = []  # what the copy was made of
        self.copy: tuple[Tensor, Tensor | None]

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.module.weight, self.module.bias
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else weight.dtype
        # Sharded weights are whole by now, or are nothing that oneDNN knows.
        plain = type(weight) is nn.Parameter and not torch.is_grad_enabled() and (autocast or x.dtype == dtype)
        if not plain:
            return F.linear(x, weight, bias)
        if dtype in HALF and not _has_half_products() and not torch.compiler.is_compiling():
            with torch.autocast("cpu", enabled=False):
                return product(x.to(dtype).float(), *self._in_float32(dtype)).to(dtype)
        return F.linear(x, weight, bias) if autocast else product(x, weight, bias)

    def _in_float32(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Copies of the weight and the bias as they are in `dtype`, made anew where either has changed."""
        weight, bias = self.module.weight, self.module.bias
        now = [dtype, *((id(each), each._version) for each in (weight, bias) if each is not None)]
        if self.copied != now:
            self.copy = weight.to(dtype).float(), None if bias is None else bias.to(dtype).float()
            self.copied = now
        return self.copy


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, on a CPU by oneDNN where `x` has few rows in float32. Without gradients."""
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or x.dtype != torch.float32 or not _is_there() or not 0 < rows <= MOST:
        return F.linear(x, weight, bias)
    padded = F.pad(x.reshape(rows, -1), (0, 0, 0, -rows % STEP))
    found = torch.ops.mkldnn._linear_pointwise(padded, weight, bias, "none", [], "")
    return found[:rows].view(*x.shape[:-1], -1)


def half_products(device: torch.device, half: bool) -> contextlib.AbstractContextManager[object]:
    """Within the context, products of half-precision matrices are computed in fp32 and rounded, forward and backward.

    Does nothing unless `half` is true (there are such matrices) and `device` is a CPU without instructions for them.
    """
    return _HalfProducts() if half and device.type == "cpu" and not _has_half_products() else contextlib.nullcontext()


@functools.cache
def _has_half_products() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _HalfProducts(TorchDispatchMode):
    PRODUCTS = frozenset(
        getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "addmv", "mv")
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        dtype = args[-1].dtype if func in self.PRODUCTS else None
        if dtype not in HALF:
            return func(*args, **(kwargs or {}))
        found = func(*(each.float() for each in args), **(kwargs or {}))
        return args[0].copy_(found) if func is torch.ops.aten.addmm_.default else found.to(dtype)
