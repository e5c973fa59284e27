"""The plan of a trainer's run: what it will need of its device, in a line before step 1, and what it took, after it.

The line costs little: a small model on a CPU is estimated and not traced, and a plan is made once for runs that are
alike. It changes no number, and no fault of it ends a run.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trl.models.adapters import active_config
from trl.models.unwrap import unwrap
from trl.models.value_head import critic
from trl.notices import notify_once
from trl.rollout.pack import BUDGET

if TYPE_CHECKING:
    from trl.plan import Plan

TRACED_FROM = 2**27  # weights of a model on a CPU, from which on a run takes long enough for its plan to be traced
GIB = 2**30
_plans: dict[str, "Plan"] = {}  # of this process


class Expected(NamedTuple):
    """What was foretold of a run before its first step, in bytes."""

    peak: float  # of this process
    room: float  # of the device
    held: float  # what was there already, such as the weights
    resident: float  # of the process then, on a CPU; `record` the highest so far
    record: float


class Planned:
    """What `BaseTrainer` has of a plan. `self` is the trainer."""

    _expected: Expected | None = None

    def plan(self, gpu: str | None = None) -> "Plan":
        """What this run will need: memory by part and phase, time, cost (see `trl.plan`). `gpu` names a card that it
        would run on; without it, the plan is for the device that it runs on. Raises ValueError for an unknown card."""
        return plan_of(self, gpu)


def plan_of(trainer: Any, gpu: str | None = None, rough: bool = False) -> "Plan":
    """The plan of a trainer's run, by its own model, arguments and data."""
    from trl.plan import Card, plan
    from trl.plan.reading import quantised, run_of

    args, model = trainer.args, unwrap(trainer.model)
    device = "cuda" if gpu is not None or args.device.type != "cpu" else "cpu"
    prompt, completion, trained = longest(trainer)
    bits, nested = quantised(model.config)
    own = critic(model)
    run = run_of(
        trainer.method,
        model.config,
        args,
        adapter=active_config(trainer.model),
        dtype=model.dtype,
        bits=bits,
        nested=nested,
        teacher=getattr(_model_of(trainer, "teacher"), "config", None),
        frozen=tuple(each.config for each in _reward_models(trainer)),
        critic=unwrap(own).config if own is not None else None,
        prompt=prompt,
        completion=completion,
        trained=trained,
        processes=args.world_size,
        sharding=_sharding(trainer),
        device=device,
        **_of_a_round(trainer),
    )
    if run.has_reference:
        run = run.having(has_reference=getattr(trainer.reference, "policy", None) is not None)
    card = None
    if gpu is None:
        card = Card(room_of(args.device) / GIB, 0.0, 0.0)
    about = [repr(run.having(config=None, adapter=None)), run.config.to_dict(), str(run.adapter), gpu, card, rough]
    key = json.dumps(about, default=str)
    if key not in _plans:
        _plans[key] = plan(run, gpu if gpu is not None else card, rough=rough)
    found = _plans[key]
    found.steps = args.max_steps if args.max_steps > 0 else None
    return found


