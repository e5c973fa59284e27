"""What every method shares, and every place where `transformers.Trainer` is touched.

A method supplies its config and four things: `rows` (how the data set is read), `batch` (what rows become), `counts`
(what the loss is averaged over) and `loss` (sums, and metrics). Everything else is here, once.

Hooks of `transformers.Trainer` (5.17 to 5.23) that are overridden, and why:

    _get_dataloader     the order of rows is a pure function of (seed, epoch), equal on all ranks, with nothing repeated
                        at the end of an epoch. Goes when accelerate shards without repeating rows.
    _run_epoch          takes no step where all steps are done: max_steps=0, or a finished run that is resumed
    get_batch_samples   counts the trained items of the whole optimizer step on all ranks, and takes what statistics a
                        method needs of it, before its first backward pass
    compute_loss        divides by those counts: any split of the same rows gives the same gradient
    _prepare_input      moves what a batch holds and casts nothing: sums of log-probs need fp32
    create_optimizer    steps in float32 on weights that are kept in bfloat16
    training_step       keeps saved activations on the host where that is asked for, and brings an overridden
                        `compute_loss` to the step's scale
    compute_loss_context_manager    half precision on a CPU without instructions for it
    prediction_step, evaluation_loop    evaluation as sums and counts; no logits are kept
    _get_grad_norm      a loss or gradient that is not finite stops the run before the weights are touched
    log                 adds the metrics: one collective a log step
    _save_checkpoint    written aside, synced, renamed; keeps what `Trainer` forgets between logs
    save_model          leaves the reference's adapter out, and writes the model card beside the weights
    _load_from_checkpoint   also an adapter that transformers put into the model itself
    train               resolves the checkpoint to resume from, prints the report before step 1, and has a model
                        wrapped that was evaluated before
"""

import copy
import inspect
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import set_seed

from trl import checkpoint
from trl.compat.arguments import Adoptable
from trl.config import BaseConfig
from trl.data.batching.batches import RowBatches, StreamBatches
from trl.data.batching.collate import Tree
from trl.data.mixture import Mixture
from trl.data.reading import sources
from trl.data.report import DataReport
from trl.engine import linear
from trl.engine.forest import Batch, computed, gridded, relabelled, trained
from trl.engine.probe import attach
from trl.engine.score import score
from trl.losses.tokens import Metric, seq_sum
from trl.models import adapters, load, low_bits, offload, saving, vocabulary
from trl.models.compiled import compile_tokenwise
from trl.models.unwrap import unwrap
from trl.notices import notify_once
from trl.options import check_trackers, unused_by_trainer
from trl.trainer.loader import BatchStream, Collate, lengths_of, row_loader, train_split

from . import construct, overrides, progress, resume
from .card import model_card
from .evaluation import refuse_to_keep
from .metrics import Totals, gather_rows
from .nonfinite import NonFiniteError, what_is_not_finite
from .report import engine_lines, model_lines, print_report, steps_line
from .step import Statistics, Step

_PART = "loss over "  # the means that add up to the loss of an evaluation


