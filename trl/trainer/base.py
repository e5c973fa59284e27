"""What every method shares, and every place where `transformers.Trainer` is touched.

What a method supplies is in `method.py`. Everything else is here, once, or in a module that is called from here.

Hooks of `transformers.Trainer` (5.17 to 5.23) that are overridden, and why:

    _get_dataloader     the order of rows is a pure function of (seed, epoch), equal on all ranks, with nothing repeated
                        at the end of an epoch. Goes when accelerate shards without repeating rows.
    _run_epoch          takes no step where all steps are done: max_steps=0, or a finished run that is resumed
    get_batch_samples   counts the trained items of the whole optimizer step on all ranks, and takes what statistics a
                        method needs of it, before its first backward pass
    compute_loss        divides by those counts: any split of the same rows gives the same gradient
    _prepare_input      moves what a batch holds and casts nothing: sums of log-probs need fp32
    create_optimizer    steps in float32 on weights that are kept in bfloat16
    training_step       keeps saved activations on the host where that is asked for, brings an overridden `compute_loss`
                        to the step's scale, and takes a step again that ran out of memory
    floating_point_ops, _track_num_input_tokens    of all micro-batches that a call of `training_step` had
    compute_loss_context_manager    autocast around whatever a loss runs, and half precision on a CPU without
                        instructions for it
    prediction_step, evaluation_loop    evaluation as sums and counts; no logits are kept
    _get_grad_norm      a loss or gradient that is not finite stops the run before the weights are touched
    log                 adds the metrics: one collective a log step
    _save_checkpoint    written aside, synced, renamed; keeps what `Trainer` forgets between logs
    save_model          leaves the reference's adapter out, and writes the model card beside the weights
    _load_from_checkpoint   also an adapter that transformers put into the model itself
    train               resolves the checkpoint to resume from, prints the report before step 1, and has a model
                        wrapped that was evaluated before
"""

import contextlib
import copy
import inspect
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import set_seed

from trl import checkpoint
from trl.compat.arguments import Adoptable
from trl.config import BaseConfig
from trl.data.report import DataReport
from trl.engine import linear
from trl.engine.forest import Batch, computed, gridded, moved, relabelled
from trl.engine.probe import attach
from trl.losses.tokens import Metric
from trl.models import adapters, low_bits, offload, saving, vocabulary
from trl.models.unwrap import unwrap
from trl.notices import notify_once
from trl.options import check_trackers, unused_by_trainer

from . import construct, evaluation, overrides, progress, report, resume
from .budget import Budget, as_list, as_slots
from .card import write_card
from .loader import IN_ITS_OWN_ORDER, Collate, batches_of, check_order, prepared, row_loader, stream_loader
from .method import Method
from .metrics import Totals, gather_rows
from .nonfinite import NonFiniteError, what_is_not_finite
from .step import Step, counts_of_all


