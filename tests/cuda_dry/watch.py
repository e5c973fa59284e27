"""What a dry run sees: waits of the host, the largest tensor, tensors that must not exist, the peak of memory."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Watch(TorchDispatchMode):
    """Counts while it is on. `longest` is the length of the longest sequence: no tensor may have two dimensions of at
    least that (`[T, T]`, `[N, V]`, `[H, L, L]`).

    A value that is read on the host raises an exception by itself under `FakeTensorMode`; a copy does not, and is
    counted here, in both directions.
    """

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest
        self.bytes = self.peak = self.largest = 0
        self.largest_shape: tuple[int, ...] = ()
        self.kernels = 0  # calls of the variable-length kernel
        self.waits: list[str] = []
        self.too_large: list[str] = []
        self.counts = False  # whether what runs now is a micro-batch or a decoding step
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        before, self.counts = self.counts, True
        try:
            yield
        finally:
            self.counts = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {id(each.untyped_storage()) for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)}
        found = func(*args, **kwargs)
        self.kernels += func is torch.ops.torch_attn._varlen_attn.default
        if self.counts:
            self._wait(func, args, kwargs, found)
        for each in tree_iter(found):
            if isinstance(each, Tensor) and each.is_cuda:
                each.constant = None  # a number on the device is not known on the host
                self._shape(func, each)
                if id(storage := each.untyped_storage()) not in given and storage not in self.seen:
                    self._add(storage)
        return found

    def _wait(self, func: Any, args: tuple, kwargs: dict[str, Any], found: Any) -> None:
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        if name == "lift_fresh" and found.is_cuda and found.numel():
            self.waits.append(f"torch.tensor(..., device) {_where()}")  # made on the host, then copied
        elif name == "_to_copy" and found.device != args[0].device and not kwargs.get("non_blocking"):
            self.waits.append(f"{args[0].device.type} -> {found.device.type} {_where()}")
        elif name == "copy_" and args[0].device != args[1].device and not (kwargs.get("non_blocking") or len(args) > 2):
            self.waits.append(f"{args[1].device.type} -> {args[0].device.type} {_where()}")

    def _shape(self, func: Any, tensor: Tensor) -> None:
        if tensor.numel() > self.largest:
            self.largest, self.largest_shape = tensor.numel(), tuple(tensor.shape)
        if sum(size >= self.longest for size in tensor.shape) > 1:
            self.too_large.append(f"{list(tensor.shape)} by {func} {_where()}")

    def _add(self, storage: Any) -> None:
        self.seen.add(storage)
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.bytes -= size


def _where() -> str:
    """The innermost line of the library that is running."""
    import traceback

    for frame in reversed(traceback.extract_stack()):
        if "/trl/" in frame.filename and "/tests/" not in frame.filename:
            return f"({frame.filename.rpartition('/trl/')[2]}:{frame.lineno})"
    return ""
