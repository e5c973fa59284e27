"""`attach(model)` once, then `score(model, batch)`: a model and a batch in, numbers per trained token out.

The engine is entered through the model's own `forward` (one more keyword), so that the hooks of DDP, FSDP, ZeRO and
device maps fire as for any call. A numeric probe, not a list of families, decides whether a model's flat rows are
right; a model that fails runs padded, and the reason is kept and printed once by the trainer.
"""

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from trl.data.batching.collate import Branch, Tree
from trl.models import shards

from . import attention
from .forest import Batch, flat, padded
from .head import EXTRAS, Readout, TokenStats, _Logits, plain_linear, token_stats

_REQUEST = "trl_request"
_SCALAR_HEAD = "score"  # what transformers calls the head of decoders that classify
_LAYOUT_KEYS = ("input_ids", "position_ids", "attention_mask", "segments")


@dataclass
class Attachment:
    """What `attach` found out about a model."""

    is_flat: bool  # a forest runs in one row without padding
    reason: str | None  # why not, in one sentence
    readout: Readout = field(default_factory=Readout)  # scale and softcap of the head
    head_reason: str | None = None  # why the logits are computed in full, in one sentence; None when they are not
    pad_id: int = 0
    kept: list[Any] | None = None  # a list: the model's own outputs are put into it, logits and all

    def batch(self, trees: Iterable[Tree]) -> Batch:
        """Lay a forest out as this model takes it."""
        return flat(trees) if self.is_flat else padded(trees, self.pad_id)


