"""Attention by blocks of queries against all scores at once: values, gradients, memory."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.engine import families
from trl.engine import blocks
from trl.engine.blocks import Scoring, attend, written_out
from trl.engine.probe import attach
from trl.engine.score import score
from trl.models.offload import _policy

SHAPES = {"square": (1, 150, 150), "after a prompt": (2, 70, 190), "one query": (3, 1, 40), "short": (1, 2, 2)}
KINDS = {
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "both": {"softcap": 5.0, "sinks": True},
    "softcap, window": {"softcap": 5.0, "window": 40},
    "sinks, window": {"sinks": True, "window": 40},
}
MASKS = ("none", "boolean", "additive")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", 1)  # the shortest blocks


def made(rows, queries, keys, kind, mask, dtype=torch.float32):
    """Leaves (query, key, value and sinks), a mask and the scoring."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    leaves = [draw(rows, 4, queries, 8), draw(rows, 2, keys, 8), draw(rows, 2, keys, 8)]
    settings = dict(KINDS[kind])
    if settings.pop("sinks", False):
        leaves.append(draw(4))
    allowed = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    if settings.get("window"):
        allowed &= torch.ones_like(allowed).triu(keys - queries - settings["window"] + 1)
    allowed = allowed[None, None].repeat(rows, 1, 1, 1)
    allowed[-1, :, :, :1] &= queries == 1  # as padding does; a query may see nothing
    grid = {
        "none": None,
        "boolean": allowed,
        "additive": torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min),
    }[mask]
    return leaves, grid, Scoring(scale=0.4, sinks=leaves[3] if len(leaves) > 3 else None, **settings)


def computed(function, leaves, mask, scoring):
    out = function(*leaves[:3], mask, scoring)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad((out.float() * weight).sum(), leaves)]


@pytest.mark.parametrize(("shape", "kind", "mask"), [*itertools.product(SHAPES, KINDS, MASKS)])
def test_blocks_equal_all_scores_at_once(shape, kind, mask):
    leaves, grid, scoring = made(*SHAPES[shape], kind, mask)
    for got, expected in zip(computed(attend, leaves, grid, scoring), computed(written_out, leaves, grid, scoring),
                             strict=True):  # fmt: skip
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_as_near_to_float32_as_all_scores_at_once(kind):
    leaves, _, scoring = made(1, 150, 150, kind, "none", torch.bfloat16)
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    sinks = exact[3] if len(exact) > 3 else None
    expected = computed(written_out, exact, None, scoring._replace(sinks=sinks))
    found = [computed(function, leaves, None, scoring) for function in (attend, written_out)]
    for got, plain, wanted in zip(*found, expected, strict=True):
        ours, theirs = ((each.float() - wanted).norm() / wanted.norm() for each in (got, plain))
        assert got.dtype == plain.dtype
        assert ours <= 1.2 * theirs + 1e-3


class Largest(TorchDispatchMode):
    """The largest number of elements of a tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        made = [each.untyped_storage().nbytes() // each.element_size() for each in tree_iter(found)
                if isinstance(each, torch.Tensor)]  # fmt: skip
        self.elements = max(self.elements, *made, 0)
        return found


@pytest.mark.parametrize("selective", [False, True])
def test_no_scores_of_a_whole_row_are_made(selective):
    leaves, _, scoring = made(1, 400, 400, "both", "none")
    context = lambda: create_selective_checkpoint_contexts(_policy)  # noqa: E731
    with Largest() as seen:
        if selective:
            out = checkpoint(attend, *leaves[:3], None, scoring, use_reentrant=False, context_fn=context)
        else:
            out = attend(*leaves[:3], None, scoring)
        out.sum().backward()
    assert seen.elements <= 4 * blocks.SHORTEST * 400


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_models_of_these_families_have_the_same_numbers(monkeypatch, family):
    """Log-probs and gradients of a forest, beside one sequence at a time through transformers' eager attention."""
    model = families.build(family)
    expected = families.naive(model, families.forest())["logp"]
    expected.sum().backward()
    gradients = families.gradients(model)
    model.zero_grad()
    attachment = attach(model)
    assert attachment.is_flat, attachment.reason
    monkeypatch.setattr(blocks, "written_out", None)  # must not be reached
    logp_N = score(model, attachment.batch(families.forest())).logp_N
    logp_N.sum().backward()
    torch.testing.assert_close(logp_N, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in families.gradients(model).items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-4, rtol=1e-4, msg=name)
