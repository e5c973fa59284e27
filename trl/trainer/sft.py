"""Supervised fine-tuning: the log-likelihood of the tokens that the data marks."""

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from torch import Tensor, nn

from trl.config import BaseConfig, SequenceFields
from trl.data import collate
from trl.data.report import DataReport
from trl.data.tokens import prepare
from trl.engine.forest import Batch
from trl.engine.score import score
from trl.losses.sft import LOSSES
from trl.losses.tokens import Metric, mean

from .base import BaseTrainer


@dataclass
class SFTConfig(SequenceFields, BaseConfig):
    """What can be set for `SFTTrainer`, beside all of `transformers.TrainingArguments`."""

    learning_rate: float = field(default=2e-5, metadata={"help": "Initial learning rate of AdamW."})
    dataset_text_field: str = field(default="text", metadata={"help": "Column that holds the text or the messages."})
    completion_only_loss: bool | None = field(
        default=None, metadata={"help": "Train on the completion alone. Default: where rows have a prompt."}
    )
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "Train on the assistant's turns alone, whatever the chat template."}
    )
    loss_type: str = field(default="nll", metadata={"help": "Loss of each token.", "choices": sorted(LOSSES)})

    def __post_init__(self) -> None:
        if self.loss_type not in LOSSES:
            raise ValueError(f"loss_type={self.loss_type!r} is not one of {', '.join(LOSSES)}")
        super().__post_init__()


class SFTTrainer(BaseTrainer):
    """Trains a causal language model on texts, conversations or prompt–completion pairs.

    `model` is a name, a folder (an adapter's too), a `PreTrainedModel` or a `PeftModel`; data sets are lists of rows,
    paths, `datasets` objects, or (for evaluation) a dictionary of them. The rest as in `transformers.Trainer`.
    """

    config_class = SFTConfig
    method = "sft"
    trees = staticmethod(collate.sequences)

    def rows(self, dataset: Any, name: str) -> tuple[Dataset, DataReport]:
        args = self.args
        return prepare(
            dataset,
            self.processing_class,
            text_field=args.dataset_text_field,
            max_length=args.max_length or self.window(),
            truncation_mode=args.truncation_mode,
            completion_only_loss=args.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss,
            num_proc=args.dataset_num_proc,
            name=name,
        )

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Metric]]:
        stats = score(model, batch, entropy=True, top1=True)
        loss_N = LOSSES[self.args.loss_type](logp_N=stats.logp_N)
        assert stats.entropy_N is not None and stats.top1_N is not None
        return loss_N.sum(), {"entropy": mean(stats.entropy_N), "mean_token_accuracy": mean(stats.top1_N)}
