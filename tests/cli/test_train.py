"""`trl sft` on a tiny model, most of it in this process."""

from __future__ import annotations

import json
import math
import types
from pathlib import Path
from typing import Any

import pytest

from trl.cli import UsageError, train
from trl.cli.train import check

from .conftest import Command

FEW = ("--max_steps", 3, "--per_device_train_batch_size", 2, "--logging_steps", 1, "--report_to", "none")


def logged(folder: Path) -> list[dict[str, float]]:
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    return [line for line in state["log_history"] if "loss" in line]


def test_sft_trains_an_adapter_and_says_what_comes_next(
    trl_command: Command, tiny_path: str, rows_file: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    (tmp_path / "run.yaml").write_text(f"env:\n  HF_DATASETS_CACHE: {cache}\n")
    answer = trl_command(
        *("sft", "--model_name_or_path", tiny_path, "--dataset_name", rows_file, "--output_dir", "out"),
        *("--lora_target_modules", "all-linear", "--assistant_only_loss", "--learning-rate", "1e-2"),
        *("--config", "run.yaml", *FEW),
    )
    assert answer.returncode == 0, answer.stderr
    assert any(cache.iterdir())  # `datasets` read the variable as it was loaded
    assert "lora_target_modules=['all-linear']: an adapter is trained, as with use_peft=True" in answer.stdout
    # The report before step 1, and the end.
    assert "8 rows read" in answer.stdout
    assert "parameters train" in answer.stdout
    assert "The trained adapter is in out" in answer.stdout
    assert 'AutoPeftModelForCausalLM.from_pretrained("out")' in answer.stdout

    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["base_model_name_or_path"]) == (16, 32, tiny_path)
    losses = [line["loss"] for line in logged(tmp_path / "out")]
    # A random model over 2,048 tokens begins near ln 2048, and each step here lowers the loss.
    assert abs(losses[0] - math.log(2048)) < 0.2
    assert losses[0] > losses[1] > losses[2]

    from peft import AutoPeftModelForCausalLM

    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").base_model.model.config.hidden_size == 64


def test_broken_lines_and_rows_are_left_out(trl_here: Command, tiny_path: str, rows_file: Path, tmp_path: Path) -> None:
    rows_file.write_text('{"messages": [\n{"messages": null}\n' + rows_file.read_text())
    typed = ("sft", "--model_name_or_path", tiny_path, "--dataset_name", rows_file, "--output_dir", "out", *FEW)
    answer = trl_here(*typed)
    assert answer.returncode != 0 and "line 1 is not valid JSON" in answer.stderr
    assert "--skip_bad_rows" in answer.stderr and not (tmp_path / "out").exists()
    answer = trl_here(*typed, "--skip_bad_rows")
    assert answer.returncode == 0, answer.stderr
    # Once, in the second command of this process too.
    assert answer.stdout.count("1 line cannot be read and is left out by skip_bad_rows: line 1 is not valid") == 1
    assert "9 rows read" in answer.stdout
    assert "1 row dropped: cannot be read, left out by skip_bad_rows (row 0)" in answer.stdout


def test_a_yaml_file_gives_options_and_the_command_line_overrides_them(
    trl_here: Command, tiny_path: str, rows_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"""
model_name_or_path: {tiny_path}
dataset_name: {rows_file}
dataset_train_split: "train[2:]"
dataset_test_split: "train[:2]"
output_dir: out
learning_rate: 1e-3
lr_scheduler_type: constant
max_steps: 50
eval_strategy: steps
eval_steps: 3
report_to: none
bf16: true
"""
    )
    answer = trl_here("sft", "--config", "run.yaml", *FEW)
    assert answer.returncode == 0, answer.stderr
    assert "bfloat16" in answer.stdout
    assert "The trained model is in out" in answer.stdout
    lines = logged(tmp_path / "out")
    assert [line["learning_rate"] for line in lines] == [1e-3] * 3
    history = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    (evaluation,) = [line for line in history if "eval_loss" in line]
    assert evaluation["step"] == 3

    # The saved folder opens in plain transformers.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"

    # And the run goes on from its checkpoint.
    answer = trl_here("sft", "--config", "run.yaml", *FEW, "--max_steps", 4, "--resume_from_checkpoint", "true")
    assert answer.returncode == 0, answer.stderr
    history = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 3, 4]


