"""Rows to tokens and masks: every shape, beginnings and ends, cuts and drops, and the sentence for every broken row."""

from __future__ import annotations

import pickle
from typing import Any

import datasets
import pytest
from transformers import ByT5Tokenizer

from tests.data import tiny_tokenizers as tiny
from tests.data.tiny_tokenizers import assistant, byte_tokenizer, system, user, word_tokenizer
from trl.data.reading.errors import DataError
from trl.data.reading.sources import load
from trl.data.tokenizing.sequences import SequenceEncoder, Sequences, detect, prepare_sequences

TALK = [user("hello"), assistant("good day"), user("more"), assistant("bye")]


def chatml(**options: Any) -> Any:
    return word_tokenizer(tiny.CHATML_TOKENS, tiny.CHATML, eos="<|im_end|>", **options)


def tables(rows: Any, tokenizer: Any, **options: Any) -> list[list[tuple[str, bool]]]:
    prepared, _ = prepare_sequences(load(rows), tokenizer, **options)
    assert prepared.column_names == ["input_ids", "loss_mask", "row"]
    return [
        list(zip(tokenizer.convert_ids_to_tokens(row["input_ids"]), row["loss_mask"], strict=True)) for row in prepared
    ]


def table(row: dict[str, Any], tokenizer: Any, **options: Any) -> list[tuple[str, bool]]:
    return tables([row], tokenizer, **options)[0]


def trained(table: list[tuple[str, bool]]) -> list[str]:
    return [token for token, on in table if on]


# -- text -----------------------------------------------------------------------------------------------------------


def test_text() -> None:
    assert table({"text": "the sky is blue"}, word_tokenizer()) == [
        ("the", False),
        (" sky", True),
        (" is", True),
        (" blue", True),
        ("</s>", True),
    ]


def test_types_of_the_columns() -> None:
    prepared, _ = prepare_sequences(load([{"text": "the sky"}]), word_tokenizer())
    assert prepared.features == {
        "input_ids": datasets.List(datasets.Value("int32")),
        "loss_mask": datasets.List(datasets.Value("bool")),
        "row": datasets.Value("int64"),
    }


@pytest.mark.parametrize(
    ("text", "add_eos", "tokens"),
    [
        ("hello", True, ["<s>", "hello", "</s>"]),
        ("<s>hello", True, ["<s>", "hello", "</s>"]),
        ("hello</s>", True, ["<s>", "hello", "</s>"]),
        ("<s>hello</s>", True, ["<s>", "hello", "</s>"]),
        ("hello", False, ["<s>", "hello"]),
        ("<s><s>hello", True, ["<s>", "<s>", "hello", "</s>"]),
    ],
)
def test_beginning_and_end_of_text(text: str, add_eos: bool, tokens: list[str]) -> None:
    tokenizer = word_tokenizer(bos="<s>", add_bos=True, pad="</s>")
    assert table({"text": text}, tokenizer, add_eos=add_eos) == [
        (tokens[0], False),
        *((token, True) for token in tokens[1:]),
    ]


