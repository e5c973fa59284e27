"""Whether two models agree: their outputs for the same few rows of tokens."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trl.models.unwrap import evaluating

ROWS, LENGTH = 4, 32
# Largest gap between two computations of the same outputs, by the dtype that is computed in: sums are taken in another
# order. In float32 a gap is some 1e-6.
LARGEST = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def probe_rows(vocabulary: int, more: Iterable[int] = ()) -> Tensor:
    """Rows of token ids to compare models on, [R, T]: drawn from the vocabulary with a fixed seed. The last row holds
    the tokens with the highest ids and those in `more`."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocabulary, (ROWS + 1, LENGTH), generator=generator)
    last = [*sorted({each for each in more if each < vocabulary})[-LENGTH // 2 :]]
    last += range(max(0, vocabulary - (LENGTH - len(last))), vocabulary)
    rows[-1, : len(last)] = torch.tensor(last)
    return rows


@torch.no_grad()
def outputs(model: Any, rows: Tensor) -> Tensor:
    """The model's logits for the rows, in float32 on the CPU: [R, T, V]; of a model that scores sequences, [R, labels].
    Rows are computed one by one, so that no padding token is needed."""
    device = next(model.parameters()).device
    with evaluating(model):
        found = [model(input_ids=row[None].to(device), use_cache=False).logits.float().cpu() for row in rows]
    return torch.cat(found)


def gap(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference of two outputs, relative to that of `other`; infinite where one of them is
    not a number, or the shapes differ."""
    if one.shape != other.shape or not (one.isfinite().all() and other.isfinite().all()):
        return float("inf")
    size = other.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return float((one - other).square().mean().sqrt() / size)
