"""Judged completions to tokens: every shape, what is cut and dropped, the report, streams, and broken rows."""

from __future__ import annotations

import json
import pickle
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from tests.data import tiny_tokenizers as tiny
from tests.data.tiny_tokenizers import assistant, byte_tokenizer, system, user, word_tokenizer
from trl.data.mixture import DatasetMixtureConfig, Mixture, MixturePart, load_mixture
from trl.data.reading.errors import DataError
from trl.data.reading.sources import load
from trl.data.tokenizing.comparison_encoder import ComparisonEncoder
from trl.data.tokenizing.comparisons import Preferences, prepare_preferences
from trl.data.tokenizing.sequences import prepare_sequences

ASKED = [user("hello")]
GOOD, BAD = assistant("good day"), assistant("bye")
PAIR = {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]}
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
TEXTS = {"prompt": "the sky", "chosen": " is blue", "rejected": " is"}


def chatml(**options: Any) -> Any:
    return word_tokenizer(tiny.CHATML_TOKENS, tiny.CHATML, eos="<|im_end|>", **options)


def tables(rows: Any, tokenizer: Any, kind: str = "pairs", **options: Any) -> list[dict[str, Any]]:
    """The prepared rows, with text in the place of tokens."""
    prepared, _ = prepare_preferences(load(rows), tokenizer, kind=kind, **options)
    return [
        {key: tokenizer.decode(value) if key.endswith("_ids") else value for key, value in row.items()}
        for row in prepared
    ]


def texts(row: dict[str, Any], tokenizer: Any, **options: Any) -> tuple[str, ...]:
    """Prompt, chosen and rejected of one row."""
    found = tables([row], tokenizer, **options)[0]
    return tuple(found[column] for column in COLUMNS)


HEAD = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
EXPECTED = (HEAD, "good day<|im_end|>", "bye<|im_end|>")


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_a_conversation() -> None:
    tokenizer = chatml()
    prepared, _ = prepare_preferences(load([PAIR]), tokenizer, kind="pairs")
    assert [tokenizer.convert_ids_to_tokens(prepared[0][column]) for column in COLUMNS] == [
        ["<|im_start|>", "user", "\n", "hello", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"],
        ["good", " day", "<|im_end|>"],
        ["bye", "<|im_end|>"],
    ]  # fmt: skip
    assert prepared.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "row"]
    assert prepared.features["chosen_ids"] == datasets.List(datasets.Value("int32"))
    assert prepared.features["row"] == datasets.Value("int64")


def test_texts_begin_and_end() -> None:
    tokenizer = word_tokenizer(bos="<s>", add_bos=True)
    rows = [TEXTS, {"prompt": "<s>the sky", "chosen": " is blue</s>", "rejected": " is"}]
    expected = {"prompt_ids": "<s>the sky", "chosen_ids": " is blue</s>", "rejected_ids": " is</s>"}
    assert tables(rows, tokenizer) == [{**expected, "row": 0}, {**expected, "row": 1}]
    assert texts(TEXTS, tokenizer, add_eos=False) == ("<s>the sky", " is blue", " is")
    # The beginning of a text is a token to predict the first word from.
    assert texts({"prompt": "", "chosen": "hello", "rejected": "bye"}, tokenizer)[0] == "<s>"
    _, report = prepare_preferences(load(rows), tokenizer, kind="pairs")
    assert report.bos_doubled == 1


def test_a_tokenizer_without_offsets() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    assert texts({"prompt": "ab", "chosen": "cd", "rejected": "e"}, tokenizer) == ("ab", "cd</s>", "e</s>")


@pytest.mark.parametrize(
    ("special", "template", "end"),
    [
        (tiny.CHATML_TOKENS, tiny.CHATML, "good day<|im_end|>"),
        (tiny.CHATML_TOKENS, tiny.DEFAULT_SYSTEM, "good day<|im_end|>"),
        (tiny.LLAMA3_TOKENS, tiny.LLAMA3, "good day<|eot_id|>"),
        (tiny.GEMMA_TOKENS, tiny.GEMMA, "good day<end_of_turn>"),
        ((), tiny.LLAMA2, " good day </s>"),
        (tiny.PHI_TOKENS, tiny.PHI, "good day<|end|>"),
        (tiny.CHATML_TOKENS, tiny.THINKING, "<think>\n\n</think>\n\ngood day<|im_end|>"),
        (tiny.CHATML_TOKENS, tiny.MARKED, "good day<|im_end|>"),
        (tiny.CHATML_TOKENS, tiny.MARKED_CONTENT, "good day<|im_end|>"),
        ((), tiny.NO_END, " good day"),
    ],
)
def test_a_completion_ends_where_the_turn_does(special: tuple[str, ...], template: str, end: str) -> None:
    tokenizer = byte_tokenizer(special, template, bos="<s>")
    tokenizer.bos_token = "<s>"
    talk = [user("hello"), assistant("more"), user("hello")]
    _, chosen, _ = texts({"prompt": talk, "chosen": [GOOD], "rejected": [BAD]}, tokenizer)
    assert chosen == end
    # As it is in fine-tuning, whatever of the beginning the template writes itself.
    prepared, _ = prepare_sequences(load([{"prompt": talk, "completion": [GOOD]}]), tokenizer)
    trained = [token for token, on in zip(prepared[0]["input_ids"], prepared[0]["loss_mask"], strict=True) if on]
    assert chosen.endswith(tokenizer.decode(trained).lstrip())


