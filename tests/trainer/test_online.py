"""Rounds, steps and micro-batches of the trainers that draw their own completions."""

import copy
import json

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import trl
from tests.trainer.helpers import DEFAULTS, tiny
from trl.engine.probe import attach
from trl.engine.score import score
from trl.rollout import rounds
from trl.rollout.types import Completion

# Of a line of the log, what depends on the time or on how rows are laid out.
CLOCKS = ("train_token_efficiency", "step_time")


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


PROMPTS = [{"prompt": f"say {word} and then stop", "wanted": word} for word in ("red", "old", "stone", "cat", "mat")]


class Canned:
    """A sampler that draws tokens by the seed alone, and takes their log-probs from the engine."""

    def sync(self, model, version):
        self.model = model

    def generate(self, requests, sampling):
        drawn = []
        for request in requests:
            group = []
            for number in range(request.first, request.first + request.samples):
                generator = np.random.default_rng([*request.seed, number])
                ids = generator.integers(5, 2000, size=int(generator.integers(1, 9))).tolist()
                group.append(
                    Completion(ids, logps(self.model, request.prompt_ids, ids, sampling.temperature), number % 3 > 0)
                )
            drawn.append(group)
        return drawn


def logps(model, prompt, ids, temperature):
    from trl.data.batching.collate import Branch, Tree
    from trl.models.unwrap import unwrap

    tree = Tree(Branch(list(prompt), [False] * len(prompt)), (Branch(ids, [True] * len(ids)),))
    with torch.no_grad():
        return score(model, unwrap(model)._trl_attachment.batch([tree]), temperature=temperature).logp_N.tolist()


