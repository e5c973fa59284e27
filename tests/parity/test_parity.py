"""Loss, gradients and metrics of the first optimizer step beside those that `record.py` took from upstream.

The methods that TRL 1.16 no longer has are beside those of 0.28, by `record_older.py`."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.parity import tiny
from tests.trainer.helpers import first_gradient, preference

TRAINERS = {"dpo": "DPO", "kto": "KTO", "orpo": "ORPO", "cpo": "CPO", "reward": "Reward", "bco": "BCO", "prm": "PRM"}
RECORDED = {name: json.loads((Path(__file__).parent / f"{name}.json").read_text()) for name in sorted(TRAINERS)}
CASES = [(method, name) for method, recorded in RECORDED.items() for name in recorded["cases"]]
MODELS = {"reward": tiny.scorer, "prm": tiny.step_scorer}

# Logged by both, and another number here: the methods, the metrics, and in which cases.
ALWAYS: dict[str, Any] = {}
DIFFERENT = [
    # A prompt is counted once for its two completions, because it is computed once.
    (("dpo", "reward"), ("num_tokens",), ALWAYS),
    # Upstream averages over the prompt's positions and padding too, which say nothing of the completion.
    (("orpo", "cpo"), ("logits/chosen", "logits/rejected"), ALWAYS),
    # Upstream adds the logits of all positions and of the whole vocabulary, and divides by the rows.
    (("bco",), ("logits/chosen", "logits/rejected"), ALWAYS),
    # Upstream logs 0 for a term that has no weight; here it is still measured.
    (("cpo",), ("nll_loss",), {"cpo_alpha": 0.0}),
    (("cpo",), ("nll_loss",), {"loss_type": "alphapo"}),
    # Upstream logs 0 for an estimate that the loss does not take; here nothing is logged.
    (("kto",), ("kl",), {"loss_type": "apo_zero_unpaired"}),
]
# Losses that compare pairs, or are averaged over tokens: what a split might change.
SPLIT = ["aot", "aot smoothed", "aot_unpaired", "aot_unpaired smoothed", "aot mpo", "sft", "mpo", "ld with sft"]


def step(path: Path, method: str, name: str, *, size: int, accumulated: int = 1) -> tuple[float, dict, dict]:
    """Loss, metrics and gradients of our trainer's first step on the recorded rows."""
    case = RECORDED[method]["cases"][name]
    rows = [{**row, "row": index} for index, row in enumerate(RECORDED[method]["rows"])]
    if method == "reward" and name != "margin":
        rows = [{key: value for key, value in row.items() if key != "margin"} for row in rows]
    model = MODELS.get(method, tiny.policy)()
    reference = tiny.reference() if method in ("dpo", "kto", "bco") else None
    if case.get("exchanged"):
        model, reference = reference, model
    trainer = preference(
        TRAINERS[method],
        path,
        model,
        tiny.tokenizer(),
        Dataset.from_list(rows),
        ref_model=reference,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulated,
        max_steps=1,
        **case["settings"],
    )
    losses = []
    of_a_batch = trainer.compute_loss

    def keeping(*args: Any, **kwargs: Any) -> torch.Tensor:
        losses.append(of_a_batch(*args, **kwargs))
        return losses[-1]

    trainer.compute_loss = keeping
    with contextlib.redirect_stdout(None):
        gradients = first_gradient(trainer)
    # What is logged is rounded.
    return sum(loss.item() for loss in losses), trainer.state.log_history[0], gradients


def check(expected: dict[str, Any], loss: float, gradients: dict[str, torch.Tensor]) -> None:
    assert loss == pytest.approx(expected["loss"], rel=1e-5, abs=1e-5)
    for name, values in expected["gradients"].items():
        recorded = torch.tensor(values).view_as(gradients[name])
        far = (gradients[name] - recorded).abs().max() / recorded.abs().max()
        assert far < 1e-5, name


@pytest.mark.parametrize(("method", "name"), CASES, ids=[f"{method} {name}" for method, name in CASES])
def test_the_first_step_is_upstreams(method, name, tmp_path):
    expected = RECORDED[method]["cases"][name]
    loss, logged, gradients = step(tmp_path, method, name, size=len(RECORDED[method]["rows"]))
    check(expected, loss, gradients)
    different = {
        metric
        for methods, metrics, settings in DIFFERENT
        for metric in metrics
        if method in methods and settings.items() <= expected["settings"].items()
    }
    for metric, value in expected["metrics"].items():
        if metric not in different:
            assert logged[metric] == pytest.approx(value, rel=1e-4, abs=1e-4), metric


@pytest.mark.parametrize("name", SPLIT)
def test_so_is_that_of_single_pairs_accumulated(name, tmp_path):
    loss, _, gradients = step(tmp_path, "dpo", name, size=1, accumulated=len(RECORDED["dpo"]["rows"]))
    check(RECORDED["dpo"]["cases"][name], loss, gradients)


def test_the_exceptions_are_needed():
    """Each metric that is left out is one that upstream logs; a name that is gone would hide a difference."""
    for methods, metrics, settings in DIFFERENT:
        for method in methods:
            cases = [
                case for case in RECORDED[method]["cases"].values() if settings.items() <= case["settings"].items()
            ]
            assert cases and all(metric in case["metrics"] for metric in metrics for case in cases)


def test_what_the_cases_are_about():
    """The rows and models tell the cases apart: the order of the pairs matters, and the estimate is not clamped."""
    dpo, kto = RECORDED["dpo"]["cases"], RECORDED["kto"]["cases"]
    assert len({dpo[name]["loss"] for name in ("sigmoid", "aot", "aot_unpaired")}) == 3
    assert kto["kto"]["metrics"]["kl"] > 0.1
    assert kto["kto clamped"]["metrics"]["kl"] == 0
    assert kto["kto"]["loss"] != kto["apo_zero_unpaired"]["loss"]
