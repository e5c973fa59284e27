"""Each row of the table: the older word is accepted, moved, passed over or refused as the row says, and said once."""

import copy
import os
import pickle
from dataclasses import MISSING, dataclass, field, fields

import pytest

import trl
from trl import (
    BCOConfig,
    CPOConfig,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    ORPOConfig,
    PRMConfig,
    RewardConfig,
    RLOOConfig,
    notices,
)
from trl.compat.arguments import rows_of, translate
from trl.compat.table import ARGUMENTS, NAMES, ArgumentError, InConfig, Now, Refused
from trl.config import BaseConfig, ModelConfig, ScriptArguments
from trl.trainer.sft import SFTConfig

# An older argument with a value that asks for something -> what it is in today's words.
MEANS = {
    "evaluation_strategy": ("steps", {"eval_strategy": "steps"}),
    "warmup_ratio": (0.05, {"warmup_steps": 0.05}),
    "no_cuda": (True, {"use_cpu": True}),
    "per_gpu_train_batch_size": (3, {"per_device_train_batch_size": 3}),
    "per_gpu_eval_batch_size": (5, {"per_device_eval_batch_size": 5}),
    "adafactor": (True, {"optim": "adafactor"}),
    "group_by_length": (True, {"train_sampling_strategy": "group_by_length"}),
    "include_inputs_for_metrics": (True, {"include_for_metrics": ["inputs"]}),
    "push_to_hub_token": ("secret", {"hub_token": "secret"}),
    "push_to_hub_model_id": ("me/it", {"hub_model_id": "me/it"}),
    "push_to_hub_organization": ("we", {"hub_model_id": "we/out"}),
    "torchdynamo": ("eager", {"torch_compile_backend": "eager"}),
    "tpu_metrics_debug": (True, {"debug": "tpu_metrics_debug"}),
    "xpu_backend": ("gloo", {"ddp_backend": "gloo"}),
    "dispatch_batches": (False, {"accelerator_config": {"dispatch_batches": False}}),
    "split_batches": (True, {"accelerator_config": {"split_batches": True}}),
    "fsdp_min_num_params": (7, {"fsdp_config": {"min_num_params": 7}}),
    "fsdp_transformer_layer_cls_to_wrap": ("Block", {"fsdp_config": {"transformer_layer_cls_to_wrap": "Block"}}),
    "activation_checkpointing": (False, {"gradient_checkpointing": False}),
    "activation_checkpointing_kwargs": ({"use_reentrant": False},) * 2,
    "past_index": (0, None),
    "sharded_ddp": ("simple", None),
    "max_seq_length": (2048, {"max_length": 2048}),
    "use_liger": (True, {"use_liger_kernel": True}),
    "torch_dtype": ("bfloat16", {"dtype": "bfloat16"}),
    "wandb_log_unique_prompts": (True, {"log_unique_prompts": True}),
    "use_transformers_paged": (True, {"use_transformers_continuous_batching": True}),
    "vllm_importance_sampling_cap": (2.0, {"vllm_importance_sampling_clip_max": 2.0}),
    "kl_coef": (0.3, {"beta": 0.3}),
    "rloo_k": (4, {"num_generations": 4}),
    "cliprange": (0.3, {"epsilon": 0.3}),
    "response_length": (53, {"max_completion_length": 53}),
    "num_ppo_epochs": (4, {"num_iterations": 4}),
    "normalize_advantage": (True, {"normalize_advantages": True}),
    "num_mini_batches": (2, {"steps_per_generation": 2}),
    "stop_token_id": (7, {"generation_kwargs": {"eos_token_id": 7}}),
}
# Built, these would set the environment of every later test (process groups, compilers).
ONLY_TRANSLATED = {"xpu_backend", "torchdynamo", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"}
CONFIGS = {"BaseConfig": SFTConfig, "SFTConfig": SFTConfig, "ModelConfig": ModelConfig,
           "ScriptArguments": ScriptArguments, "PreferenceFields": RewardConfig, "ReferenceFields": DPOConfig,
           "DPOConfig": DPOConfig, "KTOConfig": KTOConfig, "OnlineConfig": GRPOConfig, "GRPOConfig": GRPOConfig,
           "RLOOConfig": RLOOConfig}  # fmt: skip
ROWS = [(CONFIGS[name], old, row) for name in CONFIGS for old, row in ARGUMENTS[name].items()]
# Fields of each config in the last release before they were renamed or removed, beside those that it still has. Each
# is a row of the table, or a field here.
REFERENCED = (
    "base_model_attribute_name ref_model_init_kwargs use_liger_loss model_adapter_name ref_adapter_name".split()
)
JUDGED = "label_pad_token_id padding_value is_encoder_decoder max_prompt_length max_completion_length".split()
REMOVED = {
    DPOConfig: [
        *(JUDGED + REFERENCED),
        *("max_target_length", "use_num_logits_to_keep", "use_logits_to_keep", "tools", "force_use_ref_model"),
        *("generate_during_eval", "reference_free", "rpo_alpha", "padding_free", "discopop_tau"),
    ],
    KTOConfig: [
        *(JUDGED + REFERENCED),
        *("truncation_mode", "generate_during_eval", "prompt_sample_size", "min_density_ratio", "max_density_ratio"),
    ],
    BCOConfig: [*JUDGED, "truncation_mode", "generate_during_eval", "ref_model_init_kwargs", "prompt_sample_size"],
    ORPOConfig: [*JUDGED, "truncation_mode", "generate_during_eval"],
    CPOConfig: [*JUDGED, "truncation_mode", "generate_during_eval", "label_smoothing", "simpo_gamma", "cpo_alpha"],
    RewardConfig: ["remove_unused_columns", "average_tokens_across_devices", "center_rewards_coefficient"],
    PRMConfig: ["max_prompt_length", "max_completion_length", "step_separator", "train_on_last_step_only"],
}


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch, tmp_path):
    monkeypatch.setattr(notices, "_printed", set())
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)


