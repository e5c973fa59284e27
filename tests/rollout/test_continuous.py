"""transformers' continuous batching as a sampler: what it draws is the model's, and the model is as it was."""

import pytest
import torch
from transformers import AutoTokenizer

from tests.engine import families
from tests.rollout.helpers import sample
from tests.rollout.test_generate import PROMPTS, STOP, build, greedy, ids, requests
from tests.trainer import test_online
from trl import GRPOConfig
from trl.data.batching.collate import Branch, Tree
from trl.engine.probe import attach
from trl.engine.score import score
from trl.rollout.continuous import ContinuousSampler
from trl.rollout.types import Request, Sampling
from trl.trainer.drawing import sampler_of


def expected_logps(model, drawn, temperature):
    found = []
    for prompt, group in zip(PROMPTS, drawn, strict=True):
        branches = tuple(Branch(each.ids, [True] * len(each.ids)) for each in group)
        batch = model._trl_attachment.batch([Tree(Branch(prompt, [False] * len(prompt)), branches)])
        with torch.no_grad():
            found.append(score(model, batch, temperature=temperature).logp_N)
    return torch.cat(found)


def logps(drawn):
    return torch.tensor([logp for group in drawn for each in group for logp in each.logps])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gpt_oss"])
def test_greedy_tokens_are_those_without_a_cache(family, attention):
    model = families.build(family).eval()
    if model._supports_sdpa or attention == "eager":
        model.set_attn_implementation(attention)
    attach(model)
    before = model.config._attn_implementation
    sampling = Sampling(max_new_tokens=12, temperature=0, stop_ids=(STOP,))
    # Eight pages: rows wait for others to leave.
    for sampler in (ContinuousSampler(), ContinuousSampler({"num_blocks": 8, "max_batch_tokens": 16})):
        drawn = sample(sampler, model, requests(), sampling)
        for prompt, group in zip(PROMPTS, drawn, strict=True):
            expected = greedy(model, prompt, 12)
            for completion in group:
                assert completion.ids == expected
                assert completion.finished is (expected[-1] == STOP)
        torch.testing.assert_close(logps(drawn), expected_logps(model, drawn, 1.0), atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("filters", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_those_of_the_policy_at_its_temperature(temperature, filters):
    model = build("qwen3")
    sampling = Sampling(max_new_tokens=10, temperature=temperature, stop_ids=(STOP,), **filters)
    drawn = sample(ContinuousSampler(), model, requests(), sampling)
    assert len({tuple(each.ids) for group in drawn for each in group}) > 10
    for group in drawn:
        for each in group:
            assert len(each.ids) == len(each.logps) <= 10
            assert each.finished is (each.ids[-1] == STOP) and STOP not in each.ids[:-1]
            assert each.finished or len(each.ids) == 10
    torch.testing.assert_close(logps(drawn), expected_logps(model, drawn, temperature), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.5}])
def test_nothing_is_drawn_that_a_filter_rules_out(filters):
    model = build("llama")
    prompt, sampling = PROMPTS[0], Sampling(max_new_tokens=1, temperature=0.8, **filters)
    [group] = sample(ContinuousSampler(), model, [Request(prompt, 300, (1,))], sampling)
    with torch.no_grad():
        probs = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.8).softmax(-1)
    likely, order = probs.sort(descending=True)
    count = {
        "top_k": 3,
        "top_p": int((likely.cumsum(0) - likely < 0.3).sum()),
        "min_p": int((likely >= 0.5 * likely[0]).sum()),
    }[next(iter(filters))]
    assert {each.ids[0] for each in group} == set(order[:count].tolist())


def test_tokens_are_as_frequent_as_they_are_likely():
    model = build("llama")
    [group] = sample(ContinuousSampler(), model, [Request(PROMPTS[0], 2000, (3,))], Sampling(1, temperature=0.7))
    with torch.no_grad():
        probs = (model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(torch.tensor([each.ids[0] for each in group]), minlength=len(probs))
    # Standard deviations from what is expected, summed: chi squared, whose mean is the number of tokens.
    large = probs > 0.002
    chi = ((counts - 2000 * probs)[large] ** 2 / (2000 * probs[large])).sum()
    freedom = int(large.sum())
    assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5


def test_a_round_is_drawn_alike_twice_and_leaves_the_random_state_alone():
    model = build("llama")
    sampling = Sampling(max_new_tokens=9, stop_ids=(STOP,))
    state = torch.get_rng_state()
    first = ids(sample(ContinuousSampler(), model, requests(), sampling))
    assert ids(sample(ContinuousSampler(), model, requests(), sampling)) == first
    assert ids(sample(ContinuousSampler(), model, requests(seed=1), sampling)) != first
    # Another rank, with other samples of the same prompts.
    assert ids(sample(ContinuousSampler(), model, [each._replace(first=3) for each in requests()], sampling)) != first
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(ContinuousSampler(), model, [], sampling) == []


@pytest.mark.parametrize("adapter", [False, True])
def test_gradients_are_those_of_before(adapter):
    model = families.build("llama")
    if adapter:
        import peft

        torch.manual_seed(5)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    attachment = attach(model)
    model.train()

    def gradients():
        model.zero_grad()
        score(model, attachment.batch(families.forest())).logp_N.sum().backward()
        return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}

    expected = gradients()
    modes = [module.training for module in model.modules()]
    drawn = sample(ContinuousSampler(), model, requests(), Sampling(max_new_tokens=8, top_k=20))
    assert [module.training for module in model.modules()] == modes
    ours = gradients()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    base = model.get_base_model() if adapter else model
    torch.testing.assert_close(logps(drawn), expected_logps(base, drawn, 1.0), atol=1e-4, rtol=1e-4)


