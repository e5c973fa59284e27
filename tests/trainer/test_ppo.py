"""PPO in both its forms: what a round makes of scores, what a checkpoint keeps, and what is refused."""

import json
import math

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

import trl
from tests.trainer.helpers import DEFAULTS, tiny, tiny_scorer
from tests.trainer.test_online import PROMPTS, Canned, reward
from trl.engine.probe import attach
from trl.engine.score import score
from trl.losses import value
from trl.models.value_head import HEAD_FILE, saved_head, value_head
from trl.trainer.kl_control import AdaptiveKLController, RunningMoments

ALL = ("objective/kl", "loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "val/error")


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


def trained(path, tokenizer, model=None, **settings):
    further = {name: settings.pop(name) for name in ("value_model", "ref_model", "peft_config") if name in settings}
    settings = {"per_device_train_batch_size": 4, "max_completion_length": 8, "temperature": 1.0, **settings}
    trainer = trl.PPOTrainer(
        args=trl.PPOConfig(**{**DEFAULTS, "output_dir": str(path), "max_steps": 1, **settings}),
        processing_class=tokenizer,
        model=model or tiny(tokenizer),
        reward_funcs=reward,
        train_dataset=PROMPTS[:4],
        **further,
    )
    trainer.sampler = Canned()
    return trainer


def in_steps(path, tokenizer, model=None, dataset=None, **settings):
    settings = {"mini_batch_size": 4, "batch_size": 4, **settings}
    config = trl.PPOConfig(**{**DEFAULTS, "output_dir": str(path), **settings})
    return trl.PPOTrainer(config=config, model=model or tiny(tokenizer), tokenizer=tokenizer, dataset=dataset)


def test_gae_is_the_sum_of_discounted_surprises():
    reward_ST, value_ST = torch.randn(3, 6), torch.randn(3, 6)
    found = value.gae(reward_ST=reward_ST, value_ST=value_ST, gamma=0.9, lam=0.8)
    following_ST = torch.cat([value_ST[:, 1:], torch.zeros(3, 1)], 1)
    surprise_ST = reward_ST + 0.9 * following_ST - value_ST
    for start in range(6):
        weights_T = torch.tensor([0.72**step for step in range(6 - start)])
        torch.testing.assert_close(found[:, start], (surprise_ST[:, start:] * weights_T).sum(1))
    # Without discount the returns are what is still to come.
    returns_ST = value.gae(reward_ST=reward_ST, value_ST=value_ST, gamma=1.0, lam=1.0) + value_ST
    torch.testing.assert_close(returns_ST, reward_ST.flip(1).cumsum(1).flip(1))


def test_whitening_by_parts_is_whitening_of_the_whole():
    values = torch.randn(50) * 3 + 2
    whole = value.moments(values[:20]) + value.moments(values[20:])
    torch.testing.assert_close(
        value.whitened(values, whole), (values - values.mean()) / values.std(), atol=1e-5, rtol=0
    )
    assert value.whitened(values, whole, shift_mean=False).mean().item() == pytest.approx(
        values.mean().item(), rel=1e-5
    )
    alike = torch.full((5,), 7.0)
    assert value.whitened(alike, value.moments(alike)).abs().max() < 1e-2


def test_a_steered_weight_follows_the_divergence():
    control = AdaptiveKLController(0.2, target=6.0, horizon=1000)
    control.update(current=60.0, n_steps=100)  # the error is bounded to a fifth
    assert control.value == pytest.approx(0.2 * 1.02)
    control.update(current=5.4, n_steps=100)
    assert control.value == pytest.approx(0.2 * 1.02 * 0.99)
    running, values = RunningMoments(), torch.randn(30)
    running.update(values[:10])
    running.update(values[10:])
    assert running.mean == pytest.approx(values.mean().item(), abs=1e-6)
    assert running.std == pytest.approx(values.std().item(), rel=1e-6)


def test_both_forms_train_alike_on_the_same_responses(tmp_path, tokenizer):
    settings = {"kl_coef": 0.1, "num_iterations": 2, "learning_rate": 1e-3, "adap_kl_ctrl": False, "temperature": 1.0}
    whole = trained(tmp_path / "whole", tokenizer, max_steps=2, num_mini_batches=1, shuffle_dataset=False, **settings)
    drawn = []
    collect = whole.collector.collect
    whole.collector.collect = lambda *args, **kwargs: drawn.append(collect(*args, **kwargs)) or drawn[-1]
    whole.train()
    traces = drawn[0].traces
    loop = in_steps(tmp_path / "loop", tokenizer, **settings)
    value_head(loop.model).load_state_dict({"summary.weight": torch.zeros(1, 32), "summary.bias": torch.zeros(1)})
    stats = loop.step(
        [torch.tensor(each.prompt_ids) for each in traces],
        [torch.tensor(each.columns["ids"]) for each in traces],
        [each.rewards[0] for each in traces],
    )
    lines = [line for line in whole.state.log_history if "loss/policy_avg" in line]
    for name, source in (("ppo/loss/policy", "loss/policy_avg"), ("ppo/loss/value", "loss/value_avg")):
        assert stats[name] == pytest.approx(sum(line[source] for line in lines) / 2, rel=1e-4, abs=1e-6)
    assert stats["objective/kl"] == pytest.approx(lines[0]["objective/kl"], abs=1e-6)
    for (name, ours), (_, theirs) in zip(loop.model.named_parameters(), whole.model.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["head", "critic", "adapter", "bfloat16"])
def test_the_value_function_trains_and_comes_back(tmp_path, tokenizer, kind):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "num_iterations": 1}
    model = tiny(tokenizer).to(torch.bfloat16) if kind == "bfloat16" else tiny(tokenizer)
    if kind == "critic":
        settings["value_model"] = tiny_scorer(tokenizer)
    if kind == "adapter":
        settings["peft_config"] = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    trainer = trained(tmp_path, tokenizer, model, **settings)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss/value_avg" in line]
    assert all(math.isfinite(line[name]) for line in lines for name in ALL if name in line)
    assert lines[0]["loss"] == pytest.approx(lines[0]["loss/policy_avg"] + 0.1 * lines[0]["loss/value_avg"], rel=1e-4)
    saved = tmp_path / "checkpoint-3"
    names = {path.name for path in saved.iterdir()}
    plain = set(json.loads((saved / "config.json").read_text())) if kind != "adapter" else set()
    assert "v_head" not in plain
    if kind == "critic":
        assert "value_model" in names and HEAD_FILE not in names
        other = trl.models.load.load_scorer(str(saved / "value_model"))
        assert torch.equal(other.score.weight, trainer.model.critic.score.weight)
    else:
        head = value_head(trainer.model.get_base_model() if kind == "adapter" else trainer.model)
        assert head.summary.weight.abs().max() > 0  # it begins with 0
        assert torch.equal(saved_head(saved)["summary.weight"], head.summary.weight)
    if kind == "head":
        again = trl.AutoModelForCausalLMWithValueHead.from_pretrained(str(saved))
        assert torch.equal(again.v_head.summary.weight, head.summary.weight)


