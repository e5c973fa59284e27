"""Callbacks, and the best of several answers."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback

import trl
from tests.trainer.helpers import DEFAULTS, chat_rows, pair_rows, sft, tiny


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
