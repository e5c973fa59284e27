"""Where data come from, which shape they have, and what is said of data that cannot be read."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from trl.data.reading.errors import DataError
from trl.data.reading.formats import detect
from trl.data.reading.messages import messages_of, text_of
from trl.data.reading.sources import load

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


@pytest.mark.parametrize(
    ("there", "wanted", "found"),
    [
        (("train_sft", "test_sft"), "train", "train_sft"),
        (("train_sft", "test_sft"), "test", "test_sft"),
        (("train", "validation"), "test", "validation"),
        (("train", "evaluation", "validation_1"), "test", "validation_1"),
        (("train", "eval"), "test", "eval"),
        (("train", "eval"), "test[:1]", "eval"),
    ],
)
def test_a_split_that_stands_in(there: Any, wanted: str, found: str, caplog: pytest.LogCaptureFixture) -> None:
    parts = datasets.DatasetDict({name: datasets.Dataset.from_list([{"text": name}]) for name in there})
    with caplog.at_level(logging.WARNING):
        assert texts(load(parts, wanted)) == [found]
        assert [row["text"] for row in load(parts, wanted, streaming=True)] == [found]
    assert (
        caplog.messages == [f"the DatasetDict has no split '{wanted[:5].strip('[')}'; '{found}' stands in for it."] * 2
    )


@pytest.mark.parametrize(
    ("there", "wanted", "meant"),
    [
        (("train_sft", "train_gen"), "train", " Did you mean 'train_sft'?"),
        (("train", "train_sft"), "test", ""),
        (("train", "test_sft", "test_gen", "validation"), "test", " Did you mean 'test_sft'?"),
        (("train", "test"), "trian", " Did you mean 'train'?"),
        (("one", "two"), "train", ""),
    ],
)
def test_no_split_stands_in(there: Any, wanted: str, meant: str) -> None:
    parts = datasets.DatasetDict({name: datasets.Dataset.from_list([{"text": name}]) for name in there})
    with pytest.raises(DataError) as error:
        load(parts, wanted)
    names = ", ".join(map(repr, there))
    assert str(error.value) == f"the DatasetDict has no split {wanted!r}; it has {names}: name one of them.{meant}"


def test_load_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "two"}\n')
    assert texts(load(tmp_path)) == ["one"]
    assert texts(load(str(tmp_path), "test")) == ["two"]


NAMED = "has the splits 'train' (a.jsonl, b.jsonl) and 'test' (eval.jsonl); "


@pytest.mark.parametrize(
    ("files", "split", "rows", "sentences"),
    [
        (["a.jsonl", "b.jsonl"], "train", ["a", "b"], []),
        # A file that is named after a split does not hide the others.
        (["a.jsonl", "b.jsonl", "eval.jsonl"], "train", ["a", "b"], [f"{NAMED}'train' is read."]),
        (["a.jsonl", "b.jsonl", "eval.jsonl"], "test", ["eval"], [f"{NAMED}'test' is read."]),
        (
            ["train.jsonl", "eval.jsonl"], "train", ["train"],
            ["has the splits 'train' (train.jsonl) and 'test' (eval.jsonl); 'train' is read."],
        ),
        (
            ["train.jsonl", "dev.jsonl", "x.jsonl"], "train", ["train"],
            [
                "not read, because no split is called so: x.jsonl.",
                "has the splits 'train' (train.jsonl) and 'validation' (dev.jsonl); 'train' is read.",
            ],
        ),
        (
            ["a.jsonl", "dev/more.jsonl"], "train", ["a"],
            ["has the splits 'train' (a.jsonl) and 'validation' (dev/more.jsonl); 'train' is read."],
        ),
        (
            ["test.jsonl", "dev/more.jsonl"], "validation", ["more"],
            ["not read, because no split is called so: test.jsonl."],
        ),
        (["a.jsonl", "b.jsonl", "x.csv"], "train", ["a", "b"], ["because the other files have another format: x.csv."]),
        (["dev.jsonl"], "train", ["dev"], ["has no split 'train'; its only split 'validation' is read."]),
    ],
)  # fmt: skip
def test_what_of_a_folder_is_read(
    files: list[str], split: str, rows: list[str], sentences: list[str], tmp_path: Path, caplog: Any
) -> None:
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text\n{path.stem}\n" if path.suffix == ".csv" else json.dumps({"text": path.stem}) + "\n")
    for streaming in (False, True):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert [row["text"] for row in load(tmp_path, split, streaming=streaming)] == rows
        assert len(caplog.messages) == len(sentences)
        assert all(said.endswith(wanted) for said, wanted in zip(caplog.messages, sentences, strict=True)), caplog.text


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/no/where", "a/b/c"])
def test_a_missing_path(name: str) -> None:
    with pytest.raises(DataError, match=r"There is no file or folder '.*' \(that is .*\): check it\."):
        load(name)


def test_a_name_that_is_not_on_the_hub() -> None:
    with pytest.raises(
        DataError, match=r"Cannot load 'no/such': there is no file or folder no/such here, nor a copy in the cache, and"
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


def test_a_stream_stays_a_stream() -> None:
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    assert load(stream) is stream
    parts = datasets.IterableDatasetDict({"train": stream})
    assert [row["text"] for row in load(parts, "train[1:]")] == ["two", "three"]
    assert [row["text"] for row in load(parts, "train_sft[1:2]")] == ["two"]
    with pytest.raises(DataError, match="Cannot take 'train\\[:10%\\]' of a stream: it has no length"):
        load(parts, "train[:10%]")


def test_streaming_of_what_is_on_disk(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    for source in (tmp_path / "rows.jsonl", tmp_path / "saved", ROWS):
        stream = load(source, streaming=True)
        assert isinstance(stream, datasets.IterableDataset)
        assert [row["text"] for row in stream] == ["one", "two", "three"]
    with pytest.raises(DataError, match="There is no file or folder"):
        load(str(tmp_path / "nowhere.jsonl"), streaming=True)


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_load_a_packed_file(ending: str, tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    path = tmp_path / f"data.jsonl.{ending}"
    if ending == "zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(text)
    else:
        path.write_bytes({"gz": gzip, "bz2": bz2, "xz": lzma}[ending].compress(text))
    assert texts(load(path)) == ["one", "two", "three"]
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match=r"Cannot read .*: it is not a whole file of the compression"):
        load(path)


def test_load_tabs(tmp_path: Path) -> None:
    (tmp_path / "data.tsv").write_text("text\tn\none, two\t1\n")
    assert load(tmp_path / "data.tsv")[0] == {"text": "one, two", "n": 1}


def test_load_files_by_arguments(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n')
    files = {"train": str(tmp_path / "a.jsonl"), "test": str(tmp_path / "b.jsonl")}
    assert texts(load("json", "test", data_files=files)) == ["two"]
    assert texts(load("json", data_files=[*files.values()])) == ["one", "two"]
    assert [row["text"] for row in load("json", "test", data_files=files, streaming=True)] == ["two"]
    with pytest.raises(DataError, match="Cannot load 'json' with data_files='nowhere.jsonl': "):
        load("json", data_files="nowhere.jsonl")


def test_rows_of_mixed_records() -> None:
    """What a tool is called with has no one type, and neither has a content that is text here and blocks there."""
    blocks = [{"type": "text", "text": "hi"}]
    calls = [{"function": {"name": "f", "arguments": {"x": value}}} for value in (1, "one", [1])]
    rows = [
        {"messages": [{"role": "user", "content": blocks}, {"role": "assistant", "tool_calls": [call]}]}
        for call in calls
    ]
    rows[1]["messages"][0]["content"] = "hi"  # type: ignore[index, assignment]
    dataset = load(rows)
    assert detect(dataset).kind == "messages"
    read = [messages_of(value, "") for value in dataset["messages"]]
    assert [messages[0]["content"] for messages in read] == ["hi"] * 3
    assert [messages[1]["tool_calls"][0]["function"]["arguments"]["x"] for messages in read] == [1, "one", [1]]


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
            "columns prompt, completion: read as prompts in `prompt` and completions in `completion`",
        ),
        (
            {"prompt": TALK[:1], "completion": TALK[1:], "text": "c"},
            "prompt_completion",
            {"prompt": "prompt", "completion": "completion"},
            "columns prompt, completion, text: read as prompts in `prompt` and completions in `completion` "
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


TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
PICTURE = {"bytes": b"x", "path": None}


@pytest.mark.parametrize(
    ("row", "kind", "columns", "says"),
    [
        (
            {"conversations": TURNS, "system": "be kind", "id": "1"},
            "messages",
            {"messages": "conversations", "system": "system"},
            "conversations in `conversations` with `system` (id ignored)",
        ),
        ({"dialog": TURNS}, "messages", {"messages": "dialog"}, "conversations in `dialog`"),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            "dialogue",
            {"prompt": "instruction", "input": "input", "completion": "output"},
            "instructions in `instruction` and responses in `output` with `input`",
        ),
        (
            {"instruction": "a", "context": "b", "response": "c", "category": "d"},
            "dialogue",
            {"prompt": "instruction", "input": "context", "completion": "response"},
            "instructions in `instruction` and responses in `response` with `context` (category ignored)",
        ),
        (
            {"question": "a", "answer": "b"},
            "dialogue",
            {"prompt": "question", "completion": "answer"},
            "questions in `question` and answers in `answer`",
        ),
        (
            {"question": "a", "context": "c", "answers": {"text": ["b"], "answer_start": [1]}},
            "dialogue",
            {"prompt": "question", "input": "context", "completion": "answers"},
            "questions in `question` and answers in `answers` with `context`",
        ),
        (
            {"question": "a", "response": "b", "system_prompt": "c"},
            "dialogue",
            {"prompt": "question", "completion": "response", "system": "system_prompt"},
            "questions in `question` and answers in `response` with `system_prompt`",
        ),
        (
            {"prompt": "a", "response": "b"},
            "dialogue",
            {"prompt": "prompt", "completion": "response"},
            "prompts in `prompt` and replies in `response`",
        ),
        (
            {"instruction": "a", "output": "b", "text": "a b"},
            "text",
            {"text": "text"},
            "plain text in `text` (instruction, output ignored)",
        ),
    ],
)
def test_shapes_of_others(row: dict[str, Any], kind: str, columns: dict[str, str], says: str) -> None:
    shape = detect(load([row]))
    assert (shape.kind, shape.columns) == (kind, columns)
    assert shape.sentence == f"columns {', '.join(row)}: read as {says}"


def test_the_users_columns() -> None:
    rows = load([{"q": "a", "a": "b", "n": 1, "tools": "[]", "text": "c"}])
    shape = detect(rows, columns={"completion": "a", "prompt": "q"})
    assert (shape.kind, shape.columns) == ("prompt_completion", {"prompt": "q", "completion": "a", "tools": "tools"})
    assert shape.sentence == (
        "columns q, a, n, tools, text: read as prompts in `q` and completions in `a` with `tools` (as `columns` "
        "says: completion is a, prompt is q; n, text ignored)"
    )
    assert detect(rows, columns={"question": "q", "answer": "a"}).kind == "dialogue"
    assert detect(rows, columns={"instruction": "q", "output": "a"}).columns == {"prompt": "q", "completion": "a"}
    assert detect(rows, columns={"text": "a"}).columns == {"text": "a"}
    talks = load([{"a": TALK, "b": TURNS, "image": "x.png"}])
    assert detect(talks, columns={"messages": "b"}).columns == {"messages": "b"}
    assert detect(talks, columns={"conversations": "a"}).columns == {"messages": "a"}


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"prompt": "question", "completion": "answr"}, "names `answr`, but the columns are `question` (text), "
         "`answer` (text), `n` (numbers). Did you mean 'answer'?"),
        ({"prmpt": "question"}, "no row has a part 'prmpt'; parts are answer, answers, "),
        ({"tools": "question"}, "does not describe a whole row. Understood are `text`"),
        ({"text": "n"}, "does not fit the data: `n` holds numbers, but text is needed."),
    ],
)  # fmt: skip
def test_the_users_columns_that_do_not_fit(columns: dict[str, str], sentence: str) -> None:
    with pytest.raises(DataError) as error:
        detect(load([{"question": "a", "answer": "b", "n": 1}]), columns=columns)
    assert sentence in str(error.value) and str(error.value).startswith(f"columns={columns}")


@pytest.mark.parametrize("column", ["image", "images", "picture"])
def test_images_are_refused(column: str) -> None:
    values = [PICTURE] if column == "picture" else ["a.png"]
    rows = load([{"messages": TALK, column: value} for value in values])
    with pytest.raises(DataError) as error:
        detect(rows)
    assert str(error.value) == (
        f"The column `{column}` holds images, and images are not supported yet. To train on the text alone, remove it "
        f"with `dataset.remove_columns('{column}')`."
    )
    assert detect(load([{"messages": TALK, "images": []}])).kind == "messages"


def test_a_formatting_function() -> None:
    rows = load([{"q": "a", "a": "b"}, {"q": "c", "a": "d"}])
    shape = detect(rows, formatting_func=lambda row: f"{row['q']} {row['a']}")
    assert (shape.kind, shape.formatting, shape.conversational) == ("text", "row", False)
    assert shape.sentence == "columns q, a: read as the texts that formatting_func `<lambda>` makes"

    def talk(row: dict[str, str]) -> list[dict[str, str]]:
        return [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]

    shape = detect(rows, formatting_func=talk)
    assert (shape.kind, shape.formatting, shape.conversational) == ("messages", "row", True)

    def texts_of(batch: dict[str, list[str]]) -> list[str]:
        return [f"{q} {a}" for q, a in zip(batch["q"], batch["a"], strict=True)]

    shape = detect(rows, formatting_func=texts_of)
    assert (shape.kind, shape.formatting) == ("text", "batch")
    with pytest.raises(DataError, match="row 0: formatting_func fails with KeyError: 'x'. The row has the fields q, a"):
        detect(rows, formatting_func=lambda row: row["x"])
    with pytest.raises(DataError, match="row 0: formatting_func returned None. It must return a string or a list of"):
        detect(rows, formatting_func=lambda row: None)
    with pytest.raises(DataError, match="row 0: formatting_func returned a list of 3. It must return a string"):
        detect(rows, formatting_func=lambda row: ["a", "b", "c"])


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
        "Cannot read the rows: the columns are `question` (text), `label` (numbers). Understood are `text` (a "
        "string), `messages` or `conversations` (a list of {role, content} or {from, value}), `prompt` and "
        "`completion` (strings or such lists), `instruction` and `output`, `question` and `answer`, or `input_ids` "
        "(with `labels` or a mask). Say which column is which with `columns`, as in columns={'prompt': ..., "
        "'completion': ...}, or name the column of text or conversations with `dataset_text_field` (now 'text')."
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
            "row 3: `m[0].content` holds an image, and images are not supported yet. Remove the row, or keep its text.",
        ),
        (
            [{"role": "user", "content": [{"type": "audio"}]}],
            "row 3: `m[0].content` has blocks that are not text. Only text can be trained on here.",
        ),
        (
            [{"from": "narrator", "value": "a"}],
            "row 3: `m[0].from` is 'narrator', which is not a known role. Known are human, "
            "user, gpt, assistant, chatgpt, chatbot, bing, bard, model, ai, bot, function_call, tool_call, tool, "
            "observation, function_response, tool_response, function, system, developer.",
        ),
        (
            [{"from": "human", "value": None}],
            "row 3: `m[0].value` is None. Give the turn a text, or remove the row with `dataset.filter`.",
        ),
        (
            [{"from": "function_call", "value": "f(1)"}],
            "row 3: `m[0].value` is a tool call, but not valid JSON (Expecting value). Correct the row.",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}],
            "row 3: `m[0].tool_calls[0].function.arguments` is not valid JSON (Expecting property name enclosed in "
            "double quotes). Correct it, or remove the row.",
        ),
        (
            [{"role": "assistant", "tool_calls": ["f"]}],
            "row 3: `m[0].tool_calls[0]` is a str, not a call {function: {name, arguments}}.",
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


def test_turns_of_others() -> None:
    turns = [("system", "s"), ("human", "a"), ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
             ("observation", "7"), ("gpt", "b"), ("user", "c"), ("bing", "d")]  # fmt: skip
    assert messages_of([{"from": who, "value": what, "weight": None} for who, what in turns], "") == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    assert messages_of([{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}], "") == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


def test_arguments_that_are_json() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call, {"name": "g", "arguments": ""}]}
    assert messages_of([message], "")[0]["tool_calls"] == [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
        {"name": "g", "arguments": {}},
    ]


def test_texts() -> None:
    assert text_of("a", "") == "a"
    with pytest.raises(DataError, match="row 3: `t` is None. Fill it in"):
        text_of(None, "row 3: `t`")
    with pytest.raises(DataError, match="row 3: `t` is a int, not a string"):
        text_of(1, "row 3: `t`")
