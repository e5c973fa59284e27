"""Losses of pairs that need no reference model: ORPO, and CPO with SimPO and AlphaPO.

`P` pairs. In the docstrings `c` is the chosen and `r` the rejected completion, `mean` the log-prob averaged over a
completion's tokens, `R` its reward, `s` the logistic function.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Bound on exponents: exp(80) is finite in fp32, and so is the difference of two such numbers.
_MAX_EXPONENT = 80.0


# --- ORPO -------------------------------------------------------------------------------------------------------------


def _log1mexp(x: Tensor) -> Tensor:
    """`log(1 - exp(x))` for `x < 0`. Zero is replaced by the largest negative number, so that the result is finite."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    # Each formula is accurate on one side of the middle. On the other side it is evaluated at the middle, where its
    # slope is finite.
    middle = -math.log(2)
    near = torch.log(-torch.expm1(x.clamp(min=middle)))
    far = torch.log1p(-x.clamp(max=middle).exp())
    return torch.where(x > middle, near, far)


def log_odds(*, chosen_mean_logp_P: Tensor, rejected_mean_logp_P: Tensor) -> Tensor:
    """Log of the odds ratio: `log[p_c / (1 - p_c)] - log[p_r / (1 - p_r)]` with `p = exp(mean)`, [P]. Hong et al. 2024,
    arXiv:2403.07691, equations 4 and 5.
    """
    chosen_P = chosen_mean_logp_P - _log1mexp(chosen_mean_logp_P)
    return chosen_P - (rejected_mean_logp_P - _log1mexp(rejected_mean_logp_P))


def orpo(*, chosen_mean_logp_P: Tensor, rejected_mean_logp_P: Tensor, beta: float) -> Tensor:
    """ORPO's odds-ratio term: `-beta log s(log_odds)`, [P]. Hong et al. 2024, arXiv:2403.07691, equation 7, with its
    weight in equation 6, there lambda. The whole loss is this and the negative log-likelihood of the chosen completion.
    """
    log_odds_P = log_odds(chosen_mean_logp_P=chosen_mean_logp_P, rejected_mean_logp_P=rejected_mean_logp_P)
    return -beta * logsigmoid(log_odds_P)


# --- CPO --------------------------------------------------------------------------------------------------------------
# A completion's reward `R` is `alpha_reward` of its log-prob: the mean over its tokens for the losses in MEAN_LOGP, the
# sum for the others.


def alpha_reward(logp_P: Tensor, *, alpha: float) -> Tensor:
    """AlphaPO's reward: `(1 - p^-alpha) / alpha` with `p = exp(logp)`, [P] -> [P]; its limit at `alpha = 0` is the
    log-prob itself. Gupta et al. 2025, arXiv:2501.03884.

    `-alpha logp` is bounded by 80, so that the reward is finite.
    """
    return logp_P if alpha == 0 else -torch.expm1((-alpha * logp_P).clamp(max=_MAX_EXPONENT)) / alpha


def _logistic(margin_P: Tensor, label_smoothing: float) -> Tensor:
    """`-(1 - e) log s(margin) - e log s(-margin)` with `e = label_smoothing`."""
    return (label_smoothing - 1) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)


def sigmoid(*, chosen_reward_P: Tensor, rejected_reward_P: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """CPO: `-log s(beta (R_c - R_r))` of sums, [P]: DPO with a uniform reference. Xu et al. 2024, arXiv:2401.08417,
    equation 3. If a share `e = label_smoothing` of the labels is wrong: `-(1 - e) log s(m) - e log s(-m)` with the same
    margin m.
    """
    return _logistic(beta * (chosen_reward_P - rejected_reward_P), label_smoothing)


def hinge(*, chosen_reward_P: Tensor, rejected_reward_P: Tensor, beta: float) -> Tensor:
    """SLiC's margin: `max(0, 1 - beta (R_c - R_r))` of sums, [P]. Zhao et al. 2023, arXiv:2305.10425."""
    return (1 - beta * (chosen_reward_P - rejected_reward_P)).relu()


def ipo(*, chosen_reward_P: Tensor, rejected_reward_P: Tensor, beta: float) -> Tensor:
    """IPO without reference: `(R_c - R_r - 1 / (2 beta))^2` of means, [P]. Azar et al. 2023, arXiv:2310.12036,
    equation 17.
    """
    return (chosen_reward_P - rejected_reward_P - 1 / (2 * beta)) ** 2


def simpo(
    *, chosen_reward_P: Tensor, rejected_reward_P: Tensor, beta: float, label_smoothing: float, simpo_gamma: float
) -> Tensor:
    """SimPO: `-log s(beta (R_c - R_r) - simpo_gamma)` of means, [P]; `label_smoothing` as in `sigmoid`. Meng et al.
    2024, arXiv:2405.14734, equation 6. With an `alpha` other than 0 it is AlphaPO.
    """
    return _logistic(beta * (chosen_reward_P - rejected_reward_P) - simpo_gamma, label_smoothing)


LOSSES: dict[str, Callable[..., Tensor]] = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo, "simpo": simpo}

# Losses that read the mean log-prob of a completion's tokens; the others read the sum.
MEAN_LOGP = {"ipo", "simpo"}
