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
@pytest.mark.parametrize(
    ("tied", "kind"),
    [(True, kind) for kind in KINDS] + [(False, kind) for kind in ("all layers", "new tokens in full")],
)
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


@pytest.fixture(scope="module")
def adapter(tiny_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return adapter_on(tiny_path, tmp_path_factory.mktemp("adapter") / "lora", target_modules="all-linear")


@pytest.mark.parametrize("compute", ["float32", "auto"])
def test_half_precision(tiny_path: str, tmp_path: Path, compute: str) -> None:
    """Each weight is merged in float32 and rounded once, also where the model is computed in half precision."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(base)
    adapter = adapter_on(str(base), tmp_path / "adapter", target_modules="all-linear")
    answer = merge_adapter(adapter, tmp_path / "merged", compute_dtype=compute)
    assert answer.dtype == "bfloat16" and answer.written == 0
    assert answer.gap < (1e-5 if compute == "float32" else 3e-2)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {each.dtype for each in merged.parameters()} == {torch.bfloat16}
    exact = load_causal_lm(adapter, dtype="float32").merge_and_unload()
    for (name, ours), theirs in zip(merged.named_parameters(), exact.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(torch.bfloat16)), name


def test_another_base_and_dtype(tiny_path: str, tmp_path: Path, adapter: str) -> None:
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(other)
    answer = merge_adapter(adapter, tmp_path / "merged", base=other, dtype="float16")
    assert (answer.base, answer.dtype) == (str(other), "float16")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")
    wanted = logits(load_causal_lm(other, adapter=adapter))
    assert (logits(merged) - wanted).abs().max() < 1e-2 and (wanted - logits(load_causal_lm(adapter))).abs().max() > 0.1


def test_a_file_that_is_not_the_model_leaves_nothing(
    tmp_path: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    save = LlamaForCausalLM.save_pretrained

    def damaged(model: Any, target: Path, **options: Any) -> None:
        weight = model.model.layers[1].mlp.up_proj.weight
        kept = weight.data.clone()
        weight.data[0] += 1
        save(model, target, **options)
        weight.data.copy_(kept)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", damaged)
    with pytest.raises(MergeError, match="in writing, and rounding explains 1e-04: nothing was written"):
        merge_adapter(adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_merge_leaves_nothing(tmp_path: Path, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = peft.tuners.lora.Linear
    right: Callable[..., torch.Tensor] = layer.get_delta_weight
    monkeypatch.setattr(layer, "get_delta_weight", lambda self, name: 1.05 * right(self, name))
    with pytest.raises(MergeError, match="in merging"):
        merge_adapter(adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_quantised_base(tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    base = tmp_path / "base"
    bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(tiny_path, quantization_config=bits).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(base)
    adapter = adapter_on(str(base), tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    merge_adapter(adapter, tmp_path / "merged", dtype="float32")
    assert f"the weights of {base} are quantised: they are unpacked" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    quantised = load_causal_lm(adapter, dtype="float32")
    assert merging.gap(logits(merged), logits(quantised)) < 2e-2


def test_a_scoring_model(tiny_path: str, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_path, num_labels=3)
    model.config.pad_token_id = 0
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 3
    torch.testing.assert_close(logits(merged, IDS[:1]), logits(model, IDS[:1]), atol=1e-5, rtol=1e-4)


def test_the_ends_of_another_chat_template(tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter that was trained with another end of turn: the merged model stops there, by itself."""
    adapter = adapter_on(tiny_path, tmp_path / "adapter", target_modules=["q_proj"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    before = tokenizer.eos_token_id
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.save_pretrained(adapter)
    merge_adapter(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.generation_config.eos_token_id == [tokenizer.eos_token_id, before]
    assert "end with '<|im_start|>'" in capsys.readouterr().out


def test_what_cannot_be_merged(tiny_path: str, tmp_path: Path, adapter: str) -> None:
    with pytest.raises(ModelError, match="is a whole model: .* nothing to merge"):
        merge_adapter(tiny_path, tmp_path / "merged")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ModelError, match="full exists already: name another folder"):
        merge_adapter(adapter, tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    tuned.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ModelError, match="consists of virtual tokens"):
        merge_adapter(tmp_path / "prompt", tmp_path / "merged")
    settings = json.loads((Path(adapter) / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == tiny_path
    with pytest.raises(ModelError, match=r"sits on another adapter, .* \(trl merge --model_name_or_path"):
        merge_adapter(adapter, tmp_path / "merged", base=adapter)
