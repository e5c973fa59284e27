"""Models, rows and a tokenizer in which nothing is drawn: `record.py` and the tests build the same ones.

Imports no trl, so that it serves beside any.
"""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS, VOCABULARY = 0, 1, 2, 24

# Prompts of 2 to 6 tokens, completions of 1 to 7. The first and the last pair have one prompt.
PAIRS = [
    {"prompt_ids": [1, 5, 9], "chosen_ids": [4, 7, 11, 3, 2], "rejected_ids": [8, 2]},
    {"prompt_ids": [1, 6], "chosen_ids": [10], "rejected_ids": [12, 13, 5, 14, 6, 9, 2]},
    {"prompt_ids": [1, 15, 16, 17, 18, 3], "chosen_ids": [19, 20, 2], "rejected_ids": [21, 22, 4]},
    {"prompt_ids": [1, 5, 9], "chosen_ids": [23, 8, 17, 6, 12, 2], "rejected_ids": [13, 19, 7, 2]},
]
MARGINS = [0.3, 1.2, -0.4, 0.0]

UNPAIRED = [
    {"prompt_ids": [1, 5, 9], "completion_ids": [4, 7, 11, 3, 2], "label": True},
    {"prompt_ids": [1, 6], "completion_ids": [12, 13, 5, 14, 6, 9, 2], "label": False},
    {"prompt_ids": [1, 15, 16, 17, 18, 3], "completion_ids": [19, 20, 2], "label": True},
    {"prompt_ids": [1, 8, 22, 10], "completion_ids": [13], "label": False},
    {"prompt_ids": [1, 20, 4], "completion_ids": [23, 8, 17, 6, 12, 2], "label": True},
    {"prompt_ids": [1, 11, 3, 7, 14], "completion_ids": [21, 16, 2], "label": True},
]
# Whose completion stands beside which prompt in the estimate of the KL divergence.
MISMATCHED = [5, 0, 1, 2, 3, 4]

# Solutions of one to three steps; the last token of each is judged.
STEPS = [
    {"prompt_ids": [1, 5, 9], "completion_ids": [4, 7, 3, 11, 3], "step_mask": [0, 0, 1, 0, 1], "step_labels": [1, 0]},
    {"prompt_ids": [1, 6], "completion_ids": [10, 3], "step_mask": [0, 1], "step_labels": [1]},
    {
        "prompt_ids": [1, 15, 16, 17, 18, 8],
        "completion_ids": [19, 3, 20, 3, 21, 22, 3],
        "step_mask": [0, 1, 0, 1, 0, 0, 1],
        "step_labels": [1, 1, 0],
    },
]

# Whose gradients are kept. A model that scores has `score.weight` in place of `lm_head.weight`.
NAMED = (
    "lm_head.weight",
    "score.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
)


def unpaired() -> list[dict]:
    """The rows with the completions that stand beside their prompts in the estimate."""
    return [
        {**row, "kl_completion_ids": UNPAIRED[other]["completion_ids"]}
        for row, other in zip(UNPAIRED, MISMATCHED, strict=True)
    ]


def policy() -> LlamaForCausalLM:
    return filled(LlamaForCausalLM(_config()), 0.37)


def reference() -> LlamaForCausalLM:
    """Such that it orders the pairs otherwise than the policy, and that the estimate of the divergence is positive."""
    return filled(LlamaForCausalLM(_config()), 0.73)


def scorer() -> LlamaForSequenceClassification:
    return filled(LlamaForSequenceClassification(_config(num_labels=1)), 0.37)


def step_scorer() -> LlamaForTokenClassification:
    return filled(LlamaForTokenClassification(_config(num_labels=2)), 0.37)


def filled(model: nn.Module, constant: float) -> nn.Module:
    """Entry j of parameter i is `0.6 sin(constant (j + 1) + i)`; the norms' are about 1."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            place = torch.arange(1, parameter.numel() + 1, dtype=torch.float64)
            values = torch.sin(constant * place + index).view_as(parameter)
            parameter.copy_(1 + 0.1 * values if parameter.ndim == 1 else 0.6 * values)
    return model


def _config(**changes) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
        **changes,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 to w23 beside three special tokens."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{index}" for index in range(3, VOCABULARY))]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=64
    )
