"""Measures of a predicted distribution: a table of numbers and, for some, their gradients.

`C` tokens of a chunk, `V` vocabulary. Everything is taken in fp32.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Chunk:
    """The distributions that predict the tokens of a chunk, [C, V]. Numbers shared by measures are computed once."""

    def __init__(self, logits_CV: Tensor, target_C: Tensor) -> None:
        self.logits_CV, self.target_C = logits_CV, target_C
        self.logp_CV = logits_CV.log_softmax(-1)

    @functools.cached_property
    def p_CV(self) -> Tensor:  # noqa: N802 dimensions are in the names
        return self.logp_CV.exp()

    @property
    def finite_logp_CV(self) -> Tensor:  # noqa: N802
        """Log-probs without infinities: those of -inf logits have p log p = 0."""
        return self.logp_CV.clamp(min=torch.finfo(self.logp_CV.dtype).min)

    @functools.cached_property
    def logp_C(self) -> Tensor:  # noqa: N802
        return self.logp_CV.gather(1, self.target_C[:, None])[:, 0]

    @functools.cached_property
    def entropy_C(self) -> Tensor:  # noqa: N802
        return -torch.linalg.vecdot(self.p_CV, self.finite_logp_CV)


class Measure(NamedTuple):
    """`of(chunk)` is one number per token, [C]; `slope(chunk)` is its gradient with respect to the logits, a new tensor
    [C, V]."""

    of: Callable[[Chunk], Tensor]
    slope: Callable[[Chunk], Tensor] | None = None


def logp_slope(chunk: Chunk) -> Tensor:
    """d logp / d logits = onehot(target) - p, [C, V]."""
    slope_CV = -chunk.p_CV if "p_CV" in vars(chunk) else chunk.logp_CV.exp().neg_()
    slope_CV.scatter_add_(1, chunk.target_C[:, None], torch.ones_like(slope_CV[:, :1]))
    return slope_CV


def _entropy_slope(chunk: Chunk) -> Tensor:
    """d entropy / d logits = -p (log p + entropy), [C, V]."""
    return chunk.p_CV * -(chunk.finite_logp_CV + chunk.entropy_C[:, None])


def _mean_logp_slope(chunk: Chunk) -> Tensor:
    """d mean(log p) / d logits = 1/V - p, [C, V]."""
    p_CV = chunk.p_CV if "p_CV" in vars(chunk) else chunk.logp_CV.exp()
    return 1.0 / p_CV.shape[1] - p_CV


# In addition to the log-prob of the trained token. Measures with a slope come first.
MEASURES: dict[str, Measure] = {
    # entropy of the distribution, in nats
    "entropy": Measure(lambda chunk: chunk.entropy_C, _entropy_slope),
    # mean over the vocabulary of log-probs (label smoothing)
    "mean_logp": Measure(lambda chunk: chunk.logp_CV.mean(-1), _mean_logp_slope),
    # 1 where the trained token is the most likely one
    "top1": Measure(lambda chunk: (chunk.logp_C >= chunk.logp_CV.amax(-1)).float()),
    # mean over the vocabulary of the (scaled) logits
    "mean_logit": Measure(lambda chunk: chunk.logits_CV.mean(-1)),
    # sum over the vocabulary of squared probabilities
    "sum_sq": Measure(lambda chunk: torch.linalg.vecdot(chunk.p_CV, chunk.p_CV)),
}
