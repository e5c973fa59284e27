"""The arithmetic of PPO around a value function: rewards of tokens, advantages, and the loss of the values.

`S` sequences of up to `T` tokens; what is beyond the end of a sequence is 0 in every grid. `N` trained tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .policy import k3

# How far the policy's log-prob of a token is from the reference's, [...] each. "full", the divergence of the two
# distributions, is a measure of the engine.
KL_PENALTIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": lambda logp, ref_logp: logp - ref_logp,
    "abs": lambda logp, ref_logp: (logp - ref_logp).abs(),
    "mse": lambda logp, ref_logp: 0.5 * (logp - ref_logp).square(),
    "k3": lambda logp, ref_logp: k3(logp_N=logp, ref_logp_N=ref_logp),
}


def token_rewards(*, kl_ST: Tensor, score_S: Tensor, length_S: Tensor, kl_coef: float) -> Tensor:
    """`-kl_coef * kl` for each token, and the score of the sequence on its last one, [S, T].

    Ziegler et al. 2019, arXiv:1909.08593, equation 2; Ouyang et al. 2022, arXiv:2203.02155.
    """
    reward_ST = -kl_coef * kl_ST
    last_S1 = (length_S - 1).clamp(min=0)[:, None]
    return reward_ST.scatter_add(1, last_S1, torch.where(length_S > 0, score_S, 0.0)[:, None])


def gae(*, reward_ST: Tensor, value_ST: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation, [S, T] -> [S, T]: `A_t = d_t + gamma lam A_(t+1)` with
    `d_t = r_t + gamma V_(t+1) - V_t`; nothing follows the last token. Schulman et al. 2015, arXiv:1506.02438,
    equation 16.
    """
    following_ST = torch.cat([value_ST[:, 1:], torch.zeros_like(value_ST[:, :1])], 1)
    delta_ST = reward_ST + gamma * following_ST - value_ST
    advantage_ST = torch.empty_like(delta_ST)
    latest_S = torch.zeros_like(delta_ST[:, 0]) if delta_ST.shape[1] else delta_ST.sum(1)
    for place in reversed(range(delta_ST.shape[1])):
        latest_S = delta_ST[:, place] + gamma * lam * latest_S
        advantage_ST[:, place] = latest_S
    return advantage_ST


def moments(values_N: Tensor) -> Tensor:
    """How many values there are, their sum and the sum of their squares, [3] in fp64: those of several parts add up."""
    values_N = values_N.double()
    return torch.stack([values_N.new_full((), values_N.numel()), values_N.sum(), values_N.square().sum()])


def whitened(values: Tensor, moments_3: Tensor, *, shift_mean: bool = True) -> Tensor:
    """The values scaled to standard deviation 1, and to mean 0 if `shift_mean` is set, by the `moments` of them all."""
    count, total, squares = moments_3.unbind()
    mean = total / count.clamp(min=1)
    variance = ((squares - count * mean.square()) / (count - 1).clamp(min=1)).clamp(min=0)
    scaled = (values - mean) * (variance + 1e-8).rsqrt()
    return (scaled if shift_mean else scaled + mean).to(values.dtype)


def clipped_error(*, value_N: Tensor, old_value_N: Tensor, return_N: Tensor, cliprange_value: float) -> Tensor:
    """`max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2) / 2`, [N] -> [N].

    Schulman et al. 2015 (GAE) bound the step of the value function; this form is that of OpenAI's baselines, see Huang
    et al. 2024, arXiv:2403.17031, detail 13.
    """
    near_N = torch.clamp(value_N, old_value_N - cliprange_value, old_value_N + cliprange_value)
    return 0.5 * torch.maximum((value_N - return_N).square(), (near_N - return_N).square())


def is_clipped(*, value_N: Tensor, old_value_N: Tensor, return_N: Tensor, cliprange_value: float) -> Tensor:
    """1 where `clipped_error` takes the clipped value, else 0, [N] -> [N]."""
    near_N = torch.clamp(value_N, old_value_N - cliprange_value, old_value_N + cliprange_value)
    return ((near_N - return_N).square() > (value_N - return_N).square()).to(value_N.dtype)
