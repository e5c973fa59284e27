"""Wrappers and devices: hooks that move inputs and weights, deep copies, generation, PEFT, autocast, checkpointing."""

import copy

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device

from tests.engine import families
from trl.engine.forest import flat, padded, unshared
from trl.engine.probe import attach
from trl.engine.score import score
from trl.models.unwrap import unwrap


def test_device_hooks_move_every_tensor_of_the_segments_and_keep_the_rest():
    batch = flat(families.forest())
    moved = send_to_device(batch["segments"], "meta")
    tensors = [name for name, value in batch["segments"].items() if isinstance(value, torch.Tensor)]
    of_roots = ["branch_index", "root_index", "cu_branch_R1", "cu_root_R1"]
    assert tensors == ["cu_query_M1", "cu_key_M1", "key_index", *of_roots]
    assert all(moved[name].is_meta for name in tensors)
    assert moved["spans"] == batch["segments"]["spans"]


def test_every_layer_of_a_split_model_gets_its_segments():
    """A device map's hooks see the segments as a keyword of each layer, so each layer gets them on its own device."""
    model = families.build("llama")
    attach(model)
    seen = []

    class Spy(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append((module.self_attn.layer_idx, set(kwargs["segments"])))
            return args, kwargs

    for layer in model.model.layers:
        add_hook_to_module(layer, Spy())
    batch = flat(families.forest())
    score(model, batch)
    assert seen == [(0, set(batch["segments"])), (1, set(batch["segments"]))]


def test_offloaded_weights_are_brought_in_by_their_hooks():
    """Every weight, the head's too, is on the meta device between calls."""
    model = families.build("llama")
    trees = families.forest()
    expected = families.naive(copy.deepcopy(model), trees)["logp"]
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    attachment = attach(model)
    assert attachment.is_flat, attachment.reason
    with torch.no_grad():
        torch.testing.assert_close(score(model, attachment.batch(trees)).logp_N, expected, atol=1e-5, rtol=1e-5)


def test_a_deep_copy_is_a_model_of_its_own():
    """A frozen reference is a copy: it must not call into the model it was copied from."""
    model = families.build("llama")
    attach(model)
    twin = copy.deepcopy(model)
    batch = flat(families.forest())
    before = score(twin, batch).logp_N.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(score(twin, batch).logp_N, before)
    assert not torch.allclose(score(model, batch).logp_N, before)


def test_attach_leaves_nothing_in_a_saved_model(tmp_path):
    model = families.build("gemma2")
    attach(model)
    model.save_pretrained(tmp_path)
    assert "trl" not in (tmp_path / "config.json").read_text()
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    trees = families.forest()
    torch.testing.assert_close(
        score(model, flat(trees)).logp_N, families.naive(plain, trees)["logp"], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "gemma3", "gpt2", "gpt_oss", "opt", "stablelm"])
def test_left_padded_generation_after_attach(name):
    model = families.build(name)
    plain = copy.deepcopy(model)
    attach(model)
    ids = torch.tensor([[0, 0, 0, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3, 11]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    settings = {"attention_mask": mask, "max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))
    alone = model.generate(ids[:1, 3:], **{**settings, "attention_mask": mask[:1, 3:]})
    assert torch.equal(alone[0, -9:], model.generate(ids, **settings)[0, -9:])


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "opt"])
def test_a_plain_call_after_attach_is_what_it_was(name):
    """With a padding mask, without one, and longer than the window."""
    model = families.build(name)
    plain = copy.deepcopy(model)
    attach(model)
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    for kwargs in ({}, {"attention_mask": torch.ones_like(ids)}, {"attention_mask": mask}):
        ours, theirs = model(input_ids=ids, **kwargs).logits, plain(input_ids=ids, **kwargs).logits
        keep = kwargs.get("attention_mask", torch.ones_like(ids)).bool()
        torch.testing.assert_close(ours[keep], theirs[keep], atol=1e-5, rtol=1e-5)


def adapted(model, **settings):
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config)


def gradients_of(model, batch):
    model.zero_grad()
    score(model, batch).logp_N.sum().backward()
    return families.gradients(model)


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys() and ours
    for name, expected in theirs.items():
        scale = max(expected.abs().max().item(), 1.0)
        torch.testing.assert_close(ours[name], expected, atol=tolerance * scale, rtol=tolerance, msg=name)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
def test_adapters(settings):
    model = adapted(families.build("llama"), **settings)
    reference = copy.deepcopy(model)
    assert attach(model).is_flat
    trees = families.forest()
    families.naive(reference, trees)["logp"].sum().backward()
    assert_close(gradients_of(model, flat(trees)), families.gradients(reference))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("build", [flat, padded])
