"""Options without effect, numbers out of their range, and what a run lacks: each a sentence, before anything loads."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import trl
from tests.trainer.helpers import chat_rows
from trl import ModelConfig, notices, options
from trl.losses import policy, preference, reference_free

METHODS = (
    *("SFT", "DPO", "KTO", "ORPO", "CPO", "BCO", "Reward", "PRM", "GRPO", "RLOO", "PPO"),
    *("OnlineDPO", "XPO", "NashMD", "GKD", "Distillation", "MiniLLM", "IterativeSFT"),
)
CONFIGS = [getattr(trl, f"{name}Config") for name in METHODS]


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(notices, "_printed", set())
    monkeypatch.chdir(tmp_path)


def built(name: str, **settings: Any) -> Any:
    return getattr(trl, f"{name}Config")(output_dir="out", report_to="none", use_cpu=True, **settings)


# --- the tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CONFIGS, ids=METHODS)
def test_defaults_are_in_range_and_say_nothing(cls: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cls(output_dir="out", use_cpu=True)
    assert capsys.readouterr().out == ""


def test_the_tables_name_fields() -> None:
    names = {field.name for cls in (*CONFIGS, ModelConfig) for field in fields(cls)}
    assert set(options.LIMITS) <= names
    for cls in (*CONFIGS, ModelConfig):
        own = {field.name for field in fields(cls)}
        rows = options.rows_of(cls)
        assert set(rows) - own <= {"padding_free", "pad_to_multiple_of"}, "a base's rows that a method leaves out"
        assert {row.name for row in rows.values() if isinstance(row, options.Needs | options.Except)} <= own
    classes = {part.__name__ for cls in (*CONFIGS, ModelConfig) for part in cls.__mro__}
    assert set(options.UNUSED) <= classes


@pytest.mark.parametrize(
    ("cls", "name", "losses"),
    [
        ("DPOConfig", "label_smoothing", preference.LOSSES),
        ("DPOConfig", "discopop_tau", preference.LOSSES),
        ("CPOConfig", "label_smoothing", reference_free.LOSSES),
        ("CPOConfig", "simpo_gamma", reference_free.LOSSES),
        *(
            ("GRPOConfig", name, {loss: method.surrogate for loss, method in policy.POLICY_LOSSES.items()})
            for name in ("delta", "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_neg")
        ),
    ],
)
def test_the_losses_that_read_an_option(cls: str, name: str, losses: dict[str, Any]) -> None:
    row = options.UNUSED[cls][name]
    assert isinstance(row, options.Needs)
    reading = {loss for loss, function in losses.items() if name in inspect.signature(function).parameters}
    assert set(row.among) == reading


def test_divergences_that_read_their_coefficient() -> None:
    row = options.UNUSED["DPOConfig"]["f_alpha_divergence_coef"]
    reading = [
        n for n, f in preference.DIVERGENCES.items() if "f_alpha_divergence_coef" in inspect.signature(f).parameters
    ]
    assert isinstance(row, options.Needs) and list(row.among) == reading


def test_every_field_of_our_own_is_read_or_has_a_row() -> None:
    """A field that no line reads has no effect, and says so."""
    sources = [path.read_text() for path in Path(trl.__file__).parent.rglob("*.py")]
    text = "\n".join(sources)
    ours = {
        (cls, field.name)
        for cls in CONFIGS
        for part in cls.__mro__
        if part.__module__.startswith("trl") and hasattr(part, "__dataclass_fields__")
        for field in fields(part)
        if field.name in vars(part).get("__annotations__", {})
    }
    unread = {
        (cls.__name__, name)
        for cls, name in ours
        if not any(f"{holder}.{name}" in text for holder in ("args", "self", "config", "settings"))
        and f'"{name}"' not in text.replace(f'"{name}": ', "")
    }
    without_row = {(cls, name) for cls, name in unread if name not in options.rows_of(getattr(trl, cls))}
    assert without_row == set()


# --- what is said -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "sentence"),
    [
        ("SFT", {"packing_strategy": "wrapped"}, "packing_strategy='wrapped' has no effect without packing"),
        ("SFT", {"padding_free": True}, "padding_free=True has no effect here: flat rows are never padded"),
        (
            "SFT",
            {"pad_to_multiple_of": 8},
            "pad_to_multiple_of=8 has no effect here: flat rows have no padding, and padded rows are as wide as their "
            "longest",
        ),
        (
            "SFT",
            {"remove_unused_columns": True},
            "remove_unused_columns=True has no effect here: preprocessing keeps exactly the columns that training "
            "reads",
        ),
        (
            "DPO",
            {"logging_nan_inf_filter": True},
            "logging_nan_inf_filter=True has no effect here: a loss that is not finite stops the run and names the row",
        ),
        (
            "DPO",
            {"label_smoothing": 0.1, "loss_type": ["ipo", "sft"]},
            "label_smoothing=0.1 has no effect with loss_type=ipo + sft, only with sigmoid, exo_pair, robust, aot or "
            "aot_unpaired",
        ),
        ("DPO", {"ref_model_mixup_alpha": 0.3}, "ref_model_mixup_alpha=0.3 has no effect without sync_ref_model"),
        (
            "KTO",
            {"precompute_ref_batch_size": 2},
            "precompute_ref_batch_size=2 has no effect without precompute_ref_log_probs",
        ),
        (
            "KTO",
            {"label_smoothing_factor": 0.1},
            "label_smoothing_factor=0.1 has no effect here: only SFT smooths labels",
        ),
        (
            "CPO",
            {"loss_type": "alphapo", "cpo_alpha": 0.5},
            "cpo_alpha=0.5 has no effect with loss_type=alphapo, which sets it to 0",
        ),
        ("CPO", {"simpo_gamma": 1.0}, "simpo_gamma=1.0 has no effect with loss_type=sigmoid, only with simpo"),
        ("GRPO", {"max_refills": 3}, "max_refills=3 has no effect without dynamic_sampling"),
        ("GRPO", {"sync_ref_model": True}, "sync_ref_model=True has no effect without beta"),
        ("GRPO", {"epsilon_high": 0.3, "loss_type": "sapo"}, "epsilon_high=0.3 has no effect with this loss_type, only "
         "with grpo, bnpo, dr_grpo, dapo, luspo, gmpo or cispo"),
        (
            "GRPO",
            {"max_length": 64},
            "max_length=64 has no effect here: max_prompt_length cuts prompts, max_completion_length completions",
        ),
        ("RLOO", {"eval_steps": 5}, "eval_steps=5 has no effect with eval_strategy=no, only with steps"),
        (
            "RLOO",
            {"warmup_steps": 5, "lr_scheduler_type": "constant"},
            "warmup_steps=5 has no effect with lr_scheduler_type=constant: constant_with_warmup has a warmup",
        ),
        ("Reward", {"adam_beta2": 0.9, "optim": "sgd"}, "adam_beta2=0.9 has no effect with optim=sgd"),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_said(
    method: str, settings: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    built(method, **settings)
    assert capsys.readouterr().out == f"trl: {sentence}\n"
    built(method, **settings)
    assert capsys.readouterr().out == "", "once"


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("SFT", {"packing": True, "packing_strategy": "wrapped", "label_smoothing_factor": 0.1}),
        ("SFT", {"eval_packing": True, "packing_strategy": "wrapped"}),
        ("DPO", {"label_smoothing": 0.1, "loss_type": ["ipo", "robust"]}),
        ("DPO", {"label_smoothing": 0.1, "loss_type": max}),  # a function of the user's own may read it
        ("GRPO", {"loss_type": "cispo", "epsilon": 0.1, "epsilon_high": 4.0}),
        ("GRPO", {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "beta": 0.1, "sync_ref_model": True}),
        ("GRPO", {"eval_strategy": "steps", "eval_steps": 5, "dynamic_sampling": True, "max_refills": 2}),
    ],
)
def test_an_option_with_effect_is_not(
    method: str, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    built(method, **settings)
    assert capsys.readouterr().out == ""


# --- the adapter ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "implied", "sentence"),
    [
        ({}, False, ""),
        ({"use_peft": True, "lora_r": 8}, True, ""),
        (
            {"lora_r": 8, "use_dora": True},
            True,
            "lora_r=8, use_dora=True: an adapter is trained, as with use_peft=True (use_peft=False: all weights)",
        ),
        (
            {"lora_target_modules": ["q_proj"]},
            True,
            "lora_target_modules=['q_proj']: an adapter is trained, as with use_peft=True (use_peft=False: all "
            "weights)",
        ),
        ({"lora_r": 8, "use_peft": False}, False, "lora_r=8 has no effect with use_peft=False"),
        ({"bnb_4bit_quant_type": "fp4"}, False, "bnb_4bit_quant_type='fp4' has no effect without load_in_4bit"),
    ],
)
def test_an_option_of_the_adapter_asks_for_one(
    settings: dict[str, Any], implied: bool, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelConfig(**settings)
    assert model.use_peft is implied
    assert (trl.get_peft_config(model) is not None) is implied
    assert capsys.readouterr().out == (f"trl: {sentence}\n" if sentence else "")


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"per_device_train_batch_size": 0},
            "per_device_train_batch_size=0 is not possible: give a whole number, 1 or more",
        ),
        (
            {"gradient_accumulation_steps": -1},
            "gradient_accumulation_steps=-1 is not possible: give a whole number, 1 or more",
        ),
        ({"num_iterations": 1.5}, "num_iterations=1.5 is not possible: give a whole number, 1 or more"),
        ({"learning_rate": -1e-5}, "learning_rate=-1e-05 is not possible: give a number, 0 or more"),
        ({"learning_rate": float("nan")}, "learning_rate=nan is not possible: give a number, 0 or more"),
        (
            {"max_steps": -5},
            "max_steps=-5 is not possible: give a whole number, -1 or more (-1 leaves it to num_train_epochs)",
        ),
        ({"top_p": 0.0}, "top_p=0.0 is not possible: give a number, above 0, at most 1"),
        ({"top_k": -1}, "top_k=-1 is not possible: give a whole number, 0 or more (0 samples from all tokens)"),
        ({"temperature": 0.0}, "temperature=0.0 is not possible: give a number, above 0"),
        ({"max_completion_length": 0}, "max_completion_length=0 is not possible: give a whole number, 1 or more"),
    ],
)  # fmt: skip
def test_a_number_out_of_its_range(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        built("GRPO", **settings)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lora_r": 0}, "lora_r=0 is not possible: give a whole number, 1 or more"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 is not possible: give a number, 0 or more, below 1"),
    ],
)
def test_a_number_of_the_adapter_out_of_its_range(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        ModelConfig(**settings)
    assert str(error.value) == sentence


# --- what a trainer is given: nothing of a model `nowhere` is looked for ----------------------------------------------


def test_an_absent_tracker() -> None:
    settings = trl.SFTConfig(output_dir="out", use_cpu=True, report_to="wandb")
    with pytest.raises(ImportError) as error:
        trl.SFTTrainer("nowhere", settings, train_dataset=chat_rows(2))
    assert str(error.value) == (
        "report_to='wandb' needs the package wandb, which is not installed: pip install wandb, or leave it out "
        "(report_to='none')"
    )
    settings.report_to = ["wanbd"]
    with pytest.raises(ValueError, match="report_to='wanbd' is not one of azure_ml, clearml, "):
        trl.SFTTrainer("nowhere", settings, train_dataset=chat_rows(2))


def test_options_that_wait_for_what_the_trainer_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    settings = built("SFT", per_device_eval_batch_size=2, batch_eval_metrics=True)
    assert capsys.readouterr().out == ""
    given = {"eval_dataset": None, "compute_metrics": None}
    assert options.unused_by_trainer(settings, given) == [
        "per_device_eval_batch_size=2 has no effect without eval_dataset: eval_strategy says when to evaluate on it",
        "batch_eval_metrics=True has no effect without compute_metrics",
    ]
    assert options.unused_by_trainer(settings, {"eval_dataset": [], "compute_metrics": min}) == []
    with pytest.raises(ValueError):
        trl.SFTTrainer("./nowhere", settings, train_dataset=chat_rows(2))
    assert "trl: per_device_eval_batch_size=2 has no effect without eval_dataset" in capsys.readouterr().out


def judge(completions: Any, solution: Any, level: Any = None, **others: Any) -> list[float]:
    return [0.0] * len(completions)


async def waits(completions: Any, solution: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
@pytest.mark.parametrize(
    ("functions", "rows", "sentence"),
    [
        (
            judge,
            [{"prompt": "a", "solutoin": "b"}],
            "reward function 'judge': it requires `solution`, and the data have no such column (did you mean "
            "`solutoin`?). Their columns: `solutoin`; it may",
        ),
        (
            [waits],
            [{"prompt": "a"}],
            "reward function 'waits': it requires `solution`, and the data have no such column. ",
        ),
        ("accuracy_reward", [{"prompt": "a"}], "reward function 'accuracy_reward': it requires `solution`, and "),
    ],
)
def test_a_column_that_a_reward_function_lacks(method: str, functions: Any, rows: Any, sentence: str) -> None:
    trainer = getattr(trl, f"{method}Trainer")
    with pytest.raises(ValueError) as error:
        trainer("nowhere", functions, built(method), train_dataset=rows)
    assert str(error.value).startswith(sentence)
    # So do the rows of an evaluation.
    whole = [{"prompt": "a", "solution": "b"}]
    with pytest.raises(ValueError) as error:
        trainer("nowhere", functions, built(method), train_dataset=whole, eval_dataset={"one": whole, "two": rows})
    assert str(error.value).startswith(sentence)
