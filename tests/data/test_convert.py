"""Conversions of rows, with what TRL 1.16 makes of the same ones."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

import trl
from tests.data import tiny_tokenizers as tiny
from tests.data.tiny_tokenizers import assistant, system, user, word_tokenizer
from trl import (
    apply_chat_template,
    extract_prompt,
    is_conversational,
    is_conversational_from_value,
    maybe_apply_chat_template,
    maybe_convert_to_chatml,
    maybe_extract_prompt,
    maybe_unpair_preference_dataset,
    unpair_preference_dataset,
)
from trl.data import convert
from trl.data.reading.errors import DataError

ASKED, SAID, WORSE = [user("hi")], assistant("ho"), assistant("he")
HEAD = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nhi<|im_end|>\n"
)
BEGIN = "<|im_start|>assistant\n"


def test_they_are_public() -> None:
    assert {name for name in convert.__all__ if getattr(trl, name) is getattr(convert, name)} == set(convert.__all__)
    assert set(convert.__all__) <= set(trl.__all__)
    heavy = "import trl, sys; sys.exit(any(name in sys.modules for name in ('torch', 'datasets', 'trl.data.convert')))"
    assert subprocess.run([sys.executable, "-c", heavy], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("row", "roles", "turns"),
    [
        ({"messages": [*ASKED, SAID]}, True, False),
        ({"prompt": ASKED, "completion": [SAID]}, True, False),
        ({"chosen": ASKED, "rejected": ASKED}, True, False),
        ({"prompt": "hi", "completion": "ho"}, False, False),
        ({"text": "hi"}, False, False),
        ({"conversations": ASKED}, False, False),
        ({"conversations": [{"from": "user", "value": "hi"}]}, False, True),
        ({"conversations": "hi"}, False, False),
        ({"prompt": []}, False, False),
    ],
)
def test_what_is_a_conversation(row: dict[str, Any], roles: bool, turns: bool) -> None:
    assert (is_conversational(row), is_conversational_from_value(row)) == (roles, turns)


@pytest.mark.parametrize(
    ("row", "rendered"),
    [
        ({"messages": [*ASKED, SAID], "id": 1}, {"text": f"{HEAD}{BEGIN}ho<|im_end|>\n"}),
        ({"prompt": ASKED}, {"prompt": HEAD + BEGIN}),
        ({"prompt": [*ASKED, SAID]}, {"prompt": f"{HEAD}{BEGIN}ho"}),
        ({"prompt": ASKED, "completion": [SAID]}, {"prompt": HEAD + BEGIN, "completion": "ho<|im_end|>\n"}),
        (
            {"prompt": ASKED, "completion": [SAID], "label": False},
            {"prompt": HEAD + BEGIN, "completion": "ho<|im_end|>\n", "label": False},
        ),
        # Both begin with an `h`, but the prompt alone has none.
        (
            {"prompt": [system("x"), *ASKED], "chosen": [SAID], "rejected": [WORSE]},
            {
                "prompt": f"<|im_start|>system\nx<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n{BEGIN}",
                "chosen": "ho<|im_end|>\n",
                "rejected": "he<|im_end|>\n",
            },
        ),
        (
            {"chosen": [*ASKED, SAID], "rejected": [*ASKED, WORSE]},
            {"chosen": f"{HEAD}{BEGIN}ho<|im_end|>\n", "rejected": f"{HEAD}{BEGIN}he<|im_end|>\n"},
        ),
    ],
)
def test_rendered(row: dict[str, Any], rendered: dict[str, Any], smol_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smol_path)
    assert apply_chat_template(row, tokenizer) == rendered
    assert maybe_apply_chat_template(row, tokenizer) == rendered


def test_rendered_or_not() -> None:
    template = "{%- for tool in tools or [] %}{{- tool.name }}{%- endfor %}{{- tone | default('') }}" + tiny.CHATML
    tokenizer = word_tokenizer(tiny.CHATML_TOKENS, template)
    row = {"prompt": "hi", "completion": "ho"}
    assert maybe_apply_chat_template(row, tokenizer) is row
    talk = {"messages": ASKED, "chat_template_kwargs": {"tone": "kind"}}
    assert apply_chat_template(talk, tokenizer, tools=[{"name": "call"}])["text"].startswith("callkind<|im_start|>")
    assert apply_chat_template({"messages": ASKED}, tokenizer, tone="x")["text"].startswith("x<|im_start|>")
    with pytest.raises(DataError, match=r"The fields \['completion'\] make no row that can be rendered: give"):
        apply_chat_template({"completion": [SAID]}, tokenizer)
    with pytest.raises(DataError, match="The last message of `prompt` has the role 'system'"):
        apply_chat_template({"prompt": [system("x")]}, tokenizer)


def test_a_template_that_says_more_before_the_turn() -> None:
    template = tiny.CHATML.replace("assistant\\n' }}{%- endif", "assistant\\n<think>\\n' }}{%- endif")
    row = {"prompt": ASKED, "completion": [SAID]}
    assert apply_chat_template(row, word_tokenizer(tiny.CHATML_TOKENS, template)) == {
        "prompt": f"<|im_start|>user\nhi<|im_end|>\n{BEGIN}",
        "completion": "ho<|im_end|>\n",
    }


PAIR = {"chosen": [*ASKED, SAID], "rejected": [*ASKED, WORSE]}
APART = {"prompt": ASKED, "chosen": [SAID], "rejected": [WORSE]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR, APART),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        ),
        ({"chosen": "same", "rejected": "same"}, {"prompt": "sam", "chosen": "e", "rejected": "e"}),
        ({"chosen": "abc", "rejected": "abcd"}, {"prompt": "ab", "chosen": "c", "rejected": "cd"}),
        ({"chosen": "x", "rejected": "y"}, {"prompt": "", "chosen": "x", "rejected": "y"}),
    ],
)
def test_prompts(row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert extract_prompt(row) == expected == maybe_extract_prompt(row)
    assert maybe_extract_prompt({"prompt": "hi", **PAIR}) == APART
    for other in (APART, {"prompt": "a", "chosen": "b", "rejected": "c"}, {"messages": ASKED}):
        assert maybe_extract_prompt(other) is other
    with pytest.raises(DataError, match="`chosen` or `rejected` is empty"):
        extract_prompt({"chosen": "", "rejected": "a"})


def test_turns_become_messages() -> None:
    turns = [{"from": "user", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    messages = [user("hi"), {"role": "gpt", "content": "ho"}]
    assert maybe_convert_to_chatml({"conversations": copy.deepcopy(turns), "id": 1}) == {"messages": messages, "id": 1}
    assert maybe_convert_to_chatml({"prompt": copy.deepcopy(turns)}) == {"prompt": messages}
    assert maybe_convert_to_chatml({"messages": ASKED}) == {"messages": ASKED}
    assert maybe_convert_to_chatml({"conversations": "hi"}) == {"messages": "hi"}


PAIRS = {"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"], "id": [1, 2]}
UNPAIRED = {
    "completion": ["c", "d", "e", "f"],
    "label": [True, True, False, False],
    "prompt": ["a", "b", "a", "b"],
    "id": [1, 2, 1, 2],
}


def test_unpaired() -> None:
    rows = datasets.Dataset.from_dict(PAIRS)
    assert unpair_preference_dataset(rows)[:] == UNPAIRED == maybe_unpair_preference_dataset(rows)[:]
    several = datasets.DatasetDict({"train": rows, "test": rows})
    assert maybe_unpair_preference_dataset(several)["test"][:] == UNPAIRED
    assert unpair_preference_dataset(several, batch_size=1)["train"]["completion"][:] == ["c", "e", "d", "f"]
    stream = list(unpair_preference_dataset(rows.to_iterable_dataset()))
    assert stream == [dict(zip(UNPAIRED, row, strict=True)) for row in zip(*UNPAIRED.values(), strict=True)]
    single = datasets.Dataset.from_dict({"prompt": ["a"]})
    assert maybe_unpair_preference_dataset(single) is single
    assert "prompt" not in unpair_preference_dataset(rows.remove_columns("prompt")).column_names
