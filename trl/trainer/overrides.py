"""What users override: how it is found, and how a loss of their own is brought to the scale of the step."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Sampler
from transformers import Trainer

from trl.data.batching.batches import RowBatches, SamplerBatches
from trl.engine.forest import Batch
from trl.notices import notify_once

ROWS = "rows of the batch"  # a kind of the step's counts beside those of the method
OURS = ("trl", "transformers")


def is_overridden(trainer: Trainer, name: str) -> bool:
    """Whether a method or attribute is the user's: of a subclass, put into one of our classes, or into the instance."""
    if name in vars(trainer):
        return True
    owner = next(part for part in type(trainer).__mro__ if name in vars(part))
    modules = owner.__module__, getattr(vars(owner)[name], "__module__", None) or owner.__module__
    return any(module.split(".")[0] not in OURS for module in modules)


def has_own_loss(trainer: Any) -> bool:
    return trainer.compute_loss_func is not None or is_overridden(trainer, "compute_loss")


def reads_batches(trainer: Any) -> str | None:
    """The first of the user's functions that may read a batch, which then is one of padded rows with labels."""
    if trainer.compute_loss_func is not None:
        return "compute_loss_func"
    names = ("compute_loss", "training_step", "prediction_step")
    return next((name for name in names if is_overridden(trainer, name)), None)


# --- a loss of the user's own ---------------------------------------------------------------------------------------


class Items(Tensor):
    """`num_items_in_batch` as a user's loss gets it: knows whether anything was computed with it."""

    used: bool

    @staticmethod
    def of(value: Any) -> "Items":
        items = torch.as_tensor(value).detach().as_subclass(Items)
        items.used = False
        return items

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for each in args:
            if isinstance(each, Items) and func is not Tensor.__repr__:
                each.used = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def scaled(trainer: Any, batch: Batch, value: Tensor, by_items: bool) -> Tensor:
    """What a user's loss returned for a micro-batch, as the micro-batch's share of the step's loss.

    A sum divided by `num_items_in_batch` (`by_items`) is a share already. Anything else is a mean over the micro-batch,
    and weighs by its rows. Gradients are averaged over the ranks afterwards, so that a share is taken times their
    number.
    """
    if is_overridden(trainer, "loss_is_scaled_for_ga"):
        return value  # transformers' own word for how a loss is scaled
    ranks = trainer.args.world_size if trainer.mode == "train" else 1
    trainer.own_weight = "items" if by_items else ROWS
    if by_items:
        return value * ranks
    return value * (batch["row_S"].shape[0] * ranks / trainer.step_for(batch).count(ROWS))


def by_loss_func(trainer: Any, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
    """The micro-batch's share of the step's loss by `compute_loss_func`, and the model's outputs, where it has rows."""
    if batch["row_S"].shape[0] == 0:
        return loss_of_nothing(trainer, model, batch), None
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    items = Items.of(trainer.step_for(batch).count(None))
    loss = trainer.compute_loss_func(outputs, batch["labels"], num_items_in_batch=items)
    return scaled(trainer, batch, loss, items.used), outputs


def loss_of_nothing(trainer: Any, model: nn.Module, batch: Batch) -> Tensor:
    """Zero, with a gradient of zero for every parameter that trains: what a rank without rows adds."""
    sums, metrics = trainer.loss(model, batch, trainer.step_for(batch))
    if trainer.compute_loss_func is None and trainer.calls_ours:
        trainer._add(trainer.mode, metrics)
    return torch.stack(list(sums.values())).sum()


@contextlib.contextmanager
def completed(trainer: Any) -> Iterator[None]:
    """While it lasts, an overridden `compute_loss` returns its micro-batch's share of the step's loss.

    What the user made of `super().compute_loss` is one already. A micro-batch without rows (a rank whose share is
    empty) is not shown to the user's code, which would take the mean of nothing: it adds exactly zero.
    """
    if not is_overridden(trainer, "compute_loss"):
        yield
        return
    own, patched = trainer.compute_loss, "compute_loss" in vars(trainer)
    parameters = inspect.signature(own).parameters
    takes_items = "num_items_in_batch" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def compute_loss(
        model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if inputs["row_S"].shape[0] == 0:
            nothing = loss_of_nothing(trainer, model, inputs)
            return (nothing, None) if return_outputs else nothing
        items = Items.of(trainer.step_for(inputs).count(None) if num_items_in_batch is None else num_items_in_batch)
        trainer.calls_ours = False
        given: dict[str, Any] = {"num_items_in_batch": items} if takes_items else {}
        if return_outputs:
            given["return_outputs"] = True
        found = own(model, dict(inputs), **given)
        loss, *outputs = found if isinstance(found, tuple) else (found,)
        if trainer.calls_ours:
            trainer.own_weight = "items"
        else:
            loss = scaled(trainer, inputs, loss, items.used)
        return (loss, *outputs) if return_outputs else loss

    trainer.compute_loss = compute_loss
    try:
        yield
    finally:
        if patched:
            trainer.compute_loss = own
        else:
            del trainer.compute_loss


# --- the order of rows ----------------------------------------------------------------------------------------------


def in_sampler_order(trainer: Any, sampler: Sampler | None, batches: RowBatches) -> RowBatches:
    """The batches of a data set in the order of a sampler of the user's own; without one, in that of the rows."""
    if sampler is None:
        batches.shuffle, batches.lengths = False, None
        return batches
    if isinstance(sampler, DistributedSampler) or getattr(sampler, "num_replicas", 1) > 1:
        raise ValueError(
            f"{type(sampler).__name__} yields one process's part of the rows: return a sampler of the whole data set; "
            "its rows are split over the processes here"
        )

    def agree(order: list[int]) -> list[int]:
        # A sampler may draw from a generator that has moved apart on the ranks.
        if trainer.args.world_size > 1:
            shared = [order]
            torch.distributed.broadcast_object_list(shared, src=0)
            return shared[0]
        return order

    return SamplerBatches(sampler, batches, agree)


def sharding_notice(loader: DataLoader | None, processes: int) -> str | None:
    """What to say of a training loader of the user's own that no one has split over the processes."""
    if processes == 1 or loader is None:
        return None
    parts = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    known = (RowBatches, DistributedSampler)
    if any(isinstance(part, known) or type(part).__module__.startswith("accelerate") for part in parts):
        return None
    if getattr(loader, "batch_size", None) is None and getattr(loader, "batch_sampler", None) is None:
        return None  # a stream of ours, read in parts
    return (
        f"get_train_dataloader returned a loader that all {processes} processes read alike: wrap it in "
        "self.accelerator.prepare(...), unless its rows differ between the processes"
    )


# --- optimizers -----------------------------------------------------------------------------------------------------


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """An optimizer that updates nothing of what trains would run to the end and change nothing."""
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    count = len(trained)
    if trained and len(missing) == count:
        raise ValueError(
            f"the optimizer holds none of the {count} parameters that train (the first is {missing[0]}). Make it over "
            "the model that trains (peft_config adds an adapter when the trainer is made), or leave it out and pass "
            "optimizer_cls_and_kwargs= for its class and settings"
        )
    if missing:
        notify_once(
            f"the optimizer holds {count - len(missing)} of the {count} parameters that train; the others stay as they "
            f"are (the first is {missing[0]})"
        )
