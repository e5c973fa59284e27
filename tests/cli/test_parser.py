"""Flags from dataclasses: every kind of field, from the command line and from YAML."""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

import trl
from trl.cli import UsageError, train
from trl.cli.parser import Parser, TrlParser, set_environment
from trl.cli.values import Kind


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
        ("--seen --steps 2", {"seen": True, "steps": 2}),
        ("--names [qv]_proj", {"names": ["[qv]_proj"]}),
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
        ("--mate", "there is no option --mate; did you mean --rate?"),
        ("--sizing", "there is no option --sizing. "),  # `--sizes` is no nearer than the dashes make it
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
    classes = [trl.ScriptArguments, trl.DatasetMixtureConfig, trl.ModelConfig, trl.SFTConfig]
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


def test_the_usual_options_and_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    few = Parser([Settings], prog="trl test", common={"Often": {"steps": "Steps to go.", "absent": ""}})
    texts = []
    for flag in ("--help", "--help-all", "--help_all"):
        with pytest.raises(SystemExit) as end:
            few.read(["--steps", "3", flag])
        assert end.value.code == 0
        texts.append(capsys.readouterr().out)
    short, everything, again = texts
    assert everything == again
    assert "Often:\n  --steps INTEGER" in short and "Steps to go." in short
    assert "--rate" not in short and "--help-all" in short
    assert everything.count("--steps INTEGER") == 1 and "--rate NUMBER" in everything


def sft_parser(config: str = "SFT", **options: Any) -> Parser:
    classes = [trl.ScriptArguments, trl.DatasetMixtureConfig, trl.ModelConfig, getattr(trl, f"{config}Config")]
    return Parser(classes, prog="trl sft", **options)


@pytest.mark.parametrize("command", [name for name, row in train.METHODS.items() if row.command])
def test_help_of_a_training_command_fits_two_screens(command: str) -> None:
    config = train.METHODS[command].name
    parser = sft_parser(config, common=train.COMMON, notes=train.NOTES)
    named = [name for options in train.COMMON.values() for name in options if name in parser.kinds]
    assert 20 <= len(named) <= 36
    short, everything = parser.help(everything=False), parser.help(everything=True)
    assert len(short.splitlines()) <= 76
    for name in named:
        assert f"  --{name} " in short
    for name in parser.kinds:
        assert everything.count(f"\n  --{name} ") == 1, name
    for title, options in train.COMMON.items():
        assert (f"\n{title}:\n" in short) is not parser.kinds.keys().isdisjoint(options)
    own = set(vars(getattr(trl, f"{config}Config")).get("__annotations__", ())) - set(named)
    titles = [f"({config}Config):"] if own else []  # else all of its own fields are among those named
    for title in (*titles, "(BaseConfig):", "(ModelConfig):", "transformers.TrainingArguments:"):
        assert title in everything and title not in short
    for word in parser.older:
        assert f"--{word} " not in everything


