"""A frozen policy to compare with: how it is chosen, its log-probs beforehand, and how it follows."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate.utils import broadcast_object_list
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from trl.checkpoint import write_file
from trl.engine.forest import Batch
from trl.engine.head import TokenStats
from trl.engine.reference import Frozen, Itself, Reference, Twin, choose
from trl.models import liger, load, shards
from trl.models.shards import is_sharded
from trl.models.unwrap import unwrap
from trl.trainer.base import BaseTrainer
from trl.trainer.method import Component
from trl.trainer.metrics import sums_device

# Rows whose reference log-probs are computed together and kept in one file; of a stream, that many are read ahead.
SHARD, STREAM_SHARD = 4096, 512


class ReferencePolicy(Component):
    """The frozen policy that a trainer compares with.

    `explicit` is the user's `ref_model`: a model, a name or None. Without one the reference is the policy `model` as it
    is when the trainer is made (see `engine.reference.choose`). The method says the rest: `is_needed`; `columns`, under
    whose names log-probs can be part of the data; `values`, which are those of a batch, [rows, columns], by a function
    that scores it; `options`, the settings that change them.
    """

    def __init__(
        self,
        explicit: str | nn.Module | None,
        model: Any,
        *,
        is_needed: Callable[[], bool],
        columns: Callable[[], tuple[str, ...]] = tuple,
        values: Callable[[Batch, Callable[[Batch], TokenStats]], Tensor] | None = None,
        options: Callable[[], Any] = tuple,
    ) -> None:
        if explicit is not None and explicit is model:
            raise ValueError(
                "ref_model is the very model that trains, so that it would move too: leave ref_model out (the state at "
                "the start is then kept as the reference), or pass a copy"
            )
        self.explicit, self.is_needed = explicit, is_needed
        self.columns, self.values, self.options = columns, values, options
        self.policy: Reference | None = None  # None also where its log-probs are columns of the data
        self._to_load: dict[str, Tensor] | None = None  # a checkpoint's weights, until training begins
        self.is_column = False

    @property
    def model(self) -> nn.Module | None:
        """The reference where it is a model of its own; None where it is the policy without its adapter, or with a
        frozen copy of it, and where its log-probs are columns of the data."""
        return self.policy.model if isinstance(self.policy, Frozen) else None

    def score(self, model: nn.Module, batch: Batch, **asked: Any) -> TokenStats:
        """A batch scored by the reference; `model` is the policy, `asked` is for `engine.score.score`."""
        if self.policy is None:
            raise ValueError(
                "there is no reference to ask: its log-probs are columns of the data, or these settings need none"
            )
        return self.policy.score(model, batch, **asked)

    def ask(self, model: nn.Module) -> Callable[..., TokenStats]:
        """`score` for this policy."""
        return functools.partial(self.score, model)

    def log_probs(self, trainer: BaseTrainer, inputs: Batch) -> tuple[Tensor, ...]:
        """The reference's log-probs of the rows of a batch, a tensor for each of the columns."""
        assert self.values is not None
        ask, batch = self.ask(trainer.model), trainer._prepare_inputs(inputs)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            return self.values(batch, ask).unbind(1)

    # --- as a part of the trainer ---------------------------------------------------------------------------------

    def on_ready(self, trainer: BaseTrainer) -> None:
        args = trainer.args
        if not self.is_needed():
            if self.explicit is not None:
                raise ValueError("ref_model is given, but with these settings no reference is asked: leave it out")
            return
        explicit = self.explicit
        if isinstance(explicit, str):
            init_kwargs: Any = args.model_init_kwargs or {}
            explicit = trainer.load_model(explicit, **init_kwargs)
        if explicit is not None:
            liger.patch(explicit, args)
            if args.world_size > 1:
                load.replace_device_map(explicit, args.device)
            explicit = placed(trainer, explicit)
        evaluation = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
        sets = [each for each in (trainer.train_dataset, *evaluation.values()) if each is not None]
        wanted = set(self.columns())
        given = [bool(wanted) and wanted <= set(each.column_names or ()) for each in sets]
        streams = any(isinstance(each, IterableDataset) for each in sets)
        self.is_column = args.precompute_ref_log_probs or (any(given) and trainer.train_dataset is not None)
        if self.is_column and args.sync_ref_model:
            raise ValueError(
                "sync_ref_model moves the reference, so that its log-probs cannot be computed beforehand: leave out "
                "precompute_ref_log_probs (and the columns of reference log-probs), or sync_ref_model"
            )
        if self.is_column and not streams and explicit is None:
            self.policy = Itself()
        else:
            precision = trainer.compute_loss_context_manager
            self.policy = choose(trainer.model, explicit, follows=args.sync_ref_model, precision=precision)
        if isinstance(self.policy, Frozen):
            trainer.attachment.serve_too(unwrap(self.policy.model)._trl_attachment, "the reference")
            if not self.is_column or streams:
                self.policy.model = _prepared(trainer, self.policy.model)
        if self.is_column:
            trainer.train_dataset = self._with_columns(trainer, trainer.train_dataset)
            if isinstance(trainer.eval_dataset, dict):
                trainer.eval_dataset = {
                    key: self._with_columns(trainer, each) for key, each in trainer.eval_dataset.items()
                }
            else:
                trainer.eval_dataset = self._with_columns(trainer, trainer.eval_dataset)
            if not streams:
                # Log-probs are stored: drop the reference so that the model it holds can be freed.
                self.policy = None
        if args.sync_ref_model:
            trainer.add_callback(_Follow(self))

    def report(self, trainer: BaseTrainer) -> list[str]:
        if not self.is_needed():
            return ["reference: none"]
        if self.policy is None or self.is_column:
            return ["reference: log-probs computed before the first step"]
        moves = ""
        if trainer.args.sync_ref_model:
            moves = (
                f", moved {trainer.args.ref_model_mixup_alpha:.0%} of the way to the policy every "
                f"{trainer.args.ref_model_sync_steps} steps"
            )
        return [f"reference: {self.policy.description}{moves}"]

    def check_evaluation(self, trainer: BaseTrainer, dataset: Any) -> None:
        if not self.is_column:
            return
        for each in dataset.values() if isinstance(dataset, dict) else [dataset]:
            has = set(self.columns()) <= set(each.column_names)
            if not has and self.policy is None and trainer.state.global_step:
                raise ValueError(
                    "with precompute_ref_log_probs the reference is gone once training has begun: pass this data set "
                    "as eval_dataset when the trainer is made, or turn precompute_ref_log_probs off"
                )

    def state(self, trainer: BaseTrainer) -> dict[str, Any]:
        if not trainer.args.sync_ref_model or self.policy is None:
            return {}
        if trainer.args.process_index and not is_sharded(trainer.model):
            return {}  # a whole reference is the same on every rank
        return {"reference": {name: weight.detach().cpu() for name, weight in self.policy.weights().items()}}

    def load_state(self, trainer: BaseTrainer, state: dict[str, Any]) -> None:
        if "reference" in state and self.policy is not None:
            self._to_load = state["reference"]
            # A twin lives in the policy, which FSDP and DeepSpeed shard only when training begins.
            if not isinstance(self.policy, Twin) or is_sharded(trainer.model):
                self.load()

    def load(self) -> None:
        """Put a checkpoint's weights into the reference. ValueError if they are sharded in another way."""
        saved, self._to_load = self._to_load, None
        if saved is None or self.policy is None:
            return
        with torch.no_grad():
            for name, weight in self.policy.weights().items():
                if saved[name].shape != weight.shape:
                    raise ValueError(
                        f"the reference's {name} has the shape {tuple(saved[name].shape)} in the checkpoint and "
                        f"{tuple(weight.shape)} here: a sharded reference is saved in parts, one for each process; "
                        "resume with as many processes"
                    )
                weight.copy_(saved[name])

    # --- log-probs computed beforehand ----------------------------------------------------------------------------

    def _with_columns(self, trainer: BaseTrainer, dataset: Any) -> Any:
        """The data set with the reference's log-probs as columns."""
        if dataset is None or set(self.columns()) <= set(dataset.column_names or ()):
            return dataset
        key = self._key(trainer)

        def logps(columns: dict[str, list[Any]]) -> np.ndarray:
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            return self._shard(trainer, rows, key)

        if isinstance(dataset, datasets.IterableDataset):

            def with_logps(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
                table = logps(columns)
                return {**columns, **{name: table[:, index].tolist() for index, name in enumerate(self.columns())}}

            stream = dataset.map(with_logps, batched=True, batch_size=STREAM_SHARD)
            trainer.prepared_streams.append(stream)
            return stream
        # A shard's rows are read, of those columns that a batch is made of, and dropped again.
        wanted = [name for name in dataset.column_names if name in trainer.prepared_columns or name.endswith("_ids")]
        rows = dataset.select_columns(wanted).with_format(None)
        starts = range(0, len(dataset), SHARD)
        tables = [logps(rows.select(range(start, min(start + SHARD, len(rows)))).to_dict()) for start in starts]
        table = np.concatenate([*tables, np.zeros((0, len(self.columns())), dtype=np.float32)])
        for index, column in enumerate(self.columns()):
            dataset = dataset.add_column(column, table[:, index])
        return dataset

    def _key(self, trainer: BaseTrainer) -> str:
        """Names the reference: its weights, their dtype, and all that changes its numbers beside the data."""
        assert self.policy is not None
        model = self.policy.model if isinstance(self.policy, Frozen) else trainer.model
        digest = hashlib.sha256()
        base = unwrap(model)
        precision = trainer.args.bf16, trainer.args.fp16
        about = (type(base).__name__, base.config.to_json_string(), precision, transformers.__version__, type(trainer))
        digest.update(repr((*about, self.columns(), self.options())).encode())
        for name, tensor in shards.whole_weights(model):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _shard(self, trainer: BaseTrainer, rows: list[dict[str, Any]], key: str) -> np.ndarray:
        """The reference's log-probs of some rows, [rows, columns], from disk where they are known."""
        digest = hashlib.sha256(key.encode())
        for row in rows:
            for name in sorted(row):
                if name.endswith("_ids"):
                    digest.update(name.encode() + np.asarray(row[name], dtype=np.int64).tobytes())
        path = reference_cache() / f"{digest.hexdigest()[:32]}.safetensors"
        known = load_file(path)["logps"].numpy() if trainer.args.process_index == 0 and path.exists() else None
        if trainer.args.world_size > 1:
            known = broadcast_object_list([known])[0]  # the first rank's disk decides
        if known is not None:
            return known
        table = self._computed(trainer, rows)
        if trainer.args.process_index == 0:
            write_file(path, lambda place: save_file({"logps": torch.from_numpy(table)}, place))
        return table

    def _computed(self, trainer: BaseTrainer, rows: list[dict[str, Any]]) -> np.ndarray:
        args = trainer.args
        assert self.values is not None
        if trainer.is_fsdp_enabled:
            raise ValueError(
                "precompute_ref_log_probs is not for FSDP, which shards weights when training begins: run it once in a "
                "single process with the same settings (the numbers are kept on disk and found again), or leave it out"
            )
        size = args.precompute_ref_batch_size or args.train_batch_size
        table = torch.zeros(len(rows), len(self.columns()), dtype=torch.float64, device=sums_device(args.device))
        ask = self.ask(trainer.model)
        together = size * args.world_size
        model = self.policy.model if isinstance(self.policy, Frozen) else trainer.model
        with shards.gathered(model):
            for start in range(0, len(rows), together):
                places = range(len(rows))[start : start + together][args.process_index :: args.world_size]
                batch = trainer._prepare_inputs(
                    trainer.data_collator([{**rows[place], "row": place} for place in places])
                )
                with torch.no_grad(), trainer.compute_loss_context_manager():
                    values = self.values(batch, ask)
                if places:  # else this rank's part of the last batch is empty
                    # Rows of equal prompts stand together in a batch, so that it has an order of its own.
                    places_of = batch["row_S"].view(values.shape[0], -1)[:, 0]
                    table[places_of.to(table.device)] = values.to(table.device).double()
        if args.world_size > 1:
            torch.distributed.all_reduce(table)
        return table.float().cpu().numpy()


def placed(trainer: BaseTrainer, model: Any) -> Any:
    """The model on this process's device. FSDP places what it shards; before, a whole model might not fit there."""
    quantised = getattr(unwrap(model), "is_quantized", False)
    sharded = trainer.is_fsdp_enabled or shards.zero_3_is_planned()
    stays = quantised or sharded or getattr(model, "hf_device_map", None)
    return model if stays else model.to(trainer.args.device)


def _prepared(trainer: BaseTrainer, model: Any) -> Any:
    """A model of its own, sharded as the policy will be."""
    if shards.zero_3_is_planned():
        import deepspeed

        settings = shards.inference_settings(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
        return deepspeed.initialize(model=model, config=settings)[0]
    if not trainer.is_fsdp_enabled:
        return placed(trainer, model)
    if trainer.accelerator.is_fsdp2:
        return fsdp2_prepare_model(trainer.accelerator, model)
    return trainer.accelerator.prepare_model(model)


def reference_cache() -> Path:
    """Where log-probs of references are kept."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "trl_reference"


class _Follow(TrainerCallback):
    """Moves the reference towards the policy every `ref_model_sync_steps` steps."""

    def __init__(self, reference: ReferencePolicy) -> None:
        self.reference = reference

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.reference.load()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            assert self.reference.policy is not None
            self.reference.policy.follow(model, args.ref_model_mixup_alpha)