def built(cls, **arguments):
    return cls(**({"output_dir": "out"} if issubclass(cls, BaseConfig) else {}), **arguments)


def values(instance):
    return {each.name: getattr(instance, each.name) for each in fields(instance)}


def accepted(cls):
    return {each.name for each in fields(cls) if each.init}


@pytest.mark.parametrize(("cls", "old", "row"), ROWS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_row_does_what_it_says(cls, old, row, capsys):
    if old in accepted(cls):
        assert old.startswith("activation_checkpointing")  # only a newer name may be both
        return
    value, today = MEANS.get(old, (True, {}))
    if old in ONLY_TRANSLATED:
        assert translate(cls, {old: value}, accepted(cls)) == (today, {})
        assert capsys.readouterr().out == f"trl: {row.sentence(old)}\n"
        return
    if isinstance(row, Refused):
        with pytest.raises(ArgumentError, match=f"`{old}` is gone: "):
            built(cls, **{old: value})
    else:
        assert values(built(cls, **{old: value})) == values(built(cls, **today))
        if isinstance(row, Now):
            assert values(built(cls, **today)) != values(built(cls)), "the example asks for nothing"
        # A notice that the option has no effect in this combination may follow.
        said = [
            line for line in capsys.readouterr().out.splitlines() if "=" not in line or "has no effect w" not in line
        ]
        assert said == [f"trl: {row.sentence(old)}"]
        built(cls, **{old: value})
    for nothing in row.nothing:
        assert values(built(cls, **{old: nothing})) == values(built(cls))
    if not isinstance(row, Refused):
        assert capsys.readouterr().out == "", "it has been said"


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name.endswith("Trainer")])
def test_what_moved_into_the_config_names_a_field(name):
    if name == "BaseTrainer":
        return
    for old, row in ARGUMENTS[name].items():
        if isinstance(row, InConfig):
            assert row.name in accepted(getattr(trl, name).config_class), old


@pytest.mark.parametrize(("cls", "old"), [(cls, old) for cls, words in REMOVED.items() for old in words])
def test_what_a_config_once_had_is_known(cls, old):
    assert old in accepted(cls) or old in rows_of(cls)


def test_every_row_has_versions():
    for rows in ARGUMENTS.values():
        for old, row in rows.items():
            assert row.versions.split()[0] in ("trl", "transformers"), old


def test_the_checkpointing_arguments_of_newer_transformers_have_a_name_everywhere():
    today, _ = translate(SFTConfig, {"activation_checkpointing": False}, {"gradient_checkpointing"})
    assert today == {"gradient_checkpointing": False}


def test_warmup():
    assert built(SFTConfig, warmup_ratio=0.1).get_warmup_steps(31) == 4
    assert built(SFTConfig, warmup_ratio=1.0).get_warmup_steps(31) == 31
    assert built(SFTConfig, warmup_ratio=0.1, warmup_steps=5).get_warmup_steps(31) == 5
    assert built(SFTConfig, warmup_ratio=0.1, warmup_steps=0).get_warmup_steps(31) == 4
    with pytest.raises(ValueError, match="between 0 and 1"):
        built(SFTConfig, warmup_ratio=3)


def test_what_is_merged():
    settings = built(SFTConfig, accelerator_config={"even_batches": False}, dispatch_batches=True, split_batches=True)
    made = settings.accelerator_config
    assert (made.even_batches, made.dispatch_batches, made.split_batches) == (False, True, True)
    with pytest.raises(ArgumentError, match="both are given"):
        built(SFTConfig, accelerator_config="some.json", dispatch_batches=True)
    together = {"push_to_hub_organization": "we", "push_to_hub_model_id": "it"}
    assert built(SFTConfig, **together).hub_model_id == "we/it"
    assert built(SFTConfig, **dict(reversed(together.items()))).hub_model_id == "we/it"


