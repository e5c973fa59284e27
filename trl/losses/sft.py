"""Losses of supervised fine-tuning: one number per trained token."""

from collections.abc import Callable

from torch import Tensor


def nll(*, logp_N: Tensor) -> Tensor:
    """Negative log-likelihood: `-log p(token)`, [N] -> [N], in nats."""
    return -logp_N


def dft(*, logp_N: Tensor) -> Tensor:
    """Dynamic fine-tuning: `-sg[p(token)] log p(token)`, [N] -> [N].

    The likelihood of each token, taken as a constant, cancels the 1/p weight that the gradient of the negative
    log-likelihood puts on unlikely tokens. Wu et al. 2025, arXiv:2508.05629, equation 9.
    """
    return -logp_N.detach().exp() * logp_N


def label_smoothing(loss_N: Tensor, *, mean_logp_N: Tensor, label_smoothing_factor: float) -> Tensor:
    """`(1 - e) loss + e mean_v(-log p(v))` with `e = label_smoothing_factor`, [N] -> [N]: cross-entropy against a
    target that spreads e evenly over the vocabulary. Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    return (1 - label_smoothing_factor) * loss_N - label_smoothing_factor * mean_logp_N


LOSSES: dict[str, Callable[..., Tensor]] = {"nll": nll, "dft": dft}
