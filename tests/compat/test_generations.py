"""A script of each generation of upstream, as its release notes and documents show the API, on a tiny model."""

import sys

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from tests.trainer.helpers import WORDS, chat_rows, labelled_rows, pair_rows, tiny, tiny_scorer
from trl import notices

SHORT = {
    **{"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1},
    **{"max_steps": 1, "per_device_train_batch_size": 2},
}


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(notices, "_printed", set())
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.chdir(tmp_path)


def losses(trainer):
    """The losses of a run that moved the weights."""
    before = {
        name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad
    }
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(weight, after[name]) for name, weight in before.items())
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_0_7_ppo_step_by_step(tiny_path):
    """The sentiment example: sample, judge, step; `respond_to_batch` of the README beside the trainer's `generate`."""
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model, set_seed
    from trl.core import LengthSampler, respond_to_batch

    config = PPOConfig(
        model_name="gpt2",
        learning_rate=1e-3,
        log_with=None,
        batch_size=4,
        mini_batch_size=2,
        optimize_cuda_cache=True,
        early_stopping=False,
        target_kl=0.1,
        ppo_epochs=2,
        seed=0,
    )
    set_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    input_size = LengthSampler(2, 6)
    dataset = Dataset.from_list([{"review": " ".join(WORDS[start : start + 8])} for start in range(8)])

    def tokenize(sample):
        sample["input_ids"] = tokenizer.encode(sample["review"])[: input_size()]
        sample["query"] = tokenizer.decode(sample["input_ids"])
        return sample

    dataset = dataset.map(tokenize, batched=False)
    dataset.set_format(type="torch")

    def collator(data):
        return {key: [each[key] for each in data] for key in data[0]}

    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_path)
    ref_model = create_reference_model(model)
    ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset=dataset, data_collator=collator)
    start = model.pretrained_model.lm_head.weight.detach().clone()
    output_length = LengthSampler(3, 6)
    seen = []
    for batch in ppo_trainer.dataloader:
        queries = batch["input_ids"]
        responses = []
        for query in queries:
            response = ppo_trainer.generate(query, max_new_tokens=output_length(), min_length=-1, top_k=0, top_p=1.0,
                                            do_sample=True, pad_token_id=tokenizer.eos_token_id)  # fmt: skip
            responses.append(response.squeeze()[len(query) :])
        batch["response"] = [tokenizer.decode(response) for response in responses]
        rewards = [torch.tensor(float(len(text) % 3)) for text in batch["response"]]
        stats = ppo_trainer.step(queries, responses, rewards)
        ppo_trainer.log_stats(stats, batch, rewards)
        seen.append(stats["ppo/mean_scores"])
    assert len(seen) == 2 and not torch.equal(start, model.pretrained_model.lm_head.weight)
    response = respond_to_batch(model, dataset[0]["input_ids"].unsqueeze(0), txt_len=3)
    assert response.shape == (1, 3)
    model.save_pretrained("my-ppo-model")
    assert torch.equal(
        AutoModelForCausalLMWithValueHead.from_pretrained("my-ppo-model").v_head.summary.weight,
        model.v_head.summary.weight,
    )


def test_0_9_sft_on_completions(tokenizer):
    from trl import DataCollatorForCompletionOnlyLM, SFTConfig, SFTTrainer

    dataset = Dataset.from_list(
        [{"instruction": WORDS[row], "output": " ".join(WORDS[row : row + 3])} for row in range(4)]
    )

    def formatting_prompts_func(example):
        pairs = zip(example["instruction"], example["output"], strict=True)
        return [f"### Question: {one}\n ### Answer: {other}" for one, other in pairs]

    collator = DataCollatorForCompletionOnlyLM(" ### Answer:", tokenizer=tokenizer)
    trainer = SFTTrainer(
        tiny(tokenizer),
        train_dataset=dataset,
        args=SFTConfig(output_dir="out", max_seq_length=64, learning_rate=1e-3, **SHORT),
        tokenizer=tokenizer,
        formatting_func=formatting_prompts_func,
        data_collator=collator,
    )
    assert len(losses(trainer)) == 1


