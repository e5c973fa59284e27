"""Losses on single completions that are labelled good or bad.

`S` sequences. `logratio_S` is the policy's log-prob minus the reference's, summed over a completion; `label_S` is true
for good completions. Each loss gives one number per completion, [S].
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def kl_estimate(mean_logratio: Tensor) -> Tensor:
    """The reference point of `kto`: the mean log-ratio of mismatched prompts and completions, at least 0, scalar.

    Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1.
    """
    return mean_logratio.clamp(min=0).detach()


def kto(
    *,
    logratio_S: Tensor,
    label_S: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """`w (1 - s(beta (r - z)))` for good completions and `w (1 - s(beta (z - r)))` for bad ones, [S] -> [S], with
    `r = logratio` and `z = kl`. KTO, arXiv:2402.01306, equation 8."""
    sign_S = torch.where(label_S, 1.0, -1.0).to(logratio_S.dtype)
    loss_S = 1 - torch.sigmoid(beta * sign_S * (logratio_S - kl))
    return torch.where(label_S, desirable_weight * loss_S, undesirable_weight * loss_S)


def apo_zero_unpaired(
    *,
    logratio_S: Tensor,
    label_S: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """`w (1 - s(beta r))` for good completions, `w s(beta r)` for bad ones, [S] -> [S]. The unpaired form of APO-zero,
    D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7."""
    sign_S = torch.where(label_S, 1.0, -1.0).to(logratio_S.dtype)
    loss_S = 1 - torch.sigmoid(beta * sign_S * logratio_S)
    return torch.where(label_S, desirable_weight * loss_S, undesirable_weight * loss_S)


def bco(
    *, logratio_S: Tensor, label_S: Tensor, reward_mean: Tensor, beta: float, weight_S: Tensor | None = None
) -> Tensor:
    """`-log s(beta r - delta)` for good completions, `-log s(-(beta r - delta))` for bad ones, times `weight_S`,
    [S] -> [S]. `delta = reward_mean` is the mean of the rewards `beta r` so far.

    BCO, Jung et al. 2024, arXiv:2404.04656, equations 8 and 11; `weight_S` is the density ratio of its section 3.3.
    """
    sign_S = torch.where(label_S, 1.0, -1.0).to(logratio_S.dtype)
    loss_S = -F.logsigmoid(sign_S * (beta * logratio_S - reward_mean))
    return loss_S if weight_S is None else weight_S * loss_S


LOSSES: dict[str, Callable[..., Tensor]] = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired, "bco": bco}
