"""One side of `benchmarks/preference.py`: trains with whichever `trl` its interpreter has, as `common_worker.py` says.

It is given token ids. This library takes rows in the columns that it makes itself; for TRL they are put into the
columns that its collators read, and its own preparation is left out.
"""

import json
import time
from pathlib import Path

import torch
from common_worker import Rounds, Worker, converse
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import trl

NAMES = {"dpo": "DPO", "kto": "KTO", "reward": "Reward"}
OURS = int(trl.__version__.split(".")[0]) >= 2


class Preference(Worker):
    def build(self):
        settings = self.settings
        kind = AutoModelForSequenceClassification if settings["method"] == "reward" else AutoModelForCausalLM
        model = kind.from_pretrained(settings["model"], dtype=torch.float32)
        config = getattr(trl, f"{NAMES[settings['method']]}Config")(
            **self.arguments(), disable_dropout=not settings["keep_dropout"]
        )
        began = time.perf_counter()
        trainer = self._trainer_class()(
            model=model,
            args=config,
            train_dataset=self._rows(),
            processing_class=AutoTokenizer.from_pretrained(settings["model"]),
            peft_config=self._adapter(),
            callbacks=[Rounds(self)],
        )
        self.built_in = time.perf_counter() - began
        if settings["lora"]:
            draw_adapter(trainer.model, settings["seed"])
        return trainer.model, trainer

    def _adapter(self):
        settings = self.settings
        if not settings["lora"]:
            return None
        import peft

        return peft.LoraConfig(
            r=settings["lora_r"], lora_alpha=2 * settings["lora_r"], lora_dropout=settings["lora_dropout"], bias="none",
            target_modules="all-linear",
            task_type="SEQ_CLS" if settings["method"] == "reward" else "CAUSAL_LM")  # fmt: skip

    def _rows(self):
        from datasets import Dataset, disable_caching, disable_progress_bars

        disable_caching()
        disable_progress_bars()
        rows = json.loads(Path(self.settings["rows_file"]).read_text(encoding="utf-8"))
        if not OURS:
            rows = [_for_upstream(row, self.settings["method"]) for row in rows]
        return Dataset.from_list(rows)

    def _trainer_class(self):
        base = getattr(trl, f"{NAMES[self.settings['method']]}Trainer")
        if OURS:
            return base

        class Prepared(base):
            def _prepare_dataset(self, dataset, *args, **kwargs):
                return dataset

        return Prepared

    def further_models(self) -> list:
        model = self._reference()
        return [] if model is None else [model]

    def _reference(self):
        """The reference, where it is a model of its own."""
        return getattr(self.trainer, "ref_model", None) or getattr(
            getattr(self.trainer, "reference", None), "model", None
        )

    def about(self) -> dict:
        return {"reference": "the model itself" if self._reference() is None else "a model of its own"}


def _for_upstream(row: dict, method: str) -> dict:
    if method == "reward":
        return {name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")}
    if method == "kto":
        return {"prompt_ids": row["prompt_ids"], "completion_ids": row["completion_ids"], "label": row["label"],
                "KL_completion_ids": row["kl_completion_ids"]}  # fmt: skip
    return {name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


def draw_adapter(model, seed: int) -> None:
    """The same new adapter on both sides, whatever was drawn before it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "lora_A" in name:
                bound = weight.shape[1] ** -0.5
                weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * bound)


def start(settings: dict, answers) -> None:
    Preference(settings, answers).run()


if __name__ == "__main__":
    converse(start)
