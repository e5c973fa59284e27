"""Statistics of tensors with gaps: NaN entries, masks, several processes."""

import random
from typing import Any

import torch
from torch import Tensor

# --- without NaN entries --------------------------------------------------------------------------------------------


def nanmin(tensor: Tensor) -> Tensor:
    """The smallest entry that is not NaN; NaN if there is none. Scalar."""
    kept = tensor[~tensor.isnan()]
    return kept.min() if len(kept) else tensor.new_tensor(torch.nan)


def nanmax(tensor: Tensor) -> Tensor:
    """The largest entry that is not NaN; NaN if there is none. Scalar."""
    kept = tensor[~tensor.isnan()]
    return kept.max() if len(kept) else tensor.new_tensor(torch.nan)


def nanstd(tensor: Tensor, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    """The standard deviation (divided by n - 1) of the entries that are not NaN, over `dim` (None: all dimensions).

    NaN where fewer than two entries are left.
    """
    dims = tuple(range(tensor.dim())) if dim is None else dim
    mean = tensor.nanmean(dims, keepdim=True)
    count = (~tensor.isnan()).sum(dims, keepdim=keepdim)
    squares = (tensor - mean).square().nansum(dims, keepdim=keepdim)
    return (squares / (count - 1)).sqrt().masked_fill(count < 2, torch.nan)


# --- under a mask ---------------------------------------------------------------------------------------------------


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """The mean of the values where the mask is 1, over `axis` or over all; NaN where the mask is empty."""
    if axis is None:
        return (values * mask).sum() / mask.sum()
    return (values * mask).sum(axis) / mask.sum(axis)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """The variance of the values where the mask is 1, divided by n - 1 if `unbiased`, else by n. Scalar.

    Raises `ValueError` if the mask leaves fewer values than that needs.
    """
    count = int(mask.sum())
    if count < 1 + unbiased:
        raise ValueError(f"the mask leaves {count} values, too few for a variance: give at least {1 + unbiased}")
    squares = masked_mean((values - masked_mean(values, mask)).square(), mask)
    return squares * count / (count - 1) if unbiased else squares


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """The values scaled to variance 1 by the values under the mask, and shifted to mean 0 if `shift_mean`."""
    mean, variance = masked_mean(values, mask), masked_var(values, mask)
    scaled = (values - mean) * torch.rsqrt(variance + 1e-8)
    return scaled if shift_mean else scaled + mean


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """The values scaled to variance 1 (divided by n - 1), and shifted to mean 0 if `shift_mean`."""
    return masked_whiten(values, torch.ones_like(values), shift_mean)


# --- of several processes -------------------------------------------------------------------------------------------


def get_global_statistics(
    accelerator: Any, xs: Tensor, mask: Tensor | None = None, device: Any = "cpu"
) -> tuple[Tensor, Tensor, int]:
    """Mean, variance (divided by n) and number of the values of all processes, those under the mask if there is one.

    The two tensors are on `device`.
    """
    kept = xs if mask is None else xs[mask.bool()]
    counted = torch.stack([kept.new_tensor(kept.numel()), kept.sum()]).to(xs.device)
    count, total = accelerator.reduce(counted)
    mean = total / count
    variance = accelerator.reduce((kept - mean).square().sum()) / count
    return mean.to(device), variance.to(device), int(count)


class RunningMoments:
    """Mean and variance of a stream of scores, of all processes of `accelerator`."""

    def __init__(self, accelerator: Any, mean: float = 0, std: float = 1, var: float = 1, count: float = 1e-24) -> None:
        self.accelerator = accelerator
        self.mean, self.std, self.var, self.count = mean, std, var, count

    @torch.no_grad()
    def update(self, xs: Tensor) -> tuple[float, float]:
        """Take in scores and return their own mean and standard deviation (divided by n - 1), over all processes.

        `mean`, `var` (divided by n), `std` (divided by n - 1) and `count` are those of all scores so far.
        """
        if getattr(self.accelerator, "use_distributed", False):
            mean_, variance_, count = get_global_statistics(self.accelerator, xs)
            mean, variance = mean_.item(), variance_.item()
        else:
            mean, variance, count = xs.mean().item(), xs.var(unbiased=False).item(), xs.numel()
        both, shift = self.count + count, mean - self.mean
        squares = self.var * self.count + variance * count + shift**2 * self.count * count / both
        self.mean += shift * count / both
        self.var, self.count = squares / both, both
        self.std = (squares / max(both - 1, 1e-24)) ** 0.5
        return mean, (variance * count / max(count - 1, 1)) ** 0.5


# --- random numbers -------------------------------------------------------------------------------------------------


class LengthSampler:
    """Draws a length from `min_value` up to, but not including, `max_value`, by the module `random`."""

    def __init__(self, min_value: int, max_value: int) -> None:
        if min_value >= max_value:
            raise ValueError(f"no length lies from {min_value} up to {max_value}: the second must be larger")
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        return random.choice(self.values)
