"""As `record.py`, for the methods that TRL 1.16 no longer has: BCO and PRM, from TRL 0.28.0.

Run it with that version's package first on the path, in an environment as for `record.py` that has joblib too (which
BCO asks for; without an `embedding_func` it does not use it):

    PYTHONPATH=<folder of TRL 0.28.0> python tests/parity/record_older.py

It writes bco.json and prm.json. Metrics of BCO are as it logs them, means of the sums that it keeps.
"""

from unittest.mock import patch

import tiny
import torch
from datasets import Dataset
from record import BETA, arguments, result, write
from transformers import Trainer

from trl.experimental.bco import BCOConfig, BCOTrainer
from trl.experimental.prm import PRMConfig, PRMTrainer


def bco(settings):
    model = tiny.policy()
    settings = {"beta": BETA, **settings}
    texts = [{"prompt": "w5", "completion": " w6", "label": label} for label in (True, False)]
    trainer = BCOTrainer(
        model,
        tiny.reference(),
        args=arguments(BCOConfig, settings),
        train_dataset=Dataset.from_list(texts),
        processing_class=tiny.tokenizer(),
    )
    features = []
    for row in tiny.UNPAIRED:
        prompt, completion = row["prompt_ids"], row["completion_ids"]
        features.append(
            {
                "prompt_input_ids": prompt,
                "prompt_attention_mask": [1] * len(prompt),
                "completion_input_ids": prompt + completion,
                "completion_attention_mask": [1] * len(prompt + completion),
                "completion_labels": [-100] * len(prompt) + completion,
                "label": row["label"],
            }
        )
    model.train()
    loss = trainer.compute_loss(model, trainer.data_collator(features))
    loss.backward()
    logs = {"loss": loss.item()}
    with patch.object(Trainer, "log"):
        trainer.log(logs)
    del logs["loss"]
    return result(settings, model, loss, logs)


def prm(settings):
    model = tiny.step_scorer()
    features = []
    for row in tiny.STEPS:
        labels, left = [-100] * len(row["prompt_ids"]), list(row["step_labels"])
        labels += [left.pop(0) if judged else -100 for judged in row["step_mask"]]
        features.append({"input_ids": row["prompt_ids"] + row["completion_ids"], "labels": labels})
    trainer = PRMTrainer(
        model,
        args=arguments(PRMConfig, settings),
        train_dataset=Dataset.from_list(features),
        processing_class=tiny.tokenizer(),
    )
    model.train()
    loss = trainer.compute_loss(model, trainer.data_collator(features))
    loss.backward()
    return result(settings, model, loss, {})


def main():
    torch.set_num_threads(1)
    write("bco", tiny.UNPAIRED, {"bco": bco({}), "bco 1.0": bco({"beta": 1.0})})
    write("prm", tiny.STEPS, {"prm": prm({})})


if __name__ == "__main__":
    main()
