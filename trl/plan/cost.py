"""Arithmetic of a run: floating-point operations, bytes of a cache, seconds."""

import torch
from transformers import PreTrainedConfig

from trl.engine import linear

from .run import Run
from .shapes import layers_of


def cache_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> float:
    """Bytes of the keys and values of `tokens` tokens."""
    text = config.get_text_config()
    queries = getattr(text, "num_attention_heads", None)
    if not queries:
        return 0.0  # state-space layers keep a state of one size
    heads = getattr(text, "num_key_value_heads", None) or queries
    size = getattr(text, "head_dim", None) or text.hidden_size // queries
    return 2.0 * layers_of(config) * heads * size * tokens * dtype.itemsize


def flops_of_step(run: Run, weights: float) -> float:
    """Operations of an optimizer step on one process, in training alone. `weights`: those that a token is multiplied
    with, without the head.

    Two for each weight and token forward, two for the gradient of the input and two for that of the weight; an adapter
    leaves out the last, checkpointing adds a forward pass. Attention: four operations for each pair of tokens and
    channel, half of them behind the causal mask.
    """
    text, tokens = run.config.get_text_config(), run.tokens_of_step
    passes = 2 + (0 if run.adapter is not None else 1) + (1 if run.checkpointing else 0)
    reference = 1 if run.has_reference else 0
    length = run.prompt + run.completion
    head = text.vocab_size * text.hidden_size
    products = 2.0 * (weights + head * run.trained) * tokens
    queries = getattr(text, "num_attention_heads", None) or 0
    size = getattr(text, "head_dim", None) or text.hidden_size // max(1, queries)
    attention = 2.0 * layers_of(run.config) * queries * size * length * tokens
    backward = 1 + (1 if run.checkpointing else 0) + 2
    return products * (passes + reference) + attention * (backward + reference)


def seconds_of_sampling(run: Run, held: float, bandwidth: float) -> float:
    """Seconds in which the completions of a step are sampled; 0 where the method samples none.

    A decoding step reads the weights (`held` bytes) once for all rows, and each row's keys and values. `bandwidth` in
    bytes a second.
    """
    if not run.samples:
        return 0.0
    rows = run.rows * run.accumulation
    cache = cache_bytes(run.config, run.prompt + run.completion // 2, run.dtype) * rows
    return run.completion * (held + cache) / bandwidth


ROWS, CACHE_BYTES = 256, 2**30  # of `rollout.generate`: rows that decode together, the cache's bytes on a CPU


def sampler_bytes(run: Run, free: float | None, weights: int) -> dict[str, float]:
    """What the sampler holds while it draws the completions of a step, by part. `free`: bytes that the device has left
    beside everything else, or None. `weights`: those that products are made with, for a CPU that makes float32 copies
    of half-precision ones.
    """
    each = run.prompt + run.completion
    a_token = cache_bytes(run.config, 1, run.autocast or run.dtype)
    room = CACHE_BYTES if run.device == "cpu" else free / 2 if free is not None else None
    wanted = run.completions_of_step
    rows = min(ROWS, wanted)
    if room is not None:
        rows = max(1, min(rows, int(room / (a_token * each))))
    if rows < wanted:  # rows enter while others decode, so that the cache has columns for both
        each += run.completion
        if room is not None:
            rows = max(1, min(rows, int(room / (a_token * each))))
    found = {f"cache of {rows} rows": rows * each * a_token}
    # Logits in the model's dtype, in float32, their probabilities, and the sums of those.
    found["logits"] = rows * run.config.get_text_config().vocab_size * (3 * 4.0 + run.dtype.itemsize)
    half = (run.autocast or run.dtype) in linear.HALF
    if run.device == "cpu" and half and not linear._has_half_products():
        found["float32 copies"] = 4.0 * weights
    plain = run.adapter is not None and not run.bits and not getattr(run.adapter, "use_dora", False)
    alone = run.processes == 1 or run.sharding == "ddp"
    if plain and alone and (run.autocast or run.dtype) == torch.float32 and (free is None or 8 * weights <= free):
        found["merged copies"] = 4.0 * weights  # of the adapted layers, `rollout.round_weights`
    return found
