"""Process reward models: whether each step of a solution is right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from trl.config import BaseConfig, PreferenceFields
from trl.data.batching.collate import Branch, Tree
from trl.engine.forest import Batch, trained
from trl.engine.scalar import scalars
from trl.losses.reward import step_cross_entropy
from trl.losses.tokens import Metric, mean_metric

from .reward import ScalarTrainer
from .step import Step


@dataclass
class PRMConfig(PreferenceFields, BaseConfig):
    """Options of `PRMTrainer`, in addition to `transformers.TrainingArguments`."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Initial learning rate of AdamW."})
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the model to zero."})
    step_separator: str = field(default="\n", metadata={"help": "Separator of steps; its last token is classified."})
    train_on_last_step_only: bool = field(
        default=False, metadata={"help": "Train only on the label of the last step (evaluation uses all steps)."}
    )


class PRMTrainer(ScalarTrainer):
    """Trains a model that classifies tokens (`AutoModelForTokenClassification`, two labels) on the steps of solutions.

    Rows have a prompt, the steps (`completions`) and whether each is right (`labels`). Uesato et al. 2022,
    arXiv:2211.14275; Lightman et al. 2023, arXiv:2305.20050.
    """

    config_class = PRMConfig
    method = "prm"
    kind = "steps"
    prepared_columns = frozenset({"prompt_ids", "completion_ids", "step_mask", "step_labels", "row"})
    task_type = "TOKEN_CLS"
    per_token, labels = True, 2

    def __init__(
        self,
        model: Any,
        args: PRMConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: None = None,  # it has its place, and is refused by `compat`
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: Any = None,
        *,
        compute_loss_func: Callable | None = None,
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        quantization_config: Any = None,
    ) -> None:
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )

    def row_options(self, name: str) -> dict[str, Any]:
        last = self.args.train_on_last_step_only and name.startswith("train")
        return {"step_separator": self.args.step_separator, "train_on_last_step_only": last}

    @staticmethod
    def batch(rows: Sequence[Any], to_batch: Callable[[list[Tree]], Batch]) -> Batch:
        trees = [
            Tree(
                Branch(row["prompt_ids"], [False] * len(row["prompt_ids"])),
                (Branch(row["completion_ids"], row["step_mask"]),),
                int(row["row"]),
            )
            for row in rows
        ]
        batch = to_batch(trees)
        batch["label_N"] = torch.tensor([label for row in rows for label in row["step_labels"]], dtype=torch.long)
        return batch

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"steps": trained(batch)}

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        logits_NC, label_N = scalars(model, batch), batch["label_N"]
        loss_N = step_cross_entropy(logits_NC=logits_NC, label_N=label_N)
        return {"steps": loss_N.sum()}, {"accuracy": mean_metric((logits_NC.argmax(-1) == label_N).float())}
