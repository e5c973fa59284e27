"""What the methods on judged completions share: how rows are read, and the reference model."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets import IterableDataset as Stream
from torch import Tensor, nn
from transformers import TrainerCallback

from trl.data.mixture import prepare
from trl.data.report import DataReport
from trl.data.tokenizing.comparisons import Preferences
from trl.engine.forest import Batch
from trl.engine.head import TokenStats
from trl.losses.tokens import seq_sum
from trl.models import shards
from trl.models.unwrap import evaluating
from trl.notices import notify_once
from trl.rollout.generate import stop_ids

from .attributes import shows
from .base import BaseTrainer
from .reference import ReferencePolicy

# Collators of upstream and transformers that do nothing but pad what is prepared here.
PADDING_COLLATORS = (
    *("DataCollatorForPreference", "DataCollatorForUnpairedPreference", "DPODataCollatorWithPadding"),
    *("RewardDataCollatorWithPadding", "DataCollatorWithPadding", "DataCollatorForPairs"),
)
ANSWERED, LONGEST_ANSWER = 8, 128  # prompts answered at an evaluation, and tokens of an answer


class PreferenceTrainer(BaseTrainer):
    """A trainer on rows of prompts and judged completions."""

    takes_grids = False

    def _users_collator(self, collator: Callable | None) -> Callable | None:
        if collator is None:
            return None
        if type(collator).__name__ in PADDING_COLLATORS:
            length = getattr(collator, "max_length", None)
            if length is not None and length != self.args.max_length:
                raise ValueError(
                    f"{type(collator).__name__} has max_length={length}: rows are cut when they are prepared; set "
                    f"max_length={length} in {type(self.args).__name__} and leave the collator out"
                )
            notify_once(f"{type(collator).__name__} is left out: it pads, and batches are laid out without it here")
            return None
        raise ValueError(
            f"{type(self).__name__} lays its batches out itself, prompts with their completions under them, which a "
            "data_collator cannot do: leave it out. What becomes of a row is changed in the data set, or by a subclass "
            "that overrides `batch`"
        )

    kind = "pairs"  # how rows are read: `kind` of `Preferences`
    prepared_columns = frozenset({"prompt_ids", "chosen_ids", "rejected_ids", "row"})

    def rows(self, dataset: Any, name: str) -> tuple[Dataset | Stream, DataReport]:
        args = self.args
        options = {
            "kind": self.kind,
            "columns": args.columns,
            "skip_bad_rows": args.skip_bad_rows,
            "max_length": args.max_length or self.window(),
            "max_prompt_length": args.max_prompt_length,
            "max_completion_length": args.max_completion_length,
            "truncation_mode": args.truncation_mode,
            **self.row_options(name),
        }
        return prepare(Preferences(**options), dataset, self.processing_class, name, args.dataset_num_proc)

    def row_options(self, name: str) -> dict[str, Any]:
        """What the method adds to the options of `Preferences`."""
        return {}

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        if getattr(self.args, "generate_during_eval", False):
            self._write_answers(dataloader.dataset)
        return output

    def _write_answers(self, dataset: Any) -> None:
        """Write the model's answers to a few prompts of the data, as JSON lines in the output folder."""
        prompts = [row["prompt_ids"] for row in islice(dataset, ANSWERED)]
        writes, model = self.is_world_process_zero(), self.accelerator.unwrap_model(self.model)
        # Sharded weights are gathered by all ranks: each of them answers, and the first one writes.
        if not prompts or not (writes or shards.is_sharded(model)):
            return
        tokenizer = self.processing_class
        width = max(map(len, prompts))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.no_grad(), evaluating(model), self.compute_loss_context_manager():
            tokens = model.generate(
                input_ids=ids.to(self.args.device),
                attention_mask=mask.to(self.args.device),
                max_new_tokens=self.args.max_completion_length or LONGEST_ANSWER,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=sorted(stop_ids(model, tokenizer)) or None,
            )
        if not writes:
            return
        answers = tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
        path = Path(self.args.output_dir) / "answers" / f"step-{self.state.global_step}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for prompt, answer in zip(prompts, answers, strict=True):
                line = {"prompt": tokenizer.decode(prompt, skip_special_tokens=True), "answer": answer}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(f"trl: answers to {len(prompts)} evaluation prompts: {path}", flush=True)


class ReferenceFreeTrainer(PreferenceTrainer):
    """A preference trainer on pairs that compares the policy with nothing."""

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: None = None,  # it has its place, and is refused by `compat`
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: Any = None,
        compute_metrics: Callable | None = None,
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


@shows("beta", fixed=("precompute_ref_log_probs",), precompute_ref_logps="precompute_ref_log_probs")
class ReferencedTrainer(PreferenceTrainer):
    """A preference trainer that compares the policy with a reference.

    A method names the columns of the data that may hold the reference's log-probs, `ref_columns`, and computes them of
    a batch in `reference_values`.
    """

    ref_columns: tuple[str, ...]

    def __init__(
        self,
        model: Any,
        ref_model: str | nn.Module | None = None,
        args: Any = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        compute_loss_func: Callable | None = None,
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
    ) -> None:
        self.reference = ReferencePolicy(
            ref_model,
            model,
            is_needed=self.needs_reference,
            columns=lambda: self.ref_columns,
            values=self.reference_values,
            options=self.reference_options,
        )
        self.components = (self.reference,)
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

    def needs_reference(self) -> bool:
        return True

    def reference_values(self, batch: Batch, score: Callable[[Batch], TokenStats]) -> Tensor:
        """The reference's log-probs of each row of a batch in the order of `ref_columns`, [rows, columns]."""
        raise NotImplementedError

    def reference_options(self) -> Any:
        """Settings of the method that change `reference_values`."""
        return ()

    def sequence_logp(self, stats: TokenStats) -> Tensor:
        """The log-prob of each completion: [S]."""
        return seq_sum(stats.logp_N, stats.seq_N, stats.sequences)

    def compute_ref_log_probs(self, inputs: Batch) -> tuple[Tensor, ...]:
        """The reference's log-probs of the rows of a batch (one of this trainer's dataloaders), a tensor for each of
        `ref_columns`."""
        return self.reference.log_probs(self, inputs)
