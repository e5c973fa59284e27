"""PPO in a loop of one's own, from the adapter that sft_train.py has left.

    python ppo_train.py

Each turn of the loop samples responses, scores them and takes one PPO step. The score here is a few lines of code: the
share of a ticket's parts that a response names. `--reward_model` asks a text classifier in its place.
"""

import torch
from options import DTYPE, need, parse
from transformers import AutoTokenizer, pipeline

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.data.reading.sources import load
from trl.demo.orders import order_rows

options = parse(__doc__, model="./sft_final")
name = need(options.model_name_or_path, "sft_train.py")

# A head for values on the language model; of an adapter's folder, the adapter trains on.
model = AutoModelForCausalLMWithValueHead.from_pretrained(name, dtype=DTYPE)
tokenizer = AutoTokenizer.from_pretrained(name)

PARTS = ("item", "size", "count", "extra", "name")
classifier = options.reward_model and pipeline("text-classification", model=options.reward_model)


def score(texts: list[str]) -> list[torch.Tensor]:
    """One number a response."""
    if classifier:
        found = classifier(texts, truncation=True)
        return [torch.tensor(each["score"] * (1 if each["label"] == "POSITIVE" else -1)) for each in found]
    return [torch.tensor(sum(f'"{part}"' in text for part in PARTS) / len(PARTS)) for text in texts]


config = PPOConfig(
    output_dir="./ppo_output",
    learning_rate=1e-4,
    batch_size=4,  # responses of a step
    mini_batch_size=1,
    gradient_accumulation_steps=4,
    cliprange=0.2,
    vf_coef=0.1,
    target=6.0,  # nats a completion that the divergence is steered to
    query_length=64,  # tokens of a text that are continued
    report_to="none",
)

# Texts that the model continues: a column `text` of a data set, or the demo's orders as prompts.
if options.dataset_name:
    queries = load(options.dataset_name)
else:
    orders, _ = order_rows(train=4 * options.max_steps, held_out=0, seed=3)
    queries = [
        {"text": tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)}
        for row in orders
    ]

# Without `ref_model` the policy is compared with itself as it is now.
trainer = PPOTrainer(config=config, model=model, ref_model=None, tokenizer=tokenizer, dataset=queries)

for number, batch in enumerate(trainer.dataloader, 1):
    responses = trainer.generate(batch["input_ids"], return_prompt=False, max_new_tokens=48)
    rewards = score(tokenizer.batch_decode(responses, skip_special_tokens=True))
    stats = trainer.step(batch["input_ids"], responses, rewards)
    trainer.log_stats(stats, batch, rewards)
    if number == options.max_steps:
        break

trainer.save_pretrained("./ppo_final")
