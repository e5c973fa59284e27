"""The guide's `ppo_train.py`, as written but for names, the classifier's device and the data set of queries."""

import json

import pytest
import torch
from transformers import AutoTokenizer, DistilBertConfig, DistilBertForSequenceClassification

from tests.spec.test_sft_script import run

SCRIPT = """
from trl import PPOTrainer, PPOConfig, AutoModelForCausalLMWithValueHead
from transformers import AutoTokenizer, pipeline
from datasets import load_dataset
import torch

model_name = "./sft_final"

model = AutoModelForCausalLMWithValueHead.from_pretrained(
    model_name,
    torch_dtype=torch.bfloat16,
)

tokenizer = AutoTokenizer.from_pretrained(model_name)
tokenizer.pad_token = tokenizer.eos_token

sentiment_pipe = pipeline(
    "sentiment-analysis",
    model="./classifier",
    device=-1,
)

def reward_fn(texts):
    results = sentiment_pipe(texts)
    rewards = []
    for result in results:
        score = result["score"] if result["label"] == "POSITIVE" else -result["score"]
        rewards.append(torch.tensor(score))
    return rewards

ppo_config = PPOConfig(
    output_dir="./ppo_output",
    learning_rate=1.41e-5,
    mini_batch_size=1,
    batch_size=4,
    gradient_accumulation_steps=4,
    kl_penalty="kl",
    target_kl=6.0,
    cliprange=0.2,
    vf_coef=0.1,
    query_dataset="reviews.jsonl",
)

trainer = PPOTrainer(
    config=ppo_config,
    model=model,
    ref_model=None,
    tokenizer=tokenizer,
)

dataset = load_dataset("json", data_files="reviews.jsonl", split="train[:1000]")
for epoch in range(2):
    for batch in trainer.dataloader:
        queries = batch["input_ids"]

        responses = trainer.generate(queries, max_new_tokens=100)

        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        rewards = reward_fn(texts)

        stats = trainer.step(queries, responses, rewards)
        trainer.log_stats(stats, batch, rewards)

print("learned from", trainer.steps_taken, "steps; kl", stats["objective/kl"])
"""


@pytest.fixture
def folder(tmp_path, tiny_path):
    """A model that was fine-tuned, a classifier of sentiments that knows nothing, and reviews longer than it reads."""
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    for name in ("sft_final", "classifier"):
        tokenizer.save_pretrained(tmp_path / name)
    AutoModelForCausalLM.from_pretrained(tiny_path).save_pretrained(tmp_path / "sft_final")
    torch.manual_seed(0)
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, hidden_dim=64, n_layers=1, n_heads=2, id2label=labels,
        label2id={name: number for number, name in labels.items()}, pad_token_id=tokenizer.pad_token_id or 0,
    )  # fmt: skip
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    reviews = [{"text": f"film {number} was a long story about an old house. " * 60, "label": 1} for number in range(9)]
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews))
    return tmp_path


@pytest.mark.slow
def test_ppo_train_runs_as_written(folder):
    """No data set is handed over, responses hold their queries, and the loop's batches have no text beside them."""
    (folder / "ppo_train.py").write_text(SCRIPT)
    out = run(folder, "ppo_train.py")
    assert "target_kl=6.0 has no effect without early_stopping" in out
    assert "value function: a head on the policy's hidden states" in out
    assert "responses begin with their query, which is taken off" in out
    assert "steered to 6 nats a completion" in out
    assert "learned from 4 steps; kl" in out  # two batches of the nine reviews, twice
