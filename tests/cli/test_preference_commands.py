"""The commands that learn from judgements, on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.helpers import chat_rows, labelled_rows, pair_rows, step_rows
from trl.cli.main import main

from .conftest import Command

FEW = ("--max_steps", 2, "--per_device_train_batch_size", 2, "--logging_steps", 1, "--report_to", "none")
REWARDS = {"rewards/chosen", "rewards/rejected", "rewards/margins"}
PAIRS = {*REWARDS, "rewards/accuracies", "logps/chosen", "logps/rejected"}
SCORES = {"accuracy", "margin", "min_reward", "mean_reward", "max_reward"}
# Each command: its rows, what else is typed, the loss before the first step (None: of a random head), what is logged.
COMMANDS = {
    "dpo": ("pairs", ("--loss_type", "sigmoid", "bco_pair", "--loss_weights", 0.5, 2), 4.5 * math.log(2), PAIRS),
    "kto": ("labelled", ("--desirable_weight", 2), 1.0, {"kl"}),
    "orpo": ("pairs", ("--beta", 0.2), None, PAIRS | {"nll_loss", "log_odds_ratio", "log_odds_chosen"}),
    "cpo": ("pairs", ("--loss_type", "simpo", "--simpo_gamma", 1.5, "--cpo_alpha", 0), None, PAIRS),
    "bco": ("labelled", ("--beta", 0.2), math.log(2), {"delta"}),
    "reward": ("pairs", ("--center_rewards_coefficient", 0.01), None, SCORES),
    "prm": ("steps", ("--train_on_last_step_only",), None, {"accuracy"}),
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    rows = {"pairs": pair_rows(8), "labelled": labelled_rows(8), "steps": step_rows(8), "chats": chat_rows(8)}
    return {name: write(tmp_path / f"{name}.jsonl", each) for name, each in rows.items()}


def logged(folder: Path, step: int = 2) -> list[dict[str, float]]:
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [line for line in state["log_history"] if "loss" in line]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_trains_and_what_it_leaves_opens(
    trl_here: Command, tiny_path: str, files: dict[str, Path], tmp_path: Path, command: str
) -> None:
    rows, options, first_loss, names = COMMANDS[command]
    answer = trl_here(
        *(command, "--model_name_or_path", tiny_path, "--dataset_name", files[rows], "--output_dir", "out"),
        *("--learning_rate", "1e-3", *options, *FEW),
    )
    assert answer.returncode == 0, answer.stderr
    assert "8 rows read, 8 kept" in answer.stdout
    assert "each prompt computed once" in answer.stdout
    if command in ("dpo", "kto", "bco"):
        assert "reference: a frozen copy of the model as it was at the start" in answer.stdout
    first, second = logged(tmp_path / "out")
    assert names <= first.keys() and names <= second.keys()
    if first_loss is not None:
        # The policy is the reference still. KTO: of two rows, each good one weighs 2 and each bad one 1, half of it.
        wanted = {first_loss, 0.75 * first_loss, 0.5 * first_loss} if command == "kto" else {first_loss}
        assert min(abs(first["loss"] - each) for each in wanted) < 1e-4
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in (first, second))

    heads = {"reward": "SequenceClassification", "prm": "TokenClassification"}
    head = f"AutoModelFor{heads.get(command, 'CausalLM')}"
    assert f'{head}.from_pretrained("out")' in answer.stdout
    import transformers

    model, info = getattr(transformers, head).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.num_hidden_layers == 2


def test_an_adapter_of_sft_goes_on_in_dpo_and_becomes_a_reward_model(
    trl_here: Command, tiny_path: str, files: dict[str, Path], tmp_path: Path
) -> None:
    lora = ("--use_peft", "--lora_target_modules", "all-linear")
    answer = trl_here(
        *("sft", "--model_name_or_path", tiny_path, "--dataset_name", files["chats"], "--output_dir", "sft"),
        *("--learning_rate", "1e-2", *lora, *FEW),
    )
    assert answer.returncode == 0, answer.stderr

    # Held-out rows are evaluated on; the adapter trains on without being asked for.
    answer = trl_here(
        *("dpo", "--model_name_or_path", "sft", "--dataset_name", files["pairs"], "--output_dir", "dpo"),
        *("--dataset_train_split", "train[2:]", "--dataset_test_split", "train[:2]", "--eval_strategy", "steps"),
        *("--eval_steps", 2, "--learning_rate", "1e-2", "--beta", 0.1, "--bf16", *FEW),
    )
    assert answer.returncode == 0, answer.stderr
    assert "reference: a frozen copy of the adapter as it was at the start" in answer.stdout
    assert "The trained adapter is in dpo" in answer.stdout
    first, second = logged(tmp_path / "dpo")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3) and second["loss"] != first["loss"]
    history = json.loads((tmp_path / "dpo" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [0 <= line["eval_rewards/accuracies"] <= 1 for line in history if "eval_loss" in line] == [True]

    from safetensors.torch import load_file

    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sft", "dpo"))
    assert before.keys() == after.keys(), "the frozen copy is not saved"
    assert all(not before[name].equal(after[name]) for name in before)
    assert json.loads((tmp_path / "dpo" / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny_path

    answer = trl_here(
        *("reward", "--model_name_or_path", "sft", "--dataset_name", files["pairs"], "--output_dir", "reward"),
        *("--learning_rate", "1e-2", *FEW),
    )
    assert answer.returncode == 0, answer.stderr
    assert "the adapter in sft belongs to a language model: it is merged into the weights below" in answer.stdout
    assert 'AutoModelForSequenceClassification.from_pretrained("reward")' in answer.stdout
    from transformers import AutoModelForSequenceClassification

    scorer, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", output_loading_info=True)
    assert scorer.config.num_labels == 1 and not info["missing_keys"] and not info["unexpected_keys"]


def test_an_adapter_of_a_reward_model_opens_with_its_head(
    trl_here: Command, tiny_path: str, files: dict[str, Path], tmp_path: Path
) -> None:
    answer = trl_here(
        *("reward", "--model_name_or_path", tiny_path, "--dataset_name", files["pairs"], "--output_dir", "out"),
        *("--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--learning_rate", "1e-2", *FEW),
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    assert "task_type" not in answer.stdout, "a command needs no such advice"
    # Padding is no end of a text, so that transformers reads the score where it was trained.
    assert 'Classification.from_pretrained("out", num_labels=1, pad_token_id=1)' in answer.stdout
    from peft import AutoPeftModelForSequenceClassification
    from safetensors.torch import load_file

    scorer = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=1)
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert scorer.base_model.model.score.modules_to_save["default"].weight.equal(saved)


def test_lists_in_a_file_and_older_words(
    trl_here: Command, tiny_path: str, files: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"""
