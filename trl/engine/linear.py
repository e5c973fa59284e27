"""Matrix products on a CPU that PyTorch has a faster way for than the one it takes.

Few rows, as when tokens are drawn one by one: PyTorch multiplies fp32 matrices with MKL; oneDNN, which it ships as
well, is faster where one of the two has few rows. Decoding steps of 4 to 64 rows were 1.14 to 1.20 times as fast (135M
parameters, an AMD processor with AVX-512).

Half precision on a processor without instructions for it: PyTorch's own products are up to a hundred times as slow as
those of fp32. Products of fp32 copies are as exact, since kernels for bfloat16 sum in fp32 too, and round once at the
end. A training step of a 135M model's first two layers took 3.1 s instead of 43.6 s (a processor with AVX2 alone).
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# oneDNN compiles and keeps code for each number of rows. There are few of them: a multiple of STEP, and MOST at most.
STEP, MOST = 8, 64


@contextlib.contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """Within, and without gradients, the model's plain linear layers multiply few rows by oneDNN.

    The numbers are the same up to rounding. Nothing changes for other layers (quantised ones, say), dtypes, devices and
    builds of PyTorch.
    """
    changed = [each for each in model.modules() if isinstance(each, nn.Linear) and _may_change(each)]
    for module in changed:
        module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in changed:
            del module.forward


@functools.cache
def _is_there() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _may_change(module: nn.Linear) -> bool:
    """Asked once, so that layers on an accelerator keep a forward pass without a detour."""
    return (
        _is_there()
        and type(module) is nn.Linear
        and "forward" not in vars(module)
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
    )


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    """`x` [..., in features] to [..., out features]."""
    rows = x.numel() // x.shape[-1]
    weight = module.weight
    # Sharded weights are whole by now, or are nothing that oneDNN knows.
    plain = type(weight) is nn.Parameter and weight.dtype == x.dtype == torch.float32
    if not plain or not 0 < rows <= MOST or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, module.bias)
    padded = F.pad(x.reshape(rows, -1), (0, 0, 0, -rows % STEP))
    found = torch.ops.mkldnn._linear_pointwise(padded, weight, module.bias, "none", [], "")
    return found[:rows].view(*x.shape[:-1], -1)


def half_products(device: torch.device, half: bool) -> contextlib.AbstractContextManager[object]:
    """Within, forward and backward, products of half-precision matrices are taken in fp32 and rounded.

    Does nothing unless `half` says that there are such matrices, and `device` is a CPU without instructions for them.
    """
    return _HalfProducts() if half and device.type == "cpu" and not _has_half_products() else contextlib.nullcontext()


@functools.cache
def _has_half_products() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _HalfProducts(TorchDispatchMode):
    PRODUCTS = frozenset(
        getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv")
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        dtype = args[-1].dtype if func in self.PRODUCTS else None
        if dtype not in (torch.bfloat16, torch.float16):
            return func(*args, **(kwargs or {}))
        return func(*(each.float() for each in args), **(kwargs or {})).to(dtype)
