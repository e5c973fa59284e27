"""The guide's `dpo_train.py` after its `sft_train.py`, and its two commands: as written but for the names of models and
data, and `report_to`."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.spec.test_sft_script import SCRIPT as SFT_SCRIPT
from tests.spec.test_sft_script import run
from tests.trainer.helpers import chat_rows, pair_rows

SCRIPT = """
from trl import DPOTrainer, DPOConfig
from transformers import AutoTokenizer, AutoModelForCausalLM
from datasets import load_dataset
import torch

model_name = "./sft_final"

model = AutoModelForCausalLM.from_pretrained(
    model_name,
    torch_dtype=torch.bfloat16,
    device_map="auto",
)

ref_model = AutoModelForCausalLM.from_pretrained(
    model_name,
    torch_dtype=torch.bfloat16,
    device_map="auto",
)

tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.pad_token = tokenizer.eos_token

dataset = load_dataset("json", data_files="pairs.jsonl", split="train")

dpo_config = DPOConfig(
    output_dir="./dpo_output",
    num_train_epochs=1,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    learning_rate=5e-7,
    beta=0.1,
    loss_type="sigmoid",
    max_length=2048,
    max_prompt_length=512,
    bf16=True,
    logging_steps=1,
    save_steps=50,
    report_to="none",
)

trainer = DPOTrainer(
    model=model,
    ref_model=ref_model,
    args=dpo_config,
    train_dataset=dataset,
    tokenizer=tokenizer,
)

trainer.train()
trainer.save_model("./dpo_final")
"""

OPEN = """
import sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("What comes after 3?", return_tensors="pt")
by_peft = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]).eval()
by_transformers = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert float((by_peft(**inputs).logits - by_transformers(**inputs).logits).abs().max()) < 1e-4
assert not any(name == "trl" or name.startswith("trl.") for name in sys.modules)
print("opened")
"""


def write(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def changed(before: Path, after: Path) -> int:
    """How many tensors of two adapters differ; they have the same ones."""
    from safetensors.torch import load_file

    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    return sum(not old[name].equal(new[name]) for name in old)


def implicit(rows):
    """Pairs without a prompt column, scores beside them: the data set that the guide names has them so."""
    return [
        {
            "chosen": row["prompt"] + row["chosen"],
            "rejected": row["prompt"] + row["rejected"],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        }
        for row in rows
    ]


@pytest.mark.slow
def test_dpo_train_runs_as_written_after_sft_train(tmp_path, tiny_path):
    """An adapter that transformers loads frozen, and a reference given beside it: it trains all the same."""
    write(tmp_path / "rows.jsonl", chat_rows(16))
    write(tmp_path / "pairs.jsonl", implicit(pair_rows(32)))
    settings = {"model": tiny_path, "data": "rows.jsonl", "logging": 1, "saving": 100}
    (tmp_path / "sft_train.py").write_text(SFT_SCRIPT.format(**settings))
    run(tmp_path, "sft_train.py")
    (tmp_path / "dpo_train.py").write_text(SCRIPT)
    out = run(tmp_path, "dpo_train.py")
    assert "the model was loaded with a frozen adapter inside: the adapter is made trainable" in out
    assert "reference: the model given" in out
    assert "32 rows read, 32 kept" in out
    state = json.loads((tmp_path / "dpo_output" / "checkpoint-4" / "trainer_state.json").read_text())
    first, *rest = (line for line in state["log_history"] if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["rewards/margins"] == 0
    assert all(line["loss"] != first["loss"] and line["rewards/margins"] != 0 for line in rest)
    assert changed(tmp_path / "sft_final", tmp_path / "dpo_final") > 0
    (tmp_path / "open.py").write_text(OPEN)
    assert run(tmp_path, "open.py", "dpo_final").strip().endswith("opened")


@pytest.mark.slow
def test_the_two_commands_as_typed(tmp_path, tiny_path):
    write(tmp_path / "chats.jsonl", chat_rows(16))
    write(tmp_path / "pairs.jsonl", implicit(pair_rows(32)))
    sft = (
        f"trl sft --model_name_or_path {tiny_path} --dataset_name chats.jsonl --dataset_text_field messages "
        "--output_dir ./cli_sft_output --num_train_epochs 3 --per_device_train_batch_size 2 "
        "--gradient_accumulation_steps 4 --learning_rate 2e-4 --bf16 --use_peft --lora_r 16 --lora_alpha 32"
    )
    dpo = (
        "trl dpo --model_name_or_path ./cli_sft_output --dataset_name pairs.jsonl --output_dir ./cli_dpo_output "
        "--num_train_epochs 1 --beta 0.1 --bf16"
    )
    for line in (sft, dpo):
        out = typed(tmp_path, line)
    assert "reference: a frozen copy of the adapter as it was at the start" in out
    assert "The trained adapter is in ./cli_dpo_output" in out
    state = json.loads((tmp_path / "cli_dpo_output" / "checkpoint-4" / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (4, 1.0)
    assert changed(tmp_path / "cli_sft_output", tmp_path / "cli_dpo_output") > 0
    (tmp_path / "open.py").write_text(OPEN)
    assert run(tmp_path, "open.py", "cli_dpo_output").strip().endswith("opened")


def typed(folder: Path, line: str) -> str:
    program, *words = line.split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [str(Path(sys.executable).parent / program), *words],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
