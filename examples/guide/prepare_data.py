"""Data for the scripts of this folder: conversations and pairs, each saved as a data set.

    python prepare_data.py

The rows are the demo's: orders in plain words, and the tickets that they should become. Rows of your own need the
columns that this script prints.
"""

from datasets import Dataset

from trl.demo.orders import order_rows, pair_rows

# Conversations: one list of messages a row. The last message is what the model learns to write.
conversations, _ = order_rows(train=320, held_out=0, seed=0)
dataset = Dataset.from_list(conversations)
dataset.save_to_disk("data/sft_dataset")
print("data/sft_dataset:", dataset)
print(dataset[0])

# Pairs: a prompt, a better answer and a worse one. Here the worse ticket has one mistake.
pairs, _ = pair_rows(train=160, held_out=0, seed=0)
dataset = Dataset.from_list(pairs)
dataset.save_to_disk("data/dpo_dataset")
print("data/dpo_dataset:", dataset)
print(dataset[0])

# A row without messages would stop the training with its number; this looks for such rows beforehand.
print("rows without messages:", sum(row["messages"] is None for row in conversations))
