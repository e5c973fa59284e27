"""What the guide says about data and about trouble, put into the script that it is about; in this process."""

from __future__ import annotations

import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk

from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.data.reading.errors import DataError

from .conftest import LLAMA, Guide, with_settings

BRIEFLY: dict[str, Any] = {"max_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no"}


@pytest.fixture
def sft_final(here: Path) -> Path:
    """An adapter as `sft_train.py` would save it, not trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(LLAMA), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained("sft_final")
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained("sft_final")
    return here / "sft_final"


def ran(folder: Path, script: str) -> Any:
    """The trainer of a script of the guide, after its steps."""
    file = folder / "script.py"
    file.write_text(script, encoding="utf-8")
    return runpy.run_path(str(file))["trainer"]


def check_trained(trainer: Any, steps: int) -> None:
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert trainer.state.global_step == len(losses) == steps
    assert torch.tensor(losses).isfinite().all()


def inline(command: str) -> str:
    """The program of a `python3 -c` command."""
    program, flag, text = shlex.split(command)
    assert (program, flag) == ("python3", "-c")
    return text


def test_the_check_of_the_gpu(guide: Guide, capsys: pytest.CaptureFixture[str]) -> None:
    exec(inline(guide.text("python3 -c \"import torch; print(f'CUDA")), {})
    assert capsys.readouterr().out == f"CUDA: {torch.cuda.is_available()}, GPU: {torch.get_default_device()}\n"


# --- data -------------------------------------------------------------------------------------------------------------


def prepared(guide: Guide, begins: str, folder: Path) -> Any:
    (folder / "prepare.py").write_text(guide.text(begins), encoding="utf-8")
    return runpy.run_path(str(folder / "prepare.py"))["dataset"]


def test_the_prepared_data_train(guide: Guide, here: Path) -> None:
    """The one conversation of the guide, from the folder that it is saved to."""
    assert prepared(guide, "# 格式：datasets 库", here)["messages"][0][0]["role"] == "system"
    trainer = SFTTrainer(LLAMA, SFTConfig("out", **BRIEFLY), train_dataset="data/sft_dataset")
    assert trainer.train().training_loss > 0


def test_the_prepared_pairs_train(guide: Guide, here: Path) -> None:
    pairs = prepared(guide, "# 格式：每个示例包含", here)
    assert set(pairs.column_names) == {"prompt", "chosen", "rejected"}
    trainer = DPOTrainer(LLAMA, args=DPOConfig("out", **BRIEFLY), train_dataset=pairs)
    assert trainer.train().training_loss == pytest.approx(0.6931, abs=1e-3)


def test_the_check_of_the_data(guide: Guide, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The guide's check counts rows without messages. Training names them."""
    prepared(guide, "# 格式：datasets 库", here)
    check = inline(guide.text('python3 -c "\nfrom datasets'))
    exec(check, {})
    assert "Length: 1" in (out := capsys.readouterr().out) and "None count: 0" in out

    rows = [*load_from_disk("data/sft_dataset"), {"messages": None}, {"messages": None}]
    Dataset.from_list(rows).save_to_disk("bad")
    exec(check.replace("data/sft_dataset", "bad"), {})
    assert "None count: 2" in capsys.readouterr().out
    with pytest.raises(DataError, match="row 1.*\n?.*messages"):
        SFTTrainer(LLAMA, SFTConfig("out", **BRIEFLY), train_dataset="bad")


# --- trouble ----------------------------------------------------------------------------------------------------------


def test_advice_on_memory(guide: Guide, here: Path) -> None:
    """Smaller batches, more of them a step, checkpointing, shorter sequences; 4-bit weights are the script's own."""
    advice = guide.advice("max_seq_length")
    assert list(advice) == [
        *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "max_seq_length")
    ]
    trainer = ran(here, with_settings(guide.text("# sft_train.py"), advice | {"max_steps": "1"}))
    args = trainer.args
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (1, 16)
    assert args.gradient_checkpointing and args.max_length == 1024
    assert trainer.model.is_gradient_checkpointing and trainer.model.is_quantized
    check_trained(trainer, 1)


def test_advice_on_nan(guide: Guide, here: Path) -> None:
    advice = guide.advice("learning_rate=1e-5")
    assert advice == {"learning_rate": "1e-5", "bf16": "True", "fp16": "False"}
    trainer = ran(here, with_settings(guide.text("# sft_train.py"), advice | {"max_steps": "2"}))
    assert trainer.args.learning_rate == 1e-5 and trainer.args.bf16 and not trainer.args.fp16
    check_trained(trainer, 2)


def test_advice_on_rejected_above_chosen(guide: Guide, here: Path, sft_final: Path) -> None:
    advice = guide.advice("beta=0.05")
    assert advice == {"beta": "0.05"}
    trainer = ran(here, with_settings(guide.text("# dpo_train.py"), advice | {"max_steps": "2"}))
    assert trainer.args.beta == 0.05
    check_trained(trainer, 2)
    assert "rewards/accuracies" in trainer.state.log_history[0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more than this machine has cores
def test_advice_on_speed(guide: Guide, here: Path, sft_final: Path) -> None:
    """Another attention in the model's own call, half precision, workers that load."""
    loads = guide.text("model = AutoModelForCausalLM.from_pretrained(\n    model_name,\n    attn_impl")
    script = guide.text("# dpo_train.py")
    assert script.count("\n# 参考模型") == 1
    script = script.replace("\n# 参考模型", f"\n{loads}\n# 参考模型")
    trainer = ran(here, with_settings(script, guide.advice("dataloader_num_workers") | {"max_steps": "2"}))
    assert trainer.args.dataloader_num_workers == 4 and trainer.args.bf16
    check_trained(trainer, 2)


def test_advice_on_padding(guide: Guide, here: Path) -> None:
    """A padding token that is the end token: the end is trained all the same."""
    script = guide.text("# sft_train.py")
    for line in guide.of("test_advice_on_padding"):
        assert line.split("  #")[0].strip() in script
    trainer = ran(here, with_settings(script, {"max_steps": "1"}))
    tokenizer = trainer.processing_class
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and tokenizer.padding_side == "right"
    batch = next(iter(trainer.get_train_dataloader()))
    ends = int((batch["target_N"] == tokenizer.eos_token_id).sum())
    assert ends >= trainer.args.per_device_train_batch_size
