"""Rows to trees."""

from __future__ import annotations

from trl.data.batching.collate import Branch, Tree, sequences


def test_a_sequence_is_a_root_alone_and_its_first_token_is_not_trained() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "loss_mask": [True, False, True], "row": 4},
        {"input_ids": [8, 9], "loss_mask": [1, 1], "row": 0},
    ]
    assert sequences(rows) == [
        Tree(root=Branch([5, 6, 7], [False, False, True]), branches=(), row=4),
        Tree(root=Branch([8, 9], [False, 1]), branches=(), row=0),
    ]
    assert rows[0]["loss_mask"] == [True, False, True]  # the caller's row is left as it was


def test_a_packed_row_is_as_many_sequences() -> None:
    row = {"input_ids": [5, 6, 7, 8, 9], "loss_mask": [False, True, True, True, True], "lengths": [2, 3], "row": [7, 4]}
    assert sequences([row]) == [
        Tree(root=Branch([5, 6], [False, True]), branches=(), row=7),
        Tree(root=Branch([7, 8, 9], [False, True, True]), branches=(), row=4),
    ]


def test_nothing() -> None:
    assert sequences([]) == []