@pytest.mark.parametrize(
    ("argv", "field", "expected"),
    [
        ("--max_seq_length 64", "max_length", 64),
        ("--max-seq-length=64", "max_length", 64),
        ("--warmup_ratio 0.03", "warmup_steps", 0.03),
        ("--warmup_ratio 3e-2", "warmup_steps", 0.03),
        ("--evaluation_strategy epoch", "eval_strategy", "epoch"),
        ("--no_cuda", "use_cpu", True),
        ("--no_cuda false", "use_cpu", False),
        ("--adafactor", "optim", "adafactor"),
        ("--adafactor false --optim sgd", "optim", "sgd"),
        ("--no_adafactor --optim sgd", "optim", "sgd"),
        ("--overwrite_output_dir", "output_dir", "trainer_output"),
        ("--packing_strategy ffd", "packing_strategy", "bfd"),
        ("--use_liger --use_cpu", "use_liger_kernel", True),
    ],
)
def test_older_words(argv: str, field: str, expected: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from trl.notices import _printed

    _printed.clear()
    config = sft_parser().parse(argv.split())[-1]
    assert getattr(config, field) == expected
    asks_for_nothing = argv.startswith(("--adafactor false", "--no_adafactor"))
    assert capsys.readouterr().out.count("trl: ") == (0 if asks_for_nothing else 1)


def test_an_older_word_of_the_model() -> None:
    assert sft_parser().parse(["--torch_dtype", "bfloat16"])[-2].dtype == "bfloat16"


def test_older_words_in_yaml_and_what_is_typed(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("max_seq_length: 64\nwarmup_ratio: 1e-1\nevaluation_strategy: no\ntorch_dtype: float16\n")
    *_, model, config = sft_parser().parse(["--config", str(path)])
    assert (config.max_length, config.warmup_steps, model.dtype) == (64, 0.1, "float16")
    *_, model, config = sft_parser().parse(["--config", str(path), "--max_length", "32", "--warmup_steps", "5"])
    assert (config.max_length, config.warmup_steps) == (32, 5)
    path.write_text("max_length: 64\nwarmup_steps: 7\n")
    *_, config = sft_parser().parse(["--config", str(path), "--max_seq_length", "32", "--warmup_ratio", "0.5"])
    assert (config.max_length, config.warmup_steps) == (32, 0.5)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--max_seq_length x", "--max_seq_length: needs a whole number, not `x`"),
        ("--torch_dtype bfloat", "--torch_dtype: needs one of auto, bfloat16"),
        ("--max_seq_lenght 3", "there is no option --max_seq_lenght; did you mean --max_length?"),
        ("--max_seq_length 3 --max_length 4", "max_length=4 and max_seq_length=3 are the same argument"),
        ("--warmup_ratio few", "--warmup_ratio: needs a number, not `few`"),
        ("--warmup_ratio 3", "a share of all steps lies between 0 and 1"),
        ("--past_index 3", "`past_index` is gone"),
    ],
)
def test_older_words_that_cannot_be_meant(argv: str, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        sft_parser().parse(argv.split())
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--resume_from_checkpoint", "true"),
        ("--resume_from_checkpoint --packing", "true"),
        ("--resume_from_checkpoint true", "true"),
        ("--resume_from_checkpoint out/checkpoint-3", "out/checkpoint-3"),
        ("--resume_from_checkpoint=out/checkpoint-3", "out/checkpoint-3"),
    ],
)
def test_resume_with_and_without_a_value(argv: str, expected: str) -> None:
    assert sft_parser().read(argv.split())["resume_from_checkpoint"] == expected


def test_resume_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("resume_from_checkpoint: true\n")
    assert sft_parser().read(["--config", str(path)])["resume_from_checkpoint"] == "true"


FOREIGN = {"num_processes": True, "multi_gpu": False, "rate": True}


def foreign_parser() -> Parser:
    return Parser([Settings], prog="trl test", foreign=lambda: FOREIGN)


@pytest.mark.parametrize(
    ("argv", "foreign", "own"),
    [
        ("--num_processes 2 --steps 3", {"num_processes": "2"}, "--steps 3"),
        ("--steps 3 --num-processes=2", {"num_processes": "2"}, "--steps 3"),
        ("--flag --multi_gpu --steps 3", {"multi_gpu": True}, "--flag --steps 3"),
        ("--multi_gpu false --flag", {"multi_gpu": False}, "--flag"),
        ("--rate 0.5", {}, "--rate 0.5"),  # ours before theirs
    ],
)
def test_options_of_another_program(argv: str, foreign: dict[str, Any], own: str) -> None:
    _, found, rest = foreign_parser().read_apart(argv.split())
    assert (found, rest) == (foreign, own.split())


