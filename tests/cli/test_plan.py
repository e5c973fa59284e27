"""`trl plan`: the options of a method become a run, and the plan is printed for people or as JSON."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import GptOssConfig, LlamaConfig, MambaConfig, MixtralConfig

from tests.cli.conftest import Command
from trl.cli import measured
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
    assert found["steps"] == 14  # 100 rows, 16 a step, twice
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
        (["plan", "sft", "--gpu_memory", "inf"], "--gpu_memory: needs a number, above 0, not `inf`"),
        (
            ["plan", "sft", "--model_name_or_path", "{model}", "--num_rows", "0"],
            "--num_rows: needs a whole number, 1 or more, not `0`",
        ),
        (["plan", "sft", "--utilisation", "1.5"], "--utilisation: needs a number, above 0, at most 1, not `1.5`"),
        (["plan", "sft", "--model_name_or_path", "{model}", "--typo"], "`trl plan --help` and `trl sft --help` list"),
        (["plan", "sft", "--model_name_or_path", "{model}", "--max_length", "-1"], "--max_length: -1 is not possible"),
        (["plan", "sft", "--model_name_or_path", "{model}", "--num_processes", "-1"], "--num_processes: -1 is too few"),
        (["plan", "sft", "--model_name_or_path", "{model}", "--load_in_4bit"], "--use_peft trains an adapter"),
        (["plan", "sft", "--model_name_or_path", "{model}", "--html", "no/where.html"], "cannot be written"),
    ],
)
def test_wrong_words(words: list[str], sentence: str, tiny_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word.format(model=tiny_path) for word in words]) == 2
    assert sentence in capsys.readouterr().err


def shaped(folder: Path, config: Any, **further: Any) -> list[str]:
    """The words that plan SFT on a model of this configuration."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **further}))
    return ["sft", "--model_name_or_path", str(folder), "--max_length", "32", "--gpu", "t4"]


SMALL = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
STACKED = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 2}


def test_a_checkpoint_that_is_quantised_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(**SMALL, intermediate_size=256, num_key_value_heads=4, tie_word_embeddings=True)
    words = [*shaped(tmp_path / "plain", config), "--use_peft"]
    asked = planned(capsys, *words, "--load_in_4bit")[1]
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for name, about in (("nf4", nf4), ("gptq", {"quant_method": "gptq", "bits": 4})):
        words = [*shaped(tmp_path / name, config, quantization_config=about), "--use_peft"]
        found = planned(capsys, *words)[1]
        assert [phase["parts"] for phase in found["phases"]] == [phase["parts"] for phase in asked["phases"]]
        assert main(["plan", *words[:-1]]) == 2
        assert "rounded weights cannot be trained" in capsys.readouterr().err


