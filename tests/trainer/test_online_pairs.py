"""Trainers on two completions of a prompt: Online DPO, XPO and Nash-MD."""

import json

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

import trl
from tests.trainer.helpers import DEFAULTS, tiny, tiny_scorer
from tests.trainer.test_online import PROMPTS, reward
from trl.rewards.calls import RewardError

KINDS = ("OnlineDPO", "XPO", "NashMD")


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


def make(path, tokenizer, kind, *, rows=None, model=None, reward_funcs=reward, peft_config=None, **settings):
    further = {name: settings.pop(name) for name in ("judge", "ref_model", "eval_dataset") if name in settings}
    config = {"per_device_train_batch_size": 2, "max_completion_length": 6, "max_steps": 2, "output_dir": str(path)}
    return getattr(trl, f"{kind}Trainer")(
        model=model or tiny(tokenizer),
        reward_funcs=reward_funcs,
        args=getattr(trl, f"{kind}Config")(**{**DEFAULTS, **config, **settings}),
        train_dataset=rows or PROMPTS,
        processing_class=tokenizer,
        peft_config=peft_config,
        **further,
    )


def lora():
    return LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3, task_type="CAUSAL_LM")


def lines(trainer):
    found = [line for line in trainer.state.log_history if "loss" in line]
    return [{name: value for name, value in line.items() if name != "step_time"} for line in found]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {"peft_config": lora()}) for kind in KINDS),
        ("OnlineDPO", {"dynamic_sampling": True, "replay_buffer_size": 2}),
        ("XPO", {"bf16": True, "sync_ref_model": True, "ref_model_sync_steps": 2}),
        ("NashMD", {"mixture_coef": [0.2, 0.9], "replay_buffer_size": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_run_resumed_within_a_round_is_the_uninterrupted_one(tmp_path, tokenizer, kind, settings):
    # Rounds of four prompts and two steps, each taken twice; of five prompts, so that the second round is short.
    def run(path):
        return make(
            path, tokenizer, kind, max_steps=8, steps_per_generation=2, num_iterations=2, save_strategy="steps",
            save_steps=3, disable_dropout=False, **settings,
        )  # fmt: skip

    whole = run(tmp_path / "whole")
    whole.train()
    for stop in (3, 6):
        resumed = run(tmp_path / "resumed")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
        assert lines(resumed) == lines(whole) and len(lines(whole)) == 8
        assert resumed.rounds_sampled == whole.rounds_sampled == 2
        for (name, ours), (_, theirs) in zip(
            resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
        ):
            assert torch.equal(ours, theirs), name


def test_a_step_has_whole_pairs_of_as_many_prompts_as_the_batch(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, "OnlineDPO", steps_per_generation=2, max_steps=4)
    steps = []
    train_on = trainer.train_on
    trainer.train_on = lambda model, traces: steps.append(traces) or train_on(model, traces)
    trainer.train()
    # The last round has one prompt of the five: one of its steps has no pair.
    assert [len(step) for step in steps] == [4, 4, 0, 2]
    for step in steps:
        assert all(a.row == b.row and a.advantage == -b.advantage for a, b in zip(step[::2], step[1::2], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_who_writes_the_second_completion(tmp_path, tokenizer, kind):
    other = tiny(tokenizer, seed=1)
    with torch.no_grad():
        other.lm_head.weight.mul_(50)  # so sure that it says the same again and again
    own = tiny(tokenizer)
    settings = {"mixture_coef": 1.0} if kind == "NashMD" else {}
    trainer = make(tmp_path, tokenizer, kind, model=own, ref_model=other, **settings)
    rows = [trainer.train_dataset[place] for place in range(5)]
    traces = trainer.collect(rows, 2, training=True)
    assert [each.trained > 0 for each in traces] == [True, kind != "NashMD"] * 5
    sure = [float(trace.columns["ref_logps"].mean()) for trace in traces]
    first, second = sum(sure[::2]) / 5, sum(sure[1::2]) / 5
    assert (second > first + 2) is (kind != "OnlineDPO")


@pytest.mark.parametrize("kind", KINDS)
def test_a_judge_in_place_of_rewards(tmp_path, tokenizer, kind):
    asked = []

    def longer(prompts, completions):
        asked.append(len(prompts))
        return [-1 if first == second else int(len(second) > len(first)) for first, second in completions]

    trainer = make(
        tmp_path, tokenizer, kind, reward_funcs=None, judge=longer, eval_dataset=PROMPTS[:3], eval_strategy="steps",
        eval_steps=1, log_completions=True,
    )  # fmt: skip
    trainer.train()
    assert asked == [2, 3, 2, 3]
    line = lines(trainer)[0]
    assert line["grad_norm"] > 0 and line["rewards/longer/mean"] == pytest.approx(0.5)
    assert trainer.reward_func_names == ["longer"] and trainer.reward_funcs[0].function is longer
    table = (tmp_path / "completions" / "completions_00000.jsonl").read_text().splitlines()
    assert {json.loads(row)["longer"] for row in table} <= {0.0, 1.0, None}


def test_a_reward_model_by_its_path(tmp_path, tokenizer):
    scorer = tiny_scorer(tokenizer)
    scorer.save_pretrained(tmp_path / "scorer")
    tokenizer.save_pretrained(tmp_path / "scorer")
    trainer = make(tmp_path, tokenizer, "OnlineDPO", reward_funcs=None, reward_model_path=str(tmp_path / "scorer"))
    trainer.train()
    assert type(trainer.reward_funcs[0]).__name__ == "LlamaForSequenceClassification"
    assert lines(trainer)[0]["objective/scores_margin"] > 0


def test_an_end_that_is_missing_costs(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, "OnlineDPO", missing_eos_penalty=5.0)
    rows = [trainer.train_dataset[place] for place in range(5)]
    ended = iter([True, False, False, True, True, True, False, False, True, True])
    score = trainer.collector._sampled
    trainer.collector._sampled = lambda *args: (score(*args)[0], list(ended))
    trainer.collector.judge.score = lambda prompts, *args, **kwargs: torch.tensor([[1.0], [2.0]] * 5)
    credit = [each.advantage for each in trainer.collect(rows, 2, training=True)]
    assert credit == [1, -1, -1, 1, -1, 1, -1, 1, -1, 1]
    logged = trainer._reduced("train")
    assert logged["objective/scores"] == 1.5 - 5 * 0.4
    assert logged["val/contain_eos_token"] == pytest.approx(0.6)
    assert logged["reward"] == 1.5


def test_pairs_with_a_cut_completion_are_left_out(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, "OnlineDPO", mask_truncated_completions=True)
    trainer.collector._sampled = lambda *args, sampled=trainer.collector._sampled: (
        sampled(*args)[0], [True, True, True, False] + [True] * 6
    )  # fmt: skip
    traces = trainer.collect([trainer.train_dataset[place] for place in range(5)], 2, training=True)
    assert [each.advantage for each in traces[2:4]] == [0.0, 0.0] and traces[0].advantage != 0
    assert torch.isfinite(trainer.train_on(trainer.model, traces))


def test_a_value_for_each_epoch(tmp_path, tokenizer):
    trainer = make(
        tmp_path, tokenizer, "XPO", beta=[0.4, 0.2], alpha=[0.1], rows=PROMPTS[:2], max_steps=3,
    )  # fmt: skip
    trainer.train()
    assert [line["beta"] for line in lines(trainer)] == pytest.approx([0.4, 0.2, 0.2])
    assert trainer.args.alpha == 0.1 and trainer.alpha == 0.1


def test_prompts_are_cut_where_max_length_leaves_no_room(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, "OnlineDPO", max_length=9)
    assert max(len(ids) for ids in trainer.train_dataset["prompt_ids"]) == 3
    assert trainer.args.max_prompt_length == 3


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_generations": 4}, "num_generations=4 is not possible: two completions are compared"),
        ({"num_generations_eval": 1}, "num_generations_eval=1 is not possible"),
        ({"beta": 0.0}, "beta=0.0 is not possible: give numbers above 0"),
        ({"beta": [0.1, -1]}, "beta=-1 is not possible"),
        ({"beta": []}, "beta is an empty list"),
        ({"loss_type": "hinges"}, "loss_type='hinges' is not one of sigmoid, ipo"),
        ({"missing_eos_penalty": -1.0}, "would reward completions that do not end"),
        ({"max_length": 6}, "max_length=6 leaves no token for the prompt"),
        ({"reward_funcs": None}, "reward_funcs and judge are missing"),
        ({"judge": min}, "reward_funcs and judge are both given"),
        ({"judge": min, "reward_funcs": None, "missing_eos_penalty": 1.0}, "missing_eos_penalty is subtracted"),
    ],
)
def test_mistakes_are_told_before_step_one(tmp_path, tokenizer, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(tmp_path, tokenizer, "OnlineDPO", **settings)


def test_mistakes_of_the_others(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="mixture_coef=1.5 is not possible: give shares from 0 to 1"):
        make(tmp_path, tokenizer, "NashMD", mixture_coef=[0.5, 1.5])
    trainer = make(tmp_path, tokenizer, "XPO", reward_funcs=None, judge=lambda prompts, pairs: [0])
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    with pytest.raises(RewardError, match="gave 1 verdicts for 2 prompts"):
        trainer.train()
    assert all(torch.equal(before[name], weight) for name, weight in trainer.model.named_parameters())


# The fields of upstream's OnlineDPOConfig from 0.9 to 1.16, beside those of TrainingArguments.
FIELDS = """
    reward_model_path judge max_new_tokens max_length temperature top_p top_k min_p repetition_penalty generation_kwargs
    use_transformers_paged cache_implementation missing_eos_penalty beta loss_type disable_dropout use_vllm
    vllm_model_impl vllm_guided_decoding_regex vllm_structured_outputs_regex vllm_gpu_memory_utilization vllm_mode
    vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port
    vllm_tensor_parallel_size vllm_enable_sleep_mode ds3_gather_for_generation model_init_kwargs trust_remote_code
    reward_weights dataset_num_proc gpu_memory_utilization
""".split()


def test_every_field_of_upstream_is_known():
    from dataclasses import fields

    from trl.compat.arguments import rows_of

    for kind in KINDS:
        config = getattr(trl, f"{kind}Config")
        known = {field.name for field in fields(config)} | set(rows_of(config))
        assert [name for name in FIELDS if name not in known] == []


def test_older_words(tmp_path, tokenizer):
    config = trl.OnlineDPOConfig(
        output_dir=str(tmp_path), max_new_tokens=7, ds3_gather_for_generation=True, use_vllm=False, beta=[0.3],
        report_to="none", use_cpu=True,
    )  # fmt: skip
    assert config.max_completion_length == 7 and config.max_new_tokens == 7 and config.beta == 0.3
    trainer = trl.OnlineDPOTrainer(
        tiny(tokenizer), reward_model=reward, args=config, train_dataset=PROMPTS, tokenizer=tokenizer
    )
    assert trainer.reward_func_names == ["reward"]
    with pytest.raises(ValueError, match="`compute_metrics` is gone"):
        trl.XPOTrainer(tiny(tokenizer), reward_funcs=reward, train_dataset=PROMPTS, compute_metrics=len)
    from trl.experimental.nash_md import NashMDConfig
    from trl.experimental.online_dpo import OnlineDPOTrainer
    from trl.trainer.judges import HfPairwiseJudge
    from trl.trainer.xpo_trainer import XPOTrainer

    assert (NashMDConfig, OnlineDPOTrainer, XPOTrainer) == (trl.NashMDConfig, trl.OnlineDPOTrainer, trl.XPOTrainer)
    assert HfPairwiseJudge is trl.HfPairwiseJudge


def distance(*, chosen_score_P, rejected_score_P, beta):
    """A loss of the user's own."""
    return (chosen_score_P - rejected_score_P - beta).abs()


def test_a_loss_of_ones_own(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, "OnlineDPO", loss_type=distance)
    trainer.train()
    assert lines(trainer)[0]["loss"] == pytest.approx(0.1)
