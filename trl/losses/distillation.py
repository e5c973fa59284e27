"""Distillation: divergences between a student's and a teacher's distributions, and MiniLLM's advantages.

`C` or `N` tokens, `V` vocabulary, `S` sequences. The teacher's numbers carry no gradient. The divergences are given
with their gradients in closed form, because the engine takes them on chunks of logits that it does not keep.
"""

import math

import torch
from torch import Tensor

from .tokens import position


def divergence(
    logp_CV: Tensor, teacher_logp_CV: Tensor, *, beta: float, top_k: int = 0, add_tail: bool = True
) -> Tensor:
    """Divergence of the student's distribution q from the teacher's p, in nats, [C, V] -> [C].

    With the mixture m = beta p + (1 - beta) q it is `beta KL(p, m) + (1 - beta) KL(q, m)`, the generalised
    Jensen-Shannon divergence; beta = 0 gives the forward KL(p, q) and beta = 1 the reverse KL(q, p) (Agarwal et al.
    2023, arXiv:2306.13649, equation 1; both are the limits of the divergence divided by beta and by 1 - beta).

    `top_k` compares the k most likely tokens alone (0: all): the teacher's for beta = 0, the student's for beta = 1,
    those of either for others. The probability of all other tokens is one more outcome with `add_tail`; without it the
    probabilities of the chosen tokens are scaled to add up to one.
    """
    log_q, log_p, _ = _outcomes(logp_CV, teacher_logp_CV, beta, top_k, add_tail)
    if beta == 0:
        return _kl(log_p, log_q)
    if beta == 1:
        return _kl(log_q, log_p)
    log_m = _mixture(log_q, log_p, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def divergence_slope(
    logp_CV: Tensor, teacher_logp_CV: Tensor, *, beta: float, top_k: int = 0, add_tail: bool = True
) -> Tensor:
    """The gradient of `divergence` with respect to the student's logits, [C, V].

    With g = d divergence / d q it is `q g - q sum(q g)`. A tail's g holds for each token in it.
    """
    log_q, log_p, outside_CV = _outcomes(logp_CV, teacher_logp_CV, beta, top_k, add_tail)
    if beta == 0:
        weighted = -log_p.exp()
    elif beta == 1:
        weighted = _times(log_q, log_p)
    else:
        weighted = _times(log_q, _mixture(log_q, log_p, beta)).mul_(1 - beta)
    total_C = weighted.sum(-1, keepdim=True)
    q_CV = log_q.exp()
    if outside_CV is not None and add_tail:
        q_CV = logp_CV.exp()
        share_CV = (logp_CV - log_q[:, -1:]).exp()  # of the tail's probability
        weighted = torch.where(outside_CV, share_CV * weighted[:, -1:], weighted[:, :-1])
    return weighted.sub_(q_CV.mul_(total_C))


def _outcomes(
    logp_CV: Tensor, teacher_logp_CV: Tensor, beta: float, top_k: int, add_tail: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs of what is compared, the student's and the teacher's, [C, V] (with a tail [C, V + 1]), and which tokens
    were left out, [C, V]."""
    if not 0 < top_k < logp_CV.shape[1]:
        return logp_CV, teacher_logp_CV, None
    outside_CV = torch.ones_like(logp_CV, dtype=torch.bool)
    if beta < 1:
        outside_CV.scatter_(1, teacher_logp_CV.topk(top_k, dim=-1).indices, False)
    if beta > 0:
        outside_CV.scatter_(1, logp_CV.topk(top_k, dim=-1).indices, False)
    found = []
    for each_CV in (logp_CV, teacher_logp_CV):
        inside_CV = each_CV.masked_fill(outside_CV, -torch.inf)
        if add_tail:
            tail_C = each_CV.masked_fill(~outside_CV, -torch.inf).logsumexp(-1, keepdim=True)
            found.append(torch.cat([inside_CV, tail_C], -1))
        else:
            found.append(inside_CV.log_softmax(-1))
    return found[0], found[1], outside_CV


def _mixture(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def _times(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p log(p / q) of each outcome, 0 where p is 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), p.new_zeros(()))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _times(log_p, log_q).sum(-1)


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
