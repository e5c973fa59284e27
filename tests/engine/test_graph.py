"""Whether every weight takes part in a forward pass, found out from the graph of autograd."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

from trl.engine.graph import all_take_part
from trl.trainer import construct


def lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def test_weights_of_a_model_and_of_an_adapter(tiny_path: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_path).train()
    assert all_take_part(model)
    assert model.training and all(each.grad is None for each in model.parameters())
    enable = "activation_checkpointing_enable"  # "gradient_..." up to transformers 5.1x
    getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")({"use_reentrant": False})
    assert all_take_part(model)
    model.beside = nn.Linear(2, 2)
    assert not all_take_part(model)
    adapter = lora(model)
    assert all_take_part(adapter)  # what is beside is frozen
    next(adapter.base_model.model.beside.parameters()).requires_grad_(True)
    assert not all_take_part(adapter)


def test_what_depends_on_tokens_or_chance() -> None:
    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    experts = MixtralForCausalLM(
        MixtralConfig(**small, intermediate_size=16, num_key_value_heads=2, num_local_experts=2)
    )
    assert not all_take_part(experts)
    for chance in (0.0, 0.5):
        opt = OPTForCausalLM(OPTConfig(**small, ffn_dim=16, word_embed_proj_dim=16, layerdrop=chance))
        assert all_take_part(opt) is (chance == 0)
    assert not all_take_part(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("world", "chosen", "looks"), [(1, None, True), (2, None, False), (2, True, True), (2, False, True)]
)
def test_the_search_of_ddp_is_spared(tiny_path: str, world: int, chosen: bool | None, looks: bool) -> None:
    model = lora(AutoModelForCausalLM.from_pretrained(tiny_path))
    handler = SimpleNamespace(find_unused_parameters=True)
    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(ddp_handler=handler),
        args=SimpleNamespace(world_size=world, ddp_find_unused_parameters=chosen),
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
    )
    construct.spare_search(trainer)
    assert handler.find_unused_parameters is looks
