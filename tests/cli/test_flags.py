"""The options of commands as plain data, and their cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trl.cli import UsageError, flags, train
from trl.cli.flags import Flags, cache_folder, remembered
from trl.cli.parser import Parser
from trl.methods import METHODS

COMMANDS = [name for name, row in METHODS.items() if row.command]
WATCHED = """
import sys
from trl.cli.main import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print(status, *(name for name in ("torch", "transformers", "datasets", "peft") if name in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_stored_options_are_the_classes_options(command: str) -> None:
    made = Flags.of(train.classes(command), {"num_processes": True})
    again = Flags.from_dict(json.loads(json.dumps(made.to_dict())))
    live, stored = (Parser(flags=each, prog=f"trl {command}", common=train.COMMON) for each in (made, again))
    for everything in (False, True):
        assert stored.help(everything) == live.help(everything)
    assert again.foreign == {"num_processes": True}
    argv = ["--learning_rate", "1e-3", "--no_bf16", "--report_to", "none", "--max_steps", "2"]
    assert stored.read(argv) == live.read(argv) != {}
    for wrong in (["--max_stepz", "2"], ["--max_steps", "few"], ["stray"]):
        sentences = []
        for each in (live, stored):
            with pytest.raises(UsageError) as error:
                each.read(wrong)
            sentences.append(str(error.value))
        assert sentences[0] == sentences[1]


def test_the_second_help_loads_no_library(tmp_path: Path) -> None:
    def run(*argv: str) -> tuple[str, str]:
        found = subprocess.run(
            [sys.executable, "-c", WATCHED, *argv],
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "TRL_CACHE": ""},
            capture_output=True,
            text=True,
        )
        return found.stdout, found.stderr

    first, loaded = run("sft", "--help")
    assert loaded.startswith("0 torch transformers") and first.startswith("usage: trl sft")
    assert (tmp_path / "trl" / "options" / "sft.json").is_file()
    assert run("sft", "--help") == (first, "0\n")
    _, mistake = run("sft", "--max_stepz", "3")
    assert mistake.splitlines()[0].startswith("trl sft: there is no option --max_stepz; did you mean --max_steps?")
    assert mistake.splitlines()[1] == "2"
    _, mistake = run("sft", "--model_name_or_path", "m")
    assert "--dataset_name is missing" in mistake and mistake.splitlines()[-1] == "2"


def test_the_cache_follows_what_it_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_CACHE", str(tmp_path))
    made: list[str] = []

    def make() -> Flags:
        made.append("made")
        return Flags({}, {}, {"a": [None, "b"]}, {"cpu": False})

    assert remembered("x", make) == remembered("x", make) == make()
    assert len(made) == 2  # once by `remembered`
    path = cache_folder() / "x.json"
    path.write_text("{")
    remembered("x", make)
    assert len(made) == 3 and json.loads(path.read_text())["flags"]["foreign"] == {"cpu": False}
    monkeypatch.setattr(flags, "_version", lambda library: "0")
    remembered("x", make)
    assert len(made) == 4
    # A folder that cannot be written: the options are made each time.
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("TRL_CACHE", str(file))
    remembered("x", make), remembered("x", make)
    assert len(made) == 6
