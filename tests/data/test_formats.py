"""Where data come from, which shape they have, and what is said of data that cannot be read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

from trl.data.formats import DataError, detect, load, messages_of, text_of

ROWS = [{"text": "one"}, {"text": "two"}, {"text": "three"}]
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def texts(dataset: datasets.Dataset) -> list[str]:
    return list(dataset["text"])


# -- load -----------------------------------------------------------------------------------------------------------


def test_load_rows_and_columns() -> None:
    assert texts(load(ROWS)) == ["one", "two", "three"]
    assert texts(load({"text": ["one", "two"]})) == ["one", "two"]
    assert load([{"a": 1}, {"a": 2, "b": 3}])[:] == {"a": [1, 2], "b": [None, 3]}


def test_load_a_dataset_is_the_dataset() -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    assert load(dataset) is dataset


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "txt"])
def test_load_a_file(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"data.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif ending == "json":
        path.write_text(json.dumps(ROWS))
    elif ending == "csv":
        path.write_text("text\none\ntwo\nthree\n")
    elif ending == "txt":
        path.write_text("one\ntwo\nthree\n")
    else:
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    assert texts(load(str(path))) == ["one", "two", "three"]
    assert texts(load(path, split="train[:2]")) == ["one", "two"]


def test_load_a_saved_dataset(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    assert texts(load(tmp_path / "one")) == ["one", "two", "three"]
    assert texts(load(tmp_path / "one", split="train_sft[1:]")) == ["two", "three"]


def test_load_a_saved_dict_by_split(tmp_path: Path) -> None:
    parts = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    )
    parts.save_to_disk(str(tmp_path / "both"))
    assert texts(load(tmp_path / "both", "test")) == ["one"]
    assert texts(load(parts, "train[34%:]")) == ["two", "three"]
    assert texts(load(parts, "train[-1:]+test")) == ["three", "one"]
    with pytest.raises(
        DataError, match="the DatasetDict has no split 'valid'; it has 'train', 'test': name one of them."
    ):
        load(parts, "valid")


def test_the_only_split_is_read_under_any_name_and_said(caplog: pytest.LogCaptureFixture) -> None:
    parts = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    with caplog.at_level(logging.WARNING):
        assert texts(load(parts, "train_sft[:1]")) == ["one"]
    assert caplog.messages == ["the DatasetDict has no split 'train_sft'; its only split 'train' is read."]


def test_load_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "two"}\n')
    assert texts(load(tmp_path)) == ["one"]
    assert texts(load(str(tmp_path), "test")) == ["two"]


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/no/where", "a/b/c"])
def test_a_missing_path(name: str) -> None:
    with pytest.raises(DataError, match=r"There is no file or folder '.*' \(that is .*\): check it\."):
        load(name)


def test_a_name_that_is_not_on_the_hub() -> None:
    with pytest.raises(
        DataError, match=r"Cannot load 'no/such': it is neither a file nor a folder here, and as a data"
    ):
        load("no/such")


def test_unreadable_files(tmp_path: Path) -> None:
    def written(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        return str(tmp_path / name)

    with pytest.raises(DataError, match="The file .* is empty"):
        load(written("empty.jsonl", ""))
    with pytest.raises(DataError, match="Cannot tell the format of .*data.xml' by its ending; known are .jsonl, .json"):
        load(written("data.xml", "<a/>"))
    with pytest.raises(DataError, match=r"bad.jsonl': line 2 is not valid JSON \(.*\). Correct or remove the line."):
        load(written("bad.jsonl", '{"text": "a"}\n{"text":\n'))
    with pytest.raises(DataError, match="list.jsonl': line 2 is not a JSON object"):
        load(written("list.jsonl", '{"text": "a"}\n["b"]\n'))
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="holds neither a data set written by `save_to_disk` nor any file ending in"):
        load(tmp_path / "bare")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ([], r"The data set \(a list\) has no rows"),
        ({"text": []}, r"The data set \(a dict\) has no rows"),
        (["a", "b"], "row 0: a str, not a dict of fields"),
        ([{"a": 1}, {"a": 2}, {"a": "x"}, {"a": 4}], "row 2: `a` is not of the same type as in the rows before it"),
        ({"a": [1], "b": [1, 2]}, r"The columns have different lengths: \{'a': 1, 'b': 2\}"),
        (7, "Cannot read data from a int"),
    ],
)
def test_unreadable_objects(source: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        load(source)


def test_streaming_is_refused() -> None:
    with pytest.raises(DataError, match="load it without `streaming=True`"):
        load(datasets.Dataset.from_list(ROWS).to_iterable_dataset())


# -- detect ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind", "columns", "sentence"),
    [
        ({"text": "a"}, "text", {"text": "text"}, "columns text: read as plain text in `text`"),
        (
            {"prompt": "a", "prompt_id": "1", "messages": TALK},
            "messages",
            {"messages": "messages"},
            "columns prompt, prompt_id, messages: read as conversations in `messages` (prompt, prompt_id ignored)",
        ),
        (
            {"conversations": TALK, "id": 3},
            "messages",
            {"messages": "conversations"},
            "columns conversations, id: read as conversations in `conversations` (id ignored)",
        ),
        (
            {"prompt": "a", "completion": "b"},
            "prompt_completion",
            {"prompt": "prompt", "completion": "completion"},
            "columns prompt, completion: read as prompts in `prompt` and their completions in `completion`",
        ),
        (
            {"prompt": TALK[:1], "completion": TALK[1:], "text": "c"},
            "prompt_completion",
            {"prompt": "prompt", "completion": "completion"},
            "columns prompt, completion, text: read as prompts in `prompt` and their completions in `completion` "
            "(text ignored)",
        ),
        (
            {"input_ids": [1], "labels": [1], "text": "a"},
            "tokens",
            {"input_ids": "input_ids", "labels": "labels"},
            "columns input_ids, labels, text: read as token ids in `input_ids` with `labels` (text ignored)",
        ),
        (
            {"messages": TALK, "tools": "[]"},
            "messages",
            {"messages": "messages", "tools": "tools"},
            "columns messages, tools: read as conversations in `messages` with `tools`",
        ),
    ],
)
def test_detect(row: dict[str, Any], kind: str, columns: dict[str, str], sentence: str) -> None:
    shape = detect(load([row]))
    assert (shape.kind, shape.columns, shape.sentence) == (kind, columns, sentence)
    assert shape.conversational is (kind == "messages" or "text" in row and isinstance(row.get("prompt"), list))


def test_detect_by_text_field() -> None:
    both = load([{"body": "a", "chat": TALK, "text": "b"}])
    assert detect(both, "body").columns == {"text": "body"}
    assert detect(both, "chat").columns == {"messages": "chat"}
    assert detect(both).columns == {"text": "text"}
    # The old scripts say "messages" of conversations, and some say it of data that have none.
    assert detect(load([{"messages": TALK}]), "messages").kind == "messages"
    shape = detect(load([{"prompt": "a", "completion": "b"}]), "messages")
    assert shape.kind == "prompt_completion"
    assert shape.sentence.endswith("(`dataset_text_field` 'messages' not used: there is no such column)")
    shape = detect(load([{"n": 1, "messages": TALK}]), "n")
    assert shape.sentence.endswith("(n ignored; `dataset_text_field` 'n' not used: it cannot be read as text or "
                                   "conversations)")  # fmt: skip


def test_detect_looks_at_values_when_the_type_is_open() -> None:
    rows = [{"messages": None}, {"messages": []}, {"messages": TALK}]
    assert detect(load(rows)).kind == "messages"


def test_detect_nothing() -> None:
    with pytest.raises(DataError) as error:
        detect(load([{"question": "a", "label": 1}]))
    assert str(error.value) == (
        "Cannot read the rows: the columns are `question` (text), `label` (numbers). Understood are `text` (a string), "
        "`messages` (a list of {role, content}), `prompt` and `completion` (strings or such lists), or `input_ids` "
        "(with `labels` or a mask). Rename a column, or name the column of text or conversations with "
        "`dataset_text_field` (now 'text')."
    )


def test_detect_two_conversations() -> None:
    with pytest.raises(DataError, match="Several columns hold conversations: `a`, `b`. Name the one to train on"):
        detect(load([{"a": TALK, "b": TALK}]))


# -- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, "row 3: `m` is None. Fill it in, or remove such rows with `dataset.filter`."),
        ("hi", "row 3: `m` is a str, not a list of messages {role, content}."),
        ([], "row 3: `m` is an empty list. Remove such rows with `dataset.filter`."),
        (["hi"], "row 3: `m[0]` is a str, not a message {role, content}."),
        (
            [TALK[0], {"content": "a"}],
            "row 3: `m[1]` has no `role`. Every message needs one, such as 'user' or 'assistant'.",
        ),
        (
            [{"role": "user", "content": None}],
            "row 3: `m[0].content` is None. Give the message a text, or remove the row with `dataset.filter`.",
        ),
        ([{"role": "user", "content": 5}], "row 3: `m[0].content` is a int, not a string. Convert it to one."),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            "row 3: `m[0].content` has blocks that are not text. Only text can be trained on here.",
        ),
    ],
)
def test_broken_messages(value: Any, sentence: str) -> None:
    with pytest.raises(DataError) as error:
        messages_of(value, "row 3: `m`")
    assert str(error.value) == sentence


def test_messages() -> None:
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages_of([{"role": "user", "content": blocks, "name": None}], "") == [{"role": "user", "content": "ab"}]
    call = {"function": {"name": "f", "arguments": {"x": 1, "y": None}}}
    assert messages_of([{"role": "assistant", "content": None, "tool_calls": [call]}], "") == [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    ]


def test_texts() -> None:
    assert text_of("a", "") == "a"
    with pytest.raises(DataError, match="row 3: `t` is None. Fill it in"):
        text_of(None, "row 3: `t`")
    with pytest.raises(DataError, match="row 3: `t` is a int, not a string"):
        text_of(1, "row 3: `t`")
