"""The one table: what is changed in the guide's text before it runs here, and which test runs each piece of it.

Models and data sets keep their names. Folders under these names lie where the scripts run (`conftest.py`), and
transformers and datasets take a folder before they ask the Hub.
"""

from __future__ import annotations

from dataclasses import dataclass

from .document import Piece


@dataclass(frozen=True)
class Change:
    old: str
    new: str
    why: str


CHANGES = [
    Change("train_sft[:10%]", "train_sft[:50%]", "48 rows stand for 200,000"),
    Change("train[:5%]", "train[:50%]", "64 pairs stand for 60,000"),
    Change("logging_steps=10,", "logging_steps=1,", "runs of a few steps"),
    Change("save_steps=100,", "save_steps=3,", "runs of a few steps"),
    Change("sft_output/checkpoint-500/", "sft_output/checkpoint-6/", "runs of a few steps"),
    Change("device=0,", "device=-1,", "no GPU"),
    Change("torch.cuda.get_device_name(0)", "torch.get_default_device()", "no GPU"),
    Change("num_processes: 4", "num_processes: 2", "two processes stand for four"),
    Change("--num_processes 4", "--num_processes 2", "two processes stand for four"),
    Change('attn_implementation="flash_attention_2"', 'attn_implementation="sdpa"', "no GPU"),
    Change('dataset.push_to_hub("your-username/my-sft-dataset")', "pass", "no network; the guide calls it optional"),
]


@dataclass(frozen=True)
class Row:
    """What pieces begin with, and what becomes of them.

    A piece without a test has a reason (`not_run`). Where its maker has renamed the tool, `today` is the line of today.
    """

    text: str
    test: str = ""
    not_run: str = ""
    today: str = ""


INSTALLS = "installs; the wheel and its contents are tested in tests/cli/test_wheel.py"
ROWS = [
    # Installation
    Row("ssh root@<server-ip>", not_run="needs the reader's server"),
    Row("python3 -m venv /opt/trl", not_run=INSTALLS),
    Row("source /opt/trl/bin/activate", not_run=INSTALLS),
    Row("pip install", not_run=INSTALLS),
    Row("python3 -c \"import torch; print(f'CUDA", "test_the_check_of_the_gpu"),
    Row("huggingface-cli login", not_run="needs an account", today="hf auth login"),
    Row("export HF_TOKEN=", not_run="needs an account"),
    Row("wandb login", not_run="needs an account"),
    Row("export WANDB_DISABLED=true", "test_sft_train"),
    # Scripts
    Row("# 格式：datasets 库", "test_the_prepared_data_train"),
    Row("# sft_train.py", "test_sft_train"),
    Row("python3 sft_train.py\n", "test_sft_train"),
    Row("# 格式：每个示例包含", "test_the_prepared_pairs_train"),
    Row("# dpo_train.py", "test_dpo_train"),
    Row("# ppo_train.py", "test_ppo_train"),
    Row("# grpo_train.py", "test_grpo_train"),
    # Several processes
    Row("accelerate config", not_run="asks questions; the answers that the guide gives are written as its file"),
    Row("accelerate launch sft_train.py", "test_sft_train_in_two_processes"),
    Row("accelerate launch dpo_train.py", "test_dpo_train_in_two_processes"),
    Row("CUDA_VISIBLE_DEVICES=0,1,2,3 accelerate launch", "test_sft_train_with_options_of_the_launcher"),
    # Commands
    Row("trl sft", "test_the_two_commands"),
    Row("trl dpo", "test_the_two_commands"),
    # Watching
    Row("watch -n 1 nvidia-smi", not_run="needs a GPU, and does not end"),
    Row("ls -lh sft_output/checkpoint-*/", "test_sft_train"),
    Row("python3 sft_train.py --resume_from_checkpoint", "test_sft_train_resumes"),
    # Troubleshooting
    Row("per_device_train_batch_size=1", "test_advice_on_memory"),
    Row("gradient_accumulation_steps=16", "test_advice_on_memory"),
    Row("gradient_checkpointing=True", "test_advice_on_memory"),
    Row("max_seq_length=1024", "test_advice_on_memory"),
    Row("nvidia-smi", not_run="needs a GPU"),
    Row("learning_rate=1e-5", "test_advice_on_nan"),
    Row('python3 -c "\nfrom datasets import load_from_disk', "test_the_check_of_the_data"),
    Row("fp16=False", "test_advice_on_nan"),
    Row("bf16=True", "test_advice_on_nan"),
    Row("beta=0.05", "test_advice_on_rejected_above_chosen"),
    Row("model = AutoModelForCausalLM.from_pretrained(\n    model_name,\n    attn_impl", "test_advice_on_speed"),
    Row("dataloader_num_workers=4", "test_advice_on_speed"),
    Row("tokenizer.pad_token = tokenizer.eos_token", "test_advice_on_padding"),
    Row('tokenizer.padding_side = "right"', "test_advice_on_padding"),
    # Merging and sharing
    Row("python3 << 'EOF'\nfrom peft import PeftModel", "test_the_merged_model_gives_the_logits_of_the_adapter"),
    Row(
        "huggingface-cli upload your-username/my-trl-model ./merged_model",
        not_run="needs an account",
        today="hf upload your-username/my-trl-model ./merged_model",
    ),
    Row("GET https://", not_run="the address of the page itself; no part of the guide's work"),
]


def changed(text: str) -> str:
    for change in CHANGES:
        text = text.replace(change.old, change.new)
    return text


def row_of(piece: Piece) -> Row | None:
    """The row that covers a piece: the longest text that it begins with. None if there is none."""
    found = [row for row in ROWS if piece.text.startswith(row.text)]
    return max(found, key=lambda row: len(row.text), default=None)
