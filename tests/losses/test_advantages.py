"""Rewards to advantages: hand-worked values, what is not applicable, groups without spread, permutation."""

import math

import pytest
import torch

from trl.losses.advantages import (
    ADVANTAGES,
    leave_one_out,
    maximum_likelihood,
    normalize_then_sum,
    standardised,
    sum_then_normalize,
    total_reward,
    unbiased_group,
    without_spread,
)

NAN = math.nan
ONE = torch.ones(1, dtype=torch.float64)
EPSILON = 1e-4


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def column(*values: float) -> torch.Tensor:
    return double(*values)[:, None]


def drawn(samples: int, functions: int) -> torch.Tensor:
    """Rewards of which some are left out."""
    generator = torch.Generator().manual_seed(0)
    rewards_SF = torch.randn(samples, functions, dtype=torch.float64, generator=generator)
    return rewards_SF.masked_fill(torch.rand(samples, functions, generator=generator) < 0.2, NAN)


# --- the total --------------------------------------------------------------------------------------------------------


def test_a_total_is_the_weighted_sum_of_what_applies():
    """1 + 0.5 · 4 = 3; the second alone 0.5 · 2 = 1; none is none."""
    rewards_SF = double(1, 4, NAN, 2, NAN, NAN).view(3, 2)
    torch.testing.assert_close(total_reward(rewards_SF, double(1, 0.5)), double(3, 1, NAN), equal_nan=True)


# --- GRPO -------------------------------------------------------------------------------------------------------------

# Groups 1, 3 (mean 2, deviation √2) and 0, 6 (mean 3, deviation √18). All: mean 2.5, squares 2.25 + 0.25 + 6.25 + 12.25
# = 21, deviation √7.
TWO = column(1, 3, 0, 6)
GOLDEN = {
    "group": [-1 / (2**0.5 + EPSILON), 1 / (2**0.5 + EPSILON), -3 / (18**0.5 + EPSILON), 3 / (18**0.5 + EPSILON)],
    "batch": [each / (7**0.5 + EPSILON) for each in (-1, 1, -3, 3)],
    "none": [-1, 1, -3, 3],
}


@pytest.mark.parametrize("scale", GOLDEN)
def test_scales(scale):
    ours = sum_then_normalize(rewards_SF=TWO, weights_F=ONE, num_generations=2, scale_rewards=scale)
    torch.testing.assert_close(ours, double(*GOLDEN[scale]))


def test_what_does_not_apply_takes_part_in_no_mean():
    """1, none, 3: mean 2, deviation √2; the one in the middle has advantage 0."""
    ours = sum_then_normalize(rewards_SF=column(1, NAN, 3), weights_F=ONE, num_generations=3)
    torch.testing.assert_close(ours, double(-1, 0, 1) / (2**0.5 + EPSILON))


def test_one_reward_of_a_group_has_nothing_to_compare_with():
    for function in ADVANTAGES.values():
        ours = function(rewards_SF=column(NAN, 5, NAN, 1, 1, 2), weights_F=ONE, num_generations=3)
        assert ours[:3].tolist() == [0, 0, 0] and ours[3:].abs().min() > 0


def test_gdpo():
    """Each function by itself: 0, 1 and 10, 30 both become ∓1/√2 (but for what is added to deviations). Weighted by 1
    and 3 they sum to ∓4/√2, again ∓1/√2 of the deviation. A scale has no say."""
    rewards_SF = double(0, 30, 1, 10).view(2, 2)
    first, second = 0.5 / (0.5**0.5 + EPSILON), 10 / (200**0.5 + EPSILON)
    total = 3 * second - first
    expected = total / (2**0.5 * total + EPSILON)
    ours = normalize_then_sum(rewards_SF=rewards_SF, weights_F=double(1, 3), num_generations=2)
    torch.testing.assert_close(ours, double(expected, -expected))
    large = normalize_then_sum(rewards_SF=rewards_SF * double(1, 1e6), weights_F=double(1, 3), num_generations=2)
    torch.testing.assert_close(large, ours, atol=1e-3, rtol=0)


# --- leave-one-out ----------------------------------------------------------------------------------------------------


def test_leave_one_out():
    """1, 2, 6 against 4, 3.5, 1.5; the unbiased group says it in other words: away from 3 by -2, -1, 3, times 3/2."""
    expected = double(-3, -1.5, 4.5)
    torch.testing.assert_close(leave_one_out(double(1, 2, 6), num_generations=3), expected)
    ours = unbiased_group(rewards_SF=column(1, 2, 6), weights_F=ONE, num_generations=3)
    torch.testing.assert_close(ours, expected)


def test_the_others_are_those_with_a_reward():
    ours = leave_one_out(double(1, NAN, 5, NAN, NAN, 7), num_generations=3)
    torch.testing.assert_close(ours, double(-4, 0, 4, 0, 0, 0))


def test_normalised_over_those_that_can_be_compared():
    """-4 and 4: mean 0, deviation √32. What has no reward, or no others, does not count, and stays 0."""
    ours = leave_one_out(double(1, NAN, 5, NAN, NAN, 7), num_generations=3, normalize=True)
    torch.testing.assert_close(ours, double(-4, 0, 4, 0, 0, 0) / (32**0.5 + EPSILON))
    # Also where the mean of the others is not 0: 1 and NaN move none of 2, 3, 5.
    with_gap = leave_one_out(double(2, 3, 5, 1, NAN, NAN), num_generations=3, normalize=True)
    alone = leave_one_out(double(2, 3, 5), num_generations=3, normalize=True)
    torch.testing.assert_close(with_gap, torch.cat([alone, torch.zeros(3, dtype=torch.float64)]))


