"""The guide's `grpo_train.py`, as written but for the model's name and `report_to`."""

import json
import shutil

import pytest

from tests.spec.test_sft_script import losses, run

SCRIPT = """
from trl import GRPOTrainer, GRPOConfig
from transformers import AutoTokenizer, AutoModelForCausalLM
from datasets import Dataset
import re, torch

model_name = {model!r}

model = AutoModelForCausalLM.from_pretrained(
    model_name,
    torch_dtype=torch.bfloat16,
    device_map="auto",
)
tokenizer = AutoTokenizer.from_pretrained(model_name)

def make_math_dataset():
    examples = [
        {{"prompt": "What is 2+2?", "answer": "4"}},
        {{"prompt": "What is 15 * 7?", "answer": "105"}},
    ]
    return Dataset.from_list(examples)

dataset = make_math_dataset()

def correctness_reward(completions, answer, **kwargs):
    rewards = []
    for completion in completions:
        numbers = re.findall(r'\\d+', completion[-1]["content"])
        if numbers and numbers[-1] == answer:
            rewards.append(1.0)
        else:
            rewards.append(0.0)
    return rewards

grpo_config = GRPOConfig(
    output_dir="./grpo_output",
    num_train_epochs=3,
    per_device_train_batch_size=4,
    num_generations=8,
    learning_rate=5e-7,
    bf16=True,
    logging_steps=10,
    report_to="none",
)

trainer = GRPOTrainer(
    model=model,
    args=grpo_config,
    train_dataset=dataset,
    reward_funcs=correctness_reward,
    tokenizer=tokenizer,
)

trainer.train()
"""


@pytest.fixture
def brief_path(tmp_path, tiny_path):
    """A random model that one token in 32 ends: it would write on to the limit otherwise."""
    folder = tmp_path / "brief"
    shutil.copytree(tiny_path, folder)
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": list(range(2, 2048, 32))}))
    return str(folder)


@pytest.mark.slow
def test_grpo_train_runs_as_written(tmp_path, brief_path):
    """Plain prompts with a reward for messages, batches of four and eight completions, an older argument."""
    (tmp_path / "grpo_train.py").write_text(SCRIPT.format(model=brief_path))
    out = run(tmp_path, "grpo_train.py")
    assert "1 prompts × 8 completions each, drawn at once; trained on in 2 steps of 4 completions" in out
    assert "reads chat messages, and prompts and completions are strings" in out
    assert "gave 0 to every row 5 times in a row" in out  # it knows no sums
    assert losses(out)
