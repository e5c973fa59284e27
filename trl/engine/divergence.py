"""Divergences between a student's and a teacher's distributions, with their gradients in closed form.

`C` tokens, `V` vocabulary. The engine takes them on chunks of logits that it does not keep. The teacher's numbers carry
no gradient.
"""

import functools
from typing import Any

import torch
from torch import Tensor

# Log-probs of impossible outcomes, whose p log p is 0: a finite number in the place of minus infinity.
FLOOR = -1e4


class Divergence:
    """Divergence of the student's distribution q from the teacher's p, in nats, from their log-probs, [C, V] each.

    With the mixture m = beta p + (1 - beta) q it is `beta KL(p, m) + (1 - beta) KL(q, m)`, the generalised
    Jensen-Shannon divergence; beta = 0 gives the forward KL(p, q) and beta = 1 the reverse KL(q, p) (Agarwal et al.
    2023, arXiv:2306.13649, equation 1; both are the limits of the divergence divided by beta and by 1 - beta).

    `top_k` compares the k most likely tokens alone (0: all): the teacher's for beta = 0, the student's for beta = 1,
    those of either for others. The probability of all other tokens is one more outcome with `add_tail`; without it the
    probabilities of the chosen tokens are scaled to add up to one. `q_CV` are the student's probabilities, if they are
    at hand.
    """

    def __init__(
        self,
        logp_CV: Tensor,
        teacher_logp_CV: Tensor,
        *,
        beta: float,
        top_k: int = 0,
        add_tail: bool = True,
        q_CV: Tensor | None = None,
    ) -> None:
        self.logp_CV, self.beta, self.add_tail = logp_CV, beta, add_tail
        self.outside_CV: Tensor | None = None  # the tokens that are left out
        both = [logp_CV, teacher_logp_CV]
        if 0 < top_k < logp_CV.shape[1]:
            self.outside_CV = torch.ones_like(logp_CV, dtype=torch.bool)
            for each_CV, counts in zip(both, (beta > 0, beta < 1), strict=True):
                if counts:
                    self.outside_CV.scatter_(1, each_CV.topk(top_k, dim=-1).indices, False)
            both, q_CV = [self._outcomes(each_CV) for each_CV in both], None
        # Of each outcome: [C, V], with a tail [C, V + 1].
        self.log_q, self.log_p = (each.clamp(min=FLOOR) for each in both)
        if q_CV is not None:
            self.q = q_CV

    def _outcomes(self, logp_CV: Tensor) -> Tensor:
        assert self.outside_CV is not None
        inside_CV = logp_CV.masked_fill(self.outside_CV, -torch.inf)
        if not self.add_tail:
            return inside_CV.log_softmax(-1)
        tail_C = logp_CV.masked_fill(~self.outside_CV, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([inside_CV, tail_C], -1)

    @functools.cached_property
    def q(self) -> Tensor:
        return self.log_q.exp()

    @functools.cached_property
    def p(self) -> Tensor:
        return self.log_p.exp()

    @functools.cached_property
    def log_m(self) -> Tensor:
        return torch.lerp(self.q, self.p, self.beta).log_().clamp_(min=FLOOR)

    def value(self) -> Tensor:
        """The divergence of each token, [C]."""
        if self.beta == 0:
            return torch.linalg.vecdot(self.p, self.log_p - self.log_q)
        if self.beta == 1:
            return torch.linalg.vecdot(self.q, self.log_q - self.log_p)
        forward_C = torch.linalg.vecdot(self.p, self.log_p - self.log_m)
        return self.beta * forward_C + (1 - self.beta) * torch.linalg.vecdot(self.q, self.log_q - self.log_m)

    def slope(self) -> Tensor:
        """The gradient with respect to the student's logits, a new tensor [C, V].

        With g = d divergence / d q it is `q g - q sum(q g)`. A tail's g holds for each token in it.
        """
        if self.beta == 0:
            weighted = self.p.neg()
        elif self.beta == 1:
            weighted = (self.log_q - self.log_p).mul_(self.q)
        else:
            weighted = (self.log_q - self.log_m).mul_(self.q).mul_(1 - self.beta)
        total_C, q_CV = weighted.sum(-1, keepdim=True), self.q
        if self.outside_CV is not None and self.add_tail:
            q_CV = self.logp_CV.exp()
            share_CV = (self.logp_CV - self.log_q[:, -1:]).exp()  # of the tail's probability
            weighted = torch.where(self.outside_CV, share_CV * weighted[:, -1:], weighted[:, :-1])
        return weighted.addcmul_(q_CV, total_C, value=-1)


def divergence(logp_CV: Tensor, teacher_logp_CV: Tensor, **options: Any) -> Tensor:
    """The divergence of each token, [C, V] -> [C]; `options` are those of `Divergence`."""
    return Divergence(logp_CV, teacher_logp_CV, **options).value()


def divergence_slope(logp_CV: Tensor, teacher_logp_CV: Tensor, **options: Any) -> Tensor:
    """Its gradient with respect to the student's logits, [C, V]."""
    return Divergence(logp_CV, teacher_logp_CV, **options).slope()
