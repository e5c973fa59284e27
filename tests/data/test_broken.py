"""Broken data sets, written here, each with the sentence that its user reads. Never a traceback of anyone's."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest

from tests.data import tiny_tokenizers as tiny
from tests.data.tiny_tokenizers import assistant, system, user, word_tokenizer
from trl.data.reading.errors import DataError
from trl.data.reading.sources import load
from trl.data.tokenizing.sequences import prepare_sequences

TALK = [user("hello"), assistant("good day")]


class Broken(NamedTuple):
    """`write` puts the data set into a folder and returns what the user would pass, for which FILE stands."""

    write: Callable[[Path], Any]
    sentence: str
    options: dict[str, Any] = {}


def lines(*rows: Any) -> Callable[[Path], Any]:
    """A .jsonl file; a string is a line as it is."""

    def write(folder: Path) -> Any:
        path = folder / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


def file(name: str, content: bytes | str) -> Callable[[Path], Any]:
    def write(folder: Path) -> Any:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def given(value: Any) -> Callable[[Path], Any]:
    """Something passed as it is, without a file."""
    return lambda folder: value


def folder_of(*writers: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def write(folder: Path) -> Any:
        for writer in writers:
            writer(folder)
        return str(folder)

    return write


def half_a_parquet(folder: Path) -> Any:
    path = folder / "rows.parquet"
    datasets.Dataset.from_list([{"text": "hello"}] * 50).to_parquet(str(path))
    path.write_bytes(path.read_bytes()[:-30])
    return str(path)


def half_a_saved_data_set(folder: Path) -> Any:
    datasets.Dataset.from_list([{"text": "hello"}] * 50).save_to_disk(str(folder / "saved"))
    next((folder / "saved").glob("*.arrow")).write_bytes(b"")
    return str(folder / "saved")


BROKEN = {
    # files
    "no such file": Broken(given("rows.jsonl"), "There is no file or folder 'rows.jsonl' (that is "),
    "an empty file": Broken(file("rows.jsonl", ""), "The file 'FILE' is empty."),
    "an empty folder": Broken(folder_of(), "The folder 'FILE' holds neither a data set written by `save_to_disk` nor "),
    "no ending": Broken(file("rows", "hello"), "Cannot tell the format of 'FILE' by its ending; known are .jsonl, "),
    "a broken line": Broken(
        lines({"text": "a"}, '{"text": "b"', {"text": "c"}),
        "Cannot read 'FILE': line 2 is not valid JSON (Expecting ',' delimiter). Correct or remove the line.",
    ),
    "a line that is no object": Broken(lines({"text": "a"}, '"b"'), "Cannot read 'FILE': line 2 is not a JSON object."),
    "broken JSON": Broken(
        file("rows.json", '[{"text": "a"},\n {"text": }]'),
        "Cannot read 'FILE': line 2, column 11: not valid JSON (Expecting value). Correct the file.",
    ),
    "a broken file in a folder": Broken(
        folder_of(file("a.jsonl", '{"text": "a"}\n'), file("b.jsonl", "{")),
        "Cannot read 'FILE/b.jsonl': line 1 is not valid JSON (Expecting property name enclosed in double quotes).",
    ),
    "not UTF-8": Broken(
        file("rows.jsonl", '{"text": "a"}\n{"text": "café"}\n'.encode("latin-1")),
        "Cannot read 'FILE': line 2 is not UTF-8 (byte 0xe9). Save the file as UTF-8.",
    ),
    "a table that is not UTF-8": Broken(
        file("rows.csv", "text\ncafé\n".encode("latin-1")), "Cannot read 'FILE': line 2 is not UTF-8 (byte 0xe9)."
    ),
    "a line of too many fields": Broken(
        file("rows.csv", "prompt,completion\na,b\nc,d,e\n"),
        "Cannot read 'FILE': line 3 has 3 fields, but the first line names 2 columns. Put quotes around a field that "
        "contains the separator.",
    ),
    "half a Parquet file": Broken(
        half_a_parquet, "Cannot read 'FILE': it is not a whole Parquet file. Copy or download it again."
    ),
    "half a packed file": Broken(
        file("rows.jsonl.gz", gzip.compress(b'{"text": "hello"}\n' * 9)[:20]),
        "Cannot read 'FILE': it is not a whole file of the compression that its ending names. Copy or download it",
    ),
    "half a saved data set": Broken(half_a_saved_data_set, "Cannot read the data set saved in 'FILE': "),
    "a split that is not there": Broken(
        given(datasets.DatasetDict({name: datasets.Dataset.from_list([{"text": "a"}]) for name in ("one", "two")})),
        "the DatasetDict has no split 'train'; it has 'one', 'two': name one of them.",
    ),
    "no rows": Broken(file("rows.csv", "text\n"), "The data set 'FILE' has no rows: check the file."),
    # columns
    "other columns": Broken(
        file("rows.csv", "title,score\na,1\n"),
        "Cannot read the rows: the columns are `title` (text), `score` (numbers). Understood are `text` (a string), ",
    ),
    "a prompt alone": Broken(
        given([{"prompt": "hello"}]), "Cannot read the rows: the columns are `prompt` (text). Understood are `text`"
    ),
    "two conversations": Broken(
        given([{"chosen": TALK, "rejected": TALK}]),
        "Several columns hold conversations: `chosen`, `rejected`. Name the one to train on with `dataset_text_field`.",
    ),
    "mixed types": Broken(
        given([{"text": "a"}, {"text": "b"}, {"text": 3}]), "row 2: `text` is not of the same type as"
    ),
    "a row that is no row": Broken(given([{"text": "a"}, "b"]), "row 1: a str, not a dict of fields such as"),
    "mixed shapes": Broken(
        lines({"messages": TALK}, {"text": "hello"}),
        "row 0: `text` is None. Fill it in, or remove such rows with `dataset.filter`.",
        {"text_field": "text", "columns": {"text": "text"}},
    ),
    "images": Broken(
        given([{"messages": TALK, "images": ["a.png"]}]),
        "The column `images` holds images, and images are not supported yet. To train on the text alone, remove it",
    ),
    "an image in a message": Broken(
        given([{"messages": [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]}]),
        "row 0: `messages[0].content` holds an image, and images are not supported yet. Remove the row, or keep its",
    ),
    "a column that is not there": Broken(
        given([{"question": "a", "answer": "b"}]),
        "names `qestion`, but the columns are `question` (text), `answer` (text). Did you mean 'question'?",
        {"columns": {"prompt": "qestion", "completion": "answer"}},
    ),
    # rows
    "no messages": Broken(lines({"messages": TALK}, {"messages": None}), "row 1: `messages` is None. Fill it in, or"),
    "an empty list": Broken(lines({"messages": TALK}, {"messages": []}), "row 1: `messages` is an empty list. Remove"),
    "no content": Broken(
        lines({"messages": TALK}, {"messages": [user("a"), {"role": "assistant", "content": None}]}),
        "row 1: `messages[1].content` is None. Give the message a text, or remove the row with `dataset.filter`.",
    ),
    "no role": Broken(
        lines({"messages": TALK}, {"messages": [{"content": "a"}]}),
        "row 1: `messages[0]` has no `role`. Every message needs one, such as 'user' or 'assistant'.",
    ),
    "a content that is a number": Broken(
        given([{"messages": [{"role": "user", "content": 5}]}]),
        "row 0: `messages[0].content` is a int, not a string. Convert it to one.",
    ),
    "an unknown speaker": Broken(
        lines({"conversations": [{"from": "narrator", "value": "a"}]}),
        "row 0: `conversations[0].from` is 'narrator', which is not a known role. Known are human, user, gpt, ",
    ),
    "a turn without a value": Broken(
        lines({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]}),
        "row 0: `conversations[1].value` is None. Give the turn a text, or remove the row with `dataset.filter`.",
    ),
    "no answer": Broken(
        lines({"question": "a", "answers": ["b"]}, {"question": "a", "answers": []}),
        "row 1: `answers` is an empty list: there is no answer. Remove such rows with `dataset.filter`.",
    ),
    "an instruction without output": Broken(
        lines({"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}),
        "row 1: `output` is None. Fill it in, or remove such rows with `dataset.filter`.",
    ),
    "arguments that are not JSON": Broken(
        given([{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x=1"}}]}]}]),
        "row 0: `messages[0].tool_calls[0].function.arguments` is not valid JSON (Expecting value). Correct it, or",
    ),
    "tools that are not JSON": Broken(
        given([{"messages": TALK, "tools": "f(x)"}]), "row 0: `tools` is not valid JSON (Expecting value)."
    ),
    "tools that are not a list": Broken(
        given([{"messages": TALK, "tools": '{"name": "f"}'}]), "row 0: `tools` is a dict, not a list of tools."
    ),
    "roles that the template refuses": Broken(
        lines({"messages": TALK}, {"messages": [system("a"), *TALK]}),
        "row 1: `messages`: the chat template refuses the conversation with the roles [system, user, assistant]: there "
        "is no system role. Change the messages to what it accepts, or set another `tokenizer.chat_template`.",
    ),
    "a completion that is not the assistant's": Broken(
        lines({"prompt": [user("a")], "completion": [user("b")]}),
        "row 0: `completion` begins with the role 'user'. A completion begins with the assistant's message: move the",
    ),
    "an empty completion list": Broken(
        given([{"prompt": TALK[:1], "completion": TALK[1:]}, {"prompt": TALK[:1], "completion": []}]),
        "row 1: `completion` is an empty list. Remove such rows with `dataset.filter`.",
    ),
    # tokens
    "labels that are not the tokens": Broken(
        lines({"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [1, 2, 3], "labels": [2, 3, 4]}),
        "row 1: `labels`[0] is 2, but the token there is 1. Labels are the `input_ids` themselves, not shifted, with ",
    ),
    "labels that are true and false": Broken(
        lines({"input_ids": [1, 2, 3], "labels": [False, True, True]}),
        "row 0: `labels`[0] is False: labels are token ids. A mask belongs in `loss_mask`.",
    ),
    "a mask that is too short": Broken(
        lines({"input_ids": [1, 2, 3], "completion_mask": [0, 1]}),
        "row 0: `completion_mask` is of length 2, but `input_ids` has 3 tokens. Give one entry for each token.",
    ),
    "tokens that are not in the vocabulary": Broken(
        lines({"input_ids": [1, 2, 99999]}),
        "row 0: `input_ids`[2] is 99999, but the tokenizer has ",
    ),
    "tokens below zero": Broken(lines({"input_ids": [1, -2]}), "row 0: `input_ids`[1] is -2, which is no token id."),
    # nothing left
    "only empty texts": Broken(
        lines({"prompt": "", "completion": ""}, {"prompt": "", "completion": ""}),
        "train: none of the 2 rows can be trained on: fewer than 2 tokens (2). The first is row 0, `prompt`, ",
    ),
    "no assistant anywhere": Broken(
        lines({"messages": [user("a")]}),
        "train: none of the 1 rows can be trained on: no token to train on (1). The first is row 0, `messages`: no "
        "token to train on. Give it an assistant turn or a completion, or train on all tokens",
        {"assistant_only_loss": True},
    ),
    "all cut away": Broken(
        lines({"prompt": "the sky is blue the sky is blue", "completion": " bye"}),
        "train: none of the 1 rows can be trained on: every token to train on lies beyond max_length (1). The first is "
        "row 0, `prompt`, `completion`: every token to train on lies beyond max_length. Raise `max_length`, or set ",
        {"max_length": 4},
    ),
    "assistant masks of texts": Broken(
        lines({"text": "a"}),
        "assistant_only_loss=True, but the data are not conversations (columns text: read as plain text in `text`). ",
        {"assistant_only_loss": True},
    ),
}


def test_there_are_enough_of_them() -> None:
    assert len(BROKEN) >= 25


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    case = BROKEN[name]
    source = case.write(folder)
    tokenizer = word_tokenizer(tiny.GEMMA_TOKENS, tiny.GEMMA, bos="<bos>", eos="<eos>")
    with pytest.raises(DataError) as error:
        prepare_sequences(load(source), tokenizer, **case.options)
    assert case.sentence.replace("FILE", str(source)) in str(error.value)
    assert "Traceback" not in capfd.readouterr().err
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