def test_options_of_another_program_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("num_processes: 4\nmulti_gpu: true\nsteps: 2\nenv:\n  A: 1\n")
    values, foreign, own = foreign_parser().read_apart(["--config", str(path), "--num_processes", "2"])
    assert values == {"steps": 2}
    assert foreign == {"num_processes": "2", "multi_gpu": True}
    assert own == ["--config", str(path)]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--num_processes --flag", "--num_processes needs a value."),
        ("--num_proceses 2", "there is no option --num_proceses; did you mean --num_processes?"),
    ],
)
def test_options_of_another_program_that_cannot_be_meant(argv: str, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        foreign_parser().read(argv.split())
    assert sentence in str(error.value)


def test_variables_of_the_yaml_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("env:\n  TRL_TEST_A: 1\n  TRL_TEST_B: true\n  TRL_TEST_C: some text\nsteps: 1\n")
    for name in "ABC":
        monkeypatch.setenv(f"TRL_TEST_{name}", "before")
    set_environment(["--steps", "3", "--config", str(path)])
    assert [os.environ[f"TRL_TEST_{name}"] for name in "ABC"] == ["1", "true", "some text"]
    assert read(f"--config={path}") == {"steps": 1}
    for content, sentence in (("env: 3", "env holds `NAME: value` lines"), ("env: {A: }", "env: A needs one value")):
        path.write_text(content)
        with pytest.raises(UsageError, match=sentence):
            set_environment([f"--config={path}"])


def test_a_nested_union_is_flattened() -> None:
    kind = Kind(Literal["a"] | (int | None))
    assert kind.convert("a") == "a"
    assert kind.convert("3") == 3
    assert kind.convert("none") is None


# --- lists of names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "names", "weights"),
    [
        ("--loss_type sigmoid", ["sigmoid"], None),
        ("--loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1.0", ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1]),
        ('--loss_type=["hinge","sft"] --loss_weights [1,2]', ["hinge", "sft"], [1, 2]),
        ("--loss_type math:hypot", ["math:hypot"], None),
        ("--loss_type aot_pair", ["aot_unpaired"], None),
    ],
)
def test_a_list_of_names(argv: str, names: list[str], weights: list[float] | None) -> None:
    *_, config = sft_parser("DPO").parse(argv.split())
    assert (config.loss_type, config.loss_weights) == (names, weights)


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("sigmoid", ["sigmoid"]),
        ("[sigmoid, sft]", ["sigmoid", "sft"]),
        ("\n- ipo\n- aot_pair", ["ipo", "aot_unpaired"]),
    ],
)
def test_a_list_of_names_in_a_file(tmp_path: Path, written: str, names: list[str]) -> None:
    (tmp_path / "run.yaml").write_text(f"loss_type: {written}\n")
    *_, config = sft_parser("DPO").parse(["--config", str(tmp_path / "run.yaml")])
    assert config.loss_type == names


@pytest.mark.parametrize("written", ["[[sigmoid]]", "{sigmoid: 1}", "[3]", "[sigmiod, sft]"])
def test_what_is_no_list_of_names(tmp_path: Path, written: str) -> None:
    (tmp_path / "run.yaml").write_text(f"loss_type: {written}\n")
    with pytest.raises(UsageError, match=r"run.yaml: loss_type: needs some of aot, aot_unpaired, .*, not `"):
        sft_parser("DPO").parse(["--config", str(tmp_path / "run.yaml")])