class _BeforeTraining(TrainerCallback):
    """Puts back what `Trainer` resets when a run is resumed. `on_train_begin` is the first call after it has."""

    def __init__(self, trainer: "BaseTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._restore_between_logs()
        self.trainer._check_what_users_made(kwargs.get("train_dataloader"))
        if state.global_step >= state.max_steps:
            done = f"all {state.max_steps:,} steps are done already" if state.max_steps else "max_steps is 0"
            notify_once(f"nothing is trained: {done}. Raise max_steps or num_train_epochs to train on")


class Component:
    """A part of a trainer with a state of its own, such as a reference model. Its methods are given the trainer."""

    def on_ready(self, trainer: "BaseTrainer") -> None:
        """The trainer is made but for its method's `on_ready`."""

    def report(self, trainer: "BaseTrainer") -> list[str]:
        """Lines of the report before step 1."""
        return []

    def state(self, trainer: "BaseTrainer") -> dict[str, Any]:
        """Its part of `method_state`."""
        return {}

    def load_state(self, trainer: "BaseTrainer", state: dict[str, Any]) -> None:
        """Restore what `state` returned, out of the state of the whole method."""

    def save(self, trainer: "BaseTrainer", folder: Path) -> None:
        """Write into the model's folder what `save_pretrained` does not. All ranks call it."""

    def check_evaluation(self, trainer: "BaseTrainer", dataset: Any) -> None:
        """An error if this data set cannot be evaluated on now."""


class BaseTrainer(Adoptable, Trainer):
    """A `transformers.Trainer` whose batches are forests and whose losses are sums over trained items."""

    config_class: type[BaseConfig]
    train_dataset: Any
    eval_dataset: Any
    method: str  # how the command line and the folders call it
    # Our losses are divided by the items of the whole optimizer step: `Trainer` must not divide them again.
    loss_is_scaled_for_ga = True
    # Whether a batch is made of token ids and labels alone, so that collators of transformers can make one.
    takes_grids = True
    own_weight = overrides.ROWS  # what the value of the user's own loss is a mean over
    calls_ours = True  # whether an overridden `compute_loss` goes through ours
    mode = "train"  # or "eval": whose metrics `compute_loss` adds to
    reference: Any = None  # a `ReferencePolicy`, where the method compares with one
    components: Sequence[Component] = ()  # parts with a state of their own, such as a reference model

    # --- what a method supplies -----------------------------------------------------------------------------------

    def rows(self, dataset: Any, name: str) -> tuple[Any, Any]:
        """The data set as this method trains on it, tokenised, and what was found on the way."""
        raise NotImplementedError

    prepared_columns: frozenset[str] = frozenset({"input_ids", "loss_mask", "row"})

    def is_prepared(self, dataset: Any) -> bool:
        """Whether the data set is one that `rows` has made."""
        return isinstance(dataset, Dataset) and self.prepared_columns <= set(dataset.column_names)

    @staticmethod
    def batch(rows: Sequence[Any], to_batch: Callable[[list[Tree]], Batch]) -> Batch:
        """Prepared rows -> a batch: their trees as `to_batch` lays them out, and what else the loss reads of a row."""
        raise NotImplementedError

    def rewritten(self, batches: list[Batch], training: bool) -> list[Batch]:
        """The micro-batches of an optimizer step, or the batch of an evaluation, as the method trains on them: those of
        the data, unless it puts others in their place. Every rank calls it, also without rows."""
        return batches

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many items of each kind that the loss is averaged over this batch has: its trained tokens, unless a
        method differs."""
        return {"tokens": trained(batch)}

    def before_step(self, model: nn.Module, batches: list[Batch], training: bool) -> Statistics:
        """Statistics over the micro-batches of an optimizer step, or over one batch of an evaluation."""
        return Statistics()

    def before_evaluation(self, dataloader: DataLoader) -> dict[str, Any]:
        """Statistics over the whole data set of an evaluation: entries of `Step.shared` for all its batches."""
        return {}

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        """The loss as sums, each to be divided by the count of its kind over the whole optimizer step and then added;
        and metrics under their logged names."""
        raise NotImplementedError

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """Metrics that are made of the means of others."""
        return {}

    def on_ready(self) -> None:
        """Called once, at the end of the construction."""

    def method_state(self) -> dict[str, Any]:
        """What a checkpoint must keep of the method itself: tensors, numbers and strings. What all ranks have alike may
        be left to the first rank: a rank is given what it has not written itself from there."""
        return {name: value for each in self.components for name, value in each.state(self).items()}

    def joined_state(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state for a run on another number of ranks than those whose `method_state` is given: the first rank's,
        unless each has a part of the whole."""
        return states[0]

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `method_state`."""
        for each in self.components:
            each.load_state(self, state)

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
        train_dataset = self._prepared(train_dataset, "train")
        eval_dataset = self._prepared(eval_dataset, "eval")
        if (args.gradient_checkpointing_kwargs or {}).get("selective"):
            offload.understand_selective(unwrap(model))
        self._check_order()
        self._collate = Collate(self.batch, data_collator, args.share_prompt, raw=self._users_rows)
        self._collate.tokens_without_row = self._without_row

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
            callbacks=[_BeforeTraining(self), *(callbacks or [])],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.progress = progress.install(self)
        construct.configure_sharding(self.accelerator, args)
        self.model_accepts_loss_kwargs = True  # read instead of `loss_is_scaled_for_ga` up to transformers 5.20
        # The engine adds the noise of NEFTune by the length of each sequence; the hook of `Trainer` knows rows alone.
        self.neftune_noise_alpha = None
        overrides.check_optimizer(self.optimizer, model)
        self.attachment = self._collate.attachment = attach(model)
        self._collate.labels = overrides.reads_batches(self) is not None

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
        self._compile()

    def _compile(self) -> None:
        """Compile what keeps its shape from batch to batch.

        accelerate would compile the whole model, which torch gives up after some batches: each has other segments.
        """
        plugin = self.accelerator.state.dynamo_plugin
        self._compiled_parts = None
        if plugin.backend == DynamoBackend.NO:
            return
        options = plugin.to_kwargs()
        plugin.backend = DynamoBackend.NO
        # `TrainingArguments` puts the wish into the environment, where every later run of the process would find it.
        os.environ.pop("ACCELERATE_DYNAMO_BACKEND", None)
        wanted = {"backend": options["backend"], "mode": options.get("mode")}
        self._compiled_parts = compile_tokenwise(self.model, **wanted)

    def load_model(self, name: str, **kwargs: Any) -> Any:
        """The model that goes by a name or path."""
        return load.load_causal_lm(name, **kwargs)

    def adapter_config(self, peft_config: Any) -> Any:
        """The adapter's configuration, as the method needs it."""
        return peft_config

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

    def _check_order(self) -> None:
        args = self.args
        if args.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy='batch_rebalance' is not supported: the rows of a step are a run of the "
                "epoch's order here. Use 'group_by_length' for ranks of about equal work, or 'random'"
            )
        if args.train_sampling_strategy == "group_by_length" and not self.takes_lengths:
            raise ValueError(
                f"train_sampling_strategy='group_by_length' has no meaning for {type(self).__name__}: the lengths of "
                "its completions are not known beforehand; leave it out"
            )

    takes_lengths = True  # whether the lengths of rows are known beforehand

    def _check_what_users_made(self, loader: DataLoader | None) -> None:
        """What is known of a loader and an optimizer of the user's own only when training begins."""
        sentence = overrides.sharding_notice(loader, self.args.world_size)
        if sentence is not None and overrides.is_overridden(self, "get_train_dataloader"):
            notify_once(sentence)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # which put other parameters in their place
            overrides.check_optimizer(self.optimizer, self.model)

    def _prepared(self, dataset: Any, name: str) -> Any:
        """Read and tokenise a data set, or each of a dictionary of them. What is prepared already passes."""
        if dataset is None:
            return None
        if name == "train" and isinstance(dataset, dict):
            dataset = train_split(dataset)
        if isinstance(dataset, dict) and all(map(sources.is_data_set, dataset.values())):
            return {key: self._prepared(value, f"{name} {key}") for key, value in dataset.items()}
        dataset = dataset if isinstance(dataset, Mixture) else sources.load(dataset)
        if self._users_rows or self.is_prepared(dataset):
            return dataset
        with self.args.main_process_first(desc="preparing the data"):
            rows, self.reports[name] = self.rows(dataset, name)
        if self._without_row is not None:
            self._without_row.check_dataset(rows, name)
        return rows

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
        lines = [line for report in self.reports.values() for line in report.lines()]
        lines += model_lines(self.model, self.args.learning_rate, self._full_rate(), self._update_precision())
        reader, users = overrides.reads_batches(self), self._collate.users
        lines += engine_lines(self.attachment, reader, users, self._compiled_parts)
        if hasattr(self.train_dataset, "__len__") and not overrides.is_overridden(self, "get_train_dataloader"):
            lines.append(steps_line(len(self.train_dataset), self.args))
        return [*lines, *(line for each in self.components for line in each.report(self))]

    def _full_rate(self) -> float:
        """The learning rate that suits the method where all weights train: its default."""
        fields: Any = self.config_class.__dataclass_fields__
        return fields["learning_rate"].default

    def _update_precision(self) -> str:
        """Where the bits of an update are that a bfloat16 weight has no room for."""
        if self.is_deepspeed_enabled:
            return "DeepSpeed keeps float32 copies of the bfloat16 weights"
        if self.is_fsdp_enabled and self.accelerator.mixed_precision != "no":
            return "FSDP holds the weights in float32"
        return "the lower halves of bfloat16 weights are kept beside them (2 bytes a weight), moments are float32"

    def _identity(self) -> dict[str, str | None]:
        """What tells this run from others in the same folder; None for what is not known."""
        base = unwrap(self.model)
        name = getattr(base.config, "_name_or_path", "") if hasattr(base, "config") else ""
        own = name and Path(self.args.output_dir).resolve() in (Path(name).resolve(), *Path(name).resolve().parents)
        return {
            "method": self.method,
            "model": f"{Path(name).name} ({type(base).__name__})" if name and not own else None,
            "data": checkpoint.fingerprint(self.train_dataset),
        }

    def _print_report(self) -> None:
        if not self.is_world_process_zero():
            return
        print_report(self.report(), {name: each.lines() for name, each in self.reports.items()})
        if self.reports and self.args.should_save:
            found = {name: report.to_dict() for name, report in self.reports.items()}
            Path(self.args.output_dir, "data_report.json").write_text(json.dumps(found, indent=1, ensure_ascii=False))

    # --- the loop -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`transformers.Trainer.train`, after one report of what will be trained."""
        if self.train_dataset is None and not overrides.is_overridden(self, "get_train_dataloader"):
            raise ValueError("there is nothing to train on: pass train_dataset=")
        self.train_dataset = self._prepared(self.train_dataset, "train")  # another one may have been put there since
        self._run = self._identity()
        output_dir, folder = Path(self.args.output_dir), None
        if resume_from_checkpoint:
            folder, passed = checkpoint.resolve(output_dir, resume_from_checkpoint, self._run)
            for sentence in passed:
                notify_once(sentence)
            adapters.check_resumed(folder, adapters.active_config(self.model))
            notify_once(f"resumed from {folder}: {checkpoint.step(folder)} steps are done")
        elif self.is_world_process_zero():
            for sentence in checkpoint.earlier(output_dir, self._run):
                notify_once(sentence)
        self._started = checkpoint.started(folder) if folder else time.time()
        saving.try_saving(self.model, self.processing_class, self.args)
        set_seed(self.args.seed)  # dropout does not depend on what else drew since the trainer was made
        self._sums["train"].clear()
        self._tokens_seen = 0
        self._distinct = self._positions = 0
        self._between_logs = None
        if folder is not None:
            self._load_between_logs(folder)
        self._print_report()
        self._forget_evaluation()
        try:
            return super().train(str(folder) if folder else None, *args, **kwargs)
        finally:
            self.progress.close()

    def _forget_evaluation(self) -> None:
        """Let accelerate wrap a model that an evaluation has prepared.

        An evaluation before training prepares the model without DistributedDataParallel and marks it as prepared, so
        that it would never be wrapped: each process would train on its own gradients. Goes when accelerate (1.15) keeps
        the two apart.
        """
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.args.world_size > 1 and not sharded and self.model_wrapped is self.model:
            self.model._is_accelerate_prepared = False
            self.accelerator._models = [each for each in self.accelerator._models if each is not self.model]

    def _get_dataloader(self, dataset: Any, description: str, batch_size: int, sampler_fn: Any = None,
                        is_training: bool = False, dataloader_key: str | None = None) -> DataLoader:  # fmt: skip
        args, collate = self.args, self._collate
        collate.labels = overrides.reads_batches(self) is not None
        if not is_training and self.compute_metrics is not None:
            collate = copy.copy(collate)
            collate.labels = True
        drop_last = is_training and args.dataloader_drop_last
        sampler = "_get_train_sampler" if is_training else "_get_eval_sampler"
        own_order = sampler_fn is not None and overrides.is_overridden(self, sampler)
        by_length = is_training and args.train_sampling_strategy == "group_by_length"
        if isinstance(dataset, IterableDataset):
            if own_order or by_length:
                what = sampler if own_order else "train_sampling_strategy='group_by_length'"
                raise ValueError(f"a stream is read in its own order: {what} needs a data set that is loaded whole")
            # In training without an end: `Trainer` counts the batches of a pass whose length it does not know, so that
            # a run resumed in a later pass would begin the first one again.
            strategies = (args.eval_strategy, args.save_strategy, args.logging_strategy)
            if is_training and "epoch" in strategies:
                notify_once("a stream has no epochs: what is asked for once an epoch comes at the end; count in steps")
            stream = StreamBatches(
                dataset,
                batch_size,
                ranks=args.world_size,
                rank=args.process_index,
                drop_last=drop_last,
                forever=is_training,
            )
            return DataLoader(BatchStream(stream), batch_size=None, collate_fn=collate)
        batches = RowBatches(
            len(dataset),
            batch_size,
            shuffle=is_training and args.train_sampling_strategy != "sequential",
            seed=args.seed if args.data_seed is None else args.data_seed,
            ranks=args.world_size,
            rank=args.process_index,
            drop_last=drop_last,
            lengths=lengths_of(dataset) if by_length else None,
            step_rows=batch_size * args.gradient_accumulation_steps * args.world_size,
        )
        if own_order:
            batches = overrides.in_sampler_order(self, sampler_fn(dataset), batches)
        return row_loader(dataset, batches, collate, args)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        samples = [self._taken(batch) for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        samples = self.rewritten(samples, training=True)
        found = [{**self.counts(batch), overrides.ROWS: batch["row_S"].shape[0]} for batch in samples]
        kinds = list(found[0]) if found else []
        totals = torch.tensor([float(sum(counts[kind] for counts in found)) for kind in kinds], device=device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(totals)
        counts = dict(zip(kinds, totals.clamp(min=1), strict=True))
        self._tokens_seen += sum(batch["tokens"] for batch in samples)
        for distinct, positions in map(computed, samples):
            self._distinct += distinct
            self._positions += positions
        self.under_way = self.begin(samples, counts) if samples else None
        return (list(self.under_way.batches), self.under_way.count(None)) if self.under_way else ([], None)  # type: ignore[return-value]

    def begin(self, batches: list[Batch], counts: dict[str, Tensor], **about: Any) -> Step:
        """An optimizer step on these micro-batches, with what `before_step` says of them."""
        found = self.before_step(self.model_wrapped, batches, training=True)
        return Step({**counts, **found.counts}, found.beside(batches), True, found.shared, **about)

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
            if inputs["row_S"].shape[0] == 0:
                nothing = self.own_loss_of_nothing(model, inputs)
                return (nothing, None) if return_outputs else nothing
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
            items = overrides.Items.of(self.step_for(inputs).count(None))
            loss = self.compute_loss_func(outputs, inputs["labels"], num_items_in_batch=items)
            loss = overrides.scaled(self, inputs, loss, items.used)
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

    def own_loss_of_nothing(self, model: nn.Module, batch: Batch) -> Tensor:
        """Zero, with a gradient of zero for every parameter that trains: what a rank without rows adds."""
        sums, metrics = self.loss(model, batch, self.step_for(batch))
        if self.compute_loss_func is None and self.calls_ours:
            self._add(self.mode, metrics)
        return torch.stack(list(sums.values())).sum()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        # DeepSpeed puts an optimizer over float32 copies of its own around this one.
        return optimizer if self.is_deepspeed_enabled else low_bits.updates_in_float32(optimizer)

    def _prepare_input(self, data: Any) -> Any:
        # Under DeepSpeed `Trainer` casts all numbers to the dtype of the weights, log-probs and advantages too.
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        on_host = offload.on_host(model) if self.args.activation_offloading else nullcontext()
        with self._half_products(), on_host, overrides.completed(self):
            return super().training_step(model, *args, **kwargs)

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
        logits = labels = None
        [inputs] = self.rewritten([self._taken(inputs)], training=False)
        with torch.no_grad(), self.compute_loss_context_manager():
            found = self.before_step(model, [inputs], training=False)
            batch = self._prepare_inputs(*found.beside([inputs]))
            counts = self.counts(batch)
            if overrides.has_own_loss(self):
                loss = self.own_evaluation(model, batch, self._counted(batch), next(iter(counts.values())))
            else:
                step = Step(self._counted(batch), [batch], False, {**self._of_evaluation, **found.shared})
                sums, metrics = self.loss(model, batch, step)
                self._add("eval", {**metrics, **self.parts(sums, counts)})
                loss = torch.stack([total / max(counts[kind], 1) for kind, total in sums.items()]).sum()
            if "labels" in batch and self.compute_metrics is not None and not prediction_loss_only:
                labels = batch["labels"]
                grid = {key: batch[key] for key in ("input_ids", "attention_mask")}
                logits = model(**grid, use_cache=False).logits
                refuse_to_keep(self, logits)
                # Without the stand-in of an empty batch.
                rows = batch["row_S"].shape[0]
                labels, logits, inputs["input_ids"] = labels[:rows], logits[:rows], inputs["input_ids"][:rows]
        return loss, logits, labels

    def own_evaluation(self, model: nn.Module, batch: Batch, counts: dict[str, Tensor], items: int) -> Tensor:
        """The user's own loss on a batch as its share of `counts`, also added to the loss of the evaluation.

        `items` are those of the first kind in the batch.
        """
        before, self.mode = self.under_way, "eval"
        self.under_way = Step(counts, [batch], False, self._of_evaluation)
        try:
            with overrides.completed(self):
                share = self.compute_loss(model, batch, num_items_in_batch=self.under_way.count(None))
        finally:
            self.under_way, self.mode = before, "train"
        by_rows = self.own_weight == overrides.ROWS
        whole = counts[overrides.ROWS if by_rows else next(iter(counts))]
        self._add_own(share.detach() * whole, batch["row_S"].shape[0] if by_rows else items)
        return share

    def _add_own(self, total: Tensor, items: int) -> None:
        self._add("eval", {f"{_PART}own": Metric(total, float(items))})

    @staticmethod
    def parts(sums: dict[str, Tensor], counts: Mapping[str, float]) -> dict[str, Metric]:
        """The sums of a loss as metrics, whose means add up to the loss of an evaluation."""
        part = BaseTrainer.part
        return {part(kind): Metric(total.detach(), float(counts[kind])) for kind, total in sums.items()}

    @staticmethod
    def part(kind: str) -> str:
        """The name of the metric that is the loss's part averaged over `kind`."""
        return f"{_PART}{kind}"

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
        self._of_evaluation = self.before_evaluation(dataloader)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        found = self._reduced("eval", num_tokens=self._tokens_seen)  # seen in training so far, as upstream logs it
        parts = [found.pop(name) for name in list(found) if name.startswith(_PART)]
        if parts:  # none where a `prediction_step` of the user's own does without ours
            found["loss"] = sum(parts)
        for name, value in found.items():
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

    numbers_of_sequences = "log-probs"

    def sums_of_sequences(self, model: nn.Module, batch: Batch) -> Tensor:
        """A number for each sequence, [S], that is not finite where the model's outputs are not."""
        stats = score(model, batch)
        return seq_sum(stats.logp_N, stats.seq_N, stats.sequences)

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
        target = Path(folder or self.args.output_dir)
        target.mkdir(parents=True, exist_ok=True)
        base = unwrap(self.model)
        args, seen = self.args, self.state
        facts = {
            "learning rate": args.learning_rate,
            "rows a step": self.rows_of_a_step(),
            "steps": seen.global_step,
            "epochs": round(seen.epoch or 0.0, 2),
            "seed": args.seed,
        }
        card = model_card(
            name=model_name or args.hub_model_id or checkpoint.published_name(target),
            base=header.pop("finetuned_from", None) or getattr(base.config, "_name_or_path", None) or None,
            model_class=type(base).__name__,
            method=self.method,
            adapter=hasattr(self.model, "peft_config"),
            data=[line for report in self.reports.values() for line in report.lines()[:2]],
            facts=facts,
            datasets_used=dataset_name or header.pop("dataset", None),
            tags=[tags] if isinstance(tags, str) else tags or (),
            header=header,
        )
        (target / "README.md").write_text(card, encoding="utf-8")

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        resume.save_checkpoint(self, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        if not adapters.restore_adapter(model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            adapters.prepare_quantised(model)  # PEFT loads a bfloat16 adapter back in float32

    def _load_between_logs(self, folder: Path) -> None:
        args = self.args
        state = resume.rank_state(folder, args.process_index, args.world_size, self.joined_state)
        if state is None:
            return
        self._tokens_seen = state["tokens_seen"]
        self.load_method_state(state["method"])
        self._sums["train"].load(state["sums"], args.device)
        self._between_logs = state

    def _restore_between_logs(self) -> None:
        if self._between_logs is None:
            return
        state, self._between_logs = self._between_logs, None
        self._tr_loss = state["loss_since_log"].to(self.args.device)
        # The final summary is of this call's steps alone: what was already earned is taken off.
        self._total_loss_scalar -= self._tr_loss.item()
        self._globalstep_last_logged = state["last_logged_step"]
