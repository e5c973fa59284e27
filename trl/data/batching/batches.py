"""Which rows form which micro-batch: the order of the data, the same on every machine and after every restart."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from typing import Any

import numpy as np

TOGETHER = 50  # optimizer steps whose rows are sorted by length together


class RowBatches:
    """A batch sampler whose every epoch is a pure function of (seed, epoch).

    The rows of one optimizer step are a run of the epoch's order, however it is split into micro-batches and ranks. All
    ranks get the same number of micro-batches; at the end of an epoch some may be smaller, or empty.

    With `lengths` [rows], rows of similar length come together: runs of `TOGETHER` steps of `step_rows` rows are sorted
    by length, the longest first.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        ranks: int = 1,
        rank: int = 0,
        drop_last: bool = False,
        lengths: np.ndarray | None = None,
        step_rows: int = 1,
    ) -> None:
        self.rows, self.batch_size, self.shuffle, self.seed = rows, batch_size, shuffle, seed
        self.lengths, self.step_rows = lengths, step_rows
        self.ranks, self.rank, self.drop_last, self.epoch = ranks, rank, drop_last, 0

    def order(self) -> np.ndarray:
        """Row indices in the order of this epoch."""
        if not self.shuffle:
            return np.arange(self.rows)
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        if self.lengths is None:
            return order
        run = TOGETHER * self.step_rows
        runs = [order[start : start + run] for start in range(0, self.rows, run)]
        return np.concatenate([rows[np.argsort(-self.lengths[rows], kind="stable")] for rows in runs])

    def __len__(self) -> int:
        together = self.batch_size * self.ranks
        return self.rows // together if self.drop_last else -(-self.rows // together)

    def __iter__(self) -> Iterator[list[int]]:
        order, together = self.order(), self.batch_size * self.ranks
        for number in range(len(self)):
            rows = order[number * together : (number + 1) * together]
            # A short last batch is spread over the ranks, as evenly as it goes.
            yield np.array_split(rows, self.ranks)[self.rank].tolist()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def batch_sampler(self) -> "RowBatches":
        """Itself: transformers looks one level down for the sampler whose epoch it sets (5.17 to 5.23)."""
        return self


class SamplerBatches(RowBatches):
    """The micro-batches of rows that a sampler of the user's own puts in order, cut as `RowBatches` does.

    `like` gives batch size and ranks. `agree` makes one order of those that the ranks have drawn.
    """

    def __init__(self, sampler: Iterable[int], like: RowBatches, agree: Callable[[list[int]], list[int]]) -> None:
        vars(self).update(vars(like))
        self.sampler, self.agree = sampler, agree
        self.rows = len(sampler) if isinstance(sampler, Sized) else like.rows

    def order(self) -> np.ndarray:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(self.epoch)
        order = list(self.sampler)
        if order and not isinstance(order[0], int | np.integer):
            raise ValueError(
                f"the sampler yields {type(order[0]).__name__}s and not row numbers: batches of your own come from "
                "get_train_dataloader, as DataLoader(self.train_dataset, batch_sampler=..., "
                "collate_fn=self.data_collator)"
            )
        return np.asarray(self.agree([int(row) for row in order]), dtype=np.int64)


class StreamBatches:
    """The micro-batches of a stream of prepared rows, split over the ranks as `RowBatches` does.

    Every rank reads the whole stream and takes its part of each batch, so that the rows of an optimizer step do not
    depend on the number of ranks. `state_dict`, asked for after a batch, is a place to go on from: after
    `load_state_dict` the next epoch begins with the batch that follows, and no row before it is tokenised again.

    With `forever`, one pass follows another without an end, each with an epoch number of its own: the n-th batch is
    then the same wherever a run begins to count, and an optimizer step may span the end of a pass.
    """

    def __init__(
        self,
        stream: Any,
        batch_size: int,
        *,
        ranks: int = 1,
        rank: int = 0,
        drop_last: bool = False,
        forever: bool = False,
    ) -> None:
        self.stream, self.batch_size, self.ranks, self.rank, self.drop_last = stream, batch_size, ranks, rank, drop_last
        self.forever = forever
        self.epoch = 0
        self._state: dict[str, Any] | None = None
        self._resumed = False

    def __iter__(self) -> Iterator[list[Any]]:
        while True:
            empty = True
            for batch in self._one_pass():
                empty = False
                yield batch
            if empty or not self.forever:
                return
            self.epoch += 1

    def _one_pass(self) -> Iterator[list[Any]]:
        if self._resumed:
            self._resumed = False
            assert self._state is not None
            self.stream.load_state_dict(self._state["stream"])
        else:
            self._set_stream_epoch()
        together = self.batch_size * self.ranks
        rows = iter(self.stream)
        while batch := list(islice(rows, together)):
            if len(batch) < together and self.drop_last:
                break
            self._state = {"epoch": self.epoch, "stream": copy.deepcopy(self.stream.state_dict())}
            parts = np.array_split(np.arange(len(batch)), self.ranks)
            yield [batch[index] for index in parts[self.rank]]

    def _set_stream_epoch(self) -> None:
        # A stream that has been shuffled draws anew for each epoch.
        self.stream.set_epoch(self.epoch)

    def set_epoch(self, epoch: int) -> None:
        if not self._resumed:
            self.epoch = epoch

    def state_dict(self) -> dict[str, Any] | None:
        """Where the batch that was yielded last ends; None before the first."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state, self._resumed, self.epoch = state, True, state["epoch"]
        self._set_stream_epoch()
