"""What a frozen teacher predicts at the trained tokens of a batch, computed a span of tokens at a time."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trl.models.unwrap import evaluating, unwrap

from .forest import Batch
from .head import compute_dtype, plain_linear
from .score import _LAYOUT_KEYS, _REQUEST


@torch.no_grad()
def predictions(model: nn.Module, batch: Batch, *, temperature: float = 1.0) -> Callable[[slice], Tensor]:
    """The logits of the trained tokens as a function of a span of them: slice -> [C, V], divided by `temperature`.

    The model must be attached (`engine.probe.attach`). It runs once, here, without dropout; its hidden states, [N, H],
    are kept, and its head is called for each span. A model whose logits are not its head's on its last hidden states
    keeps full logits, [N, V].
    """
    base = unwrap(model)
    readout = replace(base._trl_attachment.readout, temperature=temperature)
    request = {
        "predict_N": batch["predict_N"],
        "target_N": batch["target_N"],
        "columns": batch["input_ids"].shape[1],
        "temperature": temperature,
        "hidden": True,
        "extras": (),
        "grads": (),
    }
    inputs = {key: batch[key] for key in _LAYOUT_KEYS if key in batch}
    with evaluating(model):
        outputs = model(**inputs, use_cache=False, **{_REQUEST: request})
    if "logits" in outputs:
        final = replace(readout, scale=1.0, softcap=None)  # the model has applied them
        return lambda span: final.logits(outputs["logits"][span])
    head, hidden_NH = base.get_output_embeddings(), outputs["hidden"]
    linear, dtype = plain_linear(head), compute_dtype(head, hidden_NH)
    if linear is None:
        half = torch.is_autocast_enabled(hidden_NH.device.type)

        def by_module(span: slice) -> Tensor:
            with torch.no_grad(), torch.autocast(hidden_NH.device.type, dtype=dtype, enabled=half):
                return readout.logits(head(hidden_NH[span]))

        return by_module
    weight_VH, bias_V = linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype)
    hidden_NH = hidden_NH.to(weight_VH.device)

    def by_weight(span: slice) -> Tensor:
        with torch.no_grad(), torch.autocast(hidden_NH.device.type, enabled=False):
            return readout.logits(F.linear(hidden_NH[span].to(dtype), weight_VH, bias_V))

    return by_weight
