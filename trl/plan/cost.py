"""Arithmetic of a run: floating-point operations, bytes of a cache, seconds."""

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig

from .trace import layers_of

if TYPE_CHECKING:
    from .memory import Plan


def cache_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> float:
    """Bytes of the keys and values of so many tokens."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2.0 * layers_of(config) * heads * size * tokens * dtype.itemsize


def flops_of_step(plan: "Plan") -> float:
    """Operations of an optimizer step on one process, in training alone.

    Two for each weight and token forward, two for the gradient of the input and two for that of the weight; an adapter
    leaves out the last, checkpointing adds a forward pass. Attention: four operations for each pair of tokens and
    channel, half of them behind the causal mask.
    """
    run, text = plan.run, plan.run.config.get_text_config()
    tokens = run.tokens_of_step
    passes = 2 + (0 if run.adapter is not None else 1) + (1 if run.checkpointing else 0)
    reference = 1 if run.has_reference else 0
    length = run.prompt + run.completion
    head = text.vocab_size * text.hidden_size
    products = 2.0 * (plan.weights.products + head * run.trained) * tokens
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 2.0 * layers_of(run.config) * text.num_attention_heads * size * length * tokens
    backward = 1 + (1 if run.checkpointing else 0) + 2
    return products * (passes + reference) + attention * (backward + reference)


def seconds_of_step(plan: "Plan") -> tuple[float, float]:
    """Seconds of an optimizer step: training, and sampling where the method samples."""
    card, run = plan.card, plan.run
    assert card is not None
    training = flops_of_step(plan) / (card.tflops * 1e12 * plan.utilisation)
    if not run.samples:
        return training, 0.0
    # A decoding step reads the weights once for all rows, and each row's keys and values.
    rows = run.rows * run.accumulation
    held = plan.held["weights"] + plan.held.get("adapter", 0.0)
    cache = cache_bytes(run.config, run.prompt + run.completion // 2, run.dtype) * rows
    return training, run.completion * (held + cache) / (card.bandwidth * 1e9 * plan.utilisation)
