"""Packed rows: nothing over the capacity, nothing lost but what is said, and every sample a sequence of its own."""

from __future__ import annotations

import time
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.tiny_tokenizers import word_tokenizer
from trl.data.batching.collate import sequences
from trl.data.batching.packing import Pieces, pack, pack_dataset, packed
from trl.data.reading.errors import DataError
from trl.data.reading.sources import load
from trl.data.tokenizing.sequences import prepare_sequences


def bins(pieces: Pieces) -> list[list[tuple[int, int, int]]]:
    """(row, start, length) of the pieces of each packed row."""
    flat = list(zip(pieces.row_P.tolist(), pieces.start_P.tolist(), pieces.length_P.tolist(), strict=True))
    return [flat[pieces.first_M1[m] : pieces.first_M1[m + 1]] for m in range(len(pieces))]


# -- bins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("bfd", [[(2, 0, 5)], [(0, 0, 4)], [(1, 0, 2), (3, 0, 3)]]),
        # The second piece of row 2 and row 4 fill what the others left.
        ("bfd_split", [[(2, 0, 5)], [(0, 0, 4)], [(1, 0, 2), (3, 0, 3)], [(2, 5, 2)]]),
        ("wrapped", [[(0, 0, 4), (1, 0, 1)], [(1, 1, 1), (2, 0, 4)], [(2, 4, 3), (3, 0, 2)], [(3, 2, 1)]]),
    ],
)
def test_by_hand(strategy: str, expected: list[Any]) -> None:
    assert bins(pack(np.array([4, 2, 7, 3]), 5, strategy)) == expected


def test_best_fit_takes_the_fullest_bin() -> None:
    # 3 goes beside 7 (nothing left), not beside 6 (one left).
    assert bins(pack(np.array([6, 7, 3, 4]), 10, "bfd")) == [[(1, 0, 7), (2, 0, 3)], [(0, 0, 6), (3, 0, 4)]]


@pytest.mark.parametrize(("old", "new"), [("ffd", "bfd"), ("bfd-requeue", "bfd_split")])
def test_old_names(old: str, new: str) -> None:
    assert bins(pack(np.array([4, 2, 7, 3]), 5, old)) == bins(pack(np.array([4, 2, 7, 3]), 5, new))


def test_sentences() -> None:
    with pytest.raises(DataError, match="packing strategy 'best' is not known: choose 'bfd', 'bfd_split', 'wrapped'."):
        pack(np.array([1]), 5, "best")
    with pytest.raises(DataError, match="packing into 1 tokens leaves nothing to predict: give at least 2."):
        pack(np.array([1]), 1)
    with pytest.raises(DataError, match="row 1: it has no tokens, and cannot be packed. Remove such rows."):
        pack(np.array([1, 0]), 5)


