"""`trl data` and `trl data convert`, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Command


def test_data_shows_rows_and_answers_programs(trl_here: Command, rows_file: Path, small_path: str) -> None:
    line = ["data", rows_file, "--model_name_or_path", small_path, "--max_length", "60", "--assistant_only_loss"]
    answer = trl_here(*line, "--rows", "1")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("guessed from the columns: rows for sft\ntrain: 8 rows read, 8 kept")
    assert "longest rows: " in answer.stdout and "rows cut: 8 in all: row " in answer.stdout
    assert "row 0: " in answer.stdout and "row 1: " not in answer.stdout
    found = json.loads(trl_here(*line, "--rows", "2", "--json").stdout)
    assert (found["method"], found["rows_cut"], len(found["rows"])) == ("sft", 8, 2)
    assert found["report"]["max_length"] == 60


def test_data_convert_writes_a_file_once(trl_here: Command, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"instruction": "Name a colour.", "output": "Blue."}]')
    line = ["data", "convert", "a.json", "b.jsonl", "--to", "messages"]
    answer = trl_here(*line, "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["rows_written"] == 1
    (row,) = map(json.loads, (tmp_path / "b.jsonl").read_text().splitlines())
    assert row["messages"][1] == {"role": "assistant", "content": "Blue."}
    again = trl_here(*line)
    assert again.returncode == 2 and "b.jsonl exists" in again.stderr


@pytest.mark.parametrize(
    ("argv", "status", "sentence"),
    [
        (["rows.jsonl"], 2, "--model_name_or_path"),
        (["rows.jsonl", "--model_name_or_path", "m", "--method", "dpoo"], 2, "no method dpoo; did you mean dpo?"),
        (["rows.jsonl", "--model_name_or_path", "m", "--rows", "-1"], 2, "--rows: needs a whole number, 0 or more"),
        (["rows.jsonl", "--model-name-or-path", "m", "--max-length", "0"], 2, "--max_length: needs a whole number, 1"),
        (["rows.jsonl", "--metrics", "m"], 2, "there is no option --metrics."),
        (["rows.jsonl", "--rowz", "3"], 2, "did you mean --rows?"),
        (["json", "--model_name_or_path", "./m"], 1, "no model folder at ./m"),
        (["rows.jsonl", "--model_name_or_path", "./m"], 1, "There is no file or folder 'rows.jsonl'"),
        (["convert", "a.json", "b.jsonl", "--to", "mesages"], 2, "not `mesages`; did you mean messages?"),
        (["convert", "a.json", "no/b.jsonl", "--to", "messages"], 2, "the folder no does not exist: make it first"),
        (["convert", "a.json", "b.csv", "--to", "messages"], 2, "does not end in .jsonl"),
        (["convert", "a.json", "b.jsonl", "--to", "chats"], 2, "--to"),
        (["convert", "a.json", "b.jsonl", "--to", "messages"], 1, "a.json"),
    ],
)
def test_mistakes(trl_here: Command, argv: list[str], status: int, sentence: str) -> None:
    answer = trl_here("data", *argv)
    assert answer.returncode == status and sentence in answer.stderr, answer.stderr
