"""Models in loops of one's own: adapters, generation, rewards, arithmetic operations per token."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trl.models.adapters import prepare_quantised, wrap
from trl.models.load import load_of
from trl.models.offload import on_host
from trl.models.shards import whole
from trl.models.unwrap import unwrap
from trl.models.with_value_head import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead

from .tensors import first_true_indices, pad_to_length, top_k_top_p_filtering

SUPPORTED_ARCHITECTURES = (AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead)

# --- loading and adapters -------------------------------------------------------------------------------------------


def get_kbit_device_map() -> dict[str, int] | None:
    """`{"": <this process's accelerator>}`, a device map for quantised weights; None on a CPU."""
    from accelerate import PartialState

    accelerated = torch.cuda.is_available() or torch.xpu.is_available()
    return {"": PartialState().local_process_index} if accelerated else None


def create_model_from_path(model_id: str, architecture: Any = None, **kwargs: Any) -> Any:
    """The model of a name or folder, opened as trainers open it.

    `architecture` is a class with `from_pretrained` (None: the class that the model's configuration names).
    """
    import transformers

    if architecture is None:
        options = {name: kwargs[name] for name in ("revision", "trust_remote_code", "token") if name in kwargs}
        named = transformers.AutoConfig.from_pretrained(model_id, **options).architectures or []
        architecture = getattr(transformers, named[0], None) if named else None
    return load_of(architecture or transformers.AutoModelForCausalLM, model_id, **kwargs)


def get_config_model_id(config: Any) -> str:
    """The name or folder that a model's configuration was loaded from; "" if it was made by hand."""
    return getattr(config, "_name_or_path", "") or ""


def prepare_peft_model(model: Any, peft_config: Any, args: Any) -> Any:
    """The model with the adapter that `peft_config` describes, its quantised weights prepared for training.

    With `args.gradient_checkpointing`, checkpointing is on and the embeddings' output asks for gradients.
    """
    if peft_config is not None:
        model = wrap(model, peft_config)
    prepare_quantised(model)
    if getattr(args, "gradient_checkpointing", False):
        enable_gradient_checkpointing(model, args.gradient_checkpointing_kwargs)
    return model


def peft_module_casting_to_bf16(model: nn.Module) -> None:
    """Cast adapters, embeddings and the head to bfloat16 where they are float32, and norms to float32."""
    for name, module in model.named_modules():
        if "norm" in name.rpartition(".")[2]:
            module.float()
        elif any(part in name for part in ("lora_", "lm_head", "embed_tokens", "wte", "wpe")):
            for parameter in module.parameters(recurse=False):
                if parameter.dtype == torch.float32:
                    parameter.data = parameter.data.bfloat16()


@contextlib.contextmanager
def use_adapter(model: Any, adapter_name: str | None) -> Iterator[None]:
    """Within the context, another adapter of a `PeftModel` is active, or none of them for None."""
    if adapter_name is None:
        with model.disable_adapter():
            yield
        return
    before = model.active_adapter
    trains = [parameter.requires_grad for parameter in model.parameters()]
    model.set_adapter(adapter_name)
    try:
        yield
    finally:
        model.set_adapter(before)
        for parameter, trained in zip(model.parameters(), trains, strict=True):
            parameter.requires_grad_(trained)


def hash_module(module: nn.Module) -> str:
    """A fingerprint of all weights and buffers: names, dtypes, shapes and bytes. Hexadecimal, of SHA-256."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().cpu().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- modes of a model -----------------------------------------------------------------------------------------------


def disable_dropout_in_model(model: nn.Module) -> None:
    """Set the rate of every dropout layer to 0."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def enable_gradient_checkpointing(model: Any, gradient_checkpointing_kwargs: Mapping[str, Any] | None) -> Any:
    """Turn gradient checkpointing on, also for a model whose embeddings are frozen, and return the model."""
    _turn_on(model, gradient_checkpointing_kwargs)
    model.enable_input_require_grads()
    return model


def _turn_on(model: Any, kwargs: Mapping[str, Any] | None) -> None:
    # transformers 5.23 renamed the method.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(dict(kwargs) if kwargs else None)


@contextlib.contextmanager
def disable_gradient_checkpointing(
    model: Any, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Within the context, gradient checkpointing is off. `gradient_checkpointing_kwargs` turn it on again after it."""
    base = unwrap(model)
    was_on = bool(getattr(base, "is_gradient_checkpointing", False))
    if was_on:
        (getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable)()
    try:
        yield
    finally:
        if was_on:
            _turn_on(base, gradient_checkpointing_kwargs)


@contextlib.contextmanager
def unwrap_model_for_generation(
    model: Any,
    accelerator: Any,
    gather_deepspeed3_params: bool = True,
    generation_kwargs: Mapping[str, Any] | None = None,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    is_peft_model: bool | None = None,
) -> Iterator[Any]:
    """The model inside its wrappers, ready to generate: whole weights, no gradient checkpointing.

    `gather_deepspeed3_params` gathers ZeRO-3's weights once, not layer by layer. `generation_kwargs` hold in the
    context alone, over the model's generation configuration. `is_peft_model` is not read: the model tells.
    """
    inner = accelerator.unwrap_model(model)
    config = getattr(inner, "generation_config", None)
    before = {name: getattr(config, name, None) for name in generation_kwargs or {}}
    with contextlib.ExitStack() as stack:
        stack.enter_context(disable_gradient_checkpointing(inner, gradient_checkpointing_kwargs))
        if gather_deepspeed3_params:
            stack.enter_context(whole(inner.parameters()))
        for name, value in (generation_kwargs or {}).items():
            setattr(config, name, value)
        try:
            yield inner
        finally:
            for name, value in before.items():
                setattr(config, name, value)


class _Offload(contextlib.AbstractContextManager[None]):
    """Keeps what the model's forward passes save for the backward pass in host memory; for any number of steps."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self._open = model, contextlib.ExitStack()

    def __enter__(self) -> None:
        self._open.enter_context(on_host(self.model))

    def __exit__(self, *error: Any) -> None:
        self._open.close()


def get_act_offloading_ctx_manager(model: nn.Module, **options: Any) -> contextlib.AbstractContextManager[None]:
    """A context for the forward passes of the model; `options` of upstream's streams and buffers have no effect."""
    return _Offload(model)


def empty_cache() -> None:
    """Free the memory that torch's allocator holds on the accelerator; nothing on a CPU."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


# --- calls that read padding from the ids ---------------------------------------------------------------------------


def forward(model: nn.Module, query_responses: Tensor, pad_token_id: int) -> Any:
    """The model's output for ids [B, T], with hidden states. Padding is where the ids are `pad_token_id`."""
    mask = query_responses != pad_token_id
    return model(
        input_ids=query_responses.masked_fill(~mask, 0),
        attention_mask=mask,
        position_ids=mask.long().cumsum(1) - mask.long(),
        return_dict=True,
        output_hidden_states=True,
    )


def get_reward(
    model: Any, query_responses: Tensor, pad_token_id: int, context_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of a sequence classifier for ids [B, T] whose prompt takes `context_length` columns.

    Returns the scores of all positions [B, T, labels], the score [B] at the last token before the first padding of the
    completion, and that position [B].
    """
    backbone = getattr(model, model.base_model_prefix)
    scores = model.score(forward(backbone, query_responses, pad_token_id).hidden_states[-1])
    last_B = first_true_indices(query_responses[:, context_length:] == pad_token_id) - 1 + context_length
    rows = torch.arange(len(query_responses), device=last_B.device)
    return scores, scores[rows, last_B].squeeze(-1), last_B


@torch.no_grad()
def generate(lm_backbone: Any, queries: Tensor, pad_token_id: int, generation_config: Any) -> tuple[Tensor, Tensor]:
    """Completions of left-padded prompts [B, T]: the prompts with them [B, T + new], and their logits [B, new, V]."""
    mask = queries != pad_token_id
    found = lm_backbone.generate(
        input_ids=queries.masked_fill(~mask, 0),
        attention_mask=mask,
        generation_config=generation_config,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.cat([queries, found.sequences[:, queries.shape[1] :]], 1), torch.stack(found.logits, 1)


@torch.no_grad()
def batch_generation(
    model: Any, queries: Tensor, local_rollout_forward_batch_size: int, pad_token_id: int, generation_config: Any
) -> tuple[Tensor, Tensor]:
    """`generate` for a few prompts at a time; shorter completions are filled up with `pad_token_id`, their logits with
    zeros."""
    parts = [
        generate(model, part, pad_token_id, generation_config)
        for part in queries.split(local_rollout_forward_batch_size)
    ]
    return _joined([ids for ids, _ in parts], pad_token_id), _joined([logits for _, logits in parts], 0)


def _joined(parts: Sequence[Tensor], filling: float) -> Tensor:
    """Tensors [rows, columns, ...] below one another, as wide as the widest."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([pad_to_length(part, width, filling, dim=1) for part in parts])


@torch.no_grad()
def respond_to_batch(model: Any, queries: Tensor, txt_len: int = 20, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Sample `txt_len` tokens after prompts of equal length [B, T]; returns [B, txt_len]. No end token ends a row."""
    ids = queries
    for _ in range(txt_len):
        answer = model(ids)
        logits = (answer[0] if isinstance(answer, tuple) else answer.logits)[:, -1]
        probability = top_k_top_p_filtering(logits.float(), top_k, top_p).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probability, 1)], 1)
    return ids[:, queries.shape[1] :]


# --- arithmetic operations ------------------------------------------------------------------------------------------

# Dense half-precision operations a second, by the names of devices; from the makers' data sheets.
_PEAKS = (
    (("H100 PCIe",), 756e12),
    (("H100", "H200", "H800"), 989e12),
    (("B200", "GB200"), 2250e12),
    (("A100", "A800"), 312e12),
    (("L40S",), 362e12),
    (("L4",), 121e12),
)


def compute_flops_per_token(config: Any, seq_len: int) -> int:
    """Arithmetic operations of a training step per token: three times those of the forward pass.

    Counted are the products of a decoder with gated feed-forward layers, dense or of experts, and its head; a token
    attends to all `seq_len` tokens (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B). The table of embeddings
    costs nothing.
    """
    config = config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    attention = 2 * hidden * width * (2 * heads + 2 * keys)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    total = config.num_hidden_layers * (attention + _attended(config, seq_len))
    for layer in range(config.num_hidden_layers):
        sparse = experts and layer not in (getattr(config, "mlp_only_layers", None) or ())
        sparse = sparse and (layer + 1) % (getattr(config, "decoder_sparse_step", None) or 1) == 0
        total += _experts(config, hidden, experts, inner) if sparse else 6 * hidden * inner
    return 3 * (total + 2 * hidden * config.vocab_size)


def _attended(config: Any, seq_len: int) -> int:
    """Operations of a layer's products of queries with keys and of weights with values, for one token."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4 * config.num_attention_heads * width * seq_len


def _experts(config: Any, hidden: int, experts: int, inner: int) -> int:
    each = getattr(config, "moe_intermediate_size", None) or inner
    chosen = 6 * hidden * each * config.num_experts_per_tok
    shared = 6 * hidden * (getattr(config, "shared_expert_intermediate_size", None) or 0)
    return chosen + shared + 2 * hidden * experts


def compute_mfu(flops_per_token: int, tokens_per_second: float, world_size: int, peak_flops_per_device: float) -> float:
    """The share of the devices' peak that training reaches, in percent."""
    return 100 * flops_per_token * tokens_per_second / (world_size * peak_flops_per_device)


def adjusted_mfu(mfu: float, config: Any, seq_len: int) -> float:
    """`mfu` if a token attends to half of the sequence, as it does causally on average."""
    whole_flops = compute_flops_per_token(config, seq_len)
    text = config.get_text_config()
    return mfu * (1 - 3 * text.num_hidden_layers * _attended(text, seq_len) / 2 / whole_flops)


def get_peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense half-precision operations a second of a device, by its name; None if it is not in the table."""
    if dtype not in ("bfloat16", "float16"):
        return None
    return next((peak for names, peak in _PEAKS if any(name in device_name for name in names)), None)


def get_peak_flops_per_device(accelerator: Any, dtype: str) -> float | None:
    """`get_peak_flops` of the accelerator's device; None if it is no CUDA device."""
    device = accelerator.device
    return get_peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
