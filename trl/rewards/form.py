"""What a completion looks like: its format, whether it matches, whether it is what was to be said."""

import json
import re
from collections.abc import Sequence
from typing import Any

from .shapes import texts_of

_THINK = re.compile(r"<think>(?!.*<think>).*?</think>", re.DOTALL)
_FENCED = re.compile(r"```(?:json)?\s*\n(.*)\n```", re.DOTALL)


def think_format_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 where a completion begins with the only `<think>` and there is a `</think>` after it, else 0."""
    return [float(_THINK.match(text) is not None) for text in texts_of(completions)]


def json_validity_reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 where a completion is one JSON value (maybe in a fence of backticks), else 0."""
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
    """1 where `pattern` is found in a completion (`whole`: where it is all of it, but for space around it), else 0.
    A dot also matches a line break."""
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
    r"""1 where what a completion answers is, but for space around it, what is in `column` (default: `answer`, or else
    `solution`), 0 where it is not, None where the column is None.

    `pattern` says what the answer is: its last match, or the first group of that, as `r"-?\d+"` for the last number.
    Default: the whole completion.
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
            None if answer is None else float(self._said(text) == self._plain(str(answer)))
            for text, answer in zip(texts_of(completions), columns[column], strict=True)
        ]

    def _said(self, text: str) -> str | None:
        if self.pattern is None:
            return self._plain(text)
        last = None
        for last in self.pattern.finditer(text):  # noqa: B007
            pass
        return None if last is None else self._plain(last[1 if self.pattern.groups else 0] or "")

    def _plain(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()


def exact_match_reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """1 where a completion is, but for space around it, what the column `answer` (or else `solution`) holds, 0 where it
    is not, None where that is None. See `get_exact_match_reward` for more."""
    return ExactMatchReward()(completions, **columns)


def _compiled(function: str, pattern: str, ignore_case: bool) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL | (re.IGNORECASE if ignore_case else 0))
    except re.error as error:
        raise ValueError(f"{function}: {pattern!r} is not a regular expression: {error}") from error
