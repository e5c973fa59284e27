"""Rewards by models: equal to the model's own logits on the same text, whatever shares a row or a prompt."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    pipeline,
)

from trl import notices
from trl.rewards import models as reward_models
from trl.rewards.calls import RewardError
from trl.rewards.functions import RewardFunctions

SYSTEM = {"role": "system", "content": "You answer in one short sentence and you do not say anything else."}
PROMPTS = ["What is the name of the largest city in France?"] * 3 + ["What is 2+2?"]
TEXTS = ["Paris.", "It is Lyon, I think.", "", "4"]


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    sentences: set[str] = set()
    monkeypatch.setattr(notices, "_printed", sentences)
    return sentences


def chats() -> tuple[list[Any], list[Any]]:
    prompts = [[SYSTEM, {"role": "user", "content": prompt}] for prompt in PROMPTS]
    return prompts, [[{"role": "assistant", "content": text}] for text in TEXTS]


@pytest.fixture(scope="module")
def tokenizer(smol_path: str) -> Any:
    return AutoTokenizer.from_pretrained(smol_path)


def llama(tokenizer: Any, labels: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        num_labels=labels,
        **options,
    )
    return LlamaForSequenceClassification(settings).eval()


def bert(tokenizer: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return BertForSequenceClassification(settings).eval()


def one_by_one(model: Any, tokenizer: Any, texts: list[str], *, pad: bool = True) -> torch.Tensor:
    """The first logit of each text alone. `pad=False`: at the very last token, even if that is the padding token."""
    known, model.config.pad_token_id = model.config.pad_token_id, tokenizer.pad_token_id if pad else None
    with torch.no_grad():
        rows = [tokenizer(text, return_tensors="pt", add_special_tokens=False) for text in texts]
        logits = torch.stack([model(input_ids=row["input_ids"]).logits[0, 0] for row in rows])
    model.config.pad_token_id = known
    return logits


def rendered(tokenizer: Any) -> list[str]:
    return [tokenizer.apply_chat_template(p + c, tokenize=False) for p, c in zip(*chats(), strict=True)]


@pytest.mark.parametrize("budget", [16384, 60, 1])
def test_conversations(tokenizer: Any, budget: int) -> None:
    model = llama(tokenizer)
    expected = one_by_one(model, tokenizer, rendered(tokenizer))
    functions = RewardFunctions(model, processing_classes=tokenizer, chat=True, batch_tokens=budget)
    assert functions.names == ["LlamaForSequenceClassification"] and functions.models == [model]
    prompts, completions = chats()
    table = functions.score(prompts, completions, [[1]] * 4)
    assert functions.judges[0].attachment.is_flat
    torch.testing.assert_close(table[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_a_shared_prompt_is_computed_once(tokenizer: Any) -> None:
    judge = RewardFunctions(llama(tokenizer), processing_classes=tokenizer, chat=True).judges[0]
    judge._attach()
    rows = tokenizer(rendered(tokenizer), add_special_tokens=False)["input_ids"]
    (trees,) = judge._trees(rows, PROMPTS)
    assert [len(tree.branches) for tree in trees] == [3, 0]
    assert sum(len(tree.root.ids) + sum(len(branch.ids) for branch in tree.branches) for tree in trees) < 0.6 * sum(
        map(len, rows)
    )


def test_where_the_turn_ends(tokenizer: Any) -> None:
    """A model that says so is read at the end of the turn, not at the newline that the template puts after it."""
    model = llama(tokenizer, scores_end_of_turn=True)
    texts = [text.removesuffix("\n") for text in rendered(tokenizer)]
    assert all(text.endswith("<|im_end|>") for text in texts)
    table = RewardFunctions(model, processing_classes=tokenizer, chat=True).score(*chats(), [[1]] * 4)
    torch.testing.assert_close(table[:, 0], one_by_one(model, tokenizer, texts, pad=False), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("marked", [False, True])
def test_strings(tokenizer: Any, marked: bool) -> None:
    """A text that was finished ends in the end-of-sequence token, which transformers passes over where it also pads."""
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    model = llama(tokenizer, **({"scores_end_of_turn": True} if marked else {}))
    functions = RewardFunctions(model, processing_classes=[tokenizer], tokenizer=tokenizer)
    end = tokenizer.eos_token_id
    table = functions.score(PROMPTS, TEXTS, [[5, end], [5], [], [end]])
    ends = [tokenizer.eos_token, "", "", tokenizer.eos_token]
    texts = [prompt + text + last for prompt, text, last in zip(PROMPTS, TEXTS, ends, strict=True)]
    expected = one_by_one(model, tokenizer, texts, pad=not marked)
    torch.testing.assert_close(table[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_an_encoder(tokenizer: Any) -> None:
    model = bert(tokenizer, num_labels=1)
    expected = one_by_one(model, tokenizer, rendered(tokenizer))
    for budget in (16384, 50):
        functions = RewardFunctions(model, processing_classes=tokenizer, chat=True, batch_tokens=budget)
        table = functions.score(*chats(), [[1]] * 4)
        assert not functions.judges[0].attachment.is_flat
        torch.testing.assert_close(table[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_attached(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, said: set[str]) -> None:
    def refuse(model: Any) -> None:
        raise ValueError("no head")

    monkeypatch.setattr(reward_models, "attach", refuse)
    model = llama(tokenizer)
    functions = RewardFunctions(model, processing_classes=tokenizer, chat=True, batch_tokens=90)
    table = functions.score(*chats(), [[1]] * 4)
    torch.testing.assert_close(table[:, 0], one_by_one(model, tokenizer, rendered(tokenizer)), atol=1e-5, rtol=1e-5)
    assert "LlamaForSequenceClassification runs outside the engine (ValueError: no head)" in said


def test_without_a_chat_template(tokenizer: Any, smol_path: str, said: set[str]) -> None:
    bare = AutoTokenizer.from_pretrained(smol_path)
    bare.chat_template = None
    model = llama(tokenizer)
    table = RewardFunctions(model, processing_classes=bare, chat=True).score(*chats(), [[1]] * 4)
    texts = [f"{SYSTEM['content']}\n{prompt}\n{text}" for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    torch.testing.assert_close(table[:, 0], one_by_one(model, tokenizer, texts), atol=1e-5, rtol=1e-5)
    assert any("has no chat template: it reads the messages' texts line by line" in sentence for sentence in said)


def test_too_long_and_too_short(tokenizer: Any, said: set[str]) -> None:
    model = llama(tokenizer)
    long = "word " * 300
    functions = RewardFunctions(model, processing_classes=tokenizer)
    table = functions.score([long, ""], ["end", ""], [[1], [1]])
    ids = tokenizer(long + "end")["input_ids"]
    cut = torch.tensor([[ids[0], *ids[-127:]]])
    with torch.no_grad():
        expected = model(input_ids=cut).logits[0, 0]
    torch.testing.assert_close(table[0, 0], expected, atol=1e-5, rtol=1e-5)
    assert math.isfinite(table[1, 0])
    assert any("reads 128 tokens at most: longer texts lose their beginning" in sentence for sentence in said)


def test_several_labels(tokenizer: Any, said: set[str]) -> None:
    model = llama(tokenizer, labels=3)
    table = RewardFunctions(model, processing_classes=tokenizer, chat=True).score(*chats(), [[1]] * 4)
    torch.testing.assert_close(table[:, 0], one_by_one(model, tokenizer, rendered(tokenizer)), atol=1e-5, rtol=1e-5)
    assert "LlamaForSequenceClassification has 3 labels: the logit of the first is the reward" in said


def test_tokenizers(tokenizer: Any, tmp_path: Path, said: set[str]) -> None:
    model = llama(tokenizer)
    with pytest.raises(RewardError, match=r"has no tokenizer: .* Pass it in reward_processing_classes"):
        RewardFunctions(model)
    own = RewardFunctions(model, tokenizer=tokenizer).judges[0].tokenizer
    assert own is tokenizer and any("is read with the policy's tokenizer" in sentence for sentence in said)


def test_by_path(tokenizer: Any, tmp_path: Path, smol2_path: str) -> None:
    folder = tmp_path / "reward-model"
    model = llama(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    expected = one_by_one(model, tokenizer, rendered(tokenizer))
    functions = RewardFunctions([str(folder), folder], chat=True, weights=[1, 2])
    assert functions.names == ["reward-model", "reward-model_2"]
    table = functions.score(*chats(), [[1]] * 4)
    torch.testing.assert_close(table, expected[:, None].repeat(1, 2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(functions.combine(table), 3 * expected, atol=1e-4, rtol=1e-5)
    with pytest.raises(RewardError, match=r"is a language model \(LlamaForCausalLM\) and has no scoring head"):
        RewardFunctions(smol2_path)


def test_pipelines(tokenizer: Any) -> None:
    texts = rendered(tokenizer)
    one = bert(tokenizer, num_labels=1)
    two = bert(tokenizer, id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1})
    three = bert(tokenizer, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    pipes = [pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu") for model in (one, two)]
    functions = RewardFunctions(pipes, chat=True)
    table = functions.score(*chats(), [[1]] * 4)
    torch.testing.assert_close(table[:, 0], one_by_one(one, tokenizer, texts), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        logits = torch.cat([two(**tokenizer(text, return_tensors="pt")).logits for text in texts])
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(table[:, 1], probabilities[:, 1] - probabilities[:, 0], atol=1e-5, rtol=1e-5)
    with pytest.raises(RewardError, match="has the labels a, b, c, which do not tell which is positive"):
        RewardFunctions(pipeline("text-classification", model=three, tokenizer=tokenizer, device="cpu"))
