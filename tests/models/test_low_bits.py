"""The lower halves of bfloat16 weights: exact, whatever the optimizer, and kept by its state."""

import copy

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from trl.models.low_bits import LOW_BITS, hold_in_float32, join, slices, split, updates_in_float32

OPTIMIZERS = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-4),
    "adamw_fused": lambda weights: torch.optim.AdamW(weights, lr=1e-4, fused=True),
    "adamw_foreach": lambda weights: torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.1, amsgrad=True, foreach=True),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=1e-3, momentum=0.9),
    "sgd_plain": lambda weights: torch.optim.SGD(weights, lr=1e-3, weight_decay=0.1),
    "adagrad": lambda weights: torch.optim.Adagrad(weights, lr=1e-4),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, lr=1e-4),
    "muon": lambda weights: torch.optim.Muon([weight for weight in weights if weight.ndim == 2], lr=1e-4),
    "adafactor": lambda weights: Adafactor(weights, lr=1e-4, scale_parameter=False, relative_step=False),
    "adamw_bnb_8bit": lambda weights: bitsandbytes.optim.AdamW8bit(weights, lr=1e-4),
    "lion_32bit": lambda weights: bitsandbytes.optim.Lion(weights, lr=1e-5),
}


def test_both_halves_are_the_float32_to_the_bit():
    whole = torch.randn(4096) * torch.logspace(-38, 38, 4096)
    whole[:5] = torch.tensor([0.0, -0.0, 1e-45, float("inf"), 1 + 2**-8])
    high, low = split(whole)
    assert torch.equal(join(high, low).view(torch.int32), whole.view(torch.int32))
    assert torch.equal(high, whole.bfloat16()) or (high != whole.bfloat16()).sum() == 1  # the tie goes up
    assert torch.isnan(split(torch.tensor([float("nan")]))[0]).all()


@pytest.mark.parametrize("chunk", [30000, 8192], ids=["weights", "slices"])  # one weight at a time, or three slices
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_on_float32_weights(name, chunk, monkeypatch):
    monkeypatch.setattr("trl.models.low_bits.CHUNK", chunk)
    monkeypatch.setattr("trl.models.low_bits.PIECE", 4096)
    torch.manual_seed(0)
    half = nn.Sequential(nn.Linear(131, 158, dtype=torch.bfloat16), nn.Linear(158, 131, dtype=torch.bfloat16))
    full = copy.deepcopy(half).float()
    ours = updates_in_float32(OPTIMIZERS[name](list(half.parameters())))
    theirs = OPTIMIZERS[name](list(full.parameters()))
    for step in range(6):
        for ours_p, theirs_p in zip(half.parameters(), full.parameters(), strict=True):
            ours_p.grad = torch.randn(ours_p.shape).bfloat16()
            theirs_p.grad = ours_p.grad.float()
        if step == 1:  # as clipping does, in place
            torch.nn.utils.clip_grad_norm_(half.parameters(), 0.5)
            for ours_p, theirs_p in zip(half.parameters(), full.parameters(), strict=True):
                theirs_p.grad = ours_p.grad.float()
        if step == 3:  # as a checkpoint does
            again = copy.deepcopy(ours.state_dict())
            ours = updates_in_float32(OPTIMIZERS[name](list(half.parameters())))
            ours.load_state_dict(again)
        ours.step()
        theirs.step()
        assert all(p.dtype == torch.bfloat16 and p.grad is not None for p in half.parameters())
    assert isinstance(ours, type(theirs)) and ours.param_groups[0]["params"][0] is half[0].weight
    for ours_p, theirs_p in zip(half.parameters(), full.parameters(), strict=True):
        if theirs.state.get(theirs_p):
            assert torch.equal(join(ours_p.data, ours.state[ours_p][LOW_BITS]), theirs_p.data)
            for key, value in theirs.state[theirs_p].items():
                own = ours.state[ours_p][key]
                assert torch.equal(own, value) and own.shape == value.shape if torch.is_tensor(value) else own == value


def test_float32_weights_beside_them_step_as_ever():
    torch.manual_seed(0)
    both = [nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8).bfloat16())]
    alone = nn.Parameter(both[0].detach().clone())
    ours, theirs = updates_in_float32(torch.optim.AdamW(both, lr=1e-3)), torch.optim.AdamW([alone], lr=1e-3)
    untouched = both[1].detach().clone()
    for _ in range(3):
        both[0].grad = torch.randn(8)
        alone.grad = both[0].grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(both[0], alone) and torch.equal(both[1], untouched)
    assert updates_in_float32(theirs) is theirs and type(theirs) is torch.optim.AdamW


@pytest.mark.parametrize("chunk", [2**26, 2048], ids=["weights", "slices"])
def test_a_step_that_fails_leaves_weights_and_gradients_in_place(chunk, monkeypatch):
    def fails(self, closure=None):
        raise RuntimeError("no")

    monkeypatch.setattr("trl.models.low_bits.CHUNK", chunk)
    monkeypatch.setattr(torch.optim.SGD, "step", fails)
    weight = nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))
    optimizer = updates_in_float32(torch.optim.SGD([weight], lr=1.0))
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    assert list(optimizer.state) == [weight]
    assert optimizer.param_groups[0]["params"][0] is weight and weight.grad is not None
    assert torch.equal(weight, torch.ones_like(weight))


def test_a_large_weight_is_never_whole_in_float32(monkeypatch):
    """Slices see 2048 numbers at most, and a weight that takes no slices is split a piece at a time."""
    monkeypatch.setattr("trl.models.low_bits.CHUNK", 2048)
    monkeypatch.setattr("trl.models.low_bits.PIECE", 2048)
    seen = []

    def noted(whole):
        seen.append(whole.numel())
        return split(whole)

    monkeypatch.setattr("trl.models.low_bits.split", noted)
    weight = nn.Parameter(torch.randn(100, 50, dtype=torch.bfloat16))
    for optimizer in (torch.optim.SGD([weight], lr=1.0), torch.optim.Muon([weight], lr=1.0)):
        weight.grad = torch.ones_like(weight)
        updates_in_float32(optimizer).step()
        assert seen == [2048, 2048, 904]
        seen.clear()
    assert slices(5000, 10**6) == [slice(0, 5000)] and slices(0, 8) == []


@pytest.mark.parametrize(
    ("dtype", "optim", "autocast", "held"),
    [
        (torch.bfloat16, "adamw_torch", False, ()),
        (torch.bfloat16, "lomo", True, ("1",)),
        (torch.bfloat16, "galore_adamw_layerwise", False, ("0", "1")),
        (torch.bfloat16, "schedule_free_adamw", True, ("1",)),
        (torch.float16, "adamw_torch", True, ("1",)),
        (torch.float32, "lomo", True, ("0", "1")),
    ],
)
def test_where_the_lower_halves_cannot_be_kept_weights_are_held_in_float32(dtype, optim, autocast, held):
    model = nn.Sequential(nn.Linear(2, 2, dtype=dtype).requires_grad_(False), nn.Linear(2, 2, dtype=dtype))
    said = hold_in_float32(model, optim, autocast)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.dtype == torch.float32} == set(held)
    assert (said is not None) == (dtype != torch.float32 and bool(held))
