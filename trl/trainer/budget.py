"""How many tokens a forward pass may have, and steps that are taken again where memory ran out.

Any split of a step gives the same gradient. So the user's batch size says what a step is, and a budget of tokens says
how it is cut. Where memory runs out, the gradients of the step so far are dropped, the budget is halved and the whole
step is taken again: nothing of it is counted twice, however far it had come.

A process that failed must not be waited for in the middle of a backward pass. So several processes with a budget run
their micro-batches each for itself, then say whether they had the memory, and exchange gradients in one more pass, over
an empty batch. Without a budget, and where weights are sharded, so that each layer is gathered by all together, the
error says what to set.

Just below its limit a GPU is slow: the allocator finds memory only after it has given back all that it holds, which
waits for the device. Where that happens in a few steps on end, the budget is lowered too.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from trl.engine.forest import Batch, computed
from trl.notices import notify_once
from trl.rollout.pack import equally_many

from . import overrides, planned
from .loader import SOURCE
from .method import Component

TIGHT = 3  # steps on end in which the allocator had to give back what it held, before the budget is lowered
NONE = 2**62  # tokens: no budget that any step has
OF_A_LACK = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Share(NamedTuple):
    """A micro-batch: its tokens, the rows that it could be cut into, and its longest row."""

    tokens: int
    rows: int
    longest: str


class Budget(Component):
    """The tokens of a forward pass, and what is known of the step under way.

    `tokens` is None as long as micro-batches are those that the batch size gives.
    """

    def __init__(self) -> None:
        self.tokens: int | None = None
        self.shares: list[Share] = []  # the micro-batches of the step under way, or of the evaluation's batch
        self._rows: list[Any] = []  # what the step is made of, on this rank; empty if that cannot be cut
        self._failed = False  # memory ran out in this step, on this rank
        self._returned: Any = 0.0  # the loss of what is handed out of the step so far
        self._metrics: dict[str, Any] = {}  # those before the step
        self._retries = 0  # of the allocator, before the step
        self._tight = 0  # steps on end in which it tried again

    def on_ready(self, trainer: Any) -> None:
        asked = trainer.args.max_tokens_per_micro_batch
        self.tokens = planned.tokens_that_fit(trainer) if asked == "auto" else asked

    def report(self, trainer: Any) -> list[str]:
        if trainer.args.max_tokens_per_micro_batch is None or self.tokens is None:
            return []
        return [f"micro-batches: at most {self.tokens:,} tokens each (max_tokens_per_micro_batch)"]

    def state(self, trainer: Any) -> dict[str, Any]:
        asked = trainer.args.max_tokens_per_micro_batch
        return {} if self.tokens is None else {"micro_batch_tokens": self.tokens, "micro_batch_tokens_asked": asked}

    def load_state(self, trainer: Any, state: dict[str, Any]) -> None:
        """What the run before came down to, unless another budget is asked for now."""
        if state.get("micro_batch_tokens_asked") == trainer.args.max_tokens_per_micro_batch:
            self.tokens = state.get("micro_batch_tokens", self.tokens)

    # --- micro-batches --------------------------------------------------------------------------------------------

    def cut(self, trainer: Any, batches: Sequence[Batch], equally: bool = True) -> list[Batch]:
        """The rows of the batches in micro-batches of the budget: on all ranks as many, if they are to be `equally`
        many. Without a budget, and where rows are not known (a loader of the user's own), the batches as they are."""
        sources = [batch.get(SOURCE) for batch in batches]
        known = bool(sources) and None not in sources
        self._rows = [row for batch in batches for row in batch[SOURCE].rows] if known else []
        if known and self.tokens is not None:
            return self._made(trainer, equally)
        self.shares = [
            Share(computed(batch)[1], len(batch[SOURCE].rows), _longest(batch[SOURCE].rows))
            if known
            else Share(computed(batch)[1], 1, "a batch of a loader of your own")
            for batch in batches
        ]
        if self.tokens is not None and batches:
            notify_once("the batches of a loader of your own are not cut by max_tokens_per_micro_batch")
        return list(batches)

    def _made(self, trainer: Any, equally: bool = True) -> list[Batch]:
        groups: list[list[Any]] = []
        left = 0
        for row in self._rows:
            cost = tokens_of(row)
            if not groups or cost > left:
                groups.append([])
                left = self.tokens or 0
            groups[-1].append(row)
            left -= cost
        self.shares = [Share(sum(map(tokens_of, group)), len(group), _longest(group)) for group in groups]
        groups = groups or [[]]
        if equally:
            groups = equally_many(groups, trainer.args.world_size, trainer.args.device)
        return [trainer.made_of(group) for group in groups]

    # --- a step ---------------------------------------------------------------------------------------------------

    def begin(self, trainer: Any) -> None:
        """A step begins, whose metrics are yet to be added."""
        self._failed, self._returned, self._retries = False, 0.0, retries_on(trainer.args.device)
        self._metrics = dict(trainer._sums["train"].metrics)

    def part(self, trainer: Any, model: nn.Module, batches: Sequence[Batch], items: Any) -> Tensor:
        """The backward passes of one call of `training_step`, whose loss is returned. The last one of a step takes the
        whole step again if memory ran out in any."""
        alone = self.agrees(trainer)
        loss = self._tried(trainer, lambda: passes(trainer, model, batches, items, alone))
        if not trainer.accelerator.sync_gradients:
            self._returned += loss
            return loss

        def again() -> Tensor:
            trainer.begin_step(self._made(trainer))
            return passes(trainer, model, trainer.under_way.batches, trainer.under_way.count(None), alone)

        return self._ended(trainer, model, again, loss + self._returned) - self._returned

    def whole(self, trainer: Any, model: nn.Module, take: Callable[[bool], Tensor]) -> Tensor:
        """The loss of a step that `take` cuts and takes; it is told whether to leave out the exchange of gradients."""
        self.begin(trainer)
        alone = self.agrees(trainer)
        loss = self._tried(trainer, lambda: take(alone))
        return self._ended(trainer, model, lambda: take(alone), loss)

    def _ended(self, trainer: Any, model: nn.Module, again: Callable[[], Tensor], loss: Tensor) -> Tensor:
        """The loss of the step, taken again until memory is enough for every rank."""
        lowered = False
        while (tokens := self._lowered(trainer)) is not None:
            self.tokens, self._failed, lowered = tokens, False, True
            model.zero_grad()
            trainer._sums["train"].metrics = dict(self._metrics)
            trainer.forget_step()
            loss = self._tried(trainer, again)
        if lowered:
            self._tight = 0
            notify_once(
                f"memory ran out in step {trainer.state.global_step + 1}: it was taken again, with the same gradient, "
                f"and micro-batches have at most {self.tokens:,} tokens from here on (max_tokens_per_micro_batch)"
            )
        if self.agrees(trainer):
            passes(trainer, model, [trainer.made_of([])], None, alone=False)
        self._ease(trainer)
        if self.tokens is not None and overrides.has_own_loss(trainer) and trainer.own_weight == overrides.ROWS:
            notify_once(
                "compute_loss returns means of micro-batches, which weigh by their rows: how the budget of tokens cuts "
                "a step changes its gradient. A sum over tokens divided by num_items_in_batch is the same in any cut"
            )
        return loss

    def _ease(self, trainer: Any) -> None:
        """Lower the budget where step after step memory was found only at the second try."""
        self._tight = self._tight + 1 if retries_on(trainer.args.device) > self._retries else 0
        can_be_cut = any(share.rows > 1 for share in self.shares)
        # Ranks without a budget do not agree on one, and so none may begin to have one.
        if self._tight == TIGHT and can_be_cut and (self.tokens is not None or trainer.args.world_size == 1):
            self._tight, self.tokens = 0, self._lower(0.75)
            notify_once(
                f"memory was found only at the second try in {TIGHT} steps on end, which is slow: micro-batches have "
                f"at most {self.tokens:,} tokens from here on (max_tokens_per_micro_batch), with the same gradient"
            )

    def agrees(self, trainer: Any) -> bool:
        """Whether the ranks run their micro-batches alone, and say afterwards whether they had the memory."""
        return trainer.args.world_size > 1 and self.tokens is not None and not _is_sharded(trainer)

    def _tried(self, trainer: Any, take: Callable[[], Tensor]) -> Tensor:
        """The loss that `take` returns; 0 where memory runs out, or has run out in this step."""
        if not self._failed:
            try:
                return take()
            except (RuntimeError, MemoryError) as error:
                if not is_lack_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            self._failed = True
            self._check_that_it_helps(trainer, reason)
        return torch.zeros((), device=trainer.args.device)

    def _lowered(self, trainer: Any) -> int | None:
        """The budget to take the step again with; None if every rank has taken it."""
        wanted = self._lower(0.5) if self._failed else NONE
        if self.agrees(trainer):
            least = torch.tensor(wanted, device=trainer.args.device)
            torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
            wanted = int(least)
        return wanted if wanted < NONE else None

    def _check_that_it_helps(self, trainer: Any, reason: str) -> None:
        """torch.OutOfMemoryError where smaller micro-batches are not possible, or too late. Frees what is not used."""
        free_memory()  # what the passes held went with the exception
        args, largest = trainer.args, max(self.shares, default=Share(0, 1, "a batch"))
        if not any(share.rows > 1 for share in self.shares):
            needs_less = [
                *["gradient_checkpointing=True"] * (not args.gradient_checkpointing),
                *["activation_offloading=True"] * (not args.activation_offloading),
                "a smaller max_length (max_prompt_length, max_completion_length)",
                "an adapter (use_peft)",
                "4-bit weights (load_in_4bit)",
            ]
            raise torch.OutOfMemoryError(
                f"{largest.longest} has {largest.tokens:,} tokens, and memory ran out although nothing was beside it "
                f"in its micro-batch: {reason}\nWhat needs less: {', '.join(needs_less)}"
            )
        if args.world_size > 1 and not self.agrees(trainer):
            raise torch.OutOfMemoryError(
                f"{reason}\nmax_tokens_per_micro_batch cuts micro-batches, with the same gradient: set it below "
                f"{largest.tokens:,}, the tokens of the largest one so far"
            )

    # --- without a backward pass ----------------------------------------------------------------------------------

    def fitted(self, trainer: Any, mode: str, take: Callable[[], Any]) -> Any:
        """What `take` returns, which cuts a batch and runs it; with a lower budget as long as memory runs out."""
        before = dict(trainer._sums[mode].metrics)
        while True:
            try:
                return take()
            except (RuntimeError, MemoryError) as error:
                if not is_lack_of_memory(error) or trainer.args.world_size > 1:
                    raise
                reason = str(error).partition("\n")[0]
            self._check_that_it_helps(trainer, reason)
            self.tokens = self._lower(0.5)
            notify_once(f"memory ran out: forward passes have at most {self.tokens:,} tokens from here on")
            trainer._sums[mode].metrics = dict(before)

    def _lower(self, by: float) -> int:
        """So much of the tokens of the largest micro-batch that can be cut."""
        return max(1, int(by * max((share.tokens for share in self.shares if share.rows > 1), default=2)))


def passes(trainer: Any, model: nn.Module, batches: Sequence[Batch], items: Any, alone: bool) -> Tensor:
    """Forward and backward passes of micro-batches, whose loss is returned: scalar. The last one exchanges gradients
    between the ranks where that is due now, unless the rank runs `alone`."""
    due = trainer.accelerator.sync_gradients
    if trainer.under_way is not None:  # what a loss of the user's own divides a mean over the step by
        trainer.current_gradient_accumulation_steps = len(trainer.under_way.batches)
    total = torch.zeros((), device=trainer.args.device)
    try:
        for left, batch in zip(range(len(batches))[::-1], batches, strict=True):
            apart = alone or left > 0
            trainer.accelerator.sync_gradients = due and not apart  # DeepSpeed's engine steps where it is told so
            if alone and isinstance(model, DistributedDataParallel):
                model.require_forward_param_sync = False  # buffers are constants: no meeting over them
            with trainer.accelerator.no_sync(model) if apart else nullcontext():
                total += Trainer.training_step(trainer, model, batch, items)
    finally:
        trainer.accelerator.sync_gradients = due
    return total


def as_slots(batches: Sequence[Batch], slots: int) -> list[Any]:
    """The micro-batches of a step for the loop of `Trainer`, which asks for `slots` of them: as they are if they are as
    many, else a list of micro-batches for each; the last is never empty."""
    if len(batches) == slots:
        return list(batches)
    first, rest = batches[: slots - 1], batches[slots - 1 :]
    if not rest:
        first, rest = batches[:-1], batches[-1:]
    return [*([batch] for batch in first), *([] for _ in range(slots - 1 - len(first))), list(rest)]


def share_of_traces(group: Sequence[Any], together: int) -> Share:
    """A micro-batch of traces, of which `together` are never cut apart."""
    longest = max(group, key=lambda each: len(each.prompt_ids) + each.length)
    tokens = len(longest.prompt_ids) + sum(each.length for each in group)
    return Share(tokens, len(group) // together, f"a completion of row {longest.row}")


def as_list(batches: Any) -> list[Batch]:
    """What a call of `training_step` is given: a micro-batch, or a list of them."""
    return batches if isinstance(batches, list) else [batches]


def tokens_of(row: Any) -> int:
    """Tokens of a prepared row, or of a tree."""
    if isinstance(row, Mapping):
        return sum(len(row[name]) for name in row if name == "input_ids" or name.endswith("_ids"))
    return len(row.root.ids) + sum(len(branch.ids) for branch in row.branches)


def _longest(rows: Sequence[Any]) -> str:
    longest = max(rows, key=tokens_of, default=None)
    number = longest.get("row") if isinstance(longest, Mapping) else getattr(longest, "row", None)
    return "a row" if number is None else f"row {number}"


def is_lack_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(sentence in str(error) for sentence in OF_A_LACK)


def retries_on(device: torch.device) -> int:
    """How often the allocator has given back what it held, because memory was not enough at the first try."""
    return torch.cuda.memory_stats(device).get("num_alloc_retries", 0) if device.type == "cuda" else 0


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def _is_sharded(trainer: Any) -> bool:
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
