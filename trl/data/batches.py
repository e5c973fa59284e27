"""Which rows form which micro-batch: the order of the data, the same on every machine and after every restart."""

from collections.abc import Iterator

import numpy as np


class RowBatches:
    """A batch sampler whose every epoch is a pure function of (seed, epoch).

    The rows of one optimizer step are a run of the epoch's order, however it is split into micro-batches and ranks. All
    ranks get the same number of micro-batches; at the end of an epoch some may be smaller, or empty.
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
    ) -> None:
        self.rows, self.batch_size, self.shuffle, self.seed = rows, batch_size, shuffle, seed
        self.ranks, self.rank, self.drop_last, self.epoch = ranks, rank, drop_last, 0

    def order(self) -> np.ndarray:
        """Row indices in the order of this epoch."""
        if not self.shuffle:
            return np.arange(self.rows)
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)

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