def test_evaluation_without_rows_of_its_own(trl_here: Command, tiny_path: str, rows_file: Path) -> None:
    answer = trl_here(
        *("sft", "--model_name_or_path", tiny_path, "--dataset_name", rows_file),
        *("--eval_strategy", "steps", "--eval_steps", 1, *FEW),
    )
    assert answer.returncode == 2
    assert "has no split `test`" in answer.stderr
    assert "--test_split_size 0.05" in answer.stderr


def test_rows_that_cannot_be_read(trl_here: Command, tiny_path: str, tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"question": 1, "reply": 2}\n')
    answer = trl_here("sft", "--model_name_or_path", tiny_path, "--dataset_name", "odd.jsonl", *FEW)
    assert answer.returncode == 1
    assert "`question`" in answer.stderr and "`messages`" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_the_line_of_the_guide(trl_here: Command, tiny_path: str, rows_file: Path, tmp_path: Path) -> None:
    """Every option as people copy it; what is saved opens in plain peft, and merges."""
    answer = trl_here(
        *("sft", "--model_name_or_path", tiny_path, "--dataset_name", rows_file, "--dataset_text_field", "messages"),
        *("--output_dir", "./cli_sft_output", "--num_train_epochs", 3, "--per_device_train_batch_size", 2),
        *("--gradient_accumulation_steps", 4, "--learning_rate", "2e-4", "--bf16", "--use_peft"),
        *("--lora_r", 16, "--lora_alpha", 32),
    )
    assert answer.returncode == 0, answer.stderr
    folder = tmp_path / "cli_sft_output"
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (3, 3.0)
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert any(float(p.abs().max()) > 0 for n, p in model.named_parameters() if "lora_B" in n)
    merged = model.merge_and_unload()
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), folder)
    inputs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "What comes after 3?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    assert float((merged(**inputs).logits - again(**inputs).logits).abs().max()) < 1e-4


