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
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


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


@pytest.mark.slow
def test_sft_sigkill_during_a_save_loses_nothing_before_it(tmp_path, tokenizer, small_path):
    """Kill the process while a staging folder exists; what is called a checkpoint is whole, and the run goes on."""
    command = [sys.executable, "-c", RUN, str(tmp_path), small_path]
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


# --- which run a folder holds -------------------------------------------------------------------------------------


def quick(tmp_path, model, tokenizer, rows=6, adapter=None, **settings):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **settings}
    return sft(tmp_path, model, tokenizer, chat_rows(rows), adapter, per_device_train_batch_size=2, **settings)


def test_no_step_is_taken_where_none_is_left(tmp_path, tokenizer, capsys):
    trainer = quick(tmp_path, tiny(tokenizer), tokenizer, max_steps=0)
    before = trainer.model.lm_head.weight.clone()
    assert trainer.train().global_step == 0 and torch.equal(trainer.model.lm_head.weight, before)
    assert "steps: 0" in capsys.readouterr().out
    quick(tmp_path, tiny(tokenizer), tokenizer).train()
    capsys.readouterr()
    again = quick(tmp_path, tiny(tokenizer), tokenizer)
    assert again.train(resume_from_checkpoint=True).global_step == 2
    said = capsys.readouterr().out
    assert f"trl: resumed from {tmp_path}/checkpoint-2: 2 steps are done" in said
    assert "trl: nothing is trained: all 2 steps are done already" in said
    # The weights are those of the finished run, to be saved.
    saved = weights(tmp_path / "checkpoint-2")
    assert torch.equal(again.model.lm_head.weight, saved["lm_head.weight"])


def test_a_checkpoint_of_another_run_is_never_taken_in_silence(tmp_path, tokenizer, capsys):
    quick(tmp_path, tiny(tokenizer), tokenizer).train()
    capsys.readouterr()
    other = quick(tmp_path, tiny(tokenizer), tokenizer, rows=5)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"checkpoint-2 belongs to another run \(data: 6 rows .* there, 5"
    ):
        other.train(resume_from_checkpoint=True)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))  # named, it is taken, and said
    assert "checkpoint-1 belongs to another run (data: 6 rows" in capsys.readouterr().out


def test_an_earlier_run_is_mentioned_and_the_latest_start_is_resumed(tmp_path, tokenizer, capsys):
    quick(tmp_path, tiny(tokenizer), tokenizer, learning_rate=1e-3).train()
    capsys.readouterr()
    quick(tmp_path, tiny(tokenizer), tokenizer, max_steps=1).train()
    said = capsys.readouterr().out
    assert f"{tmp_path} holds checkpoint-2 of an earlier run, and this run starts from the beginning" in said
    folder, sentences = checkpoint.resolve(tmp_path, True)
    assert folder.name == "checkpoint-1"
    assert sentences == ["checkpoint-2 of a run that began earlier: skipped"]


def test_an_adapter_of_another_rank_is_a_sentence(tmp_path, tokenizer):
    import peft

    quick(tmp_path, tiny(tokenizer), tokenizer, adapter=lora(), max_steps=1).train()
    another = peft.LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.3, task_type="CAUSAL_LM")
    trainer = quick(tmp_path, tiny(tokenizer), tokenizer, adapter=another)
    with pytest.raises(ValueError, match=r"holds an adapter with r=4, and this run asks for r=8: .*--lora_r 4"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="holds an adapter, and this run trains the whole model"):
        quick(tmp_path, tiny(tokenizer), tokenizer).train(resume_from_checkpoint=True)


def test_weights_of_the_other_kind_do_not_stay_beside_the_new_ones(tmp_path, tokenizer, capsys):
    whole, adapter = quick(tmp_path, tiny(tokenizer), tokenizer), quick(tmp_path, tiny(tokenizer), tokenizer, 6, lora())
    result = tmp_path / "result"
    whole.save_model(str(result))
    adapter.save_model(str(result))
    names = {path.name for path in result.iterdir()}
    assert "adapter_config.json" in names and not {"model.safetensors", "config.json"} & names
    assert (result / "earlier" / "model.safetensors").exists()
    assert "model.safetensors in" in capsys.readouterr().out
    whole.save_model(str(result))
    names = {path.name for path in result.iterdir()}
    assert "model.safetensors" in names and "adapter_config.json" not in names


def test_the_report_says_which_rate_suits_an_adapter(tmp_path, tokenizer):
    def cautions(**settings):
        trainer = quick(tmp_path, tiny(tokenizer), tokenizer, **settings)
        return [line for line in trainer.report() if "for an adapter" in line]

    low = "  caution: learning_rate=2e-05 is low for an adapter, which learns well at 0.0001 to 0.0005"
    assert cautions(adapter=lora(), learning_rate=2e-5) == [low]
    assert cautions(adapter=lora(), learning_rate=1e-4) == cautions(learning_rate=2e-5) == []
