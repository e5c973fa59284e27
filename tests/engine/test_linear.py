"""Products of few rows: the same numbers, where they apply, and the model as it was afterwards."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trl.engine.linear import MOST, _is_there, few_rows, half_products


class Calls(nn.Module):
    """Layers of the sizes of a small model."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(96, 40, bias=bias), nn.Linear(96, 1000, bias=bias)])


def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product that is not oneDNN's."""
    seen: list[int] = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *args: (seen.append(x[..., 0].numel()), linear(x, *args))[1])
    return seen


@pytest.mark.skipif(not _is_there(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 96), (5, 1, 96), (8, 96), (13, 96), (4, 7, 96), (MOST, 1, 96)])
def test_few_rows_are_the_same_product(bias: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Calls(bias=bias)
    x = torch.randn(*shape)
    seen = count(monkeypatch)
    with torch.no_grad():
        plain = [layer(x) for layer in model.layers]
        assert len(seen) == 2
        with few_rows(model):
            found = [layer(x) for layer in model.layers]
        assert len(seen) == 2
        for ours, theirs in zip(found, plain, strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not _is_there(), reason="this PyTorch has no oneDNN")
def test_what_is_not_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Calls(bias=False)
    x = torch.randn(96, 2, 3).permute(2, 1, 0)
    seen = count(monkeypatch)
    with torch.no_grad(), few_rows(model):
        found = model.layers[0](x)
    assert not seen
    torch.testing.assert_close(found, x @ model.layers[0].weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["many rows", "none", "gradients", "float64", "autocast", "own forward", "subclass"])
def test_everything_else_is_left_alone(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.engine.linear._has_half_products", lambda: True)
    model = Calls(bias=True)
    x = torch.randn({"many rows": MOST + 1, "none": 0}.get(case, 4), 96)
    layer = model.layers[0]
    if case == "float64":
        model, x = model.double(), x.double()
    elif case == "own forward":  # as accelerate's hooks set it
        layer.forward = lambda x: F.linear(x, layer.weight, layer.bias)
    elif case == "subclass":
        model.layers[0] = layer = type("Adapted", (nn.Linear,), {})(96, 40)
    plain = layer(x)
    seen = count(monkeypatch)
    with (
        torch.set_grad_enabled(case == "gradients"),
        torch.autocast("cpu", enabled=case == "autocast"),
        few_rows(model),
    ):
        found = layer(x)
    assert len(seen) == 1
    assert found.requires_grad == (case == "gradients")
    assert found.dtype == (torch.bfloat16 if case == "autocast" else x.dtype)
    torch.testing.assert_close(found.to(plain.dtype), plain, atol=0.05 if case == "autocast" else 0, rtol=0)


def test_the_model_is_as_it_was() -> None:
    model = Calls(bias=True)
    with pytest.raises(RuntimeError), few_rows(model):
        raise RuntimeError
    assert all("forward" not in vars(layer) for layer in model.layers)
    # A copy taken within has layers of its own.
    with few_rows(model), torch.no_grad():
        other = copy.deepcopy(model)
        other.layers[0].weight.zero_()
        assert not (other.layers[0](torch.randn(2, 96)) - other.layers[0].bias).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products_are_rounded_once(dtype, monkeypatch):
    monkeypatch.setattr("trl.engine.linear._has_half_products", lambda: False)
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, dtype=dtype)
    x = torch.randn(2, 7, 64, dtype=dtype, requires_grad=True)
    with half_products(torch.device("cpu"), half=True):
        found = layer(x)
        found.sum().backward()
    exact = F.linear(x.detach().double(), layer.weight.double(), layer.bias.double())
    assert found.dtype == x.grad.dtype == layer.weight.grad.dtype == dtype
    # Half a unit in the last place: nothing was rounded on the way.
    assert ((found.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()
    torch.testing.assert_close(layer.weight.grad, x.detach().flatten(0, 1).sum(0).expand(48, -1), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("case", ["bfloat16", "float16", "autocast", "no bias"])
def test_few_rows_in_half_precision_are_rounded_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of `half_products`; weights are turned to float32 once, and again after they have changed."""
    monkeypatch.setattr("trl.engine.linear._has_half_products", lambda: False)
    dtype = torch.float16 if case == "float16" else torch.bfloat16
    model = Calls(bias=case != "no bias").to(torch.float32 if case == "autocast" else dtype)
    layer = model.layers[1]
    autocast = torch.autocast("cpu", dtype, enabled=case == "autocast")
    with torch.no_grad(), autocast, few_rows(model):
        copies = []
        for rows in (2, MOST + 1, 0, 2):
            x = torch.randn(rows, 1, 96).to(layer.weight.dtype)
            found = layer(x)
            weight, bias = (None if each is None else each.to(dtype).double() for each in (layer.weight, layer.bias))
            exact = F.linear(x.to(dtype).double(), weight, bias)
            assert found.dtype == dtype and found.shape == exact.shape
            assert ((found.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()
            copies.append(layer.forward.copy[0])
            if rows == 0:
                layer.weight.mul_(2)
        assert copies[0] is copies[1] is copies[2] and copies[3] is not copies[0]
    assert "forward" not in vars(layer)


def test_half_precision_products_are_left_alone_elsewhere():
    for half, device in ((False, "cpu"), (True, "meta")):
        assert type(half_products(torch.device(device), half)) is contextlib.nullcontext