def reward(completion_ids, **_):
    """Odd tokens are good."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def make(
    path, tokenizer, method="GRPO", reward_funcs=reward, rows=None, eval_rows=None, model=None, canned=True, **settings
):
    settings = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4,
        "max_completion_length": 8, "max_steps": 1, "output_dir": str(path), **settings,
    }  # fmt: skip
    trainer = getattr(trl, f"{method}Trainer")(
        model=model or tiny(tokenizer),
        reward_funcs=reward_funcs,
        args=getattr(trl, f"{method}Config")(**{**DEFAULTS, **settings}),
        train_dataset=PROMPTS if rows is None else rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
    )
    if canned:
        trainer.sampler = Canned()
    return trainer


def first_step(trainer):
    """The gradient of the first step, and what was logged."""
    kept = {}
    original = trainer._get_grad_norm

    def keep(model, grad_norm=None):
        if not kept:
            kept.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        return original(model, grad_norm)

    trainer._get_grad_norm = keep
    trainer.args.max_grad_norm = 0.0
    trainer.train()
    return kept, trainer.state.log_history[0]


def watch_steps(trainer):
    """The samples of each step."""
    steps, original = [], trainer.train_on
    trainer.train_on = lambda model, samples: steps.append(samples) or original(model, samples)
    return steps


def assert_same(ours, theirs, what=""):
    assert ours.keys() == theirs.keys() and ours
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{what} {n}: {m}")


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo", "gmpo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_gradient_does_not_depend_on_the_micro_batches(tmp_path, tokenizer, loss_type, beta, monkeypatch):
    def run(**settings):
        return first_step(make(tmp_path, tokenizer, loss_type=loss_type, beta=beta, temperature=0.9, **settings))

    expected, line = run()
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    for budget in (1, 40):
        ours, other = run(max_tokens_per_micro_batch=budget)
        assert_same(ours, expected, budget)
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-4, abs=1e-6)
    ours, _ = run(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same(ours, expected, "2x4")
    ours, _ = run(share_prompt=False)
    assert_same(ours, expected, "prompts repeated")


def flat(completion_ids, **_):
    """Half of the groups have no spread."""
    return [1.0] * 4 + reward(completion_ids[4:])


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "luspo"])
def test_samples_of_no_weight_are_not_forwarded(tmp_path, tokenizer, loss_type, monkeypatch):
    ours, line = first_step(make(tmp_path, tokenizer, reward_funcs=flat, loss_type=loss_type))
    assert line["frac_samples_skipped"] == 0.5 and line["frac_reward_zero_std"] == 0.5
    monkeypatch.setattr(trl.GRPOTrainer, "has_no_gradient", lambda self, trace: False)
    expected, line = first_step(make(tmp_path, tokenizer, reward_funcs=flat, loss_type=loss_type))
    assert line["frac_samples_skipped"] == 0
    assert_same(ours, expected)


TASTES = [{"prompt": f"say {word}", "dull": number % 2 == 0} for number, word in enumerate("abcdefghijkl")]


def by_taste(completion_ids, dull, **_):
    """Prompts that are dull are worth 1 whatever is said."""
    return [1.0 if flat else value for flat, value in zip(dull, reward(completion_ids), strict=True)]


def test_dull_groups_are_drawn_again(tmp_path, tokenizer):
    """Dynamic sampling: the round is full of groups that teach something, of prompts that differ."""
    settings = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "reward_funcs": by_taste}
    trainer = make(tmp_path, tokenizer, rows=TASTES, dynamic_sampling=True, max_steps=2, **settings)
    steps = watch_steps(trainer)
    trainer.train()
    for samples in steps:
        rows = [each.row for each in samples]
        assert len(samples) == 16 and len(set(rows)) == 4 and all(row % 2 == 1 for row in rows)
    line = trainer.state.log_history[0]
    assert line["groups/idle"] == 0 and line["frac_samples_skipped"] == 0 and line["groups/drawn"] > 4
    # Rewards are those of all that was drawn.
    assert line["frac_reward_zero_std"] == pytest.approx(1 - 4 / line["groups/drawn"])
    assert trainer.refills.position > 0


def test_what_cannot_be_refilled_stays_as_it_is(tmp_path, tokenizer):
    dull = [{**row, "dull": index > 0} for index, row in enumerate(TASTES[:6])]
    settings = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "shuffle_dataset": False}
    for refills in (1, 5):
        trainer = make(
            tmp_path,
            tokenizer,
            rows=dull,
            reward_funcs=by_taste,
            dynamic_sampling=True,
            max_refills=refills,
            **settings,
        )
        trainer.train()
        line = trainer.state.log_history[0]
        assert line["groups/idle"] == 3 and line["groups/drawn"] == 6 and line["frac_samples_skipped"] == 0.75
    with pytest.raises(ValueError, match="max_refills=0"):
        make(tmp_path, tokenizer, dynamic_sampling=True, max_refills=0)


def test_groups_of_earlier_rounds_take_the_place_of_dull_ones(tmp_path, tokenizer):
    rows = [{**row, "dull": index >= 4} for index, row in enumerate(TASTES[:8])]
    trainer = make(
        tmp_path, tokenizer, rows=rows, reward_funcs=by_taste, replay_buffer_size=3, max_steps=2, shuffle_dataset=False,
        per_device_train_batch_size=16, gradient_accumulation_steps=1, learning_rate=1e-2,
    )  # fmt: skip
    steps = watch_steps(trainer)
    trainer.train()
    assert not trainer.is_on_policy()
    first, second = steps
    # Three groups of the first round, the newest, and one that is left dull.
    again = [each for each in second if each.row < 4]
    assert {each.row for each in again} == {1, 2, 3} and all(any(each is other for other in first) for each in again)
    assert [line["groups/replayed"] for line in trainer.state.log_history if "loss" in line] == [0, 3]
    assert trainer.state.log_history[1]["frac_samples_skipped"] == 0.25
    # They were drawn by an older policy.
    assert trainer.state.log_history[1]["clip_ratio/region_mean"] > 0
    with pytest.raises(ValueError, match="replay_buffer_size=-1"):
        make(tmp_path, tokenizer, replay_buffer_size=-1)


def test_a_run_that_refills_and_replays_resumes_exactly(tmp_path, tokenizer):
    def run(path):
        return make(
            path, tokenizer, rows=TASTES, reward_funcs=by_taste, dynamic_sampling=True, max_refills=1,
            replay_buffer_size=2, max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=1,
            steps_per_generation=2, save_strategy="steps", save_steps=3,
        )  # fmt: skip

    whole = run(tmp_path / "whole")
    whole.train()
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    lines = [[line["loss"] for line in each.state.log_history if "loss" in line] for each in (whole, resumed)]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    assert equal(resumed.method_state(), whole.method_state())
    for (name, ours), (_, theirs) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def equal(ours, theirs):
    """Whether two states of a checkpoint are the same to the bit."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[name], theirs[name]) for name in ours)
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_the_users_config_stays_as_it_was(tmp_path, tokenizer):
    args = trl.GRPOConfig(
        **{**DEFAULTS, "output_dir": str(tmp_path), "per_device_train_batch_size": 2, "num_generations": 2},
        gradient_accumulation_steps=3,
    )  # fmt: skip
    before = args.to_dict()
    for _ in range(2):
        trainer = trl.GRPOTrainer(
            model=tiny(tokenizer), reward_funcs=reward, args=args, train_dataset=PROMPTS, processing_class=tokenizer
        )
        assert trainer.round_sizes == rounds.RoundSizes(step=6, round=6, prompts=3, parts=1)
    assert args.to_dict() == before


