"""Prompts: what a model is given to continue, and the columns that reward functions read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import processors

from tests.data import tiny_tokenizers as tiny
from tests.data.tiny_tokenizers import assistant, system, user, word_tokenizer
from trl.data.mixture import Mixture, MixturePart
from trl.data.reading.errors import DataError
from trl.data.reading.sources import load
from trl.data.tokenizing.prompts import PromptEncoder, Prompts, prepare_prompts

HEAD, TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
# Writes the names of tools, and a word that an argument of the template gives.
WITH_TOOLS = (
    tiny.CHATML
    + "{%- for tool in tools or [] %}{{- ' ' + tool['name'] }}{%- endfor %}{%- if mood %}{{- ' ' + mood }}{%- endif %}"
)
TEXTS = [{"question": "hello " * number + "day", "answer": str(number)} for number in (1, 2, 4)]
TALKS = [{"prompt": [user("hello" + " day" * number)], "answer": number} for number in (0, 1, 3)]


def chatml(template: str = tiny.CHATML) -> Any:
    return word_tokenizer(tiny.CHATML_TOKENS, template, eos="<|im_end|>")


def with_bos() -> Any:
    return word_tokenizer(("<s>",), bos="<s>", add_bos=True)


def texts(rows: Any, tokenizer: Any, **options: Any) -> list[str]:
    """The prompts as the model meets them."""
    return [tokenizer.decode(row["prompt_ids"]) for row in prepare_prompts(load(rows), tokenizer, **options)[0]]


# -- rows ------------------------------------------------------------------------------------------------------------


def test_strings() -> None:
    tokenizer = word_tokenizer()
    prepared, report = prepare_prompts(load(TEXTS), tokenizer)
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in prepared["prompt_ids"]]
    assert tokens == [["hello", " day"], ["hello", " hello", " day"], ["hello", " hello", " hello", " hello", " day"]]
    assert prepared.remove_columns("prompt_ids").to_list() == [
        {**row, "prompt": row["question"], "row": number} for number, row in enumerate(TEXTS)
    ]
    assert report.lines() == [
        "train: 3 prompts; `question` read as strings, tokenised as they are; columns for reward functions: question, "
        "answer",
        "prompt lengths: shortest 2, median 3, longest 5 tokens",
        "row 0: hello day",
    ]
    assert (report.conversational, report.lengths) == (False, {"min": 2, "median": 3, "p95": 5, "max": 5})
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_conversations() -> None:
    assert texts(TALKS, chatml()) == [f"{HEAD}hello{' day' * number}{TAIL}" for number in (0, 1, 3)]
    prepared, report = prepare_prompts(load(TALKS), chatml())
    assert [row["prompt"] for row in prepared] == [row["prompt"] for row in TALKS]
    assert report.conversational and report.columns == ["answer"]
    assert report.sentence == "`prompt` read as conversations, through the chat template"


def test_a_string_beside_a_chat_template_gets_a_hint() -> None:
    _, report = prepare_prompts(load(TEXTS), chatml())
    assert report.sentence.endswith("(the model has a chat template: give lists of messages to use it)")


def test_an_answer_at_the_end_is_left_out() -> None:
    talk = [system("be kind"), user("hello"), assistant("day"), user("more"), assistant("bye")]
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "day"}]
    prepared, _ = prepare_prompts(load([{"messages": talk}, {"messages": talk[:4]}]), chatml())
    assert prepared["prompt"][:] == [talk[:4]] * 2 and prepared["messages"][:] == [talk, talk[:4]]
    assert texts([{"conversations": turns}], chatml()) == [f"{HEAD}hello{TAIL}"]


def test_tools_and_arguments_of_the_template() -> None:
    tools = [{"name": "f"}, {"name": "x"}]
    rows = [{"prompt": [user("a")], "tools": tools}, {"prompt": [user("a")], "tools": None}]
    assert texts(rows, chatml(WITH_TOOLS)) == [f"{HEAD}a{TAIL} f x", f"{HEAD}a{TAIL}"]
    in_json = [{**row, "tools": json.dumps(row["tools"]) if row["tools"] else ""} for row in rows]
    assert texts(in_json, chatml(WITH_TOOLS)) == texts(rows, chatml(WITH_TOOLS))
    mood = {"chat_template_kwargs": {"mood": "blue"}}
    assert texts(TALKS[:1], chatml(WITH_TOOLS), **mood) == [f"{HEAD}hello{TAIL} blue"]
    own = [{**TALKS[0], "chat_template_kwargs": {"mood": "kind"}}, {**TALKS[0], "chat_template_kwargs": None}]
    assert texts(own, chatml(WITH_TOOLS), **mood) == [f"{HEAD}hello{TAIL} kind", f"{HEAD}hello{TAIL} blue"]


@pytest.mark.parametrize(
    "columns", [{"prompt": "task", "solution": "result"}, {"task": "prompt", "result": "solution"}]
)
def test_columns_are_renamed(columns: dict[str, str]) -> None:
    rows = [{"task": "hello", "result": "day", "solution": "bye", "_id": 7}]
    prepared, report = prepare_prompts(load(rows), word_tokenizer(), columns=columns)
    hello = word_tokenizer().convert_tokens_to_ids("hello")
    assert prepared.to_list() == [{"prompt": "hello", "solution": "day", "_id": 7, "prompt_ids": [hello], "row": 0}]
    assert report.columns == ["solution", "_id"]


def test_other_columns_stay_as_they_are() -> None:
    columns = {"prompt": ["hello", "day"], "kind": [0, 1], "tools": [3, None], "_x": [[1.5], []]}
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["good", "bad"]),
            "tools": datasets.Value("int32"),
            "_x": datasets.List(datasets.Value("float32")),
        }
    )
    prepared, _ = prepare_prompts(datasets.Dataset.from_dict(columns, features=features), word_tokenizer())
    # A class label is its name. No template reads `tools` of strings, so that the column may hold anything.
    assert prepared.select_columns(list(columns)).to_dict() == {**columns, "kind": ["good", "bad"]}
    assert [prepared.features[column] for column in ("tools", "_x")] == [features[column] for column in ("tools", "_x")]


def test_long_prompts_lose_their_beginning() -> None:
    assert texts(TEXTS, word_tokenizer(), max_prompt_length=2) == ["hello day", " hello day", " hello day"]
    _, report = prepare_prompts(load(TEXTS), word_tokenizer(), max_prompt_length=2)
    assert report.lengths["max"] == 5
    assert "warning: 2 prompts lost their beginning to fit max_prompt_length=2" in report.lines()
    with pytest.raises(DataError, match="^max_prompt_length=0 leaves nothing: give at least 1, or None for no limit.$"):
        prepare_prompts(load(TEXTS), word_tokenizer(), max_prompt_length=0)


def test_beginning_and_end_of_text() -> None:
    rows = [{"prompt": "<s>hello"}, {"prompt": "hello"}]
    assert texts(rows, with_bos()) == ["<s>hello", "<s>hello"]
    _, report = prepare_prompts(load(rows), with_bos())
    assert "beginning of text: written in 1 row already, so not added a second time" in report.lines()
    # A tokenizer that ends every text with its EOS does not end a prompt: an answer follows.
    ends = word_tokenizer()
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ends.eos_token_id)]
    )
    assert ends("hello")["input_ids"][-1] == ends.eos_token_id
    assert texts(rows[1:], ends) == ["hello"]
    llama = word_tokenizer(tiny.LLAMA3_TOKENS, tiny.LLAMA3, eos="<|eot_id|>", bos="<s>", add_bos=True)
    assert texts(TALKS[:1], llama)[0].count("<s>") == 1


# -- streams and mixes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (TEXTS, {"max_prompt_length": 3}),
        (TALKS, {}),
        ([{"task": row["prompt"], "n": row["answer"], "prompt": 7} for row in TALKS], {"columns": {"prompt": "task"}}),
        ([*TALKS[:2], {"prompt": [], "answer": 7}, *TALKS[2:]], {"skip_bad_rows": True}),
    ],
)
def test_a_stream_gives_the_rows_of_its_table(rows: list[dict[str, Any]], options: Any, named: bool) -> None:
    stream = load(rows).to_iterable_dataset()
    if not named:
        stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
        assert stream.column_names is None
    table, whole = prepare_prompts(load(rows), chatml(), **options)
    prepared, report = prepare_prompts(stream, chatml(), look_at=2, **options)
    assert list(prepared) == table.to_list()
    assert report.lines()[1] == "this is a stream, tokenised as it is read: this report covers only its first 2 rows"
    assert (report.rows_read, report.columns) == (2, whole.columns)


def test_a_stream_whose_first_rows_are_all_bad_goes_on() -> None:
    rows = [{"prompt": "hello"}] + [{"prompt": ""}] * 150 + [{"prompt": "day"}]
    stream, report = prepare_prompts(load(rows).to_iterable_dataset(), word_tokenizer(), skip_bad_rows=True, look_at=9)
    assert [(row["prompt"], row["row"]) for row in stream] == [("hello", 0), ("day", 151)]
    assert (report.rows_read, report.rows_kept) == (9, 1)


def parts(*tables: Any, streaming: bool = False) -> list[MixturePart]:
    opened = [load(rows, streaming=streaming) for rows in tables]
    return [MixturePart(rows, label) for rows, label in zip(opened, "AB", strict=False)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mix(streaming: bool) -> None:
    other = [{"task": "more", "n": 1}, {"task": None, "n": 2}, {"task": "bye", "n": 3}]
    mixture = Mixture(parts(TEXTS[:2], other, streaming=streaming))
    mixture.parts[1].columns = {"prompt": "task"}
    prepared, report = mixture.prepare(Prompts(skip_bad_rows=True), word_tokenizer())
    rows = list(prepared)
    assert [row["prompt"] for row in rows] == ["hello day", "hello hello day", "more", "bye"]
    assert [row["n"] for row in rows] == [None, None, 1, 3] and [row["answer"] for row in rows] == [
        "1",
        "2",
        None,
        None,
    ]
    # Rows are numbered through all parts; each stream begins at a number of its own.
    assert [row["row"] for row in rows] == ([0, 1, 10**12, 10**12 + 2] if streaming else [0, 1, 2, 4])
    assert (report.rows_read, report.rows_kept, report.columns) == (5, 4, ["question", "answer", "n"])
    sentence = "a mix of 2 streams, one after the other" if streaming else "a mix of 2 data sets"
    lines = report.lines()
    assert lines[0] == f"train: 4 prompts; {sentence}; columns for reward functions: question, answer, n"
    assert [line for line in lines if line.startswith("  ")] == [
        "  A: 2 prompts; `question` read as strings, tokenised as they are",
        "  B: 2 prompts; `prompt` read as strings, tokenised as they are",
    ]
    assert lines[-1] == "row 0: hello day"


@pytest.mark.parametrize("streaming", [False, True])
def test_sentences_of_mixes(streaming: bool) -> None:
    kinds = Mixture(parts(TEXTS, TALKS, streaming=streaming))
    with pytest.raises(DataError, match="of one kind, but A has texts and B has conversations. Give lists of messages"):
        kinds.prepare(Prompts(), chatml())
    types = Mixture(parts(TEXTS, [{"prompt": "hello", "answer": 1}], streaming=streaming))
    with pytest.raises(DataError, match="The columns of the mix do not fit together: .* Keep those that reward func"):
        types.prepare(Prompts(), word_tokenizer())
    broken = Mixture(parts(TEXTS, [{"prompt": "hello"}, {"prompt": None}], streaming=streaming))
    with pytest.raises(DataError, match="^B: row 1: `prompt` is None. Fill it in"):
        broken.prepare(Prompts(), word_tokenizer())


# -- rows that cannot be read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"n": 1}], "Cannot read the rows: no column holds prompts; the columns are n. Name one `prompt`, with "),
        ([{"prompt": "a"}, {"prompt": ""}], "row 1: `prompt` is empty: there is nothing to answer. Remove the row."),
        ([{"prompt": 3}], "row 0: `prompt` is a int, not a string. Convert the column to strings."),
        ([*TALKS, {"prompt": None, "answer": 1}], "row 3: `prompt` is None. Fill it in, or remove such rows with "),
        ([{"prompt": [user("a")], "tools": "{"}], "row 0: `tools` is not valid JSON (Expecting property name"),
        ([{"prompt": [user("a")], "tools": '{"name": "f"}'}], "row 0: `tools` is a dict, not a list of tools. Give a"),
        (
            [{"prompt": [user("a")], "tools": [{"name": "f"}]}],
            "row 0: `prompt`: the chat template leaves out the row's tools, so that the model would never see them.",
        ),
    ],
)
def test_sentences(rows: Any, sentence: str) -> None:
    for source in (load(rows), load(rows).to_iterable_dataset()):
        with pytest.raises(DataError) as error:
            prepare_prompts(source, chatml())
        assert str(error.value).startswith(sentence)


def test_one_kind_in_every_row() -> None:
    def made(*prompts: Any) -> datasets.IterableDataset:  # a table holds one kind only
        return datasets.IterableDataset.from_generator(lambda: iter([{"prompt": prompt} for prompt in prompts]))

    stream, _ = prepare_prompts(made("hello", [user("a")]), chatml(), look_at=1)
    with pytest.raises(
        DataError, match="^row 1: `prompt` is messages where row 0 has a string. Give one kind in every"
    ):
        list(stream)
    stream, _ = prepare_prompts(made([user("a")], "hello"), chatml(), look_at=1)
    with pytest.raises(DataError, match="^row 1: `prompt` is a string where row 0 has messages."):
        list(stream)


def test_a_missing_template_and_missing_rows() -> None:
    with pytest.raises(DataError, match="^The data are conversations, but the tokenizer has no chat template"):
        prepare_prompts(load(TALKS), word_tokenizer())
    empty = datasets.Dataset.from_dict({"prompt": []})
    with pytest.raises(DataError, match="^eval: the data set has no rows.$"):
        prepare_prompts(empty, word_tokenizer(), name="eval")
    with pytest.raises(DataError, match="^train: the stream has no rows.$"):
        prepare_prompts(datasets.IterableDataset.from_generator(lambda: iter([])), word_tokenizer())


def test_bad_rows_are_named_by_their_lines_or_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("hello", None, "", "day", None)))
    with pytest.raises(DataError) as error:
        prepare_prompts(load(str(path)), word_tokenizer())
    first, *lines = str(error.value).splitlines()
    assert first == "3 rows cannot be read. skip_bad_rows=True (--skip_bad_rows) leaves such rows out."
    assert lines[0].endswith(f"The same holds for row 4. (line 2, 5 of '{path}')")
    assert lines[1].endswith(f"`prompt` is empty: there is nothing to answer. Remove the row. (line 3 of '{path}')")
    prepared, report = prepare_prompts(load(str(path)), word_tokenizer(), skip_bad_rows=True)
    assert prepared["row"][:] == [0, 3] and (report.rows_read, report.rows_kept) == (5, 2)
    line = "warning: 3 rows dropped: cannot be read, left out by skip_bad_rows (row 1, 2, 4)"
    assert line in report.lines()


# -- the cache -------------------------------------------------------------------------------------------------------


def test_prompts_are_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    rows, calls, original = load(str(path)), [], PromptEncoder.__call__
    monkeypatch.setattr(PromptEncoder, "__call__", lambda *given: calls.append(1) or original(*given))
    found = [
        prepare_prompts(rows, word_tokenizer(), **options)[0]["prompt_ids"][:]
        for options in ({}, {}, {"max_prompt_length": 2}, {"max_prompt_length": 2})
    ]
    assert len(calls) == 2 and found[0] == found[1] and found[2] == found[3] != found[0]
