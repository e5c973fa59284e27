"""The order of rows: which rows form which micro-batch, the same on every machine and after every restart."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from typing import Any

import numpy as np

TOGETHER = 50  # the rows of this many optimizer steps are sorted by length together


class RowBatches:
    """A batch sampler in which the order of an epoch depends on (seed, epoch) alone.

    The rows of one optimizer step are contiguous in the order of the epoch, whatever the micro-batches and ranks. All
    ranks get the same number of micro-batches. At the end of an epoch some may be smaller, or empty.

    Args:
        rows: the number of rows.
        batch_size: rows of a micro-batch of one rank.
        shuffle: whether the order is random (the default) or that of the rows.
        seed: the seed of the order; 0 by default.
        ranks, rank: the number of ranks, and this one; 1 and 0 by default.
        drop_last: leave out an incomplete last batch. By default (False) it is spread over the ranks.
        lengths: [rows]. If given, runs of `TOGETHER` steps are sorted by length, the longest first, so that rows of
            similar length meet in a batch. None by default.
        step_rows: rows of an optimizer step, for `lengths`; 1 by default.
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
            # A short last batch is spread over the ranks as evenly as possible.
            yield np.array_split(rows, self.ranks)[self.rank].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch whose order comes next."""
        self.epoch = epoch

    @property
    def batch_sampler(self) -> "RowBatches":
        """Itself: transformers (5.17 to 5.23) looks for this attribute to find the sampler whose epoch it sets."""
        return self


class SamplerBatches(RowBatches):
    """The micro-batches of rows in the order of the user's own sampler, cut as by `RowBatches`.

    `sampler` yields row numbers. `like` gives batch size and ranks. `agree` turns the orders that the ranks have drawn
    into one.
    """

    def __init__(self, sampler: Iterable[int], like: RowBatches, agree: Callable[[list[int]], list[int]]) -> None:
        vars(self).update(vars(like))
        self.sampler, self.agree = sampler, agree
        self.rows = len(sampler) if isinstance(sampler, Sized) else like.rows

    def order(self) -> np.ndarray:
        """Row indices in the order of the sampler. Raises `ValueError` if it does not yield row numbers."""
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
    """The micro-batches of a stream of prepared rows, split over the ranks as by `RowBatches`.

    Every rank reads the whole stream and takes its part of each batch, so that the rows of an optimizer step do not
    depend on the number of ranks. `state_dict` after a batch is a position in the stream. After `load_state_dict` the
    next pass begins with the following batch, and no earlier row is tokenised again.

    Args:
        stream: an iterable with `state_dict`, `load_state_dict` and `set_epoch`.
        batch_size, ranks, rank, drop_last: as in `RowBatches`.
        forever: start a new pass, with the next epoch number, after each pass. The n-th batch is then the same wherever
            a run starts, and an optimizer step may cross the end of a pass. False by default.
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
        # A shuffled stream draws a new order for each epoch.
        self.stream.set_epoch(self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next pass, unless a loaded state has set it."""
        if not self._resumed:
            self.epoch = epoch

    def state_dict(self) -> dict[str, Any] | None:
        """The position after the last yielded batch; None before the first."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a position that `state_dict` returned."""
        self._state, self._resumed, self.epoch = state, True, state["epoch"]
        self._set_stream_epoch()
