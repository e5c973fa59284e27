"""Losses on pairs as they are sampled, against numbers worked out by hand."""

import math

import pytest
import torch

from trl.losses.online_preference import ONLINE_LOSSES, by_preference, nash_md, xpo_bonus


def test_the_chosen_is_the_one_that_is_preferred():
    values_S = torch.tensor([1.0, 2.0, 3.0, 4.0])
    chosen_P, rejected_P = by_preference(values_S, torch.tensor([True, False]))
    assert chosen_P.tolist() == [1.0, 4.0] and rejected_P.tolist() == [2.0, 3.0]
    assert [each.tolist() for each in by_preference(torch.zeros(0), torch.zeros(0, dtype=torch.bool))] == [[], []]


@pytest.mark.parametrize(("name", "value"), [("sigmoid", -math.log(1 / (1 + math.exp(-0.6)))), ("ipo", 1.0)])
def test_losses_of_a_pair(name, value):
    scores = {"chosen_score_P": torch.tensor([1.0]), "rejected_score_P": torch.tensor([-2.0])}
    beta = 0.2 if name == "sigmoid" else 0.125  # ipo: (3 - 4)^2
    assert ONLINE_LOSSES[name](**scores, beta=beta).item() == pytest.approx(value)


def test_the_bonus_and_its_gradient():
    logp_P = torch.tensor([-3.0, -5.0], requires_grad=True)
    bonus_P = xpo_bonus(other_logp_P=logp_P, alpha=0.1)
    bonus_P.sum().backward()
    assert bonus_P.tolist() == pytest.approx([-0.3, -0.5]) and logp_P.grad.tolist() == pytest.approx([0.1, 0.1])


def test_nash_md_is_two_estimates_by_reinforce():
    logp_N = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    ref_logp_N = torch.tensor([-1.5, -1.0, -0.5], dtype=torch.float64)
    preference_S = torch.tensor([0.25, -0.5, 0.0], dtype=torch.float64)
    seq_N = torch.tensor([0, 0, 1])
    loss_S = nash_md(
        logp_N=logp_N, ref_logp_N=ref_logp_N, seq_N=seq_N, sequences=3, preference_S=preference_S, beta=0.5
    )
    # The first: 0.5 (0.5 · -1 + -1 · -2) - 0.25 · -3; the second: its divergence is 0.
    assert loss_S.tolist() == pytest.approx([0.75 + 0.75, -0.25, 0.0])
    loss_S.sum().backward()
    # beta times the log-ratio of the token, less the preference.
    assert logp_N.grad.tolist() == pytest.approx([0.25 - 0.25, -0.5 - 0.25, 0.5])
