"""Losses of single completions: hand-worked values, float64 gradient checks, limits."""

import inspect
import math

import pytest
import torch

from trl.losses.unpaired import LOSSES, apo_zero_unpaired, bco, kl_estimate, kto

LOG2, LOG3 = math.log(2), math.log(3)  # the logistic function of log 3 is 3/4, of -log 3 it is 1/4
LABEL_S = torch.tensor([True, False, True, False])
ZERO = torch.tensor(0.0, dtype=torch.float64)


def loss(name, logratio_S, label_S, **settings):
    given = {
        "logratio_S": logratio_S,
        "label_S": label_S,
        "kl": ZERO.to(logratio_S.dtype) + 0.3,
        "reward_mean": ZERO.to(logratio_S.dtype) - 0.2,
        "beta": 0.4,
        "desirable_weight": 1.3,
        "undesirable_weight": 0.7,
        "weight_S": None,
        **settings,
    }
    return LOSSES[name](**{each: given[each] for each in inspect.signature(LOSSES[name]).parameters})


def drawn(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logratio_S = 6 * torch.randn(count, dtype=torch.float64, generator=generator)
    return logratio_S, torch.rand(count, generator=generator) < 0.5


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_kto_of_known_log_ratios():
    """beta (u - kl) is log 3, log 3, 0, -log 3: good ones lose 1/4 and 1/2, bad ones 3/4 and 1/4."""
    logratio_S = double(2 * LOG3 + 1, 2 * LOG3 + 1, 1, 1 - 2 * LOG3)
    loss_S = kto(
        logratio_S=logratio_S, label_S=LABEL_S, kl=ZERO + 1, beta=0.5, desirable_weight=2.0, undesirable_weight=0.5
    )
    torch.testing.assert_close(loss_S, double(2 * 1 / 4, 0.5 * 3 / 4, 2 * 1 / 2, 0.5 * 1 / 4))


def test_apo_zero_of_known_log_ratios():
    logratio_S = double(LOG3, LOG3, 0, -LOG3)
    loss_S = apo_zero_unpaired(
        logratio_S=logratio_S, label_S=LABEL_S, beta=1, desirable_weight=2.0, undesirable_weight=0.5
    )
    torch.testing.assert_close(loss_S, double(2 * 1 / 4, 0.5 * 3 / 4, 2 * 1 / 2, 0.5 * 1 / 4))


def test_bco_of_known_log_ratios():
    """beta u - delta is log 3, log 3, 0, -log 3."""
    logratio_S = double(2 * LOG3 + 1, 2 * LOG3 + 1, 1, 1 - 2 * LOG3)
    loss_S = bco(logratio_S=logratio_S, label_S=LABEL_S, beta=0.5, reward_mean=ZERO + 0.5)
    torch.testing.assert_close(loss_S, double(math.log(4 / 3), math.log(4), LOG2, math.log(4 / 3)))


def test_bco_weighs_rows():
    logratio_S = double(LOG3, LOG3, 0, -LOG3)
    weight_S = double(1, 3, 1, 0)
    loss_S = bco(logratio_S=logratio_S, label_S=LABEL_S, beta=1, reward_mean=ZERO, weight_S=weight_S)
    torch.testing.assert_close(loss_S, double(math.log(4 / 3), 3 * math.log(4), LOG2, 0))


def test_the_reference_point_is_no_less_than_zero_and_a_constant():
    assert kl_estimate(torch.tensor(-2.0)).item() == 0.0
    estimate = kl_estimate(torch.tensor(1.5, requires_grad=True))
    assert estimate.item() == 1.5 and not estimate.requires_grad


def test_at_a_reference_point_of_zero_kto_is_apo_zero():
    logratio_S, label_S = drawn(6)
    torch.testing.assert_close(
        loss("kto", logratio_S, label_S, kl=ZERO), loss("apo_zero_unpaired", logratio_S, label_S)
    )


def test_kto_pushes_no_further_what_is_far_from_the_reference_point():
    """The slope is beta s (1 - s): greatest at the reference point, on either side of which it falls alike."""
    logratio_S = double(0.3, 10.3, -9.7, 40.3).requires_grad_()
    loss("kto", logratio_S, torch.ones(4, dtype=torch.bool)).sum().backward()
    slope_S = -logratio_S.grad / 1.3
    assert math.isclose(slope_S[0].item(), 0.4 / 4) and math.isclose(slope_S[1].item(), slope_S[2].item())
    assert slope_S[3].item() < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_in_float64(name):
    logratio_S, label_S = drawn(6)
    logratio_S.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(name, x, label_S), (logratio_S,))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("label", [True, False])
def test_good_ones_are_pushed_up_and_bad_ones_down(name, label):
    logratio_S, _ = drawn(6)
    logratio_S.requires_grad_()
    loss(name, logratio_S, torch.full((6,), label)).sum().backward()
    assert (logratio_S.grad < 0).all() if label else (logratio_S.grad > 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_no_rows_have_no_loss(name):
    logratio_S = torch.zeros(0, requires_grad=True)
    loss_S = loss(name, logratio_S, torch.zeros(0, dtype=torch.bool))
    loss_S.sum().backward()
    assert loss_S.shape == (0,) and logratio_S.grad.shape == (0,)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_move_with_their_rows_and_see_no_others(name):
    logratio_S, label_S = drawn(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    loss_S = loss(name, logratio_S, label_S)
    torch.testing.assert_close(loss(name, logratio_S[order], label_S[order]), loss_S[order])
    torch.testing.assert_close(loss(name, logratio_S[2:3], label_S[2:3]), loss_S[2:3])


@pytest.mark.parametrize("name", LOSSES)
def test_far_log_ratios_have_finite_losses_and_gradients(name):
    logratio_S = torch.tensor([-900.0, -900.0, 900.0, 900.0], requires_grad=True)
    loss_S = loss(name, logratio_S, LABEL_S, beta=1.0)
    loss_S.sum().backward()
    assert loss_S.isfinite().all() and logratio_S.grad.isfinite().all()


@pytest.mark.parametrize(("name", "at_zero"), [("kto", 0.5), ("apo_zero_unpaired", 0.5), ("bco", LOG2)])
def test_without_beta_all_rows_are_even(name, at_zero):
    logratio_S, label_S = drawn(4)
    settings = {"beta": 0.0, "desirable_weight": 1.0, "undesirable_weight": 1.0, "reward_mean": ZERO}
    torch.testing.assert_close(loss(name, logratio_S, label_S, **settings), double(*[at_zero] * 4))


def test_a_weight_of_zero_leaves_rows_out():
    logratio_S, label_S = drawn(6)
    for name in ("kto", "apo_zero_unpaired"):
        loss_S = loss(name, logratio_S, label_S, undesirable_weight=0.0)
        assert (loss_S[~label_S] == 0).all() and (loss_S[label_S] > 0).all()


def test_what_exists_is_named():
    assert set(LOSSES) == {"kto", "apo_zero_unpaired", "bco"}
