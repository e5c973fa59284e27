"""`attach(model)`: a numeric check of a model's flat rows and of its head, by running a few short rows."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from trl.data.batching.collate import Branch, Tree
from trl.engine import attention, lora
from trl.engine.device import has_flash_attention
from trl.engine.forest import Batch, flat, moved, padded, with_repeated_keys, without_kernel
from trl.engine.head import plain_linear
from trl.engine.score import _LAYOUT_KEYS, _REQUEST, Attachment, _add_keyword, _readout
from trl.models import shards
from trl.models.unwrap import SCALAR_HEAD, evaluating, scalar_head, unwrap


def attach(model: nn.Module, precision: Callable[[], Any] = contextlib.nullcontext) -> Attachment:
    """Make a causal language model ready for `score`. Idempotent; call it again after wrapping the model in PEFT.

    Sets the attention implementation (permanently: layers read it again when a checkpointed forward is recomputed),
    adds one keyword to `forward`, then probes: the layout with segments one by one, then, on a GPU, the variable-length
    kernel under the autocast that `precision` enters, with a backward pass where the model trains. In a distributed run
    all ranks take the first rank's result. Raises ValueError for a model without a language-model head or a scoring
    head.
    """
    base = unwrap(model)
    if base.get_output_embeddings() is None and scalar_head(base) is None:
        raise ValueError(
            f"{type(base).__name__} has neither a language-model head nor a scoring head: load "
            "it with AutoModelForCausalLM, or with AutoModelForSequenceClassification to train a reward model"
        )
    configs, attachment = _attached(base)
    config = base.config.get_text_config()

    with _probing(model), shards.gathered(model):
        reason = _chunked_reason(config) or _prompt_learning_reason(model)
        if reason is None:
            for each in configs:
                each._attn_implementation = attention.NAME
            reason = _first_failure(model, base)
        if reason is not None:
            # Padded rows use the attention that the model came with.
            for each, own in zip(configs, base._trl_attention, strict=True):
                each._attn_implementation = own
            attachment.is_flat, attachment.reason = False, reason
        else:
            with precision():
                attachment.kernel_reason = _kernel_failure(model, base, flat)
                if attachment.kernel_reason is not None:
                    # Its parts may be what fails here.
                    attachment.kernel_reason = _kernel_failure(
                        model, base, lambda trees: with_repeated_keys(flat(trees))
                    )
                    attachment.repeats_keys = True
        if scalar_head(base) is None:
            attachment.head_reason = _head_failure(model, base, attachment) or _parts_reason(base)
        elif not hasattr(base, SCALAR_HEAD):
            attachment.head_reason = f"{type(base).__name__} computes its scores with more than one layer"
    _agree(attachment, base, configs)
    return attachment


def attach_unprobed(model: nn.Module) -> Attachment:
    """`attach` for a model on the meta device, which cannot be run: its flat rows are taken to be right unless its
    configuration says that they are not."""
    base = unwrap(model)
    configs, attachment = _attached(base)
    attachment.reason = _chunked_reason(base.config.get_text_config())
    attachment.is_flat = attachment.reason is None
    for each in configs if attachment.is_flat else []:
        each._attn_implementation = attention.NAME
    return attachment


def _attached(base: Any) -> tuple[list[Any], Attachment]:
    """The configurations in a model and its new attachment; its `forward` takes one more keyword from now on."""
    _add_keyword(base)
    lora.attach(base)
    configs = _configs(base)
    if not hasattr(base, "_trl_attention"):
        base._trl_attention = [config._attn_implementation for config in configs]
    config = base.config.get_text_config()
    base._trl_attachment = Attachment(True, None, _readout(config), pad_id=getattr(config, "pad_token_id", None) or 0)
    return configs, base._trl_attachment


def _configs(base: nn.Module) -> list[Any]:
    found = {id(module.config): module.config for module in base.modules()
             if isinstance(getattr(module, "config", None), PreTrainedConfig)}  # fmt: skip
    return list(found.values())


@contextlib.contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, the random state left as it was."""
    devices = {each.device for each in model.parameters() if each.is_cuda}
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices):
        yield


def _chunked_reason(config: PreTrainedConfig) -> str | None:
    # Chunks are too long for a short probe to notice.
    if getattr(config, "attention_chunk_size", None):
        return "its attention is computed in chunks of fixed size, which attention by segment does not support"
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
    """The model's inputs, on the device of its embeddings. If these are offloaded, their hooks move the inputs."""
    device = base.get_input_embeddings().weight.device
    device = torch.device("cpu") if device.type == "meta" else device
    return {key: moved(batch[key], device) for key in _LAYOUT_KEYS if key in batch}


def _hidden(model: nn.Module, batch: Batch) -> Tensor:
    inputs = _inputs(unwrap(model), batch)
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


def _tolerance(base: Any, dtype: torch.dtype) -> float:
    """The largest relative difference that rounding explains; 8-bit weights round by outliers of the whole batch."""
    kind = base.get_input_embeddings().weight.device.type  # "meta" for weights that a hook brings in
    autocast = any(torch.is_autocast_enabled(each) for each in {"cpu", "cuda", kind} - {"meta"})
    rounds = autocast or dtype in (torch.float16, torch.bfloat16) or getattr(base, "is_quantized", False)
    return 5e-2 if rounds else 1e-3


