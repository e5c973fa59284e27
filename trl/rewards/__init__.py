"""Ready-made reward functions. Each takes lists of completions and columns, strings or messages, and returns a list of
numbers, with None where it does not apply."""

from collections.abc import Callable
from typing import Any

from .accuracy import accuracy_reward, get_cosine_scaled_reward, reasoning_accuracy_reward
from .form import (
    exact_match_reward,
    get_exact_match_reward,
    get_regex_reward,
    json_validity_reward,
    think_format_reward,
)
from .length import get_length_reward, get_repetition_penalty_reward, get_soft_overlong_punishment
from .sentiment import get_sentiment_reward, sentiment_reward

__all__ = [
    "FACTORIES",
    "REWARDS",
    "accuracy_reward",
    "exact_match_reward",
    "get_cosine_scaled_reward",
    "get_exact_match_reward",
    "get_length_reward",
    "get_regex_reward",
    "get_repetition_penalty_reward",
    "get_sentiment_reward",
    "get_soft_overlong_punishment",
    "json_validity_reward",
    "reasoning_accuracy_reward",
    "sentiment_reward",
    "think_format_reward",
]

# Reward functions by name, for the command line.
REWARDS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        accuracy_reward,
        reasoning_accuracy_reward,
        think_format_reward,
        exact_match_reward,
        json_validity_reward,
        sentiment_reward,
        get_soft_overlong_punishment,
        get_cosine_scaled_reward,
        get_repetition_penalty_reward,
        get_length_reward,
        get_regex_reward,
        get_exact_match_reward,
        get_sentiment_reward,
    )
}

# Functions that make a reward function, and their arguments if only their name is given.
FACTORIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in REWARDS if name.startswith("get_")},
    "get_soft_overlong_punishment": {"max_completion_len": 1280, "soft_punish_cache": 256},
}
