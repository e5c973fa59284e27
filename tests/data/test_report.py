"""What a person is told before the first step."""

from __future__ import annotations

import json
from typing import Any

from tests.data import tiny_tokenizers as tiny
from tests.data.tiny_tokenizers import assistant, user, word_tokenizer
from trl.data.reading.sources import load
from trl.data.report import DataReport, show
from trl.data.tokenizing.sequences import prepare_sequences

TALK = [user("hello"), assistant("good day"), user("more"), assistant("bye")]


def chatml() -> Any:
    return word_tokenizer(tiny.CHATML_TOKENS, tiny.CHATML, eos="<|im_end|>")


def test_a_good_data_set() -> None:
    _, report = prepare_sequences(
        load([{"messages": TALK}, {"messages": TALK[:2]}]), chatml(), assistant_only_loss=True
    )
    assert report.lines() == [
        "train: 2 rows read, 2 kept; columns messages: read as conversations in `messages`",
        "tokens: 38, 8 of them trained on (21.1%)",
        "row lengths before any cut: shortest 13, median 19, 95th percentile 24, longest 25 tokens; no window set",
        "end of turn: '<|im_end|>' is trained in every row",
        "row 0: <|im_start|>user\\nhello<|im_end|>\\n<|im_start|>assistant\\n⟦good day<|im_end|>⟧\\n<|im_start|>user\\n"
        "more<|im_end|>\\n<|im_start|>assistant\\n⟦bye<|im_end|>⟧\\n",
    ]


def test_a_bad_data_set() -> None:
    rows = [{"messages": TALK}] * 3 + [{"messages": TALK[:2]}, {"messages": TALK[:1]}]
    _, report = prepare_sequences(load(rows), chatml(), assistant_only_loss=True, max_length=24, name="eval")
    # 24 tokens cut the last newline off: no harm to the loss.
    assert report.lines()[3:-1] == [
        # Of an evaluation, nothing is said of what the model learns.
        "warning: 3 rows cut to 24 tokens; 3 tokens lost, 0 of them in the loss (raise `max_length` to keep them)",
        "warning: 1 row dropped: no token to train on (row 4)",
    ]
    _, report = prepare_sequences(load(rows), chatml(), assistant_only_loss=True, max_length=11)
    assert report.lines()[3:-1] == [
        "warning: no end of turn and no end of text is in the loss, so the model does not learn to stop; check the "
        "chat template, `eos_token` and `max_length`",
        "warning: 4 rows cut to 11 tokens; 44 tokens lost, 10 of them to be trained on "
        "(raise `max_length` to keep them)",
        "warning: 1 row dropped: no token to train on (row 4)",
    ]


def test_few_trained_tokens_and_some_ends_missing() -> None:
    rows = [{"prompt": "hello " * 60, "completion": "bye"}, {"prompt": "hello" + " hello" * 80, "completion": " bye"}]
    _, report = prepare_sequences(load(rows), word_tokenizer(), max_length=82)
    lines = report.lines()
    assert (
        "warning: the end of turn '</s>' is trained in only 1 of 2 rows; on the others the model does not learn to stop"
        in lines
    )
    # The token that covers the prompt's space and "bye" would be all of the completion: the two are tokenised apart.
    assert "warning: only 2.1% of the tokens are trained on; check the masks in the sample" in lines


def test_to_dict_is_plain() -> None:
    _, report = prepare_sequences(load([{"messages": TALK}]), chatml(), assistant_only_loss=True, max_length=100)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain == report.to_dict()
    assert plain["share"] == 5 / 25 and plain["max_length"] == 100 and plain["name"] == "train"


def test_an_empty_report_has_no_share() -> None:
    lengths = {"min": 0, "median": 0, "p95": 0, "max": 0}
    report = DataReport(
        name="train", sentence="", rows_read=0, rows_kept=0, tokens=0, trained_tokens=0, lengths=lengths
    )
    assert report.share == 0.0


def test_the_sample_is_shortened_in_the_middle_of_each_part() -> None:
    tokenizer = word_tokenizer()
    ids = tokenizer("hello" + " day" * 40, add_special_tokens=False)["input_ids"]
    shown = show(tokenizer, ids, [False] * 2 + [True] * 39, limit=20)
    assert shown == "hello day⟦ day day d … ay day day⟧"