def test_older_words_and_a_split_that_is_not_there(
    trl_here: Command, tiny_path: str, rows_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("torch_dtype: float32\nmax_seq_length: 64\nsave_strategy: no\n")
    answer = trl_here(
        *("sft", "--config", "run.yaml", "--model_name_or_path", tiny_path, "--dataset_name", rows_file),
        *("--dataset_train_split", "train_sft", "--evaluation_strategy", "no", "--warmup_ratio", "0.1", *FEW),
    )
    assert answer.returncode == 0, answer.stderr
    assert "has no split 'train_sft'; its only split 'train' is read." in answer.stdout
    assert "window 64" in answer.stdout
    for old in ("torch_dtype", "max_seq_length", "evaluation_strategy", "warmup_ratio"):
        assert answer.stdout.count(f"trl: `{old}` is ") == 1, old


def test_four_bits(trl_here: Command, tiny_path: str, rows_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    answer = trl_here(
        *("sft", "--model_name_or_path", tiny_path, "--dataset_name", rows_file, "--output_dir", "out"),
        *("--load_in_4bit", "--use_bnb_nested_quant", "--use_peft", "--lora_target_modules", "all-linear", *FEW),
    )
    assert answer.returncode == 0, answer.stderr
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny_path
    assert len(logged(tmp_path / "out")) == 3


def test_bare_resume_goes_on_from_the_newest_checkpoint(
    trl_here: Command, tiny_path: str, rows_file: Path, tmp_path: Path
) -> None:
    line = ("sft", "--model_name_or_path", tiny_path, "--dataset_name", rows_file, "--output_dir", "out")
    assert trl_here(*line, *FEW).returncode == 0
    answer = trl_here(*line, *FEW, "--max_steps", 4, "--resume_from_checkpoint")
    assert answer.returncode == 0, answer.stderr
    history = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"dataset_name": "a", "datasets": [{"path": "b"}]}, "--dataset_name and --datasets are both given"),
        (
            {"dataset_name": "a", "test_split_size": 0.1, "dataset_test_split": "test"},
            "--test_split_size and --dataset_test_split both say",
        ),
        ({"datasets": ["b"], "dataset_train_split": "x"}, "--dataset_train_split belongs to --dataset_name"),
        ({"dataset_name": "a", "dataset_streaming": True}, "--max_steps is missing"),
        ({"dataset_name": "a", "streaming": True}, "--max_steps is missing"),
        ({"datasets": []}, "--dataset_name is missing"),
    ],
)
def test_which_data_is_meant(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        check({"model_name_or_path": "x", **values})
    assert sentence in str(error.value)


def test_several_data_sets_as_one(trl_here: Command, tiny_path: str, rows_file: Path, tmp_path: Path) -> None:
    questions = [{"question": f"{number} + 1?", "answer": f"{number + 1}."} for number in range(10)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (tmp_path / "run.yaml").write_text(
        f"""
datasets:
- path: {rows_file}
- path: sums.jsonl
  split: train
  columns: {{prompt: question, completion: answer}}
  fraction: 0.8
test_split_size: 0.25
eval_strategy: steps
eval_steps: 3
"""
    )
    line = ("sft", "--config", "run.yaml", "--model_name_or_path", tiny_path, "--output_dir", "out")
    answer = trl_here(*line, *FEW)
    assert answer.returncode == 0, answer.stderr
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert (report["train"]["rows_read"], report["eval"]["rows_read"]) == (12, 4)
    history = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [3]
    # The same as options: a notice names the rows set aside, because no evaluation is asked for.
    typed = ("sft", "--model_name_or_path", tiny_path, "--output_dir", "typed", *FEW)
    sums = {"path": "sums.jsonl", "columns": {"prompt": "question", "completion": "answer"}, "fraction": 0.8}
    answer = trl_here(*typed, "--datasets", rows_file, json.dumps(sums), "--test_split_size", 0.25)
    assert answer.returncode == 0, answer.stderr
    assert "trl: test_split_size=0.25 sets rows aside that are not used without eval_strategy" in answer.stdout
    assert json.loads((tmp_path / "typed" / "data_report.json").read_text())["train"]["rows_read"] == 12
    # Given twice, or without rows to evaluate on.
    both = trl_here(*line, "--dataset_name", rows_file)
    assert both.returncode == 2
    assert "--dataset_name and --datasets are both given" in both.stderr


def test_a_random_share_of_one_data_set_is_set_aside(
    trl_here: Command, tiny_path: str, rows_file: Path, tmp_path: Path
) -> None:
    line = ("sft", "--model_name_or_path", tiny_path, "--dataset_name", rows_file, "--test_split_size", 0.25, *FEW)
    answer = trl_here(*line, "--output_dir", "out", "--eval_strategy", "steps", "--eval_steps", 3)
    assert answer.returncode == 0, answer.stderr
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert (report["train"]["rows_read"], report["eval"]["rows_read"]) == (6, 2)
    options = types.SimpleNamespace(
        dataset_name=str(rows_file), dataset_config=None, dataset_streaming=False,
        dataset_train_split="train", dataset_test_split="test",
    )  # fmt: skip
    mixture = types.SimpleNamespace(datasets=[], test_split_size=0.25)
    asked = [
        train.rows(
            options,
            mixture,
            types.SimpleNamespace(eval_strategy="steps", do_eval=True, seed=seed, skip_bad_rows=False),
            None,
        )
        for seed in (0, 0, 1, 2, 3)
    ]
    texts = [[row["messages"][0]["content"] for row in test] for _, test in asked]
    assert texts[0] == texts[1] and len({tuple(each) for each in texts}) > 1
    for (rest, _), aside in zip(asked, texts, strict=True):
        assert not {row["messages"][0]["content"] for row in rest} & set(aside) and len(rest) == 6


def test_a_stream(trl_here: Command, tiny_path: str, rows_file: Path, tmp_path: Path) -> None:
    line = ("sft", "--model_name_or_path", tiny_path, "--dataset_name", rows_file, "--output_dir", "out")
    answer = trl_here(*line, "--dataset_streaming", *FEW)
    assert answer.returncode == 0, answer.stderr
    assert len(logged(tmp_path / "out")) == 3


def test_a_saved_data_set_without_splits_is_not_evaluated_on_itself(
    trl_here: Command, tiny_path: str, tmp_path: Path
) -> None:
    from datasets import Dataset

    Dataset.from_list([{"text": f"a small row number {number}"} for number in range(4)]).save_to_disk(
        tmp_path / "saved"
    )
    answer = trl_here(
        *("sft", "--model_name_or_path", tiny_path, "--dataset_name", "saved", "--output_dir", "out"),
        *("--max_steps", 1, "--eval_strategy", "steps", "--report_to", "none"),
    )
    assert answer.returncode == 2 and "evaluation needs rows of its own" in answer.stderr
