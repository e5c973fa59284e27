"""`trl eval`, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Command


def test_eval_prints_writes_and_answers_programs(trl_here: Command, tmp_path: Path, tiny_path: str) -> None:
    rows = [{"prompt": f"Say {word}.", "answer": word} for word in ("one", "two", "three")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["eval", "--model_name_or_path", tiny_path, "--dataset_name", "test.jsonl", "--max_new_tokens", "4"]
    line += ["--metrics", "exact_match", "perplexity", "--limit", "2"]
    answer = trl_here(*line, "--output", "out.jsonl")
    assert answer.returncode == 0, answer.stderr
    assert "exact_match  0  95% interval 0 to 0.6576 (Wilson, 2 prompts)" in answer.stdout
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    found = [json.loads(trl_here(*line, "--json").stdout) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0]["estimates"]["perplexity"]["method"] == "bootstrap"
    assert found[0]["settings"]["rows"] == 2


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "--dataset_name is missing"),
        (["--dataset_name", "a.jsonl"], "--metrics is missing"),
        (["--dataset_name", "a.jsonl", "--metrics", "accuracy"], "--metrics: needs one of exact_match, pass@k"),
        (["--dataset_name", "a.jsonl", "--metrics", "exact_mach"], "not `exact_mach`; did you mean exact_match?"),
        (["--dataset_name", "a.jsonl", "--metrics", "reward"], "the metric reward needs reward_funcs"),
        (["--dataset_name", "a.jsonl", "--metrics", "pass@k", "--pass_at", "3"], "pass@3 needs at least 3 completions"),
        (["--dataset_name", "a.jsonl", "--metrics", "perplexity", "--top_p", "2"], "above 0, at most 1, not `2`"),
        (["--dataset_name", "a.jsonl", "--metrics", "perplexity", "--confidence", "1"], "above 0, below 1, not `1`"),
        (["--dataset_name", "a.jsonl", "--metrics", "perplexity", "--pattern", "("], "is not a regular expression"),
        (["--dataset_name", "a.jsonl", "--metrics", "perplexity", "--dtype", "half"], "--dtype: needs one of auto"),
        (["--tasks", "arc_easy", "--output", "x.jsonl"], "--output holds the completions of --dataset_name"),
        (["--dataset_nam", "a.jsonl"], "no option --dataset_nam; did you mean --dataset_name?"),
        (
            ["--dataset_name", "a.jsonl", "--metrics", "reward", "--limit", "0"],
            "needs a whole number, 1 or more, not `0`",
        ),
    ],
)
def test_mistakes(trl_here: Command, argv: list[str], sentence: str) -> None:
    answer = trl_here("eval", "--model_name_or_path", "m", *argv)
    assert answer.returncode == 2 and sentence in answer.stderr
