"""The sampler of this process: what it draws, and that nothing but the request decides it."""

import pytest
import torch
from transformers import AutoTokenizer

from tests.engine import families
from tests.rollout.helpers import sample
from trl.data.batching.collate import Branch, Tree
from trl.engine.probe import attach
from trl.engine.score import score
from trl.rollout import generate
from trl.rollout.filters import describe
from trl.rollout.generate import InProcessSampler
from trl.rollout.types import Request, Sampling

PROMPTS = [[5, 6, 7], [11, 12, 13, 14, 15, 16, 17, 18, 19], [23, 24], [31], [41, 42, 43, 44, 45, 46, 47]]
STOP = 7


def build(name, **changes):
    model = families.build(name, **changes).eval()
    attach(model)
    return model


def requests(samples=3, seed=0):
    return [Request(prompt, samples, (seed, index)) for index, prompt in enumerate(PROMPTS)]


def greedy(model, prompt, count, stops=(STOP,)):
    """Token by token, without a cache."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", [*families.FLAT, *families.REFUSED])
def test_greedy_tokens_are_those_without_a_cache(family):
    model = build(family)
    # Four rows for fifteen samples: rows are left and entered all the time, and the columns run out.
    sampling = Sampling(max_new_tokens=12, temperature=0, stop_ids=(STOP,))
    drawn = sample(InProcessSampler(max_rows=4), model, requests(), sampling)
    served = family not in ("falcon_mamba", "lfm2", "minimax")
    assert (model._trl_sampled is None) is served
    for prompt, group in zip(PROMPTS, drawn, strict=True):
        expected = greedy(model, prompt, 12)
        for completion in group:
            assert completion.ids == expected
            assert completion.finished is (expected[-1] == STOP)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_those_of_the_engine(temperature):
    model = build("qwen3")
    sampling = Sampling(max_new_tokens=10, temperature=temperature, top_k=20, stop_ids=(STOP,))
    drawn = sample(InProcessSampler(max_rows=5), model, requests(), sampling)
    for prompt, group in zip(PROMPTS, drawn, strict=True):
        branches = tuple(Branch(each.ids, [True] * len(each.ids)) for each in group)
        batch = model._trl_attachment.batch([Tree(Branch(prompt, [False] * len(prompt)), branches)])
        with torch.no_grad():
            expected = score(model, batch, temperature=temperature).logp_N
        ours = torch.tensor([logp for each in group for logp in each.logps])
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


def test_a_completion_depends_on_its_request_alone():
    model = build("llama")
    sampling = Sampling(max_new_tokens=9, stop_ids=(STOP, 9))
    together = sample(InProcessSampler(), model, requests(), sampling)
    assert len({tuple(each.ids) for group in together for each in group}) > 10
    for sampler in (InProcessSampler(max_rows=1), InProcessSampler(max_rows=3), InProcessSampler(max_cache_tokens=60)):
        assert ids(sample(sampler, model, requests(), sampling)) == ids(together)
    backwards = sample(InProcessSampler(max_rows=2), model, requests()[::-1], sampling)
    assert ids(backwards)[::-1] == ids(together)
    # Another rank draws the last two of each.
    last = [request._replace(samples=2, first=1) for request in requests()]
    assert ids(sample(InProcessSampler(), model, last, sampling)) == [group[1:] for group in ids(together)]
    assert ids(sample(InProcessSampler(), model, requests(seed=1), sampling)) != ids(together)


def ids(drawn):
    return [[each.ids for each in group] for group in drawn]


@pytest.mark.parametrize(
    "filters",
    [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.3}, {"temperature": 1.4, "top_k": 6}],
)
def test_tokens_are_drawn_by_their_probabilities(filters):
    model = build("llama")
    prompt, count = PROMPTS[0], 4000
    drawn = sample(
        InProcessSampler(max_rows=500), model, [Request(prompt, count, (3,))], Sampling(max_new_tokens=1, **filters)
    )[0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / filters.get("temperature", 1.0)
    probabilities = kept(logits, **filters).softmax(-1)
    seen = torch.bincount(torch.tensor([each.ids[0] for each in drawn]), minlength=len(logits)).double()
    assert seen[probabilities == 0].sum() == 0
    expected = probabilities * count
    likely = expected >= 5
    chi = ((seen - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = int(likely.sum()) - 1
    # A chance of about one in ten thousand (Wilson and Hilferty's approximation of the quantile).
    assert chi < freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3


def kept(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=None):
    """The logits that filters leave, the others at minus infinity; worked out from the probabilities."""
    probabilities = logits.softmax(-1)
    order = probabilities.argsort(descending=True)
    keep = torch.zeros_like(logits, dtype=torch.bool)
    if top_k:
        keep[order[:top_k]] = True
    elif top_p < 1:
        before = probabilities[order].cumsum(0) - probabilities[order]
        keep[order[before < top_p]] = True
    elif min_p:
        keep = probabilities >= min_p * probabilities.max()
    else:
        keep[:] = True
    return logits.masked_fill(~keep, -torch.inf)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"further": {"no_repeat_ngram_size": 2}},
        {"further": {"suppress_tokens": [3, 4, 8]}},
        {"further": {"bad_words_ids": [[9], [10, 11]]}},
        {"further": {"min_new_tokens": 8}},
    ],
)
def test_settings_mean_what_they_mean_in_transformers(settings):
    model = build("llama")
    sampling = Sampling(max_new_tokens=10, temperature=0, stop_ids=(STOP,), **settings)
    drawn = sample(InProcessSampler(max_rows=2), model, requests(1), sampling)
    arguments = {
        **{name: value for name, value in settings.items() if name != "further"},
        **settings.get("further", {}),
    }
    for prompt, [completion] in zip(PROMPTS, drawn, strict=True):
        expected = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=10, eos_token_id=STOP, pad_token_id=0, **arguments,
        )  # fmt: skip
        assert completion.ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"further": {"no_repeat_ngram_size": 2}},
        {"further": {"bad_words_ids": [[9], [5, 5], [10, 11]]}},
    ],
)
def test_settings_that_read_tokens_read_those_of_the_row_alone(settings):
    model = build("llama")
    # A few tokens only, the first of every prompt among them: they come again and again.
    others = sorted(set(range(model.config.vocab_size)) - {prompt[0] for prompt in PROMPTS})
    settings["further"] = {"suppress_tokens": others, **settings.get("further", {})}
    sampling = Sampling(max_new_tokens=6, **settings)
    together = sample(InProcessSampler(), model, requests(4), sampling)
    alone = sample(InProcessSampler(max_rows=1), model, requests(4), sampling)
    assert ids(together) == ids(alone)


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_k": 3}, {"top_p": 0.01}, {"min_p": 0.99}])
def test_stops_are_ruled_out_before_the_filters(filters):
    model = build("llama")
    prompt = PROMPTS[0]
    with torch.no_grad():
        order = model(input_ids=torch.tensor([prompt])).logits[0, -1].argsort(descending=True).tolist()
    # The three likeliest tokens stop, and may not come first.
    sampling = Sampling(max_new_tokens=1, stop_ids=tuple(order[:3]), further={"min_new_tokens": 1}, **filters)
    drawn = sample(InProcessSampler(), model, [Request(prompt, 60, (3,))], sampling)[0]
    allowed = order[3 : 3 + filters.get("top_k", 1)]
    assert {each.ids[0] for each in drawn} == set(allowed)


def test_strings_stop_too(smol_path):
    tokenizer = AutoTokenizer.from_pretrained(smol_path)
    model = build("llama", vocab_size=len(tokenizer))
    free = sample(InProcessSampler(), model, requests(2), Sampling(max_new_tokens=12))[0][0]
    text = tokenizer.decode(free.ids)
    word = tokenizer.decode(free.ids[4:6])
    assert text.find(word) > 0
    sampling = Sampling(max_new_tokens=12, stop_strings=(word,))
    stopped = sample(InProcessSampler(tokenizer), model, requests(2), sampling)[0][0]
    assert stopped.finished and word in tokenizer.decode(stopped.ids) and len(stopped.ids) <= 6
    assert stopped.ids == free.ids[: len(stopped.ids)]
    with pytest.raises(ValueError, match="need the tokenizer"):
        sample(InProcessSampler(), model, requests(1), sampling)


def test_the_model_is_left_as_it_was():
    import peft

    model = families.build("llama")
    families.checkpoint_layers(model, reentrant=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    attach(model)
    model.train()
    drawn = sample(InProcessSampler(max_rows=4), model, requests(), Sampling(max_new_tokens=6, temperature=0))
    assert model.training and all(module.training for module in model.modules())
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    model.eval()
    assert drawn[1][0].ids == greedy(model, PROMPTS[1], 6, ())


def test_small_cases():
    model = build("llama")
    assert sample(InProcessSampler(), model, [], Sampling(max_new_tokens=3)) == []
    one = sample(InProcessSampler(), model, requests(2), Sampling(max_new_tokens=1))
    assert all(len(each.ids) == len(each.logps) == 1 and not each.finished for group in one for each in group)
    with pytest.raises(ValueError, match="num_beams not understood"):
        sample(InProcessSampler(), model, requests(), Sampling(max_new_tokens=2, further={"num_beams": 4}))


def test_a_prompt_is_prefilled_once(monkeypatch):
    model = build("llama")
    sample(InProcessSampler(), model, requests(1), Sampling(max_new_tokens=1))  # the check of the model
    computed = []
    original = model.forward

    def counted(input_ids, **kwargs):
        computed.append(input_ids.numel())
        return original(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    drawn = sample(InProcessSampler(), model, requests(8), Sampling(max_new_tokens=4))
    assert sum(computed[:1]) == sum(map(len, PROMPTS))  # one prefill of all, without padding
    # The first token comes from the prefill; each further one is one position.
    assert sum(computed[1:]) == sum(len(each.ids) - 1 for group in drawn for each in group)


def test_a_model_that_cannot_prefill_one_row_is_given_padded_ones(monkeypatch):
    model = build("llama")
    expected = sample(InProcessSampler(), model, requests(), Sampling(max_new_tokens=5))
    other = build("llama")
    original = other.forward

    def forward(*args, logits_to_keep=0, **kwargs):
        return original(*args, logits_to_keep=int(logits_to_keep), **kwargs)

    monkeypatch.setattr(other, "forward", forward)
    drawn = sample(InProcessSampler(), other, requests(), Sampling(max_new_tokens=5))
    assert other._trl_sampled is None and other._trl_prefills_padded
    assert ids(drawn) == ids(expected)


def test_what_is_in_force_is_said():
    sampling = Sampling(max_new_tokens=5, temperature=0.7, top_p=0.9, stop_ids=(2,), further={"min_new_tokens": 2})
    assert describe(sampling) == "temperature 0.7, top_p 0.9, min_new_tokens 2, at most 5 tokens, stops at 2"
    assert describe(Sampling(max_new_tokens=5, temperature=0)).startswith("the most likely token is taken")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_weights_in_half_precision_change_log_probs_by_their_rounding_alone(family):
    model = build(family).to(torch.bfloat16)
    drawn = sample(InProcessSampler(max_rows=4), model, requests(), Sampling(max_new_tokens=10, temperature=0.8))
    assert model._trl_sampled is None
    for prompt, group in zip(PROMPTS, drawn, strict=True):
        branches = tuple(Branch(each.ids, [True] * len(each.ids)) for each in group)
        batch = model._trl_attachment.batch([Tree(Branch(prompt, [False] * len(prompt)), branches)])
        with torch.no_grad():
            expected = score(model, batch, temperature=0.8).logp_N.float()
        ours = torch.tensor([logp for each in group for logp in each.logps])
        torch.testing.assert_close(ours, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_an_error(temperature):
    model = build("llama")
    sampling = Sampling(max_new_tokens=5, temperature=temperature)
    sample(InProcessSampler(), model, requests(), sampling)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="not finite numbers at token 0 of a completion: its weights have diverged"):
        sample(InProcessSampler(), model, requests(), sampling)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {"top_k": 20}), ("llama", {"further": {"min_new_tokens": 5}}), ("gpt_oss", {"temperature": 0})],
)
def test_tokens_that_are_looked_at_every_few_steps_are_the_same(monkeypatch, family, settings):
    """On a device the host looks at the tokens of several steps at once: rows end, leave and enter later."""
    model = build(family)
    sampling = Sampling(max_new_tokens=13, stop_ids=(STOP, 9, 12, 13), **settings)
    asked = [request._replace(limit=limit) for request, limit in zip(requests(4), (None, 1, 6, 13, None), strict=True)]
    expected = sample(InProcessSampler(max_rows=5), model, asked, sampling)
    assert len({len(each.ids) for group in expected for each in group}) > 2
    for steps in (3, 50):
        monkeypatch.setitem(generate.READ_EVERY, "cpu", steps)
        for rows in (3, 256):
            drawn = sample(InProcessSampler(max_rows=rows), model, asked, sampling)
            assert ids(drawn) == ids(expected)
            for ours, theirs in zip(drawn, expected, strict=True):
                for one, other in zip(ours, theirs, strict=True):
                    assert one.finished is other.finished
                    assert one.logps == pytest.approx(other.logps, abs=1e-4)


def test_room_counts_what_the_allocator_holds_unused(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**20, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9 * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * 2**20)
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert generate._tokens_that_fit(model, torch.device("cuda")) == 4 * 2**20 // token
