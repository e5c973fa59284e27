"""Tasks of the library lm-eval (EleutherAI's evaluation harness), with the numbers that it gives."""

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from trl.evaluate.intervals import Estimate, normal


def require_lm_eval(tasks: Sequence[str]) -> Any:
    """The module `lm_eval`. ImportError, which names the tasks and the extra, without it."""
    try:
        import lm_eval
    except ImportError as error:
        raise ImportError(
            f"the tasks {', '.join(tasks)} are those of lm-eval, which is not installed: pip install 'trl[lm-eval]' "
            f"({error})"
        ) from error
    return lm_eval


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | str = 1,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Estimate]:
    """Runs tasks of lm-eval on a loaded model.

    Args:
        model, tokenizer: a causal language model, an adapter on it included, and its tokenizer.
        tasks: names of tasks, such as "arc_easy".
        num_fewshot, limit, batch_size: as in lm-eval; `limit` is the number of questions of a task.
        seed: of the library's random numbers.
        confidence: the coverage of the intervals.

    Returns the numbers as "task/metric", with the interval of the normal distribution by the library's standard error;
    without an interval where it gives none. ImportError without lm-eval.
    """
    lm_eval = require_lm_eval(tasks)
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    answer = lm_eval.simple_evaluate(
        model=wrapped,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    found: dict[str, Estimate] = {}
    for task, numbers in answer["results"].items():
        count = answer.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in numbers.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            name = f"{task}/{metric}" if kind == "none" else f"{task}/{metric}/{kind}"
            error = numbers.get(f"{metric}_stderr,{kind}")
            if isinstance(error, int | float) and not math.isnan(error):
                found[name] = normal(float(value), float(error), count, confidence, of="questions")
            else:
                note = "lm-eval gives no standard error"
                found[name] = Estimate(float(value), None, None, count, "normal", confidence, "questions", note=note)
    return found
