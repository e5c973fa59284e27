"""The line of memory before step 1 and after the run, and `Trainer.plan()`."""

from __future__ import annotations

import pytest
import torch

import trl
from trl.trainer import planned

ROWS = [{"prompt": "hello there", "completion": " general kenobi" * count} for count in range(1, 9)]


def trainer_of(path: str, folder: object, **about: object) -> trl.SFTTrainer:
    args = trl.SFTConfig(
        output_dir=str(folder), use_cpu=True, max_steps=2, report_to="none", save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, **about,
    )  # fmt: skip
    return trl.SFTTrainer(path, args, train_dataset=ROWS)


def test_the_plan_is_of_this_model_these_arguments_and_these_rows(tiny_path: str, tmp_path: object) -> None:
    trainer = trainer_of(tiny_path, tmp_path)
    found = trainer.plan()
    count = sum(each.numel() for each in trainer.model.parameters())
    assert found.weights.total == found.weights.trained == count
    run = found.run
    assert (run.method, run.rows, run.accumulation, run.device, run.dtype) == ("sft", 2, 2, "cpu", torch.float32)
    longest = max(len(row["input_ids"]) for row in trainer.train_dataset)
    assert run.prompt + run.completion == longest
    assert 0 < run.trained < 1 and found.steps == 2
    assert trainer.plan() is found  # made once
    assert trainer.plan("h100").card.memory == pytest.approx(79.6)
    with pytest.raises(ValueError, match="there is no card 'h10'"):
        trainer.plan("h10")


def test_a_run_says_what_it_is_expected_to_take(
    tiny_path: str, tmp_path: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tiny_path, tmp_path)
    state = torch.get_rng_state()
    said = planned.lines(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(said) == 1 and said[0].startswith("memory: about ") and "GiB at most, in the phase `" in said[0]
    records = iter([(1.0e9, 1.0e9), (1.0e9, 2.0e9)])
    monkeypatch.setattr(planned, "_resident", lambda: next(records))
    trainer.train()
    out = capsys.readouterr().out
    assert said[0] in out and "at most expected" in out
    assert "GiB at the peak, freed memory that the allocator kept included; " in out


def test_a_run_that_will_not_fit_is_warned_of(
    tiny_path: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned, "room_of", lambda device: 2.0**20)
    _, warning = planned.lines(trainer_of(tiny_path, tmp_path))
    assert "warning: this run is expected to need" in warning and "--use_peft" in warning


def test_a_plan_that_fails_ends_no_run(tiny_path: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("an architecture that nobody knows")

    monkeypatch.setattr(planned, "plan_of", fails)
    trainer = trainer_of(tiny_path, tmp_path)
    assert planned.lines(trainer) == ["memory: not known beforehand (RuntimeError)"]
    trainer.train()
    assert planned.measured(trainer) == []


def test_methods_that_sample_and_value_functions(tiny_path: str, tmp_path: object) -> None:
    def length(completions: list[str], **kwargs: object) -> list[float]:
        return [float(len(each)) for each in completions]

    about = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "max_completion_length": 12}
    prompts = [{"prompt": "hello there"}] * 8
    grpo = trl.GRPOTrainer(
        tiny_path, length, trl.GRPOConfig(**about, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                                          num_generations=4, beta=0.1),
        train_dataset=prompts,
    ).plan()  # fmt: skip
    assert (grpo.run.rows, grpo.run.accumulation, grpo.run.generations, grpo.run.completion) == (8, 1, 4, 12)
    assert grpo.held["reference"] == grpo.held["weights"]
    assert [phase.name for phase in grpo.phases()] == ["backward", "optimizer step", "sampling"]
    ppo = trl.PPOTrainer(
        args=trl.PPOConfig(**about, kl_coef=0.0), model=tiny_path, reward_funcs=length, train_dataset=prompts
    )
    own = sum(each.numel() for each in ppo.model.parameters())
    assert ppo.plan().weights.total == own and "reference" not in ppo.plan().held
