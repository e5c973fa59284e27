"""Binary classifier optimisation: good and bad completions told apart by a reward with a moving threshold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from trl.config import BaseConfig, PreferenceFields, ReferenceFields, RouterFields
from trl.data.batching import collate
from trl.data.batching.collate import Tree
from trl.engine.forest import Batch
from trl.engine.score import score
from trl.losses.tokens import Metric, mean_metric
from trl.models.unwrap import evaluating

from .kto import UnpairedTrainer, unpaired_batch
from .metrics import sums_device
from .step import Statistics, Step


@dataclass
class BCOConfig(PreferenceFields, ReferenceFields, RouterFields, BaseConfig):
    """Options of `BCOTrainer`, in addition to `transformers.TrainingArguments`."""

    learning_rate: float = field(default=5e-7, metadata={"help": "Initial learning rate of AdamW."})
    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout of the model to zero."})
    truncation_mode: str = field(
        default="keep_end",
        metadata={"help": "The end of a longer row that is kept.", "choices": ["keep_start", "keep_end"]},
    )
    beta: float = field(
        default=0.1, metadata={"help": "Scale of the log-ratios; larger keeps the policy closer to the reference."}
    )
    prompt_sample_size: int = field(
        default=1024,
        metadata={"help": "Prompts of each label that the density-ratio classifier is fitted on."},
    )
    min_density_ratio: float = field(default=0.5, metadata={"help": "Minimum weight of a bad completion's prompt."})
    max_density_ratio: float = field(default=10.0, metadata={"help": "Maximum weight of a bad completion's prompt."})


class BCOTrainer(UnpairedTrainer):
    """Trains a causal language model on labelled completions as a binary classifier does.

    The threshold (`delta`) is the mean of the rewards seen in training so far; each optimizer step adds its own before
    its first backward pass. With `embedding_func` (token ids and attention mask to one vector a prompt) bad completions
    are weighed by how likely their prompt would have a good one. Jung et al. 2024, arXiv:2404.04656.
    """

    config_class = BCOConfig
    method = "bco"
    loss_type = "bco"

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: BCOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        data_collator: Callable | None = None,
        # Three that have their place, and are refused by `compat`.
        model_init: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: Any = None,
        compute_metrics: Callable | None = None,
        model_adapter_name: None = None,
        ref_adapter_name: None = None,
        embedding_func: Callable | None = None,
        embedding_tokenizer: Any = None,
        *,
        compute_loss_func: Callable | None = None,
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        quantization_config: Any = None,
    ) -> None:
        self.embedding_func, self.embedding_tokenizer = embedding_func, embedding_tokenizer
        self.running = torch.zeros(2, dtype=torch.float64)  # the sum of all rewards so far, and their number
        self.classifier: Any = None
        super().__init__(
            model,
            ref_model,
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
        if self.embedding_func is not None:
            self.classifier = self._fit()

    @staticmethod
    def batch(rows: Sequence[Any], to_batch: Callable[[list[Tree]], Batch]) -> Batch:
        batch = unpaired_batch(rows, to_batch)
        batch["prompts"] = [list(rows[index]["prompt_ids"]) for index in collate.by_prompt(rows)]
        return batch

    def before_step(self, model: nn.Module, batches: list[Batch], training: bool) -> Statistics:
        sums = torch.zeros(2, dtype=torch.float64, device=sums_device(self.args.device))
        columns = []
        for batch in batches:
            moved = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                if self.reference.is_column:
                    ref_S = moved["ref_logp_S"]
                else:
                    ref_S = self.reference_values(moved, self.reference.ask(model))[:, 0]
                    columns.append({"ref_logp_S": ref_S})
                if training:
                    with evaluating(model):
                        policy_S = self.sequence_logp(score(model, moved))
                    reward_S = self.args.beta * (policy_S - ref_S.to(policy_S.device))
                    total = reward_S.to(sums.device).double().sum()
                    sums += torch.stack([total, sums.new_full((), float(len(reward_S)))])
        if training:
            if self.args.world_size > 1:
                torch.distributed.all_reduce(sums)
            # The sums stay where they are: nobody waits for the device.
            self.running = self.running.to(sums.device) + sums
        return Statistics({"delta": self.running[0] / self.running[1].clamp(min=1)}, columns)

    def settings(self, batch: Batch, policy_S: Tensor, step: Step) -> dict[str, Any]:
        return {
            "beta": self.args.beta,
            "reward_mean": step.shared["delta"].to(policy_S.device, policy_S.dtype),
            "weight_S": self._weights(batch, policy_S),
        }

    def further_metrics(self, step: Step) -> dict[str, Metric]:
        return {"delta": mean_metric(step.shared["delta"].to(self.args.device))}

    def method_state(self) -> dict[str, Any]:
        total, seen = self.running.tolist()
        return {**super().method_state(), "seen": seen, "mean_reward": total / max(seen, 1.0)}

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        seen = state.get("seen", 0.0)
        self.running = torch.tensor([state.get("mean_reward", 0.0) * seen, seen], dtype=torch.float64)

    # --- the distribution of prompts ------------------------------------------------------------------------------

    def _embed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """One vector a prompt, by the user's function on the embedding tokenizer's reading of its text."""
        assert self.embedding_func is not None
        reader = self.embedding_tokenizer or self.processing_class
        texts = self.processing_class.batch_decode(prompts, skip_special_tokens=True)
        inputs = reader(texts, padding=True, truncation=True, return_tensors="pt").to(self.args.device)
        with torch.no_grad():
            vectors = self.embedding_func(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return vectors.float()

    def _fit(self) -> Any:
        """Tells prompts of good completions from those of bad ones, on a sample of each."""
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise ImportError(
                "embedding_func weighs prompts, which needs the extra `bco`: pip install 'trl[bco]'"
            ) from error
        rows = self.train_dataset.shuffle(seed=self.args.seed)
        vectors, labels = [], []
        for label in (True, False):
            prompts = [row["prompt_ids"] for row in rows if row["label"] is label][: self.args.prompt_sample_size]
            if not prompts:
                raise ValueError(f"embedding_func compares good and bad rows, and no row has the label {label}")
            for start in range(0, len(prompts), self.args.train_batch_size):
                vectors.append(self._embed(prompts[start : start + self.args.train_batch_size]).cpu())
            labels += [label] * len(prompts)
        classifier = LogisticRegression(class_weight="balanced", random_state=self.args.seed)
        return classifier.fit(torch.cat(vectors).numpy(), labels)

    def _weights(self, batch: Batch, policy_S: Tensor) -> Tensor | None:
        if self.classifier is None or not len(policy_S):
            return None
        vectors = self._embed(batch["prompts"]).cpu().numpy()
        good = self.classifier.predict_proba(vectors)[:, list(self.classifier.classes_).index(True)]
        ratio = torch.as_tensor(good / (1 - good + 1e-8), device=policy_S.device, dtype=policy_S.dtype)
        ratio = ratio.clamp(self.args.min_density_ratio, self.args.max_density_ratio)
        return torch.where(batch["label_S"], torch.ones_like(ratio), ratio)
