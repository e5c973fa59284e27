"""Supervised fine-tuning of a LoRA adapter, on 4-bit weights where there is a GPU.

    python prepare_data.py && python sft_train.py

The adapter and its tokenizer are left in ./sft_final, where the other scripts find them.
"""

import torch
from options import DTYPE, need, parse
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trl import SFTConfig, SFTTrainer

options = parse(__doc__)

# 4-bit weights take a quarter of the memory of bfloat16. They stay as they are; only the adapter is trained.
four_bits = None
if options.load_in_4bit or torch.cuda.is_available():
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )

model = AutoModelForCausalLM.from_pretrained(
    options.model_name_or_path, quantization_config=four_bits, dtype=DTYPE, device_map="auto"
)
tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)

adapter = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")

config = SFTConfig(
    output_dir="./sft_output",
    max_steps=options.max_steps,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    learning_rate=2e-4,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,  # of all steps
    bf16=torch.cuda.is_available(),
    max_length=2048,
    assistant_only_loss=True,
    logging_steps=1,
    save_steps=10,
    save_total_limit=3,
    report_to="none",  # or "wandb"
)

# A name, a file or a folder is enough: the trainer opens it.
trainer = SFTTrainer(
    model=model,
    args=config,
    train_dataset=options.dataset_name or need("data/sft_dataset", "prepare_data.py"),
    processing_class=tokenizer,
    peft_config=adapter,
)

# `--resume_from_checkpoint` on the command line is read here.
trainer.train()
trainer.save_model("./sft_final")
