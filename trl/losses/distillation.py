"""MiniLLM's advantages: the reverse KL to a teacher as a reward. `N` tokens, `S` sequences, `L` tokens of the longest.

The divergences between two distributions are measures of the engine (`engine.divergence`).
"""

import torch
from torch import Tensor

from .tokens import position


def teacher_advantage(
    *,
    logp_N: Tensor,
    teacher_logp_N: Tensor,
    seq_N: Tensor,
    sequences: int,
    gamma: float,
    length_normalization: bool,
) -> Tensor:
    """MiniLLM's advantage of each token of a student's completion, [N] -> [N], without a gradient.

    The reward of a token is `r_t = log p(y_t) - log q(y_t)`, which raises what the teacher finds more likely than the
    student does. The advantage is the discounted sum of the rewards from the token on, `sum_i gamma^i r_(t+i)`, divided
    by the sum of the discounts if `length_normalization` is set; gamma = 0 leaves the token's own reward. Gu et al.
    2023, arXiv:2306.08543, equations 3 and 7. The tokens of a sequence must be consecutive, and the sequences in order.
    """
    reward_N = (teacher_logp_N - logp_N).detach()
    if gamma == 0 or not len(reward_N):
        return reward_N
    place_N = position(seq_N, sequences)
    grid_SL = reward_N.new_zeros(sequences, int(place_N.max()) + 1)
    there_SL = torch.zeros_like(grid_SL)
    grid_SL[seq_N, place_N], there_SL[seq_N, place_N] = reward_N, 1.0
    sums = [grid_SL.new_zeros(2, sequences)]
    for column in range(grid_SL.shape[1] - 1, -1, -1):
        sums.append(torch.stack([grid_SL[:, column], there_SL[:, column]]) + gamma * sums[-1])
    total_SL, weight_SL = torch.stack(sums[:0:-1], -1)
    advantage_SL = total_SL / weight_SL.clamp(min=1.0) if length_normalization else total_SL
    return advantage_SL[seq_N, place_N]
