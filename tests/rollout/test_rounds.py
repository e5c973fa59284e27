"""Rounds as ranks share them: who trains on what, what a checkpoint keeps, how many bytes that is."""

import io
import pickle

import numpy as np
import pytest
import torch

from trl.rollout.exchange import packed, packed_tokens, rehomed, unpacked
from trl.rollout.pack import deal
from trl.rollout.rounds import RefillPrompts
from trl.rollout.traces import TrainingTrace, trees


def trace(row, prompt, length, holder=0, tokens=True):
    generator = np.random.default_rng([row, length])
    ids = generator.integers(0, 50000, length).astype(np.int32)
    logps = [-generator.random(length).astype(np.float32) for _ in range(2)]
    held = dict(zip(("ids", "logps", "ref_logps"), (ids, *logps), strict=True)) if tokens else None
    return TrainingTrace(row, prompt, length, row - 0.5, length * (length % 3 > 0), held, holder)


def tokens_of_ranks(samples, holders, ranks):
    """Tokens that each rank computes: of its completions, and each of their prompts once."""
    found = np.zeros(ranks)
    for rank in range(ranks):
        own = [each for each, holder in zip(samples, holders, strict=True) if holder == rank]
        found[rank] = sum(each.length for each in own) + sum(len(tree.root.ids) for tree in trees(own))
    return found


@pytest.mark.parametrize("generations", [4, 8, 16])
@pytest.mark.parametrize("prompt_length", [1, 200, 1000])
def test_no_rank_waits_long_for_another(generations, prompt_length):
    """64 ranks with 16 samples each, of log-normal lengths: the slowest has at most a tenth more than the mean."""
    generator = np.random.default_rng([generations, prompt_length])
    samples = []
    for row in range(1024 // generations):
        prompt = np.full(prompt_length, row, dtype=np.int32)
        for length in np.exp(generator.normal(6, 0.6, generations)).astype(int) + 1:
            samples.append(trace(row, prompt, int(length)))
    holders = deal(samples, 64)
    tokens = tokens_of_ranks(samples, holders, 64)
    assert tokens.max() <= 1.1 * tokens.mean()
    # Groups stay together as far as that allows: few prompts are computed twice.
    ranks = [len(set(holders[start : start + generations])) for start in range(0, 1024, generations)]
    assert np.mean(ranks) < 4.5
    assert deal(samples, 64) == holders


def test_groups_are_dealt_out_longest_first_and_halved_where_they_must_be():
    prompts = [np.array([row], dtype=np.int32) for row in range(4)]

    def dealt(*groups, ranks=2):
        return deal([trace(row, prompts[row], length) for row, group in enumerate(groups) for length in group], ranks)

    assert dealt((4, 4), (3, 3), (1, 2)) == [0, 0, 1, 1, 1, 1]
    assert dealt((6, 5), (2, 2), (2, 3)) == [0, 0, 1, 1, 1, 1]
    # One group for two ranks is halved by its tokens: 9 against 5 and 4.
    halves = dealt((5, 9, 4))
    assert halves[0] == halves[2] != halves[1]
    assert dealt((7,), ranks=3) == [0] and deal([], 3) == [] and dealt((1, 2), (3,), ranks=1) == [0, 0, 0]


def test_equal_prompts_are_one_root():
    prompt = np.array([5, 6], dtype=np.int32)
    found = trees([trace(0, prompt, 3), trace(1, prompt.copy(), 2), trace(2, np.array([5], dtype=np.int32), 2)])
    assert [(list(tree.root.ids), len(tree.branches)) for tree in found] == [([5, 6], 2), ([5], 1)]


def round_of_two_steps(rank=None):
    """As rank 0 or 1 knows it; None: all in one."""
    prompts = [np.arange(3 + row, dtype=np.int32) for row in range(3)]
    steps = []
    for place in range(2):
        step = []
        for row, length in ((0, 4), (1, 6), (2, 5)):
            holder = -1 if row == 2 and place else (row + place) % 2
            whole = trace(row, prompts[row], length + place, holder)
            step.append(whole._replace(columns=whole.columns if holder >= 0 and rank in (holder, None) else None))
        steps.append(step)
    return [steps[0], steps[1], steps[0], steps[1]]


def same(ours, theirs):
    assert [len(step) for step in ours] == [len(step) for step in theirs]
    for one, other in zip([t for step in ours for t in step], [t for step in theirs for t in step], strict=True):
        assert one._replace(prompt_ids=0, columns=0) == other._replace(prompt_ids=0, columns=0)
        np.testing.assert_array_equal(one.prompt_ids, other.prompt_ids)
        assert (one.columns is None) is (other.columns is None)
        ours_by_name, theirs_by_name = one.columns or {}, other.columns or {}
        assert ours_by_name.keys() == theirs_by_name.keys()
        for name, a in ours_by_name.items():
            assert a.dtype == theirs_by_name[name].dtype and np.array_equal(a, theirs_by_name[name])


def stored(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_checkpoint_holds_a_round_once_and_gives_each_rank_its_own():
    whole = stored(packed(round_of_two_steps(0)))
    parts = [stored(packed_tokens(round_of_two_steps(rank), rank)) for rank in range(2)]
    words = sum(len(part["words"]) for part in parts)
    # Ids and two kinds of log-probs, each step once, and what nobody reads not at all.
    assert words == 3 * (4 + 6 + 5 + 5 + 7)
    for rank in range(2):
        ours = unpacked(whole, {rank: parts[rank]})
        same(ours, round_of_two_steps(rank))
        assert ours[0] is ours[2]
    assert unpacked(stored(packed([])), {0: stored(packed_tokens([], 0))}) == []


def test_another_number_of_ranks_takes_a_round_up():
    whole = packed(round_of_two_steps(0))
    parts = dict(enumerate(packed_tokens(round_of_two_steps(rank), rank) for rank in range(2)))
    everything = unpacked(whole, parts)
    same(everything, round_of_two_steps())

    def holders(step):
        return [-1 if each.holder < 0 else each.row for each in step]

    for rank in range(3):
        for step, before in zip(rehomed(everything, holders, rank), round_of_two_steps(), strict=True):
            for own, old in zip(step, before, strict=True):
                assert own.holder == (-1 if old.holder < 0 else own.row)
                assert (own.columns is not None) is (own.holder == rank)
                if own.columns is not None:
                    np.testing.assert_array_equal(own.columns["logps"], old.columns["logps"])


def test_a_sample_is_twelve_bytes_a_token_on_its_rank_and_few_elsewhere():
    prompt = np.arange(256, dtype=np.int32)
    own = [trace(0, prompt, 1024) for _ in range(8)]
    others = [each._replace(columns=None) for each in own]
    assert len(pickle.dumps(own)) / 8 < 12 * 1024 + 1000
    assert len(pickle.dumps(others)) / 8 < 250


def test_prompts_for_refilling_come_in_a_seeded_order_again_and_again():
    prompts = RefillPrompts(5, seed=3)
    first = prompts.take(3, sampled={1})
    assert len(set(first)) == 3 and 1 not in first
    resumed = RefillPrompts(5, 3, prompts.position)
    assert resumed.take(4, set()) == prompts.take(4, set())
    assert sorted(RefillPrompts(5, 0).take(9, {2})) == [0, 1, 3, 4]
