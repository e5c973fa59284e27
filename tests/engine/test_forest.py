"""What the layouts say of a forest."""

import torch

from tests.engine import families
from trl.data.batching.collate import Branch, Tree
from trl.engine.forest import computed, flat, padded, unshared
from trl.engine.probe import attach
from trl.engine.score import score


def forest():
    """A prompt that is trained beside its two branches, one branch of another row, and one without tokens."""
    root = Branch([5, 6, 7], [False, True, True])
    branches = (Branch([8, 9], [True, True]), Branch([10], [True], row=4), Branch([], []))
    return [Tree(root, branches, row=3), Tree(Branch([11, 12], [False, True]), row=9)]


def test_a_trained_root_is_a_sequence_of_its_own():
    for lay in (flat, padded):
        batch = lay(forest())
        assert batch["target_N"].tolist() == [6, 7, 8, 9, 10, 12]
        assert batch["seq_N"].tolist() == [0, 0, 1, 1, 2, 4]
        assert batch["row_S"].tolist() == [3, 3, 4, 3, 9]
        grid = batch["input_ids"].flatten()
        assert torch.equal(grid[batch["at_N"]], batch["target_N"])
        assert batch["distinct"] == batch["tokens"] == 8
    assert flat(forest())["predict_N"].tolist() == [0, 1, 2, 3, 2, 6]
    assert [tree.row for tree in unshared(forest())] == [3, 3, 4, 3, 9]


def test_both_layouts_score_it_alike():
    model = families.build("llama")
    attach(model)
    apart = score(model, flat(unshared(forest()))).logp_N
    torch.testing.assert_close(score(model, flat(forest())).logp_N, apart, atol=1e-5, rtol=1e-5)


def test_tokens_over_positions():
    one, two = forest()[:1], forest()
    assert computed(flat(two)) == (8, 8)
    assert computed(padded(one)) == (6, 4 * 5)
    assert computed({**flat(two), "further": flat(one), "step": {"offset": 0}}) == (14, 14)
