"""Rewards for the sentiment of a completion, by a lexicon. Needs the extra `sentiment`."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from .shapes import texts_of


def sentiment_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """VADER's compound score (Hutto and Gilbert 2014), from -1, negative, to 1, positive.

    Texts of a language model are mostly positive already: see `get_sentiment_reward` for another target.
    """
    return _scores("sentiment_reward", completions)


def get_sentiment_reward(target: float = 1.0) -> "SentimentReward":
    """A reward function: closeness of the sentiment to `target` in [-1, 1]; 1 at the target, 0 at the distance 2."""
    if not -1 <= target <= 1:
        raise ValueError(f"get_sentiment_reward: target={target} is not between -1 and 1")
    return SentimentReward(target)


class SentimentReward:
    """See `get_sentiment_reward`."""

    __name__ = "sentiment_reward"

    def __init__(self, target: float):
        self.target = target

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        return [1.0 - abs(score - self.target) / 2 for score in _scores("get_sentiment_reward", completions)]


def _scores(name: str, completions: Sequence[Any]) -> list[float]:
    try:
        analyser = _analyser()
    except ImportError as error:
        raise ImportError(f"{name} needs the extra `sentiment`: pip install 'trl[sentiment]'") from error
    return [float(analyser.polarity_scores(text)["compound"]) for text in texts_of(completions)]


@cache
def _analyser() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