def test_reward_models_are_counted_wherever_they_are_named(tiny_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["grpo", "--model_name_or_path", tiny_path, "--max_completion_length", "16", "--max_prompt_length", "16"]
    parts = [
        planned(capsys, *words, option, tiny_path)[1]["phases"][0]["parts"]["reward models"]
        for option in ("--reward_funcs", "--reward_model_name_or_path")
    ]
    assert parts[0] == parts[1] > 0
    for functions in ([], ["--reward_funcs", "think_format_reward", "http://localhost:1/judge"]):
        assert "reward models" not in planned(capsys, *words, *functions)[1]["phases"][0]["parts"]


def test_what_is_missing_for_time_and_cost_is_said(tiny_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sft", "--model_name_or_path", tiny_path, "--max_length", "32", "--price_per_hour", "1"]
    assert planned(capsys, *words, "--gpu_memory", "24", "--num_rows", "9")[1]["notes"] == [
        "no time and no cost, because no card is named: --gpu NAME (or --measure, on this machine)"
    ]
    assert planned(capsys, *words, "--gpu", "t4")[1]["notes"] == [
        "no cost, because the number of steps is not known: --num_rows or --max_steps"
    ]
    assert planned(capsys, *words, "--gpu", "t4", "--num_rows", "9")[1]["notes"] == []


def test_models_whose_code_is_not_traced_are_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, state_size=8)
    status, found = planned(capsys, *shaped(tmp_path / "mamba", config))
    assert status == 0 and found["peak"] > 0.8
    assert [note[:33] for note in found["notes"]] == ["models of type mamba are not trac"]


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # PEFT's, of its own keys
def test_stacked_experts_take_an_adapter_without_dropout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shaped(tmp_path / "mixtral", MixtralConfig(**STACKED))
    status, found = planned(capsys, *words, "--use_peft", "--lora_target_modules", "all-linear", "--lora_r", "4")
    experts = 2 * 2 * 4 * ((64 + 128) + (64 + 64))  # layers, experts, rank; gate and up in one, down
    assert status == 0
    assert int(found["what"].split()[1].replace(",", "")) > experts
    assert main(["plan", *shaped(tmp_path / "gpt-oss", GptOssConfig(**STACKED, head_dim=16)), "--use_peft"]) != 0
    assert "all-linear takes every linear layer" in capsys.readouterr().err


def test_the_dtype_is_named_where_it_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(**{**SMALL, "hidden_size": 2048, "num_hidden_layers": 8}, intermediate_size=8192)
    words = [*shaped(tmp_path / "wide", config)[:-2], "--use_peft", "--gpu_memory", "2.5"]
    advice = planned(capsys, *words)[1]["advice"]
    assert advice[0].startswith("does not fit") and "--dtype bfloat16" in advice[1] and ": fits with" in advice[1]
    assert planned(capsys, *words, "--dtype", "bfloat16")[0] == 0


def test_the_plan_in_words(tiny_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "sft", "--model_name_or_path", tiny_path, "--max_length", "32", "--gpu", "t4", "--max_steps", "7"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "peak: 0.8 GiB, in the phase `backward`" in said and "of 15.0 GiB: fits, with 14." in said
    assert "7 steps: about 0.0 hours" in said


def test_a_page_is_written(tiny_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.html"
    status, found = planned(
        capsys, "sft", "--model_name_or_path", tiny_path, "--max_length", "32", "--gpu", "t4", "--html", str(file)
    )
    text = file.read_text(encoding="utf-8")
    assert status == 0 and text.count("<svg") == 1 and "http" not in text
    assert all(phase["name"] in text for phase in found["phases"])


MEASURED = ("plan", "sft", "--model_name_or_path", "{model}", "--max_length", "32", "--gpu", "t4", "--measure")


def test_three_steps_here_give_the_speed(
    tiny_path: str, rows_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rate is the mean of all steps but the first; the training command is the one that was typed."""
    typed = []

    def run(words: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        typed.append(words)
        return subprocess.CompletedProcess(words, 0, "".join(f"tokens_per_second={n} \n" for n in (1, 300, 500)), "")

    monkeypatch.setattr(measured.subprocess, "run", run)
    words = [word.format(model=tiny_path) for word in MEASURED[1:]]
    status, found = planned(capsys, *words, "--dataset_name", str(rows_file))
    assert status == 0 and found["tokens_per_second"] == 400
    assert found["seconds_of_step"] == [found["tokens_of_step"] / 400, 0.0]
    command = " ".join(typed[0][3:])
    assert command.startswith(f"sft --model_name_or_path {tiny_path} --max_length 32 --dataset_name {rows_file}")
    assert "--max_steps 3" in command and "--save_strategy no" in command


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (None, "--measure trains three steps, so that it needs --dataset_name"),
        ((1, "", "trl: no such rows\n"), "--measure: the run of three steps failed: trl: no such rows"),
        ((0, "tokens_per_second=5.0", ""), "--measure: the run of three steps failed: tokens_per_second=5.0"),
    ],
)
def test_a_measurement_that_fails_says_why(
    answer, sentence, tiny_path, rows_file, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(model=tiny_path) for word in MEASURED]
    if answer is not None:
        words += ["--dataset_name", str(rows_file)]
        monkeypatch.setattr(
            measured.subprocess, "run", lambda words, **kwargs: subprocess.CompletedProcess(words, *answer)
        )
    assert main(words) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_measured_speed(trl_command: Command, tiny_path: str, rows_file: Path) -> None:
    words = [word.format(model=tiny_path) for word in MEASURED]
    answer = trl_command(*words, "--dataset_name", rows_file, "--use_cpu", "true")
    assert answer.returncode == 0, answer.stderr
    assert " tokens a second of three steps here" in answer.stdout


@pytest.mark.parametrize(
    ("memory", "sentence"),
    [
        (64, "auto: per_device_train_batch_size=8, gradient_accumulation_steps=1 (the gradient is the same); "),
        (0.001, "auto: per_device_train_batch_size=1, gradient_accumulation_steps=8, the least that a step can take: "),
    ],
)
def test_a_training_command_sets_what_fits(
    memory: float, sentence: str, trl_here: Command, tiny_path: str, rows_file: Path, tmp_path: Path
) -> None:
    """A step has the rows that were asked for, and so the same loss, in other micro-batches."""
    line = ("sft", "--model_name_or_path", tiny_path, "--dataset_name", rows_file, "--max_steps", 1,
            "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4, "--logging_steps", 1,
            "--report_to", "none", "--use_cpu", "true", "--max_length", 64)  # fmt: skip
    plain = trl_here(*line, "--output_dir", "plain")
    fitted = trl_here(*line, "--output_dir", "fitted", "--auto", "--gpu_memory", memory)
    assert plain.returncode == fitted.returncode == 0, fitted.stderr
    assert f"trl: {sentence}" in fitted.stdout and "auto:" not in plain.stdout
    losses = []
    for name in ("plain", "fitted"):
        state = json.loads((tmp_path / name / "checkpoint-1" / "trainer_state.json").read_text())
        losses.append(state["log_history"][0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_memory_of_nothing_is_refused(trl_here: Command, tiny_path: str, rows_file: Path) -> None:
    line = ("sft", "--model_name_or_path", tiny_path, "--dataset_name", rows_file, "--gpu_memory", 0)
    answer = trl_here(*line, "--auto")
    assert answer.returncode == 2 and "--gpu_memory: 0 is too small" in answer.stderr
    answer = trl_here(*line)
    assert answer.returncode == 2 and "--gpu_memory is what --auto fills" in answer.stderr