model_name_or_path: {tiny_path}
dataset_name: {files["pairs"]}
output_dir: out
loss_type: [sigmoid, aot_pair, sft]
loss_weights: [0.8, 0.2, 1.0]
max_target_length: 16
label_pad_token_id: -100
"""
    )
    answer = trl_here("dpo", "--config", "run.yaml", "--precompute_ref_log_probs", *FEW)
    assert answer.returncode == 0, answer.stderr
    assert "trl: loss_type='aot_pair' is 'aot_unpaired' today" in answer.stdout
    assert answer.stdout.count("trl: `max_target_length` has no effect: ") == 1
    assert "reference: log-probs computed before the first step" in answer.stdout
    # ln 2 once, weighted, and the likelihood of an answer that a random model gives.
    assert logged(tmp_path / "out")[0]["loss"] == pytest.approx(math.log(2) + math.log(2048), abs=0.3)


# --- mistakes, in this process: each is told before anything trains -------------------------------------------------


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(each) for each in arguments]) in (1, 2)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return "\n".join(line for line in said.splitlines() if line.startswith("trl "))


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ((), "needs some of aot, aot_unpaired"),
        (("dpo", "--loss_type", "sigmoid", "bco_pare"), "not `bco_pare`; did you mean bco_pair?"),
        (("dpo", "--loss_type", "sigmiod"), "not `sigmiod`; did you mean sigmoid?"),
        (("kto", "--loss_type", "ktoo"), "--loss_type: needs one of kto, apo_zero_unpaired, not `ktoo`"),
        (("cpo", "--loss_type", "simppo"), "not `simppo`; did you mean simpo?"),
        (("dpo", "--loss_type", "kto_pair"), "is gone: train with KTOTrainer"),
        (("cpo", "--loss_type", "kto_pair"), "is gone: train with KTOTrainer"),
        (("kto", "--loss_type", "bco"), "is gone: train with BCOTrainer"),
        (("dpo", "--loss_type", "sigmoid", "sft", "--loss_weights", 1), "loss_weights has 1 entries for 2 losses"),
        (("dpo", "--loss_weights", "much"), "--loss_weights: needs a number, not `much`"),
        (("dpo", "--ref_adapter_name", "x"), "`ref_adapter_name` is gone: leave it out"),
        (("orpo", "--betta", 1), "there is no option --betta; did you mean --beta?"),
    ],
)
def test_options_that_cannot_be_meant(
    capsys: pytest.CaptureFixture[str], empty_path: str, typed: tuple, sentence: str
) -> None:
    command, *options = typed or ("dpo", "--loss_type", "zzz")
    assert sentence in told(capsys, command, "--model_name_or_path", empty_path, "--dataset_name", "none", *options)


TEXTS = {"prompt": "a ", "chosen": "b", "rejected": "c"}
CHATS = {"prompt": [{"role": "user", "content": "Hello?"}], "chosen": [{"role": "assistant", "content": "Hello."}],
         "rejected": [{"role": "assistant", "content": "What?"}]}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "rows", "words"),
    [
        ("dpo", [{"question": 1, "reply": 2}], ("`question`", "`chosen`")),
        ("dpo", [{"prompt": "a", "chosen": "b"}], ("`chosen`", "`rejected`")),
        ("dpo", [TEXTS, {"prompt": "a", "chosen": "b", "rejected": None}], ("row 1", "rejected", "None")),
        ("dpo", [{"prompt": "a ", "chosen": "b", "rejected": "b"}], ("both completions are the same",)),
        ("orpo", [CHATS, CHATS | {"rejected": [{"role": "assistant"}]}], ("row 1", "rejected", "content")),
        ("kto", [{"prompt": "a ", "completion": "b"}], ("`label`",)),
        ("kto", [{"prompt": "a ", "completion": "b", "label": "perhaps"}], ("row 0", "label", "perhaps")),
        ("reward", [{"text": "a"}], ("`text`", "`chosen`")),
        ("prm", [{"prompt": "a ", "completions": ["b", "c"], "labels": [True]}], ("row 0", "labels")),
        ("prm", [{"prompt": "a ", "completion": "b"}], ("`completions`",)),
    ],
)
def test_rows_that_cannot_be_read(
    capsys: pytest.CaptureFixture[str],
    tiny_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    rows: list[dict[str, Any]],
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "odd.jsonl", rows)
    said = told(capsys, command, "--model_name_or_path", tiny_path, "--dataset_name", "odd.jsonl", *FEW)
    assert said.startswith(f"trl {command}: ")
    for word in words:
        assert word in said, said


def test_a_file_that_is_no_json(
    capsys: pytest.CaptureFixture[str], tiny_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.jsonl").write_text('{"prompt": "a", "chosen": ')
    assert "odd.jsonl" in told(capsys, "dpo", "--model_name_or_path", tiny_path, "--dataset_name", "odd.jsonl", *FEW)


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_options_people_use(capsys: pytest.CaptureFixture[str], command: str) -> None:
    def options(flag: str) -> set[str]:
        with pytest.raises(SystemExit) as end:
            main([command, flag])
        assert end.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        return {line.split()[0][2:] for line in lines if line.startswith("  --")}

    few, every = options("--help"), options("--help-all")
    assert {"model_name_or_path", "dataset_name", "max_length", "use_peft", "learning_rate", "output_dir"} <= few
    assert ("packing" in few) is False and ("assistant_only_loss" in every) is False
    assert ("loss_type" in few) is (command in ("dpo", "kto", "cpo"))
    assert ("step_separator" in few) is (command == "prm")
    assert ("precompute_ref_log_probs" in few) is (command in ("dpo", "kto", "bco"))
    assert 20 <= len(few) <= 35 and len(every) > 150 and few < every
