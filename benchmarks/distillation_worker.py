"""One side of `benchmarks/distillation.py`: trains with whichever `trl` its interpreter has (see `common_worker.py`).

Both sides are given prompts and completions as token ids. Where a method samples its completions, these stand in for
what it would have sampled.
"""

import json
from pathlib import Path

import torch
from common_worker import Rounds, Worker, converse
from datasets import Dataset, disable_caching, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl

OURS = int(trl.__version__.split(".")[0]) >= 2


class Distillation(Worker):
    def build(self):
        disable_caching()
        disable_progress_bars()
        settings = self.settings
        model, self.teacher = (
            AutoModelForCausalLM.from_pretrained(settings[name], dtype=torch.float32) for name in ("model", "teacher")
        )
        self.rows = json.loads(Path(settings["rows_file"]).read_text(encoding="utf-8"))
        self.tokenizer = AutoTokenizer.from_pretrained(settings["model"])
        adapter = None
        if settings["lora"]:
            import peft

            adapter = peft.LoraConfig(
                r=settings["lora_r"], lora_alpha=2 * settings["lora_r"], target_modules="all-linear",
                task_type="CAUSAL_LM",
            )  # fmt: skip
        make = self._gkd if settings["method"] == "gkd" else self._distillation
        trainer = make(model, peft_config=adapter, callbacks=[Rounds(self)], processing_class=self.tokenizer)
        self.built_in = 0.0
        return trainer.model, trainer

    def _gkd(self, model, **more):
        arguments = {**self.arguments(), "beta": self.settings["beta"], "lmbda": 0.0}
        rows = [
            {
                "input_ids": [*row["prompt_ids"], *row["completion_ids"]],
                "loss_mask": [False] * len(row["prompt_ids"]) + [True] * len(row["completion_ids"]),
                "row": number,
            }
            for number, row in enumerate(self.rows)
        ]
        if OURS:
            return trl.GKDTrainer(
                model, self.teacher, trl.GKDConfig(**arguments), train_dataset=Dataset.from_list(rows), **more
            )
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        pad = self.tokenizer.pad_token_id

        def collate(rows):
            wide = max(len(row["input_ids"]) for row in rows)
            grids = {"input_ids": [], "labels": [], "attention_mask": []}
            for row in rows:
                ids, left = row["input_ids"], wide - len(row["input_ids"])
                labels = [token if kept else -100 for token, kept in zip(ids, row["loss_mask"], strict=True)]
                grids["input_ids"].append(ids + [pad] * left)
                grids["labels"].append(labels + [-100] * left)
                grids["attention_mask"].append([1] * len(ids) + [0] * left)
            return {name: torch.tensor(grid) for name, grid in grids.items()}

        return GKDTrainer(
            model, self.teacher, GKDConfig(**arguments), data_collator=collate, train_dataset=Dataset.from_list(rows),
            **more,
        )  # fmt: skip

    def _distillation(self, model, **more):
        rows = self.rows
        arguments = {name: value for name, value in self.arguments().items() if name != "max_length"}
        longest = max(len(row["completion_ids"]) for row in rows)
        arguments |= {"beta": self.settings["beta"], "max_completion_length": longest, "shuffle_dataset": False}
        config = trl.DistillationConfig(**arguments)
        if OURS:
            from trl.rollout.types import Completion

            class Fixed:
                def sync(self, model, version):
                    pass

                def generate(self, requests, sampling):
                    known = {tuple(row["prompt_ids"]): row["completion_ids"] for row in rows}
                    found = [known[tuple(request.prompt_ids)] for request in requests]
                    return [[Completion(ids, [0.0] * len(ids), True)] for ids in found]

            data = [{"prompt": str(number), "prompt_ids": row["prompt_ids"], "row": number}
                    for number, row in enumerate(rows)]  # fmt: skip
            return trl.DistillationTrainer(
                model, self.teacher, config, train_dataset=Dataset.from_list(data), sampler=Fixed(), **more
            )

        class Fixed(trl.DistillationTrainer):
            def _tokenize_prompts(self, prompts):
                self._numbers = [int(prompt) for prompt in prompts]
                return [rows[number]["prompt_ids"] for number in self._numbers], None, {}

            def _generate_single_turn(self, *args, **kwargs):
                return [rows[number]["completion_ids"] for number in self._numbers]

        data = [{"prompt": str(number)} for number in range(len(rows))]
        return Fixed(model, self.teacher, config, train_dataset=Dataset.from_list(data), **more)

    def further_models(self) -> list:
        return [self.teacher]


def start(settings: dict, answers) -> None:
    Distillation(settings, answers).run()


if __name__ == "__main__":
    converse(start)