def one_by_one(lengths: list[int], capacity: int) -> int:
    """How many bins best-fit decreasing needs, item by item as its definition says."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in left if space >= length]
        if fitting:
            left.remove(min(fitting))
            left.append(min(fitting) - length)
        else:
            left.append(capacity - length)
    return len(left)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    capacity=st.integers(2, 40),
    strategy=st.sampled_from(["bfd", "bfd_split", "wrapped"]),
)
def test_every_token_once(lengths: list[int], capacity: int, strategy: str) -> None:
    pieces = pack(np.array(lengths), capacity, strategy)
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for contents in bins(pieces):
        assert 1 <= sum(length for _, _, length in contents) <= capacity
        for row, start, length in contents:
            assert length >= 1
            seen[row][start : start + length] += 1
    kept = [min(length, capacity) if strategy == "bfd" else length for length in lengths]
    assert all((row[:keep] == 1).all() and (row[keep:] == 0).all() for row, keep in zip(seen, kept, strict=True))
    if strategy == "bfd":
        assert len(pieces) == one_by_one(kept, capacity)
    if strategy == "wrapped":
        assert len(pieces) == -(-sum(lengths) // capacity)


def test_many_rows_take_a_moment() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, 200_000).astype(int), 2, None)
    started = time.process_time()
    pieces = pack(lengths, 2048, "bfd")
    assert time.process_time() - started < 3
    assert pieces.length_P.sum() / (len(pieces) * 2048) > 0.999


# -- data sets ------------------------------------------------------------------------------------------------------


def prepared_rows(lengths: list[int]) -> datasets.Dataset:
    rows = {
        "input_ids": [[100 * number + place for place in range(length)] for number, length in enumerate(lengths)],
        "loss_mask": [[False] + [True] * (length - 1) for length in lengths],
        "row": [10 + number for number in range(len(lengths))],
    }
    return datasets.Dataset.from_dict(
        rows,
        features=datasets.Features(
            {
                "input_ids": datasets.List(datasets.Value("int32")),
                "loss_mask": datasets.List(datasets.Value("bool")),
                "row": datasets.Value("int64"),
            }
        ),
    )


def test_packed_rows() -> None:
    dataset, report = packed(prepared_rows([4, 2, 5, 3]), 5)
    assert dataset[2] == {
        "input_ids": [100, 101, 300, 301, 302],
        "loss_mask": [False, True, False, True, True],
        "lengths": [2, 3],
        "row": [11, 13],
    }
    assert dataset.features["input_ids"] == datasets.List(datasets.Value("int32"))
    assert (report.rows, report.packed_rows, report.tokens) == (4, 3, 14)
    assert report.lines() == ["packing (bfd): 4 rows in 3 of 5 tokens, 93.3% full"]


def test_a_split_row_loses_the_first_label_of_each_further_piece() -> None:
    dataset, report = packed(prepared_rows([12, 2]), 5, "bfd_split")
    assert dataset["input_ids"][:] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 100, 101]]
    assert dataset["loss_mask"][:] == [[False] + [True] * 4, [False] + [True] * 4, [False, True, False, True]]
    assert dataset["row"][:] == [[10], [10], [10, 11]]
    assert (report.rows_split, report.labels_lost) == (1, 2)
    assert report.lines()[1:] == [
        "packing: 1 rows are split; the 2 tokens that begin a later piece are not trained, because no token stands "
        "before them"
    ]
    _, report = packed(prepared_rows([12, 2]), 5, "bfd")
    assert report.lines()[1:] == ["warning: packing cut off 7 tokens of rows longer than 5"]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packed_sequences_are_the_rows(strategy: str) -> None:
    rows = [{"text": " ".join(["the sky is blue and"] * (1 + number % 7))} for number in range(40)]
    dataset, _ = prepare_sequences(load(rows), word_tokenizer())
    together, report = packed(dataset, 64, strategy, seed=3)
    assert report.packed_rows == len(together) < 40
    trees = sequences(together)
    joined: dict[int, list[int]] = {}
    for tree in trees:  # the pieces of a row, in whatever order
        joined.setdefault(tree.row, []).extend(tree.root.ids)
        assert tree.root.mask == [False] + [True] * (len(tree.root.ids) - 1)
    assert {row: sorted(ids) for row, ids in joined.items()} == {
        row["row"]: sorted(row["input_ids"]) for row in dataset
    }
    if strategy == "bfd":
        whole = {tree.row: tree.root for tree in sequences(dataset)}
        assert all(tree.root == whole[tree.row] for tree in trees)


def test_the_seed_decides() -> None:
    rows = prepared_rows([3, 4, 2, 5, 3, 3, 2] * 5)
    one, again, other = (packed(rows, 9, "bfd", seed)[0][:] for seed in (1, 1, 2))
    assert one == again != other


def test_a_selection_of_rows_is_packed_as_it_is() -> None:
    rows = prepared_rows([4, 2, 5, 3])
    assert packed(rows.select([1, 3]), 9)[0]["input_ids"][:] == [[100, 101, 300, 301, 302]]


def test_it_comes_from_the_cache_the_second_time(tmp_path: Any) -> None:
    prepared_rows([3, 4, 2] * 400).save_to_disk(str(tmp_path / "rows"))
    rows = datasets.load_from_disk(str(tmp_path / "rows"))
    first, _ = packed(rows, 9)
    files = set((tmp_path / "rows").glob("cache-*"))
    second, report = packed(rows, 9)
    assert first[:] == second[:] and report.packed_rows == 434
    assert len(files) == 1 and set((tmp_path / "rows").glob("cache-*")) == files
    assert packed(rows, 9, num_proc=2)[0][:] == first[:]


# -- the public function --------------------------------------------------------------------------------------------

EXAMPLE = {
    "input_ids": [[1, 2, 3], [4, 5, 6, 7], [8]],
    "labels": [[-100, 2, 3], [-100, 5, 6, 7], [8]],
}


@pytest.mark.parametrize(
    ("strategy", "ids", "lengths"),
    [
        ("bfd", [[4, 5, 6, 7], [1, 2, 3, 8]], [[4], [3, 1]]),
        ("wrapped", [[1, 2, 3, 4], [5, 6, 7, 8]], [[3, 1], [3, 1]]),
    ],
)
def test_pack_dataset(strategy: str, ids: list[list[int]], lengths: list[list[int]]) -> None:
    result = pack_dataset(datasets.Dataset.from_dict(EXAMPLE), 4, strategy)
    assert result.column_names == ["input_ids", "labels", "seq_lengths"]
    assert result["input_ids"][:] == ids and result["seq_lengths"][:] == lengths
    assert result["labels"][0] == ([-100, 5, 6, 7] if strategy == "bfd" else [-100, 2, 3, -100])
    stream = pack_dataset(datasets.Dataset.from_dict(EXAMPLE).to_iterable_dataset(), 4, strategy)
    assert list(stream) == list(result)


def test_pack_dataset_splits() -> None:
    dataset = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3, 4, 5, 6], [7]]})
    assert pack_dataset(dataset, 4, "bfd_split")[:] == {
        "input_ids": [[1, 2, 3, 4], [5, 6, 7]],
        "seq_lengths": [[4], [2, 1]],
    }
    assert pack_dataset(dataset, 4, map_kwargs={"num_proc": 1, "batch_size": 1})[:] == {
        "input_ids": [[1, 2, 3, 4], [7]],
        "seq_lengths": [[4], [1]],
    }


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"input_ids": [[1]], "n": [1]}, "The column `n` holds no lists .*, and cannot be packed: remove it."),
        (
            {"input_ids": [[1], [1, 2]], "labels": [[1], [1]]},
            "row 1: `labels` has 1 entries and `input_ids` 2. All columns of a row must be equally long",
        ),
    ],
)
def test_pack_dataset_sentences(columns: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        pack_dataset(datasets.Dataset.from_dict(columns), 4)
