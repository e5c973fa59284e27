"""What runs on a GPU alone, with its one kernel written out: numbers of whole models, and what the probe finds."""

import copy

import pytest
import torch

from tests.engine import families
from tests.engine.test_attention import reference_varlen
from trl.engine import kernel as engine
from trl.engine import probe
from trl.engine.forest import without_kernel
from trl.engine.probe import attach
from trl.engine.score import score
from trl.models.offload import _policy

FAMILIES = ["llama", "qwen2-window", "gemma3", "qwen3_moe", "gpt_neox", "gpt_oss"]


def backward_by_contract(part, grad, query, key, value, out, lse, scale):
    """What the kernel's backward pass computes: from weights exp(score - lse) and the outputs that it is given."""
    grads = [torch.zeros_like(each) for each in (query, key, value)]
    repeats, (left, right) = query.shape[1] // key.shape[1], part.window
    ends = [each.tolist() for each in (part.cu_query, part.cu_key)]
    for q0, q1, k0, k1 in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
        keys, values = (each[k0:k1].repeat_interleave(repeats, 1) for each in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], keys) * scale
        position = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        other = torch.arange(k1 - k0)
        hidden = ((right == 0) & (other > position)) | ((left >= 0) & (other < position - left))
        weights = (scores - lse[:, q0:q1, None]).exp().masked_fill(hidden, 0.0)
        of_weights = torch.einsum("qhd,khd->hqk", grad[q0:q1], values)
        along = torch.einsum("qhd,qhd->hq", grad[q0:q1], out[q0:q1])[..., None]
        of_scores = weights * (of_weights - along) * scale
        grads[0][q0:q1] = torch.einsum("hqk,khd->qhd", of_scores, keys)
        for place, found in (
            (1, torch.einsum("hqk,qhd->khd", of_scores, query[q0:q1])),
            (2, torch.einsum("hqk,qhd->khd", weights, grad[q0:q1])),
        ):
            grads[place][k0:k1] = found.view(k1 - k0, key.shape[1], repeats, -1).sum(2)
    return tuple(grads)


def stand_in(query, *args, **kwargs):
    """The kernel's contract as a differentiable function."""
    stand_in.calls += 1
    return reference_varlen(query, *args, **kwargs)


@pytest.fixture
def kernel(monkeypatch):
    """This machine as one whose kernel serves every layer without score caps and sinks."""
    stand_in.calls = 0
    monkeypatch.setattr(engine, "varlen_attn", stand_in)
    monkeypatch.setattr(engine._Part, "backward", backward_by_contract)
    monkeypatch.setattr(probe, "has_flash_attention", lambda device: True)
    monkeypatch.setattr(engine, "serves", lambda query, value, scoring: scoring.softcap is None)
    return monkeypatch


def numbers(model, batch):
    model.zero_grad()
    logp_N = score(model, batch).logp_N
    (logp_N * torch.linspace(-1, 1.5, len(logp_N))).sum().backward()
    return logp_N.detach(), families.gradients(model)


@pytest.mark.parametrize(
    ("family", "joined"),
    [*((family, True) for family in FAMILIES), *((family, False) for family in FAMILIES if family != "gpt_oss")],
)  # sinks need the parts
def test_a_model_by_the_kernel_has_the_numbers_of_segments_one_by_one(kernel, family, joined):
    kernel.setattr(engine, "_gives_parts", lambda: joined)
    model = families.build(family)
    attachment = attach(model)
    assert attachment.is_flat and attachment.kernel_reason is None and not attachment.repeats_keys
    stand_in.calls = 0
    batch = attachment.batch(families.forest())
    logp_N, gradients = numbers(model, batch)
    calls = stand_in.calls
    windows = sum("sliding" in kind for kind in getattr(model.config, "layer_types", None) or [])
    assert calls == model.config.num_hidden_layers + joined * (model.config.num_hidden_layers - windows)
    expected_N, others = numbers(model, without_kernel(batch))
    assert stand_in.calls == calls
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
    kernel.setattr(engine, "_gives_parts", lambda: False)
    kernel.setattr(engine, "varlen_attn", broken)
    model = families.build("llama")
    attachment = attach(model)
    assert attachment.is_flat and attachment.kernel_reason.startswith(reason)
    batch = attachment.batch(families.forest())
    assert set(batch["segments"]) == {"spans"}
    torch.testing.assert_close(
        score(model, batch).logp_N, families.naive(model, families.forest())["logp"], atol=1e-5, rtol=1e-5
    )


def test_parts_that_fail_leave_the_kernel_with_repeated_keys(kernel):
    kernel.setattr(engine._Part, "backward", refuses)
    model = families.build("llama")
    attachment = attach(model)
    assert attachment.is_flat and attachment.kernel_reason is None and attachment.repeats_keys
    stand_in.calls = 0
    logp_N, _ = numbers(model, attachment.batch(families.forest()))
    assert stand_in.calls == model.config.num_hidden_layers
    torch.testing.assert_close(logp_N, families.naive(model, families.forest())["logp"], atol=1e-5, rtol=1e-5)


def test_a_model_that_does_not_train_needs_no_backward_pass(kernel):
    kernel.setattr(engine, "_gives_parts", lambda: False)
    kernel.setattr(engine, "varlen_attn", without_backward)
    assert attach(families.build("llama").requires_grad_(False)).kernel_reason is None


def test_the_probe_runs_the_kernel_in_the_precision_of_training(kernel):
    seen = set()

    def noted(query, *args, **kwargs):
        seen.add(query.dtype)
        return reference_varlen(query, *args, **kwargs)

    kernel.setattr(engine, "varlen_attn", noted)
    kernel.setattr(engine, "serves", lambda query, value, scoring: query.dtype == torch.bfloat16)
    model = families.build("llama")
    assert attach(copy.deepcopy(model)).kernel_reason is None and not seen
    attachment = attach(model, lambda: torch.autocast("cpu", torch.bfloat16))
    assert attachment.kernel_reason is None and seen == {torch.bfloat16}


def test_selective_checkpointing_keeps_what_the_kernel_returned():
    kept = _policy(None, torch.ops.aten.mm.default)
    assert _policy(None, torch.ops.torch_attn._varlen_attn.default) is kept
    assert _policy(None, torch.ops.aten.tanh.default) is not kept
