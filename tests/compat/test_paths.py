"""Import paths that older and other callers use, each in a fresh process where the order of imports matters."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import trl
from trl.compat.table import PATHS


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


# Each imports another room first, in a process that has loaded nothing of ours yet.
ROOMS = {
    "the path of the trainer": """
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer import SFTConfig as again
assert SFTConfig is again
SFTConfig(output_dir="out", max_seq_length=4)
""",
    "our own": """
from trl.trainer.sft import SFTConfig
print(SFTConfig(output_dir="out", max_seq_length=4).max_length)
""",
    "the ground floor": """
from trl.config import ModelConfig
print(ModelConfig(torch_dtype="float16").dtype)
from trl.commands.cli_utils import SFTScriptArguments
print(SFTScriptArguments(dataset_name="x").dataset_name)
""",
    "those of the preference trainers": """
from trl.experimental.bco import BCOConfig, BCOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_config import DPOConfig, FDivergenceType
from trl.data_utils import maybe_extract_prompt
from trl.trainer.dpo import DPOTrainer as ours
import trl
assert trl.DPOTrainer is ours and trl.BCOTrainer is BCOTrainer
from trl.commands.cli_utils import DPOScriptArguments
""",
}
# What is slow to import is not ours: it is loaded once, and each room by a fork of that process.
FORK = """
import os, sys, traceback
import accelerate, datasets, peft, transformers.trainer
assert not any(name.split(".")[0] == "trl" for name in sys.modules)
for code in sys.argv[1:]:
    print("---", flush=True)
    if not (child := os.fork()):
        try:
            exec(code, {})
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_any_room_may_be_imported_first():
    done = subprocess.run(
        [sys.executable, "-c", FORK, *ROOMS.values()], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    said = dict(zip(ROOMS, [part.splitlines() for part in done.stdout.split("---\n")[1:]], strict=True))
    assert said["the path of the trainer"] == ["trl: `max_seq_length` is `max_length` today"]
    assert said["our own"] == ["trl: `max_seq_length` is `max_length` today", "4"]
    assert said["the ground floor"] == [
        "trl: `torch_dtype` is `dtype` today",
        "float16",
        "trl: the module trl.commands is gone: its names are in `trl` today",
        "trl: the module trl.commands.cli_utils is gone: its names are in `trl` today",
        "trl: `SFTScriptArguments` is `ScriptArguments` today",
        "x",
    ]
    *modules, last = said["those of the preference trainers"]
    assert len(modules) == 2 and last == "trl: `DPOScriptArguments` is `ScriptArguments` today"


def test_a_module_that_never_was():
    with pytest.raises(ModuleNotFoundError):
        import_module("trl.trainer.no_such_thing")
    with pytest.raises(ImportError, match="NoSuchThing"):
        from trl import NoSuchThing  # noqa: F401
