"""What scripts of any upstream release import and pass, against the table that `record_history.py` recorded."""

import dataclasses
import inspect
import json
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path

import pytest

import trl
from trl.compat.arguments import rows_of
from trl.trainer.ppo_steps import PPOStepTrainer

HISTORY = json.loads(Path(__file__).with_name("history.json").read_text(encoding="utf-8"))

# What upstream's documents, examples and commands import and this library does not have; each answers with a sentence.
MISSING = {
    "images": ("trl *DDPO*", "trl AlignProp*", "trl.models.auxiliary_modules *", "* PAPO*", "*Vision*", "*multimodal*"),
    "vLLM": ("trl.generation* *", "trl.extras.vllm_client *", "*vllm_serve *"),
    "methods to come": (
        *("* GOLD*", "* A2PO*", "* AsyncGRPO*", "* AsyncDistillation*", "* DPPO*", "* GFPO*", "* IWOPD*", "* SDFT*"),
        *("* SDPO*", "* SSD*", "* TPO*", "*.server_distillation *", "*self_distillation* *", "* build_teacher*"),
    ),
    "tools and environments": (
        *("* TextEnvironment", "* TextHistory", "*.harbor *", "*.openreward *", "*.openenv *"),
    ),
    "commands of upstream's own": (
        *("trl.skills* *", "* ChatArguments", "trl.commands.cli *", "* get_git_commit_hash", "trl.cli* *"),
        *("trl.scripts._hf_argparser *", "trl.scripts.* *"),
    ),
    "placeholders and typing errors": ("trl.experimental.new_trainer *", "trl.model *", "trl STFConfig"),
}  # fmt: skip


def reason(use):
    return next((why for why, patterns in MISSING.items() if any(fnmatchcase(use, each) for each in patterns)), None)


def resolve(module, name):
    found = import_module(module)
    try:
        return getattr(found, name)
    except AttributeError:
        return import_module(f"{module}.{name}")


def test_what_people_import():
    missing = {}
    for use in HISTORY["uses"]:
        try:
            resolve(*use.split())
        except ImportError as error:
            missing[use] = str(error)
    unexplained = [use for use in missing if reason(use) is None]
    assert not unexplained
    files = sum(HISTORY["uses"].values())
    answered = files - sum(HISTORY["uses"][use] for use in missing)
    assert answered / files > 0.9, (answered, files)
    for use, sentence in missing.items():
        assert "has no attribute" in sentence or use.startswith("trl.scripts._"), sentence


@pytest.mark.parametrize("name", [name for name in HISTORY["arguments"] if hasattr(trl, name)])
def test_arguments_of_every_release(name):
    """Each is an argument today, or a row of the table of older ones."""
    cls = getattr(trl, name)
    if name.endswith("Trainer"):
        ours = set(inspect.signature(cls.__init__).parameters)
        if cls is trl.PPOTrainer:
            ours |= set(inspect.signature(PPOStepTrainer.__init__).parameters)
    else:
        ours = {each.name for each in dataclasses.fields(cls)}
    assert not set(HISTORY["arguments"][name]) - ours - set(rows_of(cls))