def test_a_history_that_reads_otherwise_later() -> None:
    tokenizer = word_tokenizer(tiny.CHATML_TOKENS, tiny.THINKING, eos="<|im_end|>")
    talk = [user("hello"), assistant("<think>\nhm\n</think>\n\nmore"), user("what")]
    prompt, chosen, _ = texts({"prompt": talk, "chosen": [GOOD], "rejected": [BAD]}, tokenizer)
    assert prompt.endswith("more<|im_end|>\n<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n")
    assert "hm" not in prompt and chosen == "<think>\n\n</think>\n\ngood day<|im_end|>"


def test_a_generation_prompt_that_says_more_than_the_turn() -> None:
    template = tiny.CHATML.replace("assistant\\n' }}{%- endif", "assistant\\n<think>\\n' }}{%- endif")
    tokenizer = byte_tokenizer(tiny.CHATML_TOKENS, template)
    assert texts(PAIR, tokenizer) == EXPECTED
    _, report = prepare_preferences(load([PAIR]), tokenizer, kind="pairs")
    assert report.boundary_tokens == 1
    assert any(line.startswith("warning: in 1 row the prompt alone ends in other tokens") for line in report.lines())


def test_a_token_over_the_boundary_is_counted_and_begins_the_completion() -> None:
    tokenizer = byte_tokenizer(merges=(("Ġ", "b"),))
    row = {"prompt": "a ", "chosen": "bc", "rejected": "d"}
    prepared, report = prepare_preferences(load([row]), tokenizer, kind="pairs")
    assert [tokenizer.convert_ids_to_tokens(prepared[0][column]) for column in COLUMNS] == [
        ["a"], ["Ġb", "c", "</s>"], ["Ġ", "d", "</s>"]]  # fmt: skip
    assert report.boundary_tokens == 1


def test_upstream_has_the_same_tokens(smol_path: str) -> None:
    """Recorded from TRL 1.16, which trains on the newline (198) behind the end of turn (2) too."""
    tokenizer = AutoTokenizer.from_pretrained(smol_path)
    talk = {"prompt": [user("What is the sky?")], "chosen": [assistant("It is blue.")],
            "rejected": [assistant("No idea, friend.")]}  # fmt: skip
    head = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
    head += [2, 198, 1, 4093, 198, 1780, 314, 260, 6376, 47, 2, 198, 1, 520, 9531, 198]
    assert prepare_preferences(load([talk]), tokenizer, kind="pairs")[0][0] == {
        "prompt_ids": head,
        "chosen_ids": [1589, 314, 4461, 30, 2],
        "rejected_ids": [5230, 2359, 28, 3289, 30, 2],
        "row": 0,
    }
    text = {"prompt": "The sky is", "chosen": " blue today.", "rejected": " green."}
    assert prepare_preferences(load([text]), tokenizer, kind="pairs")[0][0] == {
        "prompt_ids": [504, 6376, 314],
        "chosen_ids": [4461, 1834, 30, 2],
        "rejected_ids": [2654, 30, 2],
        "row": 0,
    }
    shared = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    prepared, report = prepare_preferences(load([shared]), tokenizer, kind="pairs")
    assert prepared[0]["prompt_ids"] == [504, 6376, 314] and report.boundary_tokens == 0
    assert (prepared[0]["chosen_ids"], prepared[0]["rejected_ids"]) == ([4461, 30, 2], [2632, 30, 2])
    single = {"prompt": talk["prompt"], "completion": talk["chosen"], "label": True}
    assert prepare_preferences(load([single]), tokenizer, kind="unpaired")[0][0] == {
        "prompt_ids": head,
        "completion_ids": [1589, 314, 4461, 30, 2],
        "label": True,
        "row": 0,
    }


# -- shapes -----------------------------------------------------------------------------------------------------------