class BaseTrainer(Adoptable, Method, Trainer):
    """A `transformers.Trainer` whose batches are forests and whose losses are sums over trained items."""

    train_dataset: Any
    eval_dataset: Any
    # Our losses are divided by the items of the whole optimizer step: `Trainer` must not divide them again.
    loss_is_scaled_for_ga = True
    own_weight = overrides.ROWS  # what the value of the user's own loss is a mean over
    calls_ours = True  # whether an overridden `compute_loss` goes through ours
    mode = "train"  # or "eval": whose metrics `compute_loss` adds to
    reference: Any = None  # a `ReferencePolicy`, where the method compares with one

    # --- construction ---------------------------------------------------------------------------------------------

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: BaseConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
            args = self.config_class(output_dir=f"{Path(name or 'model').name}-{self.method.upper()}")
        check_trackers(args)
        given = {"eval_dataset": eval_dataset, "compute_metrics": compute_metrics,
                 "embedding_func": getattr(self, "embedding_func", None)}  # fmt: skip
        for sentence in unused_by_trainer(args, given):
            notify_once(sentence)
        model, self.processing_class = construct.opened(
            model, args, processing_class, quantization_config, peft_config, self.load_model
        )
        self._without_row = vocabulary.tokens_without_row(model, self.processing_class)
        model = construct.ready_to_train(model, args, self.adapter_config(peft_config))

        self.args, self.model = args, model
        data_collator = self._users_collator(data_collator)
        options = getattr(args, "dataset_kwargs", None) or {}
        if set(options) - {"skip_prepare_dataset"}:
            raise ValueError(f"dataset_kwargs understands skip_prepare_dataset alone, not {', '.join(options)}")
        # Rows for a collator of the user's own are left as they are. Tokenised rows need no skipping: they are seen to
        # be such.
        self._users_rows = bool(options.get("skip_prepare_dataset")) and data_collator is not None
        self.reports: dict[str, DataReport] = {}
        self.prepared_streams: list[Any] = []  # a stream's columns do not tell that it is prepared
        train_dataset = self._prepared(train_dataset, "train")
        eval_dataset = self._prepared(eval_dataset, "eval")
        if (args.gradient_checkpointing_kwargs or {}).get("selective"):
            offload.understand_selective(unwrap(model))
        check_order(args.train_sampling_strategy, self.takes_lengths, type(self).__name__)
        self._collate = Collate(self.batch, data_collator, args.share_prompt, raw=self._users_rows)
        self._collate.tokens_without_row = self._without_row
        self.budget = Budget()
        self.components = (*self.components, self.budget)

        super().__init__(
            model=model,
            args=args,
            data_collator=self._collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            callbacks=[resume.BeforeTraining(self), *(callbacks or [])],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.progress = progress.install(self)
        construct.configure_sharding(self.accelerator, args)
        self.model_accepts_loss_kwargs = True  # read instead of `loss_is_scaled_for_ga` up to transformers 5.20
        # The engine adds the noise of NEFTune by the length of each sequence; the hook of `Trainer` knows rows alone.
        self.neftune_noise_alpha = None
        overrides.check_optimizer(self.optimizer, model)
        self.attachment = self._collate.attachment = attach(model, self.compute_loss_context_manager)
        self._collate.labels = overrides.reads_batches(self) is not None
        construct.spare_search(self)
        self._sums = {"train": Totals(), "eval": Totals()}
        self._tokens_seen = 0  # of this rank, over the whole run
        self._distinct = self._positions = 0  # tokens and computed positions of this call of `train`, on this rank
        self.under_way: Step | None = None  # the optimizer step under way, or the evaluation's batch
        self._of_evaluation: dict[str, Any] = {}  # what `before_evaluation` found
        self._between_logs: dict[str, Any] | None = None
        self._run: dict[str, str | None] = {}  # what tells it from others, and when it was begun
        self._started = 0.0
        for each in self.components:
            each.on_ready(self)
        self.on_ready()
        self._compiled_parts = construct.compiled(model, self.accelerator)

    def _users_collator(self, collator: Callable | None) -> Callable | None:
        """A data collator of the user's own, or an error that says what to do instead."""
        if collator is not None and getattr(self.args, "packing", False):
            raise ValueError(
                "packing makes rows of several samples, which a data_collator of your own cannot tell apart"
            )
        return collator

    @property
    def data_collator(self) -> Collate:
        return self._collate

    @data_collator.setter
    def data_collator(self, collator: Any) -> None:
        """Also set once the trainer is made, as scripts do that put other labels into the rows."""
        if collator is not self._collate:
            self._collate.users = self._users_collator(collator)

    def _check_what_users_made(self, loader: DataLoader | None) -> None:
        """What is known of a loader and an optimizer of the user's own only when training begins."""
        sentence = overrides.sharding_notice(loader, self.args.world_size)
        if sentence is not None and overrides.is_overridden(self, "get_train_dataloader"):
            notify_once(sentence)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # which put other parameters in their place
            overrides.check_optimizer(self.optimizer, self.model)

    def _prepared(self, dataset: Any, name: str) -> Any:
        """Read and tokenise a data set, or each of a dictionary of them. What is prepared already passes."""
        return prepared(self, dataset, name)

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference model where it is a model of its own; see `ReferencePolicy.model`."""
        return self.reference.model if self.reference is not None else None

    @property
    def router_aux_loss_coef(self) -> float:
        """The weight of the load-balancing term: as set, else the model's own where its configuration asks for it."""
        if getattr(self.args, "router_aux_loss_coef", None) is not None:
            return self.args.router_aux_loss_coef
        config = self.model.config.get_text_config()
        asks = getattr(config, "output_router_logits", False)
        return getattr(config, "router_aux_loss_coef", 0.0) if asks else 0.0

    @property
    def aux_loss_enabled(self) -> bool:
        return self.router_aux_loss_coef > 0

    @property
    def chat_template(self) -> str | None:
        return getattr(self.processing_class, "chat_template", None)

    def window(self) -> int | None:
        """The longest sequence the model takes, in tokens, or None when nobody says."""
        limits = [getattr(self.model.config.get_text_config(), "max_position_embeddings", None)]
        limits.append(getattr(self.processing_class, "model_max_length", None))
        known = [limit for limit in limits if limit and limit < 10**9]
        return min(known) if known else None

    # --- the report before step 1 ---------------------------------------------------------------------------------

    def report(self) -> list[str]:
        """What will be trained on what, in a few lines."""
        return report.lines_of(self)

    def full_rate(self) -> float:
        """The learning rate that suits the method where all weights train: its default."""
        fields: Any = self.config_class.__dataclass_fields__
        return fields["learning_rate"].default

    # --- the loop -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`transformers.Trainer.train`, after one report of what will be trained."""
        if self.train_dataset is None and not overrides.is_overridden(self, "get_train_dataloader"):
            raise ValueError("there is nothing to train on: pass train_dataset=")
        self.train_dataset = self._prepared(self.train_dataset, "train")  # another one may have been put there since
        self._run = resume.identity(self)
        folder = resume.folder_to_resume(self, resume_from_checkpoint)
        self._started = checkpoint.started(folder) if folder else time.time()
        saving.try_saving(self.model, self.processing_class, self.args)
        set_seed(self.args.seed)  # dropout does not depend on what else drew since the trainer was made
        self._sums["train"].clear()
        self._tokens_seen = self._distinct = self._positions = 0
        self._between_logs = None
        if folder is not None:
            resume.load_between_logs(self, folder)
        report.show(self)
        construct.forget_evaluation(self)
        with contextlib.closing(self.progress):
            return super().train(str(folder) if folder else None, *args, **kwargs)

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None,
                        is_training: bool = False, dataloader_key: str | None = None) -> DataLoader:  # fmt: skip
        args, collate = self.args, self._collate
        collate.labels = overrides.reads_batches(self) is not None
        if not is_training and self.compute_metrics is not None:
            collate = copy.copy(collate)
            collate.labels = True
        sampler = "_get_train_sampler" if is_training else "_get_eval_sampler"
        own_order = sampler_fn is not None and overrides.is_overridden(self, sampler)
        if isinstance(dataset, IterableDataset):
            if own_order:
                raise ValueError(IN_ITS_OWN_ORDER.format(sampler))
            return stream_loader(dataset, batch_size, collate, args, is_training)
        batches = batches_of(dataset, batch_size, args, is_training)
        if own_order:
            batches = overrides.in_sampler_order(self, sampler_fn(dataset), batches)
        return row_loader(dataset, batches, collate, args)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        samples = [self._taken(batch) for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        samples = self.rewritten(samples, training=True)
        if not samples:
            self.under_way = None
            return [], None  # type: ignore[return-value]
        self.budget.begin(self)
        step = self.budget.fitted(self, "train", lambda: self.begin_step(self.budget.cut(self, samples)))
        self._tokens_seen += sum(batch["tokens"] for batch in step.batches)
        for distinct, positions in map(computed, step.batches):
            self._distinct += distinct
            self._positions += positions
        return as_slots(step.batches, len(samples)), step.count(None)

    def begin_step(self, batches: list[Batch]) -> Step:
        """The optimizer step on these micro-batches of this rank."""
        found = [{**self.counts(batch), overrides.ROWS: batch["row_S"].shape[0]} for batch in batches]
        self.under_way = self.begin(batches, counts_of_all(found, self.args.device, self.args.world_size))
        return self.under_way

    def begin(self, batches: list[Batch], counts: dict[str, Tensor], **about: Any) -> Step:
        """An optimizer step on these micro-batches, with what `before_step` says of them."""
        found = self.before_step(self.model_wrapped, batches, training=True)
        return Step({**counts, **found.counts}, found.beside(batches), True, found.shared, **about)

    def made_of(self, rows: Sequence[Any]) -> Batch:
        """A batch of some of the rows of others, or of none."""
        return self._collate(rows)

    def _taken(self, batch: Batch) -> Batch:
        """A batch of ours as it is; of one from a loader of the user's own, what is trained in it."""
        if "predict_N" in batch:
            return batch
        if not self.takes_grids:
            raise ValueError(
                f"a loader of your own returned a batch of {', '.join(map(str, batch))}, which {type(self).__name__} "
                "cannot train on: pass collate_fn=self.data_collator, which makes batches of the rows of "
                "self.train_dataset"
            )
        return self._collate.taken(batch, [-1] * len(batch["input_ids"]))

    def step_for(self, batch: Batch) -> Step:
        """The optimizer step or the evaluation under way; outside of one, a step of this batch alone."""
        return self.under_way or Step(self._counted(batch), [batch], training=self.mode == "train")

    def _counted(self, batch: Batch) -> dict[str, Tensor]:
        found = {**self.counts(batch), overrides.ROWS: batch["row_S"].shape[0]}
        return {kind: torch.tensor(max(float(n), 1.0), device=self.args.device) for kind, n in found.items()}

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # `Trainer` asks whether the steps are done only after it has taken one more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False,
                     num_items_in_batch: Tensor | int | None = None) -> Any:  # fmt: skip
        """The micro-batch's share of the loss of the whole optimizer step (in evaluation: the loss of the batch), times
        the number of ranks, over which gradients are averaged. With `return_outputs` also the model's outputs."""
        self.calls_ours = True
        if "predict_N" not in inputs:
            inputs = self._prepare_inputs(gridded(inputs, [-1] * len(inputs["input_ids"])))
        elif "labels" in inputs and overrides.is_overridden(self, "compute_loss"):
            inputs = relabelled(inputs)
        if self.compute_loss_func is not None:
            loss, outputs = overrides.by_loss_func(self, model, inputs)
            return (loss, outputs) if return_outputs else loss
        self.attachment.kept = [] if return_outputs else None
        try:
            step = self.step_for(inputs)
            sums, metrics = self.loss(model, inputs, step)
            outputs = next(iter(self.attachment.kept or []), None)
        finally:
            self.attachment.kept = None
        self._add(self.mode, metrics)
        means = [total / step.count(kind) for kind, total in sums.items()]
        # Gradients are averaged over the ranks afterwards.
        loss = torch.stack(means).sum() * (self.args.world_size if self.mode == "train" else 1)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        # DeepSpeed puts an optimizer over float32 copies of its own around this one.
        return optimizer if self.is_deepspeed_enabled else low_bits.updates_in_float32(optimizer)

    def _prepare_input(self, data: Any) -> Any:
        # Under DeepSpeed `Trainer` casts all numbers to the dtype of the weights, log-probs and advantages too.
        return moved(data, self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        on_host = offload.on_host(model) if self.args.activation_offloading else contextlib.nullcontext()
        with self._half_products(), on_host, overrides.completed(self):
            return self.budget.part(self, model, as_list(inputs), num_items_in_batch)

    def floating_point_ops(self, inputs: Any) -> int:
        return sum(map(super().floating_point_ops, as_list(inputs)))

    def _track_num_input_tokens(self, inputs: Any) -> None:
        for batch in as_list(inputs):
            super()._track_num_input_tokens(batch)

    def compute_loss_context_manager(self) -> Any:
        stack = super().compute_loss_context_manager()
        # The policy's own forward is wrapped so. A reference, a teacher or a model that is not wrapped yet must run in
        # the same precision, or their log-probs differ from the start.
        stack.enter_context(self.accelerator.autocast())
        stack.enter_context(self._half_products())
        return stack

    def _half_products(self) -> Any:
        half = self.args.bf16 or self.args.fp16 or self.model.dtype in (torch.bfloat16, torch.float16)
        return linear.half_products(self.args.device, half and not self.args.torch_compile)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Any, Any]:
        return evaluation.predicted(self, model, inputs, prediction_loss_only)

    def for_evaluation(self, dataset: Any, name: str) -> Any:
        """A data set that was not given when the trainer was made, as `evaluate` and `predict` take it."""
        dataset = self._prepared(dataset, name)
        for component in self.components:
            component.check_evaluation(self, dataset)
        return dataset

    def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None,
                 metric_key_prefix: str = "eval") -> dict[str, float]:  # fmt: skip
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self.for_evaluation(eval_dataset, metric_key_prefix)
        self.eval_dataset = self._prepared(self.eval_dataset, "eval")  # another one may have been put there since
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None,
                metric_key_prefix: str = "test") -> Any:  # fmt: skip
        if self.compute_metrics is None:
            notify_once("predict returns metrics alone: logits are kept where compute_metrics= asks for them")
        return super().predict(self.for_evaluation(test_dataset, metric_key_prefix), ignore_keys, metric_key_prefix)

    def evaluation_loop(self, dataloader: DataLoader, description: str, prediction_loss_only: bool | None = None,
                        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval") -> Any:  # fmt: skip
        self._sums["eval"].clear()
        if self.compute_metrics is not None and self.args.world_size > 1 and not self.args.eval_use_gather_object:
            self.gather_function = gather_rows  # that of accelerate takes as many rows of every rank
        self._of_evaluation = self.budget.fitted(self, "eval", lambda: self.before_evaluation(dataloader))
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        found = self._reduced("eval", num_tokens=self._tokens_seen)  # seen in training so far, as upstream logs it
        for name, value in evaluation.with_loss(found).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        finite = torch.isfinite(self._tr_loss)
        if not self.args.fp16:  # a loss scaler expects overflowing gradients, and skips their step
            finite = finite & torch.isfinite(torch.as_tensor(grad_norm, device=finite.device))
        if not finite:
            raise NonFiniteError(what_is_not_finite(self, model))
        return grad_norm

    # --- metrics --------------------------------------------------------------------------------------------------

    def _add(self, mode: str, metrics: dict[str, Metric]) -> None:
        self._sums[mode].add(metrics)

    def _reduced(self, mode: str, **totals: int) -> dict[str, float]:
        """Metrics over all micro-batches and ranks since the last call, and the totals over ranks: one collective."""
        found, together = self._sums[mode].reduced(self.args.device, self.args.world_size, **totals)
        return {**found, **self.derived(found), **{name: int(value) for name, value in together.items()}}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a line of training
            found = self._reduced("train", num_tokens=self._tokens_seen)
            logs = {**logs, **found}
        if "train_runtime" in logs:
            efficiency = round(self._distinct / self._positions, 4) if self._positions else 1.0
            logs = {**logs, "train_token_efficiency": efficiency}
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with adapters.twin_hidden(self.model):
            super().save_model(output_dir, _internal_call)
        for each in self.components:
            each.save(self, Path(output_dir or self.args.output_dir))
        if self.args.should_save:
            # Over PEFT's own; a push to the Hub writes it again by itself.
            takes = inspect.signature(self.create_model_card).parameters.values()
            knows_folder = any(each.name == "folder" or each.kind is each.VAR_KEYWORD for each in takes)
            # An override may have upstream's three arguments alone; it writes into the output folder.
            self.create_model_card(**({"folder": output_dir} if knows_folder else {}))
            base = getattr(getattr(unwrap(self.model), "config", None), "_name_or_path", "")
            folder = Path(output_dir or self.args.output_dir)
            for sentence in checkpoint.set_aside(folder, adapters.has_adapter(self.model), base):
                notify_once(sentence)

    def rows_of_a_step(self) -> int:
        """How many rows an optimizer step is taken on, on all ranks."""
        args = self.args
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        *,
        folder: str | None = None,
        **header: Any,
    ) -> None:
        """Write README.md into `folder` (default: the output folder). `header` holds further entries of its metadata
        block, such as `language` and `license`; `push_to_hub` hands its own arguments on to here."""
        write_card(self, Path(folder or self.args.output_dir), model_name, dataset_name, tags, header)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        resume.save_checkpoint(self, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        if not adapters.restore_adapter(model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            adapters.prepare_quantised(model)  # PEFT loads a bfloat16 adapter back in float32
