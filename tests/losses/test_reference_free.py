"""ORPO and CPO: hand-worked values, float64 gradient checks, limits."""

import inspect
import math

import pytest
import torch

from trl.losses.reference_free import LOSSES, MEAN_LOGP, alpha_reward, log_odds, orpo

LOG2, LOG3 = math.log(2), math.log(3)  # the logistic function of log 3 is 3/4, of -log 3 it is 1/4


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drawn(pairs: int) -> torch.Tensor:
    return -3 * torch.rand(pairs, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.01


def both(function, logp_P2: torch.Tensor, **settings) -> torch.Tensor:
    return function(chosen_mean_logp_P=logp_P2[:, 0], rejected_mean_logp_P=logp_P2[:, 1], **settings)


def loss(name: str, reward_P2: torch.Tensor, **settings) -> torch.Tensor:
    given = {"chosen_reward_P": reward_P2[:, 0], "rejected_reward_P": reward_P2[:, 1]}
    given |= {"beta": 2.0, "label_smoothing": 0.1, "simpo_gamma": 0.5, **settings}
    return LOSSES[name](**{each: given[each] for each in inspect.signature(LOSSES[name]).parameters})


# --- ORPO -------------------------------------------------------------------------------------------------------------


def test_odds_of_known_probabilities():
    """3/4 against 1/2: odds 3 and 1. Then 1/2 against 1/5: odds 1 and 1/4."""
    logp_P2 = double(3 / 4, 1 / 2, 1 / 2, 1 / 5).log().view(2, 2)
    torch.testing.assert_close(both(log_odds, logp_P2), double(LOG3, math.log(4)))
    # The logistic function of the log of a ratio r is r / (1 + r).
    expected = double(-0.1 * math.log(3 / 4), -0.1 * math.log(4 / 5))
    torch.testing.assert_close(both(orpo, logp_P2, beta=0.1), expected)


def test_equal_completions_cost_log_two():
    logp_P2 = drawn(3)[:, :1].expand(3, 2)
    torch.testing.assert_close(both(orpo, logp_P2, beta=0.5), double(*[0.5 * LOG2] * 3))
    assert both(orpo, logp_P2, beta=0.0).abs().max() == 0


def test_odds_keep_their_digits_near_certainty_and_far_from_it():
    """In fp32 `1 - exp(x)` is 0 at -1e-9 and 1 at -40; its log is log(1e-9) and -exp(-40)."""
    logp_P2 = torch.tensor([[-1e-9, -40.0]])
    torch.testing.assert_close(both(log_odds, logp_P2), torch.tensor([40.0 + 9 * math.log(10)]))


@pytest.mark.parametrize("chosen", [0.0, -1e-9, -LOG2, -1.0, -200.0])
@pytest.mark.parametrize("rejected", [0.0, -1e-9, -LOG2, -1.0, -200.0])
def test_odds_of_certain_and_of_impossible_completions_are_finite(chosen, rejected):
    logp_P2 = torch.tensor([[chosen, rejected]], requires_grad=True)
    loss_P = both(orpo, logp_P2, beta=0.1)
    loss_P.sum().backward()
    assert loss_P.isfinite().all() and logp_P2.grad.isfinite().all()


def test_orpo_gradients_in_float64():
    logp_P2 = torch.cat([drawn(4), double(-0.1, -LOG2 - 1e-3, -LOG2 + 1e-3, -9.0).view(2, 2)]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: both(orpo, x, beta=0.3), (logp_P2,))


# --- CPO --------------------------------------------------------------------------------------------------------------

# Rewards log 3 and 0, then 0 and log 3.
GOLDEN = {
    "sigmoid": ({"beta": 1, "label_smoothing": 0.0}, [math.log(4 / 3), math.log(4)]),
    "sigmoid, smoothed": (
        {"beta": 1, "label_smoothing": 0.1},
        [0.9 * math.log(4 / 3) + 0.1 * math.log(4), 0.9 * math.log(4) + 0.1 * math.log(4 / 3)],
    ),
    "hinge": ({"beta": 0.5}, [1 - LOG3 / 2, 1 + LOG3 / 2]),
    "hinge, outside": ({"beta": 1}, [0.0, 1 + LOG3]),
    "ipo": ({"beta": 0.25}, [(LOG3 - 2) ** 2, (LOG3 + 2) ** 2]),
    # beta times the difference less gamma is log 3 and -3 log 3, whose logistic function is 1/28.
    "simpo": ({"beta": 2, "simpo_gamma": LOG3, "label_smoothing": 0.0}, [math.log(4 / 3), math.log(28)]),
    "simpo, smoothed": (
        {"beta": 2, "simpo_gamma": LOG3, "label_smoothing": 0.25},
        [0.75 * math.log(4 / 3) + 0.25 * math.log(4), 0.75 * math.log(28) + 0.25 * math.log(28 / 27)],
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_known_values(case):
    settings, expected = GOLDEN[case]
    loss_P = loss(case.split(",")[0], double(LOG3, 0, 0, LOG3).view(2, 2), **settings)
    torch.testing.assert_close(loss_P, double(*expected))


@pytest.mark.parametrize(
    ("alpha", "at_half"),
    [(0.0, -LOG2), (1.0, 1 - 2.0), (-1.0, 1 - 0.5 - 1.0), (0.5, (1 - math.sqrt(2)) / 0.5), (2.0, (1 - 4.0) / 2)],
)
def test_alpha_rewards_of_a_half(alpha, at_half):
    """`(1 - p^-alpha) / alpha` at p = 1/2; and 0 at p = 1 whatever alpha."""
    reward_P = alpha_reward(double(-LOG2, 0), alpha=alpha)
    torch.testing.assert_close(reward_P, double(at_half, 0))


def test_alpha_rewards_tend_to_the_log_prob():
    logp_P = drawn(4)[:, 0]
    torch.testing.assert_close(alpha_reward(logp_P.float(), alpha=1e-6), logp_P.float(), rtol=1e-5, atol=0)


def test_alpha_rewards_of_long_completions_are_finite():
    """Their probability is zero in fp32, and its inverse infinite."""
    logp_P = torch.tensor([-1000.0], requires_grad=True)
    reward_P = alpha_reward(logp_P, alpha=0.25)
    reward_P.sum().backward()
    assert reward_P.isfinite().all() and logp_P.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_in_float64(name, alpha):
    logp_P2 = drawn(4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(name, alpha_reward(x, alpha=alpha)), (logp_P2,))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_move_with_their_pairs_and_see_no_others(name):
    reward_P2, order = drawn(5), torch.tensor([3, 0, 1, 4, 2])
    loss_P = loss(name, reward_P2)
    torch.testing.assert_close(loss(name, reward_P2[order]), loss_P[order])
    torch.testing.assert_close(loss(name, reward_P2[2:3]), loss_P[2:3])


@pytest.mark.parametrize("name", [*LOSSES, "orpo"])
def test_no_pairs_have_no_loss(name):
    empty = torch.zeros(0, 2, requires_grad=True)
    loss_P = both(orpo, empty, beta=0.1) if name == "orpo" else loss(name, empty)
    loss_P.sum().backward()
    assert loss_P.shape == (0,) and empty.grad.shape == (0, 2)


@pytest.mark.parametrize(("name", "at_zero"), [("sigmoid", LOG2), ("hinge", 1.0), ("simpo", LOG2)])
def test_without_beta_all_pairs_are_even(name, at_zero):
    loss_P = loss(name, drawn(3), beta=0.0, simpo_gamma=0.0)
    torch.testing.assert_close(loss_P, double(*[at_zero] * 3))


def test_what_exists_is_named():
    assert set(LOSSES) == {"sigmoid", "hinge", "ipo", "simpo"} and MEAN_LOGP == {"ipo", "simpo"}