TURNS = [{"from": "human", "value": "hello"}]
SAID, WORSE = {"from": "gpt", "value": "good day"}, {"from": "gpt", "value": "bye"}
SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "messages": (PAIR, "prompts in `prompt`, chosen completions in `chosen`, rejected ones in `rejected`"),
    "a string for a prompt": (
        {**PAIR, "prompt": "hello"},
        "prompts in `prompt`, chosen completions in `chosen`, rejected ones in `rejected`",
    ),
    "strings for completions": (
        {"prompt": ASKED, "chosen": "good day", "rejected": "bye"},
        "prompts in `prompt`, chosen completions in `chosen`, rejected ones in `rejected`",
    ),
    "single messages": (
        {"prompt": ASKED[0], "chosen": GOOD, "rejected": BAD},
        "prompts in `prompt`, chosen completions in `chosen`, rejected ones in `rejected`",
    ),
    "implicit": (
        {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
        "chosen conversations in `chosen`, rejected ones in `rejected`; their common beginning is the prompt",
    ),
    "turns of {from, value}": (
        {"chosen": [*TURNS, SAID], "rejected": [*TURNS, WORSE]},
        "chosen conversations in `chosen`, rejected ones in `rejected`; their common beginning is the prompt",
    ),
    "UltraFeedback": (
        {"prompt": "hello", "prompt_id": "x", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD],
         "messages": [*ASKED, GOOD], "score_chosen": 8.0, "score_rejected": 2.0},
        "prompts in `prompt`, chosen completions in `chosen`, rejected ones in `rejected` (prompt_id, messages, "
        "score_chosen, score_rejected ignored)",
    ),
    "messages that are repeated": (
        {"prompt": ASKED, "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
        "prompts in `prompt`, chosen completions in `chosen`, rejected ones in `rejected`",
    ),
    "ShareGPT": (
        {"conversations": TURNS, "chosen": SAID, "rejected": WORSE},
        "conversations in `conversations`, chosen completions in `chosen`, rejected ones in `rejected`",
    ),
    "ShareGPT with roles": (
        {"messages": ASKED, "chosen": GOOD, "rejected": BAD},
        "conversations in `messages`, chosen completions in `chosen`, rejected ones in `rejected`",
    ),
    "HH-RLHF": (
        {"chosen": "\n\nHuman: hello\n\nAssistant: good day", "rejected": "\n\nHuman: hello\n\nAssistant: bye"},
        "chosen transcripts in `chosen`, rejected ones in `rejected`; their common beginning is the prompt, each row "
        "as a conversation",
    ),
    "Orca": (
        {"question": "hello", "chosen": "good day", "rejected": "bye", "id": "x"},
        "questions in `question`, chosen completions in `chosen`, rejected ones in `rejected` (id ignored), each row "
        "as a conversation of two turns",
    ),
    "Argilla": (
        {"instruction": "hello", "chosen_response": "good day", "rejected_response": "bye"},
        "questions in `instruction`, chosen completions in `chosen_response`, rejected ones in "
        "`rejected_response`, each row as a conversation of two turns",
    ),
    "Argilla with messages": (
        {"instruction": "hello", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
        "questions in `instruction`, chosen completions in `chosen`, rejected ones in `rejected`",
    ),
    "ranked": (
        {"prompt": "hello", "responses": ["more", "good day", "bye"], "scores": [0.5, 2.0, -1.0]},
        "prompts in `prompt` and answers in `responses`; the highest of `scores` is chosen, the lowest rejected, each "
        "row as a conversation of two turns",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    row, sentence = SHAPES[name]
    assert texts(row, chatml()) == EXPECTED
    _, report = prepare_preferences(load([row]), chatml(), kind="pairs")
    assert report.sentence == f"columns {', '.join(row)}: read as {sentence}"


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_unpaired(name: str) -> None:
    row, sentence = SHAPES[name]
    rows = tables([row, row], chatml(), kind="unpaired")
    expected = [{"prompt_ids": HEAD, "completion_ids": said, "label": label} for said, label in
                ((EXPECTED[1], True), (EXPECTED[2], False))]  # fmt: skip
    assert rows == [{**part, "row": number} for number in (0, 1) for part in expected]
    _, report = prepare_preferences(load([row, row]), chatml(), kind="unpaired")
    assert "; 2 pairs read as 4 rows" in report.sentence and (report.rows_read, report.rows_kept) == (4, 4)
    assert (report.labels_true, report.labels_false) == (2, 2)


def test_an_instruction_with_more_and_a_system_message() -> None:
    row = {"system": "be kind", "instruction": "answer", "input": "what", "chosen": "good day", "rejected": "bye"}
    begin = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nanswer\n\nwhat<|im_end|>\n<|im_start|>assistant\n"
    assert texts(row, chatml()) == (begin, *EXPECTED[1:])
    assert texts(row, byte_tokenizer()) == (
        "be kind\n\n### Instruction:\nanswer\n\n### Input:\nwhat\n\n### Response:\n",
        "good day</s>",
        "bye</s>",
    )
    for talk in ({**PAIR, "system": "be kind"},
                 {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD], "system": "be kind"},
                 {"chosen": [system("be kind"), *ASKED, GOOD], "rejected": [system("be kind"), *ASKED, BAD]},
                 {"prompt": "hello", "chosen": [system("be kind"), *ASKED, GOOD],
                  "rejected": [system("be kind"), *ASKED, BAD]}):  # fmt: skip
        assert texts(talk, chatml())[0] == f"<|im_start|>system\nbe kind<|im_end|>\n{HEAD}"


def test_several_turns() -> None:
    begin = [*ASKED, GOOD, user("more")]
    implicit = {"chosen": [*begin, GOOD], "rejected": [*begin, BAD]}
    explicit = {"prompt": begin, "chosen": [GOOD], "rejected": [BAD]}
    ultra = {"prompt": "hello", **implicit}
    written = {
        "chosen": "\n\nHuman: hello\n\nAssistant: good day\n\nHuman: more\n\nAssistant: good day",
        "rejected": "\n\nHuman: hello\n\nAssistant: good day\n\nHuman: more\n\nAssistant: bye",
    }
    first = texts(explicit, chatml())
    assert first == texts(implicit, chatml()) == texts(ultra, chatml()) == texts(written, chatml())
    assert first[0] == f"{HEAD}good day<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    assert texts(written, byte_tokenizer()) == (
        "\n\nHuman: hello\n\nAssistant: good day\n\nHuman: more\n\nAssistant:",
        " good day</s>",
        " bye</s>",
    )
    # They part earlier, and the completion is of several turns.
    longer = {"chosen": [*ASKED, GOOD, user("more"), BAD], "rejected": [*ASKED, BAD]}
    assert texts(longer, chatml()) == (
        HEAD,
        "good day<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\nbye<|im_end|>",
        "bye<|im_end|>",
    )


def test_texts_that_share_their_beginning() -> None:
    row = {"chosen": "the sky is blue", "rejected": "the sky what"}
    assert texts(row, word_tokenizer()) == ("the sky", " is blue</s>", " what</s>")
    assert texts({"prompt": "hello ", **row}, byte_tokenizer())[0] == "hello "


def test_margins_and_references_come_along() -> None:
    rows = [{**PAIR, "margin": 2, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}]
    extras = {"margin": 2.0, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}
    found = tables(rows, chatml())[0]
    assert {key: found[key] for key in extras} == extras
    assert [row["ref_logps"] for row in tables(rows, chatml(), kind="unpaired")] == [-1.5, -2.5]
    older = [{**PAIR, "reference_chosen_logps": -1.5, "reference_rejected_logps": -2.5}]
    assert tables(older, chatml())[0]["ref_chosen_logps"] == -1.5


def test_tools_and_template_arguments() -> None:
    template = (
        "{%- for tool in tools or [] %}{{- tool.name + ' ' }}{%- endfor %}{{- tone | default('') }}" + tiny.CHATML
    )
    tokenizer = word_tokenizer(tiny.CHATML_TOKENS, template, eos="<|im_end|>")
    rows = [
        {**PAIR, "tools": '[{"name": "call"}]', "chat_template_kwargs": {"tone": "kind"}},
        {**PAIR, "tools": None, "chat_template_kwargs": None},
    ]
    first, second = tables(rows, tokenizer)
    assert first["prompt_ids"] == f"call kind{HEAD}" and second["prompt_ids"] == HEAD
    assert first["chosen_ids"] == second["chosen_ids"] == EXPECTED[1]


def test_the_users_columns() -> None:
    row = {"q": "the sky", "a": " is blue", "b": " is", "prompt": "hello"}
    columns = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert texts(row, word_tokenizer(), columns=columns) == ("the sky", " is blue</s>", " is</s>")
    with pytest.raises(DataError, match="columns=.* names `c`, but the columns are `q`"):
        texts(row, word_tokenizer(), columns={"prompt": "q", "chosen": "a", "rejected": "c"})
    with pytest.raises(DataError, match="does not fit the data: `b` holds numbers, but text is needed."):
        texts({**row, "b": 1}, word_tokenizer(), columns=columns)


def test_prepared_rows_stay_as_they_are() -> None:
    rows = [{**PAIR, "margin": 1.0}, {**PAIR, "rejected": [GOOD], "margin": 1.0}, {**PAIR, "margin": 2.0}]
    prepared, _ = prepare_preferences(load(rows), chatml(), kind="pairs", max_length=11)
    again, report = prepare_preferences(prepared, chatml(), kind="pairs", max_length=11)
    assert again[:] == prepared[:] and again.features == prepared.features and again["row"][:] == [0, 2]
    assert report.rows_cut == 0
    steps = [{"prompt": "what", "completions": ["the", "sky is"], "labels": [True, False]}]
    labelled = [{**PAIR, "label": 1} for _ in range(2)]
    for kind, some in (("unpaired", labelled), ("steps", steps)):
        prepared, _ = prepare_preferences(load(some), chatml(), kind=kind)
        assert prepare_preferences(prepared, chatml(), kind=kind)[0][:] == prepared[:]
    pairs, _ = prepare_preferences(load([PAIR]), chatml(), kind="pairs")
    assert tables(pairs, chatml(), kind="unpaired") == tables([PAIR], chatml(), kind="unpaired")
    # What older scripts made for reward models: whole conversations, of which the prompt is what they share.
    old = [{"chosen_input_ids": [1, 2, 3], "rejected_input_ids": [1, 2, 4, 5]}]
    assert prepare_preferences(load(old), chatml(), kind="pairs")[0][0] == {
        "prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5], "row": 0}  # fmt: skip


# -- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [True, 1, 1.0])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "completion": [GOOD]},
        {"prompt": "hello", "completion": [GOOD]},
        {"prompt": "hello", "completion": [*ASKED, GOOD]},
        {"prompt": ASKED, "completion": "good day"},
        {"prompt": ASKED, "completion": GOOD},
        {"messages": [*ASKED, GOOD]},
        {"conversations": [*TURNS, SAID]},
        {"question": "hello", "answer": "good day"},
        {"prompt": "hello", "response": "good day"},
    ],
)
def test_unpaired(row: dict[str, Any], label: Any) -> None:
    assert tables([{**row, "label": label}], chatml(), kind="unpaired") == [
        {"prompt_ids": HEAD, "completion_ids": EXPECTED[1], "label": True, "row": 0}
    ]


