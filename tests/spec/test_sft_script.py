"""The guide's `sft_train.py`, as written but for the model, the data set and `report_to`."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.trainer.helpers import chat_rows

SCRIPT = """
from trl import SFTTrainer, SFTConfig
from transformers import AutoTokenizer, AutoModelForCausalLM, BitsAndBytesConfig
from peft import LoraConfig, get_peft_model
from datasets import load_dataset
import torch

model_name = {model!r}

bnb_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16,
    bnb_4bit_use_double_quant=True,
)

model = AutoModelForCausalLM.from_pretrained(
    model_name,
    quantization_config=bnb_config,
    device_map="auto",
    trust_remote_code=True,
)

tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.pad_token = tokenizer.eos_token
tokenizer.padding_side = "right"

lora_config = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj",
                    "gate_proj", "up_proj", "down_proj"],
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
)

dataset = load_dataset("json", data_files={data!r}, split="train")

training_config = SFTConfig(
    output_dir="./sft_output",
    num_train_epochs=3,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    learning_rate=2e-4,
    warmup_ratio=0.05,
    lr_scheduler_type="cosine",
    fp16=False,
    bf16=True,
    max_seq_length=2048,
    dataset_text_field="messages",
    logging_steps={logging},
    save_steps={saving},
    save_total_limit=3,
    push_to_hub=False,
    report_to="none",
)

trainer = SFTTrainer(
    model=model,
    args=training_config,
    train_dataset=dataset,
    peft_config=lora_config,
    tokenizer=tokenizer,
)

trainer.train()
trainer.save_model("./sft_final")
"""

MERGE = """
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch

base_model = AutoModelForCausalLM.from_pretrained({model!r}, torch_dtype=torch.bfloat16, device_map="auto")
model = PeftModel.from_pretrained(base_model, "./sft_final")
merged = model.merge_and_unload()
merged.save_pretrained("./merged_model")
tokenizer = AutoTokenizer.from_pretrained({model!r})
tokenizer.save_pretrained("./merged_model")
print("merged")
"""


def run(folder, script, *arguments):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(
        [sys.executable, script, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(out):
    return [float(value) for value in re.findall(r"'loss': '?([0-9.]+)", out)]


@pytest.mark.slow
def test_sft_train_runs_as_written_resumes_and_merges(tmp_path, tiny_path):
    """4-bit on a CPU, old argument names, a `prompt` column beside `messages`; then the guide's command to resume."""
    rows = [{"prompt": "x", "prompt_id": str(number), **row} for number, row in enumerate(chat_rows(24))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"model": tiny_path, "data": "rows.jsonl", "logging": 1, "saving": 3}
    (tmp_path / "sft_train.py").write_text(SCRIPT.format(**settings))
    out = run(tmp_path, "sft_train.py")
    whole = losses(out)
    assert len(whole) == 9 and whole[-1] < whole[0]
    assert "read as conversations in `messages`" in out
    for old, new in (
        ("max_seq_length", "max_length"),
        ("tokenizer", "processing_class"),
        ("warmup_ratio", "warmup_steps"),
    ):
        assert re.search(f"{old}.*{new}", out), old
    assert (tmp_path / "sft_final" / "adapter_model.safetensors").exists()
    assert (tmp_path / "sft_final" / "tokenizer_config.json").exists()

    out = run(tmp_path, "sft_train.py", "--resume_from_checkpoint", "sft_output/checkpoint-6/")
    assert "resume_from_checkpoint" in out
    assert losses(out) == whole[6:]

    (tmp_path / "merge.py").write_text(MERGE.format(model=tiny_path))
    assert "merged" in run(tmp_path, "merge.py")
    assert (tmp_path / "merged_model" / "model.safetensors").exists()
