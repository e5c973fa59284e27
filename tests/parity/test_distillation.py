"""The first step of GKD, Distillation and MiniLLM on fixed rows, beside those that `record_distillation.py` took."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trl
from tests.parity import tiny
from tests.parity.test_parity import check
from tests.trainer.helpers import DEFAULTS, first_gradient
from trl.rollout.traces import TrainingTrace

RECORDED = json.loads((Path(__file__).parent / "distillation.json").read_text())
KINDS = {"gkd": "GKD", "distillation": "Distillation", "top_k": "Distillation", "minillm": "MiniLLM"}
CASES = [(method, name) for method in KINDS for name in RECORDED[method]]


def make(path: Path, method: str, settings: dict[str, Any], rows: Any) -> Any:
    kind, on_policy = KINDS[method], method != "gkd"
    more = {"max_completion_length": 4} if method == "minillm" else {}
    with contextlib.redirect_stdout(None):
        return getattr(trl, f"{kind}Trainer")(
            model=tiny.policy(),
            teacher_model=tiny.reference(),
            args=getattr(trl, f"{kind}Config")(
                **{**DEFAULTS, "output_dir": str(path), "per_device_train_batch_size": 4, **more, **settings}
            ),
            train_dataset=[{"prompt": "w5"}] * 4 if on_policy else rows,
            processing_class=tiny.tokenizer(),
        )


def traces() -> list[TrainingTrace]:
    """The rows of a case that trains on completions."""
    return [trace(index, prompt, ids, 1.0) for index, (prompt, ids) in enumerate(RECORDED["rows"])]


def trace(row: int, prompt: list[int], ids: list[int], advantage: float) -> TrainingTrace:
    columns = {"ids": np.array(ids, dtype=np.int32), "logps": np.zeros(len(ids), dtype=np.float32)}
    return TrainingTrace(row, prompt, len(ids), advantage, len(ids), columns)


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize(("method", "name"), CASES, ids=[f"{method} {name}" for method, name in CASES])
def test_the_first_step_is_upstreams(method, name, budget, tmp_path):
    expected = RECORDED[method][name]
    settings = {"num_generations": 2, **expected["settings"]} if method == "minillm" else expected["settings"]
    if method == "gkd":
        rows = [{"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids} for prompt, ids in RECORDED["rows"]]
        split = {"per_device_train_batch_size": budget or 3, "gradient_accumulation_steps": 3 if budget else 1}
        trainer = make(tmp_path, method, {**settings, **split, "max_steps": 1}, rows)
        losses, of_a_batch = [], trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: losses.append(of_a_batch(*args, **kwargs)) or losses[-1]
        with contextlib.redirect_stdout(None):
            gradients = first_gradient(trainer)
        return check(expected, sum(loss.item() for loss in losses), gradients)
    trainer = make(tmp_path, method, {**settings, "max_tokens_per_micro_batch": budget}, None)
    trainer.model.train()
    steps = traces()
    if method == "minillm":
        prompts, completions, advantages = RECORDED["minillm_rows"]
        pairs = zip([prompts[0]] * 2 + [prompts[1]] * 2, completions, advantages, strict=True)
        steps = [trace(index, *each) for index, each in enumerate(pairs)]
    loss = trainer.train_on(trainer.model, steps).item()
    check(expected, loss, {name: each.grad for name, each in trainer.model.named_parameters()})
    for metric, value in expected["metrics"].items():
        assert trainer._reduced("train")[metric] == pytest.approx(value, rel=1e-4)


def test_each_setting_moves_the_loss():
    for method in KINDS:
        losses = [round(case["loss"], 7) for case in RECORDED[method].values()]
        assert len(set(losses)) >= len(losses) - (method == "minillm"), method  # grpo: completions of equal lengths
    assert torch.tensor([case["loss"] for case in RECORDED["gkd"].values()]).min() > 0
