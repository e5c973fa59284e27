"""`trl config`: what it writes is read by the command, and what is wrong in a file is said."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from trl.cli import config, train
from trl.methods import METHODS

from .conftest import Command

COMMANDS = [name for name, row in METHODS.items() if row.command]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_written_is_read(command: str, tmp_path: Path) -> None:
    parser = train.training_parser(command)
    path = tmp_path / "all.yaml"
    text = "\n".join(config.lines(command, parser.flags))
    path.write_text(text)
    assert yaml.safe_load(text) is None and parser.read(["--config", str(path)]) == {}  # as written: nothing is set
    # With every line set, the options are those of the defaults.
    path.write_text(re.sub(r"^# (?=\w+: )", "", text, flags=re.MULTILINE))
    values = parser.read(["--config", str(path)])
    assert values.keys() == parser.flags.fields.keys()
    classes = train.classes(command)
    for cls, live, plain in zip(classes, parser.instances(values, classes), parser.instances({}, classes), strict=True):
        for field in dataclasses.fields(cls):
            if field.name not in ("logging_dir", "run_name"):
                assert getattr(live, field.name) == getattr(plain, field.name), field.name


def test_a_file_is_written_once_and_checked(trl_here: Command, tmp_path: Path) -> None:
    assert trl_here("config", "sft", "--output", "sft.yaml").returncode == 0
    again = trl_here("config", "sft", "--output", "sft.yaml")
    assert again.returncode == 2 and "sft.yaml exists" in again.stderr
    path = tmp_path / "sft.yaml"
    text = path.read_text()
    assert "## Maximum sequence length in tokens; longer rows are cut." in text
    assert "\n# learning_rate: 2.0e-05\n" in text
    path.write_text(text.replace("# learning_rate: 2.0e-05", "learning_rate: 1e-4") + "eval_packing: true\n")
    answer = trl_here("config", "sft", "sft.yaml")
    assert answer.returncode == 0, answer.stdout
    assert "sft.yaml: 2 options of `trl sft`, all of them possible" in answer.stdout
    found = json.loads(trl_here("config", "sft", "sft.yaml", "--json").stdout)
    assert found["options"] == ["eval_packing", "learning_rate"] and found["problems"] == []


@pytest.mark.parametrize(
    ("content", "sentences"),
    [
        ("max_stepz: 3\nlearning_rate: fast\n", ["no option `max_stepz`; did you mean max_steps?", "needs a number"]),
        ("max_length: 0\n", ["x.yaml: max_length: 0 is not possible: give a whole number, 1 or more"]),
        ("seed: 1\nmax_steps: 2\nseed: 3\n", ["x.yaml: `seed` stands on line 1 and on line 3: keep one of them"]),
        ("datasets:\n- path: a\n  path: b\n", ["`path` stands on line 2 and on line 3"]),
        ("- 1\n", ["must hold `option: value` lines, not a list"]),
        ("dataset_name: a\ndatasets: [b]\n", ["--dataset_name and --datasets are both given"]),
    ],
)
def test_mistakes_in_a_file(trl_here: Command, tmp_path: Path, content: str, sentences: list[str]) -> None:
    (tmp_path / "x.yaml").write_text(content)
    answer = trl_here("config", "sft", "x.yaml")
    assert answer.returncode == 2
    assert all(sentence in answer.stdout for sentence in sentences), answer.stdout
    assert len(json.loads(trl_here("config", "sft", "x.yaml", "--json").stdout)["problems"]) == len(sentences)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_with_every_line_set_is_possible(trl_here: Command, tmp_path: Path, command: str) -> None:
    text = "\n".join(config.lines(command, train.training_parser(command).flags))
    (tmp_path / "all.yaml").write_text(re.sub(r"^# (?=\w+: )", "", text, flags=re.MULTILINE))
    answer = trl_here("config", command, "all.yaml")
    assert answer.returncode == 0 and "all of them possible" in answer.stdout, answer.stdout


def test_one_option_and_none(trl_here: Command, tmp_path: Path) -> None:
    for content, verdict in (("seed: 1\n", "1 option of `trl sft` is set, and it is possible"), ("", "no option of")):
        (tmp_path / "x.yaml").write_text(content)
        assert f"x.yaml: {verdict}" in trl_here("config", "sft", "x.yaml").stdout


def test_a_training_command_refuses_an_option_that_stands_twice(trl_here: Command, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("env:\n  A: 1\n  A: 2\nmax_steps: 2\n")
    answer = trl_here("sft", "--config", "x.yaml", "--model_name_or_path", "m", "--dataset_name", "d")
    assert answer.returncode == 2 and "x.yaml: `A` stands on line 2 and on line 3: keep one" in answer.stderr


def test_options_without_effect_are_named(trl_here: Command, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("lora_r: 8\nuse_peft: false\n")
    answer = trl_here("config", "sft", "x.yaml")
    assert answer.returncode == 0 and "lora_r=8 has no effect with use_peft=False" in answer.stdout


def test_a_method_that_does_not_exist(trl_here: Command) -> None:
    answer = trl_here("config", "sfft")
    assert answer.returncode == 2 and "there is no method sfft; did you mean sft?" in answer.stderr
