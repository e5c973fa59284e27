"""Scripts of every era, as they were written, with a tiny model: constructor styles, and the flag nobody parses."""

import sys
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainingArguments

from tests.trainer.helpers import WORDS, chat_rows, labelled_rows, pair_rows, tiny, tiny_scorer
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    ORPOConfig,
    ORPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    notices,
)
from trl.compat import arguments
from trl.compat.arguments import resume_flag
from trl.compat.table import ArgumentError

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
SHORT = {**QUIET, "max_steps": 1, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(notices, "_printed", set())
    monkeypatch.setattr(arguments, "_flag_is_open", True)
    monkeypatch.setattr(sys, "argv", ["sft_train.py"])
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    monkeypatch.chdir(tmp_path)


def texts(count=6):
    return Dataset.from_list([{"text": " ".join(WORDS[: 3 + number])} for number in range(count)])


def chats(count=6):
    return Dataset.from_list(chat_rows(count))


def existing(**settings):
    """Those of the settings that the config has; the others are for when it has them."""
    names = {each.name for each in fields(SFTConfig)}
    return {name: value for name, value in settings.items() if name in names}


def trained(trainer):
    trainer.train()
    assert trainer.state.global_step == 1
    return trainer


def test_0_7(tokenizer):
    trainer = SFTTrainer(
        tiny(tokenizer),
        args=TrainingArguments(output_dir="out", learning_rate=3e-4, **SHORT),
        train_dataset=texts(),
        dataset_text_field="text",
        max_seq_length=8,
        tokenizer=tokenizer,
        infinite=False,
        num_of_sequences=1024,
        chars_per_token=3.6,
        neftune_noise_alpha=5,
        **existing(packing=False),
    )
    assert isinstance(trainer.args, SFTConfig)
    assert (trainer.args.learning_rate, trainer.args.max_length) == (3e-4, 8)
    assert trainer.args.neftune_noise_alpha == 5
    assert not trainer.args.gradient_checkpointing, "as plain TrainingArguments have it"
    assert trained(trainer).tokenizer is tokenizer


def test_0_7_without_args(tokenizer):
    trainer = SFTTrainer(
        tiny(tokenizer), train_dataset=texts(), tokenizer=tokenizer, dataset_text_field="text", max_seq_length=8
    )
    assert trainer.args.max_length == 8


def test_0_9(tokenizer):
    args = SFTConfig(
        output_dir="out",
        max_seq_length=16,
        dataset_text_field="text",
        evaluation_strategy="no",
        dataset_batch_size=1000,
        num_of_sequences=1024,
        chars_per_token=3.6,
        overwrite_output_dir=True,
        **existing(packing=False),
        **SHORT,
    )
    trainer = SFTTrainer(tiny(tokenizer), args, None, texts(), None, tokenizer)
    assert trained(trainer).args.max_length == 16


def test_0_12(tokenizer):
    args = SFTConfig(output_dir="out", max_seq_length=16, use_liger=False, save_safetensors=True, **SHORT)
    trained(SFTTrainer(model=tiny(tokenizer), args=args, train_dataset=chats(), tokenizer=tokenizer))


def test_0_16(tiny_path):
    trained(SFTTrainer(
        model=tiny_path,
        args=SFTConfig("out", max_length=32, model_init_kwargs={"torch_dtype": torch.float32}, **SHORT),
        train_dataset=chats(),
    ))  # fmt: skip


def test_0_20(tiny_path):
    more = existing(packing=True, packing_strategy="bfd", padding_free=False, eos_token="<|im_end|>")
    trained(SFTTrainer(tiny_path, SFTConfig("out", max_length=64, **more, **SHORT), train_dataset=chats()))


def test_0_29(tiny_path):
    args = SFTConfig("out", assistant_only_loss=True, warmup_ratio=0.1, gradient_checkpointing=False, **SHORT)
    trained(SFTTrainer(model=tiny_path, args=args, train_dataset=chats(), eval_dataset=chats(2)))


def test_1(tiny_path):
    args = SFTConfig("out", truncation_mode="keep_start", loss_type="nll", warmup_steps=0.1, **SHORT)
    trained(SFTTrainer(model=tiny_path, args=args, train_dataset=chats()))


def test_as_todays_words(tokenizer):
    """The older call and today's train the same numbers."""

    def run(**arguments):
        torch.manual_seed(0)
        return trained(SFTTrainer(tiny(tokenizer), train_dataset=texts(), **arguments)).state.log_history[0]["loss"]

    old = run(args=SFTConfig("old", **SHORT), tokenizer=tokenizer, max_seq_length=5, dataset_text_field="text")
    new = run(args=SFTConfig("new", max_length=5, **SHORT), processing_class=tokenizer)
    assert old == new
    assert old != run(args=SFTConfig("new", **SHORT), processing_class=tokenizer)


# --- preferences ----------------------------------------------------------------------------------------------------


def pairs(count=6):
    return Dataset.from_list(pair_rows(count))


def test_dpo_0_7(tokenizer, capsys):
    trainer = DPOTrainer(
        tiny(tokenizer),
        tiny(tokenizer),
        args=TrainingArguments(output_dir="out", learning_rate=5e-5, remove_unused_columns=False, **SHORT),
        beta=0.3,
        loss_type="hinge",
        label_smoothing=0,
        max_length=64,
        max_prompt_length=32,
        max_target_length=32,
        label_pad_token_id=-100,
        padding_value=0,
        truncation_mode="keep_end",
        is_encoder_decoder=False,
        precompute_ref_log_probs=False,
        generate_during_eval=False,
        train_dataset=pairs(),
        tokenizer=tokenizer,
        peft_config=None,
    )
    args = trainer.args
    assert isinstance(args, DPOConfig)
    assert (args.learning_rate, args.beta, args.loss_type) == (5e-5, 0.3, ["hinge"])
    assert (args.max_length, args.max_prompt_length, args.truncation_mode) == (64, 32, "keep_end")
    # Of the hinge loss at its start.
    assert trained(trainer).state.log_history[0]["loss"] == pytest.approx(1, abs=1e-6)
    said = capsys.readouterr().out
    assert said.count("trl: `beta` is set in the trainer's config today, as `beta`\n") == 1
    assert "trl: `max_target_length` has no effect: " in said


def test_dpo_0_7_without_args(tokenizer):
    trainer = DPOTrainer(tiny(tokenizer), train_dataset=pairs(), tokenizer=tokenizer, beta=0.2, max_prompt_length=8)
    assert (trainer.args.beta, trainer.args.max_prompt_length) == (0.2, 8)


def test_dpo_0_9(tokenizer):
    """A config, and beside it arguments of the trainer, which were stronger."""
    args = DPOConfig("out", beta=0.1, label_pad_token_id=-100, f_divergence_type="js_divergence", **SHORT)
    trainer = DPOTrainer(
        tiny(tokenizer), None, beta=0.4, loss_type="hinge", args=args, train_dataset=pairs(), tokenizer=tokenizer
    )
    assert trainer.args is args
    assert (args.beta, args.loss_type, args.f_divergence_type) == (0.4, ["hinge"], "js_divergence")
    trained(trainer)


def test_dpo_0_9_contradicts_itself(tokenizer):
    args = DPOConfig("out", f_divergence_type="js_divergence", **SHORT)
    with pytest.raises(ValueError, match="does not go with loss_type nca_pair"):
        DPOTrainer(tiny(tokenizer), args=args, loss_type="nca_pair", train_dataset=pairs(), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("word", "value", "remedy"),
    [
        ("is_encoder_decoder", True, "train a causal language model"),
        ("ref_adapter_name", "reference", "pass a model with it as ref_model"),
        ("model_adapter_name", "train", "the active adapter trains"),
        ("ref_model_init_kwargs", {"torch_dtype": "bfloat16"}, "load the reference with from_pretrained"),
        ("loss_type", "kto_pair", "train with KTOTrainer"),
    ],
)
def test_dpo_what_is_refused(tokenizer, word, value, remedy):
    with pytest.raises(ArgumentError, match=remedy):
        DPOTrainer(tiny(tokenizer), train_dataset=pairs(), tokenizer=tokenizer, **{word: value})


def test_dpo_0_28(tiny_path):
    more = {"use_logits_to_keep": True, "padding_free": True, "tools": None, "base_model_attribute_name": "model"}
    args = DPOConfig("out", max_prompt_length=32, loss_type=["sigmoid", "bco_pair"], **more, **SHORT)
    trained(DPOTrainer(tiny_path, args=args, train_dataset=pairs()))


def test_kto_0_9(tokenizer):
    args = KTOConfig("out", max_length=64, max_completion_length=32, desirable_weight=1.2, padding_value=0, **SHORT)
    rows = Dataset.from_list(labelled_rows(6))
    model, reference = tiny(tokenizer), tiny(tokenizer)
    trained(
        KTOTrainer(
            model,
            reference,
            args=args,
            train_dataset=rows,
            tokenizer=tokenizer,
            peft_config=None,
            ref_adapter_name=None,
        )
    )


def test_orpo_0_8(tokenizer):
    args = ORPOConfig("out", max_length=64, max_prompt_length=32, beta=0.2, is_encoder_decoder=False, **SHORT)
    trained(ORPOTrainer(model=tiny(tokenizer), args=args, train_dataset=pairs(), tokenizer=tokenizer))


def test_reward_0_7(tokenizer):
    trainer = RewardTrainer(
        model=tiny_scorer(tokenizer),
        args=TrainingArguments(output_dir="out", remove_unused_columns=False, **SHORT),
        tokenizer=tokenizer,
        train_dataset=pairs(),
        max_length=64,
    )
    assert isinstance(trainer.args, RewardConfig) and trained(trainer).args.max_length == 64


# --- the guide, and what else a trainer is told ---------------------------------------------------------------------


def test_the_guide(tokenizer, monkeypatch, capsys):
    """`sft_train.py` of the guide from its config on; its model and data are stood in for."""
    peft = pytest.importorskip("peft")
    monkeypatch.setenv("WANDB_DISABLED", "true")
    lora_config = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    training_config = SFTConfig(
        output_dir="./sft_output",
        num_train_epochs=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=2e-4,
        warmup_ratio=0.05,
        lr_scheduler_type="cosine",
        fp16=False,
        bf16=True,
        max_seq_length=2048,
        dataset_text_field="messages",
        logging_steps=10,
        save_steps=100,
        save_total_limit=3,
        push_to_hub=False,
        report_to="wandb",
    )
    trainer = SFTTrainer(
        model=tiny(tokenizer),
        args=training_config,
        train_dataset=chats(8),
        peft_config=lora_config,
        tokenizer=tokenizer,
    )
    trainer.train()
    trainer.save_model("./sft_final")
    assert trainer.state.global_step == 3
    said = [line for line in capsys.readouterr().out.splitlines() if "today" in line or "WANDB" in line]
    assert len(said) == len(set(said)) == 4, said


# --- trainers: errors, subclasses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("train_datset", "SFTTrainer has no argument `train_datset`; did you mean `train_dataset`?"),
        ("learning_rate", "SFTTrainer has no argument `learning_rate`; set it in SFTConfig"),
        ("learnin_rate", "SFTTrainer has no argument `learnin_rate`; did you mean `learning_rate` of SFTConfig?"),
        ("tokeniser", "SFTTrainer has no argument `tokeniser`; did you mean `processing_class`?"),
        ("model_init", "SFTTrainer: `model_init` is gone: pass the model itself: model=model_init()"),
    ],
)
def test_unknown_arguments_of_a_trainer(word, sentence):
    with pytest.raises(ArgumentError) as error:
        SFTTrainer("nothing", **{word: 1})
    assert str(error.value) == sentence


