"""Rows written in another shape: every pair of shapes once, by value."""

from typing import Any

import pytest

from trl.data.reading.errors import DataError
from trl.data.reading.sources import from_rows
from trl.data.reshape import convert

USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be kind."}
ANSWER = {"role": "assistant", "content": "Hello."}
PAIR = {"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("row", "to", "expected"),
    [
        (
            {"instruction": "Translate.", "input": "cat", "output": "chat"},
            "messages",
            {"messages": asked("Translate.\n\ncat") + said("chat")},
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
                "system": "Be kind.",
            },
            "messages",
            {"messages": [SYSTEM, USER, ANSWER]},
        ),
        (
            {"messages": [SYSTEM, USER, ANSWER]},
            "prompt-completion",
            {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        ),
        ({"messages": [USER, ANSWER]}, "prompt", {"prompt": [USER]}),
        ({"messages": [USER]}, "messages", {"messages": [USER]}),
        ({"question": "2+2?", "answer": 4}, "prompt-completion", {"prompt": asked("2+2?"), "completion": said("4")}),
        ({"prompt": "2+2=", "completion": " 4"}, "messages", {"messages": asked("2+2=") + said(" 4")}),
        ({"prompt": "2+2=", "completion": " 4"}, "prompt-completion", {"prompt": "2+2=", "completion": " 4"}),
        (PAIR, "preference", PAIR),
        (PAIR, "prompt-completion", {"prompt": "2+2=", "completion": " 4"}),
        (
            {"chosen": [USER, ANSWER], "rejected": [USER, *said("Go.")]},
            "preference",
            {"prompt": [USER], "chosen": [ANSWER], "rejected": said("Go.")},
        ),
        (
            {"prompt": "Name one.", "responses": ["a", "b"], "scores": [0.1, 0.9]},
            "preference",
            {"prompt": asked("Name one."), "chosen": said("b"), "rejected": said("a")},
        ),
    ],
)
def test_one_row(row: dict[str, Any], to: str, expected: dict[str, Any]) -> None:
    found = convert(from_rows([row]), to)
    assert found.rows == [expected] and (found.unused, found.unreadable) == ([], [])


def test_pairs_and_labelled_answers_both_ways() -> None:
    labelled = convert(from_rows([PAIR, {**PAIR, "prompt": "3+1="}]), "unpaired").rows
    assert [(row["prompt"], row["completion"], row["label"]) for row in labelled] == [
        ("2+2=", " 4", True),
        ("2+2=", " 5", False),
        ("3+1=", " 4", True),
        ("3+1=", " 5", False),
    ]
    alone = {"prompt": "9+9=", "completion": " 18", "label": True}
    found = convert(from_rows([labelled[1], alone, labelled[0], labelled[3], labelled[2]]), "preference")
    assert found.rows == [PAIR, {**PAIR, "prompt": "3+1="}]
    assert found.unused == [1]
    assert "1 left out, which make no row of this shape: 1" in found.lines()
    # Of labelled answers only the good ones are taken as answers to learn.
    found = convert(from_rows(labelled), "prompt-completion")
    assert [row["completion"] for row in found.rows] == [" 4", " 4"] and found.unused == [1, 3]


def test_columns_that_are_kept_and_named() -> None:
    rows = from_rows([{"ask": "Hi", "reply": "Hello.", "id": 7}])
    found = convert(rows, "messages", {"prompt": "ask", "completion": "reply"}, keep=["id"])
    assert found.rows == [{"messages": [USER, ANSWER], "id": 7}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    found = convert(from_rows([{"messages": [USER, ANSWER], "tools": tools}]), "prompt-completion")
    assert found.rows == [{"prompt": [USER], "completion": [ANSWER], "tools": tools}]


def test_rows_that_cannot_be_converted() -> None:
    with pytest.raises(DataError, match="only rows with a question and an answer"):
        convert(from_rows([{"text": "Once upon a time."}]), "messages")
    with pytest.raises(DataError, match="Cannot read the rows: the columns are `question`"):
        convert(from_rows([{"question": "a", "answer": "b"}]), "preference")
    with pytest.raises(DataError, match="is not a shape of rows: choose one of 'messages'"):
        convert(from_rows([PAIR]), "chat")
    with pytest.raises(DataError, match="no column 'idd' to keep"):
        convert(from_rows([PAIR]), "unpaired", keep=["idd"])
    bad = from_rows([{"question": "a", "answer": "b"}, {"question": None, "answer": "b"}])
    with pytest.raises(DataError, match="row 1: `question` is None"):
        convert(bad, "messages")
    found = convert(bad, "messages", skip_bad_rows=True)
    assert found.unreadable == [1] and len(found.rows) == 1
