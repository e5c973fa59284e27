"""Supervised fine-tuning: the log-likelihood of the tokens that the data marks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import TrainerCallback

from trl.config import BaseConfig, RouterFields, SequenceFields
from trl.data.batching import collate
from trl.data.batching.collate import Tree
from trl.data.batching.packing import STRATEGIES, packed, strategy_of
from trl.data.mixture import is_stream, prepare
from trl.data.report import DataReport
from trl.data.tokenizing.sequences import Sequences
from trl.engine.forest import Batch, trained
from trl.engine.score import score
from trl.losses.sft import LOSSES, label_smoothing
from trl.losses.tokens import Metric, mean_metric

from .attributes import shows
from .base import BaseTrainer
from .step import Step


@dataclass
class SFTConfig(SequenceFields, RouterFields, BaseConfig):
    """Options of `SFTTrainer`, in addition to `transformers.TrainingArguments`."""

    learning_rate: float = field(default=2e-5, metadata={"help": "Initial learning rate of AdamW."})
    dataset_text_field: str = field(default="text", metadata={"help": "Column that holds the text or the messages."})
    completion_only_loss: bool | None = field(
        default=None, metadata={"help": "Train only on the completion. Default: if rows have a prompt."}
    )
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "Train only on the assistant's turns; works with any chat template."}
    )
    loss_type: str = field(default="nll", metadata={"help": "Loss of each token.", "choices": sorted(LOSSES)})
    shuffle_dataset: bool = field(
        default=False, metadata={"help": "Shuffle the rows once before preprocessing (epochs are shuffled anyway)."}
    )
    packing: bool = field(
        default=False, metadata={"help": "Pack several rows into one of max_length tokens, with separate attention."}
    )
    packing_strategy: str = field(
        default="bfd",
        metadata={"help": "How rows are grouped, and what happens to longer ones.", "choices": list(STRATEGIES)},
    )
    eval_packing: bool | None = field(default=None, metadata={"help": "Pack evaluation rows too. Default: packing."})
    padding_free: bool = field(default=False, metadata={"help": "No effect: flat rows are never padded."})
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata={"help": "No effect: flat rows are not padded, others are as wide as the longest."}
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "Chat template: a file, or a tokenizer's name or folder."},
    )
    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": '{"skip_prepare_dataset": true} leaves rows unprepared, for your own data_collator.'},
    )

    _VALID_DICT_FIELDS = [*BaseConfig._VALID_DICT_FIELDS, "dataset_kwargs"]

    def __post_init__(self) -> None:
        if self.loss_type not in LOSSES:
            raise ValueError(f"loss_type={self.loss_type!r} is not one of {', '.join(LOSSES)}")
        self.packing_strategy = strategy_of(self.packing_strategy)
        super().__post_init__()


@shows("loss_type", fixed=("padding_free", "completion_only_loss"))
class SFTTrainer(BaseTrainer):
    """Trains a causal language model on texts, conversations or prompt–completion pairs.

    `model` is a name, a folder (an adapter's too), a `PreTrainedModel` or a `PeftModel`; data sets are lists of rows,
    paths, `datasets` objects, or (for evaluation) a dictionary of them. The rest as in `transformers.Trainer`.
    """

    config_class = SFTConfig
    method = "sft"
    recipe: type[Sequences] = Sequences  # how rows become tokens and masks

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable | None = None,
    ) -> None:
        self.formatting_func = formatting_func
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

    def rows(self, dataset: Any, name: str) -> tuple[Dataset | IterableDataset, DataReport]:
        args = self.args
        training = name.startswith("train")
        packs = args.packing if training or args.eval_packing is None else args.eval_packing
        window = args.max_length or self.window()
        if packs and window is None:
            raise ValueError("packing needs max_length: neither the model nor the tokenizer says how long a row may be")
        if packs and is_stream(dataset):
            raise ValueError("packing looks at all rows at once, which a stream does not have: load the data set whole")
        recipe = self.recipe(
            columns=args.columns,
            skip_bad_rows=args.skip_bad_rows,
            text_field=args.dataset_text_field,
            formatting_func=self.formatting_func,
            # A strategy that splits rows needs them whole.
            max_length=None if packs and args.packing_strategy != "bfd" else window,
            truncation_mode=args.truncation_mode,
            completion_only_loss=args.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss,
        )
        rows, report = prepare(recipe, dataset, self.processing_class, name, args.dataset_num_proc)
        if args.shuffle_dataset:
            rows = rows.shuffle(seed=args.seed)
        if packs:
            assert window is not None
            rows, report.packing = packed(rows, window, args.packing_strategy, args.seed, args.dataset_num_proc, name)
        return rows, report

    @staticmethod
    def batch(rows: Sequence[Any], to_batch: Callable[[list[Tree]], Batch]) -> Batch:
        return to_batch(collate.sequences(rows))

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        args, smoothing = self.args, self.args.label_smoothing_factor
        balance = self.router_aux_loss_coef
        stats = score(
            model,
            batch,
            entropy=True,
            top1=True,
            mean_logp=smoothing > 0,
            embedding_noise=args.neftune_noise_alpha if model.training else None,
            router=balance > 0,
        )
        assert stats.entropy_N is not None and stats.top1_N is not None
        loss_N = LOSSES[args.loss_type](logp_N=stats.logp_N)
        if stats.mean_logp_N is not None:
            loss_N = label_smoothing(loss_N, mean_logp_N=stats.mean_logp_N, label_smoothing_factor=smoothing)
        total = loss_N.sum()
        metrics = {"entropy": mean_metric(stats.entropy_N), "mean_token_accuracy": mean_metric(stats.top1_N)}
        if stats.aux is not None:
            # A mean over this batch's tokens, so it weighs by them in the step's mean.
            total = total + balance * stats.aux * trained(batch)
            metrics["aux_loss"] = mean_metric(stats.aux)
        return {"tokens": total}, metrics
