"""Measures of a predicted distribution: a table of numbers and, for some, their gradients.

`C` tokens of a chunk, `V` vocabulary. Everything is taken in fp32.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .divergence import Divergence


@dataclass(frozen=True)
class Comparison:
    """Another model's predictions of the same tokens, and the divergence that compares a distribution with them.

    `logits` gives those of a span of the trained tokens, [C, V], as they enter its softmax. `beta`, `top_k` and
    `add_tail` are those of `engine.divergence.Divergence`.
    """

    logits: Callable[[slice], Tensor]
    beta: float = 0.5
    top_k: int = 0
    add_tail: bool = True
    span: slice | None = None  # all of them

    @property
    def options(self) -> dict[str, Any]:
        """Those of the divergence."""
        return {"beta": self.beta, "top_k": self.top_k, "add_tail": self.add_tail}


class Chunk:
    """The distributions that predict the tokens of a chunk, [C, V], and those that they are compared with. Numbers
    shared by measures are computed once."""

    def __init__(self, logits_CV: Tensor, target_C: Tensor, comparison: Comparison | None = None) -> None:
        self.logits_CV, self.target_C, self._comparison = logits_CV, target_C, comparison
        self.logp_CV = logits_CV.log_softmax(-1)

    @property
    def comparison(self) -> Comparison:
        assert self._comparison is not None
        return self._comparison

    @functools.cached_property
    def other_logp_CV(self) -> Tensor:  # noqa: N802
        with torch.no_grad():
            logits_CV = self.comparison.logits(self.comparison.span or slice(None))
            return logits_CV.to(self.logp_CV.device).float().log_softmax(-1)

    @functools.cached_property
    def divergence(self) -> Divergence:
        return Divergence(self.logp_CV, self.other_logp_CV, q_CV=self.p_CV, **self.comparison.options)

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
    # divergence from another model's distribution
    "divergence": Measure(lambda chunk: chunk.divergence.value(), lambda chunk: chunk.divergence.slope()),
    # log-prob of the trained token under the other model
    "other_logp": Measure(lambda chunk: chunk.other_logp_CV.gather(1, chunk.target_C[:, None])[:, 0]),
    # 1 where the trained token is the most likely one
    "top1": Measure(lambda chunk: (chunk.logp_C >= chunk.logp_CV.amax(-1)).float()),
    # mean over the vocabulary of the (scaled) logits
    "mean_logit": Measure(lambda chunk: chunk.logits_CV.mean(-1)),
    # sum over the vocabulary of squared probabilities
    "sum_sq": Measure(lambda chunk: torch.linalg.vecdot(chunk.p_CV, chunk.p_CV)),
}
