"""What went wrong where a loss or a gradient is not a finite number."""

from typing import Any

import torch
from torch import nn


class NonFiniteError(ArithmeticError):
    """A loss or a gradient became NaN or infinite; the weights were not touched by it."""


def what_is_not_finite(trainer: Any, model: nn.Module) -> str:
    """The rows, or the first weight, whose numbers are not finite in the step under way, in a sentence."""
    where = f"step {trainer.state.global_step + 1}"
    remedy = "Lower the learning rate, prefer bf16 to fp16, or take the row out"
    batches = trainer.under_way.batches if trainer.under_way else ()
    bad = []
    with torch.no_grad():
        for batch in batches:
            batch = trainer._prepare_inputs(batch)
            sums_S = trainer.sums_of_sequences(model, batch)
            bad += batch["row_S"][~torch.isfinite(sums_S)].tolist()
    if bad:
        rows = ", ".join(map(str, sorted(set(bad))[:5]))
        what = trainer.numbers_of_sequences
        return f"{where}: the {what} of row {rows} are not finite. {remedy}. The weights are unchanged."
    names = [name for name, parameter in model.named_parameters()
             if parameter.grad is not None and not torch.isfinite(parameter.grad).all()]  # fmt: skip
    all_rows = sorted({row for batch in batches for row in batch["row_S"].tolist()})
    what = f"the gradient of {names[0]} (and {len(names) - 1} more) is" if names else "the loss is"
    return f"{where}, rows {all_rows[:8]}: {what} not finite. {remedy}. The weights are unchanged."
