"""The metrics of an evaluation, and what each needs. Imports nothing, so that a mistake is answered at once."""

from collections.abc import Sequence
from typing import Any

METRICS = ("exact_match", "pass@k", "reward", "win_rate", "perplexity")


def check_metrics(
    metrics: Sequence[str], reward_funcs: Any, judge: Any, against: Any, count: int, pass_at: Sequence[int] | None
) -> None:
    """Raise ValueError for metrics that do not exist, or that need other arguments of `evaluate`."""
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics={list(metrics)}: give some of {', '.join(METRICS)}")
    if "reward" in metrics and not reward_funcs:
        raise ValueError("the metric reward needs reward_funcs")
    if "win_rate" in metrics and against is None:
        raise ValueError("the metric win_rate needs `against`: a column with the other answers, or another model")
    if "win_rate" in metrics and judge is None and not reward_funcs:
        raise ValueError("the metric win_rate needs a judge, or reward_funcs whose sum decides")
    if count < 1:
        raise ValueError(f"num_generations={count} is not possible: give 1 or more")
    for k in pass_at or ():
        if not 1 <= k <= count:
            raise ValueError(f"pass@{k} needs at least {k} completions of a prompt: raise num_generations={count}")
