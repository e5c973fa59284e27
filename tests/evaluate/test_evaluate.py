"""Metrics and intervals by value, on a real model whose answers are taken as the data."""

import math
import sys
import types
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl.data.reading.sources import from_rows
from trl.evaluate.evaluation import evaluate, perplexity
from trl.evaluate.harness import evaluate_tasks
from trl.evaluate.intervals import bootstrap, normal, wilson
from trl.models.load import load_causal_lm


def test_intervals_by_value() -> None:
    # 8 of 10, worked out by hand: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n).
    found = wilson(8, 10)
    assert (found.value, round(found.low, 4), round(found.high, 4)) == (0.8, 0.4902, 0.9433)
    assert (wilson(0, 10).low, round(wilson(0, 10).high, 4)) == (0.0, 0.2775)
    found = normal(0.5, 0.1, 20)
    assert (round(found.low, 4), round(found.high, 4)) == (0.304, 0.696)
    values = np.random.default_rng(0).normal(3.0, 1.0, 200)
    found = bootstrap(values, seed=1)
    error = values.std(ddof=1) / math.sqrt(200)
    assert found == bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    alike = bootstrap([0.5, 0.5])
    assert (alike.low, alike.high) == (None, None) and "all values are the same" in alike.line()


@pytest.fixture(scope="module")
def model(tiny_path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_path)


@pytest.fixture(scope="module")
def tokenizer(tiny_path: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_path)


PROMPTS = ["What is 2+2?", "Name a colour.", "Say hi."]


def greedy(model: Any, tokenizer: Any, prompt: str) -> str:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_exact_match_reward_and_win_rate(model: Any, tokenizer: Any) -> None:
    said = [greedy(model, tokenizer, prompt) for prompt in PROMPTS]
    answers = [said[0], "never this", said[2]]
    rows = from_rows([{"prompt": p, "answer": a, "other": "x" * 50} for p, a in zip(PROMPTS, answers, strict=True)])

    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    def first_is_longer(prompts: list[str], pairs: list[list[str]]) -> list[int]:
        return [-1 if len(a) == len(b) else int(len(a) < len(b)) for a, b in pairs]

    found = evaluate(
        model,
        tokenizer,
        rows,
        ["exact_match", "reward", "win_rate"],
        reward_funcs=length,
        judge=first_is_longer,
        against="other",
        max_new_tokens=6,
    )
    assert [sample["completions"] for sample in found.samples] == [[text] for text in said]
    assert found.estimates["exact_match"].value == pytest.approx(2 / 3)
    assert found.estimates["exact_match"].method == "Wilson"
    assert found.estimates["reward"].value == pytest.approx(np.mean([len(text) for text in said]))
    assert found.estimates["win_rate"].value == 0.0
    assert list(found.estimates) == ["exact_match", "reward", "win_rate"]
    # Against itself every pair is a tie, and the rewards decide where there is no judge.
    again = evaluate(
        model, tokenizer, rows, ["win_rate"], reward_funcs=length, against=model, max_new_tokens=6
    ).estimates["win_rate"]
    assert again.value == 0.5


def test_pass_at_k_is_the_mean_over_all_subsets(model: Any, tokenizer: Any) -> None:
    rows = from_rows([{"prompt": prompt} for prompt in PROMPTS])

    def even(completions: list[str], **_: Any) -> list[float]:
        return [float(sum(map(ord, text)) % 2 == 0) for text in completions]

    options: dict[str, Any] = {"reward_funcs": even, "num_generations": 4, "max_new_tokens": 6, "pass_at": [1, 2, 4]}
    found = evaluate(model, tokenizer, rows, ["pass@k"], **options)
    passes = [[reward for reward in sample["even"]] for sample in found.samples]
    assert {reward for each in passes for reward in each} == {0.0, 1.0}
    for k in (1, 2, 4):
        chances = [np.mean([max(some) for some in combinations(each, k)]) for each in passes]
        assert found.estimates[f"pass@{k}"].value == pytest.approx(np.mean(chances))
    assert evaluate(model, tokenizer, rows, ["pass@k"], **options).to_dict() == found.to_dict()
    other = evaluate(model, tokenizer, rows, ["pass@k"], **options, seed=1)
    assert [each["completions"] for each in other.samples] != [each["completions"] for each in found.samples]


def test_perplexity_is_that_of_a_plain_forward_pass(model: Any, tokenizer: Any) -> None:
    texts = ["Once upon a time there was a fox.", "Hi.", "Two and two are four, and that is all."]
    rows = from_rows([{"text": text} for text in texts])
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    found = perplexity(model, tokenizer, rows)
    assert found.value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.low < found.value < found.high and (found.count, found.of) == (3, "rows")


def test_an_adapter_and_half_precision(tiny_path: str, tokenizer: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    rows = from_rows([{"text": "Once upon a time there was a fox."}, {"text": "Hi."}])
    base = AutoModelForCausalLM.from_pretrained(tiny_path)
    plain = perplexity(base, tokenizer, rows).value
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path)
    with_adapter = perplexity(load_causal_lm(tmp_path), tokenizer, rows).value
    assert with_adapter == pytest.approx(perplexity(adapted.merge_and_unload(), tokenizer, rows).value, rel=1e-4)
    assert with_adapter != pytest.approx(plain, rel=1e-2)
    half = load_causal_lm(tiny_path, dtype="bfloat16")
    assert perplexity(half, tokenizer, rows).value == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize(
    ("metrics", "options", "sentence"),
    [
        (["accuracy"], {}, "give some of exact_match"),
        (["reward"], {}, "needs reward_funcs"),
        (["win_rate"], {"judge": len}, "needs `against`"),
        (["win_rate"], {"against": "answer"}, "needs a judge"),
        (["pass@k"], {"pass_at": [3], "num_generations": 2}, "pass@3 needs at least 3 completions"),
    ],
)
def test_options_that_do_not_go_together(
    model: Any, tokenizer: Any, metrics: list[str], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        evaluate(model, tokenizer, from_rows([{"prompt": "a", "answer": "b"}]), metrics, **options)


def test_rows_without_an_answer_are_left_out(model: Any, tokenizer: Any) -> None:
    rows = from_rows([{"prompt": "a", "answer": None}, {"prompt": "b", "answer": "c"}])
    found = evaluate(model, tokenizer, rows, ["exact_match"], max_new_tokens=2).estimates["exact_match"]
    assert (found.count, found.left_out, found.value) == (1, 1, 0.0)


def test_tasks_of_lm_eval(monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'trl\[lm-eval\]'"):
        evaluate_tasks(model, tokenizer, ["arc_easy"])
    asked: dict[str, Any] = {}

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        asked.update(options)
        numbers = {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 0.3, "f1_stderr,none": "N/A"}
        return {"results": {"arc_easy": numbers}, "n-samples": {"arc_easy": {"effective": 25}}}

    fake = types.ModuleType("lm_eval")
    fake.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    models, wrapper = types.ModuleType("lm_eval.models"), types.ModuleType("lm_eval.models.huggingface")
    wrapper.HFLM = lambda **options: options  # type: ignore[attr-defined]
    for name, module in (("", fake), (".models", models), (".models.huggingface", wrapper)):
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", module)
    found = evaluate_tasks(model, tokenizer, ["arc_easy"], limit=25, seed=3)
    assert asked["model"]["pretrained"] is model and (asked["tasks"], asked["limit"]) == (["arc_easy"], 25)
    assert found["arc_easy/acc"] == normal(0.5, 0.1, 25, of="questions")
    assert found["arc_easy/f1"].low is None and list(found) == ["arc_easy/acc", "arc_easy/f1"]
