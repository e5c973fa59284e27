"""Reward functions that worker processes can import."""

from __future__ import annotations

import os
import time
from typing import Any


def lengths(completions: list[Any], log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
    """For strings: a list of messages has no `strip`."""
    log_extra("upper", [text.strip().upper() for text in completions])
    log_metric("rows", len(completions))
    return [float(len(text.strip())) for text in completions]


def process(completions: list[Any], **_: Any) -> list[float]:
    return [float(os.getpid() % 1000)] * len(completions)


def content(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    return [float(completion[-1]["content"] == right) for completion, right in zip(completions, answer, strict=True)]


def refuses(completions: list[str]) -> list[float]:
    raise OwnError("no", 3)


class OwnError(Exception):
    def __init__(self, one: str, two: int):
        super().__init__(f"{one} {two}")


def dies(completions: list[str]) -> list[float]:
    os._exit(3)


def sleeps(completions: list[str]) -> list[float]:
    time.sleep(60)
    return [0.0] * len(completions)
