"""Packing: several rows in one, so that all rows of a batch have about the same length. Packed samples do not attend to
each other.

Packed rows consist of *pieces*: whole rows, or parts of rows longer than the capacity. A packed row keeps the lengths
of its pieces, and each piece is a separate sequence for the model. The strategies are

    bfd         best-fit decreasing: the longest row first, each into the fullest packed row that has room for it. A row
                longer than the capacity is cut.
    bfd_split   the same, but a longer row is split into pieces. No token is lost, but the first token of a later piece
                is not trained, because no token stands before it.
    wrapped     all rows one after another, cut wherever the capacity is reached.

The whole data set is packed at once, not batch by batch.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from trl.data.reading.errors import DataError
from trl.data.report import Packing

CACHE_VERSION = 1  # raise it when the same rows are packed in another way, so that no stale cache is read
STRATEGIES = ("bfd", "bfd_split", "wrapped")
OLD_NAMES = {"ffd": "bfd", "bfd-requeue": "bfd_split", "bfd_requeue": "bfd_split", "bfd-split": "bfd_split"}


class Pieces(NamedTuple):
    """Which pieces (P) form which packed rows (M).

    Packed row m holds the pieces from `first_M1[m]` up to `first_M1[m + 1]`. Piece p is `length_P[p]` tokens of row
    `row_P[p]`, from `start_P[p]` on.
    """

    row_P: np.ndarray
    start_P: np.ndarray
    length_P: np.ndarray
    first_M1: np.ndarray

    def __len__(self) -> int:
        return len(self.first_M1) - 1


def strategy_of(name: str) -> str:
    """A strategy by its name or by an older name. Raises `DataError` for any other."""
    strategy = OLD_NAMES.get(name, name)
    if strategy not in STRATEGIES:
        raise DataError(f"packing strategy {name!r} is not known: choose {', '.join(map(repr, STRATEGIES))}.")
    return strategy


def pack(lengths: np.ndarray, capacity: int, strategy: str = "bfd") -> Pieces:
    """Finds which pieces of rows form packed rows.

    `lengths` [rows] are in tokens, at least 1. `capacity` is the most tokens of a packed row, at least 2. `strategy` is
    "bfd" by default. Raises `DataError` for other values.
    """
    strategy = strategy_of(strategy)
    lengths = np.asarray(lengths, dtype=np.int64)
    if capacity < 2:
        raise DataError(f"packing into {capacity} tokens leaves nothing to predict: give at least 2.")
    if len(lengths) and lengths.min() < 1:
        raise DataError(f"row {int(lengths.argmin())}: it has no tokens, and cannot be packed. Remove such rows.")
    if strategy == "wrapped":
        return _wrapped(lengths, capacity)
    if strategy == "bfd":
        row_P = np.arange(len(lengths))
        start_P, length_P = np.zeros_like(lengths), np.minimum(lengths, capacity)
    else:
        count = -(-lengths // capacity)
        row_P = np.repeat(np.arange(len(lengths)), count)
        start_P = (np.arange(len(row_P)) - np.repeat(np.cumsum(count) - count, count)) * capacity
        length_P = np.minimum(lengths[row_P] - start_P, capacity)
    bin_P = _best_fit(length_P, capacity)
    order = np.argsort(bin_P, kind="stable")
    sizes = np.bincount(bin_P)
    return Pieces(row_P[order], start_P[order], length_P[order], np.concatenate([[0], np.cumsum(sizes)]))


def _wrapped(lengths: np.ndarray, capacity: int) -> Pieces:
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    # A piece begins where a row does, and where a packed row does.
    begins = np.union1d(ends - lengths, np.arange(0, total, capacity))
    row_P = np.searchsorted(ends, begins, side="right")
    length_P = np.diff(np.append(begins, total))
    first_M1 = np.append(np.searchsorted(begins, np.arange(0, total, capacity)), len(begins))
    return Pieces(row_P, begins - (ends - lengths)[row_P], length_P, first_M1)


def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item, by best-fit decreasing. `lengths` [items] are at most `capacity`.

    Items of one length are placed together. A bin with space r takes r // length of them one after another, because
    after the first it is still the fullest bin with room. Then the next fuller bin is taken. Bit r of `filled` is set
    if there are bins with space r.
    """
    bin_of = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    cuts = np.flatnonzero(np.diff(lengths[order])) + 1
    spaces: dict[int, list[int]] = {}  # space left -> bins
    filled = bins = 0
    for items in np.split(order, cuts) if len(order) else ():
        length, at = int(lengths[items[0]]), 0
        while at < len(items):
            above = filled >> length
            if above:
                space = length + (above & -above).bit_length() - 1
                open_bins = spaces[space]
            else:
                space = capacity
                open_bins = list(range(bins, bins - (at - len(items)) // (capacity // length)))
                bins = open_bins[-1] + 1
            each = space // length
            take = min(len(open_bins), -(-(len(items) - at) // each))
            taken, rest = open_bins[:take], open_bins[take:]
            placed = min(take * each, len(items) - at)
            bin_of[items[at : at + placed]] = np.repeat(taken, each)[:placed]
            at += placed
            if space in spaces:
                if rest:
                    spaces[space] = rest
                else:
                    del spaces[space]
                    filled ^= 1 << space
            # The last bin may have got fewer items than it can take.
            last = placed - (take - 1) * each
            for left, some in ((space - each * length, taken[:-1]), (space - last * length, taken[-1:])):
                if some and left:
                    spaces.setdefault(left, []).extend(some)
                    filled |= 1 << left
    return bin_of


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


def packed(
    dataset: datasets.Dataset,
    capacity: int,
    strategy: str = "bfd",
    seed: int | None = None,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[datasets.Dataset, Packing]:
    """Packs the rows that `prepare_sequences` returned.

    Args:
        dataset: a table with `input_ids`, `loss_mask` and `row`.
        capacity: the most tokens of a packed row, at least 2.
        strategy: "bfd" (the default), "bfd_split" or "wrapped".
        seed: shuffles the rows before packing, which matters to "wrapped", and the packed rows after it. None (the
            default) keeps their order.
        num_proc: processes; None (the default): this one.
        name: what the progress bar calls the data set; "train" by default.

    Returns a table with the columns `input_ids` and `loss_mask` (the pieces one after another), `lengths` (of the
    pieces) and `row` (of each piece, in the user's data set), and the report. `collate.sequences` makes one tree of
    each piece. Raises `DataError` for another strategy or capacity.
    """
    strategy = strategy_of(strategy)
    if seed is not None:
        dataset = dataset.shuffle(seed=seed)
    lengths = _lengths(dataset)
    pieces = pack(lengths, capacity, strategy)
    order = np.arange(len(pieces)) if seed is None else np.random.default_rng(seed).permutation(len(pieces))
    table = _gathered(
        dataset, pieces, order, ("input_ids", "loss_mask"), "lengths", f"{capacity} {strategy} {seed}", num_proc, name
    )
    lost = int(table.data.column("_lost").to_numpy().sum())
    tokens = int(pieces.length_P.sum())
    report = Packing(
        strategy,
        capacity,
        rows=len(dataset),
        packed_rows=len(pieces),
        tokens=tokens,
        fill=tokens / (len(pieces) * capacity),
        rows_split=len(np.unique(pieces.row_P[pieces.start_P > 0])),
        labels_lost=lost,
        tokens_cut=int(lengths.sum()) - tokens,
    )
    return table.select_columns(["input_ids", "loss_mask", "lengths", "row"]), report


def pack_dataset(
    dataset: Any, seq_length: int, strategy: str = "bfd", map_kwargs: Mapping[str, Any] | None = None
) -> Any:
    """Packs a data set of lists, such as `input_ids` and `labels`. All lists of a row have the same length.

    Args:
        dataset: a `datasets.Dataset`, which is packed as a whole, or an `IterableDataset`, which is packed in blocks of
            `map_kwargs["batch_size"]` rows (1000 by default).
        seq_length: the most tokens of a packed row, at least 2.
        strategy: "bfd" (the default), "bfd_split" or "wrapped".
        map_kwargs: further arguments of `datasets.Dataset.map`; None by default.

    Returns the same columns, and `seq_lengths`, the lengths of the pieces of each packed row. Raises `DataError` for a
    column without lists and for a row whose lists differ in length.
    """
    strategy = strategy_of(strategy)
    options = {key: value for key, value in (map_kwargs or {}).items() if key not in ("batched", "batch_size", "desc")}
    if isinstance(dataset, datasets.IterableDataset):
        size = (map_kwargs or {}).get("batch_size", 1000)
        columns = dataset.column_names or list(next(iter(dataset)))
        function = _PackBatch(seq_length, strategy)
        return dataset.map(function, batched=True, batch_size=size, remove_columns=columns, **options)
    columns = tuple(dataset.column_names)
    kinds = {column: dataset.features[column] for column in columns}
    for column, kind in kinds.items():
        if not isinstance(kind, datasets.List | datasets.LargeList):
            raise DataError(f"The column `{column}` holds no lists ({kind}), and cannot be packed: remove it.")
    lengths = {column: _lengths(dataset, column) for column in columns}
    for column in columns[1:]:
        differ = np.flatnonzero(lengths[column] != lengths[columns[0]])
        if len(differ):
            row = int(differ[0])
            raise DataError(
                f"row {row}: `{column}` has {lengths[column][row]} entries and `{columns[0]}` "
                f"{lengths[columns[0]][row]}. All columns of a row must be equally long to be packed together."
            )
    if not columns:
        raise DataError("There is no column to pack.")
    pieces = pack(lengths[columns[0]], seq_length, strategy)
    order = np.arange(len(pieces))
    table = _gathered(dataset, pieces, order, columns, "seq_lengths", f"{seq_length} {strategy}", name="", **options)
    return table.select_columns([*columns, "seq_lengths"])


class _PackBatch:
    def __init__(self, capacity: int, strategy: str):
        self.capacity, self.strategy = capacity, strategy

    def __call__(self, batch: Mapping[str, list[list[Any]]]) -> dict[str, list[Any]]:
        first = next(iter(batch.values()))
        pieces = pack(np.array([len(values) for values in first], dtype=np.int64), self.capacity, self.strategy)
        result: dict[str, list[Any]] = {column: [] for column in (*batch, "seq_lengths")}
        for number in range(len(pieces)):
            which = range(pieces.first_M1[number], pieces.first_M1[number + 1])
            for column, lists in batch.items():
                parts = (
                    lists[pieces.row_P[p]][pieces.start_P[p] : pieces.start_P[p] + pieces.length_P[p]] for p in which
                )
                result[column].append([value for part in parts for value in part])
            result["seq_lengths"].append(pieces.length_P[which.start : which.stop].tolist())
        return result


def _lengths(dataset: datasets.Dataset, column: str = "input_ids") -> np.ndarray:
    lengths = [np.zeros(0, dtype=np.int64)]
    for batch in dataset.with_format("arrow").select_columns([column]).iter(batch_size=10_000):
        for chunk in batch.column(column).chunks:
            lengths.append(chunk.value_lengths().fill_null(0).to_numpy().astype(np.int64))
    return np.concatenate(lengths)


def _gathered(
    dataset: datasets.Dataset,
    pieces: Pieces,
    order: np.ndarray,
    columns: tuple[str, ...],
    lengths_column: str,
    options: str,
    num_proc: int | None = None,
    name: str = "",
    **map_kwargs: Any,
) -> datasets.Dataset:
    """The columns of the packed rows whose numbers are in `order`."""
    source = dataset.with_format("arrow")
    key = hashlib.sha256(f"{CACHE_VERSION} {dataset._fingerprint} {options} {columns}".encode()).hexdigest()[:16]
    if dataset.cache_files and datasets.is_caching_enabled():
        map_kwargs.setdefault("cache_file_name", dataset._get_cache_file_path(key))
    features = {column: dataset.features[column] for column in columns}
    if "row" in dataset.column_names and "row" not in columns:
        features["row"] = datasets.List(datasets.Value("int64"))
    plan = datasets.Dataset.from_dict({"packed": order})
    return plan.map(
        _Gather(source, pieces, columns, lengths_column),
        batched=True,
        batch_size=500,
        input_columns=["packed"],
        remove_columns=["packed"],
        features=datasets.Features(
            {**features, lengths_column: datasets.List(datasets.Value("int32")), "_lost": datasets.Value("int64")}
        ),
        num_proc=num_proc,
        new_fingerprint=key,
        desc=f"Packing {name}".strip(),
        **map_kwargs,
    )


class _Gather:
    """Numbers of packed rows -> their columns. Works on arrays only: no token becomes a Python object."""

    def __init__(self, source: datasets.Dataset, pieces: Pieces, columns: tuple[str, ...], lengths_column: str):
        self.source, self.pieces, self.columns, self.lengths_column = source, pieces, columns, lengths_column

    def __call__(self, packed_rows: list[int]) -> dict[str, Any]:
        numbers = np.asarray(packed_rows)
        counts = np.diff(self.pieces.first_M1)[numbers]
        which = _ranges(self.pieces.first_M1[numbers], counts)
        row_P, start_P, length_P = self.pieces.row_P[which], self.pieces.start_P[which], self.pieces.length_P[which]
        # A long row has many pieces, but is fetched once.
        unique, inverse = np.unique(row_P, return_inverse=True)
        table = self.source[unique.tolist()].combine_chunks()
        piece_ends = np.concatenate([[0], np.cumsum(counts)])
        token_ends = np.concatenate([[0], np.cumsum(length_P)])
        result: dict[str, Any] = {}
        lost = np.zeros(len(numbers), dtype=np.int64)
        for column in self.columns:
            lists = _only_chunk(table.column(column))
            ends = np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy())])
            values = lists.flatten()
            tokens = _ranges(ends[inverse] + start_P, length_P)
            if column == "loss_mask":
                mask = values.to_numpy(zero_copy_only=False)[tokens]
                lost = np.add.reduceat(mask[token_ends[:-1]].astype(np.int64), piece_ends[:-1])
                mask[token_ends[:-1]] = False  # no token stands before the first one of a piece
                values = pa.array(mask)
            else:
                values = values.take(pa.array(tokens))
            result[column] = _lists(token_ends[piece_ends], values)
        if "row" in table.column_names and "row" not in self.columns:
            result["row"] = _lists(piece_ends, _only_chunk(table.column("row")).take(pa.array(inverse)))
        result[self.lengths_column] = _lists(piece_ends, pa.array(length_P.astype(np.int32)))
        result["_lost"] = pa.array(lost)
        return pa.table(result)


def _only_chunk(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers start, start + 1, … for each start, `count` of them, one range after another."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


def _lists(ends: np.ndarray, values: Any) -> Any:
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), values)