def test_a_completion_ends_at_every_end_token_of_model_tokenizer_and_template(tmp_path, tokenizer):
    """As in Gemma 3: the tokenizer's end of text is another token than the template's end of turn."""
    tokenizer = copy.deepcopy(tokenizer)
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|endoftext|>"
    text = tokenizer.eos_token_id
    assert turn != text
    model = tiny(tokenizer)
    assert set(make(tmp_path, tokenizer, model=model).sampling.stop_ids) == {text, turn}
    model.generation_config.eos_token_id = [text, 17, len(tokenizer) + 5]  # the last has no row in the model
    trainer = make(tmp_path, tokenizer, model=model, generation_kwargs={"eos_token_id": 23})
    assert set(trainer.sampling.stop_ids) == {text, turn, 17, 23}

    ends, drawn = set(range(0, len(tokenizer), 9)), []  # of a random model, every ninth token
    model.generation_config.eos_token_id = sorted(ends)

    def kept(completion_ids, **_):
        drawn.extend(completion_ids)
        return [0.0] * len(completion_ids)

    make(tmp_path, tokenizer, model=model, reward_funcs=kept, canned=False, max_completion_length=9).train()
    found = [[place for place, token in enumerate(ids, start=1) if token in ends | {text, turn}] for ids in drawn]
    assert all(places in ([len(ids)], []) for places, ids in zip(found, drawn, strict=True))
    ended = [len(ids) for places, ids in zip(found, drawn, strict=True) if places]
    assert len(drawn) == 8 and 0 < len(ended) < 8 and min(ended) < 9
    # A completion without an end token reaches the limit.
    assert all(len(ids) == 9 for places, ids in zip(found, drawn, strict=True) if not places)