def test_a_group_of_one_has_no_advantage():
    assert leave_one_out(double(3, 4), num_generations=1).tolist() == [0, 0]


def test_standardised():
    """0, 2, 4: mean 2, deviation 2."""
    torch.testing.assert_close(standardised(double(0, 2, 4)), double(-2, 0, 2) / (2 + EPSILON))
    assert len(standardised(double())) == 0


# --- MaxRL ------------------------------------------------------------------------------------------------------------


def test_maximum_likelihood():
    """One of four is right: mean 1/4, (1 - 1/4) / (1/4) = 3 and -1. All wrong: nothing."""
    ours = maximum_likelihood(rewards_SF=column(0, 1, 0, 0, 0, 0, 0, 0), weights_F=ONE, num_generations=4)
    assert ours.tolist() == [-1, 3, -1, -1, 0, 0, 0, 0]


def test_maximum_likelihood_does_not_depend_on_the_unit():
    rewards_SF = drawn(12, 1).abs()
    ours = maximum_likelihood(rewards_SF=rewards_SF, weights_F=ONE, num_generations=4)
    for unit in (1e-7, 1e7):
        other = maximum_likelihood(rewards_SF=rewards_SF * unit, weights_F=ONE, num_generations=4)
        torch.testing.assert_close(other, ours)


def test_maximum_likelihood_is_the_gradient_of_the_log_of_the_chance():
    """Over all outcomes of G draws of chance p, the mean of A · d log pi is what Σ_k≤G (1 - p)^k-1 dp is: the series of
    1/p cut after G terms. Of a Bernoulli variable d log pi is 1/p where it is right and -1/(1 - p) where not."""
    p, draws = 0.3, 4
    total = 0.0
    for outcome in range(2**draws):
        right = [float(outcome >> place & 1) for place in range(draws)]
        chance = math.prod(p if each else 1 - p for each in right)
        advantage = maximum_likelihood(rewards_SF=column(*right), weights_F=ONE, num_generations=draws).tolist()
        total += chance * sum(a * (1 / p if r else -1 / (1 - p)) for a, r in zip(advantage, right, strict=True)) / draws
    assert total == pytest.approx(sum((1 - p) ** k for k in range(draws)) - (1 - p) ** (draws - 1))


# --- no spread, order, emptiness --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.1, 0.7, 10.1, -1e6 / 3])
@pytest.mark.parametrize("generations", [3, 5, 7, 8])
def test_rewards_that_are_alike_are_exactly_nothing(value, generations):
    """Also where their mean in single precision is not that number: what is 0 need not be computed on."""
    rewards_SF = torch.full((generations, 1), value)
    for function in ADVANTAGES.values():
        ours = function(rewards_SF=rewards_SF, weights_F=torch.ones(1), num_generations=generations)
        assert (ours == 0).all()
    assert (leave_one_out(rewards_SF[:, 0], num_generations=generations) == 0).all()
    assert without_spread(rewards_SF, torch.ones(1), generations).all()


def test_groups_without_spread():
    """2 and 2; 1 and none; 1 and 2; none and none; and sums that are alike though their parts are not."""
    rewards_SF = double(2, 0, 2, 0, 1, 0, NAN, NAN, 1, 0, 2, 0, NAN, NAN, NAN, NAN, 1, 2, 2, 1).view(10, 2)
    ours = without_spread(rewards_SF, torch.ones(2, dtype=torch.float64), 2)
    assert ours.view(5, 2).tolist() == [[True] * 2, [True] * 2, [False] * 2, [True] * 2, [True] * 2]


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_order_has_no_say(name, scale):
    rewards_SF, weights_F = drawn(12, 3).abs(), double(1, 0.5, 2)

    def run(rewards_SF: torch.Tensor) -> torch.Tensor:
        return ADVANTAGES[name](rewards_SF=rewards_SF, weights_F=weights_F, num_generations=4, scale_rewards=scale)

    expected = run(rewards_SF)
    assert expected.isfinite().all()
    groups, within = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    order = (groups[:, None] * 4 + within).flatten()
    torch.testing.assert_close(run(rewards_SF[order]), expected[order])


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_nothing_gives_nothing(name, scale):
    ours = ADVANTAGES[name](
        rewards_SF=torch.zeros(0, 2), weights_F=torch.ones(2), num_generations=4, scale_rewards=scale
    )
    assert ours.shape == (0,)
    ours = ADVANTAGES[name](
        rewards_SF=torch.full((4, 2), NAN), weights_F=torch.ones(2), num_generations=2, scale_rewards=scale
    )
    assert ours.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_of_rewards_has_no_advantage_in_sum(name):
    rewards_SF = drawn(12, 1).abs()
    ours = ADVANTAGES[name](rewards_SF=rewards_SF, weights_F=ONE, num_generations=12)
    assert ours.sum() == pytest.approx(0, abs=1e-9)