def test_the_end_is_trained_where_it_is_also_padding() -> None:
    tokenizer = word_tokenizer(pad="</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert trained(table({"text": "the sky"}, tokenizer)) == [" sky", "</s>"]
    assert trained(table({"prompt": "the", "completion": " sky"}, tokenizer)) == [" sky", "</s>"]
    tokenizer = chatml(pad="<|im_end|>")
    assert trained(table({"messages": TALK[:2]}, tokenizer, assistant_only_loss=True)) == ["good", " day", "<|im_end|>"]


def test_a_doubled_beginning_is_counted() -> None:
    _, report = prepare_sequences(
        load([{"text": "<s>hello"}, {"text": "hello"}]), word_tokenizer(bos="<s>", add_bos=True)
    )
    assert report.bos_doubled == 1


# -- conversations --------------------------------------------------------------------------------------------------


def test_messages_are_trained_whole_by_default() -> None:
    result = table({"messages": TALK[:2]}, chatml())
    assert trained(result) == [token for token, _ in result[1:]]
    assert result[0] == ("<|im_start|>", False)


def test_a_rendered_conversation_gets_no_token_that_its_template_did_not_write() -> None:
    # The tokenizer adds a BOS to plain text; the template writes none, nor an EOS.
    tokenizer = word_tokenizer((), tiny.NO_END, bos="<s>", add_bos=True)
    tokens = [token for token, _ in table({"messages": TALK[:2]}, tokenizer)]
    assert tokens == ["User", ":", " hello", "\n", "Assistant", ":", " good", " day", "\n"]


def test_options_of_a_row_reach_the_template() -> None:
    template = (
        "{%- for tool in tools or [] %}{{- tool.name + ' ' }}{%- endfor %}{{- tone | default('') }}" + tiny.CHATML
    )
    tokenizer = word_tokenizer(tiny.CHATML_TOKENS, template, eos="<|im_end|>")
    rows = [
        {"messages": TALK[:2], "tools": '[{"name": "call"}]', "chat_template_kwargs": {"tone": "kind"}},
        {"messages": TALK[:2], "tools": None, "chat_template_kwargs": None},
    ]
    for assistant_only in (False, True):
        first, second = tables(rows, tokenizer, assistant_only_loss=assistant_only)
        assert [token for token, _ in first[:3]] == ["call", " kind", "<|im_start|>"]
        assert [token for token, _ in second[:2]] == ["<|im_start|>", "user"]
    assert trained(first) == trained(second) == ["good", " day", "<|im_end|>"]
    with pytest.raises(DataError, match=r"row 0: `tools` is not valid JSON \(.*\)"):
        tables([{"messages": TALK, "tools": "[", "chat_template_kwargs": None}], tokenizer)


# -- prompts and completions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion_only", "expected"),
    [(None, [" is", " blue", "</s>"]), (True, [" is", " blue", "</s>"]), (False, [" sky", " is", " blue", "</s>"])],
)
def test_standard_completion(completion_only: bool | None, expected: list[str]) -> None:
    row = {"prompt": "the sky", "completion": " is blue"}
    assert trained(table(row, word_tokenizer(), completion_only_loss=completion_only)) == expected


def test_standard_completion_with_a_beginning() -> None:
    tokenizer = word_tokenizer(bos="<s>", add_bos=True)
    assert table({"prompt": "", "completion": "hello"}, tokenizer) == [("<s>", False), ("hello", True), ("</s>", True)]


