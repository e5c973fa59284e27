"""Tokens by the word are the tokenizer's own tokens, and where they might not be the tokenizer is asked."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.data.tiny_tokenizers import byte_tokenizer, word_tokenizer
from trl.data.reading.sources import load
from trl.data.tokenizing.sequences import prepare_sequences
from trl.data.tokenizing.spans import mask_tokens
from trl.data.tokenizing.words import Words

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ByteLevel, Split, Digits = pre_tokenizers.ByteLevel, pre_tokenizers.Split, pre_tokenizers.Digits


def cut_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )


PIPELINES: dict[str, tuple[Any, Any]] = {
    "gpt2": (None, ByteLevel(add_prefix_space=False)),
    "smollm": (None, pre_tokenizers.Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])),
    "llama3": (None, cut_by(LLAMA3)),
    "qwen": (normalizers.NFC(), cut_by(QWEN)),
    "gpt4o": (None, cut_by(GPT4O)),
}
TEXTS = ["The sky isn't blue, it's 1234567 or GREY; don't ask me.\n\n  Ünïcödé — naïve café, 你好 привет 😀!\n"] * 20


@cache
def trained(name: str) -> Any:
    normalizer, pre_tokenizer = PIPELINES[name]
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False) for name in ("<|im_start|>", "<|im_end|>", "<|im|>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


ANY_TEXT = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.text(st.characters(max_codepoint=127), max_size=12),
        st.sampled_from(
            ["<|im_start|>", "<|im_end|>", "<|im", "|>", "  \n\n", "'LL", "ſ", "e\u0301", "\u2028", "١٢٣٤"]
        ),
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("name", PIPELINES)
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT, cuts=st.lists(st.integers(0, 60), max_size=4))
def test_the_tokens_are_the_tokenizers_own(name: str, text: str, cuts: list[int]) -> None:
    tokenizer = trained(name)
    words = Words.of(tokenizer)
    assert words is not None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = words.encode(text)
    assert ids is None or ids == encoded["input_ids"]
    cuts = sorted({min(cut, len(text)) for cut in cuts})
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    marked = words.encode_spans(text, spans)
    assert (marked is None) == (ids is None)
    if marked is not None:
        assert marked.ids == ids
        assert marked.mask == mask_tokens(encoded["offset_mapping"], spans)


@pytest.mark.parametrize("name", PIPELINES)
def test_ordinary_text_does_not_need_the_tokenizer(name: str) -> None:
    words = Words.of(trained(name))
    assert words is not None
    for text in TEXTS:
        assert words.encode(text) == trained(name)(text, add_special_tokens=False)["input_ids"]
    assert "sky" in "".join(words.table) and len(words.table) > 20


def test_a_token_over_the_edge_straddles_it() -> None:
    words = Words.of(byte_tokenizer(merges=(("Ġ", "b"),)))
    assert words is not None
    marked = words.encode_spans("a bc", [(2, 4)])
    assert marked is not None and (marked.mask, marked.straddles) == ([False, False, True], True)
    marked = words.encode_spans("a bc", [(1, 4)])
    assert marked is not None and (marked.mask, marked.straddles) == ([False, True, True], False)


def test_what_is_not_known_is_refused() -> None:
    assert Words.of(word_tokenizer()) is None  # words, but no bytes
    stripping = byte_tokenizer()
    stripping.add_tokens([AddedToken("<x>", rstrip=True)])
    assert Words.of(stripping) is None
    spaced = byte_tokenizer()
    spaced.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    assert Words.of(spaced) is None
    lowered = byte_tokenizer()
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert Words.of(lowered) is None


def test_a_character_that_is_cut_otherwise_is_left_to_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Words.of(byte_tokenizer())
    assert words is not None and words.encode("naïve") is not None
    monkeypatch.setattr(words, "_is_cut_alike", lambda character: character != "é")
    assert words.encode("café") is None and words.encode("naïve café") is None
    assert words.encode_spans("café", [(0, 2)]) is None


def test_a_difference_is_noticed_and_mended(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer(merges=(("s", "k"),))
    words = Words.of(tokenizer)
    assert words is not None
    words.table["sky"] = (0,)
    words.texts = 0
    with caplog.at_level(logging.WARNING):
        prepared, _ = prepare_sequences(load([{"text": "sky"}, {"text": "sky"}]), tokenizer)
    assert [tokenizer.decode(ids) for ids in prepared["input_ids"]] == ["sky</s>"] * 2
    assert caplog.messages[0].startswith("Word-by-word tokenisation differs from the tokenizer, which is used alone")
    assert Words.of(tokenizer) is None


def test_the_table_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.data.tokenizing.words.LARGEST_TABLE", 50)
    words = Words(byte_tokenizer())
    for number in range(200):
        words.encode(f"w{chr(97 + number % 26)}{chr(97 + number // 26)} " + "x" * 100)
    assert len(words.table) <= 50 and all(len(word) <= 64 for word in words.table)
