"""What is said at the end of a run: the result, its checkpoints, what to look at, and how to go on."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from trl import checkpoint
from trl.methods import METHODS, Method
from trl.models import adapters
from trl.screen import change, duration, number

from . import planned

FEWEST = 5  # log entries that a mean with an interval is of
CONSTANT, CLIPPED = 0.5, 0.1  # shares of groups with one reward, and of cut completions, that are told of

Entries = Sequence[Mapping[str, Any]]


class Mean(NamedTuple):
    value: float
    half: float  # half the width of its 95% interval

    def __str__(self) -> str:
        return f"{number(self.value)} ± {self.half:.2g}"


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of at least two values with its 95% interval, by Student's t."""
    freedom, z = len(values) - 1, 1.959964
    # Its quantile as a series in 1/freedom (Abramowitz and Stegun 1964, 26.7.5).
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return Mean(fmean(values), t * stdev(values) / math.sqrt(len(values)))


def course(history: Entries, name: str) -> list[tuple[int, float]]:
    """The finite values of a metric, each with its step."""
    found = [(int(entry.get("step", 0)), entry[name]) for entry in history if name in entry]
    return [(step, float(value)) for step, value in found if isinstance(value, int | float) and math.isfinite(value)]


def summary(trainer: Any, args: Any, state: Any, headline: str, seconds: float, steps: int) -> dict[str, list[str]]:
    """The lines by group. `headline` is the metric that the run is about; `steps` were taken in `seconds`."""
    history = state.log_history
    speed = f"{steps:,} step{'' if steps == 1 else 's'} in {duration(seconds)}"
    tokens = [entry["num_tokens"] for entry in history if "num_tokens" in entry]
    if tokens:
        speed += f"; {tokens[-1]:,} tokens seen"
    result = [f"result: {speed}", *_result(course(history, headline), headline), *_evaluations(history, headline)]
    result += planned.measured(trainer)
    caution = [f"warning: {each}" for each in findings(trainer, args, history)]
    found = {"result": result, "checkpoint": _checkpoints(args, state, headline), "caution": caution}
    return {name: lines for name, lines in found.items() if lines}