def test_logging_dir_reaches_tensorboard():
    built(SFTConfig, logging_dir="here")
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "here"


def test_older_values(capsys):
    assert built(SFTConfig, optim="adamw_hf").optim == "adamw_torch"
    assert built(SFTConfig, loss_type=None).loss_type == "nll"
    assert built(SFTConfig, dataset_text_field=None).dataset_text_field == "text"
    assert built(SFTConfig, report_to=None).report_to == []
    assert capsys.readouterr().out.splitlines()[0] == "trl: optim='adamw_hf' is 'adamw_torch' today"
    given = {"torch_dtype": "bfloat16", "revision": "x"}
    assert built(SFTConfig, model_init_kwargs=given).model_init_kwargs == {"dtype": "bfloat16", "revision": "x"}
    assert "torch_dtype" in given, "what the caller holds is left alone"


def test_older_names_of_losses(capsys):
    assert built(DPOConfig, loss_type="aot_pair").loss_type == ["aot_unpaired"]
    assert built(DPOConfig, loss_type=["sigmoid", "aot_pair"]).loss_type == ["sigmoid", "aot_unpaired"]
    assert capsys.readouterr().out == "trl: loss_type='aot_pair' is 'aot_unpaired' today\n"
    for cls in (DPOConfig, CPOConfig):
        with pytest.raises(ArgumentError) as error:
            built(cls, loss_type="kto_pair")
        sentence = "`loss_type=kto_pair` is gone: train with KTOTrainer, which reads pairs as two rows each"
        assert str(error.value) == f"{cls.__name__}: {sentence}"
    with pytest.raises(ArgumentError, match="`loss_type=bco` is gone: train with BCOTrainer"):
        built(KTOConfig, loss_type="bco")
    assert built(DPOConfig, loss_type=min).loss_type == [min], "a function is no word"


def test_divergences_by_their_older_constants():
    for constant in trl.FDivergenceType:
        settings = built(DPOConfig, f_divergence_type=constant)
        assert settings.f_divergence_type == constant.value
        assert settings.to_dict()["f_divergence_type"] == constant.value


def test_both_names_of_one_argument():
    assert built(SFTConfig, max_length=8, max_seq_length=8).max_length == 8
    with pytest.raises(ArgumentError, match="max_length=8 and max_seq_length=9 are the same argument"):
        built(SFTConfig, max_length=8, max_seq_length=9)


@pytest.mark.parametrize(
    ("cls", "word", "end"),
    [
        (SFTConfig, "max_lenght", "SFTConfig has no argument `max_lenght`; did you mean `max_length`?"),
        (SFTConfig, "max_seq_lenght", "; did you mean `max_length`?"),
        (SFTConfig, "learningrate", "; did you mean `learning_rate`?"),
        (DPOConfig, "loss_typ", "DPOConfig has no argument `loss_typ`; did you mean `loss_type`?"),
        (ORPOConfig, "lambda_", "ORPOConfig has no argument `lambda_`"),
        (SFTConfig, "zzz", "SFTConfig has no argument `zzz`"),
        (ModelConfig, "lora_rank", "; did you mean `lora_r`?"),
        (ModelConfig, "max_seq_length", "ModelConfig has no argument `max_seq_length`"),
        (ScriptArguments, "dataset_nam", "; did you mean `dataset_name`?"),
    ],
)
def test_an_unknown_argument_is_an_error_with_the_nearest_name(cls, word, end):
    with pytest.raises(TypeError) as error:
        cls(**{word: 1})
    assert str(error.value).endswith(end)
    assert isinstance(error.value, ValueError)  # what a command tells without a traceback


def test_attributes_under_older_names(capsys):
    settings = built(SFTConfig, max_length=9)
    assert settings.max_seq_length == 9
    settings.max_seq_length = 10
    assert settings.max_length == 10
    assert capsys.readouterr().out == "trl: `max_seq_length` is `max_length` today\n"
    assert not hasattr(settings, "warmup_ratio") and not hasattr(SFTConfig, "max_seq_length")
    with pytest.raises(AttributeError):
        settings.maximal_length  # noqa: B018


def test_a_config_is_still_a_dataclass():
    settings = built(SFTConfig, max_seq_length=7, report_to="none")
    for twin in (copy.deepcopy(settings), pickle.loads(pickle.dumps(settings))):
        assert values(twin) == values(settings)
    assert SFTConfig("here").output_dir == "here"
    with pytest.raises(TypeError, match="multiple values"):
        SFTConfig("here", output_dir="there")