def test_0_11_dpo_of_the_command(tiny_path, tokenizer, monkeypatch):
    """`examples/scripts/dpo.py` of that release: its imports, its parser, its arguments of the trainer."""
    pytest.importorskip("peft")
    from trl.commands.cli_utils import DPOScriptArguments, TrlParser, init_zero_verbose
    from trl.env_utils import strtobool

    if strtobool("1"):
        init_zero_verbose()
    from trl import (
        DPOConfig,
        DPOTrainer,
        ModelConfig,
        RichProgressCallback,
        get_kbit_device_map,
        get_peft_config,
        get_quantization_config,
        maybe_apply_chat_template,
        maybe_extract_prompt,
    )
    from trl.trainer.utils import SIMPLE_CHAT_TEMPLATE

    words = f"--dataset_name x --model_name_or_path {tiny_path} --learning_rate 1e-3 --beta 0.2 --output_dir out"
    words += " --per_device_train_batch_size 2 --max_steps 1 --logging_steps 1 --report_to none --use_cpu true"
    words += " --no_remove_unused_columns --use_peft --lora_r=4 --lora_alpha=8 --torch_dtype float32"
    monkeypatch.setattr(sys, "argv", ["dpo.py", *words.split()])
    parser = TrlParser((DPOScriptArguments, DPOConfig, ModelConfig))
    args, training_args, model_config = parser.parse_args_and_config()
    assert args.dataset_train_split == "train" and training_args.beta == 0.2
    quantization_config = get_quantization_config(model_config)
    assert get_kbit_device_map() is None if quantization_config is None and not torch.cuda.is_available() else True
    if tokenizer.chat_template is None:
        tokenizer.chat_template = SIMPLE_CHAT_TEMPLATE
    dataset = Dataset.from_list(pair_rows(4)).map(maybe_extract_prompt)
    dataset = dataset.map(maybe_apply_chat_template, fn_kwargs={"tokenizer": tokenizer})
    trainer = DPOTrainer(
        tiny(tokenizer),
        None,
        args=training_args,
        train_dataset=dataset,
        eval_dataset=dataset if training_args.eval_strategy != "no" else None,
        tokenizer=tokenizer,
        peft_config=get_peft_config(model_config),
        callbacks=[RichProgressCallback],
    )
    assert losses(trainer) == [pytest.approx(0.693147, abs=1e-4)]
    assert {name.split(".")[-3] for name, each in trainer.model.named_parameters() if each.requires_grad} == {
        "lora_A",
        "lora_B",
    }


def test_0_14_grpo(tiny_path):
    from trl import GRPOConfig, GRPOTrainer

    def reward_len(completions, **kwargs):
        return [-abs(20 - len(completion)) for completion in completions]

    training_args = GRPOConfig(
        output_dir="out",
        learning_rate=1e-3,
        num_generations=2,
        max_prompt_length=64,
        max_completion_length=6,
        temperature=0.9,
        beta=0.04,
        use_vllm=False,
        **SHORT,
    )
    trainer = GRPOTrainer(
        model=tiny_path,
        reward_funcs=reward_len,
        args=training_args,
        train_dataset=Dataset.from_list([{"prompt": " ".join(WORDS[row : row + 3])} for row in range(4)]),
    )
    assert losses(trainer) == [pytest.approx(0, abs=1e-4)]


# --- every stable trainer -------------------------------------------------------------------------------------------


def reward(completions, **kwargs):
    return [sum(map(ord, completion)) / 1000 for completion in completions]


def prompts(count=4):
    return [{"prompt": " ".join(WORDS[row : row + 3])} for row in range(count)]


ONLINE = {"num_generations": 2, "max_completion_length": 6}
STABLE = {
    "1.0": {
        "SFT": ({"packing": True, "max_length": 64, "eos_token": "<|im_end|>"}, chat_rows(6)),
        "DPO": ({"beta": 0.2, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, pair_rows(6)),
        "GRPO": ({**ONLINE, "loss_type": "dapo", "epsilon_high": 0.28, "scale_rewards": "batch"}, prompts()),
        "RLOO": ({**ONLINE, "beta": 0.05, "reward_clip_range": (-10.0, 10.0)}, prompts()),
        "Reward": ({"center_rewards_coefficient": 0.01, "max_length": 64}, pair_rows(6)),
    },
    "1.16": {
        "SFT": ({"assistant_only_loss": True, "loss_type": "dft", "truncation_mode": "keep_start"}, chat_rows(6)),
        "DPO": ({"precompute_ref_log_probs": True, "pad_to_multiple_of": 8, "label_smoothing": 0.1}, pair_rows(6)),
        "KTO": ({"desirable_weight": 1.2, "train_sampling_strategy": "sequential"}, labelled_rows(6)),
        "GRPO": (
            {**ONLINE, "use_adaptive_entropy": True, "importance_sampling_level": "sequence", "log_multimodal": True},
            prompts(),
        ),
        "RLOO": ({**ONLINE, "normalize_advantages": True, "mask_truncated_completions": False}, prompts()),
        "Reward": ({"dataset_num_proc": 1, "disable_dropout": True}, pair_rows(6)),
        "Distillation": ({"beta": 0.5, "max_completion_length": 6, "temperature": 1.0}, prompts()),
    },
}


@pytest.mark.parametrize(
    ("release", "method"), [(release, method) for release, methods in STABLE.items() for method in methods]
)
def test_stable_trainers(tiny_path, tokenizer, release, method):
    import trl

    settings, rows = STABLE[release][method]
    more = {
        **({"reward_funcs": reward} if method in ("GRPO", "RLOO") else {}),
        **({"teacher_model": tiny(tokenizer, seed=1)} if method == "Distillation" else {}),
    }
    model = tiny_scorer(tokenizer) if method == "Reward" else tiny_path
    trainer = getattr(trl, f"{method}Trainer")(
        model=model,
        args=getattr(trl, f"{method}Config")("out", learning_rate=1e-3, **settings, **SHORT),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **more,
    )
    (loss,) = losses(trainer)
    assert loss == loss and trainer.state.global_step == 1
