"""Divergences between a student's and a teacher's distributions, with their gradients in closed form.

`C` tokens, `V` vocabulary. The engine takes them on chunks of logits that it does not keep. The teacher's numbers carry
no gradient.
"""

import math

import torch
from torch import Tensor


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
