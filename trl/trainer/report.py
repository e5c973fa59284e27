"""The lines that a trainer prints before step 1, beside those of the data."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import get_console
from torch import nn

from trl import screen
from trl.engine.score import Attachment
from trl.models import adapters, liger
from trl.rollout.filters import describe
from trl.rollout.rounds import RoundSizes
from trl.rollout.types import Sampling

from . import overrides, planned

# By what a line begins with, the group that it is shown in; other lines are of the plan.
GROUPS = {
    "model": ("model", "updates", "reference", "teacher", "value"),
    "engine": ("engine", "torch_compile", "use_liger_kernel", "data_collator"),
}
_printed: set[str] = set()  # lines of the reports of this process


def model_lines(model: nn.Module, rate: float, full_rate: float, precision: str) -> list[str]:
    """What trains, in which precision, and a caution where an adapter trains at a rate made for all weights.

    `full_rate` is the method's default learning rate, which is made for all weights. `precision` says where updates of
    bfloat16 weights are kept.
    """
    count, total = adapters.trainable(model)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad})
    lines = [f"model: {count:,} of {total:,} parameters train ({count / total:.2%}), in {', '.join(dtypes)}"]
    if "bfloat16" in dtypes:
        lines.append(f"updates: in float32; {precision}")
    # An adapter's best rate is about ten times that of full fine-tuning (Schulman et al. 2025, "LoRA Without Regret").
    low, high = min(5 * full_rate, 1e-4), min(25 * full_rate, 5e-4)
    if adapters.has_adapter(model) and rate < low * (1 - 1e-6):
        lines.append(
            f"  caution: learning_rate={rate:g} is low for an adapter, which learns well at {low:g} to {high:g}"
        )
    return lines


def engine_lines(attachment: Attachment, reader: str | None, collator: Any, compiled: int | None) -> list[str]:
    """How batches are laid out and computed.

    `reader` is the user's function that may read batches, `collator` the user's data collator, `compiled` the number of
    compiled parts.
    """
    lines = ["engine: flat rows, no padding, each prompt computed once"]
    if not attachment.is_flat:
        lines = [f"engine: padded rows, because {attachment.reason}"]
    if reader is not None:
        lines.append(f"engine: padded rows with labels, because {reader} of your own may read them")
    if collator is not None:
        name = getattr(collator, "__name__", type(collator).__name__)
        lines.append(f"data_collator: {name} says which tokens are trained")
    if compiled == 0:
        lines.append("torch_compile: no part of a layer is left that depends on the number of tokens alone")
    elif compiled is not None:
        lines.append(
            f"torch_compile: {compiled} parts of layers (norms, feed-forward) are compiled, for all lengths; attention "
            "by segment and the head run as they are"
        )
    if attachment.is_flat and attachment.kernel_reason:
        lines.append(f"engine: segments one by one, not by the variable-length kernel: {attachment.kernel_reason}")
    if attachment.head_reason:
        lines.append(f"engine: full logits, because {attachment.head_reason}")
    return lines


def steps_line(rows: int, args: Any) -> str:
    """How many optimizer steps there will be, and on how many rows each."""
    batch, accumulated, ranks = args.train_batch_size, args.gradient_accumulation_steps, args.world_size
    steps = args.max_steps
    if steps < 0:
        steps = math.ceil(math.ceil(rows / (batch * ranks)) / accumulated) * args.num_train_epochs
    return (
        f"steps: {math.ceil(steps):,}, each on {batch * accumulated * ranks} rows ({batch} a batch × {accumulated} "
        f"accumulated × {ranks} process{'es' if ranks > 1 else ''})"
    )


def round_lines(args: Any, sizes: RoundSizes, rewards: Sequence[str], sampling: Sampling) -> list[str]:
    """How rounds of completions are drawn, judged and trained on."""
    lines = [
        f"rounds: {sizes.prompts} prompts × {args.num_generations} completions each, drawn at once; trained on "
        f"in {sizes.parts} step{'s' if sizes.parts > 1 else ''} of {sizes.step} completions"
        + (f", {args.num_iterations} times" if args.num_iterations > 1 else "")
    ]
    if args.dynamic_sampling:
        lines.append(f"prompts whose completions are all worth the same: others instead, {args.max_refills} times")
    if args.replay_buffer_size:
        lines.append(f"then groups of earlier rounds instead, of the last {args.replay_buffer_size} that taught")
    if rewards:
        lines.append(f"rewards: {', '.join(rewards)}")
    by = "; by transformers' continuous batching" if args.use_transformers_continuous_batching else ""
    return [*lines, f"sampling: {describe(sampling)}{by}"]


def lines_of(trainer: Any) -> list[str]:
    """What will be trained on what."""
    args, dataset = trainer.args, trainer.train_dataset
    lines = [line for each in trainer.reports.values() for line in each.lines()]
    lines += model_lines(trainer.model, args.learning_rate, trainer.full_rate(), _update_precision(trainer))
    reader, users = overrides.reads_batches(trainer), trainer.data_collator.users
    lines += engine_lines(trainer.attachment, reader, users, trainer._compiled_parts)
    if parts := liger.patched(trainer.model):
        lines.append(f"use_liger_kernel: {', '.join(parts)} by liger-kernel; head and loss are the library's own")
    if hasattr(dataset, "__len__") and not overrides.is_overridden(trainer, "get_train_dataloader"):
        lines.append(steps_line(len(dataset), args))
    lines += [line for each in trainer.components for line in each.report(trainer)]
    return [*lines, *planned.lines(trainer)]


def _update_precision(trainer: Any) -> str:
    """Where the bits of an update are that a bfloat16 weight has no room for."""
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed keeps float32 copies of the bfloat16 weights"
    if trainer.is_fsdp_enabled and trainer.accelerator.mixed_precision != "no":
        return "FSDP holds the weights in float32"
    return "the lower halves of bfloat16 weights are kept beside them (2 bytes a weight), moments are float32"


def show(trainer: Any) -> None:
    """Print the report, and write what is known of the data into the output folder."""
    if not trainer.is_world_process_zero():
        return
    print_report(trainer.report(), {name: each.lines() for name, each in trainer.reports.items()})
    if trainer.reports and trainer.args.should_save:
        found = {name: each.to_dict() for name, each in trainer.reports.items()}
        Path(trainer.args.output_dir, "data_report.json").write_text(json.dumps(found, indent=1, ensure_ascii=False))


def print_report(lines: Sequence[str], of_data: Mapping[str, Sequence[str]]) -> None:
    """Print a trainer's report by groups, cautions last. What this process has printed before is left out, but for
    cautions. `of_data` has the lines of each data set, by its name."""
    groups: dict[str, list[str]] = {name: [] for name in ("data", "model", "engine", "plan", "caution")}
    known = 0
    for line in lines:
        data = next((name for name, own in of_data.items() if line in own), None)
        if screen.is_caution(line):
            kind, _, text = line.strip().partition(": ")
            groups["caution"].append(f"{kind}: {text}" if data in (None, "train") else f"{kind}: {data}: {text}")
        elif line in _printed:
            known += 1
        else:
            begins = (name for name, words in GROUPS.items() if line.startswith(words))
            groups[next(begins, "plan") if data is None else "data"].append(line)
    _printed.update(lines)
    found = {name: each for name, each in groups.items() if each}
    if known:
        found = {"report": ["report: as before" + (", but for this" if found else "")], **found}
    screen.paragraphs(get_console(), found)
