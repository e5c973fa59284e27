"""Scores of sequences and tokens, for reward models and process reward models."""

from torch import Tensor, nn

from trl.models.unwrap import unwrap

from .forest import Batch
from .score import _LAYOUT_KEYS, _REQUEST


def scalars(model: nn.Module, batch: Batch) -> Tensor:
    """The scoring head's output at each trained token, from the hidden state of that token: [N, labels], fp32.

    To score a sequence, mark only its last token as trained. The model (`AutoModelForSequenceClassification`,
    `AutoModelForTokenClassification`) must be attached, and the batch laid out by its `Attachment.batch`. A model with
    its own pooling has one score per sequence, whichever token is marked.
    """
    request = {"predict_N": batch["at_N"], "columns": batch["input_ids"].shape[1], "scalar": True}
    inputs = {key: batch[key] for key in _LAYOUT_KEYS if key in batch}
    if hasattr(unwrap(model).config, "use_cache"):  # a decoder
        inputs["use_cache"] = False
    return model(**inputs, **{_REQUEST: request})["scalar"].float()
