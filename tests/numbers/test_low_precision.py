"""bfloat16 weights that train take the steps of float32 weights that compute in bfloat16.

The long form, with loss curves on the whole model, is `benchmarks/low_precision.py`.
"""

import peft
import pytest
import torch
from transformers import AutoTokenizer, Trainer

from tests.trainer.helpers import chat_rows, pair_rows, preference, sft, tiny, tiny_scorer
from trl.engine.reference import choose
from trl.models.low_bits import LOW_BITS, join

STEPS = 8


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


def sft_run(path, model, tokenizer, **settings):
    settings = {"learning_rate": 2e-5, "max_steps": STEPS, "per_device_train_batch_size": 2, **settings}
    return sft(path, model, tokenizer, chat_rows(16), **settings)


def dpo_run(path, model, tokenizer, **settings):
    settings = {"learning_rate": 1e-6, "max_steps": STEPS, "per_device_train_batch_size": 2, **settings}
    return preference("DPO", path, model, tokenizer, pair_rows(16), **settings)


def whole_weights(trainer):
    """The weights that train, in float32: with their lower halves, where they have some."""
    state = trainer.optimizer.optimizer.state
    return {
        name: join(p.data, state[p][LOW_BITS]) if LOW_BITS in state.get(p, {}) else p.detach().float().clone()
        for name, p in trainer.model.named_parameters()
        if p.requires_grad
    }


def walk(make, path, tokenizer, dtype, plain=None):
    """Losses of a run, and how far its weights walked from where they began: by name."""
    model = tiny(tokenizer).bfloat16().to(dtype)
    start = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    trainer = make(path, model, tokenizer, bf16=True)
    if plain is not None:
        plain.setattr(type(trainer), "create_optimizer", Trainer.create_optimizer)
    trainer.train()
    losses = torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])
    return losses, {name: weight - start[name] for name, weight in whole_weights(trainer).items()}


def length(moved):
    return torch.stack([step.norm() for step in moved.values()]).norm().item()


@pytest.mark.parametrize("make", [sft_run, dpo_run])
def test_bfloat16_weights_walk_as_far_as_float32_ones(make, tmp_path, tokenizer, monkeypatch):
    full_losses, full = walk(make, tmp_path, tokenizer, torch.float32)
    losses, ours = walk(make, tmp_path, tokenizer, torch.bfloat16)
    _, plain = walk(make, tmp_path, tokenizer, torch.bfloat16, plain=monkeypatch)
    assert length(ours) == pytest.approx(length(full), rel=0.02)
    # In the same direction too, as far as gradients computed in bfloat16 agree.
    along = sum((ours[name] * full[name]).sum().item() for name in full)
    assert along / (length(ours) * length(full)) > 0.9
    torch.testing.assert_close(losses, full_losses, atol=0.005, rtol=0.005)
    # Without the lower halves steps are rounded away.
    assert length(plain) < 0.8 * length(full) or length(plain) > 1.2 * length(full)


def test_a_resumed_run_takes_the_steps_of_an_uninterrupted_one(tmp_path, tokenizer):
    def run(folder, **settings):
        model = tiny(tokenizer).bfloat16()
        return sft_run(tmp_path / folder, model, tokenizer, save_strategy="steps", save_steps=4, **settings)

    whole = run("whole")
    whole.train()
    expected = whole_weights(whole)
    again = run("whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, weight in whole_weights(again).items():
        assert torch.equal(weight, expected[name]), name
    moments = [{k: v for k, v in s.items() if torch.is_tensor(v)} for s in again.optimizer.optimizer.state.values()]
    assert all(state["exp_avg_sq"].dtype == torch.float32 and state[LOW_BITS].dtype == torch.int16 for state in moments)


def test_adapters_in_bfloat16_and_heads_keep_their_lower_halves(tmp_path, tokenizer):
    def adapted(dtype):
        torch.manual_seed(1)
        model = peft.get_peft_model(tiny(tokenizer).bfloat16(), peft.LoraConfig(target_modules="all-linear"))
        for p in model.parameters():
            p.data = p.data.to(dtype) if p.requires_grad else p.data
        return model

    steps = {}
    for dtype in (torch.float32, torch.bfloat16):
        trainer = sft_run(tmp_path, adapted(dtype), tokenizer, bf16=True, learning_rate=1e-5)
        start = {name: p.detach().float().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        steps[dtype] = {name: weight - start[name] for name, weight in whole_weights(trainer).items()}
        assert steps[dtype] and all("lora" in name for name in steps[dtype])
    assert length(steps[torch.bfloat16]) == pytest.approx(length(steps[torch.float32]), rel=0.02)


def test_a_score_head_keeps_its_lower_half(tmp_path, tokenizer):
    model = tiny_scorer(tokenizer).bfloat16()
    start = model.score.weight.detach().float().clone()
    trainer = preference("Reward", tmp_path, model, tokenizer, pair_rows(8), learning_rate=1e-6, max_steps=1)
    trainer.train()
    # AdamW's first step is the learning rate long in every entry: 1/10,000 of a weight here.
    moved = whole_weights(trainer)["score.weight"] - start
    assert moved.abs().mean().item() == pytest.approx(1e-6, rel=0.05)


def test_float16_weights_are_held_in_float32(tmp_path, tokenizer, capsys):
    trainer = sft_run(tmp_path, tiny(tokenizer).half(), tokenizer)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trainer.train()
    assert "trainable float16 weights are held in float32" in capsys.readouterr().out


@pytest.mark.parametrize("adapted", [False, True])
def test_a_reference_in_bfloat16_follows_in_steps_that_bfloat16_would_drop(tokenizer, adapted):
    torch.manual_seed(0)
    model = tiny(tokenizer).bfloat16()
    if adapted:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        for p in model.parameters():
            p.data = p.data.bfloat16()
    reference = choose(model, follows=True)
    weights = {name: each for name, each in reference.weights().items() if not name.endswith(LOW_BITS)}
    name = next(each for each in weights if "q_proj" in each)
    start = weights[name].float()
    policy = dict(model.named_parameters())[name.replace(".reference", ".default")]
    policy.data = policy.data * 1.5
    for _ in range(10):
        reference.follow(model, 0.001)
    kept = reference.weights()
    expected = policy.float() + (start - policy.float()) * 0.999**10
    torch.testing.assert_close(join(kept[name], kept[f"{name}.{LOW_BITS}"]), expected, rtol=1e-5, atol=1e-8)
