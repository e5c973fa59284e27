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
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.utils import DynamoBackend
from datasets import Dataset, DatasetDict, IterableDatasetDict
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints, set_seed

from trl import checkpoint
from trl.config import Adoptable, BaseConfig
from trl.data.batching.batches import RowBatches, StreamBatches
from trl.data.batching.collate import PaddableRow, Tree, labelled
from trl.data.mixture import Mixture
from trl.data.reading import sources
from trl.data.report import DataReport
from trl.engine import linear
from trl.engine.forest import Batch, computed, gridded, padded, relabelled, trained, unshared, with_labels
from trl.engine.probe import attach
from trl.engine.score import Attachment, score
from trl.losses.tokens import Metric, seq_sum
from trl.models import adapters, load, low_bits, offload, saving, shards, vocabulary
from trl.models.compiled import compile_tokenwise
from trl.models.shards import keep_precision
from trl.models.unwrap import causal_lm
from trl.notices import notify_once
from trl.options import check_trackers, unused_by_trainer

from . import overrides
from .card import model_card
from .metrics import Totals, gather_rows

_RANK_STATE = "trl_state_{rank}.pt"
_PART = "loss over "  # the means that add up to the loss of an evaluation
LARGEST_KEPT_LOGITS = 2**31  # bytes


class NonFiniteError(ArithmeticError):
    """A loss or a gradient became NaN or infinite; the weights were not touched by it."""


class Collate:
    """Rows of a prepared data set -> a batch in the layout of the model. Picklable: it may run in a worker process.

    With `labels`, the padded layout and the grid of labels that functions of the user's own read beside logits. `users`
    is a collator of the user's own, in the way of transformers; `raw` says that it reads rows as they were given.
    """

    def __init__(
        self,
        batch: Callable[[Sequence[Any], Callable[[list[Tree]], Batch]], Batch],
        users: Callable | None,
        share_prompt: bool,
        labels: bool = False,
        raw: bool = False,
    ) -> None:
        self.batch, self.users, self.share_prompt, self.labels, self.raw = batch, users, share_prompt, labels, raw
        self.attachment: Attachment | None = None  # known when the model is in place
        self.tokens_without_row: vocabulary.TokensWithoutRow | None = None

    def __call__(self, rows: Sequence[Any]) -> Batch:
        if self.users is not None and len(rows):
            return self.taken(self._by_users(rows), [int(row.get("row", -1)) for row in rows])
        return self.batch(rows, self.lay)

    def lay(self, trees: list[Tree]) -> Batch:
        assert self.attachment is not None
        if self.tokens_without_row is not None:
            for tree in trees:
                for branch in (tree.root, *tree.branches):
                    self.tokens_without_row.check(branch.ids, f"row {tree.row}")
        if self.labels:
            return with_labels(padded(trees, self.attachment.pad_id))
        return self.attachment.batch(trees if self.share_prompt else unshared(trees))

    def taken(self, batch: Mapping[str, Any], rows: Sequence[int]) -> Batch:
        """What a collator or a loader of the user's own made, as a batch."""
        trees = labelled(batch, rows)
        # A function that reads the batch wants the grids that were made for it, and what came with them.
        if self.labels and len(batch["input_ids"]) == len(rows):
            return gridded(dict(batch), rows)
        return self.lay(trees)

    def _by_users(self, rows: Sequence[Any]) -> Mapping[str, Any]:
        assert self.users is not None
        if self.raw:
            return self.users(rows)
        paddable = [PaddableRow(row) for row in rows]
        try:
            return self.users(paddable)
        except ValueError as error:
            # `tokenizer.pad` pads everything but labels: what calls it makes labels itself, or leaves them as they are.
            if "labels" not in str(error):
                raise
        batch = self.users([PaddableRow(row, labels=False) for row in rows])
        if batch.get("labels") is not None:
            return batch
        labels = torch.full_like(batch["input_ids"], -100)
        flat = [label for row in paddable for label in row["labels"]]
        labels[batch["attention_mask"].bool()] = torch.tensor(flat)
        return {**batch, "labels": labels}


