"""Mixes: every data set is read by its own shape, and the report says what each gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data import tiny_tokenizers as tiny
from tests.data.tiny_tokenizers import assistant, user, word_tokenizer
from trl.data.mixture import DatasetConfig, DatasetMixtureConfig, load_mixture
from trl.data.reading.errors import DataError
from trl.data.reading.sources import load
from trl.data.tokenizing.sequences import Sequences, prepare_sequences

TALKS = [{"messages": [user("hello"), assistant(word)], "id": word} for word in ("good", "day", "more", "bye")]
PAIRS = [{"question": "what is x", "answer": "x is 7"}, {"question": "what", "answer": " sky"}]
TURNS = [{"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "bye"}]}]


def chatml() -> Any:
    return word_tokenizer(tiny.CHATML_TOKENS, tiny.CHATML, eos="<|im_end|>")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    written = {}
    for name, rows in (("talks", TALKS), ("pairs", PAIRS), ("turns", TURNS)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        written[name] = str(path)
    return written


def test_each_is_read_by_its_own_shape(files: dict[str, str]) -> None:
    mixture = load_mixture([{"path": files["talks"]}, {"path": files["pairs"]}, files["turns"]])["train"]
    assert len(mixture) == 7
    prepared, report = mixture.prepare(Sequences(assistant_only_loss=True), chatml())
    alone = [prepare_sequences(load(rows), chatml(), assistant_only_loss=True)[0] for rows in (TALKS, PAIRS, TURNS)]
    assert prepared["input_ids"][:] == [ids for part in alone for ids in part["input_ids"]]
    assert prepared["loss_mask"][:] == [mask for part in alone for mask in part["loss_mask"]]
    assert prepared["row"][:] == list(range(7))
    assert (report.rows_read, report.rows_kept, report.sentence) == (7, 7, "a mix of 3 data sets")
    assert [part.rows_kept for part in report.parts] == [4, 2, 1]
    assert sum(part.tokens for part in report.parts) == report.tokens
    assert report.lines()[:2] == [
        "train: 7 rows read, 7 kept; a mix of 3 data sets",
        f"  {files['talks']}: 4 rows read, 4 kept, 48 tokens, 8 trained; columns messages, id: read as conversations "
        "in `messages` (id ignored)",
    ]
    assert json.loads(json.dumps(report.to_dict()))["parts"][1]["name"] == files["pairs"]


def test_columns_and_fractions(files: dict[str, str]) -> None:
    config = [
        {"path": files["talks"], "columns": ["messages"], "fraction": 0.5},
        {"path": files["pairs"], "columns": {"prompt": "question", "completion": "answer"}},
    ]
    mixture = load_mixture(config, seed=1)["train"]
    assert [len(part.rows) for part in mixture.parts] == [2, 2]
    assert mixture.parts[0].rows.column_names == ["messages"]
    prepared, report = mixture.prepare(Sequences(), chatml())
    assert report.parts[1].sentence.startswith("columns question, answer: read as prompts in `question` and compl")
    assert chatml().decode(prepared[3]["input_ids"]) == "what sky<|im_end|>"
    # The seed decides which rows are taken, in their order.
    drawn = {tuple(part.rows["messages"][i][1]["content"] for i in range(2))
             for seed in range(20) for part in load_mixture(config, seed)["train"].parts[:1]}  # fmt: skip
    order = [row["messages"][1]["content"] for row in TALKS]
    assert len(drawn) > 2 and all(order.index(one) < order.index(two) for one, two in drawn)


def test_the_same_data_set_twice_has_two_names(files: dict[str, str]) -> None:
    parts = load_mixture([files["pairs"], files["pairs"]])["train"].parts
    assert [part.label for part in parts] == [f"{files['pairs']} (1)", f"{files['pairs']} (2)"]


def test_split_and_files(files: dict[str, str]) -> None:
    few = Path(files["talks"]).with_name("few.jsonl")
    few.write_text(json.dumps(TALKS[0]))
    entry = {"path": "json", "data_files": {"train": files["talks"], "test": str(few)}, "split": "test"}
    assert len(load_mixture([entry])["train"]) == 1
    assert len(load_mixture([{**entry, "split": "train[:3]"}])["train"]) == 3


@pytest.mark.parametrize("size", [0.5, 3])
def test_rows_set_aside(files: dict[str, str], size: float) -> None:
    config = DatasetMixtureConfig([files["talks"], files["pairs"]], test_split_size=size)
    sides = load_mixture(config, seed=2)
    assert [[len(part.rows) for part in sides[side].parts] for side in ("train", "test")] == [[2, 1], [2, 1]]
    both = [row["id"] for side in sides.values() for row in side.parts[0].rows]
    assert sorted(both) == ["bye", "day", "good", "more"]


def test_streams(files: dict[str, str]) -> None:
    config = DatasetMixtureConfig([{"path": files["talks"]}, {"path": files["turns"]}], streaming=True)
    mixture = load_mixture(config)["train"]
    assert mixture.streaming
    stream, report = mixture.prepare(Sequences(assistant_only_loss=True), chatml())
    lists, _ = load_mixture(config.datasets)["train"].prepare(Sequences(assistant_only_loss=True), chatml())
    assert [row["input_ids"] for row in stream] == lists["input_ids"][:]
    assert lists["row"][:] == [0, 1, 2, 3, 4]
    assert [row["row"] for row in stream] == [0, 1, 2, 3, 10**12]  # by part, whose length a stream does not tell
    assert (report.rows_read, report.looked_at) == (5, 5)
    half = DatasetMixtureConfig([{"path": files["talks"], "fraction": 0.5}], streaming=True)
    rows = [row["id"] for row in load_mixture(half, seed=1)["train"].parts[0].rows]
    assert rows == [row["id"] for row in load_mixture(half, seed=1)["train"].parts[0].rows]
    assert 0 < len(rows) < 4


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ([], "The mix has no data sets: list at least one under `datasets`, with its `path`."),
        ([{"name": "x"}], r"datasets\[0\] has no `path`: a file, a folder or a name."),
        (
            [{"path": "x", "splits": "train"}],
            r"datasets\[0\] has a field 'splits'; known are .*\. Did you mean 'split'",
        ),
        ([7], r"datasets\[0\] is a int: give a dict with a `path`."),
        ([{"path": "x", "fraction": 2}], "x: fraction=2 is not a share of the rows: above 0, at most 1."),
        ([{"path": "PAIRS", "fraction": 0.1}], "fraction=0.1 of 2 rows is none. Raise it, or leave the data set out."),
        ([{"path": "PAIRS", "columns": ["questoin"]}], "columns names 'questoin', but there are 'question', 'answer'."),
        ([{"path": "PAIRS", "columns": {"prompt": "questoin"}}], "pairs.jsonl: columns=.* names `questoin`"),
        ([{"path": "nowhere.jsonl"}], "There is no file or folder 'nowhere.jsonl'"),
    ],
)
def test_sentences(files: dict[str, str], config: list[Any], sentence: str) -> None:
    for entry in config:
        if isinstance(entry, dict) and entry.get("path") == "PAIRS":
            entry["path"] = files["pairs"]
    with pytest.raises(DataError, match=sentence):
        load_mixture(config)["train"].prepare(Sequences(), chatml())


def test_sentences_of_splits(files: dict[str, str]) -> None:
    with pytest.raises(DataError, match="test_split_size cannot be taken of streams"):
        load_mixture(DatasetMixtureConfig([files["pairs"]], streaming=True, test_split_size=0.5))
    with pytest.raises(DataError, match="test_split_size=2 of 2 rows leaves none on one side"):
        load_mixture(DatasetMixtureConfig([files["pairs"]], test_split_size=2))
    with pytest.raises(DataError, match="test_split_size=0.1 of 2 rows leaves none for test."):
        load_mixture(DatasetMixtureConfig([DatasetConfig(files["pairs"])], test_split_size=0.1))


def test_a_broken_row_is_named_with_its_data_set(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "hello"}\n{"text": null}\n')
    with pytest.raises(DataError, match=r"bad.jsonl: row 1: `text` is None."):
        load_mixture([files["talks"], str(tmp_path / "bad.jsonl")])["train"].prepare(Sequences(), chatml())