def _of_a_round(trainer: Any) -> dict[str, Any]:
    """How many completions a process trains on in a step, where they are sampled."""
    sizes = getattr(trainer, "round_sizes", None)
    if sizes is None:
        return {}
    return {"rows": max(1, sizes.step // trainer.args.world_size), "accumulation": 1}


def _model_of(trainer: Any, name: str) -> Any:
    """The model of one of the trainer's parts, or None."""
    part = getattr(trainer, name, None)
    model = getattr(part, "model", None)
    return unwrap(model) if isinstance(model, torch.nn.Module) else None


def _reward_models(trainer: Any) -> list[Any]:
    if getattr(trainer, "collector", None) is None:
        return []
    return [unwrap(each) for each in getattr(trainer.rewards, "models", ()) if hasattr(unwrap(each), "config")]


def _sharding(trainer: Any) -> str:
    if trainer.is_fsdp_enabled:
        return "fsdp2"
    if trainer.is_deepspeed_enabled:
        return f"zero{trainer.accelerator.state.deepspeed_plugin.zero_stage}"
    return "ddp"


def longest(trainer: Any) -> tuple[int | None, int | None, float]:
    """Tokens of the longest prompt and completion of the data, None where they are not known, and the share of the
    tokens that is trained. A row of a whole text is a completion after one token."""
    rows, report = trainer.train_dataset, trainer.reports.get("train")
    asked = getattr(trainer.args, "max_completion_length", None)
    whole = _longest_of(rows, "input_ids")
    if whole is not None:
        share = report.trained_tokens / max(report.tokens, 1) if report is not None else 1.0
        return 1, max(whole - 1, 1), min(share, 1.0)
    prompt = _longest_of(rows, "prompt_ids")
    found = [_longest_of(rows, name) for name in ("chosen_ids", "rejected_ids", "completion_ids")]
    known = [each for each in found if each is not None]
    return prompt, max(known) if known else asked, 1.0


def _longest_of(rows: Any, column: str) -> int | None:
    """The longest list of a column of a data set in memory or on disk, which is not read for it."""
    import pyarrow.compute as compute

    table = getattr(getattr(rows, "data", None), "table", None)
    if table is None or column not in table.column_names or not len(rows):
        return None
    return max(1, int(compute.max(compute.list_value_length(table.column(column))).as_py() or 1))


def tokens_that_fit(trainer: Any) -> int:
    """Tokens of a micro-batch that fill the device. On a CPU those from which on a step gets no faster."""
    from trl.plan.advice import MARGIN

    budget = BUDGET.get(trainer.args.device.type)
    if budget is not None:
        return budget
    try:
        found = plan_of(trainer)
        most = found.largest(MARGIN * room_of(trainer.args.device))
    except Exception as error:  # a step that runs out of memory is taken again with fewer
        notify_once(
            f"max_tokens_per_micro_batch=auto: the run's memory is not known beforehand ({type(error).__name__}). It "
            f"begins with {BUDGET['default']:,} tokens, and goes on with fewer once they do not fit"
        )
        return BUDGET["default"]
    return max(1, int(most if found.run.samples else most * found.run.tokens_of_row))


# --- before and after a run -----------------------------------------------------------------------------------------


def lines(trainer: Any) -> list[str]:
    """The line of a run's memory before step 1, with a warning where the device has too little."""
    try:
        small = trainer.args.device.type == "cpu" and sum(map(torch.numel, trainer.model.parameters())) < TRACED_FROM
        found = plan_of(trainer, rough=small)
        peak, room = found.peak, room_of(trainer.args.device)
    except Exception as error:  # the run does not depend on it
        trainer._expected = None
        return [f"memory: not known beforehand ({type(error).__name__})"]
    held = sum(part for name, part in found.held.items() if name not in ("optimizer", "reserve"))
    trainer._expected = Expected(peak.total, room, held, *_resident())
    about = "about " if found.rough else ""
    told = [f"memory: {about}{size(peak.total)} at most, in the phase `{peak.name}`, of {size(room)}"]
    if peak.total > room:
        advice = [each for each in found.advice() if not each.startswith("does not fit")]
        told.append(
            f"  warning: this run is expected to need {size(peak.total)} and the device has {size(room)}"
            + (f"; {advice[0]}" if advice else "")
        )
    return told


def measured(trainer: Any) -> list[str]:
    """The line of the memory that a run took, beside what was expected."""
    expected = getattr(trainer, "_expected", None)
    if expected is None:
        return []
    kept = ""
    if trainer.args.device.type == "cuda":
        taken = float(torch.cuda.max_memory_allocated(trainer.args.device))
    else:
        record = _resident()[1]
        if record <= expected.record:
            return []  # the process has held more before
        taken = record - expected.resident + expected.held
        kept = ", freed memory that the allocator kept included"
    peak, room = size(expected.peak), size(expected.room)
    return [f"memory: {size(taken)} at the peak{kept}; {peak} at most expected, of {room}"]


def size(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count < 10 * GIB else f"{count / GIB:.1f} GiB"


def room_of(device: torch.device) -> float:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return float(psutil.virtual_memory().total)


def _resident() -> tuple[float, float]:
    """Bytes of this process in memory, now and at the highest; 0 where the system does not say."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        found = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        now, most = (float(found[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError, ValueError):
        return 0.0, 0.0
    return now, most