@pytest.mark.parametrize("trim", [False, True])
def test_a_token_over_the_boundary_is_not_trained_and_is_counted(trim: bool) -> None:
    tokenizer = byte_tokenizer(trim_offsets=trim, merges=(("Ġ", "b"),))
    prepared, report = prepare_sequences(
        load([{"prompt": "a ", "completion": "bc"}, {"prompt": "a", "completion": " bc"}]), tokenizer
    )
    tokens = [tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in prepared]
    assert tokens == [["a", "Ġb", "c", "</s>"]] * 2
    assert prepared["loss_mask"][:] == [[False, False, True, True], [False, True, True, True]]
    assert report.boundary_tokens == 1
    assert any(line.startswith("warning: in 1 row the last token of the prompt") for line in report.lines())


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [(TALK[:1], TALK[1:2]), ("hello", TALK[1:2]), (TALK[:1], "good day")],
    ids=["messages", "string prompt", "string completion"],
)
def test_conversational_completion(prompt: Any, completion: Any) -> None:
    row = {"prompt": prompt, "completion": completion}
    head = ["<|im_start|>", "user", "\n", "hello", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
    assert table(row, chatml()) == [
        *((token, False) for token in head),
        ("good", True),
        (" day", True),
        ("<|im_end|>", True),
        ("\n", False),
    ]


def test_conversational_completion_of_several_turns() -> None:
    row = {"prompt": [system("be kind"), *TALK[:3]], "completion": TALK[3:]}
    assert trained(table(row, chatml())) == ["bye", "<|im_end|>"]
    assert trained(table(row, chatml(), assistant_only_loss=True)) == ["bye", "<|im_end|>"]
    assert trained(table(row, chatml(), completion_only_loss=False, assistant_only_loss=True)) == [
        *("good", " day", "<|im_end|>"),
        *("bye", "<|im_end|>"),
    ]
    row = {"prompt": TALK[:1], "completion": TALK[1:]}
    between = ["\n", "<|im_start|>", "user", "\n", "more", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
    assert trained(table(row, chatml())) == ["good", " day", "<|im_end|>", *between, "bye", "<|im_end|>"]
    assert trained(table(row, chatml(), assistant_only_loss=True)) == [
        "good",
        " day",
        "<|im_end|>",
        "bye",
        "<|im_end|>",
    ]


def test_a_thinking_template_rewrites_the_completion() -> None:
    tokenizer = word_tokenizer(tiny.CHATML_TOKENS, tiny.THINKING, eos="<|im_end|>")
    row = {"prompt": TALK[:1], "completion": [assistant("<think>\nhm\n</think>\n\nbye")]}
    assert tokenizer.decode(
        tokenizer.convert_tokens_to_ids(trained(table(row, tokenizer)))
    ) == "<think>\nhm\n</think>\n\nbye<|im_end|>"  # fmt: skip


# -- shapes of others -----------------------------------------------------------------------------------------------


def test_turns_of_from_and_value() -> None:
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
    expected = table({"messages": TALK[:2]}, chatml(), assistant_only_loss=True)
    assert table({"conversations": turns}, chatml(), assistant_only_loss=True) == expected
    result = table({"conversations": turns, "system": "be kind"}, chatml(), assistant_only_loss=True)
    assert [token for token, _ in result[:6]] == ["<|im_start|>", "system", "\n", "be", " kind", "<|im_end|>"]
    assert trained(result) == ["good", " day", "<|im_end|>"]


def test_an_instruction_is_a_conversation_where_there_is_a_template() -> None:
    row = {"instruction": "answer", "input": "what is x", "output": "good day"}
    prepared, report = prepare_sequences(load([row]), chatml())
    tokens = chatml().convert_ids_to_tokens(prepared[0]["input_ids"])
    assert tokens == [
        *("<|im_start|>", "user", "\n", "answer", "\n", "\n", "what", " is", " x", "<|im_end|>", "\n"),
        *("<|im_start|>", "assistant", "\n", "good", " day", "<|im_end|>", "\n"),
    ]
    assert prepared[0]["loss_mask"] == [False] * 14 + [True] * 3 + [False]
    assert report.sentence == (
        "columns instruction, input, output: read as instructions in `instruction` and responses in `output` "
        "with `input`, each row as a conversation of two turns"
    )
    assert trained(table(row, chatml(), assistant_only_loss=True)) == ["good", " day", "<|im_end|>"]
    assert len(trained(table(row, chatml(), completion_only_loss=False))) == 17
    without = table({**row, "input": ""}, chatml())
    assert [token for token, _ in without[3:6]] == ["answer", "<|im_end|>", "\n"]


def test_an_instruction_is_text_where_there_is_no_template() -> None:
    row = {"instruction": "hello", "input": "x", "output": "bye", "system": "be kind"}
    prepared, report = prepare_sequences(load([row]), byte_tokenizer())
    text = byte_tokenizer().decode(prepared[0]["input_ids"])
    assert text == "be kind\n\n### Instruction:\nhello\n\n### Input:\nx\n\n### Response:\nbye</s>"
    assert prepared[0]["loss_mask"] == [False] * (len(text) - 7) + [True] * 4
    assert report.sentence.endswith("each row as text under headings: the tokenizer has no template")


@pytest.mark.parametrize("answers", ["bye", ["bye", "day"], {"text": ["bye"], "answer_start": [3]}])
def test_questions_and_answers(answers: Any) -> None:
    column = "answer" if isinstance(answers, str) else "answers"
    row = {"question": "hello", "context": "the sky", column: answers}
    assert trained(table(row, chatml())) == ["bye", "<|im_end|>"]


def test_the_users_columns_and_functions() -> None:
    rows = [{"q": "the sky", "a": " is blue"}, {"q": "hello", "a": " more"}]
    expected = tables([{"prompt": row["q"], "completion": row["a"]} for row in rows], word_tokenizer())
    assert tables(rows, word_tokenizer(), columns={"prompt": "q", "completion": "a"}) == expected

    texts = tables([{"text": row["q"] + row["a"]} for row in rows], word_tokenizer())
    assert tables(rows, word_tokenizer(), formatting_func=lambda row: row["q"] + row["a"]) == texts
    by_batch = tables(
        rows,
        word_tokenizer(),
        formatting_func=lambda batch: [q + a for q, a in zip(batch["q"], batch["a"], strict=True)],
    )
    assert by_batch == texts

    def talk(row: dict[str, str]) -> list[dict[str, str]]:
        return [user(row["q"]), assistant(row["a"])]

    talks = tables([{"messages": talk(row)} for row in rows], chatml(), assistant_only_loss=True)
    assert tables(rows, chatml(), formatting_func=talk, assistant_only_loss=True) == talks


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda row: None if row["q"] == "b" else "hello", "row 1: formatting_func returned None."),
        (lambda row: [user("a")] if row["q"] == "b" else "hello", "row 1: formatting_func returned a string for row 0"),
        (
            lambda row: {"a": "hello"}[row["q"]],
            "row 1: formatting_func fails with KeyError: 'b'. The row has the field",
        ),
        (lambda batch: ["hello"] * 2, "row 0: formatting_func returned 2 texts for 3 rows."),
    ],
)
def test_formatting_functions_that_fail_later(function: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        prepare_sequences(load([{"q": "a"}, {"q": "b"}, {"q": "c"}]), word_tokenizer(), formatting_func=function)


def test_another_formatting_function_is_not_read_from_the_cache(tmp_path: Any) -> None:
    load([{"q": "the sky"}]).save_to_disk(str(tmp_path / "data"))
    lengths = []
    for more in ("", " is", " is blue"):
        prepared, _ = prepare_sequences(
            load(tmp_path / "data"), word_tokenizer(), formatting_func=lambda row, more=more: row["q"] + more
        )
        lengths.append(len(prepared[0]["input_ids"]))
    assert lengths == [3, 4, 5]


WRITES_CALLS = (
    "{%- for m in messages %}{{- m.role + ':' + m.content }}{%- for c in m.tool_calls or [] %}"
    "{{- '[' + c.function.name + ARGUMENTS + ']' }}{%- endfor %}{{- eos_token }}{%- endfor %}"
)


@pytest.mark.parametrize("written", ["(c.function.arguments | tojson)", "c.function.arguments"])
@pytest.mark.parametrize("given", [{"x": "é", "n": 1}, '{"x": "é", "n": 1}'])
def test_arguments_are_written_as_json_whatever_the_template_expects(written: str, given: Any) -> None:
    tokenizer = byte_tokenizer((), WRITES_CALLS.replace("ARGUMENTS", written))
    call = {"type": "function", "function": {"name": "f", "arguments": given}}
    row = {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [call]}]}
    prepared, _ = prepare_sequences(load([row]), tokenizer)
    assert tokenizer.decode(prepared[0]["input_ids"]) == 'user:a</s>assistant:[f{"x": "é", "n": 1}]</s>'


