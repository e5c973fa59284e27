"""`trl generate`: a file of prompts to a file of completions."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl.cli import generate
from trl.models.load import load_causal_lm

from .conftest import Command

TOKENS = 6


@pytest.fixture
def asked(tiny_path: str) -> list[Any]:
    return ["generate", "--model_name_or_path", tiny_path, "--max_new_tokens", TOKENS]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_conversations(trl_here: Command, asked: list[Any], tiny_path: str, rows_file: Path, tmp_path: Path) -> None:
    """Greedy completions are `generate`'s; the rows keep their other columns, an answer in the data among them."""
    answer = trl_here(*asked, "--dataset_name", rows_file, "--temperature", 0, "--batch_size", 3, "--json")
    facts = json.loads(answer.stdout)
    rows = rows_of(tmp_path / "completions.jsonl")
    assert (facts["path"], facts["prompts"], facts["completions"]) == ("completions.jsonl", 8, 8)
    assert facts["tokens"] == sum(row["tokens"] for row in rows) and facts["resumed"] == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_path), AutoTokenizer.from_pretrained(tiny_path)
    for number, row in enumerate(rows):
        assert row["prompt"] == [{"role": "user", "content": f"What comes after {number}?"}]
        assert row["messages"][1]["content"] == f"After {number} comes {number + 1}."
        inputs = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert row["completion"] == [{"role": "assistant", "content": text}]
        assert (row["row"], row["sample"], row["tokens"]) == (number, 0, len(ids))
        assert row["finish"] == ("stop" if len(ids) < TOKENS else "length")


def test_texts(trl_here: Command, asked: list[Any], tiny_path: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("The sea\nOne, two,\n")
    asked += ["--dataset_name", "prompts.txt", "--temperature", 0]
    plain = trl_here(*asked, "--output_file", "plain.json")
    assert "are continued as they are; --as_chat asks them" in plain.stdout
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_path), AutoTokenizer.from_pretrained(tiny_path)
    inputs = tokenizer("The sea", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    first = json.loads((tmp_path / "plain.json").read_text())[0]
    assert first["prompt"] == "The sea" and first["completion"] == tokenizer.decode(ids)
    assert "text" not in first  # it is the prompt
    assert trl_here(*asked, "--system_prompt", "Be kind.", "--overwrite").returncode == 1
    trl_here(*asked, "--as_chat", "--system_prompt", "Be kind.", "--output_file", "chat.jsonl")
    assert rows_of(tmp_path / "chat.jsonl")[1]["prompt"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "One, two,"},
    ]


def test_several_of_each_prompt_and_one_seed(
    trl_here: Command, asked: list[Any], rows_file: Path, tmp_path: Path
) -> None:
    asked += ["--dataset_name", rows_file, "--num_generations", 3]
    for name, more in {"a": [], "b": ["--batch_size", 1], "c": ["--seed", 1]}.items():
        assert trl_here(*asked, "--output_file", f"{name}.jsonl", *more).returncode == 0
    one, again, other = (rows_of(tmp_path / f"{name}.jsonl") for name in "abc")
    assert [(row["row"], row["sample"]) for row in one] == [(row, sample) for row in range(8) for sample in range(3)]
    assert one == again != other
    assert len({row["completion"][0]["content"] for row in one}) > 20