def _result(values: Sequence[tuple[int, float]], name: str) -> list[str]:
    if not values:
        return []
    (first_step, first), (last_step, last) = values[0], values[-1]
    if len(values) == 1:
        return [f"{name}: {number(first)} at step {first_step:,}"]
    line = f"{name}: {number(first)} at step {first_step:,}, {number(last)} at step {last_step:,}"
    count = max(FEWEST, len(values) // 5)
    if 2 * count > len(values):
        return [line]
    before, after = (mean_of([value for _, value in part]) for part in (values[:count], values[-count:]))
    told = f"{line}; mean of the first {count} log entries {before}, of the last {count} {after} (95% interval)"
    moved = after.value - before.value
    if abs(moved) <= math.hypot(before.half, after.half):
        return [told, f"{name}: its change of {change(moved)} is within the noise"]
    return [told]


def _evaluations(history: Entries, headline: str) -> list[str]:
    lines = []
    for name in sorted({name for entry in history for name in entry}):
        if name != f"eval_{headline}" and not (name.startswith("eval_") and name.endswith(f"_{headline}")):
            continue
        values = course(history, name)
        if not values:
            continue
        halves = dict(course(history, f"{name}_ci95"))
        told = [f"{number(value)}{f' ± {halves[step]:.2g}' if step in halves else ''} at step {step:,}"
                for step, value in (values[0], values[-1])]  # fmt: skip
        line = f"{name}: {', '.join(told if len(values) > 1 else told[:1])}"
        if len(values) > 2:
            step, best = _best(values, headline)
            line += f"; best {number(best)} at step {step:,}"
        lines.append(line)
    return lines


def _best(values: Sequence[tuple[int, float]], headline: str) -> tuple[int, float]:
    return (min if "loss" in headline else max)(values, key=lambda pair: pair[1])


def _checkpoints(args: Any, state: Any, headline: str) -> list[str]:
    """The best checkpoint and why it is, or the last one."""
    if state.best_model_checkpoint:
        which = "highest" if args.greater_is_better else "lowest"
        name = args.metric_for_best_model or "loss"
        name = name if name.startswith("eval_") else f"eval_{name}"
        loaded = "; its weights are loaded" if args.load_best_model_at_end else ""
        why = f"{which} {name}, {number(state.best_metric)}"
        return [f"checkpoint: the best is {state.best_model_checkpoint} ({why}){loaded}"]
    folders = checkpoint.checkpoints(Path(args.output_dir))
    if not folders:
        return []
    values = course(state.log_history, f"eval_{headline}")
    known = {checkpoint.step(folder): folder for folder in folders}
    kept = [pair for pair in values if pair[0] in known]
    if kept:
        step, best = _best(kept, headline)
        which = "lowest" if "loss" in headline else "highest"
        return [f"checkpoint: the best is {known[step]} ({which} eval_{headline} of those kept, {number(best)})"]
    return [f"checkpoint: the last is {folders[-1]}; none is known to be better, because none was evaluated"]


def findings(trainer: Any, args: Any, history: Entries) -> list[str]:
    """What a user should look at, in a sentence each."""
    lines = []
    constant = [value for _, value in course(history, "frac_reward_zero_std")]
    if constant and fmean(constant) >= CONSTANT:
        lines.append(
            f"in {fmean(constant):.0%} of the groups all completions had the same reward, so nothing was learnt from "
            "them; make prompts easier or harder, the reward finer, or set dynamic_sampling"
        )
    for name in sorted({name for entry in history for name in entry}):
        if name.startswith("rewards/") and name.endswith("/std"):
            spread = [value for _, value in course(history, name)]
            if len(spread) > 1 and not any(spread):
                lines.append(f"the reward function {name[8:-4]} never told two completions of a round apart")
    clipped = [value for _, value in course(history, "completions/clipped_ratio")]
    late = clipped[-max(1, len(clipped) // 5) :]
    if late and fmean(late) >= CLIPPED:
        lines.append(
            f"lately {fmean(late):.0%} of the completions were cut at max_completion_length="
            f"{getattr(args, 'max_completion_length', None)}"
        )
    report = getattr(trainer, "reports", {}).get("train")
    if report is not None:
        cut = getattr(report, "rows_cut", 0) or getattr(report, "cut", 0)
        dropped = sum(each["count"] for each in report.dropped)
        if cut:
            lines.append(f"{cut:,} of {report.rows_kept:,} rows were cut; the report before step 1 says how much")
        if dropped:
            lines.append(f"{dropped:,} of {report.rows_read:,} rows were left out; the report before step 1 says why")
    return lines


def commands(trainer: Any, args: Any) -> dict[str, list[str]]:
    """How to go on from what is on disk: the last checkpoint, if there is one."""
    folders = checkpoint.checkpoints(Path(args.output_dir))
    if trainer is None or not args.should_save:
        return {}
    if not folders:
        return {"go on": [f"save it: trainer.save_model({str(args.output_dir)!r})"]}
    found = next_commands(str(folders[-1]), METHODS.get(trainer.method), adapters.has_adapter(trainer.model))
    lines = [f"{name}: {line}" for name, line in found]
    return {"go on": [*lines, "train on: raise max_steps or num_train_epochs, then "
                              "trainer.train(resume_from_checkpoint=True)"]}  # fmt: skip


def next_commands(folder: str, method: Method | None, adapter: bool) -> list[tuple[str, str]]:
    """The commands that take up a saved model, each with what it is for."""
    place = f"--model_name_or_path {folder}"
    found = []
    if method is not None and method.head == "CausalLM":
        found = [("chat", f"trl chat {place}"), ("evaluate", f"trl eval {place} --dataset_name ...")]
    return [*found, *([("merge", f"trl merge {place} --output_dir {folder.rstrip(os.sep)}-merged")] if adapter else [])]
