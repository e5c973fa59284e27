"""Rewards to advantages: how much better a completion is than the others of its prompt.

`S` completions, in groups of `G = num_generations` with the same prompt; `F` reward functions. A reward that does not
apply is NaN and is left out of means. A completion whose rewards are all NaN has advantage 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

EPSILON = 1e-4  # added to standard deviations


def _std(values: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """The sample standard deviation, ignoring NaN; 0 for fewer than two values."""
    dims = tuple(range(values.dim())) if dim is None else dim
    count = (~values.isnan()).sum(dims, keepdim=keepdim)
    mean = values.nanmean(dims, keepdim=True)
    squares = (values - mean).square().nansum(dims, keepdim=keepdim)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def _alike(values: Tensor, dim: int) -> Tensor:
    """Whether all values along `dim` are equal, ignoring NaN; `dim` is kept, with size 1."""
    high = values.masked_fill(values.isnan(), -torch.inf).amax(dim, keepdim=True)
    low = values.masked_fill(values.isnan(), torch.inf).amin(dim, keepdim=True)
    return low >= high


def _centred(values: Tensor, dim: int) -> Tensor:
    """The values minus their mean, ignoring NaN; exactly 0 where all are equal, whatever the rounding of the mean."""
    away = values - values.nanmean(dim, keepdim=True)
    return away.masked_fill(_alike(values, dim) & ~values.isnan(), 0.0)


def total_reward(rewards_SF: Tensor, weights_F: Tensor) -> Tensor:
    """The weighted sum of the rewards that apply, [S, F] -> [S]; NaN if none does."""
    reward_S = (rewards_SF * weights_F).nansum(1)
    return reward_S.masked_fill(rewards_SF.isnan().all(1), float("nan"))


def sum_then_normalize(
    *, rewards_SF: Tensor, weights_F: Tensor, num_generations: int, scale_rewards: str = "group"
) -> Tensor:
    """`(r - mean of the group) / (std + 1e-4)` of the total reward, [S, F] -> [S].

    `scale_rewards` selects the standard deviation: "group" (GRPO, Shao et al. 2024, arXiv:2402.03300, section 4.1.2),
    "batch", over all completions (Lite PPO, Liu et al. 2025, arXiv:2508.08221), or "none", no division (Dr. GRPO, Liu
    et al. 2025, arXiv:2503.20783).
    """
    reward_S = total_reward(rewards_SF, weights_F)
    group = reward_S.view(-1, num_generations)
    advantage_S = _centred(group, 1).flatten()
    if scale_rewards == "group":
        deviation_S = _std(group, 1, keepdim=True).expand_as(group).flatten()
    elif scale_rewards == "batch":
        deviation_S = _std(reward_S).expand_as(reward_S)
    else:
        return advantage_S.nan_to_num(0.0)
    return (advantage_S / (deviation_S + EPSILON)).nan_to_num(0.0)


def normalize_then_sum(
    *, rewards_SF: Tensor, weights_F: Tensor, num_generations: int, scale_rewards: str = "group"
) -> Tensor:
    """Normalise each function's rewards in the group, then their weighted sum over all completions, [S, F] -> [S].

    GDPO, Liu et al. 2026, arXiv:2601.05242.
    """
    group = rewards_SF.view(-1, num_generations, rewards_SF.shape[1])
    each_SF = (_centred(group, 1) / (_std(group, 1, keepdim=True) + EPSILON)).flatten(0, 1)
    reward_S = total_reward(each_SF, weights_F)
    # The mean is zero already, because each function's rewards sum to zero in a group. Subtracting it again would move
    # exact zeros.
    return (reward_S / (_std(reward_S) + EPSILON)).nan_to_num(0.0)


def unbiased_group(
    *, rewards_SF: Tensor, weights_F: Tensor, num_generations: int, scale_rewards: str = "none"
) -> Tensor:
    """`(r - mean of the group) G / (G - 1)`, [S, F] -> [S]: relative to the mean of the others; not scaled.

    Dr. GRPO, arXiv:2503.20783, appendix A.
    """
    return leave_one_out(total_reward(rewards_SF, weights_F), num_generations=num_generations)


def maximum_likelihood(
    *, rewards_SF: Tensor, weights_F: Tensor, num_generations: int, scale_rewards: str = "none"
) -> Tensor:
    """`(r - m) / m` with `m` the mean of the group, [S, F] -> [S]; 0 where m is 0. Rewards must not be negative.

    MaxRL, Tajwar et al. 2026, arXiv:2602.02710: its expectation is the gradient of the log success rate.
    """
    reward_S = total_reward(rewards_SF, weights_F)
    group = reward_S.view(-1, num_generations)
    mean = group.nanmean(1, keepdim=True)
    return torch.where(mean > 0, _centred(group, 1) / mean, 0.0).flatten().nan_to_num(0.0)


def leave_one_out(reward_S: Tensor, *, num_generations: int, normalize: bool = False) -> Tensor:
    """`r - mean of the others in the group`, [S] -> [S]; 0 if there are no others. `normalize` scales the result to
    mean 0 and standard deviation 1 over all completions that have a reward and others in their group.

    RLOO, Ahmadian et al. 2024, arXiv:2402.14740, equation 8.
    """
    group = reward_S.view(-1, num_generations)
    count = (~group.isnan()).sum(1, keepdim=True)
    # r - (sum - r) / (n - 1) is (r - mean) n / (n - 1).
    advantage_S = (_centred(group, 1) * count / (count - 1)).flatten()
    return (standardised(advantage_S) if normalize else advantage_S).nan_to_num(0.0)


def standardised(values_S: Tensor) -> Tensor:
    """The values scaled to mean 0 and standard deviation 1, ignoring NaN, [S] -> [S]."""
    if not len(values_S):
        return values_S
    return _centred(values_S, 0) / (_std(values_S) + EPSILON)


def without_spread(rewards_SF: Tensor, weights_F: Tensor, num_generations: int) -> Tensor:
    """Whether a completion's group has equal total rewards, [S, F] -> bool [S]."""
    group = total_reward(rewards_SF, weights_F).view(-1, num_generations)
    return _alike(group, 1).expand_as(group).flatten()


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "sum_then_normalize": sum_then_normalize,
    "normalize_then_sum": normalize_then_sum,
    "unbiased_group": unbiased_group,
    "maximum_likelihood": maximum_likelihood,
}