class BatchStream(IterableDataset):
    """The batches of a stream, as torch's loader and `Trainer` want them. A resumed run reads it from the beginning and
    drops what was trained on: the order is the stream's own."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


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


class BaseTrainer(Adoptable, Trainer):
    """A `transformers.Trainer` whose batches are forests and whose losses are sums over trained items."""

    config_class: type[BaseConfig]
    method: str  # how the command line and the folders call it
    # Our losses are divided by the items of the whole optimizer step: `Trainer` must not divide them again.
    loss_is_scaled_for_ga = True
    # Whether a batch is made of token ids and labels alone, so that collators of transformers can make one.
    takes_grids = True
    own_weight = overrides.ROWS  # what the value of the user's own loss is a mean over
    calls_ours = True  # whether an overridden `compute_loss` goes through ours
    mode = "train"  # or "eval": whose metrics and counts `compute_loss` takes

    # --- what a method supplies -----------------------------------------------------------------------------------

    def rows(self, dataset: Any, name: str) -> tuple[Dataset, DataReport]:
        """The data set as this method trains on it, tokenised, and what was found on the way."""
        raise NotImplementedError

    prepared_columns: frozenset[str] = frozenset({"input_ids", "loss_mask", "row"})

    def is_prepared(self, dataset: Any) -> bool:
        """Whether the data set is one that `rows` has made."""
        return isinstance(dataset, Dataset) and self.prepared_columns <= set(dataset.column_names)

    @staticmethod
    def batch(rows: Sequence[Any], lay: Callable[[list[Tree]], Batch]) -> Batch:
        """Prepared rows -> a batch: their trees as `lay` lays them out, and what else the loss reads of a row."""
        raise NotImplementedError

    def counts(self, batch: Batch) -> dict[str, int]:
        """How many items of each kind that the loss is averaged over this batch has: its trained tokens, unless a
        method differs."""
        return {"tokens": trained(batch)}

    def before_step(self, model: nn.Module, batches: list[Batch], training: bool) -> None:
        """Statistics over the micro-batches of an optimizer step (or one batch of evaluation), put into them."""

    def before_evaluation(self, dataloader: DataLoader) -> None:
        """Statistics over the whole data set of an evaluation."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Metric]]:
        """The loss as sums, each to be divided by the count of its kind over the whole optimizer step and then added;
        and metrics under their logged names."""
        raise NotImplementedError

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """Metrics that are made of the means of others."""
        return {}

    def ready(self) -> None:
        """Called once, at the end of the construction."""

    def method_state(self) -> dict[str, Any]:
        """What a checkpoint must keep of the method itself: tensors, numbers and strings. What all ranks have alike may
        be left to the first rank: a rank is given what it has not written itself from there."""
        return {}

    def joined_state(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state for a run on another number of ranks than those whose `method_state` is given: the first rank's,
        unless each has a part of the whole."""
        return states[0]

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take up what `method_state` gave."""

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
        if args.n_gpu > 1:
            notify_once(
                f"{args.n_gpu} GPUs are visible and one is used: nn.DataParallel is never entered. "
                "Start the script with `accelerate launch` to train on all of them."
            )
            args._n_gpu = 1

        assert args.model_init_kwargs is None or isinstance(args.model_init_kwargs, dict)
        init_kwargs = dict(args.model_init_kwargs or {})
        set_seed(args.seed)  # a new scoring head is drawn while the model loads
        if args.trust_remote_code and isinstance(model, str):
            init_kwargs["trust_remote_code"] = True
        if quantization_config is not None:
            init_kwargs["quantization_config"] = quantization_config
        if isinstance(model, str):
            load.check_window(model, getattr(args, "max_length", None), **init_kwargs)
            if processing_class is None:
                names = ("revision", "trust_remote_code")
                kwargs = {name: init_kwargs[name] for name in names if name in init_kwargs}
                processing_class = load.load_tokenizer(model, **kwargs)
            model = self.load_model(model, **init_kwargs)
        elif init_kwargs:
            raise ValueError(
                f"{', '.join(init_kwargs)} are for a model given by name or path; this one is already loaded"
            )
        elif args.world_size > 1 and load.replace_device_map(model, args.device):
            notify_once(f"the model's device_map is dropped: each of the {args.world_size} processes holds it whole")
        if processing_class is None:
            processing_class = load.load_tokenizer(model.config._name_or_path)
        self.processing_class = load.tokenizer_of(processing_class)
        if getattr(args, "chat_template_path", None):
            model, self.processing_class, added = vocabulary.use_chat_template(
                model, self.processing_class, args.chat_template_path
            )
            vocabulary.check_added_tokens(model, peft_config, added)
        _special_tokens(self.processing_class, getattr(args, "eos_token", None), getattr(args, "pad_token", None))
        vocabulary.check_special_tokens(model, self.processing_class)
        self._without_row = vocabulary.tokens_without_row(model, self.processing_class)
        set_seed(args.seed)  # the adapter is the same whether or not the model was loaded here
        model = adapters.for_training(model, self.adapter_config(peft_config))
        held = low_bits.hold_in_float32(model, getattr(args.optim, "value", args.optim), bool(args.bf16 or args.fp16))
        if held:
            notify_once(held)
        saving.mend_generation_config(model)
        if args.disable_dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        self._check_something_trains(model)
        if args.gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
            # A frozen embedding would leave a checkpointed layer without an input that asks for gradients.
            model.enable_input_require_grads()

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
            offload.understand_selective(causal_lm(model))
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
        if self.is_fsdp_enabled:
            keep_precision(self.accelerator.state.fsdp_plugin)
        if shards.zero_3_is_planned():
            if args.activation_offloading:
                raise ValueError(
                    "activation_offloading keeps what the forward pass saves, gathered weights too, so that nothing of "
                    "ZeRO-3's sharding is left: use gradient_checkpointing in its place"
                )
            # A checkpoint without it holds parts that no `from_pretrained` opens.
            settings = self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            settings["stage3_gather_16bit_weights_on_model_save"] = True
        self.model_accepts_loss_kwargs = True  # read instead of `loss_is_scaled_for_ga` up to transformers 5.20
        # The engine adds the noise of NEFTune by the length of each sequence; the hook of `Trainer` knows rows alone.
        self.neftune_noise_alpha = None
        overrides.check_optimizer(self.optimizer, model)
        self.attachment = self._collate.attachment = attach(model)
        self._collate.labels = overrides.reads_batches(self) is not None

        self._sums = {"train": Totals(), "eval": Totals()}
        self._tokens_seen = 0  # of this rank, over the whole run
        self._distinct = self._positions = 0  # tokens and computed positions of this call of `train`, on this rank
        self._step_batches: list[Batch] = []  # of the optimizer step under way, to name a row that breaks it
        self._step_counts: dict[str, Tensor] = {}  # of its items, on all ranks
        self._between_logs: dict[str, Any] | None = None
        self._run: dict[str, str | None] = {}  # what tells it from others, and when it was begun
        self._started = 0.0
        self.ready()
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

    def _check_something_trains(self, model: nn.Module) -> None:
        count, total = adapters.trainable(model)
        if count:
            return
        remedy = "set requires_grad on what should train, or pass peft_config= to train an adapter"
        if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
            remedy = (
                "it carries an adapter that was loaded for inference: pass the adapter's folder as the model, "
                "or load it with PeftModel.from_pretrained(base, folder, is_trainable=True)"
            )
        raise ValueError(f"0 of {total:,} parameters would train. {remedy[0].upper()}{remedy[1:]}.")

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
            dataset = _train_split(dataset)
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
        count, total = adapters.trainable(self.model)
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in self.model.parameters() if p.requires_grad})
        lines.append(f"model: {count:,} of {total:,} parameters train ({count / total:.2%}), in {', '.join(dtypes)}")
        if "bfloat16" in dtypes:
            lines.append(f"updates: in float32; {self._low_bits_of_weights()}")
        lines += self._adapter_rate()
        if self.attachment.is_flat:
            lines.append("engine: flat rows, no padding, each prompt computed once")
        else:
            lines.append(f"engine: padded rows, because {self.attachment.reason}")
        reader = overrides.reads_batches(self)
        if reader is not None:
            lines.append(f"engine: padded rows with labels, because {reader} of your own may read them")
        if self._collate.users is not None:
            name = getattr(self._collate.users, "__name__", type(self._collate.users).__name__)
            lines.append(f"data_collator: {name} says which tokens are trained")
        if self._compiled_parts is not None:
            lines.append(
                f"torch_compile: {self._compiled_parts} parts of layers (norms, feed-forward) are compiled, for all "
                "lengths; attention by segment and the head run as they are"
            )
        if self.attachment.head_reason:
            lines.append(f"engine: full logits, because {self.attachment.head_reason}")
        own_loader = overrides.is_overridden(self, "get_train_dataloader")
        if hasattr(self.train_dataset, "__len__") and not own_loader:
            per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            steps = self.args.max_steps
            if steps < 0:
                steps = math.ceil(math.ceil(len(self.train_dataset) / (self.args.train_batch_size
                        * self.args.world_size)) / self.args.gradient_accumulation_steps
                        ) * self.args.num_train_epochs  # fmt: skip
            lines.append(
                f"steps: {math.ceil(steps):,}, each on {per_step} rows ({self.args.train_batch_size} a batch × "
                f"{self.args.gradient_accumulation_steps} accumulated × {self.args.world_size} process"
                f"{'es' if self.args.world_size > 1 else ''})"
            )
        return lines

    def _low_bits_of_weights(self) -> str:
        """Where the bits of an update are that a bfloat16 weight has no room for."""
        if self.is_deepspeed_enabled:
            return "DeepSpeed keeps float32 copies of the bfloat16 weights"
        if self.is_fsdp_enabled and self.accelerator.mixed_precision != "no":
            return "FSDP holds the weights in float32"
        return "the lower halves of bfloat16 weights are kept beside them (2 bytes a weight), moments are float32"

    def _adapter_rate(self) -> list[str]:
        """A line of the report, where an adapter trains at a rate made for all weights.

        An adapter's best rate is about ten times that of full fine-tuning (Schulman et al. 2025, "LoRA Without
        Regret"); the range is 5 to 25 times this method's default, which is made for all weights.
        """
        full = self.config_class.__dataclass_fields__["learning_rate"].default
        rate, low, high = self.args.learning_rate, min(5 * full, 1e-4), min(25 * full, 5e-4)
        if not adapters.has_adapter(self.model) or rate >= low * (1 - 1e-6):
            return []
        return [f"  caution: learning_rate={rate:g} is low for an adapter, which learns well at {low:g} to {high:g}"]

    def _identity(self) -> dict[str, str | None]:
        """What tells this run from others in the same folder; None for what is not known."""
        base = causal_lm(self.model)
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
        print("\n".join(f"trl: {line}" for line in self.report()), flush=True)
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
        return super().train(str(folder) if folder else None, *args, **kwargs)

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
            batches = StreamBatches(
                dataset,
                batch_size,
                ranks=args.world_size,
                rank=args.process_index,
                drop_last=drop_last,
                forever=is_training,
            )
            return DataLoader(BatchStream(batches), batch_size=None, collate_fn=collate)
        batches = RowBatches(
            len(dataset),
            batch_size,
            shuffle=is_training and args.train_sampling_strategy != "sequential",
            seed=args.seed if args.data_seed is None else args.data_seed,
            ranks=args.world_size,
            rank=args.process_index,
            drop_last=drop_last,
            lengths=_lengths(dataset) if by_length else None,
            step_rows=batch_size * args.gradient_accumulation_steps * args.world_size,
        )
        if own_order:
            batches = overrides.in_sampler_order(self, sampler_fn(dataset), batches)
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers and args.dataloader_num_workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        samples = [self._taken(batch) for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        found = [{**self.counts(batch), overrides.ROWS: batch["row_S"].shape[0]} for batch in samples]
        kinds = list(found[0]) if found else []
        totals = torch.tensor([float(sum(counts[kind] for counts in found)) for kind in kinds], device=device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(totals)
        self._step_counts = dict(zip(kinds, totals.clamp(min=1), strict=True))
        self._step_batches = samples
        self._tokens_seen += sum(batch["tokens"] for batch in samples)
        for distinct, positions in map(computed, samples):
            self._distinct += distinct
            self._positions += positions
        if samples:
            self.before_step(self.model_wrapped, samples, training=True)
        return samples, next(iter(self._step_counts.values()), None)

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

    def step_count(self, kind: str | None, batch: Batch) -> Tensor:
        """Items of a kind (None: the first) in the optimizer step or the evaluation under way; outside of one, in the
        batch."""
        counts = self._step_counts or self._counted(batch)
        return counts[next(iter(counts)) if kind is None else kind]

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
            items = overrides.Items.of(self.step_count(None, inputs))
            loss = self.compute_loss_func(outputs, inputs["labels"], num_items_in_batch=items)
            loss = overrides.scaled(self, inputs, loss, items.used)
            return (loss, outputs) if return_outputs else loss
        self.attachment.kept = [] if return_outputs else None
        try:
            sums, metrics = self.loss(model, inputs)
            outputs = next(iter(self.attachment.kept or []), None)
        finally:
            self.attachment.kept = None
        self._add(self.mode, metrics)
        means = [total / self.step_count(kind, inputs) for kind, total in sums.items()]
        # Gradients are averaged over the ranks afterwards.
        loss = torch.stack(means).sum() * (self.args.world_size if self.mode == "train" else 1)
        return (loss, outputs) if return_outputs else loss

    def own_loss_of_nothing(self, model: nn.Module, batch: Batch) -> Tensor:
        """Zero, with a gradient of zero for every parameter that trains: what a rank without rows adds."""
        sums, metrics = self.loss(model, batch)
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
        stack.enter_context(self._half_products())
        return stack

    def _half_products(self) -> Any:
        half = self.args.bf16 or self.args.fp16 or self.model.dtype in (torch.bfloat16, torch.float16)
        return linear.half_products(self.args.device, half and not self.args.torch_compile)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Any, Any]:
        logits = labels = None
        inputs = self._taken(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            self.before_step(model, [inputs], training=False)
            batch = self._prepare_inputs(inputs)
            counts = self.counts(batch)
            if overrides.has_own_loss(self):
                loss = self.own_evaluation(model, batch, self._counted(batch), next(iter(counts.values())))
            else:
                sums, metrics = self.loss(model, batch)
                self._add("eval", {**metrics, **self.parts(sums, counts)})
                loss = torch.stack([total / max(counts[kind], 1) for kind, total in sums.items()]).sum()
            if "labels" in batch and self.compute_metrics is not None and not prediction_loss_only:
                labels = batch["labels"]
                grid = {key: batch[key] for key in ("input_ids", "attention_mask")}
                logits = model(**grid, use_cache=False).logits
                self._refuse_to_keep(logits)
                # Without the stand-in of an empty batch.
                rows = batch["row_S"].shape[0]
                labels, logits, inputs["input_ids"] = labels[:rows], logits[:rows], inputs["input_ids"][:rows]
        return loss, logits, labels

    def own_evaluation(self, model: nn.Module, batch: Batch, counts: dict[str, Tensor], items: int) -> Tensor:
        """The user's own loss on a batch as its share of `counts`, also added to the loss of the evaluation.

        `items` are those of the first kind in the batch.
        """
        before, self._step_counts, self.mode = self._step_counts, counts, "eval"
        try:
            with overrides.completed(self):
                share = self.compute_loss(model, batch, num_items_in_batch=self.step_count(None, batch))
        finally:
            self._step_counts, self.mode = before, "train"
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

    def _refuse_to_keep(self, logits: Tensor) -> None:
        """`compute_metrics` gets what `preprocess_logits_for_metrics` makes of each batch; whole logits only if few."""
        if self.preprocess_logits_for_metrics is not None or self.args.batch_eval_metrics:
            return
        rows = len(self.callback_handler.eval_dataloader.dataset)
        kept = rows * logits[0].numel() * logits.element_size()
        if kept > LARGEST_KEPT_LOGITS:
            raise ValueError(
                f"compute_metrics would keep {kept / 2**30:.1f} GiB of logits ({rows} rows of {tuple(logits.shape[1:])}"
                "). Pass preprocess_logits_for_metrics=, for instance lambda logits, labels: logits.argmax(-1), "
                "or set batch_eval_metrics=True"
            )

    def for_evaluation(self, dataset: Any, name: str) -> Any:
        """A data set that was not given when the trainer was made, as `evaluate` and `predict` take it."""
        return self._prepared(dataset, name)

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
        self.before_evaluation(dataloader)
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
            raise NonFiniteError(self._what_is_not_finite(model))
        return grad_norm

    numbers_of_sequences = "log-probs"

    def sums_of_sequences(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model says of each sequence, [S], to find one of which it is not finite."""
        stats = score(model, batch)
        return seq_sum(stats.logp_N, stats.seq_N, stats.sequences)

    def _what_is_not_finite(self, model: nn.Module) -> str:
        where = f"step {self.state.global_step + 1}"
        remedy = "Lower the learning rate, prefer bf16 to fp16, or take the row out"
        bad = []
        with torch.no_grad():
            for batch in self._step_batches:
                batch = self._prepare_inputs(batch)
                sums_S = self.sums_of_sequences(model, batch)
                bad += batch["row_S"][~torch.isfinite(sums_S)].tolist()
        if bad:
            rows = ", ".join(map(str, sorted(set(bad))[:5]))
            what = self.numbers_of_sequences
            return f"{where}: the {what} of row {rows} are not finite. {remedy}. The weights are unchanged."
        names = [name for name, parameter in model.named_parameters()
                 if parameter.grad is not None and not torch.isfinite(parameter.grad).all()]  # fmt: skip
        rows = sorted({row for batch in self._step_batches for row in batch["row_S"].tolist()})
        what = f"the gradient of {names[0]} (and {len(names) - 1} more) is" if names else "the loss is"
        return f"{where}, rows {rows[:8]}: {what} not finite. {remedy}. The weights are unchanged."

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
        if self.args.should_save:
            # Over PEFT's own; a push to the Hub writes it again by itself.
            takes = inspect.signature(self.create_model_card).parameters.values()
            knows_folder = any(each.name == "folder" or each.kind is each.VAR_KEYWORD for each in takes)
            # An override may have upstream's three arguments alone; it writes into the output folder.
            self.create_model_card(**({"folder": output_dir} if knows_folder else {}))
            base = getattr(getattr(causal_lm(self.model), "config", None), "_name_or_path", "")
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
        base = causal_lm(self.model)
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
        run_dir = Path(self._get_output_dir(trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        if self.args.should_save:
            checkpoint.begin(final)
        self.accelerator.wait_for_everyone()
        staging = str(checkpoint.staging_folder(final))
        os.makedirs(staging, exist_ok=True)  # another node's disk

        self.save_model(staging, _internal_call=True)
        if self.state.best_global_step:
            best = run_dir / f"checkpoint-{self.state.best_global_step}"
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(staging)
            self._save_scaler(staging)
            self._save_rng_state(staging)
            torch.save(
                {
                    "tokens_seen": self._tokens_seen,
                    "sums": self._sums["train"].state(),
                    "loss_since_log": self._tr_loss,
                    "last_logged_step": self._globalstep_last_logged,
                    "method": self.method_state(),
                },
                os.path.join(staging, _RANK_STATE.format(rank=self.args.process_index)),
            )
        if self.args.should_save:
            for callback in [*self.callback_handler.callbacks, self.control]:
                if hasattr(callback, "state") and type(callback).__name__ in self.state.stateful_callbacks:
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            self.state.save_to_json(os.path.join(staging, "trainer_state.json"))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            facts = {"run": self._run, "started": self._started}
            checkpoint.publish(final, step=self.state.global_step, world_size=self.args.world_size, **facts)
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        if not adapters.restore_adapter(model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            adapters.prepare_quantised(model)  # PEFT loads a bfloat16 adapter back in float32

    def _load_between_logs(self, folder: Path) -> None:
        world = checkpoint.manifest(folder).get("world_size")
        if world is None:
            return  # another library's checkpoint
        paths = [folder / _RANK_STATE.format(rank=rank) for rank in range(world)]
        if not all(path.exists() for path in paths):
            notify_once(
                f"{folder.name} holds the model alone: the optimizer, the counters and the data order start afresh"
            )
            return
        same = world == self.args.world_size
        wanted = sorted({0, self.args.process_index}) if same else range(world)
        states = [torch.load(paths[rank], map_location="cpu", weights_only=True) for rank in wanted]
        if same:
            state = states[-1]
            state["method"] = {**states[0]["method"], **state["method"]}
        else:
            notify_once(f"{folder.name} was written by {world} processes and is resumed by {self.args.world_size}")
            state = states[0]
            state["method"] = self.joined_state([each["method"] for each in states])
            state["tokens_seen"] = sum(each["tokens_seen"] for each in states) * (self.args.process_index == 0)
            state["sums"] = {}
            state["loss_since_log"] = torch.stack([each["loss_since_log"] for each in states]).mean()
        self._tokens_seen = state["tokens_seen"]
        self.load_method_state(state["method"])
        self._sums["train"].load(state["sums"], self.args.device)
        self._between_logs = state

    def _restore_between_logs(self) -> None:
        if self._between_logs is None:
            return
        state, self._between_logs = self._between_logs, None
        self._tr_loss = state["loss_since_log"].to(self.args.device)
        # The final summary is of this call's steps alone: what was already earned is taken off.
        self._total_loss_scalar -= self._tr_loss.item()
        self._globalstep_last_logged = state["last_logged_step"]


def _train_split(splits: dict[str, Any]) -> Any:
    """What to train on of a dictionary: its split `train`. A dictionary of columns is a data set by itself."""
    if not all(map(sources.is_data_set, splits.values())):
        return splits
    whole = isinstance(splits, DatasetDict | IterableDatasetDict)
    dataset = sources.load(splits, "train") if whole else splits.get("train")
    if dataset is None:
        raise ValueError(
            f"train_dataset is a dictionary of the data sets {', '.join(map(str, splits))}: pass one of them, or join "
            "them with datasets.concatenate_datasets"
        )
    taken = next((name for name in splits if splits[name] is dataset), "train")
    others = ", ".join(str(name) for name in splits if name != taken)
    notify_once(
        f"train_dataset is a dictionary of splits: `{taken}` is trained on" + f", and not {others}" * bool(others)
    )
    return dataset


def _lengths(dataset: Dataset) -> np.ndarray:
    """Tokens of each prepared row."""
    total = np.zeros(len(dataset), dtype=np.int64)
    columns = [name for name in dataset.column_names if name == "input_ids" or name.endswith("_ids")]
    place = 0
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
        for name in columns:
            total[place : place + len(table)] += pc.list_value_length(table[name]).to_numpy().astype(np.int64)
        place += len(table)
    return total


def _special_tokens(tokenizer: Any, eos: str | None, pad: str | None) -> None:
    """Set end and padding tokens by name; without a padding token the end token stands in (masks go by position)."""
    for what, token in (("eos_token", eos), ("pad_token", pad)):
        if token is None:
            continue
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise ValueError(f"{what}={token!r} is not in the tokenizer's vocabulary")
        setattr(tokenizer, what, token)
    if getattr(tokenizer, "pad_token", None) is None and getattr(tokenizer, "eos_token", None) is not None:
        tokenizer.pad_token = tokenizer.eos_token
