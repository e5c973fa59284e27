"""Rewards for the length of a completion, and penalties for repetition."""

from collections.abc import Callable, Sequence
from typing import Any

from .shapes import texts_of


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> "SoftOverlongPunishment":
    """A reward function: 0 up to `max_completion_len - soft_punish_cache` tokens, then linear to -1 at
    `max_completion_len`, and -1 beyond. DAPO, Yu et al. 2025, arXiv:2503.14476, equation 13."""
    return SoftOverlongPunishment(max_completion_len, soft_punish_cache)


class SoftOverlongPunishment:
    """See `get_soft_overlong_punishment`. A class, so that it can be sent to a worker process."""

    __name__ = "soft_overlong_punishment_reward"

    def __init__(self, max_completion_len: int, soft_punish_cache: int):
        self.longest, self.cache = max_completion_len, soft_punish_cache

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [self._of(len(ids)) for ids in completion_ids]

    def _of(self, length: int) -> float:
        free = self.longest - self.cache
        if length <= free:
            return 0.0
        return (free - length) / self.cache if length <= self.longest else -1.0


def get_repetition_penalty_reward(ngram_size: int = 3, max_penalty: float = -1.0) -> "RepetitionPenalty":
    """A reward function: `max_penalty` times the share of repeated token n-grams; 0 for completions shorter than an
    n-gram. Yeo et al. 2025, arXiv:2502.03373, appendix C.2."""
    if max_penalty > 0:
        raise ValueError(f"get_repetition_penalty_reward: max_penalty={max_penalty} must not be positive")
    if ngram_size < 1:
        raise ValueError(f"get_repetition_penalty_reward: ngram_size={ngram_size} must be at least 1")
    return RepetitionPenalty(ngram_size, max_penalty)


class RepetitionPenalty:
    """See `get_repetition_penalty_reward`."""

    __name__ = "repetition_penalty_reward"

    def __init__(self, ngram_size: int, max_penalty: float):
        self.size, self.worst = ngram_size, max_penalty

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [self._of(list(ids)) for ids in completion_ids]

    def _of(self, ids: list[int]) -> float:
        total = len(ids) - self.size + 1
        distinct = len({tuple(ids[start : start + self.size]) for start in range(total)})
        return (1 - distinct / total) * self.worst if 0 < distinct < total else 0.0


def get_length_reward(target: int, *, unit: str = "tokens", tolerance: int | None = None) -> "LengthReward":
    """A reward function: 1 at the length `target`, linear to 0 at the distance `tolerance` (default: `target`).

    `unit` is `tokens`, `words` or `characters`.
    """
    return LengthReward(target, unit, tolerance)


_LENGTHS: dict[str, Callable[[str], int]] = {"words": lambda text: len(text.split()), "characters": len}


class LengthReward:
    """See `get_length_reward`."""

    __name__ = "length_reward"

    def __init__(self, target: int, unit: str, tolerance: int | None):
        if unit not in ("tokens", *_LENGTHS):
            raise ValueError(f"get_length_reward: unit={unit!r} is not one of tokens, words, characters")
        self.target, self.unit = target, unit
        self.tolerance = target if tolerance is None else tolerance
        if self.tolerance <= 0:
            raise ValueError(f"get_length_reward: tolerance={self.tolerance} must be positive")

    def __call__(self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        if self.unit == "tokens":
            lengths = [len(ids) for ids in completion_ids]
        else:
            lengths = [_LENGTHS[self.unit](text) for text in texts_of(completions)]
        return [max(0.0, 1.0 - abs(length - self.target) / self.tolerance) for length in lengths]