# -- tokens given ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "options", "mask"),
    [
        ({}, {}, [0, 1, 1, 1]),
        ({"labels": [-100, -100, 7, 8]}, {}, [0, 0, 1, 1]),
        ({"completion_mask": [0, 0, 1, 1]}, {}, [0, 0, 1, 1]),
        ({"completion_mask": [0, 0, 1, 1]}, {"completion_only_loss": False}, [0, 1, 1, 1]),
        ({"assistant_masks": [0, 1, 0, 1]}, {}, [0, 1, 0, 1]),
        ({"assistant_masks": [0, 1, 0, 1], "completion_mask": [0, 0, 1, 1]}, {}, [0, 0, 0, 1]),
        ({"loss_mask": [True, False, True, True]}, {}, [0, 0, 1, 1]),
    ],
)
def test_tokens_with_masks(columns: dict[str, Any], options: dict[str, Any], mask: list[int]) -> None:
    prepared, _ = prepare_sequences(load([{"input_ids": [5, 6, 7, 8], **columns}]), word_tokenizer(), **options)
    assert prepared[0] == {"input_ids": [5, 6, 7, 8], "loss_mask": [bool(on) for on in mask], "row": 0}


# -- cutting and dropping -------------------------------------------------------------------------------------------


def test_cut_at_the_end() -> None:
    rows = [{"text": "the sky is blue"}, {"text": "the sky"}]
    tokenizer = word_tokenizer()
    prepared, report = prepare_sequences(load(rows), tokenizer, max_length=3)
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in prepared["input_ids"]] == [
        ["the", " sky", " is"],
        ["the", " sky", "</s>"],
    ]
    assert (report.rows_cut, report.tokens_cut, report.trained_tokens_cut) == (1, 2, 2)
    assert (report.tokens, report.trained_tokens, report.end_of_turn) == (6, 4, 1)
    assert report.lengths == {"min": 3, "median": 4, "p95": 5, "max": 5}


