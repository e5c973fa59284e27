"""`trl plan <method> <the options of the method>`: memory, time and cost, before a GPU is rented."""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl.cli import (
    CommandParser,
    UsageError,
    check_file,
    hide_library_notes,
    measured,
    nearest,
    notices_aside,
    numbers,
    train,
    with_underscores,
)
from trl.cli.parser import set_environment
from trl.cli.planned import planned
from trl.methods import METHODS
from trl.models.names import check_model
from trl.options import COUNT, POSITIVE, WEIGHT, Limit

DESCRIPTION = """Says what a training run will need, from the model's configuration alone: memory by part in each phase
of a step, which cards it fits, time and cost. Loads no weights and touches no device. All options of the method are
taken, as `trl <method>` takes them; of those, a data set is not needed."""
EXAMPLES = """examples:
  trl plan sft --model_name_or_path path/or/name --use_peft --load_in_4bit --bf16 --max_length 2048 --gpu rtx-4090
  trl plan dpo --model_name_or_path path/or/name --num_processes 8 --accelerate_config fsdp2 --gpu h100
  trl plan grpo --model_name_or_path path/or/name --use_peft --gpu rtx-4090 --num_rows 10000 --price_per_hour 0.4
  trl plan sft --model_name_or_path path/or/name --gpu h100 --html plan.html"""


def run(argv: Sequence[str], command: str) -> int:
    methods = [name for name, row in METHODS.items() if row.command]
    parser = _parser(command, methods)
    options, rest = parser.parse_known_args([with_underscores(word) for word in argv])
    if options.method not in methods:
        raise UsageError(f"there is no method {options.method}{nearest(options.method, methods)}")
    set_environment(rest)
    hide_library_notes()
    if sys.argv[1:2] == [command]:  # this process plans and ends
        gc.disable()
        # No weights, so no quantised ones; importing it takes seconds.
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
    of_method = train.training_parser(options.method, f"trl {command}")
    values, elsewhere, _ = of_method.read_apart(rest)
    if not values.get("model_name_or_path"):
        raise UsageError("--model_name_or_path is missing: a folder with a config.json, or a model's name.")
    if options.html:
        check_file(options.html, replace=True)
    check_model(values["model_name_or_path"], values.get("model_revision"))
    with notices_aside(options.json):
        plan = _plan(options, values, elsewhere)
        if options.measure:
            plan.rate = measured.tokens_per_second(options.method, rest, values)
        plan.notes += _missing(options, plan)
        found = plan.to_dict()
    if options.html:
        from trl.plan.page import page

        Path(options.html).write_text(page(found), encoding="utf-8")
    print(json.dumps(found, indent=1) if options.json else "\n".join(lines(found)))
    return 0 if found["fits"] is not False else 1


def _parser(command: str, methods: Sequence[str]) -> argparse.ArgumentParser:
    parser = CommandParser(f"trl {command}", DESCRIPTION, EXAMPLES)
    parser.add_argument("method", metavar="METHOD", help=f"one of {', '.join(methods)}")
    parser.add_argument("--gpu", metavar="NAME", help="card that it runs on; a wrong name lists the known ones")
    parser.add_argument(
        "--gpu_memory", type=numbers(POSITIVE), metavar="GIB", help="memory of the card, where it has no name"
    )
    parser.add_argument(
        "--prompt_tokens", type=numbers(COUNT), help="tokens of a prompt [the most that the options allow]"
    )
    parser.add_argument(
        "--completion_tokens", type=numbers(COUNT), help="tokens of a completion [the most that they allow]"
    )
    parser.add_argument("--num_rows", type=numbers(COUNT), help="rows of the data set, for the number of steps")
    share = numbers(Limit(0, 1, above=True))
    parser.add_argument("--utilisation", type=share, default=0.35, help="share of the card's speed in training [0.35]")
    parser.add_argument("--price_per_hour", type=numbers(WEIGHT), help="price of one card for an hour, in any currency")
    parser.add_argument(
        "--measure", action="store_true", help="train three steps here, for the speed; needs --dataset_name"
    )
    parser.add_argument("--html", metavar="FILE", help="write a page with a picture of memory over a step's phases")
    parser.add_argument("--json", action="store_true", help="print JSON; the exit status is 1 if it does not fit")
    return parser


