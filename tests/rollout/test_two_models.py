"""Samplers that ask two models: which completion is whose, and what a mixture draws from."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, FalconMambaConfig, FalconMambaForCausalLM

from tests.rollout.helpers import sample
from tests.trainer.helpers import tiny
from trl.engine.probe import attach
from trl.engine.reference import AdapterOff, Frozen, frozen
from trl.rollout.generate import InProcessSampler
from trl.rollout.two_models import InTurn, MixtureSampler, ReferenceSampler
from trl.rollout.types import Request, Sampling

PROMPTS = ([5, 9, 12], [30, 31, 32, 33, 34, 35], [7])
SHARP = Sampling(max_new_tokens=6, temperature=0.7)


@pytest.fixture(scope="module")
def models(small_path):
    tokenizer = AutoTokenizer.from_pretrained(small_path)
    found = tiny(tokenizer), tiny(tokenizer, seed=1)
    for model in found:
        with torch.no_grad():
            model.lm_head.weight.mul_(20)
    attach(found[0])
    return found[0], Frozen(frozen(found[1]), "the other")


def requests(samples=1, first=0):
    return [Request(prompt, samples, (3, place), first) for place, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("second", ["reference", "mixture"])
def test_odd_samples_are_those_of_the_second_sampler(models, second):
    model, reference = models
    own = InProcessSampler()
    other = (
        ReferenceSampler(InProcessSampler(), reference)
        if second == "reference"
        else MixtureSampler(InProcessSampler(), reference, lambda: 0.5)
    )
    both = sample(InTurn(own, other), model, requests(4), SHARP)
    alone = [sample(each, model, requests(4), SHARP) for each in (own, other)]
    for place in range(len(PROMPTS)):
        assert [each.ids for each in both[place]] == [alone[number % 2][place][number].ids for number in range(4)]
    # A rank that has the second sample alone draws the same.
    late = sample(InTurn(own, other), model, requests(1, first=1), SHARP)
    assert [group[0].ids for group in late] == [group[1].ids for group in both]


def test_the_reference_is_sampled_as_a_model_of_its_own(models):
    model, reference = models
    ours = sample(ReferenceSampler(InProcessSampler(), reference), model, requests(2), SHARP)
    theirs = sample(InProcessSampler(), reference.model, requests(2), SHARP)
    assert ours == theirs


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 256], ids=["one row at a time", "all rows"])
def test_a_mixture_mixes_logits(models, share, rows):
    model, reference = models
    sampler = MixtureSampler(InProcessSampler(max_rows=rows), reference, lambda: share)
    for request, (completion,) in zip(requests(), sample(sampler, model, requests(), SHARP), strict=True):
        ids = torch.tensor([[*request.prompt_ids, *completion.ids]])
        with torch.no_grad():
            mixed = (1 - share) * model(ids).logits + share * reference.model(ids).logits
        logp_TV = (mixed[0] / SHARP.temperature).log_softmax(-1)[len(request.prompt_ids) - 1 : -1]
        expected = logp_TV.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logps), expected, atol=1e-4, rtol=1e-4)


def test_a_mixture_with_the_adapter_off(small_path):
    model = get_peft_model(
        tiny(AutoTokenizer.from_pretrained(small_path)), LoraConfig(r=2, target_modules="all-linear")
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    attach(model)
    model.train()
    greedy = Sampling(max_new_tokens=5, temperature=0)
    sampler = MixtureSampler(InProcessSampler(), AdapterOff(), lambda: 0.5)
    for request, (completion,) in zip(requests(), sample(sampler, model, requests(), greedy), strict=True):
        ids = list(request.prompt_ids)
        model.eval()
        for token in completion.ids:
            with torch.no_grad():
                own = model(torch.tensor([ids])).logits[0, -1]
                with model.disable_adapter():
                    other = model(torch.tensor([ids])).logits[0, -1]
            assert int((own + other).argmax()) == token
            ids.append(token)


def test_a_model_without_keys_and_values_is_refused():
    config = FalconMambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = FalconMambaForCausalLM(config)
    other = Frozen(FalconMambaForCausalLM(config), "the other")
    sampler = MixtureSampler(InProcessSampler(), other, lambda: 0.5)
    with pytest.raises(ValueError, match="FalconMambaForCausalLM cannot be mixed with its reference token by token"):
        sample(sampler, model, [Request([5, 6], 1, (0, 0))], SHARP)
