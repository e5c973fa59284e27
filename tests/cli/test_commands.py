"""`trl` without training: help, version, env, and mistakes that end before a model is loaded."""

from __future__ import annotations

import resource
from importlib.metadata import version

import pytest

from trl.cli.main import main

from .conftest import Command


def test_help_answers_at_once(trl_command: Command) -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        answer = trl_command("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert answer.returncode == 0
        for command in ("sft", "demo", "env"):
            assert f"\n  {command} " in answer.stdout
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Time of the processor, since other tests may have the cores.
    assert min(seconds() for _ in range(3)) < 0.3


def test_version(trl_command: Command) -> None:
    assert trl_command("--version").stdout == f"trl {version('trl')}\n"


def test_help_on_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for argv in (["help", "env"], ["env", "-h"], ["env", "--help"]):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 0
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("usage: trl env") and texts == texts[:1] * 3


def test_env_names_versions_and_devices(trl_command: Command) -> None:
    answer = trl_command("env", TRL_TEST="1")
    assert answer.returncode == 0
    lines = dict(line.removeprefix("- ").split(": ", 1) for line in answer.stdout.splitlines())
    assert lines["trl"].startswith(version("trl"))
    for package in ("torch", "transformers", "accelerate", "datasets", "huggingface_hub", "tokenizers", "peft"):
        assert lines[package] == version(package)
    assert "liger-kernel" in lines
    assert "TRL_TEST=1" in lines["Settings"]
    assert lines["Devices"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--hlep"], "trl: there is no option --hlep"),
        (["stf"], "trl: there is no command stf; did you mean sft?"),
        ([], "usage: trl"),
        (["sft", "--max_stepz", "3"], "trl sft: there is no option --max_stepz; did you mean --max_steps?"),
        (["sft", "--dataset_name", "rows.jsonl"], "trl sft: --model_name_or_path is missing"),
        (["sft", "--model_name_or_path", "x"], "trl sft: --dataset_name is missing"),
        (["sft", "--loss_type", "nl"], "--loss_type: needs one of"),
    ],
)
def test_mistakes_in_what_is_typed(trl_here: Command, arguments: list[str], sentence: str) -> None:
    answer = trl_here(*arguments)
    assert answer.returncode == 2
    assert sentence in answer.stderr
    assert answer.stdout == ""


def test_a_mistake_ends_the_process_without_a_traceback(trl_command: Command) -> None:
    answer = trl_command("sftt")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("trl: there is no command sftt; did you mean sft?")
    assert "Traceback" not in answer.stderr


def test_a_file_that_is_not_there(trl_here: Command, tiny_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["sft", "--model_name_or_path", tiny_path, "--dataset_name", "rowz.jsonl"]
    answer = trl_here(*arguments)
    assert answer.returncode == 1
    assert "rowz.jsonl" in answer.stderr
    assert "Traceback" not in answer.stderr
    monkeypatch.setenv("TRL_DEBUG", "1")
    with pytest.raises(Exception, match="rowz.jsonl"):  # which Python prints as a traceback
        trl_here(*arguments)
