"""What would fail at saving or opening is found before a run, or put right."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import IterableDataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.trainer.helpers import DEFAULTS, chat_rows, pair_rows, sft, tiny, tiny_scorer
from trl import RewardConfig, RewardTrainer
from trl.losses.tokens import Metric
from trl.models import load, saving, vocabulary


@pytest.fixture
def tokenizer(smol_path: str) -> Any:
    return AutoTokenizer.from_pretrained(smol_path)


def test_a_generation_config_with_settings_of_sampling_is_saved(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny(tokenizer)
    model.generation_config.temperature = 0.6  # as published without do_sample=True
    trainer = sft(tmp_path, model, tokenizer, chat_rows(4), max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-1" / "generation_config.json").read_text())
    assert saved["do_sample"] is True and saved["temperature"] == 0.6
    model.generation_config.num_beams, model.generation_config.num_return_sequences = 2, 3
    with pytest.raises(ValueError, match=r"generation_config cannot be saved: .*num_return_sequences.*reset it"):
        saving.mend_generation_config(model)


def test_what_cannot_be_saved_is_told_before_the_first_step(tokenizer: Any, tmp_path: Path) -> None:
    trainer = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(4), max_steps=1)
    trainer.model.config.note = lambda: None
    with pytest.raises(ValueError, match="the model's configuration cannot be saved, so the training would be"):
        trainer.train()
    assert trainer.state.global_step == 0
    del trainer.model.config.note
    trainer.args.note = lambda: None
    with pytest.raises(ValueError, match="the trainer's arguments cannot be saved"):
        trainer.train()


def test_tokens_without_a_row_are_told_before_the_first_step(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny(tokenizer)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<ticket>"])
    sft(tmp_path, model, tokenizer, [{"text": "no such token"}] * 2, assistant_only_loss=False)  # no text has it: fine
    sentence = rf"train row 1: '<ticket>' is token {rows}, but the model's embedding has {rows:,} rows and the tok"
    text = [{"text": "a cat"}, {"text": "a <ticket> for two"}]
    with pytest.raises(load.ModelError, match=sentence):
        sft(tmp_path, model, tokenizer, text, assistant_only_loss=False)
    pairs = [{"prompt": "a", "chosen": each, "rejected": " c"} for each in (" b", " <ticket>")]
    with pytest.raises(load.ModelError, match=sentence):
        RewardTrainer(
            tiny_scorer(AutoTokenizer.from_pretrained(tokenizer.name_or_path)),
            RewardConfig(output_dir=str(tmp_path), **DEFAULTS),
            train_dataset=pairs,
            processing_class=tokenizer,
        )
    stream = IterableDataset.from_generator(lambda: iter(text))
    trainer = sft(tmp_path, model, tokenizer, stream, assistant_only_loss=False, max_steps=1)
    with pytest.raises(load.ModelError, match="row 1: '<ticket>' is token"):
        trainer.train()
    tokenizer.pad_token = "<ticket>"
    with pytest.raises(load.ModelError, match="the tokenizer's pad_token: '<ticket>' is token"):
        sft(tmp_path, model, tokenizer, [{"text": "no such token"}] * 2, assistant_only_loss=False)


def test_a_padding_token_of_the_model_outside_its_vocabulary_is_replaced(tokenizer: Any) -> None:
    model = tiny(tokenizer)
    model.config.pad_token_id = len(tokenizer) + 5
    vocabulary.check_special_tokens(model, tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [49152]},
        {},
    ],
    ids=["lora", "tokens", "frozen"],
)
def test_an_adapter_with_new_tokens_opens(tokenizer: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    tiny(tokenizer, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(["<ticket>"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(len(tokenizer))
    config = peft.LoraConfig(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings})
    trainer = sft(tmp_path, model, tokenizer, [{"text": "a <ticket> for two"}] * 2, config, assistant_only_loss=False,
                  max_steps=1)  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    again = load.load_causal_lm(tmp_path / "adapter")
    ids = torch.tensor([[5, len(tokenizer) - 1, 9]])
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, trainer.model.eval()(ids).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_reward_model_scores_in_transformers_as_here(tokenizer: Any, tmp_path: Path, adapter: bool) -> None:
    model = tiny_scorer(tokenizer)
    model.save_pretrained(tmp_path / "base")
    assert tokenizer.pad_token == tokenizer.eos_token
    trainer = RewardTrainer(
        str(tmp_path / "base"),
        RewardConfig(output_dir=str(tmp_path), max_steps=1, **DEFAULTS),
        train_dataset=pair_rows(4),
        eval_dataset=pair_rows(2),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(target_modules=["q_proj"]) if adapter else None,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    if adapter:
        again = load.load_scorer(tmp_path / "saved")
    else:
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    rows = [row["prompt_ids"] + row[name] for row in trainer.eval_dataset for name in ("chosen_ids", "rejected_ids")]
    opened = AutoTokenizer.from_pretrained(tmp_path / "saved")
    batch = opened.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        scores = again.eval()(**batch).logits
    assert scores.mean().item() == pytest.approx(trainer.evaluate()["eval_mean_reward"], abs=1e-5)
    assert opened.pad_token_id not in {ids[-1] for ids in rows}


def test_sums_of_an_apple_gpu_are_kept_on_the_host(tokenizer: Any, tmp_path: Path) -> None:
    class OnApple:
        """A total on a device without float64."""

        device = torch.device("mps")

        def to(self, device: torch.device) -> torch.Tensor:
            assert device.type == "cpu"
            return torch.tensor(3.0)

    trainer = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(2))
    trainer._add("train", {"score": Metric(OnApple(), 2.0)})  # type: ignore[arg-type]
    assert trainer._reduced("train")["score"] == 1.5
