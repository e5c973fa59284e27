"""Runs every case on fake CUDA tensors and prints what was seen. A script for `../shared/tools/drygpu/run`.

run tests/cuda_dry/run.py [NAME ...] [--json FILE]     NAME: a trainer, or `sampler`; all without one
"""

import argparse
import contextlib
import functools
import json
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import dry
import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.cuda_dry.cases import KINDS, LONGEST, OPTIONS, adapter_of, every_case, ids, model_of, traces, trainer_of
from tests.cuda_dry.watch import Watch
from trl.engine import blocks, head
from trl.engine.probe import attach
from trl.models import offload
from trl.models.unwrap import unwrap
from trl.rollout.draws import Draws
from trl.rollout.generate import InProcessSampler, _Run
from trl.rollout.types import Request, Sampling
from trl.trainer.ppo_guards import Guards

DEVICE = torch.device("cuda", 0)
PROMPTS = [(400, 18), (310, 3), (300, 11), (380, None)]  # tokens of each, and the limit of its completions


def on_device(trainer: Any, mode: FakeTensorMode) -> Any:
    """The trainer with its models on the device; returns the policy."""
    twins: dict[int, nn.Module] = {id(trainer.model): dry.fake_model(trainer.model, mode)}

    def twin(model: nn.Module) -> nn.Module:
        if id(model) not in twins:
            twins[id(model)] = dry.fake_model(model, mode)
        return twins[id(model)]

    parts = [trainer, *trainer.components]
    parts += [part.policy for part in parts if getattr(part, "policy", None) is not None]
    for part in parts:
        for name, value in list(vars(part).items()):
            if isinstance(value, nn.Module):
                setattr(part, name, twin(value))
    trainer.attachment = unwrap(trainer.model)._trl_attachment
    trainer.args.__dict__["_setup_devices"] = DEVICE
    PartialState().device = AcceleratorState().device = DEVICE
    return trainer.model


def step_of(name: str, folder: Path, option: str) -> dict[str, Any]:
    """A whole optimizer step of a trainer: loss and backward passes, clipping, optimizer."""
    trainer = trainer_of(name, option, folder)
    args = trainer.args
    if args.gradient_checkpointing:
        offload.enable_checkpointing(trainer.model, args.gradient_checkpointing_kwargs)
        if OPTIONS[option].adapter:
            trainer.model.enable_input_require_grads()
    batches = None
    if KINDS[name].rows is not None:
        batches = list(trainer.get_train_dataloader())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = on_device(trainer, mode)
    model.train()
    watch = Watch(LONGEST)
    for part, method in ((trainer, "_prepare_inputs"), (trainer, "loss"), (trainer.accelerator, "backward")):
        setattr(part, method, _counted(getattr(part, method), watch))
    with mode:
        optimizer = trainer.create_optimizer()
        weights = sum(each.numel() * each.element_size() for each in model.parameters())
        with watch:
            if batches is None:
                trainer.train_on(model, traces(trainer))
            else:
                fake = [{key: _fake(value, mode) for key, value in batch.items()} for batch in batches]
                samples, items = trainer.get_batch_samples(iter(fake), len(fake), DEVICE)
                for batch in samples:
                    trainer.training_step(model, batch, items)
            kept = len(watch.waits)
            trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.zero_grad()
    assert len(watch.waits) == kept
    return {**_seen(watch), "weights": weights, "flat": trainer.attachment.is_flat}


