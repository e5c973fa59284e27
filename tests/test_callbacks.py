"""Callbacks, and the best of several answers."""

import importlib.machinery
import sys
import types

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback

import trl
from tests.trainer.helpers import DEFAULTS, chat_rows, pair_rows, sft, tiny
from trl.callbacks import MergeConfig, merging


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


def test_bema_is_the_average_freed_of_its_lag(tmp_path, tokenizer):
    callback = trl.BEMACallback(update_freq=2, ema_power=0.5, bias_power=0.2, lag=10, update_after=1)
    trainer = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(8), max_steps=5, per_device_train_batch_size=2)
    seen = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = model.lm_head.weight.detach().clone()

    trainer.add_callback(Keep())
    trainer.add_callback(callback)
    trainer.train()
    start = average = seen[1]
    for step in (3, 5):
        average = average + (10 + step) ** -0.5 * (seen[step] - average)
        expected = average + (10 + step) ** -0.2 * (seen[step] - start)
    torch.testing.assert_close(callback.running_model.lm_head.weight, expected, atol=1e-6, rtol=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bema")
    torch.testing.assert_close(saved.lm_head.weight, expected, atol=1e-6, rtol=1e-5)


def test_bema_of_an_adapter_leaves_its_base_alone(tmp_path, tokenizer):
    model = tiny(tokenizer)
    callback = trl.BEMACallback(update_freq=1)
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    trainer = sft(tmp_path, model, tokenizer, chat_rows(8), peft_config=adapter, max_steps=2)
    trainer.add_callback(callback)
    trainer.train()
    running, trained = dict(callback.running_model.named_parameters()), dict(trainer.model.named_parameters())
    moved = [name for name in running if not torch.equal(running[name], trained[name])]
    assert moved and all("lora" in name for name in moved)
    assert (tmp_path / "bema" / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match="update_freq=0"):
        trl.BEMACallback(update_freq=0)


def test_the_best_of_n(tokenizer):
    model, scored = tiny(tokenizer), []

    def length(texts):
        scored.extend(texts)
        return [len(text) for text in texts]

    sampler = trl.BestOfNSampler(model, tokenizer, length, lambda: 6, sample_size=5, seed=0, n_candidates=2)
    found = sampler.generate([[5, 6, 7], torch.tensor([8, 9])])
    assert len(scored) == 10 and [len(each) for each in found] == [2, 2]
    for place, best in enumerate(found):
        lengths = sorted((len(text) for text in scored[5 * place : 5 * place + 5]), reverse=True)
        assert [len(text) for text in best] == lengths[:2]
    assert len(sampler.generate(torch.tensor([5, 6]))) == len(sampler.generate([5, 6])) == 1
    with pytest.raises(ValueError, match="query 0 has no tokens"):
        sampler.generate([[]])
    with pytest.raises(ValueError, match="gave 1 scores for 5 texts"):
        trl.BestOfNSampler(model, tokenizer, lambda texts: [1.0], lambda: 2, sample_size=5).generate([5])
    with pytest.raises(ValueError, match="n_candidates=4: give 1 to 3"):
        trl.BestOfNSampler(model, tokenizer, length, lambda: 2, sample_size=3, n_candidates=4)


def test_answers_are_compared_with_those_before_training(tmp_path, tokenizer):
    """The judge prefers the longer one of two answers, and sees as many as there are prompts."""
    asked = []

    class Longer(trl.BasePairwiseJudge):
        def judge(self, prompts, completions, shuffle_order=True):
            asked.append((prompts, completions))
            return [-1 if first == second else int(len(second) > len(first)) for first, second in completions]

    rows = pair_rows(6)
    args = trl.DPOConfig(**{**DEFAULTS, "output_dir": str(tmp_path)}, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = trl.DPOTrainer(
        tiny(tokenizer), args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    short = GenerationConfig(max_new_tokens=4, do_sample=False)
    trainer.add_callback(trl.WinRateCallback(Longer(), trainer, generation_config=short, num_prompts=3))
    trainer.add_callback(trl.LogCompletionsCallback(trainer, generation_config=short, num_prompts=2, freq=2))
    trainer.train()
    rates = [line["eval_win_rate"] for line in trainer.state.log_history if "eval_win_rate" in line]
    assert len(rates) == 2 and all(0 <= rate <= 1 for rate in rates)
    prompts, pairs = asked[-1]
    assert len(prompts) == len(pairs) == 3
    expected = sum(0.5 if one == two else float(len(two) > len(one)) for one, two in pairs) / 3
    assert rates[-1] == pytest.approx(expected)
    assert list((tmp_path / "completions").iterdir())
    blind = trl.DPOTrainer(
        tiny(tokenizer), args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    blind.eval_dataset = None
    with pytest.raises(ValueError, match="need an eval_dataset with prompts"):
        trl.WinRateCallback(Longer(), blind)


# --- merging, through mergekit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (
            "linear",
            {"models": [{"model": "p", "parameters": {"weight": 0.5}}, {"model": "t", "parameters": {"weight": 0.5}}]},
        ),
        (
            "ties",
            {
                "models": [
                    {"model": "p", "parameters": {"weight": 1.0, "density": [1.0, 0.7, 0.1]}},
                    {"model": "t", "parameters": {"weight": 1.0, "density": [1.0]}},
                ],
                "base_model": "t",
                "parameters": {"normalize": 1.0},
            },
        ),
        ("slerp", {"models": [{"model": "p"}, {"model": "t"}], "base_model": "p", "parameters": {"t": 0.5}}),
    ],
)
def test_what_mergekit_is_asked_for(method, expected):
    config = MergeConfig(method)
    with pytest.raises(ValueError, match="must name the two models"):
        config.recipe()
    config.policy_model_path, config.target_model_path = "p", "t"
    assert config.recipe() == {"merge_method": method, "dtype": None, **expected}
    with pytest.raises(ValueError, match="'mean' is not one of linear, ties, dare_ties, slerp"):
        MergeConfig("mean")


@pytest.mark.parametrize("adapter", [False, True])
def test_checkpoints_are_merged(adapter, tmp_path, tokenizer, monkeypatch):
    """mergekit itself is asked in `merge_models` alone, which is replaced here."""
    monkeypatch.setattr(merging, "require_mergekit", lambda what: None)
    monkeypatch.setattr(MergeConfig, "create", MergeConfig.recipe)
    asked = []
    monkeypatch.setattr(merging, "merge_models", lambda recipe, folder: asked.append((recipe, folder)))
    base = tmp_path / "base"
    tiny(tokenizer).save_pretrained(base)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    for every, steps in ((False, [3]), (True, [2, 3])):
        settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
        trainer = sft(tmp_path / f"run {every}", str(base), tokenizer, chat_rows(8), peft_config=lora, **settings)
        trainer.add_callback(trl.MergeModelCallback(merge_at_every_checkpoint=every))
        trainer.train()
        folders = [tmp_path / f"run {every}" / f"checkpoint-{step}" for step in steps]
        assert [folder for _, folder in asked] == [each / "merged" for each in folders]
        for (recipe, _), folder in zip(asked, folders, strict=True):
            policy, target = (each["model"] for each in recipe["models"])
            assert policy == (f"{base}+{folder}" if adapter else str(folder)) and target == str(base)
            assert folder.is_dir()
        asked.clear()


def test_what_cannot_be_merged_is_said_before_step_1(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(ImportError, match="MergeModelCallback needs the package mergekit"):
        trl.MergeModelCallback()
    monkeypatch.setattr(merging, "require_mergekit", lambda what: None)
    for settings, said in (({}, "save_strategy='no' keeps none"), ({"save_strategy": "epoch"}, "target_model_path")):
        trainer = sft(tmp_path, tiny(tokenizer), tokenizer, chat_rows(4), max_steps=1, **settings)
        trainer.add_callback(trl.MergeModelCallback())
        with pytest.raises(ValueError, match=said):
            trainer.train()
        assert trainer.state.global_step == 0


# --- Weave -----------------------------------------------------------------------------------------------------------


def test_answers_go_to_weave(tmp_path, tokenizer, monkeypatch):
    """A stand-in for the package, with the calls of weave 0.54 that are made."""
    with pytest.raises(ImportError, match="WeaveCallback needs the package weave"):
        trl.WeaveCallback(None)
    logged = []

    class Line:
        def log_score(self, scorer, score):
            logged.append((scorer, score))

        def finish(self):
            logged.append("line")

    class Log:
        def __init__(self, model, dataset, eval_attributes):
            logged.append((model, dataset, eval_attributes["training_step"]))

        def log_prediction(self, inputs, output):
            assert inputs["prompt"] and isinstance(output, str)
            return Line()

        def log_summary(self, summary):
            logged.append(summary)

    weave = types.ModuleType("weave")
    weave.__spec__ = importlib.machinery.ModuleSpec("weave", None)
    projects = []
    weave.get_client, weave.init, weave.EvaluationLogger = lambda: projects or None, projects.append, Log
    monkeypatch.setitem(sys.modules, "weave", weave)

    rows = pair_rows(4)
    args = trl.DPOConfig(**{**DEFAULTS, "output_dir": str(tmp_path)}, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer = trl.DPOTrainer(
        tiny(tokenizer), args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    short = GenerationConfig(max_new_tokens=4, do_sample=False)
    callback = trl.WeaveCallback(
        trainer, scorers={"prompts": lambda prompt, answer: len(prompt)}, generation_config=short, num_prompts=2
    )
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match="knows no project"):
        trainer.train()
    callback.project_name, callback.model_name = "mine", "tiny"
    trainer.train()
    lengths = [len(prompt) for prompt in callback.prompts]
    assert all(row["prompt"][0]["content"] in text for row, text in zip(rows, callback.prompts, strict=False))
    assert projects == ["mine"]
    assert logged == [
        ("tiny", "eval_dataset", 2),
        *(entry for length in lengths for entry in (("prompts", length), "line")),
        {"total_predictions": 2, "avg_prompts": sum(lengths) / 2},
    ]