def test_a_text_prompt_has_one_beginning(tmp_path, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    bos = tokenizer.bos_token
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    trainer = make(tmp_path, tokenizer, rows=[{"prompt": f"{bos}hello"}, {"prompt": "hello"}])
    ids = tokenizer("hello", add_special_tokens=False)["input_ids"]
    assert list(trainer.train_dataset["prompt_ids"]) == [[tokenizer.bos_token_id, *ids]] * 2
    assert any("written in 1 row already" in line for line in trainer.report())


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_in_half_precision_nothing_is_clipped_before_anything_has_moved(tmp_path, tokenizer, method):
    """The sampler's log-probs are others than the engine's: sums of hundreds of tokens drift out of the clip range."""
    for precision in ({"bf16": True}, {"model": tiny(tokenizer).bfloat16()}):
        trainer = make(
            tmp_path, tokenizer, method, num_iterations=2, max_steps=1, beta=0.0, reward_funcs=reward, **precision
        )
        assert trainer.needs_old()
        sampler = trainer.sampler
        trainer.sampler = Off(sampler)
        trainer.train()
        line = trainer.state.log_history[0]
        assert line["clip_ratio/region_mean"] == 0 and line["reward_std"] > 0
    assert not make(tmp_path, tokenizer, method, num_iterations=2).needs_old()  # fp32: they are the same
    assert not make(tmp_path, tokenizer, method, beta=0.0, bf16=True).needs_old()  # no ratio is taken
    # The divergence in the reward is a difference of log-probs, of which the sampler's would be the odd ones.
    assert make(tmp_path, tokenizer, method, beta=0.1, bf16=True).needs_old() is (method == "RLOO")


class Off:
    """A sampler whose log-probs are off by what half precision makes of many tokens."""

    def __init__(self, sampler):
        self.sampler = sampler

    def sync(self, model, version):
        self.sampler.sync(model, version)

    def generate(self, requests, sampling):
        return [
            [each._replace(logps=[logp + 0.5 for logp in each.logps]) for each in group]
            for group in self.sampler.generate(requests, sampling)
        ]


def test_a_rank_may_draw_nothing(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, beta=0.1, top_entropy_quantile=0.5)
    assert trainer.collect([], 4, training=False) == []
    loss, _, _ = trainer.prediction_step(trainer.model, {"rows": []}, True)
    assert loss == 0


def test_a_step_happens_even_if_nothing_moves(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, reward_funcs=lambda completions, **_: [1.0] * len(completions))
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.state.log_history[0]["frac_samples_skipped"] == 1.0
    assert trainer.state.log_history[0]["loss"] == 0.0


def test_rounds_are_whole_groups_and_whole_steps(tmp_path, tokenizer):
    """A batch of four and eight completions a prompt, as in the guide: one prompt a round, in two steps."""
    trainer = make(
        tmp_path,
        tokenizer,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        num_generations=8,
        max_steps=4,
    )
    assert trainer.round_sizes == rounds.RoundSizes(step=4, round=8, prompts=1, parts=2)
    assert any("1 prompts × 8 completions each" in line and "2 steps of 4" in line for line in trainer.report())
    trainer.train()
    assert trainer.rounds_sampled == 2
    again = make(tmp_path, tokenizer, num_iterations=3, max_steps=6)
    again.train()
    assert again.rounds_sampled == 2
    assert len(trainer.get_train_dataloader()) == 5 * 2


def test_completions_that_were_cut_are_left_out(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, mask_truncated_completions=True, num_iterations=2)
    samples = trainer.collect([trainer.train_dataset[0]], 4, training=False)
    assert [each.trained > 0 for each in samples] == [False, True, True, False]
    counts = trainer.counts_of(samples)
    assert counts["sequences"] == 4 and counts["tokens"] == sum(each.length for each in samples[1:3])
    trainer.train()


@pytest.mark.parametrize(
    ("method", "further"),
    [
        ("GRPO", {"beta": 0.05}),
        ("RLOO", {"beta": 0.05}),
        ("PPO", {"adap_kl_ctrl": True, "use_score_scaling": True, "early_stopping": True}),
    ],
)
def test_a_run_resumed_within_a_round_is_the_uninterrupted_one(tmp_path, tokenizer, method, further):
    def run(path):
        return make(
            path, tokenizer, method, max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=1,
            num_generations=4, steps_per_generation=2, num_iterations=2, save_strategy="steps", save_steps=3, **further,
        )  # fmt: skip

    whole = run(tmp_path / "whole")
    whole.train()
    resumed = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.rounds_sampled == whole.rounds_sampled == 2
    lines = [[line["loss"] for line in each.state.log_history if "loss" in line] for each in (whole, resumed)]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    for (name, ours), (_, theirs) in zip(resumed.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    "settings",
    [
        {"entropy_coef": 0.01},
        {"use_adaptive_entropy": True, "entropy_coef": 0.02, "entropy_target": 100.0},
        {"top_entropy_quantile": 0.5},
        {"rollout_correction": True, "vllm_importance_sampling_mode": "token_truncate"},
        {"off_policy_mask_threshold": 0.1, "num_iterations": 2, "max_steps": 2},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2, "max_steps": 2},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"multi_objective_aggregation": "maximum_likelihood"},
        {"scale_rewards": "batch"},
        {"scale_rewards": False},
    ],
)
def test_options_do_not_depend_on_the_micro_batches(tmp_path, tokenizer, settings):
    expected, line = first_step(make(tmp_path, tokenizer, **settings))
    ours, other = first_step(make(tmp_path, tokenizer, max_tokens_per_micro_batch=1, **settings))
    assert_same(ours, expected)
    for name, value in line.items():
        if name not in ("grad_norm", *CLOCKS):
            assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_rloo_takes_the_divergence_off_the_reward(tmp_path, tokenizer):
    model = tiny(tokenizer, seed=1)
    trainer = make(tmp_path, tokenizer, "RLOO", model=model, beta=0.5, num_iterations=2)
    trainer.reference.policy.model = tiny(tokenizer)
    attach(trainer.reference.policy.model)
    samples = trainer.collect([trainer.train_dataset[0]], 4, training=False)
    rewards = np.array(reward([each.columns["ids"].tolist() for each in samples]))
    kl = np.array([sum(each.columns["logps"]) - sum(each.columns["ref_logps"]) for each in samples])
    total = rewards - 0.5 * kl
    expected = total - (total.sum() - total) / 3
    np.testing.assert_allclose([each.advantage for each in samples], expected, rtol=1e-4, atol=1e-5)