def rounds_of_sampling(option_name: str) -> dict[str, Any]:
    """Prompts prefilled, and tokens decoded until all rows are at their limits. Only where tokens are looked at does
    the host wait; a stand-in says that none stops."""
    option = OPTIONS[option_name]
    model = model_of(option)
    if option.adapter:
        model = get_peft_model(model, adapter_of(option))
    attach(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = dry.fake_model(model.eval(), mode)
    requests = [Request(ids(length, row), 2, (0, row), limit=limit) for row, (length, limit) in enumerate(PROMPTS)]
    # Five rows for eight samples: rows leave and enter.
    sampling = Sampling(20, stop_ids=(2,), top_p=0.9, temperature=0.8, further={"min_new_tokens": 4})
    watch = Watch(min(length for length, _ in PROMPTS))
    cast = torch.autocast("cuda", torch.bfloat16, enabled=bool(option.settings.get("bf16")))
    with mode, torch.no_grad(), cast, watch, watch.counting(), mock.patch.object(Draws, "read", _unread):
        run = _Run(InProcessSampler(max_rows=5), model, requests, sampling)
        run.drawn()
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    return {**_seen(watch), "weights": weights, "flat": run.is_flat}


def _unread(draws: Draws) -> tuple[list[list[int]], list[list[float]]]:
    """What stands in for the tokens on the device: none that stops."""
    return [[5] * len(draws.rows)] * draws.steps, [[-1.0] * len(draws.rows)] * draws.steps


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, torch.Tensor):
        return mode.from_tensor(value)
    return {key: _fake(each, mode) for key, each in value.items()} if isinstance(value, dict) else value


def _counted(function: Any, watch: Watch) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        with watch.counting():
            return function(*args, **kwargs)

    return counted


def _seen(watch: Watch) -> dict[str, Any]:
    return {
        "waits": watch.waits,
        "too_large": watch.too_large,
        "largest": list(watch.largest_shape),
        "peak": watch.peak,
        "kernels": watch.kernels,
    }


@contextlib.contextmanager
def small_parts() -> Any:
    """Chunks and blocks in proportion to the tiny models, and transformers made to believe in the tensors' values:
    it asks for none where it is traced."""
    with (
        mock.patch.dict(head.CHUNK_ELEMENTS, {"default": 2**19}),
        mock.patch.dict(blocks.BLOCK_ELEMENTS, {"default": 2**17}),
        mock.patch("transformers.masking_utils.is_tracing", lambda tensor=None: False),
    ):
        # PPO looks at its largest ratio once an optimizer step, as the trainer does at the norm of the gradient.
        with mock.patch.object(Guards, "end_step", lambda self, device, ranks: True):
            yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--option", help="this one alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found = []
    print("| trainer | option | waits of the host | largest tensor | weights, MiB | peak beyond them, MiB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, small_parts():
        for name, option in every_case():
            if (options.names and name not in options.names) or options.option not in (None, option):
                continue
            function = rounds_of_sampling if name == "sampler" else functools.partial(step_of, name, Path(folder))
            found.append({"case": name, "option": option, **_safely(function, option)})
            _print(found[-1])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return int(any(not each["passed"] for each in found))


def _safely(function: Any, option: str) -> dict[str, Any]:
    try:
        seen = function(option)
        return {**seen, "passed": not seen["waits"] and not seen["too_large"], "error": None}
    except Exception as error:
        return {"passed": False, "error": f"{type(error).__name__}: {str(error)[:200]}\n{_lines(error)}"}
    finally:
        AcceleratorState._reset_state(True)


def _lines(error: Exception) -> str:
    """Where it was raised, without torch's own machinery."""
    frames = traceback.extract_tb(error.__traceback__)
    parts = [each for each in frames if "/torch/" not in each.filename or "/optim/" in each.filename]
    return "\n".join(
        f"       {'/'.join(each.filename.split('/')[-3:])}:{each.lineno} {each.line}" for each in parts[-9:]
    )


def _print(row: dict[str, Any]) -> None:
    """A line of a table in Markdown, and beneath it what must not be."""
    cells = [row["case"], row["option"]]
    if row["error"]:
        print("|", " | ".join([*cells, "failed |"]), flush=True)
        print(row["error"], flush=True)
        return
    largest = " × ".join(map(str, row["largest"]))
    cells += [str(len(row["waits"])), largest, f"{row['weights'] / 2**20:.1f}", f"{row['peak'] / 2**20:.1f} |"]
    print("|", " | ".join(cells), flush=True)
    for line in [*dict.fromkeys(row["waits"]), *dict.fromkeys(row["too_large"])][:12]:
        print("      ", line)


if __name__ == "__main__":
    sys.exit(main())