def test_gradient_checkpointing(reentrant, adapter, build):
    """The recomputed layers read the attention implementation and the segments again."""
    model = families.build("gemma3")
    model = adapted(model) if adapter else model
    attach(model)
    batch = build(families.forest())
    model.train()
    expected = gradients_of(model, batch)
    families.checkpoint_layers(unwrap(model), reentrant)
    assert_close(gradients_of(model, batch), expected)


def test_bf16_autocast_is_close_and_equal_between_layouts():
    model = families.build("llama")
    attach(model)
    trees = families.forest()
    exact = families.naive(copy.deepcopy(model), trees)["logp"]
    with torch.autocast("cpu", torch.bfloat16):
        in_row, apart = score(model, flat(trees)).logp_N, score(model, padded(trees)).logp_N
    assert in_row.dtype == torch.float32
    torch.testing.assert_close(in_row, exact, atol=0.15, rtol=0.1)
    torch.testing.assert_close(apart, exact, atol=0.15, rtol=0.1)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_prompt_learning_runs_padded(kind):
    import peft

    config = {
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }[kind]
    torch.manual_seed(0)
    model = peft.get_peft_model(families.build("llama"), config)
    reference = copy.deepcopy(model)
    attachment = attach(model)
    assert attachment.reason == "prompt learning puts virtual tokens before every row"
    trees = families.forest()
    expected = families.naive(reference, trees)["logp"]
    stats = score(model, attachment.batch(trees))
    torch.testing.assert_close(stats.logp_N, expected, atol=1e-5, rtol=1e-5)
    expected.sum().backward()
    assert_close(gradients_of(model, attachment.batch(trees)), families.gradients(reference))


def test_prompts_need_not_be_shared():
    trees = families.forest()
    apart = unshared(trees)
    assert [len(tree.branches) for tree in apart] == [0] * 6
    model = families.build("llama")
    attach(model)
    torch.testing.assert_close(score(model, flat(apart)).logp_N, score(model, flat(trees)).logp_N, atol=1e-5, rtol=1e-5)
    assert flat(apart)["tokens"] > flat(trees)["tokens"]


def test_an_empty_forest_adds_zero():
    model = families.build("llama")
    attach(model)
    for build in (flat, padded):
        batch = build([])
        assert batch["tokens"] == 0
        gradient = gradients_of(model, batch)
        assert len(gradient) == len(list(model.parameters()))
        assert all(torch.count_nonzero(value) == 0 for value in gradient.values())


def test_a_head_that_is_not_linear_is_found_out():
    """Logits that are more than a linear layer on the last hidden states are computed in full, with the reason kept."""
    model = families.build("llama")
    original = type(model).forward

    def forward(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        out.logits = out.logits + 0.1 * out.logits.roll(1, -1)
        return out

    model.__class__ = type("Odd", (type(model),), {"forward": forward})
    reference = copy.deepcopy(model)
    attachment = attach(model)
    assert attachment.is_flat and "not a linear head" in attachment.head_reason
    trees = families.forest()
    torch.testing.assert_close(
        score(model, flat(trees), temperature=0.7).logp_N,
        families.naive(reference, trees, 0.7)["logp"],
        atol=1e-5,
        rtol=1e-5,
    )


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="load it with AutoModelForCausalLM"):
        attach(families.build("llama").model)


@pytest.mark.parametrize("build", [flat, padded])
def test_embedding_noise_goes_by_each_sequences_own_length(build):
    """NEFTune: alpha / sqrt(length * H), the same in a shared row as alone."""
    model = families.build("llama")
    attach(model)
    seen = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trees = families.forest()
    torch.manual_seed(0)
    score(model, build(trees), embedding_noise=5.0)
    batch = build(trees)
    noise = (seen[0]["inputs_embeds"] - model.model.embed_tokens(batch["input_ids"])).abs()
    if build is flat:
        lengths = [13, 9, 16, 13, 10, 2, 13, 2]  # a root by its own length, a branch with its root's
        sizes = [part.max().item() for part in noise[0].split([13, 9, 7, 4, 1, 2, 11, 2])]
    else:
        lengths = [13, 16, 13, 10, 13, 2]
        sizes = [row[:length].max().item() for row, length in zip(noise, lengths, strict=True)]
    for size, length in zip(sizes, lengths, strict=True):
        bound = 5.0 / (length * 32) ** 0.5
        assert 0.85 * bound < size <= bound * 1.0001
