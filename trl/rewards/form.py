"""Rewards for the form of a completion: its format, a pattern, an exact match."""

import json
import re
from collections.abc import Sequence
from typing import Any

from .shapes import texts_of

_THINK = re.compile(r"<think>(?!.*<think>).*?</think>", re.DOTALL)
_FENCED = re.compile(r"```(?:json)?\s*\n(.*)\n```", re.DOTALL)


def think_format_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 if a completion begins with `<think>`, has no second one, and contains `</think>`; else 0."""
    return [float(_THINK.match(text) is not None) for text in texts_of(completions)]


def json_validity_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 if a completion is one JSON value, optionally in a code fence, else 0."""
    return [float(_is_json(text)) for text in texts_of(completions)]


def _is_json(text: str) -> bool:
    fenced = _FENCED.fullmatch(text.strip())
    try:
        json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def get_regex_reward(pattern: str, *, whole: bool = False, ignore_case: bool = False) -> "RegexReward":
    """A reward function: 1 if `pattern` occurs in a completion (`whole`: if it matches all of it, ignoring surrounding
    space), else 0. A dot also matches a line break. ValueError for an invalid pattern."""
    return RegexReward(pattern, whole, ignore_case)


class RegexReward:
    """See `get_regex_reward`."""

    __name__ = "regex_reward"

    def __init__(self, pattern: str, whole: bool, ignore_case: bool):
        self.pattern, self.whole = _compiled("get_regex_reward", pattern, ignore_case), whole

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        match = self.pattern.fullmatch if self.whole else self.pattern.search
        return [float(match(text.strip() if self.whole else text) is not None) for text in texts_of(completions)]


def get_exact_match_reward(
    pattern: str | None = None, *, column: str | None = None, ignore_case: bool = False
) -> "ExactMatchReward":
    r"""A reward function: 1 if the answer in a completion equals `column` (default: `answer`, else `solution`),
    ignoring surrounding space; 0 if not; None where the column is None.

    The answer is the last match of `pattern`, or its first group, such as `r"-?\d+"` for the last number. Default: the
    whole completion.
    """
    return ExactMatchReward(pattern, column, ignore_case)


class ExactMatchReward:
    """See `get_exact_match_reward`."""

    __name__ = "exact_match_reward"

    def __init__(self, pattern: str | None = None, column: str | None = None, ignore_case: bool = False):
        self.pattern = None if pattern is None else _compiled("get_exact_match_reward", pattern, ignore_case)
        self.columns, self.ignore_case = (column,) if column else ("answer", "solution"), ignore_case

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        column = next((name for name in self.columns if columns.get(name) is not None), None)
        if column is None:
            raise ValueError(f"{self.__name__} needs a column {' or '.join(f'`{name}`' for name in self.columns)}")
        return [
            None if answer is None else float(self._answer(text) == self._normalised(str(answer)))
            for text, answer in zip(texts_of(completions), columns[column], strict=True)
        ]

    def _answer(self, text: str) -> str | None:
        if self.pattern is None:
            return self._normalised(text)
        last = None
        for last in self.pattern.finditer(text):  # noqa: B007
            pass
        return None if last is None else self._normalised(last[1 if self.pattern.groups else 0] or "")

    def _normalised(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()


def exact_match_reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """1 if a completion equals the column `answer` (else `solution`), ignoring surrounding space; 0 if not; None where
    the column is None. See `get_exact_match_reward` for options."""
    return ExactMatchReward()(completions, **columns)


def _compiled(function: str, pattern: str, ignore_case: bool) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL | (re.IGNORECASE if ignore_case else 0))
    except re.error as error:
        raise ValueError(f"{function}: {pattern!r} is not a regular expression: {error}") from error
