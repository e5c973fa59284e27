"""`trl export`: a model for other programs, or a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from trl.models import gguf

from .conftest import Command


def test_gguf(trl_here: Command, tiny_path: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    words = ["export", "--model_name_or_path", tiny_path, "--output"]
    facts = json.loads(trl_here(*words, "model.gguf", "--dtype", "f32", "--json").stdout)
    assert (facts["format"], facts["dtype"], facts["rounding"]) == ("gguf", "f32", 0) and facts["written"] < 1e-5
    model, again = AutoModelForCausalLM.from_pretrained(tiny_path), gguf.read(tmp_path / "model.gguf")
    for (name, ours), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert "model.gguf exists already" in trl_here(*words, "model.gguf").stderr
    assert trl_here(*words, "x.gguf", "--push", "me/model").returncode == 2
    assert "llama-quantize" in trl_here(*words, "x.gguf", "--dtype", "q4_k").stderr


def test_safetensors(trl_here: Command, tiny_path: str, tmp_path: Path) -> None:
    answer = trl_here("export", "--model_name_or_path", tiny_path, "--output", "half", "--dtype", "float16")
    assert answer.returncode == 0 and "exported as safetensors (float16)" in answer.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16


def test_what_cannot_be_exported(trl_here: Command, tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    answer = trl_here("export", "--model_name_or_path", "./gpt2", "--output", "x.gguf")
    assert "GPT2LMHeadModel (model_type gpt2) is not written as GGUF here" in answer.stderr
    assert answer.returncode == 1 and not (tmp_path / "x.gguf").exists()
    wrong = trl_here("export", "--model_name_or_path", "./gpt2", "--output", "x", "--dtype", "flot16")
    assert wrong.returncode == 2 and "not `flot16`; did you mean float16?" in wrong.stderr
    assert trl_here("export", "--output", "x.gguf").returncode == 2
