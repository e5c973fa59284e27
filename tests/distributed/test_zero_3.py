"""DeepSpeed's ZeRO-3 on two gloo processes takes the steps of one process."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.distributed import zero_3
from tests.distributed.launcher import launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize(
    "cases",
    [
        ("sft", "tied", "reward"),
        ("dpo", "dpo-before", "dpo-twin", "grpo"),
        ("lora", "lora-head", "lora-saved", "whole", "bf16"),
    ],
    ids=",".join,
)
def test_zero_3_takes_the_steps_of_one_process(tmp_path, small_path, monkeypatch, cases):
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # of log-probs computed beforehand
    tokenizer = AutoTokenizer.from_pretrained(small_path)
    zero_3.save_models(tmp_path, tokenizer)
    launch(zero_3, ",".join(cases), tmp_path, small_path, timeout=400)
    found = json.loads((tmp_path / "found.json").read_text())
    for name in cases:
        alone = zero_3.make(name, tmp_path, tmp_path / "alone", tokenizer, 4)
        before = {key: weight.detach().clone() for key, weight in alone.model.named_parameters()}
        alone.train()
        ours, expected = found[name], zero_3.lines(alone)
        assert ours["flat"] and (ours["head"] is None) == (name not in zero_3.PARTS), name
        assert len(expected) == len(ours["lines"]) == (6 if name == "dpo" else 3)
        near = 1e-4 if name != "bf16" else 2e-2  # the same products, rounded elsewhere
        for line, other in zip(ours["lines"], expected, strict=True):
            # DeepSpeed's norm has a small number added.
            assert line == pytest.approx(other, rel=near, abs=1e-5), name
        if "resumed" in ours:
            assert ours["resumed"] == ours["lines"], name
        alone.save_model(str(tmp_path / "alone-saved"))
        weights, others = (_saved(tmp_path / folder) for folder in (f"{name}-saved", "alone-saved"))
        # With an adapter of the head PEFT saves the frozen weight below it too; DeepSpeed gathers what trains.
        others = {key: weight for key, weight in others.items() if ".base_layer." not in key}
        assert weights.keys() == others.keys(), name
        for key, weight in others.items():
            torch.testing.assert_close(weights[key].float(), weight, atol=near, rtol=near, msg=f"{name} {key}")
        assert any((weight.detach() != before[key]).any() for key, weight in alone.model.named_parameters())
        if (tmp_path / f"{name}-saved" / "model.safetensors").exists():
            kind = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
            opened = kind.from_pretrained(tmp_path / f"{name}-saved")
            for mine, other in zip(opened.parameters(), alone.model.parameters(), strict=True):
                torch.testing.assert_close(mine.float(), other, atol=near, rtol=near)


def _saved(folder):
    return load_file(next(folder.glob("*.safetensors")))