def test_values_are_of_the_states_before_the_tokens(tokenizer):
    model = trl.AutoModelForCausalLMWithValueHead.from_pretrained(
        tiny(tokenizer), v_head_init_strategy="normal", v_head_initializer_range=0.5, summary_dropout_prob=0.0
    )
    attached = attach(model.pretrained_model)
    from trl.data.batching.collate import Branch, Tree

    tree = Tree(Branch([5, 6, 7], [False] * 3), (Branch([8, 9], [True] * 2), Branch([10, 11, 12], [True] * 3)))
    ours = score(model.pretrained_model, attached.batch([tree]), values=True).value_N
    for ids, part in (([5, 6, 7, 8, 9], ours[:2]), ([5, 6, 7, 10, 11, 12], ours[2:])):
        logits, loss, values = model(torch.tensor([ids]), labels=torch.tensor([ids]))
        torch.testing.assert_close(part, values[0, 2:-1], atol=1e-5, rtol=1e-5)
        assert logits.dtype == torch.float32 and loss.ndim == 0


def test_a_loop_of_ones_own(tmp_path, tokenizer, capsys):
    texts = [
        {"text": f"the {word} sat on the old mat and looked at us"} for word in "cat dog bird fish cow pig".split()
    ]
    loop = in_steps(
        tmp_path,
        tokenizer,
        dataset=texts,
        batch_size=2,
        mini_batch_size=1,
        query_length=6,
    )
    seen = []
    for batch in loop.dataloader:
        queries = batch["input_ids"]
        assert all(len(each) == 6 for each in queries) and len(queries) == 2
        responses = loop.generate(queries, max_new_tokens=5)
        assert all(torch.equal(one[:6], query) for one, query in zip(responses, queries, strict=True))
        alone = loop.generate(queries[0], max_new_tokens=5, return_prompt=False)
        assert alone.shape[0] == 1 and alone.shape[1] <= 5
        assert len(loop.generate(torch.stack(queries), length_sampler=lambda: 2)[0]) <= 8
        stats = loop.step(queries, responses, [torch.tensor(0.5), 1])
        loop.log_stats(stats, batch, [0.5, 1.0])
        seen += batch["query"]
    assert len(seen) == len(set(seen)) == 6
    assert loop.state.log_history[-1]["env/reward_mean"] == 0.75
    assert "responses begin with their query" in capsys.readouterr().out
    _, reference = loop.generate(queries, generate_ref_response=True, max_new_tokens=3)
    assert len(reference) == 2


