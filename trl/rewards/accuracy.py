"""Rewards for answers that equal the solution mathematically. Needs the extra `math`."""

import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

from .shapes import texts_of

_SKIPPED = "[skipped]"
_UNPARSEABLE = "[unparseable]"
_INCOMPLETE = "[incomplete reasoning]"


def accuracy_reward(
    completions: Sequence[Any], solution: Sequence[str], log_extra: Callable[..., None] | None = None, **_: Any
) -> list[float | None]:
    r"""1 if the LaTeX formula in a completion (first the one in `\boxed{}`) equals the solution, 0 if not, None if the
    solution cannot be parsed."""
    return _graded("accuracy_reward", texts_of(completions), solution, log_extra)


def reasoning_accuracy_reward(
    completions: Sequence[Any],
    solution: Sequence[str],
    reasoning_delimiters: Sequence[str] | None = None,
    log_extra: Callable[..., None] | None = None,
    **_: Any,
) -> list[float | None]:
    """As `accuracy_reward`, on the text after the reasoning; 0 without a delimiter. The delimiter is the first of
    `reasoning_delimiters` (default: `</think>`) in the text; its last occurrence counts."""
    delimiters = ["</think>"] if reasoning_delimiters is None else reasoning_delimiters
    answers: list[str | None] = []
    for text in texts_of(completions):
        present = next((delimiter for delimiter in delimiters if delimiter in text), None)
        answers.append(None if present is None else text.rsplit(present, 1)[1])
    return _graded("reasoning_accuracy_reward", answers, solution, log_extra)


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> "CosineScaledReward":
    """Accuracy scaled by length: Yeo et al. 2025, arXiv:2502.03373, appendix C.1.

    With the number of tokens l, the reward of a right answer falls from `max_value_correct` to `min_value_correct`, and
    that of a wrong one rises from `min_value_wrong` to `max_value_wrong`, as (1 + cos(pi * min(l / max_len, 1))) / 2.
    """
    return CosineScaledReward(max_len, min_value_wrong, max_value_wrong, min_value_correct, max_value_correct)


class CosineScaledReward:
    """See `get_cosine_scaled_reward`. A class, so that it can be sent to a worker process."""

    __name__ = "cosine_scaled_reward"

    def __init__(self, max_len: int, wrong_short: float, wrong_long: float, right_long: float, right_short: float):
        if max_len <= 0:
            raise ValueError(f"get_cosine_scaled_reward: max_len={max_len} must be positive")
        self.max_len = max_len
        self.wrong, self.right = (wrong_short, wrong_long), (right_short, right_long)

    def __call__(
        self, completions: Sequence[Any], solution: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float | None]:
        graded = _graded(self.__name__, texts_of(completions), solution, None)
        rewards: list[float | None] = []
        for right, ids in zip(graded, completion_ids, strict=True):
            short, long = self.right if right else self.wrong
            share = (1.0 + math.cos(min(len(ids) / self.max_len, 1.0) * math.pi)) / 2
            rewards.append(None if right is None else float(long + (short - long) * share))
        return rewards


def _graded(
    name: str, answers: Sequence[str | None], solutions: Sequence[str], log_extra: Callable[..., None] | None
) -> list[float | None]:
    """Grades each answer against its solution; an answer of None gets 0."""
    try:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise ImportError(f"{name} needs the extra `math`: pip install 'trl[math]'") from error

    # Timeouts use signals, which only the main thread receives; elsewhere the library would warn at each call.
    limits = (10, 5) if threading.current_thread() is threading.main_thread() else (None, None)
    if limits[0] is None:
        for each in ("math_verify.parser", "math_verify.grader"):
            logging.getLogger(each).setLevel(logging.ERROR)
    # Operators must be well-formed, and the formula must be marked as one.
    latex = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )
    rewards: list[float | None] = []
    read: dict[str, list[str]] = {"gold_parsed": [], "answer_parsed": []}
    for answer, solution in zip(answers, solutions, strict=True):
        reward: float | None = 0.0
        seen = (_INCOMPLETE, _INCOMPLETE)
        if answer is not None:
            gold = parse(solution, parsing_timeout=limits[0])
            if gold:
                found = parse(
                    answer, extraction_config=[latex], extraction_mode="first_match", parsing_timeout=limits[0]
                )
                reward = float(verify(gold, found, timeout_seconds=limits[1]))
                seen = (str(gold), str(found) if found else _UNPARSEABLE)
            else:
                reward, seen = None, (_UNPARSEABLE, _SKIPPED)
        rewards.append(reward)
        for formulas, formula in zip(read.values(), seen, strict=True):
            formulas.append(formula)
    if log_extra is not None:
        log_extra("solution", list(solutions))
        for column, values in read.items():
            log_extra(column, values)
    return rewards