def test_unpaired_texts() -> None:
    rows = [{"prompt": "the sky", "completion": " is", "label": False, "ref_logps": -3}]
    assert tables(rows, word_tokenizer(), kind="unpaired") == [
        {"prompt_ids": "the sky", "completion_ids": " is</s>", "label": False, "row": 0, "ref_logps": -3.0}
    ]


# -- steps ------------------------------------------------------------------------------------------------------------


def test_steps_as_the_last_version_that_had_them(smol_path: str) -> None:
    """Recorded from TRL 0.28."""
    tokenizer = AutoTokenizer.from_pretrained(smol_path)
    row = {
        "prompt": "Which is larger, 9.8 or 9.11?",
        "completions": ["11 is greater than 8.", "Hence, 9.11 > 9.8."],
        "labels": [True, False],
    }
    prepared, report = prepare_preferences(load([row]), tokenizer, kind="steps")
    assert prepared[0] == {
        "prompt_ids": [1, 14413, 314, 3227, 28, 216, 41, 30, 40, 355, 216, 41, 30, 33, 33, 47],
        "completion_ids": [33, 33, 314, 2852, 670, 216, 40, 30, 198]
        + [35391, 28, 216, 41, 30, 33, 33, 2986, 216, 41, 30, 40, 30, 198],
        "step_mask": [False] * 8 + [True] + [False] * 13 + [True],
        "step_labels": [1, 0],
        "row": 0,
    }
    assert report.lines()[1:] == [
        "tokens: 39, each prompt counted once, 2 of them judged steps (5.1%)",
        "lengths before any cut: prompts median 16, 95th percentile 16, longest 16; completions median 23, "
        "95th percentile 23, longest 23 tokens; no window set",
        "labels: 1 true, 1 false",
        "row 0: prompt <|im_start|>Which is larger, 9.8 or 9.11? steps 11 is greater than 8.⟦\\n⟧Hence, 9.11 > 9.8."
        "⟦\\n⟧ labels 1, 0",
    ]


