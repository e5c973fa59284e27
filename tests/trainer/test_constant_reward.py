"""`stop_after_constant_rounds`: when a run ends, by value."""

import pytest
from transformers import AutoTokenizer

import trl
from tests.trainer.helpers import DEFAULTS, tiny
from trl import notices

PROMPTS = [{"prompt": f"say {word} and stop"} for word in ("red", "old", "stone", "cat")]


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


class ByRound:
    """A reward that is the same for a whole round, the n-th of `values`; None: the length of each completion."""

    __name__ = "by_round"

    def __init__(self, values):
        self.values = iter(values)

    def __call__(self, completion_ids, **_):
        value = next(self.values)
        return [float(index) if value is None else value for index in range(len(completion_ids))]


def run(path, tokenizer, values, method="GRPO", **settings):
    settings = {
        **{**DEFAULTS, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4},
        **{"max_steps": 6, "output_dir": str(path), **settings},
    }
    trainer = getattr(trl, f"{method}Trainer")(
        model=tiny(tokenizer),
        reward_funcs=ByRound(values),
        args=getattr(trl, f"{method}Config")(**settings),
        train_dataset=PROMPTS,
        processing_class=tokenizer,
    )
    resume = settings.get("resume")
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("values", "limit", "steps"),
    [
        ([0.0] * 6, None, 6),
        ([0.0] * 6, 3, 3),
        ([None, 0.0, 0.0, 0.0, 0.0, 0.0], 3, 4),
        ([0.0, 0.0, None, 0.0, 0.0, None], 3, 6),  # never three in a row
        ([0.0, 1.0, 1.0, 1.0, 0.0, 0.0], 3, 4),  # another number begins anew
    ],
)
def test_when_a_run_ends(tmp_path, tokenizer, capsys, values, limit, steps):
    notices._printed.clear()
    trainer = run(tmp_path, tokenizer, values, stop_after_constant_rounds=limit)
    assert trainer.state.global_step == steps
    said = "every completion of the last 3 rounds got the reward" in capsys.readouterr().out
    assert said is (limit is not None and steps < 6)


def test_a_round_of_several_steps_counts_once(tmp_path, tokenizer):
    trainer = run(tmp_path, tokenizer, [0.5] * 6, "RLOO", steps_per_generation=2, stop_after_constant_rounds=2)
    assert trainer.state.global_step == 3  # the first step of the second round


def test_the_count_goes_on_after_a_checkpoint(tmp_path, tokenizer):
    options = {"stop_after_constant_rounds": 4, "save_strategy": "steps", "save_steps": 2}
    run(tmp_path, tokenizer, [0.0] * 6, max_steps=2, **options)
    trainer = trl.GRPOTrainer(
        model=tiny(tokenizer),
        reward_funcs=ByRound([0.0] * 6),
        args=trl.GRPOConfig(
            **{**DEFAULTS, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4},
            **{"max_steps": 6, "output_dir": str(tmp_path), "stop_after_constant_rounds": 4},
        ),
        train_dataset=PROMPTS,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4


def test_what_is_not_possible(tmp_path):
    with pytest.raises(ValueError, match="stop_after_constant_rounds=0 is not possible"):
        trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, stop_after_constant_rounds=0)
