"""Chat templates set and cloned; tokens and embeddings that grow together, with and without tied weights."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AddedToken, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl.data.batching.collate import Branch, Tree
from trl.engine.forest import flat, padded
from trl.engine.probe import attach
from trl.engine.score import score
from trl.models import adapters, load, vocabulary

TEMPLATE = "{% for m in messages %}<|turn|>{{ m['role'] }} {{ m['content'] }}<|end|>{% endfor %}"
CHAT = [{"role": "user", "content": "w1 w2"}]


def tokenizer(words: int = 40) -> PreTrainedTokenizerFast:
    """Words `w0`, `w1`, ... and an end token."""
    table = {"</s>": 0, "<unk>": 1, **{f"w{index}": index + 2 for index in range(words)}}
    backend = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def source() -> PreTrainedTokenizerFast:
    """Another vocabulary, with a template and three tokens of its own; its end of turn ends the text."""
    found = tokenizer(7)
    found.add_tokens([AddedToken("<|turn|>", special=True), AddedToken("<|end|>", special=True), "<tool>"])
    found.eos_token = "<|end|>"
    found.chat_template = TEMPLATE
    return found


def model(rows: int, tied: bool = True, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=rows, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, eos_token_id=0, tie_word_embeddings=tied)  # fmt: skip
    return LlamaForCausalLM(config)


# --- set ----------------------------------------------------------------------------------------------------------


def test_a_template_is_set_from_every_kind_of_source(source: Any, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    source.save_pretrained(tmp_path / "folder")
    for each in (TEMPLATE, tmp_path / "chat.jinja", str(tmp_path / "chat.jinja"), str(tmp_path / "folder"), source):
        target = vocabulary.set_chat_template(tokenizer(), each)
        assert target.chat_template == TEMPLATE
        assert target.apply_chat_template(CHAT, tokenize=False) == "<|turn|>user w1 w2<|end|>"
        assert len(target) == 42 and target.eos_token == "</s>"


def test_sources_that_have_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(load.ModelError, match="no chat template file at ./absent.jinja"):
        vocabulary.set_chat_template(tokenizer(), "./absent.jinja")
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(load.ModelError, match=f"{tmp_path} has no chat template to copy"):
        vocabulary.set_chat_template(tokenizer(), str(tmp_path))


def test_chat_template_path_sets_or_clones(source: Any, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    source.save_pretrained(tmp_path / "folder")
    start = model(42)
    assert vocabulary.use_chat_template(start, tokenizer(), str(tmp_path / "chat.jinja"))[2] == []
    assert start.config.vocab_size == 42
    assert vocabulary.use_chat_template(start, tokenizer(), str(tmp_path / "folder"))[2] == list(range(42, 64))
    assert start.config.vocab_size == 64


# --- clone --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_clone_adds_tokens_and_rows(source: Any, tied: bool) -> None:
    start, target = model(42, tied), tokenizer()
    old = start.get_input_embeddings().weight.detach().clone()
    old_head = start.get_output_embeddings().weight.detach().clone()
    random_state = torch.random.get_rng_state()
    again, target, added = vocabulary.clone_chat_template(start, target, source)

    assert again is start and target.chat_template == TEMPLATE
    assert added == list(range(42, 64))
    assert target.convert_ids_to_tokens([42, 43, 44, 45, 63]) == [
        *("<tool>", "<|turn|>", "<|end|>", "<extra_id_0>", "<extra_id_18>")
    ]
    assert target.all_special_tokens.count("<|turn|>") <= 1 and target.added_tokens_decoder[43].special
    assert not target.added_tokens_decoder[42].special
    assert (target.eos_token, target.eos_token_id) == ("<|end|>", 44)
    assert start.config.eos_token_id == start.generation_config.eos_token_id == 44
    assert len(target) == start.config.vocab_size == start.vocab_size == 64

    weight, head = start.get_input_embeddings().weight, start.get_output_embeddings().weight
    assert (weight is head) == tied
    for new, before in ((weight, old), (head, old_head)):
        assert torch.equal(new[:42], before)
        torch.testing.assert_close(new[42:], before.mean(0).expand(22, -1))
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert target("<|turn|> w1 <|end|>")["input_ids"] == [43, 3, 44]


def test_the_multiple_may_be_other_or_none(source: Any) -> None:
    for multiple, rows in ((None, 45), (8, 48), (5, 45)):
        start, target, added = vocabulary.clone_chat_template(model(42), tokenizer(), source, multiple)
        assert (start.config.vocab_size, len(target), added) == (rows, rows, list(range(42, rows)))


def test_spare_rows_are_used_first_and_never_cut(source: Any) -> None:
    start = model(100)
    weight = start.get_input_embeddings().weight.detach().clone()
    _, target, added = vocabulary.clone_chat_template(start, tokenizer(), source)
    assert added == [42, 43, 44] and len(target) == 45
    assert torch.equal(start.get_input_embeddings().weight, weight)


def test_a_second_clone_changes_nothing(source: Any) -> None:
    start, target, _ = vocabulary.clone_chat_template(model(42), tokenizer(), source)
    weight = start.get_input_embeddings().weight.detach().clone()
    assert vocabulary.clone_chat_template(start, target, source)[2] == []
    assert torch.equal(start.get_input_embeddings().weight, weight) and len(target) == 64


def test_a_clone_after_the_adapter_is_refused(source: Any) -> None:
    wrapped = adapters.wrap(model(42), peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(load.ModelError, match="clone the chat template before adding an adapter"):
        vocabulary.clone_chat_template(wrapped, tokenizer(), source)


# --- the engine and adapters --------------------------------------------------------------------------------------


def check_scores(start: Any, target: Any) -> None:
    """Flat rows with added tokens in them score as the model's own logits do."""
    ids = target.apply_chat_template([*CHAT, {"role": "assistant", "content": "w3 w4 w5"}], return_dict=False)
    ids = ids + [42, 63]
    assert {42, 43, 44, 63} <= set(ids)
    attachment = attach(start)
    assert (attachment.is_flat, attachment.head_reason) == (True, None)
    trees = [Tree(Branch(ids, [True] * len(ids))), Tree(Branch(ids[:4], [True] * 4))]
    own = start(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = own.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    for layout in (flat, padded):
        found = score(start, layout(trees)).logp_N
        torch.testing.assert_close(found, torch.cat([expected, expected[:3]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("early", [False, True])
def test_the_engine_scores_added_tokens(source: Any, tied: bool, early: bool) -> None:
    start = model(42, tied).eval()
    if early:
        attach(start)
    check_scores(*vocabulary.clone_chat_template(start, tokenizer(), source)[:2])


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_train_beside_lora(source: Any, tied: bool) -> None:
    start, target, _ = vocabulary.clone_chat_template(model(42, tied).eval(), tokenizer(), source)
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[42, 43, 44], task_type="CAUSAL_LM")
    wrapped = adapters.for_training(start, config).eval()
    check_scores(wrapped, target)
    score(wrapped, flat([Tree(Branch([43, 3, 44, 5], [True] * 4))])).logp_N.sum().backward()
    deltas = [
        (name, p.grad) for name, p in wrapped.named_parameters() if "trainable_tokens" in name and p.requires_grad
    ]
    assert deltas and all(grad is not None and grad[1:].abs().sum() > 0 for _, grad in deltas)


def test_frozen_new_rows_are_said_with_the_remedy(capsys: pytest.CaptureFixture) -> None:
    start = model(64)
    for settings in (
        {"trainable_token_indices": [42]},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ):
        vocabulary.check_added_tokens(start, peft.LoraConfig(**settings), [42, 43])
    vocabulary.check_added_tokens(start, peft.LoraConfig(), [])
    vocabulary.check_added_tokens(start, None, [42])
    assert capsys.readouterr().out == ""
    vocabulary.check_added_tokens(start, peft.LoraConfig(), [42, 43])
    said = capsys.readouterr().out
    assert "2 tokens were added (ids 42-43)" in said
    assert "trainable_token_indices=[...]" in said and "modules_to_save=['embed_tokens'], ensure_weight_tying" in said
    vocabulary.check_added_tokens(model(64, tied=False), peft.LoraConfig(), [42, 43])
    assert "modules_to_save=['embed_tokens', 'lm_head']\n" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_over_a_grown_model_reloads(source: Any, tied: bool, tmp_path: Path) -> None:
    model(42, tied).save_pretrained(tmp_path / "base")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    start, target, _ = vocabulary.clone_chat_template(start, tokenizer(), source)
    with torch.no_grad():
        start.get_input_embeddings().weight[42:] += torch.randn(22, 16)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = adapters.for_training(start, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    target.save_pretrained(tmp_path / "adapter")

    again = load.load_causal_lm(tmp_path / "adapter").eval()
    assert again.config.vocab_size == len(load.load_tokenizer(tmp_path / "adapter")) == 64
    ids = torch.tensor([[43, 3, 44, 63, 42]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, wrapped(input_ids=ids).logits, rtol=0, atol=0)
