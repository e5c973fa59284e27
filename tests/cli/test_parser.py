"""Flags from dataclasses: every kind of field, from the command line and from YAML."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

import trl
from trl.cli import UsageError
from trl.cli.parser import Kind, Parser


class Colour(enum.Enum):
    RED = "red"
    NO = "no"


@dataclasses.dataclass
class Settings:
    """Settings of a test."""

    name: str = "a"
    title: str | None = None
    steps: int = -1
    rate: float = 0.1
    limit: int | None = 7
    flag: bool = False
    other: bool = True
    maybe: bool | None = None
    colour: Colour | str = "red"
    mode: Literal["slow", "fast"] = "slow"
    side: str = dataclasses.field(default="left", metadata={"help": "100% of it", "choices": ["left", "right"]})
    options: dict[str, Any] | str | None = None
    names: list[str] | None = None
    sizes: list[int] = dataclasses.field(default_factory=list)
    report: None | str | list[str] = "none"
    seen: bool | str = "no"
    function: Callable[[], None] | None = None


def parser() -> Parser:
    return Parser([Settings], prog="trl test")


def read(*argv: str) -> dict[str, Any]:
    return parser().read(argv)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--steps 3", {"steps": 3}),
        ("--steps -3", {"steps": -3}),
        ("--steps=3", {"steps": 3}),
        ("--rate 1e-3", {"rate": 1e-3}),
        ("--rate 1", {"rate": 1.0}),
        ("--limit none", {"limit": None}),
        ("--limit 9", {"limit": 9}),
        ("--name none", {"name": "none"}),
        ("--title null", {"title": None}),
        ("--flag", {"flag": True}),
        ("--flag true", {"flag": True}),
        ("--flag False", {"flag": False}),
        ("--no_other", {"other": False}),
        ("--no-other", {"other": False}),
        ("--maybe", {"maybe": True}),
        ("--maybe false", {"maybe": False}),
        ("--no_maybe", {"maybe": False}),
        ("--maybe none", {"maybe": None}),
        ("--flag --steps 2", {"flag": True, "steps": 2}),
        ("--colour red", {"colour": "red"}),
        ("--mode fast", {"mode": "fast"}),
        ("--side right", {"side": "right"}),
        ('--options {"a":{"b":1}}', {"options": {"a": {"b": 1}}}),
        ("--options file.json", {"options": "file.json"}),
        ("--names q k v", {"names": ["q", "k", "v"]}),
        ("--names q", {"names": ["q"]}),
        ("--sizes 1 2", {"sizes": [1, 2]}),
        ("--report none", {"report": "none"}),
        ("--report a b", {"report": ["a", "b"]}),
        ("--seen all", {"seen": "all"}),
        ("--seen true", {"seen": True}),
        ("", {}),
    ],
)
def test_what_is_typed(argv: str, expected: dict[str, Any]) -> None:
    found = read(*argv.split())
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {k: type(v) for k, v in expected.items()}


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--stepz 3", "there is no option --stepz; did you mean --steps?"),
        ("--stepz=3", "there is no option --stepz; did you mean --steps?"),
        ("--zzzzzz", "there is no option --zzzzzz. "),
        ("--ste 3", "there is no option --ste"),  # no abbreviations: they break when an option is added
        ("stray", "`stray` belongs to no option"),
        ("--steps 1.5", "--steps: needs a whole number, not `1.5`"),
        ("--rate fast", "--rate: needs a number, not `fast`"),
        ("--steps", "argument --steps: expected one argument"),
        ("--flag maybe", "--flag: needs true or false, not `maybe`"),
        ("--mode fats", "--mode: needs one of slow, fast, not `fats`; did you mean fast?"),
        ("--side up", "--side: needs one of left, right, not `up`."),
        ("--colour blue", "--colour: needs one of red, no, not `blue`."),
        ('--options {"a":', "--options: is not valid JSON"),
        ("--function x", "there is no option --function"),
        ("--config absent.yaml", "--config: there is no file absent.yaml."),
    ],
)
def test_what_cannot_be_meant(argv: str, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        read(*argv.split())
    assert sentence in str(error.value)


def test_yaml_gives_values_and_the_command_line_overrides_them(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(
        "rate: 1e-4\nsteps: 5\ncolour: no\nflag: yes\nlimit: null\noptions:\n  a: 1\nnames: [x, y]\nreport: none\n"
    )
    assert read("--config", str(path), "--steps", "6", "--no_flag") == {
        "rate": 1e-4,  # YAML reads it as text
        "steps": 6,
        "colour": "no",  # YAML reads it as false
        "flag": False,
        "limit": None,
        "options": {"a": 1},
        "names": ["x", "y"],
        "report": "none",
    }
    (settings,) = parser().parse(["--config", str(path)])
    assert (settings.steps, settings.flag, settings.name) == (5, True, "a")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("stepz: 3", "there is no option `stepz`; did you mean steps?"),
        ("steps: [1]", "steps: takes one value, not a list"),
        ("steps: {a: 1}", "steps: needs a whole number, not a mapping"),
        ("steps: true", "steps: needs a whole number, not true"),
        ("steps: null", "steps: needs a whole number"),
        ("- steps", "must hold `option: value` lines"),
        ("a: b: c", "is not valid YAML"),
    ],
)
def test_yaml_that_cannot_be_meant(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        read("--config", str(path))
    assert sentence in str(error.value)
    assert str(path) in str(error.value)


def test_a_field_of_two_classes_is_one_flag() -> None:
    @dataclasses.dataclass
    class More:
        """More."""

        steps: int = 0
        colour: str = "any"

    first, second = Parser([Settings, More], prog="trl test").parse(["--steps", "4"])
    assert (first.steps, second.steps) == (4, 4)


def test_every_field_of_the_training_commands_has_a_flag() -> None:
    classes = [trl.ScriptArguments, trl.ModelConfig, trl.SFTConfig]
    known = Parser(classes, prog="trl sft").kinds
    fields = {field.name for cls in classes for field in dataclasses.fields(cls) if field.init}
    # A plan of parallel groups is an object, made in Python.
    assert fields - known.keys() == {"parallelism_config"}


def test_help_shows_meaning_default_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        read("--help")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--side left|right 100% of it [left]" in text
    assert "Settings of a test:" in text
    assert "--no_flag" not in text


def test_a_nested_union_is_flattened() -> None:
    kind = Kind(Literal["a"] | (int | None))
    assert kind.convert("a") == "a"
    assert kind.convert("3") == 3
    assert kind.convert("none") is None
