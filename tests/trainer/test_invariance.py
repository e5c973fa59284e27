"""Any split of the same rows gives the same loss and gradient. Later methods add a line to `METHODS`."""

import pytest
import torch
from transformers import AutoTokenizer

import trl.engine.score as engine_score
from tests.trainer.helpers import chat_rows, first_gradient, sft, tiny

METHODS = {"sft": lambda path, tokenizer, **settings: sft(path, tiny(tokenizer), tokenizer, chat_rows(16), **settings)}

SPLITS = {"1x16": (1, 16), "2x8": (2, 8), "16x1": (16, 1), "3x6": (3, 6)}


@pytest.fixture(scope="module")
def tokenizer(smol_path):
    return AutoTokenizer.from_pretrained(smol_path)


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
        for metric in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
            assert log[metric] == pytest.approx(whole_log[metric], rel=1e-5), (name, metric)
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
    monkeypatch.setattr(engine_score, "_first_failure", lambda *args: "the test says so")
    _, padded = run(method, tokenizer, tmp_path, 4, 4)
    for parameter, gradient in expected.items():
        for other in (checkpointed, reentrant, padded):
            torch.testing.assert_close(other[parameter], gradient, atol=1e-5, rtol=1e-5, msg=parameter)