def test_subclasses_of_a_user():
    @dataclass
    class Mine(SFTConfig):
        weight: float = 1.0
        max_seq_length: int = field(default=3)

    mine = Mine(output_dir="out", evaluation_strategy="no", weight=2.0, max_seq_length=5)
    assert (mine.weight, mine.max_seq_length, mine.max_length) == (2.0, 5, None), "the user's own field is the user's"
    with pytest.raises(ArgumentError, match="Mine has no argument `wieght`; did you mean `weight`?"):
        Mine(wieght=1)
    assert {each.name: each.default for each in fields(Mine)}["weight"] is not MISSING


@pytest.mark.parametrize("word", ["true", "TRUE", "1", "yes"])
@pytest.mark.parametrize(
    ("asked", "left"),
    [("wandb", []), (["wandb", "tensorboard"], ["tensorboard"]), ("none", []), ("mlflow", ["mlflow"])],
)
def test_wandb_disabled(word, asked, left, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_DISABLED", word)
    assert built(SFTConfig, report_to=asked).report_to == left
    assert ("WANDB_DISABLED is set" in capsys.readouterr().out) == ("wandb" in asked)


def test_wandb_not_disabled(monkeypatch):
    monkeypatch.setenv("WANDB_DISABLED", "false")
    assert built(SFTConfig, report_to="wandb").report_to == ["wandb"]


def test_mini_batches_of_the_older_rloo():
    assert built(RLOOConfig, num_mini_batches=2, gradient_accumulation_steps=3).steps_per_generation == 6
    assert built(RLOOConfig, num_mini_batches=1, gradient_accumulation_steps=3).steps_per_generation is None


@pytest.mark.parametrize(
    ("word", "value", "sentence"),
    [
        ("total_episodes", 100, "it counted completions; max_steps or num_train_epochs says when training ends"),
        (
            "sft_model_path",
            "x",
            "pass the policy as the trainer's model (on the command line --model_name_or_path)",
        ),
        (
            "reward_model_path",
            "x",
            "pass the reward model among reward_funcs (on the command line --reward_model_name_or_path)",
        ),
        ("normalize_reward", True, "normalize_advantages=True gives advantages mean 0 and deviation 1"),
    ],
)
def test_what_the_older_rloo_had_and_is_gone(word, value, sentence):
    with pytest.raises(ArgumentError) as error:
        built(RLOOConfig, **{word: value})
    assert str(error.value) == f"RLOOConfig: `{word}` is gone: {sentence}"


@pytest.mark.parametrize(
    ("word", "value", "sentence"),
    [
        ("non_eos_penalty", True, "missing_eos_penalty is subtracted from the score"),
        ("sanity_check", True, "train on a slice of the rows"),
        ("base_model", "gpt2", "pass the policy as the trainer's model"),
    ],
)
def test_what_the_older_ppo_had_and_is_gone(word, value, sentence):
    with pytest.raises(ArgumentError, match=f"`{word}` is gone: {sentence}"):
        trl.PPOv2Config("out", **{word: value})


def test_what_the_older_ppo_computed(capsys):
    assert values(trl.PPOConfig("out", world_size=4)) == values(trl.PPOConfig("out"))
    assert "`world_size` has no effect: the launcher says how many processes there are" in capsys.readouterr().out


def test_arguments_of_the_older_rloo_trainer(capsys):
    names = {"model", "args", "ref_model", "reward_funcs"}
    older = {"config": 1, "policy": 2, "ref_policy": 3, "reward_model": 4, "data_collator": None}
    assert translate(trl.RLOOTrainer, older, names) == (
        {"args": 1, "model": 2, "ref_model": 3, "reward_funcs": 4},
        {},
    )
    assert capsys.readouterr().out.splitlines() == [
        "trl: `config` is `args` today",
        "trl: `policy` is `model` today",
        "trl: `ref_policy` is `ref_model` today",
        "trl: `reward_model` is `reward_funcs` today",
    ]
    with pytest.raises(ArgumentError, match="RLOOTrainer: `data_collator` is gone: prompts are read from"):
        translate(trl.RLOOTrainer, {"data_collator": min}, names)
    for word in ("embedding_func", "embedding_tokenizer"):
        with pytest.raises(ArgumentError, match=f"KTOTrainer: `{word}` is gone: it weighed .* BCOTrainer's today"):
            translate(trl.KTOTrainer, {word: min}, names)


def test_what_asks_for_nothing_says_nothing(capsys):
    built(GRPOConfig, use_vllm=False, vllm_mode=None, cast_lm_head_to_fp32=False)
    built(DPOConfig, tools=None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("word", ["response_length", "token_level_kl", "exp_name"])
def test_a_hint_is_near(word):
    with pytest.raises(TypeError) as error:
        built(SFTConfig, **{word: 1})
    assert str(error.value) == f"SFTConfig has no argument `{word}`"


def test_the_table_is_of_public_names():
    assert set(NAMES.values()) <= set(trl.__all__)
