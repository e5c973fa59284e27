"""Flat = padded = naive, values and gradients, family by family; what the probe refuses, and why."""

import copy

import pytest
import torch

from tests.engine import families
from trl.engine.forest import flat, padded
from trl.engine.probe import attach
from trl.engine.score import score

TOLERANCE = 1e-5


def objective(stats, weights_N):
    """A loss that weighs every token differently and pulls on the entropy too."""
    return (stats.logp_N * weights_N).sum() + 0.3 * (stats.entropy_N * weights_N.flip(0)).sum()


def check(model, reference, batch, trees, temperature=1.0):
    expected = families.naive(reference, trees, temperature)
    weights_N = torch.linspace(-1, 1.5, len(expected["logp"]))
    model.zero_grad()
    reference.zero_grad()
    stats = score(model, batch, entropy_grad=True, top1=True, mean_logit=True, sum_sq=True, temperature=temperature)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(stats, f"{name}_N"), value, atol=TOLERANCE, rtol=TOLERANCE)
    objective(stats, weights_N).backward()
    ((expected["logp"] * weights_N).sum() + 0.3 * (expected["entropy"] * weights_N.flip(0)).sum()).backward()
    ours, theirs = families.gradients(model), families.gradients(reference)
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for name, gradient in theirs.items():
        scale = max(gradient.abs().max().item(), 1.0)
        torch.testing.assert_close(
            ours[name], gradient, atol=TOLERANCE * scale, rtol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", families.FLAT)
def test_flat_equals_padded_equals_naive(name):
    model = families.build(name)
    reference = copy.deepcopy(model)
    trees = families.forest()
    attachment = attach(model)
    assert attachment.is_flat, attachment.reason
    assert attachment.head_reason is None
    check(model, reference, flat(trees), trees)
    check(model, reference, padded(trees), trees, temperature=0.7)


@pytest.mark.parametrize("name", families.REFUSED)
def test_refused_by_the_probe_and_right_when_padded(name):
    model = families.build(name)
    reference = copy.deepcopy(model)
    trees = families.forest()
    attachment = attach(model)
    assert not attachment.is_flat
    assert attachment.reason
    check(model, reference, attachment.batch(trees), trees)