def test_subclasses_of_a_trainer(tokenizer):
    class Open(SFTTrainer):
        def __init__(self, *args, extra, **kwargs):
            super().__init__(*args, **kwargs)
            self.extra = extra

    class Closed(SFTTrainer):
        def __init__(self, model, rows, tokenizer):
            super().__init__(
                model, SFTConfig("out", **SHORT), train_dataset=rows, tokenizer=tokenizer, max_seq_length=9
            )

    trainer = Open(tiny(tokenizer), SFTConfig("out", **SHORT), train_dataset=texts(), tokenizer=tokenizer, extra=3)
    assert trainer.processing_class is tokenizer and trainer.extra == 3
    assert Closed(tiny(tokenizer), texts(), tokenizer).args.max_length == 9
    with pytest.raises(ArgumentError, match="Open has no argument `wrong`"):
        Open(tiny(tokenizer), wrong=1, extra=2)


# --- the flag that a script has not read ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "wish"),
    [
        ([], False),
        (["--resume_from_checkpoint", "out/checkpoint-5/"], "out/checkpoint-5/"),
        (["--resume-from-checkpoint=out/checkpoint-5"], "out/checkpoint-5"),
        (["--resume_from_checkpoint"], True),
        (["--resume_from_checkpoint", "--bf16"], True),
        (["--resume_from_checkpoint", "True"], True),
        (["--resume_from_checkpoint=none"], False),
        (["--resume_from_checkpoint", "false"], False),
        (["--resume_from_checkpoint_later", "x"], False),
    ],
)
def test_the_flag_is_read(argv, wish):
    assert resume_flag(argv) == wish