@pytest.mark.parametrize(
    ("queries", "responses", "scores", "words"),
    [
        ([[5, 6], [7]], [[8], [9]], [1.0, 2.0], "a step takes 4 of each"),
        ([[5, 6], [], [7], [8]], [[8], [9], [9], [9]], [1.0] * 4, "query 1 has no tokens"),
        ([[5, 6], [4], [7], [8]], [[8], [], [9], [9]], [1.0] * 4, "response 1 has no tokens"),
        ([[5, 6], [4], [7], [8]], [[8], [9], [7], [9]], [1.0] * 4, "response 2 is its query and nothing more"),
        ([[5, 6], [4], [7], [8]], [[8], [9], [9], [9]], [1.0] * 3, "here are 3 scores"),
        ([[5, 6], [4], [7], [8]], [[8], [9], [9], [9]], [1.0, 1.0, float("nan"), 1.0], "score 2 is nan"),
        ([[5, 6], [4], [7], [8]], [[8], [9], [9], [9]], [1.0, [1.0, 2.0], 1.0, 1.0], "score 1 is"),
        ("what", [[8]], [1.0], "a list of 1-D tensors of token ids is wanted, not a str"),
    ],
)
def test_a_step_that_does_not_fit_changes_nothing(tmp_path, tokenizer, queries, responses, scores, words):
    loop = in_steps(tmp_path, tokenizer)
    before = {name: each.clone() for name, each in loop.model.state_dict().items()}
    as_given = queries if isinstance(queries, str) else [torch.tensor(each, dtype=torch.long) for each in queries]
    with pytest.raises(ValueError, match=words):
        loop.step(as_given, [torch.tensor(each, dtype=torch.long) for each in responses], scores)
    assert all(torch.equal(each, before[name]) for name, each in loop.model.state_dict().items())


def test_what_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="batch_size=6 is no multiple of an optimizer step"):
        in_steps(tmp_path, tokenizer, batch_size=6)
    with pytest.raises(ValueError, match="num_mini_batches=3 does not divide the 4 completions"):
        trained(tmp_path, tokenizer, num_mini_batches=3)
    with pytest.raises(ValueError, match="compares each with a value"):
        trained(tmp_path, tokenizer, dynamic_sampling=True)
    with pytest.raises(ValueError, match="value_model is a LlamaForCausalLM with no scoring head"):
        trained(tmp_path, tokenizer, value_model=tiny(tokenizer))
    model = tiny(tokenizer)
    with pytest.raises(ValueError, match="ref_model is the model itself"):
        trained(tmp_path, tokenizer, model, ref_model=model)
    with pytest.raises(ValueError, match=r"query_dataset='nowhere/at-all' cannot be loaded.*Pass dataset="):
        _ = in_steps(tmp_path, tokenizer, query_dataset="nowhere/at-all").dataloader
    with pytest.raises(ValueError, match="is for a loop of your own"):
        in_steps(tmp_path, tokenizer).train()
    head = trl.models.value_head.ValueHead(99)
    with pytest.raises(ValueError, match="for hidden states of 99 numbers"):
        trl.AutoModelForCausalLMWithValueHead(tiny(tokenizer)).v_head = head


def test_a_step_too_far_changes_no_weights(tmp_path, tokenizer):
    trainer = trained(tmp_path, tokenizer, max_steps=4, num_iterations=4, early_stopping=True, target_kl=1e-9)
    trainer.train()
    left_out = [line.get("policy/steps_left_out") for line in trainer.state.log_history if "loss" in line]
    assert left_out[0] == 0.0 and 1.0 in left_out  # the first step is on the policy that sampled
    loop = in_steps(tmp_path, tokenizer, ratio_threshold=0.5, max_grad_norm=None)
    before = {name: each.clone() for name, each in loop.model.state_dict().items()}
    loop.step([torch.tensor([5, 6])] * 4, [torch.tensor([8, 9])] * 4, [1.0, 2.0, 3.0, 4.0])
    assert all(torch.equal(each, before[name]) for name, each in loop.model.state_dict().items())


def test_shared_layers_are_one_and_frozen(tokenizer):
    model = tiny(tokenizer)
    reference = trl.create_reference_model(model, num_shared_layers=1)
    assert reference.model.layers[0].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight
    assert reference.model.layers[1].mlp.up_proj.weight is not model.model.layers[1].mlp.up_proj.weight
    assert not model.model.embed_tokens.weight.requires_grad and model.model.layers[1].mlp.up_proj.weight.requires_grad
    assert not any(each.requires_grad for each in reference.parameters())
    with pytest.raises(ValueError, match="has no layer `transformer.h.1`"):
        trl.create_reference_model(tiny(tokenizer), 1, pattern="transformer.h.{layer}")


def test_an_older_checkpoint_with_its_head_among_the_weights(tmp_path, tokenizer):
    from safetensors.torch import load_file, save_file

    model = tiny(tokenizer)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {"v_head.summary.weight": torch.full((1, 32), 0.25), "v_head.summary.bias": torch.tensor([0.5])}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = trl.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert found.v_head.summary.weight[0, 3] == 0.25 and found.v_head.summary.bias == 0.5
