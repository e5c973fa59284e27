"""What runs on a GPU alone, with its one kernel written out: numbers of whole models, and what the probe finds."""

import copy

import pytest
import torch

from tests.engine import families
from tests.engine.test_attention import reference_varlen
from trl.engine import attention
from trl.engine.forest import without_kernel
from trl.engine.probe import attach
from trl.engine.score import score
from trl.models.offload import _policy

FAMILIES = ["llama", "qwen2-window", "gemma3", "qwen3_moe", "gpt_neox"]


def stand_in(query, *args, **kwargs):
    """The kernel's contract as a differentiable function."""
    stand_in.calls += 1
    return reference_varlen(query, *args, **kwargs)


@pytest.fixture
def kernel(monkeypatch):
    """This machine as one whose kernel serves every layer without score caps and sinks."""
    stand_in.calls = 0
    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    monkeypatch.setattr(attention, "has_kernel", lambda device: True)
    monkeypatch.setattr(attention, "_varlen_serves", lambda query, value, scoring: not scoring.explicit)
    return monkeypatch


def numbers(model, batch):
    model.zero_grad()
    logp_N = score(model, batch).logp_N
    (logp_N * torch.linspace(-1, 1.5, len(logp_N))).sum().backward()
    return logp_N.detach(), families.gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_by_the_kernel_has_the_numbers_of_segments_one_by_one(kernel, family):
    model = families.build(family)
    attachment = attach(model)
    assert attachment.is_flat and attachment.kernel_reason is None
    stand_in.calls = 0
    batch = attachment.batch(families.forest())
    logp_N, gradients = numbers(model, batch)
    assert stand_in.calls == model.config.num_hidden_layers
    expected_N, others = numbers(model, without_kernel(batch))
    assert stand_in.calls == model.config.num_hidden_layers
    torch.testing.assert_close(logp_N, expected_N, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], atol=1e-5, rtol=1e-4, msg=name)


def refuses(*args, **kwargs):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


def shifted(query, key, value, *args, **kwargs):
    return reference_varlen(query, key, value, *args, **kwargs) + 0.3 * value.mean()


def without_gradient_of_keys(query, key, value, *args, **kwargs):
    return reference_varlen(query, key.detach(), value.detach(), *args, **kwargs)


def without_backward(query, *args, **kwargs):
    out = reference_varlen(query, *args, **kwargs)
    if out.requires_grad:
        out.register_hook(refuses)
    return out


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (refuses, "it does not run here (RuntimeError: FlashAttention only supports Ampere"),
        (shifted, "its outputs differ"),
        (without_gradient_of_keys, "its gradients differ"),
        (without_backward, "it does not run here"),
    ],
)
def test_a_kernel_that_fails_is_left_out_and_rows_stay_flat(kernel, broken, reason):
    kernel.setattr(attention, "varlen_attn", broken)
    model = families.build("llama")
    attachment = attach(model)
    assert attachment.is_flat and attachment.kernel_reason.startswith(reason)
    batch = attachment.batch(families.forest())
    assert set(batch["segments"]) == {"spans"}
    torch.testing.assert_close(
        score(model, batch).logp_N, families.naive(model, families.forest())["logp"], atol=1e-5, rtol=1e-5
    )


def test_a_model_that_does_not_train_needs_no_backward_pass(kernel):
    kernel.setattr(attention, "varlen_attn", without_backward)
    assert attach(families.build("llama").requires_grad_(False)).kernel_reason is None


def test_the_probe_runs_the_kernel_in_the_precision_of_training(kernel):
    seen = set()

    def noted(query, *args, **kwargs):
        seen.add(query.dtype)
        return reference_varlen(query, *args, **kwargs)

    kernel.setattr(attention, "varlen_attn", noted)
    kernel.setattr(attention, "_varlen_serves", lambda query, value, scoring: query.dtype == torch.bfloat16)
    model = families.build("llama")
    assert attach(copy.deepcopy(model)).kernel_reason is None and not seen
    attachment = attach(model, lambda: torch.autocast("cpu", torch.bfloat16))
    assert attachment.kernel_reason is None and seen == {torch.bfloat16}


def test_selective_checkpointing_keeps_what_the_kernel_returned():
    kept = _policy(None, torch.ops.aten.mm.default)
    assert _policy(None, torch.ops.torch_attn._varlen_attn.default) is kept
    assert _policy(None, torch.ops.aten.tanh.default) is not kept
