"""The collator of older scripts: which tokens it trains, and what it refuses."""

import pytest
import torch
from transformers import AutoTokenizer

from tests.trainer.helpers import sft, tiny
from trl import SFTTrainer
from trl.data.batching.completion_only import DataCollatorForCompletionOnlyLM


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


def rows_of(tokenizer, *texts):
    return [{"input_ids": tokenizer(text)["input_ids"], "row": number} for number, text in enumerate(texts)]


def trained(tokenizer, batch):
    return [
        tokenizer.decode(ids[labels != -100]) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]


def test_what_follows_the_last_response_template(tokenizer):
    collator = DataCollatorForCompletionOnlyLM("### Answer:", tokenizer=tokenizer)
    batch = collator(rows_of(tokenizer, "### Question: a\n### Answer: one two", "### Answer: x\n### Answer: y"))
    assert trained(tokenizer, batch) == [" one two", " y"]
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows_of(
        tokenizer, "### Question: a\n### Answer: one two", "### Answer: x\n### Answer: y")]  # fmt: skip


def test_every_response_up_to_the_next_instruction(tokenizer):
    collator = DataCollatorForCompletionOnlyLM("### Answer:", "### Question:", tokenizer=tokenizer)
    text = "### Question: a\n### Answer: one\n### Question: b\n### Answer: two"
    assert trained(tokenizer, collator(rows_of(tokenizer, text))) == [" one\n two"]


def test_a_row_without_the_template_is_named(tokenizer):
    collator = DataCollatorForCompletionOnlyLM("### Answer:", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="row 1: the response template '### Answer:' is not in its tokens"):
        collator(rows_of(tokenizer, "### Answer: fine", "nothing here"))


def test_token_ids_and_refusals(tokenizer):
    ids = tokenizer.encode("### Answer:", add_special_tokens=False)
    batch = DataCollatorForCompletionOnlyLM(ids, tokenizer=tokenizer)(rows_of(tokenizer, "### Answer: yes"))
    assert trained(tokenizer, batch) == [" yes"]
    with pytest.raises(ValueError, match="mlm=True"):
        DataCollatorForCompletionOnlyLM("x", tokenizer=tokenizer, mlm=True)


def test_sft_with_it_trains_on_the_answers(tmp_path, tokenizer):
    texts = [{"text": f"### Question: {word}?\n### Answer: {word} {word}"} for word in ("cat", "mat", "river", "wall")]
    settings = {"assistant_only_loss": False, "max_steps": 1, "per_device_train_batch_size": 4}
    config = sft(tmp_path, tiny(tokenizer), tokenizer, texts, **settings).args
    collator = DataCollatorForCompletionOnlyLM("### Answer:", tokenizer=tokenizer)
    trainer = SFTTrainer(tiny(tokenizer), config, collator, texts, processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    words = [tokenizer.decode(batch["target_N"][batch["seq_N"] == number]) for number in range(4)]
    assert words == [f" {word} {word}<|im_end|>" for word in ("cat", "mat", "river", "wall")]
    with torch.no_grad():
        expected = trainer.loss(trainer.model, batch, trainer.step_for(batch))[0]["tokens"].item() / len(
            batch["target_N"]
        )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)
