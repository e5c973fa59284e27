"""Loading by name, path and adapter folder: dtype, bits, place, and the sentences for what cannot be loaded."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from trl import ModelConfig
from trl.models import load

IDS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def adapter_path(tiny_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter on the tiny model whose weights are not zero."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(folder)
    return str(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# --- dtype --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "dtype"),
    [
        ({}, torch.float32),  # as in the checkpoint
        ({"dtype": None}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "bf16"}, torch.bfloat16),
        ({"torch_dtype": torch.bfloat16, "dtype": "torch.float16"}, torch.float16),
    ],
)
def test_weights_come_in_the_dtype_asked_for(tiny_path: str, asked: dict[str, Any], dtype: torch.dtype) -> None:
    model = load.load_causal_lm(Path(tiny_path), **asked)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_half_precision_checkpoint_stays_so(tiny_path: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert load.load_causal_lm(str(tmp_path)).dtype == torch.bfloat16


def test_an_unknown_dtype_is_named(tiny_path: str) -> None:
    with pytest.raises(load.ModelError, match="dtype='float12' is not one of auto, bfloat16, float16, float32"):
        load.load_causal_lm(tiny_path, dtype="float12")


# --- adapter folders ----------------------------------------------------------------------------------------------


def test_an_adapter_folder_brings_its_base_and_trains(tiny_path: str, adapter_path: str) -> None:
    model = load.load_causal_lm(adapter_path)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(names) == 2 * 7 * 2  # two layers of seven projections, A and B
    assert all("lora_" in name for name in names)
    other = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), adapter_path)
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=0)


def test_a_base_that_moved_is_an_error_with_the_remedy(adapter_path: str, tmp_path: Path) -> None:
    moved = tmp_path / "adapter"
    shutil.copytree(adapter_path, moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/models/that/was/here"
    (moved / "adapter_config.json").write_text(json.dumps(config))
    for function in (load.load_causal_lm, load.load_tokenizer):
        with pytest.raises(load.ModelError) as error:
            function(str(moved))
        assert f"the adapter in {moved} belongs to the model /models/that/was/here" in str(error.value)
        assert f"Set base_model_name_or_path in {moved}/adapter_config.json" in str(error.value)


def test_an_adapter_on_an_adapter_says_to_merge(adapter_path: str, tmp_path: Path) -> None:
    stacked = tmp_path / "stacked"
    shutil.copytree(adapter_path, stacked)
    config = json.loads((stacked / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = adapter_path
    (stacked / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(load.ModelError, match="sits on another adapter, .*lora. Merge that one first"):
        load.load_causal_lm(str(stacked))


def test_an_adapter_without_tokenizer_uses_its_base_models(tiny_path: str, adapter_path: str) -> None:
    assert load.load_tokenizer(adapter_path).get_vocab() == load.load_tokenizer(tiny_path).get_vocab()


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(load.ModelError, match="no model folder at ./nowhere/model"):
        load.load_causal_lm("./nowhere/model")
    with pytest.raises(load.ModelError, match="is a folder without config.json or adapter_config.json"):
        load.load_causal_lm(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(load.ModelError, match="cannot load the model '.*': Unrecognized model"):
        load.load_causal_lm(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(load.ModelError, match="does not say which base model the adapter belongs to"):
        load.load_causal_lm(str(tmp_path))


# --- bits ---------------------------------------------------------------------------------------------------------


def test_the_quantisation_that_flags_describe() -> None:
    assert load.quantization_config(ModelConfig()) is None
    four = load.quantization_config(ModelConfig(load_in_4bit=True, use_bnb_nested_quant=True))
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert (four.bnb_4bit_compute_dtype, four.bnb_4bit_quant_storage) == (torch.bfloat16, torch.uint8)
    half = load.quantization_config(
        ModelConfig(load_in_4bit=True, dtype="float16", bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage="float16")
    )
    assert (half.bnb_4bit_compute_dtype, half.bnb_4bit_quant_type, half.bnb_4bit_use_double_quant) == (
        torch.float16,
        "fp4",
        False,
    )
    assert half.bnb_4bit_quant_storage == torch.float16
    eight = load.quantization_config(ModelConfig(load_in_8bit=True))
    assert (eight.load_in_8bit, eight.load_in_4bit, eight.llm_int8_threshold) == (True, False, 6.0)
    with pytest.raises(load.ModelError, match="load_in_4bit and load_in_8bit are both set"):
        load.quantization_config(ModelConfig(load_in_8bit=True, load_in_4bit=True))


@pytest.mark.parametrize(
    "asked",
    [
        {"load_in_4bit": True},
        {"quantization_config": {"load_in_4bit": True}},
        {"quantization_config": load.quantization_config(ModelConfig(load_in_4bit=True))},
        {"load_in_8bit": True},
    ],
)
def test_a_missing_package_names_the_extra(tiny_path: str, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ImportError, match=r"needs the extra `quantization`: pip install 'trl\[quantization\]'"):
        load.load_causal_lm(tiny_path, **asked)


def test_two_ways_of_asking_for_bits_are_refused(tiny_path: str) -> None:
    with pytest.raises(load.ModelError, match="keep one of them"):
        load.load_causal_lm(tiny_path, load_in_4bit=True, quantization_config={"load_in_4bit": True})


# --- place --------------------------------------------------------------------------------------------------------


def test_under_a_launcher_no_model_is_spread(
    tiny_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = load.load_causal_lm(tiny_path, device_map="auto")
    assert not hasattr(model, "hf_device_map")
    assert "under a launcher each process holds a whole model" in capsys.readouterr().out
    # A map to one device is a choice, not a spread.
    assert load._placed({"device_map": {"": 1}}) == {"device_map": {"": 1}}
    monkeypatch.delenv("WORLD_SIZE")
    assert load._placed({"device_map": "auto"}) == {"device_map": "auto"}


def test_a_quantised_model_loads_on_its_ranks_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = {"device_map": "auto", "quantization_config": SimpleNamespace()}
    assert load._placed(asked)["device_map"] == {"": 3}


def halves(model: Any, second: Any = "cpu") -> dict[str, Any]:
    first = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
    return {**first, "model.layers.1": second, "model.norm": second, "lm_head": second}


@pytest.mark.parametrize("place", ["hooks", "host", "peft"])
def test_a_spread_model_is_put_together_again(smol2_path: str, place: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(smol2_path)
    expected = logits(model)
    if place == "host":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.model.layers[0].mlp.up_proj.weight.is_meta
        model.hf_device_map = {"": "cpu"}
    else:
        accelerate.dispatch_model(model, halves(model), main_device="cpu", force_hooks=True)
        assert "_hf_hook" in vars(model.model.layers[1])
    whole = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")) if place == "peft" else model

    assert load.replace_device_map(whole, "cpu") is True
    assert not any("_hf_hook" in vars(module) or "hf_device_map" in vars(module) for module in whole.modules())
    assert not any(name in vars(model) for name in ("to", "cuda"))
    assert {parameter.device for parameter in whole.parameters()} == {torch.device("cpu")}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(whole), expected, rtol=0, atol=0)
    assert load.replace_device_map(whole, "cpu") is False


def test_the_accelerator_takes_a_replaced_model(tiny_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    accelerate.dispatch_model(model, {**halves(model), "model.norm": "cpu:0"}, main_device="cpu", force_hooks=True)
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.verify_device_map(model)  # what is refused in a distributed run
    load.replace_device_map(model, "cpu")
    assert not accelerator.verify_device_map(model)


def test_weights_on_the_disk_are_an_error_with_the_remedy(tiny_path: str, tmp_path: Path) -> None:
    offload = {"device_map": halves(None, "disk"), "offload_folder": str(tmp_path)}
    model = AutoModelForCausalLM.from_pretrained(tiny_path, **offload)
    with pytest.raises(load.ModelError, match="offloaded to the disk.*: load it with device_map={'': 'cpu'}"):
        load.replace_device_map(model, "cpu")


def test_a_quantised_model_that_cannot_move_says_so(tiny_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    model.hf_device_map = {"model": 0, "lm_head": 1}

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("`.to` is not supported for this quantised model")

    monkeypatch.setattr(type(model), "to", refuse)
    with pytest.raises(load.ModelError, match=r"cannot be moved to cuda:1 .*: load it with device_map=\{'': 1\}"):
        load.replace_device_map(model, "cuda:1")
