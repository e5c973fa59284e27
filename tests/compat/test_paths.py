"""Import paths that older and other callers use, each in a fresh process where the order of imports matters."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import trl
from trl.compat.table import PATHS


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("path", PATHS)
def test_a_path_answers_for_public_names(path):
    module = import_module(path)
    home = import_module("trl.rewards") if path.startswith("trl.rewards.") else trl
    for name in home.__all__:
        if not name.startswith("_"):
            assert getattr(module, name) is getattr(home, name)
    for name in ("NoSuchTrainer", "__wrapped__"):
        with pytest.raises(AttributeError, match=name):
            getattr(module, name)


# Processes are slow to start: each of these imports another room first.


def test_the_path_of_the_trainer_first():
    said = python(
        "from trl.trainer.sft_trainer import SFTTrainer\n"
        "from trl.trainer.sft_config import SFTConfig\n"
        "from trl.trainer import SFTConfig as again\n"
        "assert SFTConfig is again\n"
        "SFTConfig(output_dir='out', max_seq_length=4)"
    )
    assert said == ["trl: `max_seq_length` is `max_length` today"]


def test_our_own_room_first():
    code = "from trl.trainer.sft import SFTConfig; print(SFTConfig(output_dir='out', max_seq_length=4).max_length)"
    assert python(code) == ["trl: `max_seq_length` is `max_length` today", "4"]


def test_the_ground_floor_first():
    said = python(
        "from trl.config import ModelConfig\n"
        "print(ModelConfig(torch_dtype='float16').dtype)\n"
        "from trl.commands.cli_utils import SFTScriptArguments\n"
        "print(SFTScriptArguments(dataset_name='x').dataset_name)"
    )
    assert said == [
        "trl: `torch_dtype` is `dtype` today",
        "float16",
        "trl: the module trl.commands is gone: its names are in `trl` today",
        "trl: the module trl.commands.cli_utils is gone: its names are in `trl` today",
        "trl: `SFTScriptArguments` is `ScriptArguments` today",
        "x",
    ]


def test_paths_of_the_preference_trainers():
    said = python(
        "from trl.experimental.bco import BCOConfig, BCOTrainer\n"
        "from trl.experimental.orpo.orpo_trainer import ORPOTrainer\n"
        "from trl.trainer.dpo_config import DPOConfig, FDivergenceType\n"
        "from trl.data_utils import maybe_extract_prompt\n"
        "from trl.trainer.dpo import DPOTrainer as ours\n"
        "import trl\n"
        "assert trl.DPOTrainer is ours and trl.BCOTrainer is BCOTrainer\n"
        "from trl.commands.cli_utils import DPOScriptArguments"
    )
    assert said[-1] == "trl: `DPOScriptArguments` is `ScriptArguments` today"
    assert len(said) == 3


def test_a_module_that_never_was():
    with pytest.raises(ModuleNotFoundError):
        import_module("trl.trainer.no_such_thing")
    with pytest.raises(ImportError, match="NoSuchThing"):
        from trl import NoSuchThing  # noqa: F401
