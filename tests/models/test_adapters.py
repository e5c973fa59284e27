"""LoRA and its relatives as flags describe them; adapters that transformers put on; what may be wrapped."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3MoeConfig

from tests.trainer.helpers import chat_rows, sft
from trl import ModelConfig
from trl.models import adapters, load

SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
IDS = torch.arange(3, 20)[None]


def tiny(config: type = LlamaConfig, **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**SMALL, **changes))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def wrapped(model: Any, **settings: Any) -> Any:
    return adapters.for_training(model, adapters.lora_config(ModelConfig(use_peft=True, **settings)))


# --- from flags ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (None, None),
        (["q_proj"], {"q_proj"}),
        (["q_proj", "layers.0.v_proj"], {"q_proj", "layers.0.v_proj"}),
        (["all-linear"], "all-linear"),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),  # to PEFT a string is an expression, and a list holds names
    ],
)
def test_names_of_layers(names: Any, read: Any) -> None:
    assert adapters.lora_config(ModelConfig(use_peft=True, lora_target_modules=names)).target_modules == read


def test_an_expression_reaches_the_layers_it_names() -> None:
    model = wrapped(tiny(), lora_target_modules=[r".*\.1\.self_attn\.(q|v)_proj"])
    adapted = {name.removesuffix(".lora_A.default") for name, _ in model.named_modules() if name.endswith("A.default")}
    assert adapted == {f"base_model.model.model.layers.1.self_attn.{which}_proj" for which in "qv"}


def test_an_expression_among_names() -> None:
    with pytest.raises(ValueError) as error:
        adapters.lora_config(ModelConfig(lora_target_modules=["q_proj", ".*v_proj"]))
    assert str(error.value) == (
        "lora_target_modules: '.*v_proj' is not a plain name, and several entries must all be plain names. "
        r"Write one regular expression for whole names instead, such as '.*\.(q|v)_proj'"
    )


def test_no_adapter_unless_asked_for() -> None:
    assert adapters.lora_config(ModelConfig()) is None
    assert adapters.get_peft_config is adapters.lora_config


def test_every_flag_reaches_the_adapter() -> None:
    config = adapters.lora_config(
        ModelConfig(
            use_peft=True,
            lora_r=4,
            lora_alpha=6,
            lora_dropout=0.1,
            lora_target_modules=["q_proj", "v_proj"],
            lora_modules_to_save=["lm_head"],
        )  # fmt: skip
    )
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (4, 6, 0.1, "none")
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.modules_to_save == ["lm_head"]
    assert (config.task_type, config.use_dora, config.use_rslora) == ("CAUSAL_LM", False, False)


def test_all_linear_means_all_but_the_head() -> None:
    model = wrapped(tiny(), lora_r=4, lora_target_modules=["all-linear"])
    names = {name.rpartition(".")[2] for name in model.peft_config["default"].target_modules}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    # r * (in + out) of each projection, twice.
    assert adapters.trainable(model)[0] == 2 * 4 * (2 * 32 + 2 * 24 + 3 * 48)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 16), (True, 32 / 4)])
def test_the_scale_of_rslora(rslora: bool, scale: float) -> None:
    model = wrapped(tiny(), use_rslora=rslora, lora_target_modules=["q_proj"])
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": scale}


def test_dora_starts_as_the_model_itself() -> None:
    expected = logits(tiny())
    model = wrapped(tiny(), use_dora=True, lora_target_modules=["all-linear"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude, layer.base_layer.weight.norm(dim=1))
    assert magnitude.requires_grad
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_experts_are_adapted_as_bare_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    model = wrapped(
        tiny(Qwen3MoeConfig, **settings),
        lora_r=2,
        lora_target_modules=["q_proj"],
        lora_target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    assert "lora_dropout=0.05 is left out" in capsys.readouterr().out
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 3 * 2  # two layers of q_proj and two expert weights, A and B
    expert = model.base_model.model.model.layers[0].mlp.experts
    assert expert.lora_A["default"].weight.shape[0] == 2 * 4  # its rank for each of four experts
    model(input_ids=IDS, labels=IDS).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if "lora_B" in name}
    assert len(grads) == 6 and all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    changed = logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny(Qwen3MoeConfig, **settings), tmp_path)
    torch.testing.assert_close(logits(again), changed)


def test_layers_trained_in_full_are_saved_in_full(tmp_path: Path) -> None:
    model = wrapped(tiny(), lora_target_modules=["q_proj"], lora_modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.fill_(0.5)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny(), tmp_path)
    assert again.get_output_embeddings().modules_to_save["default"].weight.unique().tolist() == [0.5]


def test_a_second_adapter_is_refused() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = adapters.wrap(tiny(), config)
    with pytest.raises(ValueError, match="already carries an adapter"):
        adapters.for_training(model, config)
    injected = tiny()
    injected.add_adapter(config)
    with pytest.raises(ValueError, match="already carries an adapter"):
        adapters.wrap(injected, config)


# --- adapters that transformers put on ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter_path(tiny_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("injected") / "lora"
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(folder)
    return str(folder)


def test_an_injected_adapter_is_released(adapter_path: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(adapter_path)
    before = logits(model)
    assert adapters.trainable(model)[0] == 0
    assert adapters.release_adapter(model) is True
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(names) == 28 and all("lora_" in name for name in names)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    assert adapters.release_adapter(model) is False


def test_other_models_have_nothing_to_release(tiny_path: str, adapter_path: str) -> None:
    assert adapters.release_adapter(AutoModelForCausalLM.from_pretrained(tiny_path)) is False
    frozen = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), adapter_path)
    assert adapters.release_adapter(frozen) is False
    assert adapters.trainable(frozen)[0] == 0
    assert adapters.restore_adapter(frozen, adapter_path) is False


def test_a_released_adapter_trains_saves_and_reloads(smol2_path: str, tmp_path: Path) -> None:
    adapter_path = str(tmp_path / "start")
    start = AutoModelForCausalLM.from_pretrained(smol2_path)
    adapters.wrap(start, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(
        adapter_path
    )
    model = adapters.for_training(AutoModelForCausalLM.from_pretrained(adapter_path))
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tokenizer = AutoTokenizer.from_pretrained(load.adapter_base(adapter_path))
    trainer = sft(tmp_path, model, tokenizer, chat_rows(4), max_steps=3, per_device_train_batch_size=4)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[2] < losses[0] - 3.0
    for name, parameter in model.named_parameters():
        assert ("lora_" in name) == (not torch.equal(parameter, weights[name])), name

    trainer.save_model(str(tmp_path / "final"))
    assert {path.name for path in (tmp_path / "final").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not (tmp_path / "final" / "model.safetensors").exists()
    trained = logits(model)
    torch.testing.assert_close(logits(load.load_causal_lm(tmp_path / "final")), trained, rtol=0, atol=0)
    again = AutoModelForCausalLM.from_pretrained(adapter_path)
    assert adapters.restore_adapter(again, tmp_path / "final") is True
    torch.testing.assert_close(logits(again), trained, rtol=0, atol=0)
