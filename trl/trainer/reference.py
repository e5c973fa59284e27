"""A frozen policy to compare with: how it is chosen, its log-probs beforehand, and how it follows."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from trl.engine.reference import Frozen, Itself, Reference, choose, frozen
from trl.losses.tokens import seq_sum
from trl.models import load, shards
from trl.models.shards import is_sharded
from trl.models.unwrap import causal_lm
from trl.trainer.attributes import shows
from trl.trainer.metrics import sums_device
from trl.trainer.preference import PreferenceTrainer

# Rows whose reference log-probs are computed together and kept in one file; of a stream, that many are read ahead.
SHARD, STREAM_SHARD = 4096, 512


@shows("beta", fixed=("precompute_ref_log_probs",), precompute_ref_logps="precompute_ref_log_probs")
class ReferencedTrainer(PreferenceTrainer):
    """A preference trainer that compares the policy with a reference."""

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
        if ref_model is not None and ref_model is model:
            raise ValueError(
                "ref_model is the very model that trains, so that it would move too: leave ref_model out (the state at "
                "the start is then kept as the reference), or pass a copy"
            )
        self.reference: Reference | None = None
        self._explicit = ref_model
        # What the reference says of each row is a column of the data.
        self.ref_is_column = False
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

    # --- what a method supplies -----------------------------------------------------------------------------------

    ref_columns: tuple[str, ...]

    def needs_reference(self) -> bool:
        return True

    def reference_values(self, batch: Batch, score: Callable[[Batch], TokenStats]) -> Tensor:
        """The reference's log-probs of each row of a batch in the order of `ref_columns`, [rows, columns]."""
        raise NotImplementedError

    # --- the reference --------------------------------------------------------------------------------------------

    def ready(self) -> None:
        args = self.args
        if not self.needs_reference():
            if self._explicit is not None:
                raise ValueError("ref_model is given, but with these settings no reference is asked: leave it out")
            return
        explicit = self._explicit
        if isinstance(explicit, str):
            explicit = self.load_model(explicit, **(args.model_init_kwargs or {}))
        if explicit is not None:
            if args.world_size > 1:
                load.replace_device_map(explicit, args.device)
            explicit = self._placed(explicit)
        sets = self._data_sets()
        wanted = set(self.ref_columns)
        given = [bool(wanted) and wanted <= set(each.column_names or ()) for each in sets.values()]
        streams = any(isinstance(each, IterableDataset) for each in sets.values())
        self.ref_is_column = args.precompute_ref_log_probs or (any(given) and self.train_dataset is not None)
        if self.ref_is_column and args.sync_ref_model:
            raise ValueError(
                "sync_ref_model moves the reference, so that its log-probs cannot be computed beforehand: leave out "
                "precompute_ref_log_probs (and the columns of reference log-probs), or sync_ref_model"
            )
        if self.ref_is_column and not streams:
            if explicit is None:
                self.reference = Itself()
            else:
                self.reference = Frozen(frozen(explicit), f"the model given ({type(causal_lm(explicit)).__name__})")
        else:
            self.reference = choose(self.model, explicit, follows=args.sync_ref_model)
            if isinstance(self.reference, Frozen):
                self.reference.model = self._prepared_model(self.reference.model)
        if self.ref_is_column:
            self.train_dataset = self._with_reference(self.train_dataset)
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {key: self._with_reference(each) for key, each in self.eval_dataset.items()}
            else:
                self.eval_dataset = self._with_reference(self.eval_dataset)
            if not streams:
                # From the first step on it would be another one, or has done what it was for.
                self.reference = None
        if args.sync_ref_model:
            self.add_callback(_Follow(self))

    def _placed(self, model: Any) -> Any:
        """The model on this process's device. FSDP places what it shards; before, a whole model might not fit there."""
        quantised = getattr(causal_lm(model), "is_quantized", False)
        sharded = self.is_fsdp_enabled or shards.zero_3_is_planned()
        stays = quantised or sharded or getattr(model, "hf_device_map", None)
        return model if stays else model.to(self.args.device)

    def _prepared_model(self, model: Any) -> Any:
        """A model of its own, sharded as the policy will be."""
        if shards.zero_3_is_planned():
            import deepspeed

            settings = shards.inference_settings(self.accelerator.state.deepspeed_plugin.deepspeed_config)
            return deepspeed.initialize(model=model, config=settings)[0]
        if not self.is_fsdp_enabled:
            return self._placed(model)
        if self.accelerator.is_fsdp2:
            return fsdp2_prepare_model(self.accelerator, model)
        return self.accelerator.prepare_model(model)

    def _data_sets(self) -> dict[str, Any]:
        evaluation = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        sets = {"train": self.train_dataset, **evaluation}
        return {name: each for name, each in sets.items() if each is not None}

    def sequence_logp(self, stats: TokenStats) -> Tensor:
        """The log-prob of each completion: [S]."""
        return seq_sum(stats.logp_N, stats.seq_N, stats.sequences)

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference where it is a model of its own; None where it is the policy without its adapter, or with a
        frozen copy of it, and where its log-probs are columns of the data."""
        return self.reference.model if isinstance(self.reference, Frozen) else None

    def compute_ref_log_probs(self, inputs: Batch) -> tuple[Tensor, ...]:
        """The reference's log-probs of the rows of a batch (one of this trainer's dataloaders), a tensor for each of
        `ref_columns`."""
        if self.reference is None:
            raise ValueError(
                "there is no reference to ask: its log-probs are columns of the data, or these settings need none"
            )
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.reference_values(batch, self.ask_reference(self.model)).unbind(1)

    def ask_reference(self, model: nn.Module) -> Callable[[Batch], TokenStats]:
        reference = self.reference
        assert reference is not None
        return lambda batch: reference.score(model, batch)

    def report(self) -> list[str]:
        if not self.needs_reference():
            return [*super().report(), "reference: none"]
        if self.reference is None or self.ref_is_column:
            return [*super().report(), "reference: log-probs computed before the first step"]
        moves = ""
        if self.args.sync_ref_model:
            moves = (
                f", moved {self.args.ref_model_mixup_alpha:.0%} of the way to the policy every "
                f"{self.args.ref_model_sync_steps} steps"
            )
        return [*super().report(), f"reference: {self.reference.description}{moves}"]

    def for_evaluation(self, dataset: Any, name: str) -> Any:
        dataset = super().for_evaluation(dataset, name)
        if not self.ref_is_column:
            return dataset
        for each in dataset.values() if isinstance(dataset, dict) else [dataset]:
            has = set(self.ref_columns) <= set(each.column_names)
            if not has and self.reference is None and self.state.global_step:
                raise ValueError(
                    "with precompute_ref_log_probs the reference is gone once training has begun: pass this data set "
                    "as eval_dataset when the trainer is made, or turn precompute_ref_log_probs off"
                )
        return dataset

    def method_state(self) -> dict[str, Any]:
        if not self.args.sync_ref_model or self.reference is None:
            return {}
        if self.args.process_index and not is_sharded(self.model):
            return {}  # a whole reference is the same on every rank
        return {"reference": {name: weight.detach().cpu() for name, weight in self.reference.weights().items()}}

    def load_method_state(self, state: dict[str, Any]) -> None:
        if "reference" in state and self.reference is not None:
            with torch.no_grad():
                for name, weight in self.reference.weights().items():
                    saved = state["reference"][name]
                    if saved.shape != weight.shape:
                        raise ValueError(
                            f"the reference's {name} has the shape {tuple(saved.shape)} in the checkpoint and "
                            f"{tuple(weight.shape)} here: a sharded reference is saved in parts, one for each process; "
                            "resume with as many processes"
                        )
                    weight.copy_(saved)

    # --- log-probs computed beforehand ----------------------------------------------------------------------------

    def _with_reference(self, dataset: Any) -> Any:
        """The data set with the reference's log-probs as columns."""
        if dataset is None or set(self.ref_columns) <= set(dataset.column_names or ()):
            return dataset
        key = self._reference_key()

        def logps(columns: dict[str, list[Any]]) -> np.ndarray:
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            return self._reference_shard(rows, key)

        if isinstance(dataset, IterableDataset):

            def with_logps(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
                table = logps(columns)
                return {**columns, **{name: table[:, index].tolist() for index, name in enumerate(self.ref_columns)}}

            return dataset.map(with_logps, batched=True, batch_size=STREAM_SHARD)
        # A shard's rows are read, of those columns that a batch is made of, and dropped again.
        wanted = [name for name in dataset.column_names if name in self.prepared_columns or name.endswith("_ids")]
        rows = dataset.select_columns(wanted).with_format(None)
        starts = range(0, len(dataset), SHARD)
        tables = [logps(rows.select(range(start, min(start + SHARD, len(rows)))).to_dict()) for start in starts]
        table = np.concatenate([*tables, np.zeros((0, len(self.ref_columns)), dtype=np.float32)])
        for index, column in enumerate(self.ref_columns):
            dataset = dataset.add_column(column, table[:, index])
        return dataset

    def _reference_key(self) -> str:
        """Names the reference: its weights, their dtype, and all that changes its numbers beside the data."""
        assert self.reference is not None
        model = self.reference.model if isinstance(self.reference, Frozen) else self.model
        digest = hashlib.sha256()
        base = causal_lm(model)
        precision = self.args.bf16, self.args.fp16
        about = (type(base).__name__, base.config.to_json_string(), precision, transformers.__version__, type(self))
        digest.update(repr((*about, self.ref_columns, self.reference_options())).encode())
        for name, tensor in shards.whole_weights(model):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def reference_options(self) -> Any:
        """Settings of the method that change `reference_values`."""
        return ()

    def _reference_shard(self, rows: list[dict[str, Any]], key: str) -> np.ndarray:
        """The reference's log-probs of some rows, [rows, columns], from disk where they are known."""
        digest = hashlib.sha256(key.encode())
        for row in rows:
            for name in sorted(row):
                if name.endswith("_ids"):
                    digest.update(name.encode() + np.asarray(row[name], dtype=np.int64).tobytes())
        path = reference_cache() / f"{digest.hexdigest()[:32]}.safetensors"
        known = load_file(path)["logps"].numpy() if self.args.process_index == 0 and path.exists() else None
        if self.args.world_size > 1:
            known = broadcast_object_list([known])[0]  # the first rank's disk decides
        if known is not None:
            return known
        table = self._compute_reference(rows)
        if self.args.process_index == 0:
            write_file(path, lambda place: save_file({"logps": torch.from_numpy(table)}, place))
        return table

    def _compute_reference(self, rows: list[dict[str, Any]]) -> np.ndarray:
        args = self.args
        if self.is_fsdp_enabled:
            raise ValueError(
                "precompute_ref_log_probs is not for FSDP, which shards weights when training begins: run it once in a "
                "single process with the same settings (the numbers are kept on disk and found again), or leave it out"
            )
        size = args.precompute_ref_batch_size or args.train_batch_size
        table = torch.zeros(len(rows), len(self.ref_columns), dtype=torch.float64, device=sums_device(args.device))
        ask = self.ask_reference(self.model)
        together = size * args.world_size
        model = self.reference.model if isinstance(self.reference, Frozen) else self.model
        with shards.gathered(model):
            for start in range(0, len(rows), together):
                places = range(len(rows))[start : start + together][args.process_index :: args.world_size]
                batch = self._prepare_inputs(self._collate([{**rows[place], "row": place} for place in places]))
                with torch.no_grad(), self.compute_loss_context_manager():
                    values = self.reference_values(batch, ask)
                if places:  # else this rank's part of the last batch is empty
                    # Rows of equal prompts stand together in a batch, so that it has an order of its own.
                    places_of = batch["row_S"].view(values.shape[0], -1)[:, 0]
                    table[places_of.to(table.device)] = values.to(table.device).double()
        if args.world_size > 1:
            torch.distributed.all_reduce(table)
        return table.float().cpu().numpy()


def reference_cache() -> Path:
    """Where log-probs of references are kept."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "trl_reference"


class _Follow(TrainerCallback):
    """Moves the reference towards the policy every so many steps."""

    def __init__(self, trainer: ReferencedTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            assert self.trainer.reference is not None
            self.trainer.reference.follow(self.trainer.model, args.ref_model_mixup_alpha)
