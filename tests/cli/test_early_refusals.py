"""What stands in the way is said before anything is loaded, with the same exit status for every command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Command

TRAINS = ("--model_name_or_path", "model", "--dataset_name", "rows.jsonl")
# In these a file is named where a folder is written, or one that exists, or one in a folder that does not.
IN_THE_WAY = [
    (["sft", *TRAINS, "--output_dir", "there.jsonl"], "there.jsonl is a file, and a folder is written"),
    (["sft", *TRAINS, "--output_dir", "there.jsonl/out"], "there.jsonl is a file"),
    (["grpo", *TRAINS, "--output_dir", "model"], "--output_dir is the folder of the model itself, model"),
    (["merge", *TRAINS[:2], "--output_dir", "there.jsonl"], "there.jsonl is a file"),
    (["merge", *TRAINS[:2], "--output_dir", "model"], "model exists already: name another folder"),
    (["export", *TRAINS[:2], "--output", "model"], "model exists already: name another folder"),
    (["export", *TRAINS[:2], "--output", "there.gguf"], "there.gguf exists already: name another file"),
    (["generate", *TRAINS, "--output_file", "there.jsonl"], "or replace it with --overwrite"),
    (["generate", *TRAINS, "--output_file", "no/x.jsonl"], "the folder no does not exist: make it first"),
    (["chat", *TRAINS[:2], "--transcript", "there.jsonl"], "or replace it with --overwrite"),
    (["chat", *TRAINS[:2], "--transcript", "x.md"], "the name of a transcript ends in one of .jsonl, .json, .txt"),
    (["eval", *TRAINS, "--metrics", "perplexity", "--output", "there.jsonl"], "there.jsonl exists already"),
    (["data", "convert", "a.json", "there.jsonl", "--to", "messages"], "there.jsonl exists already"),
    (["config", "sft", "--output", "model"], "model is a folder, and a file is written"),
    (["demo", "--output_dir", "there.jsonl"], "there.jsonl is a file"),
]
TYPED = [
    (["sft", *TRAINS, "--optim", "adamw_torhc"], "did you mean adamw_torch?"),
    (["sft", *TRAINS, "--max_length", "0"], "--max_length: 0 is not possible: give a whole number, 1 or more"),
    (["sft", *TRAINS, "--seed", "-1"], "--seed: -1 is not possible"),
    (["dpo", *TRAINS, "--streaming", "--no_dataset_streaming"], "--dataset_streaming and --streaming mean the same"),
    (["merge", *TRAINS[:2], "--output_dir", "new", "--dtype", "flot16"], "--dtype: needs one of auto, bfloat16"),
    (["generate", *TRAINS, "--top_p", "2"], "--top_p: 2.0 is not possible: give a number, above 0, at most 1"),
    (["chat", *TRAINS[:2], "--temperature", "-1"], "--temperature: -1.0 is not possible: give a number, 0 or more"),
    (["completion", "zhs"], "not `zhs`; did you mean zsh?"),
    (["demo", "--quik"], "did you mean --quick?"),
    (["env", "--all"], "there is no option --all. `trl env --help` lists them."),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("there.jsonl", "there.gguf"):
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("argv", "sentence"), [*IN_THE_WAY, *TYPED])
def test_what_cannot_be_is_said(trl_here: Command, argv: list[str], sentence: str) -> None:
    answer = trl_here(*argv)
    assert answer.returncode == 2 and answer.stdout == ""
    assert sentence in answer.stderr and answer.stderr.count("\n") == 1, answer.stderr


@pytest.mark.parametrize(
    "argv", [argv for at, (argv, _) in enumerate(IN_THE_WAY) if argv[0] not in [each[0] for each, _ in IN_THE_WAY[:at]]]
)
def test_before_anything_is_loaded(trl_here: Command, folder: Path, argv: list[str]) -> None:
    trl_here(*argv)  # which puts the options of the command into the cache
    code = "import sys; from trl.cli.main import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=folder, env=os.environ, capture_output=True, text=True, timeout=60
    )
    assert answer.stdout == "2 False\n", answer.stderr


def test_a_folder_without_permission(trl_here: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and allowed(path, mode))
    answer = trl_here("sft", *TRAINS, "--output_dir", "out")
    assert answer.returncode == 2 and "is not writable for this user" in answer.stderr


def test_a_script_whose_output_is_a_file(tiny_path: str, folder: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    with pytest.raises(ValueError, match="there.jsonl is a file, and a folder is written"):
        SFTTrainer(tiny_path, SFTConfig(output_dir=str(folder / "there.jsonl")), train_dataset=[{"text": "a b"}])
