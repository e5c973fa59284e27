"""Log-probs and what is made of them stay in fp32, whatever shares out the weights."""

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoTokenizer, Trainer

import trl
from tests.engine import families
from tests.trainer.helpers import DEFAULTS, chat_rows, pair_rows, sft, tiny, tiny_scorer
from tests.trainer.test_online import PROMPTS, reward
from trl.engine import probe
from trl.engine.probe import attach
from trl.engine.score import score
from trl.models.shards import keep_precision


@pytest.fixture(scope="module")
def tokenizer(smol2_path):
    return AutoTokenizer.from_pretrained(smol2_path)


def plugin(version, precision):
    found = FullyShardedDataParallelPlugin(fsdp_version=version)
    if precision is not None:
        found.set_mixed_precision(precision)
    return found


def test_accelerates_policy_casts_no_outputs_and_adds_up_in_fp32():
    second = plugin(2, "bf16")
    assert second.mixed_precision_policy.output_dtype == torch.bfloat16  # what is mended
    keep_precision(second)
    assert second.mixed_precision_policy == MixedPrecisionPolicy(torch.bfloat16, torch.float32, None)
    without = plugin(2, None)
    keep_precision(without)
    assert without.mixed_precision_policy == MixedPrecisionPolicy(None, torch.float32, None)
    first = plugin(1, "bf16")
    keep_precision(first)
    policy = first.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)


def test_a_trainer_sees_to_the_policy(tmp_path, tokenizer, monkeypatch):
    original = Trainer.create_accelerator_and_postprocess

    def with_fsdp(self):
        original(self)
        # Accelerate itself shards on accelerators alone.
        self.accelerator.state.fsdp_plugin = plugin(2, "bf16")
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", with_fsdp)
    trainer = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(2))
    try:
        assert trainer.accelerator.state.fsdp_plugin.mixed_precision_policy.output_dtype is None
    finally:
        trainer.accelerator.state.fsdp_plugin = None


def test_deepspeed_gets_batches_as_they_are(tmp_path, tokenizer):
    trainer = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(2))
    trainer.is_deepspeed_enabled = True
    batch = {"ref_logp_S": torch.tensor([-123.4567]), "step": {"chosen_logp_P": torch.zeros(1)}, "ids": [torch.ones(1)],
             "input_ids": torch.tensor([[1]]), "weights": torch.ones(1, dtype=torch.bfloat16), "tokens": 1}  # fmt: skip
    moved = trainer._prepare_inputs(batch)
    assert torch.equal(moved["ref_logp_S"], batch["ref_logp_S"]) and moved["ref_logp_S"].dtype == torch.float32
    assert moved["step"]["chosen_logp_P"].dtype == moved["ids"][0].dtype == torch.float32
    assert moved["weights"].dtype == torch.bfloat16 and moved["input_ids"].dtype == torch.int64 and moved["tokens"] == 1


def test_log_probs_that_were_cast_are_refused():
    model = families.build("llama")
    attachment = attach(model)
    model.register_forward_hook(lambda module, args, output: {k: each.bfloat16() for k, each in output.items()})
    with pytest.raises(ValueError, match="casts log-probs to bfloat16.*output_dtype=None"):
        score(model, attachment.batch(families.forest()))


@pytest.mark.parametrize("settings", [{}, {"precompute_ref_log_probs": True}])
def test_a_reference_runs_in_the_precision_of_the_policy(tmp_path, tokenizer, settings):
    """In bfloat16 autocast too the policy is its reference at first: the loss is ln 2, exactly."""
    args = trl.DPOConfig(**{**DEFAULTS, "output_dir": str(tmp_path)}, max_steps=1, bf16=True, **settings)
    trainer = trl.DPOTrainer(tiny(tokenizer), args=args, train_dataset=pair_rows(6), processing_class=tokenizer)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["rewards/margins"] == 0.0 and line["loss"] == pytest.approx(0.6931472, abs=1e-7)


def test_models_beside_the_policy_are_probed_in_its_precision(tmp_path, tokenizer, monkeypatch):
    """The reference, the teacher and the critic: a kernel that serves under autocast is run under autocast."""
    seen = []

    def noted(model, base, build):
        seen.append((type(base).__name__, torch.is_autocast_enabled("cpu")))

    monkeypatch.setattr(probe, "_kernel_failure", noted)
    settings = {**DEFAULTS, "output_dir": str(tmp_path), "bf16": True}
    trl.DPOTrainer(
        tiny(tokenizer), ref_model=tiny(tokenizer), args=trl.DPOConfig(**settings), train_dataset=pair_rows(6),
        processing_class=tokenizer,
    )  # fmt: skip
    trl.GKDTrainer(
        tiny(tokenizer), teacher_model=tiny(tokenizer, seed=1), args=trl.GKDConfig(**settings),
        train_dataset=chat_rows(6), processing_class=tokenizer,
    )  # fmt: skip
    trl.PPOTrainer(
        model=tiny(tokenizer), value_model=tiny_scorer(tokenizer), args=trl.PPOConfig(**settings),
        reward_funcs=reward, train_dataset=PROMPTS[:4], processing_class=tokenizer,
    )  # fmt: skip
    policy, scorer = type(tiny(tokenizer)).__name__, type(tiny_scorer(tokenizer)).__name__
    assert {name for name, _ in seen} == {policy, scorer} and len(seen) == 7
    assert all(autocast for _, autocast in seen)


def test_a_model_that_is_attached_under_autocast_keeps_its_flat_rows():
    """As a reward model is, which is attached at its first call: what autocast rounds is no failure."""
    with torch.autocast("cpu", torch.bfloat16):
        found = attach(families.build("llama").requires_grad_(False))
    assert found.is_flat and found.head_reason is None


def test_a_reference_without_flat_rows_has_both_models_padded(tmp_path, tokenizer):
    other = tiny(tokenizer)
    other.config.attention_chunk_size = 8
    args = trl.DPOConfig(**{**DEFAULTS, "output_dir": str(tmp_path)})
    trainer = trl.DPOTrainer(
        tiny(tokenizer), ref_model=other, args=args, train_dataset=pair_rows(6), processing_class=tokenizer
    )
    assert trainer.attachment.reason.startswith("the reference takes no flat rows: its attention is computed in chunks")
    assert not trainer.attachment.is_flat and "attention_mask" in trainer.data_collator([trainer.train_dataset[0]])
