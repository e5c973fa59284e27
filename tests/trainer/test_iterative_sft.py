"""Fine-tuning in a loop of one's own, against plain torch and transformers on the same rows."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from tests.trainer.helpers import tiny
from trl import IterativeSFTConfig, IterativeSFTTrainer

TEXTS = ["One two three four.", "A longer text about a river, and a boat on it.", "Yes, no.", "Seven eight", "Red blue"]


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


def make(path, tokenizer, **settings):
    fixed = {"output_dir": str(path), "report_to": "none", "use_cpu": True, "bf16": False, "learning_rate": 1e-3,
             "per_device_train_batch_size": 2}  # fmt: skip
    return IterativeSFTTrainer(tiny(tokenizer), IterativeSFTConfig(**{**fixed, **settings}), processing_class=tokenizer)


def test_a_step_is_adamw_on_the_mean_over_trained_tokens(tokenizer, tmp_path):
    trainer = make(tmp_path, tokenizer, gradient_accumulation_steps=3)  # 2 + 2 + 1 rows
    model = tiny(tokenizer)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        total, count = 0.0, 0
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            logp = model(ids).logits[0, :-1].log_softmax(-1)
            total = total - logp.gather(1, ids[0, 1:, None]).sum()
            count += ids.shape[1] - 1
        loss = total / count
        plain.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        plain.step()
        found = trainer.step(texts=TEXTS)
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-5) and found["steps"] == 1
        assert found["learning_rate"] == 1e-3
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_two_epochs_on_uneven_batches(tokenizer, tmp_path):
    trainer = make(tmp_path, tokenizer, logging_steps=1)
    found = [trainer.step(texts=TEXTS) for _ in range(2)]
    assert [each["steps"] for each in found] == [3, 3] and trainer.state.global_step == 6
    assert found[1]["loss"] < found[0]["loss"]
    assert [each["step"] for each in trainer.state.log_history] == [1, 2, 3, 4, 5, 6]


def test_ids_padding_and_labels_are_the_texts(tokenizer, tmp_path):
    text, end = "The river is wide.", " wide."
    ids = torch.tensor(tokenizer(text)["input_ids"])
    cut = len(tokenizer(text[: -len(end)])["input_ids"])
    labels = torch.where(torch.arange(len(ids)) < cut, -100, ids)
    padded = torch.cat([torch.zeros(2, dtype=torch.long), ids])
    mask = torch.cat([torch.zeros(2, dtype=torch.long), torch.ones_like(ids)])
    by_text = make(tmp_path, tokenizer).step(texts=[text], texts_labels=[end])
    by_ids = make(tmp_path, tokenizer).step([padded], [mask], [torch.cat([padded[:2], labels])])
    assert by_text["loss"] == pytest.approx(by_ids["loss"], rel=1e-6)
    assert make(tmp_path, tokenizer).step(texts=[text])["loss"] != pytest.approx(by_ids["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "neither"),
        ({"texts": ["a b"], "input_ids": [torch.tensor([1, 2])]}, "not both"),
        ({"texts": "a b"}, "must be a list"),
        ({"texts": [3]}, "texts are strings"),
        ({"texts": ["a b"], "texts_labels": ["c"]}, "end of its text"),
        ({"input_ids": torch.tensor([[1, 2]])}, "must be a list"),
        ({"input_ids": [torch.tensor([1, 2])], "labels": [torch.tensor([1])]}, "1 entries for 2"),
        ({"input_ids": [torch.tensor([1, 2])], "labels": [torch.tensor([-100, -100])]}, "no trained token"),
        ({"input_ids": [[1, 10**6]]}, "outside the model's vocabulary"),
        ({"texts": []}, "texts is empty"),
    ],
)
def test_what_does_not_fit_is_an_error_before_anything_changes(given, said, tokenizer, tmp_path):
    trainer = make(tmp_path, tokenizer)
    with pytest.raises(ValueError, match=said):
        trainer.step(**given)
    assert trainer.state.global_step == 0 and trainer.loop.model is None


def test_options_without_effect_are_said(tokenizer, tmp_path, capsys):
    make(tmp_path, tokenizer, packing=True, num_train_epochs=2, save_steps=7)
    said = " ".join(capsys.readouterr().out.split())
    assert "packing=True has no effect without eval_dataset: evaluation rows alone are packed" in said
    assert "num_train_epochs=2 has no effect here: each call of step trains on its rows once" in said
    assert "save_steps=7 has no effect here: the loop is your own" in said


def test_adapters_and_bfloat16_weights_train(tokenizer, tmp_path):
    """bfloat16 weights take the steps of float32 ones: none is lost to rounding."""
    model = tiny(tokenizer).to(torch.bfloat16)
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    for given, further in ((model, {}), (tiny(tokenizer), {"peft_config": peft_config})):
        args = IterativeSFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, learning_rate=1e-3)
        trainer = IterativeSFTTrainer(given, args, processing_class=tokenizer, **further)
        before = {name: each.clone() for name, each in trainer.model.named_parameters()}
        losses = [trainer.step(texts=TEXTS)["loss"] for _ in range(4)]
        assert losses == sorted(losses, reverse=True)
        for name, each in trainer.model.named_parameters():
            assert each.requires_grad != torch.equal(each, before[name]), name
