"""The first step of GRPO and RLOO on fixed completions, and advantages, beside those that `record_online.py` took."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trl
from tests.parity import tiny
from tests.parity.test_parity import check
from tests.trainer.helpers import DEFAULTS
from trl.rollout.traces import COLUMNS, ScoredTrace, TrainingTrace

RECORDED = {name: json.loads((Path(__file__).parent / f"{name}.json").read_text()) for name in ("grpo", "rloo")}
CASES = [(method, name) for method, recorded in RECORDED.items() for name in recorded["cases"]]
TABLES = [(method, name) for method, recorded in RECORDED.items() for name in recorded["advantages"]]
EACH_CASE = pytest.mark.parametrize(("method", "name"), CASES, ids=[f"{method} {name}" for method, name in CASES])
LONGEST = 8  # as it was recorded
IDLE = 2  # the sample whose advantage is 0


def make(path: Path, method: str, settings: dict[str, Any], *, on_policy: bool = False) -> Any:
    kind = method.upper()
    trainer = getattr(trl, f"{kind}Trainer")(
        model=tiny.policy(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=getattr(trl, f"{kind}Config")(
            **{
                **DEFAULTS,
                "output_dir": str(path),
                "per_device_train_batch_size": 6,
                "num_generations": 3,
                "max_completion_length": LONGEST,
                "num_iterations": 1 if on_policy else 2,
                **settings,
            }
        ),
        train_dataset=[{"prompt": "w5 w6"}, {"prompt": "w7"}],
        processing_class=tiny.tokenizer(),
    )
    trainer.model.train()
    return trainer


def samples(method: str, case: dict[str, Any]) -> list[TrainingTrace]:
    rows = RECORDED[method]["rows"]
    drawn = "sampler_logps" if case["corrected"] else "old_logps"
    found = []
    for index, row in enumerate(rows):
        further = {"old_logps": row["old_logps"]} if case["corrected"] and case["old"] == "rows" else {}
        ids = row["completion_ids"]
        given = {"ids": ids, "logps": row[drawn], "ref_logps": row["ref_logps"], **further}
        columns = {name: np.asarray(values, dtype=COLUMNS[name]) for name, values in given.items()}
        found.append(TrainingTrace(index // 3, row["prompt_ids"], len(ids), row["advantage"], len(ids), columns))
    return found


def step(path: Path, method: str, name: str, **further: Any) -> tuple[float, dict, dict]:
    """Loss, metrics and gradients of the recorded rows."""
    case = RECORDED[method]["cases"][name]
    settings = {**case["settings"], "rollout_correction": True} if case["corrected"] else case["settings"]
    with contextlib.redirect_stdout(None):
        trainer = make(path, method, {**settings, **further}, on_policy=case["old"] == "own")
    loss = trainer.train_on(trainer.model, samples(method, case)).item()
    gradients = {name: each.grad for name, each in trainer.model.named_parameters() if each.grad is not None}
    return loss, trainer._reduced("train"), gradients


@pytest.fixture
def nothing_dropped(monkeypatch):
    for kind in (trl.GRPOTrainer, trl.RLOOTrainer):
        monkeypatch.setattr(kind, "has_no_gradient", lambda self, trace: False)


@EACH_CASE
def test_the_first_step_is_upstreams(method, name, tmp_path, nothing_dropped):
    expected = RECORDED[method]["cases"][name]
    loss, logged, gradients = step(tmp_path, method, name)
    check(expected, loss, gradients)
    for metric, value in expected["metrics"].items():
        assert logged[metric] == pytest.approx(value, rel=1e-4, abs=1e-4), metric


@EACH_CASE
def test_so_is_that_of_single_samples_and_without_idle_ones(method, name, tmp_path):
    expected = RECORDED[method]["cases"][name]
    loss, _, gradients = step(tmp_path, method, name, max_tokens_per_micro_batch=1)
    check(expected, loss, gradients)


@pytest.mark.parametrize("settings", [{}, {"top_entropy_quantile": 0.5}, {"beta": 0.1}, {"entropy_coef": 0.1}])
def test_who_is_idle(tmp_path, settings):
    with contextlib.redirect_stdout(None):
        trainer = make(tmp_path, "grpo", settings)
    case = RECORDED["grpo"]["cases"]["dapo token"]
    idle = [trainer.has_no_gradient(each) for each in samples("grpo", case)]
    assert idle == [index == IDLE and not settings for index in range(6)]


@pytest.mark.parametrize(("method", "name"), TABLES, ids=[f"{method} {name}" for method, name in TABLES])
def test_advantages_are_upstreams(method, name, tmp_path):
    recorded = RECORDED[method]
    settings = recorded["advantages"][name]["settings"]
    rewards_SF = torch.tensor([[math.nan if value is None else value for value in row] for row in recorded["rewards"]])
    with contextlib.redirect_stdout(None):
        trainer = make(tmp_path, method, settings)
    trainer.rewards.names, trainer.rewards.weights = ["a"] * rewards_SF.shape[1], torch.tensor(recorded["weights"])
    kl = recorded["kl"] if settings.get("beta") else [0.0] * len(rewards_SF)
    traces = [ScoredTrace(index // 3, None, 1, 1, True, rewards, kl[index], 0, None)
              for index, rewards in enumerate(rewards_SF.tolist())]  # fmt: skip
    ours = trainer.credit(traces, 3)
    torch.testing.assert_close(ours, torch.tensor(recorded["advantages"][name]["advantages"]), atol=1e-5, rtol=1e-5)


def test_what_the_cases_are_about():
    """Clipping acts on both sides, and each setting moves the loss."""
    cases = RECORDED["grpo"]["cases"]
    for level in ("token", "sequence"):
        assert cases[f"grpo {level}"]["metrics"]["clip_ratio/low_mean"] > 0.1
        assert cases[f"grpo {level}"]["metrics"]["clip_ratio/high_mean"] > 0.1
    losses = [round(case["loss"], 7) for case in cases.values()]
    alike = {name for name, case in cases.items() if losses.count(round(case["loss"], 7)) > 1}
    # Mean over tokens of one step, and surrogates that do not read the sequence's mean.
    assert alike == {"bnpo token", "dapo token", "bnpo sequence", "dapo sequence", "vespo token", "vespo sequence"}


def test_vespo_takes_weights_of_tokens_alone(tmp_path):
    with pytest.raises(ValueError, match="token_truncate or token_mask"):
        trl.GRPOConfig(output_dir=str(tmp_path), loss_type="vespo", rollout_correction=True)


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("iterations", [1, 2])
def test_who_computes_log_probs_of_its_own(tmp_path, correct, iterations):
    """Who corrects for the sampler, and steps more than once on what it drew."""
    with contextlib.redirect_stdout(None):
        trainer = make(tmp_path, "grpo", {"rollout_correction": correct}, on_policy=iterations == 1)
    assert trainer.needs_old() is (correct and iterations == 2)
    rows = [{"row": 0, "prompt": "w5 w6", "prompt_ids": [5, 6]}, {"row": 1, "prompt": "w7", "prompt_ids": [7]}]
    for sample in trainer.collect(rows, 3, training=True):
        if not trainer.needs_old():
            assert "old_logps" not in sample.columns
        else:  # the sampler is the trainer's own: they say the same
            assert sample.columns["old_logps"] == pytest.approx(sample.columns["logps"], abs=1e-4)
