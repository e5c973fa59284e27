"""Any split of the same rows gives the same loss and gradient. Later methods add a line to `METHODS`."""

import datasets
import pytest
import torch
from transformers import AutoTokenizer

import trl
import trl.engine.probe as engine_probe
from tests.trainer import test_distillation
from tests.trainer.helpers import (
    DEFAULTS,
    chat_rows,
    first_gradient,
    labelled_rows,
    pair_rows,
    preference,
    sft,
    step_rows,
    tiny,
    tiny_scorer,
)


def preferring(name, rows, **fixed):
    """A method on 16 rows, with a reference that is another model than the policy where it takes one."""

    def make(path, tokenizer, **settings):
        model = tiny(tokenizer)
        if name in ("DPO", "KTO", "BCO"):
            settings = {"ref_model": tiny(tokenizer, seed=1), **settings}
        if name in ("Reward", "PRM"):
            model = tiny_scorer(tokenizer, per_token=name == "PRM")
        return preference(name, path, model, tokenizer, rows(16), **fixed, **settings)

    return make


def comparing(name, **fixed):
    """A method that samples two completions of each of 16 prompts, with a reference that is another model."""

    def odd(completion_ids, **_):
        return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]

    def make(path, tokenizer, **settings):
        rows = [{"prompt": row["prompt"]} for row in pair_rows(16)]
        settings = {"max_completion_length": 9, "max_tokens_per_micro_batch": 200, **fixed, **settings}
        models = {"ref_model": tiny(tokenizer, seed=1), "reward_funcs": odd}
        return preference(name, path, tiny(tokenizer), tokenizer, rows, **models, **settings)

    return make


class StepOnChats(trl.IterativeSFTTrainer):
    """A loop of one's own in the place of `train`: one call of `step` on 16 conversations, their answers labelled."""

    def train(self):
        rows, _ = self.rows(datasets.Dataset.from_list(chat_rows(16)), "train")
        labels = [
            [token if trains else -100 for token, trains in zip(row["input_ids"], row["loss_mask"], strict=True)]
            for row in rows
        ]
        self.step(input_ids=[row["input_ids"] for row in rows], labels=labels)


def stepping(path, tokenizer, **settings):
    settings = {**DEFAULTS, "assistant_only_loss": True, **settings, "max_steps": -1}
    config = trl.IterativeSFTConfig(output_dir=str(path), **settings)
    return StepOnChats(tiny(tokenizer), config, processing_class=tokenizer)


METHODS = {
    "sft": lambda path, tokenizer, **settings: sft(path, tiny(tokenizer), tokenizer, chat_rows(16), **settings),
    "iterative-sft": stepping,
    "dpo": preferring("DPO", pair_rows),
    "dpo-mixed": preferring(
        "DPO", pair_rows, loss_type=["aot_unpaired", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]
    ),
    "dpo-aot": preferring("DPO", pair_rows, loss_type="aot"),
    "dpo-weighted": preferring("DPO", pair_rows, ld_alpha=0.5, use_weighting=True, loss_type="ipo"),
    "kto": preferring("KTO", labelled_rows, undesirable_weight=0.7),
    "bco": preferring("BCO", labelled_rows),
    "orpo": preferring("ORPO", pair_rows),
    "cpo": preferring("CPO", pair_rows),
    "simpo": preferring("CPO", pair_rows, loss_type="simpo", alpha=0.25),
    "reward": preferring("Reward", pair_rows, center_rewards_coefficient=0.1),
    "prm": preferring("PRM", step_rows),
    "ppo": comparing("PPO", max_steps=1, temperature=1.0),
    "online-dpo": comparing("OnlineDPO", loss_type="ipo"),
    "xpo": comparing("XPO", alpha=0.01, missing_eos_penalty=0.1),
    "nash-md": comparing("NashMD"),
    "gkd": lambda path, tokenizer, **settings: test_distillation.make(
        path, tokenizer, "GKD", chat_rows(16), **{"lmbda": 0.0, **settings}
    ),
}

SPLITS = {"1x16": (1, 16), "2x8": (2, 8), "16x1": (16, 1), "3x6": (3, 6)}
OF_A_BATCH = ("total_flos", "grad_norm", "step_time")


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


def run(method, tokenizer, path, batch, accumulation, **settings):
    trainer = METHODS[method](
        path,
        tokenizer,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        **settings,
    )
    gradient = first_gradient(trainer)
    return trainer.state.log_history[0], gradient


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_do_not_depend_on_the_split(method, tokenizer, tmp_path):
    whole_log, whole = run(method, tokenizer, tmp_path, 16, 1)
    assert len(whole) > 0 and all(gradient.abs().sum() > 0 for gradient in whole.values())
    for name, (batch, accumulation) in SPLITS.items():
        log, gradient = run(method, tokenizer, tmp_path, batch, accumulation)
        assert log.keys() == whole_log.keys()
        for metric in whole_log.keys() - set(OF_A_BATCH):
            assert log[metric] == pytest.approx(whole_log[metric], rel=1e-5, abs=1e-5), (name, metric)
        for parameter, expected in whole.items():
            torch.testing.assert_close(gradient[parameter], expected, atol=1e-5, rtol=1e-5, msg=f"{name} {parameter}")


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_and_the_padded_layout_change_nothing(method, tokenizer, tmp_path, monkeypatch):
    _, expected = run(method, tokenizer, tmp_path, 4, 4, gradient_checkpointing=False)
    _, checkpointed = run(method, tokenizer, tmp_path, 4, 4, gradient_checkpointing=True)
    _, reentrant = run(
        method, tokenizer, tmp_path, 4, 4, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )  # fmt: skip
    _, repeated = run(method, tokenizer, tmp_path, 4, 4, share_prompt=False)
    monkeypatch.setattr(engine_probe, "_first_failure", lambda *args: "the test says so")
    _, padded = run(method, tokenizer, tmp_path, 4, 4)
    for parameter, gradient in expected.items():
        for other in (checkpointed, reentrant, repeated, padded):
            torch.testing.assert_close(other[parameter], gradient, atol=1e-5, rtol=1e-5, msg=parameter)