def test_options_of_steps() -> None:
    row = {"prompt": "what", "completions": ["the", "sky is"], "labels": [1, 0]}
    last = tables([row], word_tokenizer(), kind="steps", train_on_last_step_only=True, step_separator=" blue .")[0]
    assert last["completion_ids"] == "the blue .sky is blue ."
    assert last["step_mask"] == [False] * (len(last["step_mask"]) - 1) + [True] and last["step_labels"] == [0]
    talk = tables([{**row, "prompt": ASKED}], chatml(), kind="steps")[0]
    assert (talk["prompt_ids"], talk["completion_ids"]) == (HEAD, "the\nsky is\n")


def test_steps_are_cut_with_their_labels() -> None:
    row = {"prompt": "what", "completions": ["the", "sky is", "blue"], "labels": [True, False, True]}
    for options, labels, text in (
        ({"max_completion_length": 5}, [1, 0], "the\nsky is\n"),
        ({"max_completion_length": 4}, [1], "the\nsky is"),
        ({"max_length": 4}, [1], "the\nsky"),
        ({"max_length": 4, "truncation_mode": "keep_end"}, [0, 1], "\nblue\n"),
    ):
        found = tables([row], word_tokenizer(), kind="steps", **options)[0]
        assert (found["step_labels"], found["completion_ids"]) == (labels, text)
        assert sum(found["step_mask"]) == len(labels)
    with pytest.raises(
        DataError, match="every step ends beyond the cut .1.. The first is row 0, `prompt`, `completions`"
    ):
        tables([row], word_tokenizer(), kind="steps", max_length=2)


# -- cuts and drops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "prompt", "completions", "expected"),
    [
        ({}, 5, (3, 4), (0, [(0, 3), (0, 4)])),
        ({"max_prompt_length": 2}, 5, (3, 4), (3, [(0, 3), (0, 4)])),
        ({"max_prompt_length": 9}, 5, (3, 4), (0, [(0, 3), (0, 4)])),
        ({"max_completion_length": 3}, 5, (3, 4), (0, [(0, 3), (0, 3)])),
        ({"max_length": 9}, 5, (3, 4), (0, [(0, 3), (0, 4)])),
        ({"max_length": 8}, 5, (3, 4), (0, [(0, 3), (0, 3)])),
        ({"max_length": 6}, 5, (3, 4), (0, [(0, 1), (0, 1)])),
        ({"max_length": 5}, 5, (3, 4), None),
        ({"max_length": 5, "max_prompt_length": 2}, 5, (3, 4), (3, [(0, 3), (0, 3)])),
        ({"max_length": 8, "truncation_mode": "keep_end"}, 5, (3, 4), (1, [(0, 3), (0, 4)])),
        ({"max_length": 5, "truncation_mode": "keep_end"}, 5, (3, 4), (4, [(0, 3), (0, 4)])),
        ({"max_length": 4, "truncation_mode": "keep_end"}, 5, (3, 4), (4, [(0, 3), (1, 4)])),
        ({"max_length": 2, "truncation_mode": "keep_end"}, 5, (3, 4), (4, [(2, 3), (3, 4)])),
        ({"max_length": 5, "truncation_mode": "keep_end"}, 2, (1,), (0, [(0, 1)])),
        ({"max_length": 4, "truncation_mode": "keep_end", "max_completion_length": 2}, 5, (3, 4),
         (3, [(0, 2), (0, 2)])),
    ],
)  # fmt: skip
def test_cut(options: dict[str, Any], prompt: int, completions: tuple[int, ...], expected: Any) -> None:
    found = Preferences(kind="pairs", **options).cut(prompt, completions)
    assert (found and (found[0], [(part.start, part.stop) for part in found[1]])) == expected


def test_the_text_that_is_left() -> None:
    row = {"prompt": "the sky is", "chosen": " blue good day", "rejected": " more"}
    assert texts(row, word_tokenizer(), max_length=5) == ("the sky is", " blue good", " more</s>")
    assert texts(row, word_tokenizer(), max_length=6, truncation_mode="keep_end") == (
        " sky is",
        " blue good day</s>",
        " more</s>",
    )
    assert texts(row, word_tokenizer(), max_length=3, truncation_mode="keep_end") == (" is", " day</s>", " more</s>")
    limits = {"max_prompt_length": 2, "max_completion_length": 1}
    assert texts(row, word_tokenizer(), **limits) == (" sky is", " blue", " more")


def test_a_pair_is_cut_to_its_own_need_and_single_rows_to_theirs() -> None:
    row = {"prompt": "the sky is", "chosen": " blue good day", "rejected": " more"}
    options = {"max_length": 6, "truncation_mode": "keep_end", "kind": "unpaired"}
    assert [found["prompt_ids"] for found in tables([row], word_tokenizer(), **options)] == [" sky is", "the sky is"]


def test_what_is_dropped() -> None:
    rows = [
        {"prompt": "the sky", "chosen": " blue day", "rejected": " is"},
        {"prompt": "", "chosen": "hello", "rejected": "bye"},
        {"prompt": "hello", "chosen": " bye", "rejected": " bye"},
        {"prompt": "hello", "chosen": " good day more", "rejected": " good day bye"},
        {"prompt": "the sky is blue", "chosen": " bye", "rejected": " day"},
        {"prompt": "hello", "chosen": "", "rejected": " bye"},
    ]
    prepared, report = prepare_preferences(load(rows), word_tokenizer(), kind="pairs", max_length=3)
    assert prepared["row"][:] == [0, 5]
    assert report.dropped == [
        {"reason": "no token stands before the completion", "count": 1, "rows": [1]},
        {"reason": "both completions are the same", "count": 1, "rows": [2]},
        {"reason": "both completions are the same once they are cut", "count": 1, "rows": [3]},
        {"reason": "the prompt alone fills max_length", "count": 1, "rows": [4]},
    ]
    assert report.empty_completions == 1
    prepared, report = prepare_preferences(load(rows[4:]), word_tokenizer(), kind="pairs", add_eos=False)
    assert prepared["row"][:] == [0] and report.dropped == [
        {"reason": "a completion has no token", "count": 1, "rows": [1]}
    ]


