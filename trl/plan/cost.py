"""Arithmetic of a run: floating-point operations, bytes of a cache, seconds."""

import torch
from transformers import PreTrainedConfig

from .run import Run
from .trace import layers_of


def cache_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> float:
    """Bytes of the keys and values of `tokens` tokens."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
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
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 2.0 * layers_of(run.config) * text.num_attention_heads * size * length * tokens
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