def test_an_evaluation_says_how_sure_it_is(tmp_path, tokenizer):
    trainer = make(
        tmp_path, tokenizer, eval_rows=PROMPTS, num_generations_eval=2, pass_threshold=0.5, log_completions=True
    )
    found = trainer.evaluate()
    for name in ("eval_loss", "eval_reward", "eval_reward_ci95", "eval_pass@1", "eval_pass@2", "eval_entropy"):
        assert np.isfinite(found[name]), name
    assert found["eval_pass@1"] <= found["eval_pass@2"] <= 1
    lines = (tmp_path / "completions" / "eval_completions_00000.jsonl").read_text().splitlines()
    assert len(lines) == 10 and {"prompt", "completion", "reward", "advantage"} <= set(json.loads(lines[0]))
    assert (tmp_path / "completions" / "eval_completions_00000.parquet").exists()


def test_pass_at_k():
    judged = [(0.5, [1.0, 0.0, 0.0, 1.0]), (0.0, [0.0] * 4)]
    found = rounds.evaluation_metrics(judged, 1.0)
    assert found["reward"] == 0.25 and found["pass@1"] == 0.25 and found["pass@4"] == 0.5
    assert found["reward_ci95"] == pytest.approx(1.96 * np.std([0.5, 0.0], ddof=1) / np.sqrt(2))


def test_mistakes_are_told(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="reward_funcs is missing"):
        make(tmp_path, tokenizer, reward_funcs=None)
    with pytest.raises(ValueError, match="num_generations=1"):
        make(tmp_path, tokenizer, num_generations=1)
    with pytest.raises(ValueError, match="no column holds prompts"):
        make(tmp_path, tokenizer, rows=[{"a": "b"}])
    with pytest.raises(ValueError, match="is one of two that say the same|say the same thing"):
        make(tmp_path, tokenizer, generation_batch_size=8, steps_per_generation=2)


@pytest.mark.parametrize("deepspeed", [False, True])
def test_who_steps_by_itself_is_told_which_micro_batch_is_the_last(tmp_path, tokenizer, deepspeed, monkeypatch):
    """DeepSpeed's engine takes its step in the backward pass, where gradients are to be synchronised."""
    trainer = make(tmp_path, tokenizer, rows=PROMPTS[:2], max_tokens_per_micro_batch=20)
    told = []

    def listening(loss, **kwargs):
        told.append((trainer.accelerator.sync_gradients, kwargs))
        loss.backward()

    trainer.accelerator.backward = listening
    trainer.is_deepspeed_enabled = deepspeed
    if deepspeed:
        kind = property(lambda accelerator: DistributedType.DEEPSPEED)
        monkeypatch.setattr(type(trainer.accelerator), "distributed_type", kind)
    trainer._prepare_inputs = lambda batch: batch  # which would ask DeepSpeed's plugin for a dtype
    trainer.train_on(trainer.model, trainer.collect([trainer.train_dataset[row] for row in range(2)], 4, training=True))
    assert len(told) > 1
    assert [last for last, _ in told] == [False] * (len(told) - 1) + [True]
    assert all(kwargs == ({"scale_wrt_gas": False} if deepspeed else {}) for _, kwargs in told)
