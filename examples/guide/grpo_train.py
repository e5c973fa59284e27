"""GRPO on sums: several answers to each question, rewarded where the last number is the right one.

python grpo_train.py
"""

import random
import re

import torch
from datasets import Dataset
from options import DTYPE, parse
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl import GRPOConfig, GRPOTrainer

options = parse(__doc__)

model = AutoModelForCausalLM.from_pretrained(options.model_name_or_path, dtype=DTYPE, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)


def sums(count: int) -> Dataset:
    """Questions as conversations, so that the chat template is used; `answer` is for the reward function."""
    generator = random.Random(0)
    rows = []
    for _ in range(count):
        left, right = generator.randint(1, 9), generator.randint(1, 9)
        question = f"What is {left} + {right}? Answer with the number."
        rows.append({"prompt": [{"role": "user", "content": question}], "answer": str(left + right)})
    return Dataset.from_list(rows)


def is_right(completions: list[list[dict[str, str]]], answer: list[str], **_: object) -> list[float]:
    """1 for an answer whose last number is the right one, otherwise 0. Columns of the data set are arguments."""
    rewards = []
    for completion, right in zip(completions, answer, strict=True):
        numbers = re.findall(r"\d+", completion[-1]["content"])
        rewards.append(float(bool(numbers) and numbers[-1] == right))
    return rewards


config = GRPOConfig(
    output_dir="./grpo_output",
    max_steps=options.max_steps,
    per_device_train_batch_size=4,
    num_generations=8,  # answers to a question; the batches of a round are made to fit
    max_completion_length=32,
    learning_rate=1e-5,
    bf16=torch.cuda.is_available(),
    logging_steps=1,
    report_to="none",
)

trainer = GRPOTrainer(
    model=model,
    args=config,
    reward_funcs=is_right,
    train_dataset=options.dataset_name or sums(64),
    processing_class=tokenizer,
)

trainer.train()
trainer.save_model("./grpo_final")
