"""Exported models: what other programs read is the model, to its last token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

from trl.models import gguf
from trl.models.agreement import gap
from trl.models.export import export_model
from trl.models.load import ModelError, load_causal_lm
from trl.models.merging import MergeError

from .test_merging import adapter_on, logits

READER = pytest.importorskip("gguf")


def saved(model: Any, tokenizer: str, folder: Path) -> str:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


def test_a_gguf_file_is_the_model_that_it_was_made_of(tiny_path: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    source, path = saved(model, tiny_path, tmp_path / "tied"), tmp_path / "model.gguf"
    answer = export_model(source, path, format="gguf", dtype="f32")
    assert (answer.path, answer.dtype, answer.rounding) == (str(path), "f32", 0)
    folder = gguf.convert(path, tmp_path / "folder")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.config.tie_word_embeddings and again.config.max_position_embeddings == 2048
    for (name, ours), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    here, there = (AutoTokenizer.from_pretrained(each) for each in (folder, source))
    text = "<|im_start|>user\nHow many? 12 or 3?<|im_end|>\n"
    assert here(text)["input_ids"] == there(text)["input_ids"]
    assert here.chat_template == there.chat_template
    facts = {key: field.contents() for key, field in READER.GGUFReader(path).fields.items()}
    assert facts["tokenizer.ggml.pre"] == "smollm" and facts["general.architecture"] == "llama"
    assert (facts["tokenizer.ggml.eos_token_id"], facts["tokenizer.ggml.add_bos_token"]) == (2, False)
    assert facts["tokenizer.ggml.token_type"][2] == READER.TokenType.CONTROL


@pytest.mark.parametrize(("kind", "rounding"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 3e-2)])
def test_rounded_weights(tiny_path: str, tmp_path: Path, kind: str, rounding: float) -> None:
    answer = export_model(tiny_path, tmp_path / "model.gguf", format="gguf", dtype=kind)
    assert answer.written < 1e-5 and 0 < answer.rounding < rounding
    wanted = logits(AutoModelForCausalLM.from_pretrained(tiny_path))
    assert 0 < gap(logits(gguf.read(tmp_path / "model.gguf")), wanted) < rounding
    kinds = {each.name: each.tensor_type.name for each in READER.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kind.upper() and kinds["output_norm.weight"] == "F32"


def test_gguf_of_an_adapter(tiny_path: str, tmp_path: Path) -> None:
    adapter = adapter_on(tiny_path, tmp_path / "adapter", target_modules="all-linear")
    answer = export_model(adapter, tmp_path / "model.gguf", format="gguf", dtype="f32")
    assert answer.base == tiny_path and answer.gap is not None and answer.gap < 1e-5
    wanted = logits(load_causal_lm(adapter))
    torch.testing.assert_close(logits(gguf.read(tmp_path / "model.gguf")), wanted, atol=1e-4, rtol=1e-4)


SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def test_other_families(tiny_path: str, tmp_path: Path) -> None:
    size = len(AutoTokenizer.from_pretrained(tiny_path))
    torch.manual_seed(0)
    for name, model in {
        "qwen2": Qwen2ForCausalLM(Qwen2Config(vocab_size=size, **SIZES)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(vocab_size=size, head_dim=128, **SIZES)),
    }.items():
        path = tmp_path / f"{name}.gguf"
        answer = export_model(saved(model, tiny_path, tmp_path / name), path, format="gguf", dtype="f32")
        assert answer.written < 1e-5
        torch.testing.assert_close(logits(gguf.read(path)), logits(model), atol=1e-4, rtol=1e-4)


def test_scaled_rotary_frequencies(tiny_path: str, tmp_path: Path) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny_path).config
    config.rope_parameters = {
        "rope_theta": 10000.0,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = LlamaForCausalLM(config)
    path = tmp_path / "model.gguf"
    export_model(saved(model, tiny_path, tmp_path / "scaled"), path, format="gguf", dtype="f32")
    [factors] = [each.data for each in READER.GGUFReader(path).tensors if each.name == "rope_freqs.weight"]
    plain = 1 / 10000 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(factors, plain / model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    assert factors[0] == pytest.approx(1) and factors[-1] == pytest.approx(8)


def test_safetensors(tiny_path: str, tmp_path: Path) -> None:
    answer = export_model(tiny_path, tmp_path / "half", dtype="bfloat16", max_shard_size="200KB")
    assert answer.written == 0 and 0 < answer.rounding < 1e-2 and answer.gap is None
    assert len(list((tmp_path / "half").glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    for ours, theirs in zip(
        again.parameters(), AutoModelForCausalLM.from_pretrained(tiny_path).parameters(), strict=True
    ):
        assert torch.equal(ours, theirs.to(torch.bfloat16))


def test_what_is_refused(tiny_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model.gguf"
    small = GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel \(model_type gpt2\) is not written as GGUF here"):
        export_model(saved(small, tiny_path, tmp_path / "gpt2"), out, format="gguf")
    with pytest.raises(ModelError, match="give its name, such as .*folder/model.gguf"):
        export_model(tiny_path, tmp_path / "folder", format="gguf")
    with pytest.raises(ModelError, match="format='onnx' is not one of safetensors, gguf"):
        export_model(tiny_path, out, format="onnx")
    with pytest.raises(ModelError, match="dtype='q2_k' is not written here: f32, f16, bf16, q8_0 are. Export f16"):
        export_model(tiny_path, out, format="gguf", dtype="q2_k")
    odd = AutoTokenizer.from_pretrained(tiny_path)
    from tokenizers import pre_tokenizers

    rules = [pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    model.save_pretrained(tmp_path / "odd")
    odd.save_pretrained(tmp_path / "odd")
    with pytest.raises(ModelError, match="how a tokenizer cuts texts into words, .*--pre"):
        export_model(tmp_path / "odd", out, format="gguf")
    # transformers reads GGUF files of this family with heads of 128 numbers alone.
    narrow = Qwen3ForCausalLM(Qwen3Config(vocab_size=2048, head_dim=32, **SIZES))
    with pytest.raises(MergeError, match="cannot be read back"):
        export_model(saved(narrow, tiny_path, tmp_path / "narrow"), out, format="gguf")
    # Rows of queries and keys in the wrong order: the file is readable, and is another model.
    from trl.models import gguf_writing

    monkeypatch.setitem(gguf_writing.ARCHITECTURES, "llama", gguf_writing._Architecture("llama", False))
    with pytest.raises(MergeError, match="in writing"):
        export_model(tiny_path, out, format="gguf")
    assert not [*tmp_path.glob("*.gguf"), *tmp_path.glob(".*.gguf")]
