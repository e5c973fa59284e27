"""Data in the forms that users bring it, and what a template would leave out."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
import pytest

from tests.data import tiny_tokenizers as tiny
from tests.data.tiny_tokenizers import assistant, user, word_tokenizer
from trl.data.batching.batches import StreamBatches
from trl.data.mixture import DatasetMixtureConfig, load_mixture
from trl.data.reading.errors import DataError
from trl.data.reading.formats import detect
from trl.data.reading.lines import line_of
from trl.data.reading.messages import messages_of, pop_flags
from trl.data.reading.sources import load
from trl.data.report import show
from trl.data.tokenizing.comparisons import prepare_preferences
from trl.data.tokenizing.prompts import Prompts, prepare_prompts
from trl.data.tokenizing.sequences import Sequences, prepare_sequences

TALK = [user("hello"), assistant("good day")]
BLOCKS = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- for part in message.content %}{%- if part.type == 'text' %}{{- part.text }}{%- endif %}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def chatml(template: str = tiny.CHATML) -> Any:
    return word_tokenizer(tiny.CHATML_TOKENS, template, eos="<|im_end|>")


def trained(rows: Any, tokenizer: Any = None, **options: Any) -> list[str]:
    tokenizer = tokenizer or chatml()
    prepared, _ = prepare_sequences(load(rows), tokenizer, **options)
    return [show(tokenizer, row["input_ids"], row["loss_mask"]) for row in prepared]


# -- containers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [pandas.DataFrame, lambda rows: pyarrow.Table.from_pylist(rows)])
def test_tables_of_other_libraries(make: Any) -> None:
    rows = [{"text": "hello", "n": 1}, {"text": "good day", "n": 2}]
    assert load(make(rows)).to_list() == rows


def test_a_frame_whose_column_has_no_one_type() -> None:
    with pytest.raises(DataError, match="Cannot read the pandas table: .* Give every column one type"):
        load(pandas.DataFrame({"text": ["a", 3, [1]]}))


def test_what_a_transform_shows_is_read() -> None:
    rows = load([{"text": f"raw {number}"} for number in range(3)])
    rows.set_transform(lambda batch: {"text": [text.replace("raw", "sky") for text in batch["text"]]})
    assert trained(rows, word_tokenizer()) == [f"sky⟦ {number}</s>⟧" for number in range(3)]


def test_class_labels_are_their_names() -> None:
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.ClassLabel(names=["night", "day"])}
    )
    rows = datasets.Dataset.from_dict({"question": ["hello", "what"], "answer": [1, 0]}, features=features)
    wanted = [{"question": "hello", "answer": "day"}, {"question": "what", "answer": "night"}]
    assert trained(rows) == trained(wanted)
    stream, _ = prepare_sequences(rows.to_iterable_dataset(), chatml())
    assert [row["input_ids"] for row in stream] == prepare_sequences(load(wanted), chatml())[0]["input_ids"][:]


def test_labels_that_are_classes() -> None:
    def rows(names: list[str]) -> datasets.Dataset:
        rows = load([{"prompt": "hello", "completion": " day", "label": 1}] * 2)
        return rows.cast_column("label", datasets.ClassLabel(names=names))

    prepared, _ = prepare_preferences(rows(["False", "True"]), word_tokenizer(), kind="unpaired")
    assert prepared["label"][:] == [True, True]
    with pytest.raises(DataError, match="row 0: `label` is 'good', not true or false."):
        prepare_preferences(rows(["bad", "good"]), word_tokenizer(), kind="unpaired")


# -- messages -------------------------------------------------------------------------------------------------------


def block(role: str, text: str, weight: float | None = None, kind: str = "value") -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", kind: text}], "loss_weight": weight}


def test_blocks_with_values_and_marks() -> None:
    talk = [block("user", "hello", 0.0), block("assistant", "good day", 1.0)]
    assert trained([{"messages": talk}]) == trained([{"messages": TALK}], assistant_only_loss=True)
    longer = [*talk, block("user", "more", 0.0), block("assistant", "bye", 0.0)]
    [text] = trained([{"messages": longer}])
    assert text.count("⟦") == 1 and "⟦good day<|im_end|>⟧" in text
    shape = detect(load([{"messages": longer}]))
    assert shape.sentence.endswith("; `loss_weight` of a message says whether it is trained on")


def test_blocks_of_reasoning_and_calls() -> None:
    call = json.dumps({"name": "f", "arguments": {"x": None}})
    values = {"reasoning": "hm", "text": "a", "tool_call": call}
    blocks = [{"type": kind, "value": value} for kind, value in values.items()]
    function = {"type": "function", "function": {"name": "f", "arguments": {"x": None}}}
    assert messages_of([{"role": "assistant", "content": blocks}], "row 0: `m`") == [
        {"role": "assistant", "content": "a", "reasoning_content": "hm", "tool_calls": [function]}
    ]


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ([None, None], None),
        ([1, 1], None),
        ([0, 1], [False, True]),
        ([None, False], [False, False]),
        ([None, True], [False, True]),
    ],
)
def test_marks_of_messages(flags: list[Any], found: list[bool] | None) -> None:
    talk = [message if flag is None else {**message, "train": flag} for message, flag in zip(TALK, flags, strict=True)]
    assert pop_flags(talk, "row 0: `m`") == found
    assert all("train" not in message for message in talk)


def test_marks_that_cannot_be_followed() -> None:
    with pytest.raises(DataError, match=r"row 0: `m\[1\].weight` is 0.5. A message is trained on or not"):
        pop_flags([TALK[0], {**TALK[1], "weight": 0.5}], "row 0: `m`")
    with pytest.raises(DataError, match=r"row 0: `m\[0\]` has the role 'user' and is marked to be trained on"):
        pop_flags([{**TALK[0], "train": True}, {**TALK[1], "train": False}], "row 0: `m`")
    pair = {"prompt": TALK[:1], "chosen": [{**TALK[1], "weight": 0}], "rejected": [assistant("no")]}
    with pytest.raises(DataError, match="row 0: `chosen`: an assistant's message of a completion has `weight` 0"):
        prepare_preferences(load([pair]), chatml(), kind="pairs")


def test_pairs_of_whole_conversations_under_their_newer_names() -> None:
    asked = block("user", "hello", 0.0)
    row = {
        "chosen_messages": [asked, block("assistant", "good day", 1.0)],
        "rejected_messages": [asked, block("assistant", "bye", 1.0)],
    }
    plain = {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": [assistant("bye")]}
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    found, wanted = (prepare_preferences(load([each]), chatml(), kind="pairs")[0] for each in (row, plain))
    assert found.select_columns(columns).to_list() == wanted.select_columns(columns).to_list()


# -- what a template would leave out --------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["hello", [{"type": "text", "text": "hello"}]])
def test_contents_in_the_form_that_the_template_reads(content: Any) -> None:
    talk = [{"role": "user", "content": content}, *TALK[1:]]
    for options in ({}, {"assistant_only_loss": True}):
        wanted = trained([{"messages": TALK}], **options)
        assert trained([{"messages": talk}], chatml(BLOCKS), **options) == wanted
        assert trained([{"messages": talk}], **options) == wanted
    prompts = [prepare_prompts(load([{"prompt": talk[:1]}]), chatml(each))[0] for each in (BLOCKS, tiny.CHATML)]
    assert prompts[0]["prompt_ids"][:] == prompts[1]["prompt_ids"][:]


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
DEAF = tiny.CHATML.replace("message['content']", "(message['content'] if message['role'] != 'tool' else '')")


@pytest.mark.parametrize(
    ("row", "template", "sentence"),
    [
        ({"messages": [*TALK, user("a"), CALL]}, tiny.CHATML, "the chat template leaves out `tool_calls` of message 3"),
        ({"messages": TALK, "tools": [{"name": "f"}]}, tiny.CHATML, "the chat template leaves out the row's tools"),
        (
            {"messages": [user("a"), {**assistant("b"), "reasoning_content": "c"}]},
            tiny.CHATML,
            "the chat template leaves out `reasoning_content` of message 1 (assistant), so that the model would never",
        ),
        (
            {"messages": [*TALK, {"role": "tool", "content": "day"}, assistant("bye")]},
            DEAF,
            "the chat template leaves out `content` of message 2 (tool)",
        ),
        (
            {"messages": [user("a"), {"role": "asistant", "content": "b"}]},
            tiny.CHATML,
            "message 1 has the role 'asistant', which is not known and which the chat template does not name. Did you "
            "mean 'assistant'? Known are assistant, developer, function, system, tool, user",
        ),
    ],
)
@pytest.mark.parametrize("assistant_only", [False, True])
def test_nothing_vanishes_in_silence(row: Any, template: str, sentence: str, assistant_only: bool) -> None:
    with pytest.raises(DataError) as error:
        prepare_sequences(load([row]), chatml(template), assistant_only_loss=assistant_only)
    assert str(error.value).startswith("row 0: `messages`: " + sentence)
    prompt = {**row, "messages": [*row["messages"], user("so")]}
    with pytest.raises(DataError) as error:
        prepare_prompts(load([prompt]), chatml(template))
    assert str(error.value).startswith("row 0: `messages`: " + sentence)


def test_what_is_left_out_on_purpose_is_no_fault() -> None:
    thinking = word_tokenizer(tiny.CHATML_TOKENS, tiny.THINKING, eos="<|im_end|>")
    talk = [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c"), assistant("<think>\nho\n</think>\n\nd")]
    assert "hm" not in trained([{"messages": talk}], thinking)[0]  # earlier thinking is taken off
    named = tiny.CHATML + "{#- 'critic' -#}"
    critic = {"role": "critic", "content": "no"}
    assert trained([{"messages": [*TALK, critic]}], chatml(named))[0].count("<|im_start|>") == 3
    empty = {"role": "assistant", "content": "day", "tool_calls": None, "reasoning_content": None}
    assert trained([{"messages": [user("hello"), empty]}]) == trained([{"messages": [user("hello"), assistant("day")]}])


def test_thinking_under_the_name_that_the_template_reads() -> None:
    template = tiny.CHATML.replace("message['content']", "(message['thinking'] | default('')) + message['content']")
    talk = [user("a"), {**assistant("day"), "reasoning_content": "hm "}]
    assert "hm day<|im_end|>" in trained([{"messages": talk}], chatml(template))[0]


def test_a_prompt_and_its_answer_in_one_token() -> None:
    tokenizer = word_tokenizer()  # a word takes the space before it
    assert trained([{"prompt": "hello ", "completion": "day"}], tokenizer) == ["hello ⟦day</s>⟧"]
    pair = {"prompt": " ", "chosen": "day", "rejected": "bye"}
    prepared, report = prepare_preferences(load([pair]), tokenizer, kind="pairs")
    assert (report.rows_kept, tokenizer.decode(prepared[0]["chosen_ids"])) == (1, "day</s>")


# -- numbers and names ----------------------------------------------------------------------------------------------


def test_numbers_are_text() -> None:
    rows = [{"question": "hello", "answer": 4.0}, {"question": "what", "answer": 2.5}]
    wanted = [{"question": "hello", "answer": "4"}, {"question": "what", "answer": "2.5"}]
    assert trained(rows) == trained(wanted)
    assert "; numbers in `answer` read as text" in detect(load(rows)).sentence
    stream, _ = prepare_sequences(load(rows).to_iterable_dataset(), chatml())
    assert [row["input_ids"] for row in stream] == prepare_sequences(load(wanted), chatml())[0]["input_ids"][:]


@pytest.mark.parametrize("columns", [{"question": "q", "answer": "a"}, {"q": "question", "a": "answer"}])
def test_columns_by_other_names(columns: dict[str, str]) -> None:
    rows = [{"q": "hello", "a": 4}]
    assert trained(rows, columns=columns) == trained([{"question": "hello", "answer": "4"}])


def test_columns_of_prompts_are_renamed() -> None:
    rows = [{"task": "hello", "result": "day"}]
    prepared, report = prepare_prompts(load(rows), chatml(), columns={"task": "prompt", "result": "solution"})
    assert (prepared[0]["prompt"], prepared[0]["solution"], report.columns) == ("hello", "day", ["solution"])
    with pytest.raises(DataError, match="columns=.* names 'tsk', but the columns are task, result"):
        prepare_prompts(load(rows), chatml(), columns={"prompt": "tsk"})


# -- broken rows ----------------------------------------------------------------------------------------------------


def broken(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": TALK}, {"messages": None}, {"messages": TALK}, {"messages": [user("a"), assistant("")] * 2}]
    rows[3]["messages"][1] = {"role": "asistant", "content": "b"}
    rows.append({"messages": None})
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_all_broken_rows_are_named_by_the_lines_of_their_file(tmp_path: Path) -> None:
    path = broken(tmp_path)
    with pytest.raises(DataError) as error:
        prepare_sequences(load(path), chatml())
    lines = str(error.value).splitlines()
    assert lines[0] == "3 rows cannot be read. skip_bad_rows=True (--skip_bad_rows) leaves such rows out."
    assert lines[1].startswith("  row 1: `messages` is None.")
    assert lines[1].endswith(f"The same holds for row 4. (line 3, 6 of '{path}')")
    assert lines[2].startswith("  row 3: `messages`: message 1 has the role 'asistant'")
    assert lines[2].endswith(f"(line 5 of '{path}')") and len(lines) == 3
    with pytest.raises(DataError, match="line 3, 6 of"):  # also where the rows begin later in the file
        prepare_sequences(load(path, "train[1:]"), chatml())


def test_bad_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    path = broken(tmp_path)
    prepared, report = prepare_sequences(load(path), chatml(), skip_bad_rows=True)
    assert prepared["row"][:] == [0, 2]
    assert (report.rows_read, report.rows_kept) == (5, 2)
    assert "warning: 3 rows dropped: cannot be read, left out by skip_bad_rows (row 1, 3, 4)" in report.lines()
    stream, report = prepare_sequences(load(path, streaming=True), chatml(), skip_bad_rows=True)
    assert [row["row"] for row in stream] == [0, 2] and report.rows_read == 5
    mixed, report = load_mixture([path, path])["train"].prepare(Sequences(skip_bad_rows=True), chatml())
    assert mixed["row"][:] == [0, 2, 5, 7] and report.rows_read == 10
    prompts, found = prepare_prompts(load(path), chatml(), skip_bad_rows=True)
    assert prompts["row"][:] == [0, 2] and found.dropped[0]["count"] == 3


def test_the_first_twenty(tmp_path: Path) -> None:
    rows = [{"text": "a"}, *[{"text": None}] * 30]
    with pytest.raises(DataError, match="^At least 30 rows cannot be read. These are the first 20. skip_"):
        prepare_sequences(load(rows).select(range(31)), word_tokenizer(), num_proc=None)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' + '{"text":\n[]\n' * 11)
    with pytest.raises(DataError) as error:
        load(str(path))
    faults = [f"line {number} is not {'valid JSON (Expecting value)' if number % 2 == 0 else 'a JSON object'}."
              for number in range(2, 22)]  # fmt: skip
    assert str(error.value) == (
        f"Cannot read '{path}': {' '.join(faults)} And 2 more. Correct or remove the line. skip_bad_rows=True "
        "(--skip_bad_rows) leaves such lines out."
    )


LINES = [  # of a file: three rows and what is no row
    b'\xef\xbb\xbf{"text": "hello"}',
    b'{"text": ',
    b"",
    b'["hello"]',
    b'{"text": "good", "text": "day"}',
    b'{"text": "caf\xe9"}',
    b'{"text": "\\ud800"}',
    b'{"text": null}',
    b'{"text": "bye"}',
]
FAULTS = (
    "line 2 is not valid JSON (Expecting value). line 4 is not a JSON object. line 5 has the field 'text' twice. "
    "line 6 is not UTF-8 (byte 0xe9). line 7 holds half of a surrogate pair, which is no character."
)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.jsonl.zst"])
def test_broken_lines_are_named_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    path = tmp_path / name
    content = b"\n".join(LINES)
    if name.endswith("zst"):
        with pyarrow.output_stream(str(path), compression="zstd") as packed:
            packed.write(content)
    else:
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(DataError, match=re.escape(f"Cannot read '{path}': {FAULTS} Correct or remove the line.")):
        load(path)
    rows = load(path, skip_bad_rows=True)
    assert rows["text"][:] == ["hello", None, "bye"]
    assert caplog.messages == [f"{path}: 5 lines cannot be read and are left out by skip_bad_rows: {FAULTS}"]
    with pytest.raises(DataError, match=f"line 8 of '{path}'"):  # a row's line is that of the file
        prepare_sequences(rows, word_tokenizer())
    prepared, report = prepare_sequences(rows, word_tokenizer(), skip_bad_rows=True)
    assert prepared["row"][:] == [0, 2] and report.rows_read == 3
    mixed = load_mixture([str(path)], skip_bad_rows=True)["train"]
    assert len(mixed) == 3


def test_broken_lines_of_streams_folders_and_tables(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    path = tmp_path / "rows" / "b.jsonl"
    path.write_bytes(b"\n".join(LINES))
    (tmp_path / "rows" / "a.jsonl").write_text('{"text": "first"}\n')
    left = ["hello", None, "bye"]

    with pytest.raises(DataError, match=re.escape(f"Cannot read '{path}': {FAULTS}")):
        prepare_sequences(load(path, streaming=True), word_tokenizer())
    stream = load(path, streaming=True, skip_bad_rows=True)
    assert [row["text"] for row in stream] == left
    with pytest.raises(DataError, match=f"line 8 of '{path}'"):
        prepare_sequences(stream, word_tokenizer())
    assert [row["row"] for row in prepare_sequences(stream, word_tokenizer(), skip_bad_rows=True)[0]] == [0, 2]

    with pytest.raises(DataError, match="b.jsonl': line 2 is not valid JSON"):
        load(tmp_path / "rows")
    for streaming in (False, True):
        rows = load(tmp_path / "rows", skip_bad_rows=True, streaming=streaming)
        assert [row["text"] for row in rows] == ["first", *left]
        rows = load("json", data_files={"train": [str(path)]}, skip_bad_rows=True, streaming=streaming)
        assert [row["text"] for row in rows] == left
    with pytest.raises(DataError, match="b.jsonl': line 2 is not valid JSON"):
        load("json", data_files=str(path))
    with pytest.raises(DataError, match="b.jsonl': line 2 is not valid JSON"):
        prepare_sequences(load(tmp_path / "rows", streaming=True), word_tokenizer())

    table = tmp_path / "rows.csv"
    table.write_text('prompt,completion\na,b\nc,"d\nd",e\nf,"g\ng"\n')
    with pytest.raises(DataError, match="line 3 has 3 fields, but the first line names 2 columns. Put quotes around"):
        load(table)
    with pytest.raises(DataError, match="rows.csv': line 3 has 3 fields"):
        prepare_sequences(load(table, streaming=True), word_tokenizer())
    rows = load(table, skip_bad_rows=True)
    assert rows["prompt"][:] == ["a", "f"] and rows["completion"][:] == ["b", "g\ng"]
    assert line_of(rows, [0, 1]) == f" (line 2, 5 of '{table}')"

    path.write_text("nothing\n" * 3)  # no line is left
    with pytest.raises(DataError, match="line 1 is not valid JSON"):
        load(path, skip_bad_rows=True)


# -- the end of a turn ----------------------------------------------------------------------------------------------


def test_the_end_of_the_last_turn_is_what_counts() -> None:
    rows = load([{"messages": [*TALK, user("more"), assistant("bye bye bye")]}, {"messages": TALK}])
    _, whole = prepare_sequences(rows, chatml(), assistant_only_loss=True)
    _, cut = prepare_sequences(rows, chatml(), assistant_only_loss=True, max_length=20)
    assert (whole.end_of_turn, cut.end_of_turn) == (2, 1)
    pairs = load([{"prompt": "hello", "chosen": " day bye", "rejected": " bye"}])
    reports = [prepare_preferences(pairs, word_tokenizer(), kind="pairs", max_completion_length=n)[1] for n in (9, 2)]
    assert [report.end_of_turn for report in reports] == [1, 0]


# -- streams and mixes of prompts -----------------------------------------------------------------------------------


def test_a_stream_of_prompts_is_its_table() -> None:
    rows = load([{"prompt": [user(f"hello {number}")], "n": number} for number in range(5)])
    table, _ = prepare_prompts(rows, chatml())
    stream, report = prepare_prompts(rows.to_iterable_dataset(), chatml(), look_at=2)
    assert [{key: row[key] for key in table.column_names if key != "_length"} for row in stream] == table.to_list()
    assert report.lines()[1] == "this is a stream, tokenised as it is read: this report covers only its first 2 rows"


def test_a_mix_of_prompts(tmp_path: Path) -> None:
    for name, column in (("a", "prompt"), ("b", "question")):
        rows = [{column: f"hello {name} {number}", name: number} for number in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    for streaming in (False, True):
        mixture = load_mixture(DatasetMixtureConfig(names, streaming=streaming))["train"]
        rows, report = mixture.prepare(Prompts(), word_tokenizer())
        assert [row["prompt"] for row in rows] == ["hello a 0", "hello a 1", "hello b 0", "hello b 1"]
        assert [row.get("b") for row in rows] == [None, None, 0, 1]
        assert report.rows_kept == 4 and report.columns[:2] == ["a", "question"]


def test_batches_without_an_end() -> None:
    stream = load([{"n": number} for number in range(5)]).to_iterable_dataset()
    batches = iter(StreamBatches(stream, 2, forever=True))
    found = [[row["n"] for row in next(batches)] for _ in range(7)]
    assert found == [[0, 1], [2, 3], [4], [0, 1], [2, 3], [4], [0, 1]]
    assert list(StreamBatches(load([{"n": 0}]).to_iterable_dataset(), 2, drop_last=True, forever=True)) == []