def test_cut_at_the_start() -> None:
    tokenizer = word_tokenizer()
    prepared, report = prepare_sequences(
        load([{"prompt": "the sky is", "completion": " blue"}]), tokenizer, max_length=3, truncation_mode="keep_end"
    )
    assert tokenizer.convert_ids_to_tokens(prepared[0]["input_ids"]) == [" is", " blue", "</s>"]
    assert prepared[0]["loss_mask"] == [False, True, True]
    assert (report.rows_cut, report.tokens_cut, report.trained_tokens_cut) == (1, 2, 0)


def test_dropped_rows() -> None:
    rows = [
        {"prompt": "the sky is", "completion": " blue"},
        {"prompt": "the sky is blue", "completion": " what"},
        {"prompt": "", "completion": ""},
        {"prompt": "hello", "completion": ""},
    ]
    prepared, report = prepare_sequences(load(rows), word_tokenizer(), max_length=4)
    assert prepared["row"][:] == [0, 3]
    assert (report.rows_read, report.rows_kept) == (4, 2)
    assert report.dropped == [
        {"reason": "fewer than 2 tokens", "count": 1, "rows": [2]},
        {"reason": "every token to train on lies beyond max_length", "count": 1, "rows": [1]},
    ]
    assert report.rows_cut == 1 and report.tokens_cut == 1  # of the kept rows
    assert len(prepared) == 2 and prepared[1]["input_ids"][-1] == word_tokenizer().eos_token_id


def test_rows_without_an_assistant_are_dropped() -> None:
    rows = [{"messages": [user("hello")]}] * 7 + [{"messages": TALK}]
    prepared, report = prepare_sequences(load(rows), chatml(), assistant_only_loss=True)
    assert prepared["row"][:] == [7]
    assert report.dropped == [{"reason": "no token to train on", "count": 7, "rows": [0, 1, 2, 3, 4]}]
    assert "warning: 7 rows dropped: no token to train on (row 0, 1, 2, 3, 4, …)" in report.lines()