def test_half_precision_weights_are_used_as_they_are():
    model = build("llama").to(torch.bfloat16)
    drawn = sample(ContinuousSampler(), model, requests(), Sampling(max_new_tokens=10))
    torch.testing.assert_close(logps(drawn), expected_logps(model, drawn, 1.0).float(), atol=0.1, rtol=0.05)


def test_what_cannot_be_honoured_is_an_error():
    model = build("llama")
    for changes, named in (
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"stop_strings": ("x",)}, "stop_strings"),
        ({"further": {"no_repeat_ngram_size": 2}}, "no_repeat_ngram_size"),
    ):
        with pytest.raises(ValueError, match=f"{named}.*leave it out"):
            sample(ContinuousSampler(), model, requests(), Sampling(4, **changes))
    for settings, named in (
        ({"pages": 3}, "pages not known"),
        ('{"seed": 3}', "config's seed"),
        ("{", "no JSON"),
        ("[1]", "list"),
    ):
        with pytest.raises(ValueError, match=named):
            ContinuousSampler(settings)
    assert ContinuousSampler('{"num_blocks": 8}').settings == {"num_blocks": 8}


@pytest.mark.parametrize("family", ["falcon_mamba", "minimax", "gemma2"])
def test_a_model_that_cannot_be_served_is_an_error_and_left_as_it_was(family):
    model = build(family)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="Leave the option out"):
        sample(ContinuousSampler(), model, requests(), Sampling(4))
    assert model.config._attn_implementation == before


def test_a_fault_under_way_is_an_error_and_leaves_the_model_as_it_was():
    model = build("llama")
    before = model.config._attn_implementation
    sample(ContinuousSampler(), model, requests(), Sampling(2))
    # One page of 32 tokens holds no such row.
    with pytest.raises(RuntimeError):
        sample(ContinuousSampler({"num_blocks": 1}), model, [Request(list(range(60)), 2, (0,))], Sampling(9))
    assert model.config._attn_implementation == before


@pytest.fixture(scope="module")
def tokenizer(smol_path):
    return AutoTokenizer.from_pretrained(smol_path)


def test_a_trainer_draws_by_it_and_learns(tmp_path, tokenizer, capsys):
    settings = {"use_transformers_continuous_batching": True, "shuffle_dataset": False, "learning_rate": 0.0}
    trainer = test_online.make(tmp_path, tokenizer, max_steps=2, **settings)
    trainer.sampler = sampler_of(trainer.args, tokenizer, trainer.sampling)
    assert isinstance(trainer.sampler, ContinuousSampler)
    gradient, line = test_online.first_step(trainer)
    assert all(each.isfinite().all() and each.any() for each in gradient.values())
    assert line["clip_ratio/region_mean"] == 0 and line["completions/mean_length"] == 8
    assert "by transformers' continuous batching" in capsys.readouterr().out


def test_its_words_in_a_config(tmp_path, tokenizer, capsys):
    def config(**settings):
        return GRPOConfig(output_dir=str(tmp_path), report_to="none", **settings)

    assert config(use_transformers_paged=True).use_transformers_continuous_batching
    assert "`use_transformers_continuous_batching` today" in "".join(capsys.readouterr())
    assert not config(use_transformers_paged=False).use_transformers_continuous_batching
    given = config(transformers_continuous_batching_config='{"num_blocks": 9}').transformers_continuous_batching_config
    assert given == {"num_blocks": 9}
    with pytest.raises(ValueError, match="cannot honour repetition_penalty"):
        test_online.make(tmp_path, tokenizer, use_transformers_continuous_batching=True, repetition_penalty=1.1)
