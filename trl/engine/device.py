"""What the engine asks of a device before it chooses a way: its kind, and whether its cards have the kernel.

A plan runs the engine on tensors that have shapes and no values. They are on a CPU, because not every build of torch
knows the others: within `standing_for` they are taken for those of another kind of device.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch


class _Planned(NamedTuple):
    kind: str
    chunks: int | None


_planned: _Planned | None = None


@contextlib.contextmanager
def standing_for(kind: str, chunks: int | None = None) -> Iterator[None]:
    """Within the context, tensors without values stand for those of a kind of device; "cuda" is a card of Ampere or
    newer. A plain head computes the first `chunks` of its chunks alone, for all of them take the same memory."""
    global _planned
    before, _planned = _planned, _Planned(kind, chunks)
    try:
        yield
    finally:
        _planned = before


def kind_of(device: torch.device) -> str:
    """The kind of a device, such as "cpu" or "cuda"."""
    return device.type if _planned is None else _planned.kind


def most_chunks() -> int | None:
    """How many chunks a plain head computes; None: all."""
    return None if _planned is None else _planned.chunks


def of_kind(table: Mapping[str, int], kind: str) -> int:
    """The number of a kind of device, in a table that has a default."""
    return table.get(kind, table["default"])


def has_flash_attention(device: torch.device) -> bool:
    """Whether torch's variable-length kernel runs on this device."""
    return kind_of(device) == "cuda" and (_planned is not None or _card_serves(device))


@functools.cache
def _card_serves(device: torch.device) -> bool:
    # FlashAttention needs compute capability 8.0 (Ampere) or newer.
    return torch.cuda.get_device_capability(device) >= (8, 0)
