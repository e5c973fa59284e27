"""Supervised fine-tuning in a loop of one's own: `step` on texts or token ids, as they come."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from trl.data.batching.collate import trained_mask
from trl.models.vocabulary import vocabulary_size

from .own_loop import OwnLoop
from .queries import check_lengths, listed, strings, token_rows
from .sft import SFTConfig, SFTTrainer

WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")


@dataclass
class IterativeSFTConfig(SFTConfig):
    """Options of `IterativeSFTTrainer`, in addition to those of `SFTConfig`."""

    learning_rate: float = field(default=5e-5, metadata={"help": "Initial learning rate of AdamW."})
    truncation_mode: str = field(
        default="keep_end",
        metadata={"help": "The end of a longer row that is kept.", "choices": ["keep_start", "keep_end"]},
    )
    optimize_device_cache: bool = field(
        default=False, metadata={"help": "Empty the accelerator's cache after each call of step: less memory, slower."}
    )


class IterativeSFTTrainer(SFTTrainer):
    """`SFTTrainer` for a loop of one's own: `step(texts=...)` or `step(input_ids=...)` trains on what it is given.

    A call takes an optimizer step for each `per_device_train_batch_size * gradient_accumulation_steps` of its rows, in
    an order drawn from the seed. Its loss and gradient are those of `SFTTrainer` on the same rows.
    """

    config_class = IterativeSFTConfig
    method = "iterative-sft"

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Callable | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        compute_metrics: Callable | None = None,
        **further: Any,
    ) -> None:
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            **further,
        )
        schedule = getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type)
        if self.args.max_steps < 1 and optimizers[1] is None and schedule not in WITHOUT_END:
            if schedule != "linear":
                raise ValueError(
                    f"lr_scheduler_type={schedule!r} needs max_steps: the loop's end is not known otherwise"
                )
            self.args.lr_scheduler_type = "constant"  # linear is the default of transformers
        self.loop = OwnLoop(self)
        self.calls = 0
        self._losses: list[float] = []  # of the steps since the last log line

    def step(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        labels: Any = None,
        texts: Any = None,
        texts_labels: Any = None,
    ) -> dict[str, float]:
        """Train on rows: every row once.

        Args:
            input_ids: 1-D tensors of token ids, in a list.
            attention_mask: for each of them a tensor of its length, 0 at padding.
            labels: for each of them the token ids again, -100 where no loss is taken. Default: all are trained.
            texts: texts in place of `input_ids`, trained as they stand: no end-of-sequence token is added.
            texts_labels: for each text the end of it that is trained. Default: the whole text.

        With several processes each gives rows of its own, as many as it has: one may have none.

        Returns the mean `loss` of the optimizer steps (over all processes), the last one's `grad_norm`,
        `learning_rate`, and `steps`, how many were taken. Raises ValueError, before anything is changed, for input that
        does not fit.
        """
        error, rows = None, []
        try:
            rows = self._given(input_ids, attention_mask, labels, texts, texts_labels)
        except ValueError as found:
            error = str(found)
        several = self.args.world_size > 1  # all of which go on, or none
        known = gather_object([(error, len(rows))]) if several else [(error, len(rows))]
        if error := next((each for each, _ in known if each), None):
            raise ValueError(error)
        if not any(count for _, count in known):
            raise ValueError(f"{'input_ids' if texts is None else 'texts'} is empty: there is nothing to train on")
        # Processes may have different numbers of rows, but they call the model equally often.
        most, size = max(count for _, count in known), self.args.per_device_train_batch_size
        of_a_step = size * self.args.gradient_accumulation_steps
        order = np.random.default_rng((self.args.seed, self.args.process_index, self.calls)).permutation(len(rows))
        self.calls += 1
        losses: list[float] = []
        for first in range(0, most, of_a_step):
            starts = range(first, min(first + of_a_step, most), size)
            groups = [[rows[at] for at in order[start : start + size]] for start in starts]
            loss = torch.tensor(self.loop.step(functools.partial(self._backward, groups=groups)))
            if several:
                loss = self.accelerator.reduce(loss.to(self.args.device), "mean")
            losses.append(float(loss))
            self._after_step(losses[-1])
        if self.args.optimize_device_cache and self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        return {
            "loss": float(np.mean(losses)),
            "grad_norm": self.grad_norm,
            "learning_rate": self.loop.learning_rate,
            "steps": len(losses),
        }

    def _backward(self, model: nn.Module, groups: list[list[dict[str, Any]]]) -> Tensor:
        """The backward passes of an optimizer step, a micro-batch for each group. Its loss: scalar."""
        made = iter([self._collate(group) for group in groups])
        batches, items = self.get_batch_samples(made, len(groups), self.args.device)
        total = torch.zeros((), device=self.args.device)
        for left, batch in zip(range(len(batches))[::-1], batches, strict=True):
            self.accelerator.sync_gradients = not left
            with nullcontext() if not left else self.accelerator.no_sync(model):
                total += self.training_step(model, batch, items)
        self.under_way = None
        return total

    def _after_step(self, loss: float) -> None:
        args, done = self.args, self.state.global_step
        self._losses.append(loss)
        if args.logging_steps >= 1 and done % int(args.logging_steps) == 0:
            self.log({"loss": float(np.mean(self._losses)), "grad_norm": self.grad_norm,
                      "learning_rate": self.loop.learning_rate})  # fmt: skip
            self._losses = []
        if self.eval_dataset is not None and args.eval_steps and done % int(args.eval_steps) == 0:
            self.evaluate()

    def _given(
        self, input_ids: Any, attention_mask: Any, labels: Any, texts: Any, texts_labels: Any
    ) -> list[dict[str, Any]]:
        """The rows of a step, as `SFTTrainer` has them once they are tokenised."""
        if (input_ids is None) == (texts is None):
            raise ValueError("step takes input_ids or texts: " + ("neither is given" if texts is None else "not both"))
        if texts is None:
            if texts_labels is not None:
                raise ValueError("texts_labels belongs to texts; with input_ids, give labels")
            found = self._of_ids(input_ids, attention_mask, labels)
        else:
            if attention_mask is not None or labels is not None:
                raise ValueError("attention_mask and labels belong to input_ids; with texts, give texts_labels")
            found = self._of_texts(texts, texts_labels)
        window = self.args.max_length or self.window()
        cuts_the_end = self.args.truncation_mode == "keep_start"
        keep = slice(None) if window is None else slice(window) if cuts_the_end else slice(-window, None)
        rows = []
        for place, (ids, mask) in enumerate(found):
            ids, mask = ids[keep], mask[keep]
            if not any(mask[1:]):
                raise ValueError(
                    f"row {place} has no trained token (of {len(ids)}, after cutting to max_length): the first token "
                    "of a row is predicted from nothing, and one after it must have a label"
                )
            rows.append({"input_ids": ids, "loss_mask": mask, "row": place})
        return rows

    def _of_ids(self, input_ids: Any, attention_mask: Any, labels: Any) -> list[tuple[list[int], list[bool]]]:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        ids, *others = ([] if each is None else listed(each, name) for name, each in given.items())
        columns = {"input_ids": token_rows(ids, "input_ids", None, vocabulary_size(self.model))}
        for (name, each), values in zip(list(given.items())[1:], others, strict=True):
            if each is not None:
                columns[name] = token_rows(values, name, None)
                check_lengths(columns["input_ids"], columns[name], name)
        found = []
        for place, row in enumerate(columns["input_ids"]):
            mine = columns["labels"][place] if "labels" in columns else row
            keep = columns["attention_mask"][place] if "attention_mask" in columns else [1] * len(row)
            kept = [token for token, there in zip(row, keep, strict=True) if there]
            own = [label for label, there in zip(mine, keep, strict=True) if there]
            found.append((kept, trained_mask({"input_ids": kept, "labels": own, "row": place})))
        return found

    def _of_texts(self, texts: Any, texts_labels: Any) -> list[tuple[list[int], list[bool]]]:
        texts = strings(texts, "texts")
        ends = texts if texts_labels is None else strings(texts_labels, "texts_labels")
        if len(ends) != len(texts):
            raise ValueError(f"texts_labels: here are {len(ends)} for {len(texts)} texts")
        found: list[Any] = []
        for place, (text, end) in enumerate(zip(texts, ends, strict=True)):
            if not text.endswith(end):
                raise ValueError(
                    f"texts_labels {place} is not the end of its text: a causal model is trained on the text"
                )
            if end == text:
                ids = self.processing_class(text)["input_ids"]
                found.append((ids, [True] * len(ids)))
                continue
            if not self.processing_class.is_fast:
                raise ValueError("texts_labels needs a fast tokenizer, which knows where tokens stand: give input_ids")
            made = self.processing_class(text, return_offsets_mapping=True)
            begins = len(text) - len(end)
            found.append((made["input_ids"], [stop > begins for _, stop in made["offset_mapping"]]))
        return found

    def train(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("this trainer is for a loop of your own: step(texts=...). SFTTrainer has train()")