def test_pairs_that_cannot_be_told_apart() -> None:
    rows = [
        {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]},
        {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, GOOD]},
        {"chosen": [*ASKED, GOOD, user("more"), BAD], "rejected": [*ASKED, GOOD, user("what"), BAD]},
    ]
    _, report = prepare_preferences(load(rows), chatml(), kind="pairs")
    assert [(entry["reason"], entry["rows"]) for entry in report.dropped] == [
        ("both completions are the same", [1]),
        ("the two conversations part at a turn that is not the assistant's", [2]),
    ]
    assert [row["row"] for row in tables(rows, chatml(), kind="unpaired")] == [0, 0]
    equal = [{"prompt": "hello", "responses": ["good", "bye"], "scores": scores} for scores in ([1, 1], [1, 2])]
    assert texts({**equal[1]}, chatml())[1:] == ("bye<|im_end|>", "good<|im_end|>")
    _, report = prepare_preferences(load(equal), chatml(), kind="pairs")
    assert report.dropped == [{"reason": "no response is better than another", "count": 1, "rows": [0]}]


# -- the report -------------------------------------------------------------------------------------------------------


def test_the_report_of_good_pairs() -> None:
    _, report = prepare_preferences(load([PAIR, PAIR]), chatml(), kind="pairs", max_length=50)
    assert report.lines() == [
        "train: 2 rows read, 2 kept; columns prompt, chosen, rejected: read as prompts in `prompt`, chosen "
        "completions in `chosen`, rejected ones in `rejected`",
        "tokens: 28, each prompt counted once, 10 of them trained on (35.7%)",
        "lengths before any cut: prompts median 9, 95th percentile 9, longest 9; completions median 2, "
        "95th percentile 3, longest 3 tokens; window 50",
        "end of turn: '<|im_end|>' is trained in every row",
        "row 0: prompt <|im_start|>user\\nhello<|im_end|>\\n<|im_start|>assistant\\n chosen ⟦good day<|im_end|>⟧ "
        "rejected ⟦bye<|im_end|>⟧",
    ]
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain == report.to_dict() and plain["prompt_lengths"]["max"] == 9 and plain["limits"] == {"max_length": 50}


def test_the_report_of_bad_pairs() -> None:
    rows = [
        {"prompt": "the sky is", "chosen": " blue good day", "rejected": " more"},
        {"prompt": "the sky", "chosen": " is blue", "rejected": " "},
        {"prompt": "the", "chosen": " sky", "rejected": " sky"},
    ]
    options = {"max_length": 5, "max_prompt_length": 2}
    _, report = prepare_preferences(load(rows), word_tokenizer(), kind="pairs", **options)
    assert report.lines()[3:-1] == [
        "warning: the end of turn '</s>' is trained in only 1 of 2 rows; on the others the model does not learn to "
        "stop",
        "warning: 1 pair cut, which lost 1 of the prompts' tokens (in 1 row) and 1 of the completions' (in 1 row); "
        "limits are max_length 5, max_prompt_length 2 (raise them to keep all)",
        "warning: 1 row dropped: both completions are the same (row 2)",
        "warning: 1 completion is empty; the model learns to give empty answers",
    ]  # fmt: skip
    assert (report.prompts_cut, report.prompt_tokens_cut, report.completions_cut, report.completion_tokens_cut) == (
        1, 1, 1, 1)  # fmt: skip
    assert (report.rows_cut, report.tokens_cut, report.trained_tokens_cut, report.tokens) == (1, 2, 1, 14)


def test_the_report_of_labels() -> None:
    rows = [{"prompt": "the", "completion": " sky", "label": label} for label in (True, True, False)]
    _, report = prepare_preferences(load(rows), word_tokenizer(), kind="unpaired")
    assert report.lines()[3] == "labels: 2 true, 1 false"
    assert report.lines()[-1] == "row 0: prompt the completion ⟦ sky</s>⟧ label true"


# -- one pass ---------------------------------------------------------------------------------------------------------


def test_the_second_time_comes_from_the_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load([{**TEXTS, "chosen": " blue"}] * 2).save_to_disk(str(tmp_path / "data"))
    calls = []
    original = ComparisonEncoder.__call__
    monkeypatch.setattr(ComparisonEncoder, "__call__", lambda *arguments: calls.append(1) or original(*arguments))
    first = prepare_preferences(load(tmp_path / "data"), word_tokenizer(), kind="pairs")
    assert prepare_preferences(load(tmp_path / "data"), word_tokenizer(), kind="pairs")[1] == first[1]
    assert len(calls) == 1
    for options in ({"max_length": 4}, {"max_prompt_length": 1}, {"max_completion_length": 1}, {"add_eos": False}):
        prepare_preferences(load(tmp_path / "data"), word_tokenizer(), kind="pairs", **options)
    prepare_preferences(load(tmp_path / "data"), word_tokenizer(), kind="unpaired")
    assert len(calls) == 6


