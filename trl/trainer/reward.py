"""Reward models: a scalar for each completion, by which the better of two is told from the worse."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

from trl.config import BaseConfig, PreferenceFields
from trl.data.batching.collate import Tree
from trl.engine.forest import Batch
from trl.engine.scalar import scalars
from trl.losses.reward import bradley_terry, centring
from trl.losses.tokens import Metric, largest, mean_metric, smallest
from trl.models import load, vocabulary
from trl.models.unwrap import unwrap
from trl.notices import notify_once

from .dpo import pair_batch
from .preference import PreferenceTrainer
from .step import Step

ENDS_READ = 256  # rows that tell what texts end in


@dataclass
class RewardConfig(PreferenceFields, BaseConfig):
    """Options of `RewardTrainer`, in addition to `transformers.TrainingArguments`."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate of AdamW."})
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the model to zero."})
    chat_template_path: str | None = field(
        default=None, metadata={"help": "Chat template: a file, or a tokenizer's name or folder."}
    )
    center_rewards_coefficient: float | None = field(
        default=None, metadata={"help": "Weight of the squared sum of a pair's rewards (centres them); try 0.01."}
    )


class ScalarTrainer(PreferenceTrainer):
    """A trainer of models that score."""

    task_type = "SEQ_CLS"
    per_token, labels = False, 1

    def load_model(self, name: str, **kwargs: Any) -> Any:
        return load.load_scorer(name, per_token=self.per_token, num_labels=self.labels, **kwargs)

    def adapter_config(self, peft_config: Any) -> Any:
        """An adapter for a language model would leave the scoring head untrained."""
        if peft_config is None:
            return None
        if getattr(peft_config, "target_modules", None) == "all-linear" and peft_config.exclude_modules is None:
            peft_config.exclude_modules = ["score", "classifier"]  # the head is trained in full
        if peft_config.task_type == self.task_type:
            return peft_config
        notify_once(f"the adapter's task_type is {self.task_type} here, so that the scoring head trains and is saved")
        peft_config.task_type = self.task_type
        return peft_config

    numbers_of_sequences = "scores"

    def sums_of_sequences(self, model: nn.Module, batch: Batch) -> Tensor:
        scores_N = scalars(model, batch).sum(-1)
        return scores_N.new_zeros(batch["row_S"].shape[0]).index_add(0, batch["seq_N"], scores_N)


class RewardTrainer(ScalarTrainer):
    """Trains a model with a scoring head (`AutoModelForSequenceClassification`) on pairs, by Bradley and Terry's model.

    A model given by name gets such a head if it has none. Under each prompt the two completions share it. Ouyang et
    al. 2022, arXiv:2203.02155; a column `margin` is taken off the difference (Llama 2, arXiv:2307.09288).
    """

    config_class = RewardConfig
    method = "reward"

    def __init__(
        self,
        model: Any,
        args: RewardConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        compute_loss_func: Callable | None = None,
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

    def on_ready(self) -> None:
        self._pad_apart()
        # Code that scores with this model later reads the end of turn too, even where it serves as padding.
        unwrap(self.model).config.scores_end_of_turn = True

    def _pad_apart(self) -> None:
        """Pad with a token that ends no text. transformers scores a text at its last token that is not padding; if the
        end of text were padding, it would read the token before the one that is trained."""
        tokenizer, base = self.processing_class, unwrap(self.model)
        ends = {tokenizer.eos_token_id}
        if isinstance(self.train_dataset, Dataset):
            some = self.train_dataset[:ENDS_READ]
            ends |= {ids[-1] for name in ("chosen_ids", "rejected_ids") for ids in some.get(name, ()) if ids}
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
            token = vocabulary.padding_token(tokenizer, ends, base.config.get_text_config().vocab_size)
            if token is None:
                notify_once(
                    f"{tokenizer.pad_token!r} is both padding and the end of a text, so that transformers reads the "
                    "score of the saved model one token before its end. The tokenizer has no other token to pad with: "
                    "tokenizer.add_special_tokens({'pad_token': '<|pad|>'}), then "
                    "model.resize_token_embeddings(len(tokenizer))"
                )
                return
            notify_once(
                f"padding is {token!r} in the saved tokenizer and model: texts end in {tokenizer.pad_token!r}, and "
                "transformers reads a score at the last token that is not padding"
            )
            tokenizer.pad_token = token
        base.config.pad_token_id = base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self.attachment.pad_id = tokenizer.pad_token_id

    @staticmethod
    def batch(rows: Sequence[Any], to_batch: Callable[[list[Tree]], Batch]) -> Batch:
        # The hidden state of the last token is what is scored.
        return pair_batch(rows, to_batch, trained=lambda ids: [place == len(ids) - 1 for place in range(len(ids))])

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"pairs": batch["row_S"].shape[0] // 2}

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        reward_S = scalars(model, batch)[:, 0]
        chosen_P, rejected_P = reward_S.view(-1, 2).unbind(1)
        loss_P = bradley_terry(chosen_reward_P=chosen_P, rejected_reward_P=rejected_P, margin_P=batch.get("margin_P"))
        weight = self.args.center_rewards_coefficient
        if weight is not None:
            loss_P = loss_P + centring(
                chosen_reward_P=chosen_P, rejected_reward_P=rejected_P, center_rewards_coefficient=weight
            )
        rewards = reward_S.detach()
        metrics = {
            "accuracy": mean_metric((chosen_P > rejected_P).float()),
            "margin": mean_metric(chosen_P - rejected_P),
            "mean_reward": mean_metric(rewards),
            "min_reward": smallest(rewards),
            "max_reward": largest(rewards),
        }
        return {"pairs": loss_P.sum()}, metrics
