"""A resumed run is the uninterrupted run, bit for bit; a killed save loses nothing before it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.trainer.helpers import chat_rows, sft, tiny
from trl import checkpoint

TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
EVAL_TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


@pytest.fixture(scope="module")
def tokenizer(smol_path):
    return AutoTokenizer.from_pretrained(smol_path)


def history(trainer):
    """The logged lines of training and evaluation, without clocks and without the final summary."""
    return [
        {key: value for key, value in line.items() if key not in TIMES + EVAL_TIMES}
        for line in trainer.state.log_history
        if "train_runtime" not in line
    ]


def weights(folder):
    files = sorted(Path(folder).glob("*.safetensors"))
    assert files, folder
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_checkpoint(ours, theirs):
    mine, expected = weights(ours), weights(theirs)
    assert mine.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(mine[name], tensor), name
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trl_state_0.pt"):
        assert equal(load(ours / name), load(theirs / name)), name


def load(path):
    return torch.load(path, weights_only=False)


def equal(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    if hasattr(left, "tolist"):
        return left.tolist() == right.tolist()
    return left == right


def lora():
    import peft

    # Dropout makes the random state matter.
    return peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3, task_type="CAUSAL_LM")


def make(tmp_path, tokenizer, adapter, **settings):
    # Five rows a step out of 22: epochs of five steps, the last one short. Logs every three steps and saves every two,
    # so that a save falls between two logs; step 6 is in the second epoch.
    defaults = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 3,
        "lr_scheduler_type": "cosine",
        "eval_strategy": "steps",
        "eval_steps": 4,
    }
    return sft(
        tmp_path,
        tiny(tokenizer, attention_dropout=0.1),
        tokenizer,
        chat_rows(22),
        peft_config=lora() if adapter else None,
        eval_rows=chat_rows(5, seed=1),
        **{**defaults, **settings},
    )


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stop", [4, 6, 8])
def test_sft_resumed_equals_uninterrupted(tmp_path, tokenizer, adapter, stop):
    whole = make(tmp_path / "whole", tokenizer, adapter)
    whole.train()
    resumed = make(tmp_path / "whole", tokenizer, adapter, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert history(resumed) == history(whole)
    assert_same_checkpoint(tmp_path / "resumed" / "checkpoint-12", tmp_path / "whole" / "checkpoint-12")


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="divided by all steps of the schedule up to then"
)
def test_sft_the_final_summary_is_of_the_resumed_steps_alone(tmp_path, tokenizer):
    whole = make(tmp_path, tokenizer, False, logging_steps=1)
    whole.train()
    resumed = make(tmp_path, tokenizer, False, logging_steps=1)
    result = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    last = [line["loss"] for line in history(resumed) if "loss" in line][8:]
    assert len(last) == 4
    assert result.training_loss == pytest.approx(sum(last) / 4, rel=1e-5)


RUN = """
import sys
from transformers import AutoTokenizer
from tests.trainer.helpers import chat_rows, sft, tiny
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
trainer = sft(sys.argv[1], tiny(tokenizer), tokenizer, chat_rows(40), per_device_train_batch_size=2, max_steps=60,
              save_strategy="steps", save_steps=1, logging_steps=2, learning_rate=1e-3)
import torch
slow, first = torch.save, True
def save(*args, **kwargs):  # a save that takes a while, so that the kill hits one
    import time
    time.sleep(0.2)
    slow(*args, **kwargs)
torch.save = save
trainer.train(resume_from_checkpoint=len(sys.argv) > 3)
"""


def test_sft_sigkill_during_a_save_loses_nothing_before_it(tmp_path, tokenizer, smol_path):
    """Kill the process while a staging folder exists; what is called a checkpoint is whole, and the run goes on."""
    command = [sys.executable, "-c", RUN, str(tmp_path), smol_path]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=os.getcwd())
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        saving = list(tmp_path.glob(".saving-checkpoint-*"))
        if saving and len(checkpoint.checkpoints(tmp_path)) >= 2 and (saving[0] / "model.safetensors").exists():
            break
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert list(tmp_path.glob(".saving-checkpoint-*")), "the kill missed the save"
    whole = checkpoint.checkpoints(tmp_path)
    assert len(whole) >= 2 and all(checkpoint.problem(folder) is None for folder in whole)

    trainer = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(40), per_device_train_batch_size=2, max_steps=12,
                  save_strategy="steps", save_steps=1, logging_steps=2, learning_rate=1e-3)  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == max(12, int(whole[-1].name.split("-")[1]))
    assert not list(tmp_path.glob(".saving-*"))
    reference = sft(tmp_path / "reference", tiny(tokenizer), tokenizer, chat_rows(40), per_device_train_batch_size=2,
                    max_steps=12, logging_steps=2, learning_rate=1e-3)  # fmt: skip
    reference.train()
    assert history(trainer)[:6] == history(reference)[:6]


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, tokenizer, capsys):
    make(tmp_path, tokenizer, False).train()
    model = tmp_path / "checkpoint-12" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-10])
    resumed = make(tmp_path, tokenizer, False)
    with pytest.raises(checkpoint.CheckpointError, match=r"model.safetensors has \d+ bytes, the manifest says"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-12 is damaged" in capsys.readouterr().out
    assert checkpoint.problem(tmp_path / "checkpoint-12") is None  # written again


def test_nothing_to_resume_from(tmp_path, tokenizer):
    trainer = make(tmp_path / "empty", tokenizer, False)
    with pytest.raises(checkpoint.CheckpointError, match="holds no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(checkpoint.CheckpointError, match="is not a folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_old_checkpoints_are_removed_and_the_best_is_kept(tmp_path, tokenizer):
    settings = {
        "save_total_limit": 2,
        "save_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }
    trainer = make(tmp_path, tokenizer, False, **settings)
    trainer.train()
    names = {folder.name for folder in checkpoint.checkpoints(tmp_path)}
    best = Path(trainer.state.best_model_checkpoint)
    assert len(names) == 2 and "checkpoint-12" in names and best.name in names and best.is_dir()


def test_publish_replaces_a_folder_of_the_same_name_and_repairs_a_kill_between_the_renames(tmp_path):
    final = tmp_path / "checkpoint-3"
    for content in ("old", "new"):
        staging = checkpoint.begin(final)
        (staging / "model").write_text(content)
        checkpoint.publish(final, step=3)
    assert (final / "model").read_text() == "new" and checkpoint.manifest(final)["step"] == 3
    assert json.loads((final / "manifest.json").read_text())["files"] == {"model": 3}
    final.rename(tmp_path / ".replaced-checkpoint-3")  # killed after the first rename
    checkpoint.begin(tmp_path / "checkpoint-4")
    assert (final / "model").read_text() == "new"
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == ["checkpoint-3"]
