"""Losses of reward models. `P` pairs, `N` labelled steps, `C` classes."""

from torch import Tensor
from torch.nn import functional as F


def bradley_terry(*, chosen_reward_P: Tensor, rejected_reward_P: Tensor, margin_P: Tensor | None = None) -> Tensor:
    """`-log s(r_w - r_l - margin)` with `s` the logistic function, [P] -> [P]. Ouyang et al. 2022, arXiv:2203.02155,
    equation 1; with a margin, Touvron et al. 2023 (Llama 2), arXiv:2307.09288, equation 2."""
    gap_P = chosen_reward_P - rejected_reward_P
    return -F.logsigmoid(gap_P if margin_P is None else gap_P - margin_P)


def centring(*, chosen_reward_P: Tensor, rejected_reward_P: Tensor, center_rewards_coefficient: float) -> Tensor:
    """`c (r_w + r_l)^2`, [P] -> [P]: keeps the rewards of a pair around zero. Eisenstein et al. 2023, arXiv:2312.09244,
    equation 2."""
    return center_rewards_coefficient * (chosen_reward_P + rejected_reward_P) ** 2


def step_cross_entropy(*, logits_NC: Tensor, label_N: Tensor) -> Tensor:
    """`-log softmax(logits)[label]` of each labelled step, [N, C] -> [N]. Lightman et al. 2023, arXiv:2305.20050."""
    return F.cross_entropy(logits_NC, label_N, reduction="none")