def test_one_call_of_the_tokenizer_for_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    monkeypatch.setattr("trl.data.tokenizing.encode.Words.of", lambda tokenizer: None)
    calls: list[Any] = []
    original = type(tokenizer).__call__

    def counting(self: Any, text: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(text)
        return original(self, text, *arguments, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counting)
    prepare_preferences(load([TEXTS] * 20), tokenizer, kind="pairs")
    # And what comes again is not tokenised again; that a prompt has no end is asked once.
    assert [text for text in calls if isinstance(text, list)] == [["the sky", "the sky is blue", "the sky is"]]
    assert len(calls) <= 3


def test_several_processes_and_pickles() -> None:
    rows = load([PAIR] * 30)
    one, _ = prepare_preferences(rows, chatml(), kind="pairs")
    two, _ = prepare_preferences(rows, chatml(), kind="pairs", num_proc=2)
    assert one[:] == two[:] and two["row"][:] == list(range(30))
    recipe = Preferences(kind="pairs")
    tokenise = recipe.encoder(chatml(), recipe.detect(rows))
    assert pickle.loads(pickle.dumps(tokenise))(rows[:3], [0, 1, 2]) == tokenise(rows[:3], [0, 1, 2])


def many(kind: str) -> list[dict[str, Any]]:
    rows = [{**TEXTS, "prompt": f"{number}"} for number in range(230)]
    for same in (3, 120):
        rows[same] = {**rows[same], "chosen": " is"}
    return rows


@pytest.mark.parametrize("kind", ["pairs", "unpaired"])
@pytest.mark.parametrize("stop", [0, 1, 101, 150])
def test_streams(kind: str, stop: int) -> None:
    def made() -> Any:
        stream = load(many(kind)).to_iterable_dataset(num_shards=3)
        return prepare_preferences(stream, word_tokenizer(), kind=kind, look_at=10)

    stream, report = made()
    table, _ = prepare_preferences(load(many(kind)), word_tokenizer(), kind=kind)
    assert stream.column_names == table.column_names
    assert (report.looked_at, report.rows_read) == (10, 10 if kind == "pairs" else 20)
    expected = list(table)
    iterator = iter(stream)
    assert [next(iterator) for _ in range(stop)] == expected[:stop]
    again, _ = made()
    again.load_state_dict(stream.state_dict())
    assert list(again) == expected[stop:]


# -- mixes ------------------------------------------------------------------------------------------------------------


def test_mixes(tmp_path: Any) -> None:
    names = []
    for name, rows in (("pairs", [PAIR] * 3), ("texts", [{"question": "what", "chosen": "x", "rejected": "f"}])):
        names.append(str(tmp_path / f"{name}.jsonl"))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared, report = load_mixture(names)["train"].prepare(Preferences(kind="pairs", max_length=40), chatml())
    assert prepared["row"][:] == [0, 1, 2, 3] and [part.rows_kept for part in report.parts] == [3, 1]
    assert report.sentence == "a mix of 2 data sets" and report.parts[1].sample_row == 0
    assert tables(prepared, chatml())[0]["chosen_ids"] == EXPECTED[1]
    stream, total = load_mixture(DatasetMixtureConfig(names, streaming=True))["train"].prepare(
        Preferences(kind="pairs"), chatml()
    )
    assert [row["chosen_ids"] for row in stream] == prepared["chosen_ids"][:]
    assert (total.rows_read, total.prompt_lengths["max"], total.kind) == (4, 9, "pairs")
    labelled = load([{"prompt": ASKED, "completion": [GOOD], "label": True}])
    mixture = Mixture([MixturePart(labelled, "labelled"), MixturePart(load([PAIR]), "pairs")])
    prepared, report = mixture.prepare(Preferences(kind="unpaired"), chatml())
    assert prepared["label"][:] == [True, True, False] and prepared["row"][:] == [0, 1, 1]
    assert report.parts[1].sentence.endswith("; 1 pair read as 2 rows")


def test_a_column_that_only_some_have_is_left_out() -> None:
    mixture = Mixture([MixturePart(load([{**PAIR, "margin": 1.0}]), "one"), MixturePart(load([PAIR]), "two")])
    prepared, report = mixture.prepare(Preferences(kind="pairs"), chatml())
    assert prepared.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "row"]
    assert report.sentence == "a mix of 2 data sets (`margin` left out: not all of them have it)"


# -- broken -----------------------------------------------------------------------------------------------------------