def test_an_interrupted_run_goes_on(
    trl_here: Command, asked: list[Any], rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked += ["--dataset_name", rows_file, "--num_generations", 2, "--batch_size", 2]
    trl_here(*asked, "--output_file", "whole.jsonl")

    def stop(done: int, of: int, speed: float) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(generate, "_progress", stop)
        stopped = trl_here(*asked)
    assert stopped.returncode == 130
    assert "4 of 8 prompts are in completions.part.jsonl; the same command goes on from there" in stopped.stderr
    part = tmp_path / "completions.part.jsonl"
    assert len(rows_of(part)) == 8 and not (tmp_path / "completions.jsonl").exists()
    # Killed in the middle of a line: the prompt that it belongs to is sampled again.
    with part.open("a") as file:
        file.write(rows_of(part)[0]["completion"][0]["content"])
    other = trl_here(*asked, "--temperature", 0.5)
    assert other.returncode == 1 and "another run (temperature is 1.0 there and 0.5 here)" in other.stderr
    resumed = trl_here(*asked)
    assert "4 prompts were taken over from an earlier run" in resumed.stdout
    assert (tmp_path / "completions.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"completions.jsonl", "whole.jsonl", "rows.jsonl"}
    assert "exists already" in trl_here(*asked).stderr
    assert trl_here(*asked, "--overwrite").returncode == 0


def test_tables_and_columns(trl_here: Command, asked: list[Any], tmp_path: Path) -> None:
    rows = [{"task": f"Say {number}", "completion": "gold", "row": number * 10} for number in range(2)]
    asked += ["--dataset_name", write(tmp_path / "tasks.jsonl", rows), "--prompt_column", "task"]
    for ending in ("csv", "parquet"):
        assert trl_here(*asked, "--output_file", f"out.{ending}").returncode == 0
    with (tmp_path / "out.csv").open() as file:
        table = list(csv.DictReader(file))
    again = Dataset.from_parquet(str(tmp_path / "out.parquet"), cache_dir=str(tmp_path / "cache")).to_list()
    for number, (row, same) in enumerate(zip(table, again, strict=True)):
        assert row["prompt"] == same["prompt"] == f"Say {number}" and row["completion"] == same["completion"]
        assert same["given_completion"] == "gold" and same["row"] == number
    wrong = trl_here(*asked, "--output_file", "out.txt")
    assert wrong.returncode == 2 and "must end in one of .jsonl, .json, .csv, .parquet" in wrong.stderr


def test_adapters_and_stops(
    trl_here: Command, asked: list[Any], tiny_path: str, rows_file: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = load_causal_lm(tiny_path)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    asked += ["--dataset_name", rows_file, "--temperature", 0]
    trl_here(*asked, "--output_file", "base.jsonl")
    trl_here(*asked, "--adapter_name_or_path", tmp_path / "adapter", "--output_file", "one.jsonl")
    asked[2] = tmp_path / "adapter"
    trl_here(*asked, "--output_file", "two.jsonl")
    base, one, two = (rows_of(tmp_path / f"{name}.jsonl") for name in ("base", "one", "two"))
    assert one == two != base
    # The first token of the first answer, as one to stop at.
    tokenizer, adapted = AutoTokenizer.from_pretrained(tiny_path), load_causal_lm(tmp_path / "adapter").eval()
    inputs = tokenizer.apply_chat_template(
        one[0]["prompt"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    stop = adapted(**inputs).logits[0, -1].argmax().item()
    trl_here(*asked, "--eos_token_ids", stop, "--output_file", "short.jsonl")
    short = rows_of(tmp_path / "short.jsonl")[0]
    assert (short["tokens"], short["finish"]) == (1, "stop")
    long = write(tmp_path / "long.jsonl", [{"prompt": "word " * 3000}])
    asked[asked.index(rows_file)] = long
    assert "the model's window 2,048: max_prompt_length" in trl_here(*asked, "--output_file", "x.jsonl").stderr
    cut = trl_here(*asked, "--max_prompt_length", 2045, "--output_file", "x.jsonl", "--overwrite")
    assert cut.returncode == 0 and rows_of(tmp_path / "x.jsonl")[0]["tokens"] == 3


def test_a_column_that_would_be_left_out(trl_here: Command, asked: list[Any], tmp_path: Path) -> None:
    """Alpaca's `input` belongs to the prompt."""
    rows = [{"instruction": "Translate.", "input": "cat", "output": "chat"}]
    asked += ["--dataset_name", write(tmp_path / "alpaca.jsonl", rows)]
    answer = trl_here(*asked)
    assert answer.returncode == 1 and "has a column `input` beside `instruction`" in answer.stderr
    assert "trl data convert FILE prompts.jsonl --to prompt" in answer.stderr
    assert trl_here("data", "convert", "alpaca.jsonl", "prompts.jsonl", "--to", "prompt").returncode == 0
    asked[-1] = "prompts.jsonl"
    assert trl_here(*asked).returncode == 0
    [row] = rows_of(tmp_path / "completions.jsonl")
    assert "Translate." in str(row["prompt"]) and "cat" in str(row["prompt"])
    asked[-1] = "alpaca.jsonl"
    answer = trl_here(*asked, "--prompt_column", "instruction", "--output_file", "plain.jsonl")
    assert answer.returncode == 0 and rows_of(tmp_path / "plain.jsonl")[0]["prompt"] == "Translate."


def test_missing_options(trl_here: Command) -> None:
    assert "--dataset_name is missing" in trl_here("generate", "--model_name_or_path", "x").stderr
    assert trl_here("generate", "--dataset_name", "x").returncode == 2