@pytest.fixture
def half_way(tokenizer, monkeypatch):
    """A run of four steps with a checkpoint after the second: makes trainers that could go on from it."""

    def trainer():
        torch.manual_seed(0)
        settings = {**SHORT, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        return SFTTrainer(tiny(tokenizer), SFTConfig("out", **settings), train_dataset=texts(), tokenizer=tokenizer)

    trainer().train()
    arguments._flag_is_open = True
    return trainer


def steps_taken(trainer, *arguments, **keywords):
    taken = []
    step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: taken.append(1) or step(*args, **kwargs)
    trainer.train(*arguments, **keywords)
    return len(taken)


def test_train_honours_the_flag_once(half_way, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sft_train.py", "--resume_from_checkpoint", "out/checkpoint-2/"])
    assert steps_taken(half_way()) == 2
    said = "trl: --resume_from_checkpoint on the command line: training resumes from out/checkpoint-2/"
    assert capsys.readouterr().out.splitlines().count(said) == 1
    assert steps_taken(half_way()) == 4, "the flag concerns the first run"


@pytest.mark.parametrize("explicit", [False, None])
def test_an_explicit_argument_wins(half_way, monkeypatch, explicit):
    monkeypatch.setattr(sys, "argv", ["sft_train.py", "--resume_from_checkpoint", "out/checkpoint-2/"])
    assert steps_taken(half_way(), resume_from_checkpoint=explicit) == 4


def test_an_explicit_position_wins(half_way, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sft_train.py", "--resume_from_checkpoint", "nowhere"])
    assert steps_taken(half_way(), "out/checkpoint-2") == 2


def test_a_flag_that_names_nothing_is_an_error(half_way, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sft_train.py", "--resume_from_checkpoint", "out/checkpoint-3"])
    with pytest.raises(ValueError, match="cannot resume from out/checkpoint-3"):
        half_way().train()


def test_the_flag_reaches_through_a_subclass(half_way, tokenizer, monkeypatch):
    class Mine(SFTTrainer):
        def train(self):
            return super().train()

    monkeypatch.setattr(sys, "argv", ["sft_train.py", "--resume_from_checkpoint"])
    settings = {**SHORT, "max_steps": 5}
    assert steps_taken(Mine(tiny(tokenizer), SFTConfig("out", **settings), None, texts(), None, tokenizer)) == 1
