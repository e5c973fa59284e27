"""What to change where a run does not fit, or where it leaves room. `plan` is a `Plan`, which imports this module."""

from collections.abc import Iterator
from typing import Any

import torch

from .run import Run

GIB = 2**30
MARGIN = 0.95  # of a device is filled: allocators leave holes


def divided(rows: int, most: float) -> int:
    """The largest size of micro-batches, at most `most`, that cuts a step of `rows` without a rest."""
    return next((each for each in range(min(rows, int(most)), 0, -1) if rows % each == 0), 0)


def advice(plan: Any) -> Iterator[str]:
    """What is left if the run fits its card, and what would make it fit if not."""
    if plan.card is None:
        return
    run, spare = plan.run, plan.card.memory * GIB - plan.peak.total
    step = run.rows * run.accumulation
    if spare >= 0:
        yield f"fits, with {spare / GIB:.1f} GiB to spare"
        most = 0 if run.samples else divided(step, plan.largest())
        if most > run.rows:
            yield f"{_flags(most, step)} would fit too, in fewer passes with the same gradient"
        return
    yield f"does not fit: {-spare / GIB:.1f} GiB too much in the phase `{plan.peak.name}`"
    if run.samples:
        if plan.peak.name == "backward" and run.tokens_of_micro_batch > run.prompt + run.completion:
            if (tokens := int(plan.largest())) > 0:
                yield f"--max_tokens_per_micro_batch {tokens} fits, with the same gradient"
                return
    elif most := divided(min(run.rows, step), plan.largest()):
        fitted = plan.of(run.having(rows=most, accumulation=step // most))
        left = plan.card.memory * GIB - fitted.peak.total
        yield f"{_flags(most, step)} fits with {left / GIB:.1f} GiB to spare, with the same gradient"
        return
    wide, in_half = run.dtype == torch.float32, "--dtype bfloat16 holds the weights in half the memory"
    left = plan.card.memory * GIB - plan.of(run.having(dtype=torch.bfloat16)).peak.total if wide else 0.0
    if wide and left >= 0:
        yield f"{in_half}: fits with {left / GIB:.1f} GiB to spare"
    if not run.checkpointing:
        yield "--gradient_checkpointing keeps one layer's activations at a time"
    if run.adapter is None:
        yield "--use_peft trains an adapter: gradients and optimizer state of a hundredth of the weights"
        yield "--optim adamw_8bit keeps a quarter of the optimizer's state"
    elif not run.bits:
        yield "--load_in_4bit holds the frozen weights in a quarter of the memory"
    if wide and left < 0:
        yield in_half
    if run.processes == 1:
        yield "--accelerate_config fsdp2 --num_processes N divides weights, gradients and optimizer state by N"
    elif run.sharding == "ddp":
        yield f"--accelerate_config fsdp2 divides weights, gradients and optimizer state by {run.processes}"
    if plan.peak.name == "backward" and (run.prompt + run.completion) > 1024 and not run.samples:
        yield "--max_length cuts the longest rows; activations are proportional to tokens"


def _flags(rows: int, step: int) -> str:
    return f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {step // rows}"


def fitted(plan: Any) -> tuple[dict[str, Any], Any]:
    """Options that fill the plan's card with the same gradient, and the plan with them: the size of micro-batches, and
    checkpointing or offloading where nothing fits without. Where nothing fits, the least that a step can take."""
    assert plan.card is not None
    memory = MARGIN * plan.card.memory * GIB
    run = plan.run
    ways: list[dict[str, Any]] = [{}]
    if not run.checkpointing:
        ways.append({"checkpointing": True})
    if not run.offloading and run.device == "cuda":
        ways.append({"checkpointing": True, "offloading": True})
    for changes in ways:
        found = plan.of(run.having(**changes)) if changes else plan
        if most := found.largest(memory):
            break
    most = most or found.least
    sizes = _tokens(found.run, most) if run.samples else _rows(found.run, most)
    if run.samples:
        changed = found.run.having(budget=sizes.get("max_tokens_per_micro_batch", run.budget))
    else:
        rows = sizes.get("per_device_train_batch_size", run.rows)
        changed = found.run.having(rows=rows, accumulation=run.rows * run.accumulation // rows)
    return {**_options(run, changes), **sizes}, found.of(changed)


def _rows(run: Run, most: float) -> dict[str, Any]:
    step = run.rows * run.accumulation
    rows = divided(step, most)
    if rows == run.rows:
        return {}
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": step // rows}


def _tokens(run: Run, most: float) -> dict[str, Any]:
    tokens = int(min(most, run.tokens_of_step))
    return {} if tokens == run.tokens_of_micro_batch else {"max_tokens_per_micro_batch": tokens}


def _options(run: Run, changes: dict[str, Any]) -> dict[str, Any]:
    """The options of a training command that make these changes."""
    found = {}
    if changes.get("checkpointing") and not run.checkpointing:
        found["gradient_checkpointing"] = True
    if changes.get("offloading"):
        found["activation_offloading"] = True
    return found
