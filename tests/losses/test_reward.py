"""Losses of reward models: hand-worked values, float64 gradient checks, limits."""

import math

import torch

from trl.losses.reward import bradley_terry, centring, step_cross_entropy

LOG2, LOG3 = math.log(2), math.log(3)  # the logistic function of log 3 is 3/4, of -log 3 it is 1/4


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_bradley_terry_of_known_rewards():
    chosen_P, rejected_P = double(1 + LOG3, 2, 0), double(1, 2, LOG3)
    loss_P = bradley_terry(chosen_reward_P=chosen_P, rejected_reward_P=rejected_P)
    torch.testing.assert_close(loss_P, double(math.log(4 / 3), LOG2, math.log(4)))


def test_a_margin_is_taken_off_the_difference():
    """What is better by a margin has to score better by it: 2 log 3 with a margin of log 3 is no better than log 3."""
    loss_P = bradley_terry(
        chosen_reward_P=double(2 * LOG3, LOG3), rejected_reward_P=double(0, 0), margin_P=double(LOG3, LOG3)
    )
    torch.testing.assert_close(loss_P, double(math.log(4 / 3), LOG2))


def test_only_differences_count_without_centring():
    chosen_P, rejected_P = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss_P = bradley_terry(chosen_reward_P=chosen_P, rejected_reward_P=rejected_P)
    torch.testing.assert_close(bradley_terry(chosen_reward_P=chosen_P + 7, rejected_reward_P=rejected_P + 7), loss_P)


def test_centring_of_known_rewards():
    """Opposite rewards cost nothing; 1 and 2 cost 9 hundredths."""
    loss_P = centring(chosen_reward_P=double(3, 1), rejected_reward_P=double(-3, 2), center_rewards_coefficient=0.01)
    torch.testing.assert_close(loss_P, double(0, 0.09))


def test_step_cross_entropy_of_known_logits():
    """Logits 0 and log 3: probabilities 1/4 and 3/4."""
    logits_NC = double(0, LOG3, 0, LOG3, 5, 5).view(3, 2)
    loss_N = step_cross_entropy(logits_NC=logits_NC, label_N=torch.tensor([0, 1, 0]))
    torch.testing.assert_close(loss_N, double(math.log(4), math.log(4 / 3), LOG2))


def test_gradients_in_float64():
    values = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: bradley_terry(chosen_reward_P=x[0], rejected_reward_P=x[1], margin_P=x[2]), (values,)
    )
    assert torch.autograd.gradcheck(
        lambda x: centring(chosen_reward_P=x[0], rejected_reward_P=x[1], center_rewards_coefficient=0.3), (values,)
    )
    label_N = torch.tensor([0, 3, 1])
    assert torch.autograd.gradcheck(lambda x: step_cross_entropy(logits_NC=x, label_N=label_N), (values,))


def test_far_rewards_have_finite_losses_and_gradients():
    chosen_P = torch.tensor([-900.0, 900.0], requires_grad=True)
    loss_P = bradley_terry(chosen_reward_P=chosen_P, rejected_reward_P=-chosen_P.detach())
    loss_P.sum().backward()
    assert loss_P.tolist() == [1800.0, 0.0] and chosen_P.grad.tolist() == [-1.0, 0.0]


def test_losses_move_with_their_pairs_and_see_no_others():
    chosen_P, rejected_P, margin_P = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([2, 0, 3, 1])
    loss_P = bradley_terry(chosen_reward_P=chosen_P, rejected_reward_P=rejected_P, margin_P=margin_P)
    moved_P = bradley_terry(
        chosen_reward_P=chosen_P[order], rejected_reward_P=rejected_P[order], margin_P=margin_P[order]
    )
    torch.testing.assert_close(moved_P, loss_P[order])
    alone_P = bradley_terry(chosen_reward_P=chosen_P[1:2], rejected_reward_P=rejected_P[1:2], margin_P=margin_P[1:2])
    torch.testing.assert_close(alone_P, loss_P[1:2])


def test_no_pairs_and_no_steps_have_no_loss():
    none = torch.zeros(0, requires_grad=True)
    losses = (
        bradley_terry(chosen_reward_P=none, rejected_reward_P=none, margin_P=none),
        centring(chosen_reward_P=none, rejected_reward_P=none, center_rewards_coefficient=0.1),
        step_cross_entropy(logits_NC=none.view(0, 2), label_N=torch.zeros(0, dtype=torch.long)),
    )
    sum(each.sum() for each in losses).backward()
    assert all(each.shape == (0,) for each in losses) and none.grad.shape == (0,)