# --- a mix of data sets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "paths", "fractions"),
    [
        (["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"], [None, None]),
        (["a.jsonl"], ["a.jsonl"], [None]),
        (['{"path": "a", "fraction": 0.5}', "b"], ["a", "b"], [0.5, None]),
        (['[{"path": "a"}, {"path": "b", "fraction": 0.5}]'], ["a", "b"], [None, 0.5]),
    ],
)
def test_a_mix_is_typed(argv: list[str], paths: list[str], fractions: list[float | None]) -> None:
    _, mix, *_ = sft_parser().parse(["--datasets", *argv, "--streaming", "--test_split_size", "0.1"])
    assert [entry.path for entry in mix.datasets] == paths
    assert [entry.fraction for entry in mix.datasets] == fractions
    assert (mix.streaming, mix.test_split_size) == (True, 0.1)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--datasets", '{"path": "a"'], "--datasets: is not valid JSON"),
        (["--test_split_size", "few"], "--test_split_size: needs a number, not `few`"),
        (["--streaming", "perhaps"], "--streaming: needs true or false, not `perhaps`"),
    ],
)
def test_a_mix_that_cannot_be_meant(argv: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        sft_parser().parse(argv)
    assert sentence in str(error.value)


def test_a_mix_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("datasets:\n- path: a\n  columns: {prompt: q}\n- b\ntest_split_size: 1e-1\nstreaming: true\n")
    _, mix, *_ = sft_parser().parse(["--config", str(path)])
    assert [(entry.path, entry.columns) for entry in mix.datasets] == [("a", {"prompt": "q"}), ("b", None)]
    assert (mix.test_split_size, mix.streaming) == (0.1, True)


# --- words that ask for nothing, and words without a value -----------------------------------------------------------


def test_an_option_without_a_value_that_may_be_text() -> None:
    assert (
        sft_parser().parse(["--include_num_input_tokens_seen", "--packing"])[-1].include_num_input_tokens_seen == "all"
    )


@pytest.mark.parametrize(
    ("config", "argv"),
    [
        ("GRPO", "--use_vllm false"),
        ("GRPO", "--no_use_vllm"),
        ("RLOO", "--whiten_rewards false"),
        ("DPO", "--tools none"),
    ],
)
def test_what_asks_for_nothing_says_nothing(config: str, argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    sft_parser(config).parse([*argv.split(), "--bf16", "false"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("word", ["response_length", "token_level_kl", "exp_name"])
def test_a_hint_is_near(word: str) -> None:
    with pytest.raises(UsageError) as error:
        sft_parser().parse([f"--{word}", "3"])
    assert str(error.value) == f"there is no option --{word}. `trl sft --help` lists them."


# --- TrlParser, under upstream's name ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Given:
    """Options of a script."""

    number: int
    name: str = "alpha"


def test_the_parser_of_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("number: 23\nother: 1\n")
    argv = ["--config", str(path), "--odd", "x", "--name", "beta"]
    for parser in (TrlParser(Given), TrlParser(dataclass_types=(Given,)), TrlParser(parsers=[Given])):
        options, rest = parser.parse_args_and_config(argv, return_remaining_strings=True)
        assert (options, rest) == (Given(23, "beta"), ["--other", "1", "--odd", "x"])
        apart = parser.parse_args_and_config(argv, return_remaining_strings=True, separate_remaining_strings=True)
        assert apart == (Given(23, "beta"), ["--other", "1"], ["--odd", "x"])
    assert TrlParser(Given).parse_args_and_config(argv, fail_with_unknown_args=False) == (Given(23, "beta"),)
    assert TrlParser([Given], True).parse_args_and_config(argv) == (Given(23, "beta"),)
    for wrong, sentence in (
        (argv, "there is no option"),
        (["--config", str(path)], "there is no option `other`"),
        (["--name", "x"], "--number is missing"),
        (["--number", "x"], "--number: needs a whole number, not `x`"),
    ):
        with pytest.raises(SystemExit) as end:
            TrlParser(Given).parse_args_and_config(wrong)
        assert end.value.code == 2 and sentence in capsys.readouterr().err


def test_options_of_a_script_from_elsewhere(tmp_path: Path) -> None:
    parser = TrlParser(Given)
    assert parser.set_defaults_with_config(number=7, other=1) == ["--other", "1"]
    assert parser.parse_args_and_config([]) == (Given(7),)
    assert parser.parse_args_and_config(["--number", "8"]) == (Given(8),)
    assert parser.parse_dict({"number": 3}) == (Given(3),)
    assert parser.parse_dict({"number": "3", "nam": 1}, allow_extra_keys=True) == (Given(3),)
    with pytest.raises(ValueError, match="no option nam; did you mean name?"):
        parser.parse_dict({"number": 3, "nam": 1})
    (tmp_path / "x.json").write_text('{"number": 4, "name": "b"}')
    assert parser.parse_json_file(tmp_path / "x.json") == (Given(4, "b"),)
    assert TrlParser().parse_args_and_config([]) == ()


def test_a_dataclass_with_a_field_of_the_parser() -> None:
    with pytest.raises(ValueError, match="Clash has a field `config`"):
        TrlParser(dataclasses.make_dataclass("Clash", [("config", str, "x")]))
    with pytest.raises(ValueError, match="parsers is the older name of dataclass_types"):
        TrlParser(Given, parsers=[Given])
