"""A step of PPO, in both its forms, beside what `record_ppo.py` took of the last releases that had it."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import trl
from tests.parity import tiny
from tests.parity.ppo_rows import ANSWERS, EVEN, KEPT, QUERIES, RATE, RESPONSES, SCORES, head_weights
from tests.trainer.helpers import DEFAULTS
from trl.rollout.types import Completion

HERE = Path(__file__).parent
STEPS = json.loads((HERE / "ppo_steps.json").read_text())["cases"]
TRAINER = json.loads((HERE / "ppo.json").read_text())["cases"]


def valued(model):
    found = trl.AutoModelForCausalLMWithValueHead.from_pretrained(model, summary_dropout_prob=0.0)
    with torch.no_grad():
        found.v_head.summary.weight.copy_(head_weights())
        found.v_head.summary.bias.fill_(0.1)
    return found


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_a_loop_of_ones_own(name, tmp_path):
    case = STEPS[name]
    settings = {"ppo_epochs": 2, "batch_size": 4, "mini_batch_size": 4, "max_grad_norm": None, **case["settings"]}
    config = trl.PPOConfig(**{**DEFAULTS, "output_dir": str(tmp_path), "learning_rate": RATE, **settings})
    with contextlib.redirect_stdout(None):
        model = valued(tiny.policy())
        trainer = trl.PPOTrainer(
            config=config, model=model, ref_model=valued(tiny.reference()), tokenizer=tiny.tokenizer()
        )
        queries, responses = (EVEN, ANSWERS) if "whiten_rewards" in case["settings"] else (QUERIES, RESPONSES)
        stats = trainer.step(
            [torch.tensor(ids) for ids in queries],
            [torch.tensor(ids) for ids in responses],
            [torch.tensor(score) for score in SCORES],
        )
    for key, value in case["numbers"].items():
        assert stats[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    assert trainer.kl_ctl.value == pytest.approx(case["next_kl_coef"], rel=1e-6)
    weights = dict(model.pretrained_model.named_parameters())
    for key, value in case["weights"].items():
        assert weights[key].flatten().tolist() == pytest.approx(value, rel=1e-4, abs=2e-5), key


class Fixed:
    """Writes the recorded answers."""

    def sync(self, model, version):
        pass

    def generate(self, requests, sampling):
        found = {tuple(query): answer for query, answer in zip(EVEN, ANSWERS, strict=True)}
        return [[Completion(found[tuple(each.prompt_ids)], [0.0] * 4, False)] for each in requests]


@pytest.mark.parametrize("name", TRAINER)
def test_a_round_of_the_trainer(name, tmp_path):
    case = TRAINER[name]
    scores = {tuple(answer): score for answer, score in zip(ANSWERS, SCORES, strict=True)}
    ended = {tuple(answer): tiny.EOS in answer for answer in ANSWERS}

    def reward(completion_ids, **_):
        return [scores[tuple(ids)] for ids in completion_ids]

    class Ends(Fixed):
        def generate(self, requests, sampling):
            return [[each._replace(finished=ended[tuple(each.ids)]) for each in group]
                    for group in super().generate(requests, sampling)]  # fmt: skip

    args = trl.PPOConfig(
        **{**DEFAULTS, "output_dir": str(tmp_path), "learning_rate": RATE, "max_grad_norm": None},
        per_device_train_batch_size=4,
        temperature=1.0,
        **{"num_ppo_epochs": 1, "max_steps": case["settings"].get("num_ppo_epochs", 1), **case["settings"]},
    )
    policy, critic, seen = tiny.policy(), tiny.scorer(), []
    with contextlib.redirect_stdout(None):
        trainer = trl.PPOTrainer(
            args=args, processing_class=tiny.tokenizer(), model=policy, ref_model=tiny.reference(),
            reward_funcs=reward, value_model=critic, sampler=Ends(),
            train_dataset=[{"input_ids": ids} for ids in EVEN],
        )  # fmt: skip

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, *_, model, **__):
                named = dict(model.named_parameters())
                seen.append({key: named[key].grad.clone() for key in (*KEPT, "critic.score.weight")})

        trainer.add_callback(Keep())
        trainer.train()
    lines = [line for line in trainer.state.log_history if "loss/policy_avg" in line]
    for key, value in case["numbers"].items():
        ours = np.mean([line[key] for line in lines if key in line])
        assert ours == pytest.approx(value, rel=1e-5, abs=1e-5), key
    for key, value in case["gradients"].items():
        assert seen[0][key].flatten().tolist() == pytest.approx(value, rel=1e-5, abs=1e-5), key