def causal_lm(model: Any) -> Any:
    """The language model inside whatever wraps it (DDP, FSDP, torch.compile, PEFT)."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def scalar_head(base: Any) -> nn.Module | None:
    """The head of a model that scores sequences or tokens, or None for a language model."""
    return getattr(base, _SCALAR_HEAD, None) or getattr(base, "classifier", None)


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
    temperature: float = 1.0,
    embedding_noise: float | None = None,
    router: bool = False,
) -> TokenStats:
    """Log-probs of the trained tokens of a batch, and what else is asked for.

    The model must have been attached, the batch laid out by its `Attachment.batch`. Log-probs carry gradients; so does
    the entropy with `entropy_grad`, and `mean_logp`; the other extras do not. `temperature` divides the logits first.
    `embedding_noise` is NEFTune's alpha: uniform noise of size alpha / sqrt(length * H) on the embeddings of each
    sequence (Jain et al. 2023, arXiv:2310.05914). `router` adds a mixture of experts' load-balancing term, as `aux`.
    """
    wanted = {
        "entropy": entropy or entropy_grad,
        "mean_logp": mean_logp,
        "top1": top1,
        "mean_logit": mean_logit,
        "sum_sq": sum_sq,
    }
    with_gradient = {"entropy": entropy_grad, "mean_logp": mean_logp}
    grads = tuple(name for name in EXTRAS if with_gradient.get(name))
    extras = (*grads, *(name for name in EXTRAS if wanted[name] and name not in grads))
    request = {
        "predict_N": batch["predict_N"],
        "target_N": batch["target_N"],
        "columns": batch["input_ids"].shape[1],
        "extras": extras,
        "grads": grads,
        "temperature": temperature,
        "embedding_noise": embedding_noise,
        "router": router,
    }
    inputs = {key: batch[key] for key in _LAYOUT_KEYS if key in batch}
    outputs = model(**inputs, use_cache=False, **{_REQUEST: request})
    if outputs["logp"].dtype != torch.float32:
        raise ValueError(
            f"the model's wrapper casts log-probs to {str(outputs['logp'].dtype).removeprefix('torch.')}, in which "
            "sums over a sequence are off by whole nats: let it keep its outputs (FSDP2: a MixedPrecisionPolicy with "
            "output_dtype=None)"
        )
    found = {f"{name}_N": outputs[name] for name in extras}
    seq_N = batch["seq_N"].to(outputs["logp"].device)
    return TokenStats(outputs["logp"], seq_N, batch["row_S"].shape[0], aux=outputs.get("aux"), **found)


def attach(model: nn.Module) -> Attachment:
    """Make a causal language model ready for `score`. Idempotent; call it again after wrapping the model in PEFT.

    Sets the attention implementation (kept for the model's life: layers read it again when a checkpointed forward is
    recomputed), adds one keyword to `forward`, then probes. In a distributed run the first rank's verdict holds.
    """
    base = causal_lm(model)
    if base.get_output_embeddings() is None and scalar_head(base) is None:
        raise ValueError(
            f"{type(base).__name__} has neither a language-model head to read log-probs from nor one that scores: load "
            "it with AutoModelForCausalLM, or with AutoModelForSequenceClassification to train a reward model"
        )
    _add_keyword(base)
    configs = _configs(base)
    if not hasattr(base, "_trl_attention"):
        base._trl_attention = [config._attn_implementation for config in configs]
    config = base.config.get_text_config()
    attachment = Attachment(True, None, _readout(config), pad_id=getattr(config, "pad_token_id", None) or 0)
    base._trl_attachment = attachment

    with _probing(model), shards.gathered(model):
        reason = _chunked_reason(config) or _prompt_learning_reason(model)
        if reason is None:
            for each in configs:
                each._attn_implementation = attention.NAME
            reason = _first_failure(model, base)
        if reason is not None:
            # Padded, with the attention that the model came with.
            for each, own in zip(configs, base._trl_attention, strict=True):
                each._attn_implementation = own
            attachment.is_flat, attachment.reason = False, reason
        if scalar_head(base) is None:
            attachment.head_reason = _head_failure(model, base, attachment) or _parts_reason(base)
        elif not hasattr(base, _SCALAR_HEAD):
            attachment.head_reason = f"{type(base).__name__} scores by more than one layer on its last hidden state"
    _agree(attachment, base, configs)
    return attachment


# --- the forward pass ---------------------------------------------------------------------------------------------


def _add_keyword(base: Any) -> None:
    """Give this instance's `forward` the request keyword; everything else it does is unchanged."""
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
    """What a model takes of a batch that someone has unpacked into a call, `model(**inputs)`."""
    known = {*_LAYOUT_KEYS, "labels", "num_items_in_batch", "output_hidden_states", "output_attentions", "return_dict"}
    known |= set(inspect.signature(type(base).forward).parameters)
    if scalar_head(base) is not None:
        known.discard("labels")  # tokens, where such a model wants classes
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
    )
    if request.get("router"):
        kwargs["output_router_logits"] = True
    aux = {}
    if request.get("embedding_noise"):
        kwargs = _with_noise(base, request["embedding_noise"], kwargs)
    if attachment.head_reason is not None or attachment.kept is not None:
        outputs = _plain_forward(base, *args, **kwargs)
        if attachment.kept is not None:
            attachment.kept.append(outputs)
        raw_NV = _predicting(outputs.logits, request)
        target_N = request["target_N"].to(raw_NV.device)
        columns = _Logits.apply(raw_NV, target_N, replace(readout, scale=1.0, softcap=None))
    else:
        outputs = _backbone(base)(*args, **kwargs)
        hidden_NH = _predicting(outputs[0], request)
        if request.get("hidden"):
            return {"hidden": hidden_NH}
        head = base.get_output_embeddings()
        vocabulary = base.config.get_text_config().vocab_size
        columns = token_stats(head, hidden_NH, request["target_N"], readout, vocabulary)
    if request.get("router"):
        aux["aux"] = _load_balance(base, outputs, kwargs.get("attention_mask"))
    return {**dict(zip(("logp", *readout.extras), columns, strict=True)), **aux}


