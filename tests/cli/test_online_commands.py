"""The commands that learn from rewards, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trl.cli.main import main

from .conftest import Command

JUDGE = '''
def odd(completion_ids, offset, log_metric=None, **kwargs):
    """Odd tokens are good."""
    log_metric("seen", len(completion_ids))
    return [more + sum(token % 2 for token in ids) / len(ids) for ids, more in zip(completion_ids, offset)]
'''
FEW = (
    *("--max_steps", 2, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--logging_steps", 1),
    *("--num_generations", 4, "--max_completion_length", 6, "--learning_rate", "1e-2", "--report_to", "none"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "judge.py").write_text(JUDGE)
    rows = [{"prompt": [{"role": "user", "content": f"Say {number}."}], "offset": number} for number in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def logged(folder: Path, step: int = 2) -> list[dict[str, float]]:
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("command", ["grpo", "rloo"])
def test_a_command_trains_on_rewards(trl_here: Command, tiny_path: str, folder: Path, command: str) -> None:
    answer = trl_here(
        *(command, "--model_name_or_path", tiny_path, "--dataset_name", "rows.jsonl", "--output_dir", "out"),
        *("--dataset_train_split", "train[2:]", "--dataset_test_split", "train[:2]", "--eval_strategy", "steps"),
        *(
            "--eval_steps",
            2,
            "--num_generations_eval",
            2,
            "--reward_funcs",
            "judge.py:odd",
            "get_length_reward(target=3)",
        ),
        *("--reward_weights", 1, 0.1, "--beta", 0.05, "--log_completions", *FEW),
    )
    assert answer.returncode == 0, answer.stderr
    assert "rounds: 1 prompts × 4 completions each" in answer.stdout
    assert "sampling: temperature 1, at most 6 tokens" in answer.stdout
    lines = [line for line in logged(folder / "out") if "loss" in line]
    assert {"reward", "rewards/odd/mean", "completions/mean_length", "seen", "kl"} <= lines[0].keys()
    assert all(line["grad_norm"] > 0 for line in lines)
    [judged] = [line for line in logged(folder / "out") if "eval_reward" in line]
    assert judged["eval_reward_ci95"] >= 0
    names = {path.name for path in (folder / "out" / "completions").iterdir()}
    assert {"completions_00000.jsonl", "completions_00001.jsonl", "eval_completions_00002.jsonl"} <= names
    # The closing line can be typed: it says who judges.
    assert "--reward_funcs judge.py:odd 'get_length_reward(target=3)' --output_dir ..." in answer.stdout


def test_rounds_are_refilled_from_a_file_of_settings(trl_here: Command, tiny_path: str, folder: Path) -> None:
    settings = {
        **{"model_name_or_path": tiny_path, "dataset_name": "rows.jsonl", "output_dir": "out"},
        **{"reward_funcs": ["judge.py:odd"], "dynamic_sampling": True, "replay_buffer_size": 2, "use_peft": True},
    }
    (folder / "grpo.yaml").write_text(json.dumps(settings))
    answer = trl_here("grpo", "--config", "grpo.yaml", *FEW)
    assert answer.returncode == 0, answer.stderr
    assert "others instead, 10 times" in answer.stdout and "of the last 2 that taught" in answer.stdout
    assert "groups/drawn" in [line for line in logged(folder / "out") if "loss" in line][0]
    assert "The trained adapter is in out" in answer.stdout


def test_mistakes_are_told_before_anything_is_loaded(
    folder: Path, empty_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "grpo",
        "--model_name_or_path",
        empty_path,
        "--dataset_name",
        str(folder / "rows.jsonl"),
        "--output_dir",
        "o",
    ]
    for more, sentence in (
        ([], "--reward_funcs is missing"),
        (["--reward_funcs", "think_format_rewrd"], "did you mean 'think_format_reward'?"),
        (["--reward_funcs", f"{folder / 'judge.py'}:even"], "has no function 'even'"),
        (["--reward_funcs", "think_format_reward", "--max_refills", "0", "--dynamic_sampling"], "max_refills=0"),
    ):
        assert main([*given, *more]) != 0
        assert sentence in "".join(capsys.readouterr())


PAIRS = (
    *("--max_steps", 2, "--per_device_train_batch_size", 2, "--logging_steps", 1, "--max_new_tokens", 6),
    *("--learning_rate", "1e-2", "--report_to", "none", "--output_dir", "out"),
)


@pytest.mark.parametrize(
    ("command", "given", "metric"),
    [
        ("online-dpo", ("--reward_funcs", "judge.py:odd", "--beta", 0.2, 0.1), "objective/scores_margin"),
        ("xpo", ("--judge", "judge.py:longer", "--alpha", "1e-3", "--use_peft"), "loss/xpo"),
        ("nash-md", ("--reward_funcs", "judge.py:odd", "--mixture_coef", 0.25), "rewards/probabilities"),
    ],
)
def test_a_command_compares_two_completions(
    trl_here: Command, tiny_path: str, folder: Path, command: str, given: tuple, metric: str
) -> None:
    with (folder / "judge.py").open("a") as file:
        file.write("\n\ndef longer(prompts, pairs):\n    return [int(len(b) > len(a)) for a, b in pairs]\n")
    answer = trl_here(command, "--model_name_or_path", tiny_path, "--dataset_name", "rows.jsonl", *given, *PAIRS)
    assert answer.returncode == 0, answer.stderr
    assert "rounds: 2 prompts × 2 completions each" in answer.stdout
    assert "`max_new_tokens` is `max_completion_length` today" in answer.stdout
    lines = [line for line in logged(folder / "out") if "loss" in line]
    assert metric in lines[0] and all(line["grad_norm"] > 0 for line in lines)
    assert f"trl {command} --model_name_or_path out" in answer.stdout


def test_who_decides_must_be_said(folder: Path, empty_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["xpo", "--model_name_or_path", empty_path, "--dataset_name", str(folder / "rows.jsonl")]
    assert main(given) != 0
    assert "--reward_funcs is missing" in "".join(capsys.readouterr())