LABELLED = {"prompt": "a", "completion": "b", "label": True}
STEPS = {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}
IMPLICIT = {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}
BROKEN: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "no chosen": (
        "pairs",
        [TEXTS, {**TEXTS, "chosen": None}],
        "row 1: `chosen` is None. Fill it in, or remove such rows with `dataset.filter`.",
    ),
    "no prompt": ("pairs", [TEXTS, {**TEXTS, "prompt": None}], "row 1: `prompt` is None. Fill it in, or remove"),
    "numbers": (
        "pairs",
        [{"prompt": "a", "chosen": 1, "rejected": 2}],
        "Cannot read the rows: the columns are `prompt` (text), `chosen` (numbers), `rejected` (numbers). Understood "
        "are `prompt`, `chosen` and `rejected` (strings, or lists of {role, content} or {from, value}), `chosen` and ",
    ),
    "one answer": (
        "pairs",
        [{"prompt": "a", "completion": "b"}],
        "Say which column is which with `columns`, as in columns={'prompt': ..., 'chosen': ..., 'rejected': ...}.",
    ),
    "no role": (
        "pairs",
        [PAIR, {**PAIR, "rejected": [{"role": None, "content": "x"}]}],
        "row 1: `rejected[0]` has no `role`. Every message needs one, such as 'user' or 'assistant'.",
    ),
    "no content": ("pairs", [{**PAIR, "prompt": [{"role": "user", "content": None}]}], "row 0: `prompt[0].content` is"),
    "an empty list": ("pairs", [PAIR, {**PAIR, "chosen": []}], "row 1: `chosen` is an empty list. Remove such rows"),
    "other beginnings": (
        "pairs",
        [IMPLICIT, {**IMPLICIT, "rejected": [user("what"), BAD]}],
        "row 1: `chosen` and `rejected` begin differently ('hello', 'what'), so they share no prompt. Give it in a "
        "column `prompt`, or remove the row with `dataset.filter`.",
    ),
    "completions alone": (
        "pairs",
        [IMPLICIT, {"chosen": [GOOD], "rejected": [GOOD]}],
        "row 1: `chosen` and `rejected` have one message each, so they share no prompt. Give it in a column `prompt`",
    ),
    "another prompt": (
        "pairs",
        [{"prompt": "what", **IMPLICIT}],
        "row 0: `chosen` begins with the role 'user' ('hello') and does not repeat `prompt`. A completion begins with "
        "the assistant's message: move the others to the prompt, or remove the column `prompt`.",
    ),
    "more after the answer": (
        "pairs",
        [{**PAIR, "chosen": [GOOD, user("more")]}],
        "row 0: `chosen` ends with the role 'user'. A completion ends with the assistant's message: remove",
    ),
    "a template that refuses": (
        "pairs",
        [PAIR, {**PAIR, "prompt": [system("be kind"), *ASKED]}],
        "row 1: `prompt`: the chat template refuses the conversation with the roles [system, user]: there is no system",
    ),
    "no margin": (
        "pairs",
        [{**TEXTS, "margin": 1.0}, {**TEXTS, "margin": None}],
        "row 1: `margin` is None, not a number. Fill it in, or remove the column or the row.",
    ),
    "a transcript that is none": (
        "pairs",
        [
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            {"chosen": "a", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        ],
        "row 1: `chosen` begins with 'a' and not, as the first row does, with 'Human:' after a blank line. Write every",
    ),
    "scores of another number": (
        "pairs",
        [{"prompt": "a", "responses": ["b", "c"], "scores": [1.0]}],
        "row 0: `scores` has 1 entries, but `responses` has 2. Give one score for each response.",
    ),
    "tools that are no JSON": ("pairs", [{**PAIR, "tools": "["}], "row 0: `tools` is not valid JSON ("),
    "tokens of another model": (
        "pairs",
        [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [99999]}],
        "row 0: `rejected_ids`[0] is 99999, but the tokenizer has ",
    ),
    "a label that is a word": (
        "unpaired",
        [{**LABELLED, "label": "good"}],
        "row 0: `label` is 'good', not true or false. Make it one of the two (or 1 and 0), or remove the row.",
    ),
    "no label": ("unpaired", [LABELLED, {**LABELLED, "label": None}], "row 1: `label` is None, not true or false."),
    "a score for a label": ("unpaired", [{**LABELLED, "label": 2}], "row 0: `label` is 2, not true or false."),
    "nothing before the answer": (
        "unpaired",
        [{"messages": [*ASKED, GOOD], "label": True}, {"messages": [GOOD], "label": True}],
        "row 1: `messages` has nothing before the assistant's turn: no prompt. Add it, or remove the row with ",
    ),
    "no answer": (
        "unpaired",
        [{"messages": [*ASKED, GOOD], "label": True}, {"messages": ASKED, "label": True}],
        "row 1: `messages` has no assistant's turn to judge. Add it, or remove the row with `dataset.filter`.",
    ),
    "labels of another number": (
        "steps",
        [{**STEPS, "labels": [True]}],
        "row 0: `labels` has 1 entries, but `completions` has 2 steps. Give one label for each step.",
    ),
    "a step that is none": ("steps", [{**STEPS, "completions": ["b", None]}], "row 0: `completions`[1] is None."),
    "labels that are signs": (
        "steps",
        [{**STEPS, "labels": ["+", "-"]}],
        "row 0: `labels`[0] is '+', not true or false. Make it one of the two (or 1 and 0), or remove the row.",
    ),
    "all the same": (
        "pairs",
        [{**TEXTS, "chosen": " is"}],
        "train: none of the 1 rows can be trained on: both completions are the same (1). The first is row 0, `prompt`, "
        "`chosen`, `rejected`: both completions are the same. A pair needs two different completions: check the col",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str) -> None:
    kind, rows, sentence = BROKEN[name]
    tokenizer = word_tokenizer(tiny.GEMMA_TOKENS, tiny.GEMMA, bos="<bos>", eos="<eos>")
    with pytest.raises(DataError) as error:
        prepare_preferences(load(rows), tokenizer, kind=kind)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "pair"}, "kind='pair' is not known: choose one of 'pairs', 'unpaired', 'steps'."),
        ({"truncation_mode": "keep"}, "truncation_mode='keep' is not known: choose 'keep_start' or 'keep_end'."),
        ({"max_length": 1}, "max_length=1 leaves nothing to predict"),
        ({"max_prompt_length": 0}, "max_prompt_length=0 leaves nothing: give at least 1, or None for no limit."),
        ({"kind": "steps", "step_separator": ""}, "step_separator='' has no token"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], sentence: str) -> None:
    row = STEPS if options.get("kind") == "steps" else TEXTS
    with pytest.raises(DataError, match=sentence):
        prepare_preferences(load([row]), word_tokenizer(), **{"kind": "pairs", **options})


def test_a_conversation_without_a_template() -> None:
    with pytest.raises(DataError, match="^The data are conversations, but the tokenizer has no chat template."):
        prepare_preferences(load([PAIR]), word_tokenizer(), kind="pairs")
