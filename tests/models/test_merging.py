"""Merging adapters: what is written computes what the adapter's model computes, whatever the adapter changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trl.models import merging
from trl.models.load import ModelError, load_causal_lm
from trl.models.merging import MergeError, merge_adapter


@pytest.fixture(scope="module")
def tied_path(tiny_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with one matrix for embeddings and head."""
    folder = tmp_path_factory.mktemp("tied") / "tiny"
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(folder)
    return str(folder)


def adapter_on(base: str, folder: Path, grow: int = 0, seed: int = 1, **settings: Any) -> str:
    """An adapter folder with every trained number moved at random, as after training."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if grow:
        tokenizer.add_tokens([f"<new_{number}>" for number in range(grow)])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
    model = peft.get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


IDS = torch.arange(5, 69).reshape(2, 32)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


KINDS: dict[str, dict[str, Any]] = {
    "all layers": {"target_modules": "all-linear"},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "rank-stabilised": {"target_modules": ["q_proj"], "use_rslora": True},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embeddings in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both ends in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "both ends, tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "new tokens in full": {"grow": 3, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "single tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 11]},
    "biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True], ids=["two matrices", "one matrix"])
def test_merged_is_the_adapters_model(tiny_path: str, tied_path: str, tmp_path: Path, tied: bool, kind: str) -> None:
    base = tied_path if tied else tiny_path
    adapter = adapter_on(base, tmp_path / "adapter", **KINDS[kind])
    wanted = load_causal_lm(adapter)
    answer = merge_adapter(adapter, tmp_path / "merged")

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(wanted), atol=1e-4, rtol=1e-4)
    assert answer.gap < 1e-5 and answer.written < 1e-6 and answer.rounding == 0
    assert answer.effect > 1e-3
    assert merged.config.tie_word_embeddings is answer.tied
    # The last row is of tokens with the highest ids: the new ones.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert len(tokenizer) == merged.get_input_embeddings().weight.shape[0]
    high = torch.arange(len(tokenizer) - 8, len(tokenizer))[None]
    torch.testing.assert_close(logits(merged, high), logits(wanted, high), atol=1e-4, rtol=1e-4)
    both = kind in ("all layers", "DoRA", "rank-stabilised", "both ends, tied", "single tokens", "biases")
    assert answer.tied is (tied and both)
