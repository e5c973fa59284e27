"""`attach(model)` once, then `score(model, batch)`: a model and a batch in, numbers per trained token out.

The engine is called through one more keyword of the model's own `forward`, so that the hooks of DDP, FSDP, ZeRO and
device maps fire as in any call. A numeric probe, not a list of families, decides whether a model's flat rows are right.
A model that fails runs on padded rows, and the trainer prints the reason once.
"""

import functools
import inspect
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from trl.data.batching.collate import Tree
from trl.models.unwrap import SCALAR_HEAD, scalar_head
from trl.models.value_head import critic, value_head

from .forest import Batch, flat, padded, with_repeated_keys, without_kernel
from .head import Readout, TokenStats, _Logits, token_stats
from .measures import MEASURES, Comparison

_REQUEST = "trl_request"
_LAYOUT_KEYS = ("input_ids", "position_ids", "attention_mask", "segments")


@dataclass
class Attachment:
    """The result of `attach` for a model."""

    is_flat: bool  # whether a forest runs in one row without padding
    reason: str | None  # the reason if not, in one sentence
    readout: Readout = field(default_factory=Readout)  # scale and softcap of the head
    head_reason: str | None = None  # the reason for computing full logits, in one sentence; None: chunked
    pad_id: int = 0
    kernel_reason: str | None = None  # the reason for not calling the variable-length kernel, in one sentence
    repeats_keys: bool = False  # whether that kernel gets the keys of a shared prompt once for each branch
    kept: list[Any] | None = None  # if a list: it collects the model's own outputs, with full logits

    def batch(self, trees: Iterable[Tree]) -> Batch:
        """Lay a forest out for this model: flat or padded."""
        if not self.is_flat:
            return padded(trees, self.pad_id)
        row = flat(trees)
        if self.kernel_reason is not None:
            return without_kernel(row)
        return with_repeated_keys(row) if self.repeats_keys else row

    def serve_too(self, other: "Attachment", who: str) -> None:
        """Lay rows out from now on so that another model can read them too; `who` names it."""
        self.kernel_reason = self.kernel_reason or other.kernel_reason
        self.repeats_keys |= other.repeats_keys
        if self.is_flat and not other.is_flat:
            self.is_flat, self.reason = False, f"{who} takes no flat rows: {other.reason}"


def score(
    model: nn.Module,
    batch: Batch,
    *,
    entropy: bool = False,
    entropy_grad: bool = False,
    mean_logp: bool = False,
    top1: bool = False,
    mean_logit: bool = False,
    sum_sq: bool = False,
    comparison: Comparison | None = None,
    logp_grad: bool = True,
    temperature: float = 1.0,
    embedding_noise: float | None = None,
    router: bool = False,
    values: bool = False,
) -> TokenStats:
    """Log-probs of the trained tokens of a batch, and the extras that are set (see `TokenStats`).

    The model must be attached, and the batch laid out by its `Attachment.batch`. Gradients flow through the log-probs
    (unless `logp_grad` is False), through `mean_logp`, and through the entropy if `entropy_grad` is set. `temperature`
    divides the logits.
    `comparison` adds the divergence from another model's predictions, which carries a gradient, and its log-probs.
    `embedding_noise` is NEFTune's alpha: uniform noise of size alpha / sqrt(length * H) on the embeddings of each
    sequence (Jain et al. 2023, arXiv:2310.05914). `router` adds a mixture of experts' load-balancing loss, as `aux`.
    `values` adds what the model's value function (`models.value_head`) expects before each trained token, `value_N`.
    Raises ValueError if a wrapper casts the log-probs to half precision.
    """
    wanted = {
        "entropy": entropy or entropy_grad,
        "mean_logp": mean_logp,
        "top1": top1,
        "mean_logit": mean_logit,
        "sum_sq": sum_sq,
        **dict.fromkeys(("divergence", "other_logp"), comparison is not None),
    }
    with_gradient = {"entropy": entropy_grad, "mean_logp": mean_logp, "divergence": comparison is not None}
    grads = tuple(name for name in MEASURES if with_gradient.get(name))
    extras = (*grads, *(name for name in MEASURES if wanted[name] and name not in grads))
    request = {
        "predict_N": batch["predict_N"],
        "target_N": batch["target_N"],
        "columns": batch["input_ids"].shape[1],
        "extras": extras,
        "grads": grads,
        "comparison": comparison,
        "logp_grad": logp_grad,
        "temperature": temperature,
        "embedding_noise": embedding_noise,
        "router": router,
        "values": values,
    }
    inputs = {key: batch[key] for key in _LAYOUT_KEYS if key in batch}
    outputs = model(**inputs, use_cache=False, **{_REQUEST: request})
    if outputs["logp"].dtype != torch.float32:
        raise ValueError(
            f"the model's wrapper casts log-probs to {str(outputs['logp'].dtype).removeprefix('torch.')}, in which "
            "sums over a sequence are off by whole nats: let it keep their dtype (FSDP2: a MixedPrecisionPolicy with "
            "output_dtype=None)"
        )
    found = {f"{name}_N": outputs[name] for name in extras}
    seq_N = batch["seq_N"].to(outputs["logp"].device)
    further = {"aux": outputs.get("aux"), "value_N": outputs.get("value")}
    return TokenStats(outputs["logp"], seq_N, batch["row_S"].shape[0], **further, **found)


