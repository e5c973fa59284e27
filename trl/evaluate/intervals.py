"""Numbers with confidence intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A number and its confidence interval.

    Args:
        value: the number.
        low, high: the ends of the interval; None if there is none, for the reason in `note`.
        count: observations, such as prompts or rows.
        method: "Wilson", "bootstrap" or "normal".
        confidence: the interval's coverage, 0 to 1.
        of: what was observed, in the plural.
        left_out: observations without a value.
    """

    value: float
    low: float | None
    high: float | None
    count: int
    method: str
    confidence: float = 0.95
    of: str = "prompts"
    left_out: int = 0
    note: str = ""

    def line(self) -> str:
        """The number, its interval and how it was taken, on one line."""
        # At 1 the noun is cut to its singular.
        what = f"{self.count:,} {self.of if self.count != 1 else self.of.removesuffix('s')}"
        if self.left_out:
            what += f", {self.left_out:,} left out"
        if self.low is None or self.high is None:
            return f"{self.value:.4g}  (no interval: {self.note}; {what})"
        interval = f"{self.confidence:.0%} interval {self.low:.4g} to {self.high:.4g}"
        return f"{self.value:.4g}  {interval} ({self.method}, {what})"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def wilson(passed: float, count: int, confidence: float = 0.95, **further: Any) -> Estimate:
    """A share of `count` trials, with Wilson's score interval (Wilson 1927, J. Am. Stat. Assoc. 22, p. 209).

    Trials may count in part, a tie as a half: no numbers between 0 and 1 vary more than zeros and ones of the same
    mean, so that the interval is then wide enough. `further` are fields of the estimate.
    """
    share, z = passed / count, NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = (0.0 if passed == 0 else middle - half), (1.0 if passed == count else middle + half)
    return Estimate(share, low, high, count, "Wilson", confidence, **further)


def normal(value: float, error: float, count: int, confidence: float = 0.95, **further: Any) -> Estimate:
    """A number with a standard error, with the interval of the normal distribution."""
    half = error * NormalDist().inv_cdf(0.5 + confidence / 2)
    return Estimate(value, value - half, value + half, count, "normal", confidence, **further)


def bootstrap(
    rows: Sequence[Any] | np.ndarray,
    statistic: Callable[[np.ndarray], float] = lambda rows: float(rows.mean()),
    confidence: float = 0.95,
    seed: int = 0,
    **further: Any,
) -> Estimate:
    """A statistic of rows, with the percentile interval of the bootstrap (Efron 1979, Ann. Stat. 7, p. 1): rows are
    drawn with replacement 2,000 times, in an order that `seed` names.

    `statistic` takes an array whose first dimension is the rows; the mean by default. Rows that are all alike say
    nothing about others, and have no interval.
    """
    rows = np.asarray(rows, dtype=np.float64)
    count = len(rows)
    if (rows == rows[0]).all():
        note = "one observation" if count == 1 else "all values are the same"
        return Estimate(statistic(rows), None, None, count, "bootstrap", confidence, note=note, **further)
    draws = np.random.default_rng(seed)
    found = [statistic(rows[draws.integers(count, size=count)]) for _ in range(RESAMPLES)]
    low, high = np.quantile(found, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Estimate(statistic(rows), float(low), float(high), count, "bootstrap", confidence, **further)