def _scalar(base: Any, request: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
    """What the model's scoring head says of each trained token, [N, labels]."""
    if base._trl_attachment.head_reason is None:
        hidden_NH = _predicting(_backbone(base)(*args, **kwargs)[0], request)
        if isinstance(getattr(base, "dropout", None), nn.Dropout):
            hidden_NH = base.dropout(hidden_NH)
        return getattr(base, _SCALAR_HEAD)(hidden_NH)
    logits = _plain_forward(base, *args, **kwargs).logits
    # One score a sequence, as the model itself pools it; or one a token.
    return logits[: request["predict_N"].shape[0]] if logits.ndim == 2 else _predicting(logits, request)


def _load_balance(base: Any, outputs: Any, attention_mask: Tensor | None) -> Tensor:
    """The family's own load-balancing term on this batch's router logits."""
    family = sys.modules[type(base).__module__]
    if not hasattr(family, "load_balancing_loss_func") or getattr(outputs, "router_logits", None) is None:
        raise ValueError(f"router_aux_loss_coef is set, but {type(base).__name__} has no load-balancing loss")
    config = base.config.get_text_config()
    experts = getattr(base, "num_experts", None) or config.num_local_experts
    return family.load_balancing_loss_func(outputs.router_logits, experts, config.num_experts_per_tok, attention_mask)


def _with_noise(base: Any, alpha: float, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Embeddings instead of ids, with noise by the length of each token's own sequence, as if it stood alone."""
    kwargs = dict(kwargs)
    ids = kwargs.pop("input_ids")
    embeds = kwargs.pop("inputs_embeds", None) if ids is None else base.get_input_embeddings()(ids)
    if kwargs.get("segments") is not None:
        spans = kwargs["segments"]["spans"]
        lengths = [length + (spans[root][0] if root >= 0 else 0) for length, root in spans]
        length_T = torch.tensor(lengths, device=embeds.device).repeat_interleave(
            torch.tensor([length for length, _ in spans], device=embeds.device)
        )[None]
    else:
        length_T = kwargs["attention_mask"].sum(-1, keepdim=True).to(embeds.device)
    size_T = alpha / (length_T * embeds.shape[-1]).sqrt()
    noise = torch.empty_like(embeds).uniform_(-1, 1) * size_T[..., None].to(embeds.dtype)
    return {**kwargs, "inputs_embeds": embeds + noise}


def _predicting(grid: Tensor, request: dict[str, Any]) -> Tensor:
    """The entries of a [B, T, ...] grid that predict the trained tokens. Virtual tokens (prompt tuning) come first."""
    grid = grid[:, grid.shape[1] - request["columns"] :]
    return grid.flatten(0, 1).index_select(0, request["predict_N"].to(grid.device))


def _backbone(base: Any) -> nn.Module:
    backbone = base.get_decoder() if hasattr(base, "get_decoder") else None
    if backbone is None or backbone is base:
        backbone = getattr(base, base.base_model_prefix)
    return backbone


def _readout(config: PreTrainedConfig) -> Readout:
    """Scale and softcap of the final logits, by the names that configurations give them; the probe checks the sum."""
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    if getattr(config, "logits_scaling", None):  # Granite
        scale = 1.0 / config.logits_scaling
    return Readout(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


# --- the probe ----------------------------------------------------------------------------------------------------


def _configs(base: nn.Module) -> list[Any]:
    found = {id(module.config): module.config for module in base.modules()
             if isinstance(getattr(module, "config", None), PreTrainedConfig)}  # fmt: skip
    return list(found.values())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, for as long as it lasts."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, the random state left as it was."""
    with evaluating(model), torch.no_grad(), torch.random.fork_rng():
        yield


def _chunked_reason(config: PreTrainedConfig) -> str | None:
    # Too long for a short probe to notice.
    if getattr(config, "attention_chunk_size", None):
        return "its attention is computed in chunks of fixed size, which segments do not know"
    return None


def _prompt_learning_reason(model: nn.Module) -> str | None:
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and getattr(adapter, "is_prompt_learning", False):
        return "prompt learning puts virtual tokens before every row"
    return None


def _tokens(base: Any, start: int, count: int) -> list[int]:
    vocabulary = base.config.get_text_config().vocab_size
    return [(start + 7 * index) % vocabulary for index in range(count)]


def _leaf(ids: list[int]) -> Tree:
    return Tree(Branch(ids, [True] * len(ids)))


def _inputs(base: Any, batch: Batch) -> dict[str, Any]:
    """The batch where the model begins. Offloaded weights are nowhere: their hooks move the inputs as well."""
    device = base.get_input_embeddings().weight.device
    device = torch.device("cpu") if device.type == "meta" else device
    return {key: _to(batch[key], device) for key in _LAYOUT_KEYS if key in batch}


def _hidden(model: nn.Module, batch: Batch) -> Tensor:
    inputs = _inputs(causal_lm(model), batch)
    request = {
        "predict_N": batch["predict_N"],
        "target_N": batch["target_N"],
        "columns": batch["input_ids"].shape[1],
        "extras": (),
        "grads": (),
        "temperature": 1.0,
        "hidden": True,
    }
    return model(**inputs, use_cache=False, **{_REQUEST: request})["hidden"].float()


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return {key: _to(item, device) for key, item in value.items()} if isinstance(value, dict) else value


def _tolerance(base: Any, dtype: torch.dtype) -> float:
    """What rounding may move; 8-bit weights round by outliers of the whole batch. A leak moves more."""
    rounds = dtype in (torch.float16, torch.bfloat16) or getattr(base, "is_quantized", False)
    return 5e-2 if rounds else 1e-3


def _distance(left: Tensor, right: Tensor) -> float:
    return ((left - right).norm() / right.norm().clamp(min=1e-12)).item()


def _first_failure(model: nn.Module, base: Any) -> str | None:
    """What is wrong with this model's flat rows, in one sentence, or None."""
    first, other, second = _tokens(base, 11, 5), _tokens(base, 12, 5), _tokens(base, 23, 7)
    root, left, right = _tokens(base, 31, 6), _tokens(base, 17, 3), _tokens(base, 41, 4)
    count = len(second) - 1
    tolerance = _tolerance(base, next(base.parameters()).dtype)

    def run(build: Callable[[list[Tree]], Batch], *trees: Tree) -> Tensor:
        return _hidden(model, build(list(trees)))

    try:
        row = run(flat, _leaf(first), _leaf(second))[-count:]
        moved = run(flat, _leaf(other), _leaf(second))[-count:]
        if not _distance(moved, row) <= tolerance:
            return "tokens of one segment reach another: some layers mix along the row or drop the segments"
        if not _distance(row, run(padded, _leaf(second))) <= tolerance:
            return "a segment in a flat row differs from the same tokens alone"
        branches = (Branch(left, [True] * len(left)), Branch(right, [True] * len(right)))
        shared = run(flat, Tree(Branch(root, [False] * len(root)), branches))
        apart = run(flat, *(Tree(Branch(root + ids, [False] * len(root) + [True] * len(ids))) for ids in (left, right)))
        if not _distance(shared, apart) <= tolerance:
            return "a shared prompt differs from the same prompt repeated"
    except Exception as error:
        return f"its forward does not take a flat row ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    return None


def _head_failure(model: nn.Module, base: Any, attachment: Attachment) -> str | None:
    """Whether `head(hidden)` misses what the model's own logits have, in one sentence, or None."""
    ids = _tokens(base, 23, 7)
    batch = padded([_leaf(ids)])
    try:
        own = model(**_inputs(base, batch), use_cache=False).logits.float()
        own = own[0, own.shape[1] - len(ids) : -1]
        hidden_NH = _hidden(model, batch)
        head = base.get_output_embeddings()
        weight = getattr(head, "weight", None)
        dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else own.dtype
        ours = attachment.readout.logits(head(hidden_NH.to(dtype))).to(own.device)
        if ours.shape == own.shape and _distance(ours, own) <= _tolerance(base, dtype):
            return None
        return "its logits are not a linear head on the last hidden states"
    except Exception as error:
        return f"its last hidden states cannot be read ({type(error).__name__}: {str(error).splitlines()[0][:120]})"


def _parts_reason(base: Any) -> str | None:
    """Why chunks of the head cannot be one call of it, in one sentence, or None."""
    head = base.get_output_embeddings()
    if shards.zero_3_is_planned() and plain_linear(head) is None and next(head.children(), None) is not None:
        # Each part has hooks of its own, and ranks with more tokens would call them more often.
        return "its head is made of parts (an adapter's), which ZeRO-3 gathers one by one at each call"
    return None


def _agree(attachment: Attachment, base: Any, configs: list[Any]) -> None:
    """Take the first rank's verdict on every rank: others may hold no weights yet."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    verdict = [(attachment.is_flat, attachment.reason, attachment.head_reason)]
    torch.distributed.broadcast_object_list(verdict, src=0)
    attachment.is_flat, attachment.reason, attachment.head_reason = verdict[0]
    for config, own in zip(configs, base._trl_attention, strict=True):
        config._attn_implementation = attention.NAME if attachment.is_flat else own
