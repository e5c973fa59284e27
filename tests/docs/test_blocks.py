"""Every Python and shell block of README and docs runs as it is written, those of a page in order, in one folder.

A block that cannot run here says so in the page, in a comment before its fence: `<!-- not run: needs a hub -->`. A
Python block whose first line is a comment with a file's name is that file. The folder holds what the pages name:
models, and data sets of a few rows.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, RUN, Block, blocks, name_of
from trl.methods import METHODS

# Pages that take longer than about ten seconds.
SLOW = ()

ASKED = ["Name a colour.", "What is 2 + 2?", "Say hello.", "Name a fruit."]
ANSWERS = ["Blue.", "It is 4.", "Hello!", "An apple."]
WORSE = ["Seven.", "It is 5.", "No.", "A chair."]


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


TRIPLES = list(zip(ASKED, ANSWERS, WORSE, strict=True))
DATA = {
    "chats.jsonl": [{"messages": _user(asked) + _assistant(answer)} for asked, answer, _ in TRIPLES],
    "pairs.jsonl": [
        {"prompt": _user(asked), "chosen": _assistant(answer), "rejected": _assistant(worse)}
        for asked, answer, worse in TRIPLES
    ],
    "labelled.jsonl": [
        {"prompt": asked, "completion": text, "label": good}
        for asked, answer, worse in TRIPLES
        for text, good in ((answer, True), (worse, False))
    ],
    "steps.jsonl": [
        {"prompt": "What is 2 + 2 + 1?", "completions": ["2 + 2 = 4.", "4 + 1 = 5."], "labels": [True, True]},
        {"prompt": "What is 3 + 3 + 1?", "completions": ["3 + 3 = 6.", "6 + 1 = 8."], "labels": [True, False]},
    ],
    "prompts.jsonl": [{"prompt": _user(asked)} for asked in ASKED],
    "tasks.jsonl": [{"prompt": _user("What is 2 + 2?"), "answer": "4"}, {"prompt": _user("1 + 1?"), "answer": "2"}],
    "texts.jsonl": [{"text": f"{asked} {answer}"} for asked, answer, _ in TRIPLES],
    "reviews.jsonl": [{"text": f"Film {place} was good and I will say why at some length."} for place in range(16)],
    "alpaca.json": [{"instruction": asked, "input": "", "output": answer} for asked, answer, _ in TRIPLES],
}  # fmt: skip
REWARDS = """
def right(completions, answer, **kwargs):
    return [float(answer in completion[-1]["content"]) for completion, answer in zip(completions, answer)]
"""
CONFIG = "model_name_or_path: path/or/name\ndataset_name: chats.jsonl\noutput_dir: configured\nmax_steps: 1\n"


@pytest.fixture(scope="module")
def scorer(tiny_path, tmp_path_factory):
    """A model with a scoring head over the small model's random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "scorer"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(tiny_path, num_labels=1)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def short_path(tiny_path, tmp_path_factory):
    """The small model, whose completions end soon: every eighth token ends them."""
    from transformers import GenerationConfig

    folder = tmp_path_factory.mktemp("models") / "short"
    shutil.copytree(tiny_path, folder)
    found = GenerationConfig.from_pretrained(folder)
    found.eos_token_id = [found.eos_token_id, *range(100, 2048, 8)]
    found.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(tiny_path, tmp_path_factory):
    """An adapter of the small model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "adapter"
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch, short_path, smol2_path, scorer, adapter):
    """A folder with everything that the pages name."""
    for name, source in {
        **dict.fromkeys(("path/or/name", "small/model", "large/model", "merged"), short_path),
        "path/to/reward-model": scorer,
        "adapter": adapter,
    }.items():
        shutil.copytree(source, tmp_path / name)
    for name, rows in DATA.items():
        text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(text)
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRL_DEBUG", "1")  # tracebacks
    monkeypatch.setenv("MODEL", smol2_path)  # where the tokenizer must be the real one
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    methods, modules = dict(METHODS), set(sys.modules)
    yield tmp_path
    METHODS.clear()
    METHODS.update(methods)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]  # a page's own file


def run_python(block: Block, names: dict, where: str) -> None:
    if block.file:
        compile(block.code, block.file, "exec")
        Path(block.file).write_text(block.code + "\n")
        return
    exec(compile("\n" * (block.line - 1) + block.code, where, "exec"), names)


def run_shell(block: Block) -> None:
    """`trl` commands in this process, which saves a start each; others in a shell, a block with a document whole."""
    from trl.cli.main import main

    whole = [block.code] if "<<" in block.code else re.sub(r"\\\n\s*", " ", block.code).splitlines()
    for command in whole:
        words = [os.path.expandvars(word) for word in shlex.split(command, comments=True)]
        if not words:
            continue
        if words[0] == "trl" and not set("".join(words)) & set("|>&;<"):
            try:
                status = main(words[1:])
            except SystemExit as end:  # --help
                status = end.code or 0
            assert status == 0, command
        else:
            subprocess.run(["bash", "-ec", command], check=True)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if name_of(page) in SLOW else (), id=name_of(page))
             for page in PAGES]
)  # fmt: skip
def test_blocks_run_as_written(page, folder):
    text = page.read_text(encoding="utf-8")
    found = [block for block in blocks(text) if block.language in RUN]
    names = {"__name__": "__main__"}
    ran = 0
    for block in found:
        if block.not_run:
            continue
        if block.language == "python":
            run_python(block, names, str(page))
        else:
            run_shell(block)
        ran += 1
    fences = len(re.findall(rf"^`{{3,}}(?:{'|'.join(RUN)})\s*$", text, re.MULTILINE))
    assert ran + sum(bool(block.not_run) for block in found) == fences