def _plan(options: argparse.Namespace, values: Mapping[str, Any], elsewhere: Mapping[str, Any]) -> Any:
    from trl.plan import CARDS, Card

    if options.gpu is not None and options.gpu not in CARDS:
        raise UsageError(f"there is no card {options.gpu}{nearest(options.gpu, CARDS)} Known are {', '.join(CARDS)}.")
    card = CARDS[options.gpu] if options.gpu else None
    if options.gpu_memory:
        card = Card(options.gpu_memory, *(card[1:] if card else (0.0, 0.0)))
    classes = train.classes(options.method)
    parser = train.training_parser(options.method)
    values = {"use_cpu": True, **values}
    if values.get("bf16") is None and not values.get("fp16"):
        values["bf16"] = card is None or card.bf16  # as a run on the card has it
    script, *_, model, args = parser.instances(values, classes)
    lengths = {"prompt": options.prompt_tokens, "completion": options.completion_tokens}
    found = planned(options.method, script, model, args, elsewhere, **lengths)
    found.card, found.utilisation, found.price_per_hour = card, options.utilisation, options.price_per_hour
    found.steps = found.run.steps or _steps(options, args, found.run)
    return found


def _steps(options: argparse.Namespace, args: Any, planned: Any) -> int | None:
    if not options.num_rows:
        return None
    rows = planned.rows * planned.accumulation * planned.processes
    if planned.samples:
        rows = max(1, rows // planned.generations)  # prompts
    return max(1, math.ceil(args.num_train_epochs * -(-options.num_rows // rows)))


def _missing(options: argparse.Namespace, plan: Any) -> list[str]:
    """What was asked for and cannot be said, and which option is missing."""
    if plan.rate is None and (plan.card is None or not plan.card.tflops):
        if options.price_per_hour is not None or options.num_rows:
            return ["no time and no cost, because no card is named: --gpu NAME (or --measure, on this machine)"]
        return []
    if options.price_per_hour is not None and not plan.steps:
        return ["no cost, because the number of steps is not known: --num_rows or --max_steps"]
    return []


def _speed(found: Mapping[str, Any]) -> str:
    if found["tokens_per_second"] is None:
        return f" at {found['utilisation']:.0%} of the card's speed"
    share = f", {found['utilisation']:.0%} of the card's speed" if found["utilisation"] else ""
    return f" at the {found['tokens_per_second']:,.0f} tokens a second of three steps here{share}"


def lines(found: Mapping[str, Any]) -> list[str]:
    """A plan in words and columns."""
    said = [found["what"], ""]
    phases = found["phases"]
    names = list(dict.fromkeys(part for phase in phases for part in phase["parts"]))
    width = max(map(len, [*names, "total"]))
    said.append(f"{'GiB':<{width}}" + "".join(f"{phase['name']:>18}" for phase in phases))
    for name in names:
        cells = (phase["parts"].get(name) for phase in phases)
        said.append(f"{name:<{width}}" + "".join(f"{'':>18}" if each is None else f"{each:>18.2f}" for each in cells))
    said.append(f"{'total':<{width}}" + "".join(f"{phase['total']:>18.2f}" for phase in phases))
    said += ["", f"peak: {found['peak']:.1f} GiB, in the phase `{found['peak_phase']}`"]
    if found["card"] is not None:
        said += [f"of {found['card']:.1f} GiB: {sentence}" for sentence in found["advice"][:1]]
        said += [f"  {sentence}" for sentence in found["advice"][1:]]
    said.append(f"cards with room for it as it is: {', '.join(found['cards']) or 'none of the table'}")
    if found["seconds_of_step"] is not None:
        training, sampling = found["seconds_of_step"]
        said.append(
            f"a step: {found['tokens_of_step']:,} tokens on a process, about {training:.1f} s"
            + (f" of training and {sampling:.1f} s of sampling" if sampling else "")
            + _speed(found)
        )
    if found["hours"] is not None:
        cost = f", about {found['cost']:.2f} for {found['processes']} card(s)" if found["cost"] is not None else ""
        said.append(f"{found['steps']:,} steps: about {found['hours']:.1f} hours{cost}")
    return [*said, *(f"note: {note}" for note in found["notes"])]
