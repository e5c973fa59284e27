"""A data set looked at before training: methods guessed, rows token by token, cuts and duplicates."""

from typing import Any

import pytest
from transformers import AutoTokenizer

from trl.data.inspection import guess_method, inspect, pieces
from trl.data.reading.errors import DataError
from trl.data.reading.sources import from_rows
from trl.data.tokenizing.comparisons import prepare_preferences
from trl.data.tokenizing.sequences import prepare_sequences

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there. 😀"}]
PAIR = {"prompt": "The capital of Peru is", "chosen": " Lima.", "rejected": " a city which I do not know."}


@pytest.fixture(scope="module")
def tokenizer(small_path: str) -> Any:
    return AutoTokenizer.from_pretrained(small_path)


@pytest.mark.parametrize(
    ("row", "method"),
    [
        ({"messages": CHAT}, "sft"),
        ({"text": "Once."}, "sft"),
        ({"prompt": "a", "completion": "b"}, "sft"),
        (PAIR, "dpo"),
        ({"chosen": CHAT, "rejected": [CHAT[0], {**CHAT[1], "content": "No."}]}, "dpo"),
        ({"prompt": "a", "completion": "b", "label": True}, "kto"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "prm"),
        ({"prompt": "a", "solution": "b"}, "grpo"),
        ({"prompt": [CHAT[0]]}, "grpo"),
    ],
)
def test_the_method_is_guessed(row: dict[str, Any], method: str) -> None:
    assert guess_method(from_rows([row])) == method


def test_rows_of_no_method() -> None:
    with pytest.raises(DataError, match="Cannot read the rows: the columns are `height`"):
        guess_method(from_rows([{"height": 2.0}]))


def test_a_chat_token_by_token(tokenizer: Any) -> None:
    data = from_rows([{"messages": CHAT}, {"messages": CHAT[:1] * 1 + [{**CHAT[1], "content": "Yes."}]}] * 2)
    found = inspect(data, tokenizer, rows=1, assistant_only_loss=True)
    prepared, report = prepare_sequences(data, tokenizer, assistant_only_loss=True)
    assert (found.method, found.guessed) == ("sft", True)
    assert found.report.to_dict() == report.to_dict()
    (row,) = found.rows
    parts = row.parts["row"]
    assert [token for piece in parts for token in piece.ids] == prepared[0]["input_ids"]
    assert [piece.trained for piece in parts for _ in piece.ids] == prepared[0]["loss_mask"]
    # Whole, and nothing is lost between the pieces.
    assert "".join(piece.text for piece in parts) == tokenizer.decode(prepared[0]["input_ids"])
    assert any(piece.text.strip() == "😀" and len(piece.ids) > 1 for piece in parts)
    assert "⟦H│ell│o│ there│.│ │😀│<|im_end|>⟧" in row.lines()[1]
    assert found.duplicates == [(2, 0), (3, 1)] and found.rows_repeated == 2
    lengths = [len(ids) for ids in prepared["input_ids"]]
    assert found.longest == [(0, lengths[0]), (2, lengths[2]), (1, lengths[1]), (3, lengths[3])]
    assert found.rows_cut == 0 and found.to_dict()["rows"][0]["tokens"] == lengths[0]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_what_is_cut_is_what_training_does_not_see(tokenizer: Any, mode: str) -> None:
    data = from_rows([PAIR, {**PAIR, "rejected": " Cusco."}])
    (longest, tokens), _ = inspect(data, tokenizer, "dpo").longest
    options = {"max_length": tokens - 3, "truncation_mode": mode}
    found = inspect(data, tokenizer, "dpo", rows=2, **options)
    prepared, _ = prepare_preferences(data, tokenizer, kind="pairs", **options)
    for row, seen in zip(found.rows, prepared, strict=True):
        for name in ("prompt", "chosen", "rejected"):
            kept = [token for piece in row.parts[name] if not piece.cut for token in piece.ids]
            assert kept == seen[f"{name}_ids"]
    assert longest == 0 and found.cut == [{"row": 0, "tokens": tokens, "lost": 3}]
    assert any("✂⟨" in line for line in found.rows[0].lines())

    texts = from_rows([{"text": "One two three four five six seven eight nine ten eleven."}])
    found = inspect(texts, tokenizer, rows=1, **options)
    prepared, _ = prepare_sequences(texts, tokenizer, **options)
    kept = [token for piece in found.rows[0].parts["row"] if not piece.cut for token in piece.ids]
    assert kept == prepared[0]["input_ids"]


def test_prompts_and_labels(tokenizer: Any) -> None:
    data = from_rows([{"prompt": "Add 2 and 3.", "solution": "5"}, {"prompt": "Add 2 and 3.", "solution": "6"}])
    found = inspect(data, tokenizer, "rloo", rows=1, max_prompt_length=3)
    assert found.rows_cut == 2 and found.duplicates == [(1, 0)]
    assert not any(piece.trained for piece in found.rows[0].parts["prompt"])
    assert [piece.cut for piece in found.rows[0].parts["prompt"]][-3:] == [False] * 3
    steps = {"prompt": "1+1+1", "completions": ["1+1=2", "2+1=3"], "labels": [True, False]}
    (row,) = inspect(from_rows([steps]), tokenizer, rows=1).rows
    assert row.label == [1, 0] and sum(piece.trained for piece in row.parts["completion"]) == 2
    unpaired = {"prompt": "2+2=", "completion": " 4", "label": True}
    found = inspect(from_rows([unpaired, {**unpaired, "label": False}]), tokenizer, rows=2)
    assert [row.label for row in found.rows] == [True, False]
    assert found.duplicates == [] and found.prompts_repeated == 1


def test_half_a_character_is_shown_as_what_it_is(tokenizer: Any) -> None:
    ids = tokenizer("é😀", add_special_tokens=False)["input_ids"]
    count = len(ids)
    assert [piece.text for piece in pieces(tokenizer, ids, [False] * count, [False] * count)] == ["é", "😀"]
    half = pieces(tokenizer, ids, [False] * (count - 1) + [True], [False] * count)
    assert [token for piece in half for token in piece.ids] == ids and half[-1].trained