# -- sentences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        ([{"text": "a"}, {"text": None}], {}, "row 1: `text` is None. Fill it in, or remove such rows"),
        ([{"messages": TALK}, {"messages": None}], {}, "row 1: `messages` is None."),
        ([{"messages": TALK}, {"messages": []}], {}, "row 1: `messages` is an empty list."),
        (
            [{"messages": TALK}, {"messages": [user("a"), assistant(None)]}],
            {},
            r"row 1: `messages\[1\].content` is None.",
        ),
        ([{"messages": [{"role": None, "content": "a"}]}], {}, r"row 0: `messages\[0\]` has no `role`."),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}], {}, "row 1: `completion` is None."),
        ([{"prompt": [user("a")], "completion": [user("b")]}], {}, "row 0: `completion` begins with the role 'user'."),
        ([{"input_ids": [1, 2]}, {"input_ids": None}], {}, "row 1: `input_ids` is None."),
        ([{"input_ids": [1, -2]}], {}, r"row 0: `input_ids`\[1\] is -2, which is no token id."),
        ([{"input_ids": [1, 2], "labels": [1]}], {}, "row 0: `labels` is of length 1, but `input_ids` has 2 tokens."),
        (
            [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2], "labels": [-100, 3]}],
            {},
            r"row 1: `labels`\[1\] is 3, but the token there is 2. Labels are the `input_ids` themselves, not shifted",
        ),
        (
            [{"text": "a"}],
            {"assistant_only_loss": True},
            "assistant_only_loss=True, but the data are not conversations",
        ),
        (
            [{"text": "a"}],
            {"completion_only_loss": True},
            "completion_only_loss=True, but the data have no completions",
        ),
        ([{"text": "a"}], {"max_length": 1}, "max_length=1 leaves nothing to predict"),
        ([{"text": "a"}], {"truncation_mode": "left"}, "truncation_mode='left' is not known: choose 'keep_start' or"),
        (
            [{"messages": [user("a")]}, {"messages": [user("b")]}],
            {"assistant_only_loss": True, "name": "eval"},
            r"eval: none of the 2 rows can be trained on: no token to train on \(2\). The first is row 0, `messages`: "
            "no token to train on. Give it an assistant turn or a completion, or train on all tokens",
        ),
        (
            [{"prompt": "the sky is", "completion": " blue"}],
            {"max_length": 3},
            r"train: none of the 1 rows can be trained on: every token to train on lies beyond max_length \(1\). The "
            "first is row 0, `prompt`, `completion`: .* Raise `max_length`",
        ),
    ],
)
def test_sentences(rows: list[dict[str, Any]], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        prepare_sequences(load(rows), chatml(), **options)


def test_an_empty_data_set() -> None:
    with pytest.raises(DataError, match="eval: the data set has no rows."):
        prepare_sequences(datasets.Dataset.from_dict({"text": []}), word_tokenizer(), name="eval")


@pytest.mark.parametrize("assistant_only", [False, True])
def test_a_refused_row_is_named(assistant_only: bool) -> None:
    tokenizer = word_tokenizer((), tiny.LLAMA2, bos="<s>")
    rows = [{"messages": TALK}, {"messages": [user("hello"), user("more"), assistant("bye")]}]
    with pytest.raises(DataError) as error:
        prepare_sequences(load(rows), tokenizer, assistant_only_loss=assistant_only)
    assert str(error.value) == (
        "row 1: `messages`: the chat template refuses the conversation with the roles [user, user, assistant]: roles "
        "must take turns, the user first. Change the messages to what it accepts, or set another "
        "`tokenizer.chat_template`."
    )


def test_conversations_without_a_template() -> None:
    with pytest.raises(DataError, match="The data are conversations, but the tokenizer has no chat template."):
        prepare_sequences(load([{"messages": TALK}]), word_tokenizer())


# -- the pass itself ------------------------------------------------------------------------------------------------


def test_rows_keep_their_order_and_number_over_batches() -> None:
    dataset = load([{"text": f"{number} sky"} for number in range(2500)])
    prepared, report = prepare_sequences(dataset, word_tokenizer())
    assert prepared["row"][:] == list(range(2500))
    assert report.rows_kept == 2500 and report.tokens == sum(len(ids) for ids in prepared["input_ids"])


def test_several_processes_give_the_same() -> None:
    dataset = load([{"messages": TALK}, {"messages": TALK[:2]}] * 3)
    alone, report = prepare_sequences(dataset, chatml(), assistant_only_loss=True)
    together, report_together = prepare_sequences(dataset, chatml(), assistant_only_loss=True, num_proc=2)
    assert alone[:] == together[:] and report == report_together


def test_a_formatted_dataset_is_read_as_plain_values() -> None:
    dataset = load([{"input_ids": [5, 6, 7]}]).with_format("numpy")
    prepared, _ = prepare_sequences(dataset, word_tokenizer())
    assert prepared[0] == {"input_ids": [5, 6, 7], "loss_mask": [False, True, True], "row": 0}


def test_the_second_time_comes_from_the_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load([{"text": "the sky"}, {"text": "is blue"}]).save_to_disk(str(tmp_path / "data"))
    calls = []
    original = SequenceEncoder.__call__
    monkeypatch.setattr(SequenceEncoder, "__call__", lambda *arguments: calls.append(1) or original(*arguments))
    first, report = prepare_sequences(load(tmp_path / "data"), word_tokenizer())
    assert len(calls) == 1
    second, again = prepare_sequences(load(tmp_path / "data"), word_tokenizer())
    assert len(calls) == 1 and first[:] == second[:] and report == again
    for options in ({"max_length": 2}, {"add_eos": False}):
        prepare_sequences(load(tmp_path / "data"), word_tokenizer(), **options)
    prepare_sequences(load(tmp_path / "data"), word_tokenizer(bos="<s>", add_bos=True))
    assert len(calls) == 4


def test_the_mapped_function_can_be_pickled() -> None:
    dataset = load([{"messages": TALK}])
    tokenise = SequenceEncoder(chatml(), detect(dataset), Sequences(assistant_only_loss=True))
    again = pickle.loads(pickle.dumps(tokenise))
    assert again(dataset[:], [0]) == tokenise(dataset[:], [0])


def test_a_tokenizer_without_offsets() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)  # written in Python: a token is a byte; it ends a text with its EOS
    assert not tokenizer.is_fast
    assert table({"text": "abc"}, tokenizer) == [("a", False), ("b", True), ("c", True), ("</s>", True)]
    row = {"prompt": "ab", "completion": "cd"}
    assert table(row, tokenizer) == [("a", False), ("b", False), ("c", True), ("d", True), ("</s>", True)]
    tokenizer.chat_template = tiny.LLAMA2.replace("bos_token + ", "")
    assert trained(table({"messages": [user("a"), assistant("b")] * 2}, tokenizer, assistant_only_loss=True)) == [
        *(" ", "b", "</s>"),  # its EOS takes the space before it
        *(" ", "b", "</s>"),
    ]
