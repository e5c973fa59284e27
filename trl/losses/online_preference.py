"""Losses on two completions that were sampled for a prompt: Online DPO, XPO and Nash-MD.

`P` pairs, `S` sequences (completions). Log-probs are summed over a completion's tokens; a log-ratio is the policy's
log-prob minus the reference's. Every loss names the numbers and settings it needs as keyword-only arguments.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .preference import sigmoid
from .tokens import seq_sum


class ChosenAndRejected(NamedTuple):
    """A number of the chosen and of the rejected completion of each pair, [P] each."""

    chosen_P: Tensor
    rejected_P: Tensor


def by_preference(values_S: Tensor, first_is_chosen_P: Tensor) -> ChosenAndRejected:
    """Values of completions, two of a prompt in turn, as those of the chosen and of the rejected: [S], [P] -> [P]."""
    first_P, second_P = values_S.view(-1, 2).unbind(1)
    return ChosenAndRejected(
        torch.where(first_is_chosen_P, first_P, second_P), torch.where(first_is_chosen_P, second_P, first_P)
    )


def ipo_of_sums(*, chosen_score_P: Tensor, rejected_score_P: Tensor, beta: float) -> Tensor:
    """`(d - 1 / (2 beta))^2` with `d = chosen - rejected score`, -> [P]: IPO of sums over tokens, as the paper has it.

    Azar et al. 2023, arXiv:2310.12036, equation 17 (beta is their tau). DPO's loss `ipo` takes means over tokens.
    """
    return (chosen_score_P - rejected_score_P - 1 / (2 * beta)) ** 2


def xpo_bonus(*, other_logp_P: Tensor, alpha: float) -> Tensor:
    """`alpha log pi(y)` of the reference's completion `y`, -> [P]: the policy is moved away from what the reference
    writes, which is optimism about the rest. Exploratory preference optimisation, Xie et al. 2024, arXiv:2405.21046,
    algorithm 1."""
    return alpha * other_logp_P


def nash_md(
    *, logp_N: Tensor, ref_logp_N: Tensor, seq_N: Tensor, sequences: int, preference_S: Tensor, beta: float
) -> Tensor:
    """`beta sum_t sg(log pi_t - log ref_t) log pi_t - (p - 1/2) log pi(y)`, -> [S]: two estimates by REINFORCE.

    `p = 1/2 + preference_S` is the probability that the completion `y` is preferred to one of the geometric mixture of
    policy and reference; `sg` stops gradients. The value has no meaning of its own, its gradient has. Nash-MD-PG, Munos
    et al. 2023, arXiv:2312.00886, section 7.
    """
    divergence_N = (logp_N - ref_logp_N).detach() * logp_N
    return beta * seq_sum(divergence_N, seq_N, sequences) - preference_S * seq_sum(logp_N, seq_N, sequences)


ONLINE_LOSSES: dict[str, Callable[..., Tensor]] = {"sigmoid": sigmoid, "ipo": ipo_of_sums}
