"""`trl plan`: the options of a method become a run, and the plan is printed for people or as JSON."""

import json

import pytest

from trl.cli.main import main
from trl.plan.memory import GIB


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict]:
    status = main(["plan", *words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_the_options_of_the_method_are_the_run(tiny_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = planned(
        capsys, "dpo", "--model_name_or_path", tiny_path, "--per_device_train_batch_size", "2",
        "--gradient_accumulation_steps", "4", "--max_length", "64", "--num_train_epochs", "2", "--num_rows", "100",
        "--gpu", "rtx-3090", "--price_per_hour", "0.5", "--num_processes", "2", "--accelerate_config", "fsdp2",
    )  # fmt: skip
    assert status == 0 and found["fits"] is True
    assert found["steps"] == 13  # 100 rows twice, 16 a step
    assert found["tokens_of_step"] == 2 * 4 * (32 + 2 * 32)
    parts = {phase["name"]: phase["parts"] for phase in found["phases"]}["backward"]
    assert parts["reference"] == pytest.approx(parts["weights"])
    assert parts["optimizer"] == pytest.approx(2 * parts["weights"])
    assert found["cost"] == pytest.approx(found["hours"] * 0.5 * 2)


def test_what_does_not_fit_is_status_1(tiny_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = planned(
        capsys, "grpo", "--model_name_or_path", tiny_path, "--gpu_memory", "0.5", "--max_completion_length", "16",
        "--max_prompt_length", "16", "--use_peft", "--lora_target_modules", "all-linear",
    )  # fmt: skip
    assert status == 1 and found["fits"] is False
    assert found["advice"][0].startswith("does not fit") and found["seconds_of_step"] is None
    assert [phase["name"] for phase in found["phases"]] == ["backward", "optimizer step", "sampling"]
    assert found["peak"] * GIB > 0.5 * GIB


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["plan", "stf"], "there is no method stf; did you mean sft?"),
        (["plan", "sft", "--gpu", "h10"], "--model_name_or_path is missing"),
        (["plan", "sft", "--model_name_or_path", "{model}", "--gpu", "h10"], "there is no card h10; did you mean"),
        (["plan", "sft", "--model_name_or_path", "{model}", "--learning_rat", "1"], "did you mean"),
        (
            ["plan", "sft", "--model_name_or_path", "{model}", "--gpu_memory", "-3"],
            "--gpu_memory: needs a number, above 0, not `-3`",
        ),
        (
            ["plan", "sft", "--model_name_or_path", "{model}", "--num_rows", "0"],
            "--num_rows: needs a whole number, 1 or more, not `0`",
        ),
        (["plan", "sft", "--utilisation", "1.5"], "--utilisation: needs a number, above 0, at most 1, not `1.5`"),
        (["plan", "sft", "--model_name_or_path", "{model}", "--typo"], "`trl plan --help` and `trl sft --help` list"),
        (["plan", "sft", "--model_name_or_path", "{model}", "--max_length", "-1"], "--max_length: -1 is not possible"),
    ],
)
def test_wrong_words(words: list[str], sentence: str, tiny_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word.format(model=tiny_path) for word in words]) == 2
    assert sentence in capsys.readouterr().err


def test_the_plan_in_words(tiny_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "sft", "--model_name_or_path", tiny_path, "--max_length", "32", "--gpu", "t4", "--max_steps", "7"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "peak: 0.8 GiB, in the phase `backward`" in said and "of 15.0 GiB: fits, with 14." in said
    assert "7 steps: about 0.0 hours" in said