# --- the forward pass ---------------------------------------------------------------------------------------------


def _add_keyword(base: Any) -> None:
    """Add the request keyword to this instance's `forward`; nothing else changes."""
    if hasattr(base, "_trl_forward"):
        return
    # An instance's own forward (device-map hooks) is kept as an attribute, not in a closure, so that a deep copy of the
    # model calls itself and not the original.
    base._trl_forward = vars(base).get("forward")

    @functools.wraps(type(base).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = kwargs.pop(_REQUEST, None)
        if request is not None:
            return _answer(self, request, *args, **kwargs)
        if "predict_N" in kwargs:
            kwargs = _of_a_model(self, kwargs)
        return _plain_forward(self, *args, **kwargs)

    base.forward = types.MethodType(forward, base)


def _plain_forward(base: Any, *args: Any, **kwargs: Any) -> Any:
    if base._trl_forward is not None:
        return base._trl_forward(*args, **kwargs)
    return type(base).forward(base, *args, **kwargs)


def _of_a_model(base: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The entries of a batch that the model accepts, for a user's own call `model(**inputs)`."""
    known = {*_LAYOUT_KEYS, "labels", "num_items_in_batch", "output_hidden_states", "output_attentions", "return_dict"}
    known |= set(inspect.signature(type(base).forward).parameters)
    if scalar_head(base) is not None:
        known.discard("labels")  # here they are tokens; such a model expects classes
    return {key: value for key, value in kwargs.items() if key in known}


def _answer(base: Any, request: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    attachment: Attachment = base._trl_attachment
    for name in ("labels", "output_hidden_states", "output_attentions", "return_dict"):
        kwargs.pop(name, None)
    if request.get("scalar"):
        scalar = _scalar(base, request, *args, **kwargs)
        if attachment.kept is not None:
            attachment.kept.append(ModelOutput(logits=scalar))
        return {"scalar": scalar}
    readout = replace(
        attachment.readout,
        temperature=request["temperature"],
        extras=tuple(request["extras"]),
        grads=tuple(request["grads"]),
        comparison=request.get("comparison"),
        logp_grad=request.get("logp_grad", True),
    )
    if request.get("router"):
        kwargs["output_router_logits"] = True
    further: dict[str, Tensor] = {}
    if request.get("embedding_noise"):
        kwargs = _with_noise(base, request["embedding_noise"], kwargs)
    values = request.get("values")
    if attachment.head_reason is not None or attachment.kept is not None:
        seen = {"output_hidden_states": True} if values else {}
        outputs = _plain_forward(base, *args, **kwargs, **seen)
        hidden_NH = _predicting(outputs.hidden_states[-1], request) if values else None
        if attachment.kept is not None:
            attachment.kept.append(outputs)
        raw_NV = _predicting(outputs.logits, request)
        if request.get("hidden"):
            return {"logits": raw_NV}
        target_N = request["target_N"].to(raw_NV.device)
        columns = _Logits.apply(raw_NV, target_N, replace(readout, scale=1.0, softcap=None))
    else:
        outputs = _backbone(base)(*args, **without_mask(kwargs))
        hidden_NH = _predicting(outputs[0], request)
        if request.get("hidden"):
            return {"hidden": hidden_NH}
        head = base.get_output_embeddings()
        vocabulary = base.config.get_text_config().vocab_size
        columns = token_stats(head, hidden_NH, request["target_N"], readout, vocabulary)
    if values:
        assert hidden_NH is not None
        further["value"] = _values(base, hidden_NH, request, *args, **kwargs)
    if request.get("router"):
        further["aux"] = _load_balance(base, outputs, kwargs.get("attention_mask"))
    return {**dict(zip(("logp", *readout.extras), columns, strict=True)), **further}


def _values(base: Any, hidden_NH: Tensor, request: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
    """What the value function expects, from the state before each trained token: [N], fp32."""
    own = critic(base)
    if own is None:
        return value_head(base)(hidden_NH)[:, 0].float()
    asked = {"predict_N": request["predict_N"], "columns": request["columns"], "scalar": True}
    return own(*args, **kwargs, **{_REQUEST: asked})["scalar"][:, 0].float()


def _scalar(base: Any, request: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
    """The scoring head's output at each trained token, [N, labels]."""
    if base._trl_attachment.head_reason is None:
        hidden_NH = _predicting(_backbone(base)(*args, **without_mask(kwargs))[0], request)
        if isinstance(getattr(base, "dropout", None), nn.Dropout):
            hidden_NH = base.dropout(hidden_NH)
        return getattr(base, SCALAR_HEAD)(hidden_NH)
    logits = _plain_forward(base, *args, **kwargs).logits
    # One score per sequence, pooled by the model itself; or one per token.
    return logits[: request["predict_N"].shape[0]] if logits.ndim == 2 else _predicting(logits, request)


def _load_balance(base: Any, outputs: Any, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss of the model's family, on this batch's router logits."""
    family = sys.modules[type(base).__module__]
    if not hasattr(family, "load_balancing_loss_func") or getattr(outputs, "router_logits", None) is None:
        raise ValueError(f"router_aux_loss_coef is set, but {type(base).__name__} has no load-balancing loss")
    config = base.config.get_text_config()
    experts = getattr(base, "num_experts", None) or config.num_local_experts
    return family.load_balancing_loss_func(outputs.router_logits, experts, config.num_experts_per_tok, attention_mask)


def _with_noise(base: Any, alpha: float, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Embeddings with noise in place of ids; its size follows from the length of each token's own sequence."""
    kwargs = dict(kwargs)
    ids = kwargs.pop("input_ids")
    embeds = kwargs.pop("inputs_embeds", None) if ids is None else base.get_input_embeddings()(ids)
    if kwargs.get("segments") is not None:
        spans = kwargs["segments"]["spans"]
        lengths = [length + (spans[root][0] if root >= 0 else 0) for length, root in spans]
        length_T = torch.from_numpy(np.repeat(lengths, [length for length, _ in spans]))[None]
        length_T = length_T.to(embeds.device, non_blocking=embeds.is_cuda)
    else:
        length_T = kwargs["attention_mask"].sum(-1, keepdim=True).to(embeds.device)
    size_T = alpha / (length_T * embeds.shape[-1]).sqrt()
    noise = torch.empty_like(embeds).uniform_(-1, 1) * size_T[..., None].to(embeds.dtype)
    return {**kwargs, "inputs_embeds": embeds + noise}


def without_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a flat row with a mask of no size: transformers hands a mask of four dimensions on as it is, and
    attention by segment reads none. Without one transformers looks into the positions for packed sequences, and waits
    for the device to do so."""
    if kwargs.get("segments") is None or kwargs.get("attention_mask") is not None:
        return kwargs
    row = kwargs["position_ids"]
    return {**kwargs, "attention_mask": torch.empty(1, 1, 0, 0, dtype=torch.bool, device=row.device)}


def _predicting(grid: Tensor, request: dict[str, Any]) -> Tensor:
    """The entries of a [B, T, ...] grid that predict the trained tokens. Leading virtual tokens (prompt tuning) are
    skipped."""
    grid = grid[:, grid.shape[1] - request["columns"] :]
    return grid.flatten(0, 1).index_select(0, request["predict_N"].to(grid.device))


def _backbone(base: Any) -> nn.Module:
    backbone = base.get_decoder() if hasattr(base, "get_decoder") else None
    if backbone is None or backbone is base:
        backbone = getattr(base, base.base_model_prefix)
    return backbone


def _readout(config: PreTrainedConfig) -> Readout:
    """Scale and softcap of the final logits, under the names that configurations use; the probe checks the result."""
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    if getattr(config, "logits_scaling", None):  # Granite
        scale = 1.0 / config.logits_scaling
    return Readout(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))
