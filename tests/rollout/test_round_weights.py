"""Adapters merged while completions are drawn: same completions, log-probs of the policy, weights untouched."""

import contextlib

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.rollout.helpers import sample
from trl.engine.probe import attach
from trl.engine.reference import AdapterOff, Twin
from trl.models import adapters
from trl.rollout import generate, round_weights
from trl.rollout.generate import InProcessSampler
from trl.rollout.round_weights import adapter_merged
from trl.rollout.types import Request, Sampling

SAMPLING = Sampling(max_new_tokens=12, temperature=0.8, stop_ids=(0, 7))


def adapted(path, dtype=torch.float32, scale=0.3, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options})
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=dtype), config).eval()
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            weight.data *= scale
    attach(model)
    return model


def requests(path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = ("the cat sat on", "a bird", "old stone walls by a quiet river")
    return [Request(tokenizer(text).input_ids, 3, (place,)) for place, text in enumerate(texts)]


def merged_layers(model):
    return [each for each in model.modules() if type(vars(each).get("forward")) is round_weights._Merged]


def same(ours, theirs):
    for one, other in zip([c for group in ours for c in group], [c for group in theirs for c in group], strict=True):
        assert one.ids == other.ids and one.finished is other.finished
        assert one.logps == pytest.approx(other.logps, abs=1e-5)


@pytest.fixture
def unmerged(monkeypatch):
    """A function that samples without merging."""

    def without(model, asked):
        with monkeypatch.context() as patch:
            patch.setattr(generate, "adapter_merged", lambda model: contextlib.nullcontext())
            return sample(InProcessSampler(), model, asked, SAMPLING)

    return without


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "down_proj"]}],
    ids=["all-linear", "rslora", "modules-to-save", "two-layers"],
)
def test_completions_and_log_probs_are_those_without_merging(tiny_path, unmerged, options, monkeypatch):
    model, asked = adapted(tiny_path, **options), requests(tiny_path)
    weights = {key: each.clone() for key, each in model.state_dict().items()}
    seen = []
    own = generate._Run.drawn
    monkeypatch.setattr(generate._Run, "drawn", lambda run: seen.append(len(merged_layers(run.model))) or own(run))
    same(sample(InProcessSampler(), model, asked, SAMPLING), unmerged(model, asked))
    assert seen[-2:] == [4 if len(options.get("target_modules", "")) == 2 else 14, 0]
    assert not merged_layers(model) and all(torch.equal(each, weights[key]) for key, each in model.state_dict().items())


def test_an_exception_leaves_the_layers_as_they_were(tiny_path, monkeypatch):
    model = adapted(tiny_path)
    ids = torch.tensor([[5, 9, 77]])
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(KeyError), adapter_merged(model):
            assert len(merged_layers(model)) == 14
            raise KeyError
        assert not merged_layers(model) and torch.equal(model(ids).logits, before)


def test_a_switched_adapter_computes_as_ever(tiny_path):
    """Off, the twin, and another one: within the context too."""
    model = adapted(tiny_path)
    reference = Twin(model)
    for layer in model.modules():
        if hasattr(layer, "lora_B") and adapters.TWIN in layer.lora_B:
            layer.lora_B[adapters.TWIN].weight.data *= -2
    ids = torch.tensor([[5, 9, 77, 8]])

    def logits():
        with torch.no_grad():
            found = [model(ids).logits]
            for each in (reference, AdapterOff()):
                with each.model_of(model):
                    found.append(model(ids).logits)
            return found

    expected = logits()
    with adapter_merged(model):
        found = logits()
        model.requires_grad_(True)
        gradients = model(ids).logits  # with gradients nothing is merged
    assert (found[0] - expected[0]).abs().max() < 1e-4 * expected[0].abs().max()
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])
    assert torch.equal(gradients, expected[0]) and gradients.requires_grad
    assert (expected[0] - expected[1]).abs().max() > 1e-2 and (expected[0] - expected[2]).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("case", ["bfloat16", "autocast", "tf32", "dora", "bias", "off", "merged", "memory"])
def test_what_is_not_merged(tiny_path, case, monkeypatch):
    options = {"dora": {"use_dora": True}, "bias": {"lora_bias": True}}.get(case, {})
    model = adapted(tiny_path, torch.bfloat16 if case == "bfloat16" else torch.float32, **options)
    within = contextlib.nullcontext()
    if case == "autocast":
        within = torch.autocast("cpu", torch.bfloat16)
    if case == "tf32":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    if case == "off":
        within = model.disable_adapter()
    if case == "merged":
        model.merge_adapter()
    if case == "memory":
        monkeypatch.setattr(round_weights, "_free", lambda device: 2**18)
    with within, adapter_merged(model):
        assert not merged_layers(model)


def test_quantised_layers_are_not_merged(tiny_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    base = AutoModelForCausalLM.from_pretrained(tiny_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))
    with adapter_merged(model):
        assert not merged_layers(model)
