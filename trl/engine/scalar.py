"""Scalars of sequences and tokens: what reward models and process reward models are trained on."""

from torch import Tensor, nn

from trl.models.unwrap import causal_lm

from .forest import Batch
from .score import _LAYOUT_KEYS, _REQUEST


def scalars(model: nn.Module, batch: Batch) -> Tensor:
    """What the scoring head says at each trained token, read off the hidden state of that token itself: [N, labels],
    fp32.

    A sequence is scored by marking its last token alone as trained. The model (`AutoModelForSequenceClassification`,
    `AutoModelForTokenClassification`) must have been attached, the batch laid out by its `Attachment.batch`. A model
    that pools in a way of its own has one score a sequence, whatever token is marked.
    """
    request = {"predict_N": batch["at_N"], "columns": batch["input_ids"].shape[1], "scalar": True}
    inputs = {key: batch[key] for key in _LAYOUT_KEYS if key in batch}
    if hasattr(causal_lm(model).config, "use_cache"):  # a decoder
        inputs["use_cache"] = False
    return model(**inputs, **{_REQUEST: request})["scalar"].float()
