"""What an evaluation may keep."""

from typing import Any

from torch import Tensor

LARGEST_KEPT_LOGITS = 2**31  # bytes


def refuse_to_keep(trainer: Any, logits: Tensor) -> None:
    """ValueError where `compute_metrics` would keep more logits than memory is likely to hold. It gets what
    `preprocess_logits_for_metrics` makes of each batch, and whole logits only if they are few."""
    if trainer.preprocess_logits_for_metrics is not None or trainer.args.batch_eval_metrics:
        return
    rows = len(trainer.callback_handler.eval_dataloader.dataset)
    kept = rows * logits[0].numel() * logits.element_size()
    if kept > LARGEST_KEPT_LOGITS:
        raise ValueError(
            f"compute_metrics would keep {kept / 2**30:.1f} GiB of logits ({rows} rows of {tuple(logits.shape[1:])}"
            "). Pass preprocess_logits_for_metrics=, for instance lambda logits, labels: logits.argmax(-1), "
            "or set batch_eval_metrics=True"
        )