def _distance(left: Tensor, right: Tensor) -> float:
    return ((left - right).norm() / right.norm().clamp(min=1e-12)).item()


def _first_failure(model: nn.Module, base: Any) -> str | None:
    """The reason why this model's flat rows are wrong, in one sentence, or None."""
    first, other, second = _tokens(base, 11, 5), _tokens(base, 12, 5), _tokens(base, 23, 7)
    root, left, right = _tokens(base, 31, 6), _tokens(base, 17, 3), _tokens(base, 41, 4)
    count = len(second) - 1
    tolerance = _tolerance(base, next(base.parameters()).dtype)

    def run(build: Callable[[list[Tree]], Batch], *trees: Tree) -> Tensor:
        return _hidden(model, build(list(trees)))

    def one_by_one(trees: list[Tree]) -> Batch:
        return without_kernel(flat(trees))

    try:
        row = run(one_by_one, _leaf(first), _leaf(second))[-count:]
        changed = run(one_by_one, _leaf(other), _leaf(second))[-count:]
        if not _distance(changed, row) <= tolerance:
            return "tokens of one segment reach another: some layers mix along the row or drop the segments"
        if not _distance(row, run(padded, _leaf(second))) <= tolerance:
            return "a segment in a flat row differs from the same tokens alone"
        branches = (Branch(left, [True] * len(left)), Branch(right, [True] * len(right)))
        shared = run(one_by_one, Tree(Branch(root, [False] * len(root)), branches))
        apart = run(
            one_by_one, *(Tree(Branch(root + ids, [False] * len(root) + [True] * len(ids))) for ids in (left, right))
        )
        if not _distance(shared, apart) <= tolerance:
            return "a shared prompt differs from the same prompt repeated"
    except Exception as error:
        return f"its forward does not take a flat row ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    return None


def _kernel_failure(model: nn.Module, base: Any, build: Callable[[list[Tree]], Batch]) -> str | None:
    """The reason why the variable-length kernel cannot be called for this model, in one sentence, or None. Where no
    layer calls it, both runs are the same."""
    if not has_flash_attention(base.get_input_embeddings().weight.device):
        return None
    root, left, right = _tokens(base, 31, 40), _tokens(base, 17, 9), _tokens(base, 41, 70)
    branches = (Branch(left, [True] * len(left)), Branch(right, [True] * len(right)))
    batch = build([_leaf(_tokens(base, 11, 23)), Tree(Branch(root, [False] * len(root)), branches)])
    backward = any(each.requires_grad for each in base.parameters()) and not shards.zero_3_is_planned()
    try:
        ours, theirs = (_with_gradient(model, base, each, backward) for each in (batch, without_kernel(batch)))
    except Exception as error:
        return f"it does not run here ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    names = ("outputs", "gradients")
    for name, own, other in zip(names, ours, theirs, strict=False):
        if not _distance(own, other) <= _tolerance(base, torch.bfloat16):
            return f"its {name} differ from those of segments one by one"
    return None


def _with_gradient(model: nn.Module, base: Any, batch: Batch, backward: bool) -> list[Tensor]:
    """The hidden states that predict the trained tokens, [N, H], and with `backward` the gradient at the embeddings."""
    embedded: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    if not backward:
        return [_hidden(model, batch)]
    hook = base.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            hidden_NH = _hidden(model, batch)
            weight_NH = torch.linspace(-1, 1, hidden_NH.numel(), device=hidden_NH.device).view_as(hidden_NH)
            (gradient,) = torch.autograd.grad((hidden_NH * weight_NH).sum(), embedded)
    finally:
        hook.remove()
    return [hidden_NH.detach(), gradient.float()]


def _head_failure(model: nn.Module, base: Any, attachment: Attachment) -> str | None:
    """The reason why `head(hidden)` differs from the model's own logits, in one sentence, or None."""
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
    """The reason why the chunks cannot run within one call of the head, in one sentence, or None."""
    head = base.get_output_embeddings()
    if shards.zero_3_is_planned() and plain_linear(head) is None and next(head.children(), None) is not None:
        # Each part has its own hooks, and ranks with more tokens would call them more often.
        return "its head is made of parts (an adapter's), which ZeRO-3 gathers one by one at each call"
    return None


def _agree(attachment: Attachment, base: Any, configs: list[Any]) -> None:
    """Take the first rank's result on every rank: others may hold no weights yet."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    names = ("is_flat", "reason", "head_reason", "kernel_reason", "repeats_keys")
    verdict = [{name: getattr(attachment, name) for name in names}]
    torch.distributed.broadcast_object_list(verdict, src=0)
    for name, value in verdict[0].items():
        setattr(attachment, name, value)
    for config, own in zip(configs, base._trl_attention, strict=True):
        config._attn_implementation = attention.NAME if attachment.is_flat else own
