"""The first step of Online DPO, XPO and Nash-MD on fixed pairs, beside those that `record_online_pairs.py` took."""

import contextlib
import json
from pathlib import Path

import pytest
import torch

import trl
from tests.parity import tiny
from tests.parity.test_parity import check
from tests.trainer.helpers import DEFAULTS
from trl.rollout.types import Completion

RECORDED = json.loads((Path(__file__).parent / "online_pairs.json").read_text())
ROWS = RECORDED["rows"]
CASES = [(kind, name) for kind in ("OnlineDPO", "XPO", "NashMD") for name in RECORDED[kind]]


class Fixed:
    """A sampler that says what was recorded."""

    def sync(self, model, version):
        pass

    def generate(self, requests, sampling):
        known = {tuple(row["prompt_ids"]) + (place,): row for place, row in enumerate(ROWS)}
        found = []
        for request in requests:
            row = known[(*request.prompt_ids, request.seed[2])]
            numbers = range(request.first, request.first + request.samples)
            texts = [row["completions"][number] for number in numbers]
            found.append([Completion(ids, [0.0] * len(ids), ids[-1] == tiny.EOS) for ids in texts])
        return found


def make(path, kind, settings):
    def recorded(completion_ids, place, **_):
        return [
            ROWS[row]["rewards"][ROWS[row]["completions"].index(ids)]
            for row, ids in zip(place, completion_ids, strict=True)
        ]

    with contextlib.redirect_stdout(None):
        trainer = getattr(trl, f"{kind}Trainer")(
            model=tiny.policy(),
            ref_model=tiny.reference(),
            reward_funcs=recorded,
            args=getattr(trl, f"{kind}Config")(
                **{**DEFAULTS, "output_dir": str(path), "per_device_train_batch_size": len(ROWS), **settings}
            ),
            train_dataset=[{"prompt": "w5", "place": place} for place in range(len(ROWS))],
            processing_class=tiny.tokenizer(),
        )
    trainer.sampler = Fixed()
    trainer.model.train()
    return trainer


def collected(trainer):
    """The recorded pairs, judged."""
    rows = [
        {"row": place, "place": place, "prompt": "w5", "prompt_ids": row["prompt_ids"]}
        for place, row in enumerate(ROWS)
    ]
    return trainer.collect(rows, 2, training=True)


def step(trainer):
    """Loss, gradients and metrics of the recorded rows, through judging, credit and micro-batches."""
    loss = trainer.train_on(trainer.model, collected(trainer)).item()
    gradients = {name: each.grad for name, each in trainer.model.named_parameters() if each.grad is not None}
    logged = trainer._reduced("train")
    return loss, gradients, {**logged, **trainer.derived(logged)}


@pytest.mark.parametrize("budget", [None, 1], ids=["whole", "pair by pair"])
@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind} {name}" for kind, name in CASES])
def test_the_first_step_is_upstreams(kind, name, budget, tmp_path):
    expected = RECORDED[kind][name]
    trainer = make(tmp_path, kind, {**expected["settings"], "max_tokens_per_micro_batch": budget})
    loss, gradients, logged = step(trainer)
    check(expected, loss, gradients)
    assert len(expected["metrics"]) > 5
    for metric, value in expected["metrics"].items():
        assert logged[metric] == pytest.approx(value, rel=1e-4, abs=1e-5), metric
    assert len(trainer.under_way.batches) == (len(ROWS) if budget else 1)


def test_what_the_cases_are_about():
    """Each setting moves the loss, and the penalty turns a pair around."""
    for kind in ("OnlineDPO", "XPO", "NashMD"):
        losses = [round(case["loss"], 6) for case in RECORDED[kind].values()]
        alike = len(losses) - len(set(losses))
        assert alike == (1 if kind == "NashMD" else 0), kind  # fixed completions do not show who wrote them
    assert sum(ids[-1] != tiny.EOS for row in ROWS for ids in row["completions"]) == 2


def test_equal_rewards_are_no_preference(tmp_path):
    trainer = make(tmp_path, "OnlineDPO", {})
    assert [each.advantage for each in collected(trainer)] == [1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0]
    trainer.rewards.weights = torch.zeros(1)
    traces = collected(trainer)
    assert all(map(trainer.has_no_gradient, traces)) and trainer.counts_of(traces) == {"pairs": 0.0}
    assert trainer.train_on(trainer.model, traces).item() == 0.0
