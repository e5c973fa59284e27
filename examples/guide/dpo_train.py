"""DPO on pairs of answers, from the adapter that sft_train.py has left.

    python dpo_train.py

`AutoModelForCausalLM` loads an adapter frozen, as for inference. The trainer makes it trainable and says so.
"""

import torch
from options import DTYPE, need, parse
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl import DPOConfig, DPOTrainer

options = parse(__doc__, model="./sft_final")
name = need(options.model_name_or_path, "sft_train.py")

model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPE, device_map="auto")

# The policy is compared with this model. Without it, the trainer keeps a frozen copy of the adapter, which is cheaper.
ref_model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPE, device_map="auto")

tokenizer = AutoTokenizer.from_pretrained(name)

config = DPOConfig(
    output_dir="./dpo_output",
    max_steps=options.max_steps,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    learning_rate=1e-5,  # for an adapter; 5e-7 suits full fine-tuning
    beta=0.1,  # lower: further from the reference
    loss_type="sigmoid",
    max_length=2048,
    bf16=torch.cuda.is_available(),
    logging_steps=1,
    save_steps=50,
    report_to="none",
)

trainer = DPOTrainer(
    model=model,
    ref_model=ref_model,
    args=config,
    train_dataset=options.dataset_name or need("data/dpo_dataset", "prepare_data.py"),
    processing_class=tokenizer,
)

trainer.train()
trainer.save_model("./dpo_final")
