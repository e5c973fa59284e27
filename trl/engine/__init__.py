"""A model and a batch in, numbers per trained token out. Nothing here knows a loss."""

from .forest import Batch, flat, padded
from .head import TokenStats
from .score import Attachment, attach, score

__all__ = ["Attachment", "Batch", "TokenStats", "attach", "flat", "padded", "score"]
