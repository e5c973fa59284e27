"""The chunked head: values, gradients, every kind of head, and memory."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trl.engine import head
from trl.engine.head import Readout, plain_linear, token_stats

ALL = ("entropy", "mean_logp", "top1", "mean_logit", "sum_sq")
BOTH = ("entropy", "mean_logp")


def naive(raw_NV, target_N, readout):
    logits_NV = readout.logits(raw_NV)
    logp_NV = logits_NV.log_softmax(-1)
    p_NV = logp_NV.exp()
    return [
        logp_NV.gather(1, target_N[:, None])[:, 0],
        -(p_NV * logp_NV).sum(-1),
        logp_NV.mean(-1),
        (logits_NV.argmax(-1) == target_N).float(),
        logits_NV.mean(-1),
        (p_NV**2).sum(-1),
    ]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of seven tokens, so that every test crosses several."""
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", 7 * 50)


@pytest.mark.parametrize("trains", ["hidden", "head", "both"])
@pytest.mark.parametrize("readout", [
    Readout(extras=ALL, grads=BOTH),
    Readout(extras=ALL, grads=BOTH, scale=0.5, softcap=2.0, temperature=0.7),
    Readout(),
])  # fmt: skip
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_equal_full_logits(readout, bias, trains):
    torch.manual_seed(0)
    layer = nn.Linear(12, 50, bias=bias)
    layer.requires_grad_(trains != "hidden")
    hidden_NH = torch.randn(23, 12, requires_grad=trains != "head")
    target_N = torch.randint(0, 50, (23,))
    weights = torch.randn(3, 23)

    def run(columns):
        total = (columns[0] * weights[0]).sum()
        if readout.grads:
            total = total + (columns[1] * weights[1]).sum() + (columns[2] * weights[2]).sum()
        wanted = [tensor for tensor in (hidden_NH, *layer.parameters()) if tensor.requires_grad]
        return torch.autograd.grad(total, wanted)

    ours = token_stats(layer, hidden_NH, target_N, readout, 50)
    theirs = naive(layer(hidden_NH), target_N, readout)
    for mine, expected in zip(ours, theirs, strict=False):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
    for mine, expected in zip(run(ours), run(theirs), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora", "modules_to_save", "disabled"])
def test_a_head_under_an_adapter(kind):
    import peft

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.lm_head = nn.Linear(12, 12), nn.Linear(12, 50, bias=False)

        def forward(self, x):
            return self.lm_head(self.body(x))

    torch.manual_seed(0)
    saved = ["lm_head"] if kind == "modules_to_save" else None
    targets = ["body"] if kind == "modules_to_save" else ["body", "lm_head"]
    config = peft.LoraConfig(
        r=4, target_modules=targets, modules_to_save=saved, use_dora=kind == "dora", init_lora_weights=False
    )
    model = peft.get_peft_model(Tiny(), config)
    if kind == "modules_to_save":
        model.base_model.model.lm_head.modules_to_save["default"].weight.data.normal_()
    layer = model.base_model.model.lm_head
    assert (plain_linear(layer) is not None) == (kind == "modules_to_save")
    hidden_NH = torch.randn(23, 12, requires_grad=True)
    target_N = torch.randint(0, 50, (23,))
    if kind == "disabled":
        model.base_model.disable_adapter_layers()
    readout = Readout(extras=ALL, grads=BOTH, softcap=3.0)
    ours, theirs = token_stats(layer, hidden_NH, target_N, readout, 50), naive(layer(hidden_NH), target_N, readout)
    wanted = [hidden_NH, *(p for p in layer.parameters() if p.requires_grad)]
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
    for mine, expected in zip(
        torch.autograd.grad(ours[0].sum() + ours[1].sum() + ours[2].sum(), wanted, allow_unused=True),
        torch.autograd.grad(theirs[0].sum() + theirs[1].sum() + theirs[2].sum(), wanted, allow_unused=True),
        strict=True,
    ):
        assert (mine is None) == (expected is None)
        if mine is not None:
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_dropout_before_an_adapted_head_is_drawn_once():
    """The recomputation in the backward pass must see the mask of the forward pass."""
    import peft

    torch.manual_seed(0)
    host = nn.Sequential()
    host.add_module("lm_head", nn.Linear(12, 50, bias=False))
    model = peft.get_peft_model(
        host, peft.LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False)
    )
    layer = model.base_model.model.lm_head
    hidden_NH, target_N = torch.randn(5, 12, requires_grad=True), torch.randint(0, 50, (5,))
    torch.manual_seed(3)
    (ours,) = token_stats(layer, hidden_NH, target_N, Readout(), 50)
    (gradient,) = torch.autograd.grad(ours.sum(), hidden_NH)
    torch.manual_seed(3)
    theirs = naive(layer(hidden_NH), target_N, Readout())[0]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs.sum(), hidden_NH)[0])


def test_a_frozen_head_computes_no_weight_gradient(monkeypatch):
    layer = nn.Linear(12, 50, bias=False).requires_grad_(False)
    hidden_NH = torch.randn(9, 12, requires_grad=True)
    (logp_N,) = token_stats(layer, hidden_NH, torch.arange(9), Readout(), 50)
    monkeypatch.setattr(head, "_logits_grad", None)  # the backward pass of a frozen head computes no logits either
    logp_N.sum().backward()
    assert layer.weight.grad is None and hidden_NH.grad is not None


def test_no_trained_token_gives_zero_gradients():
    layer = nn.Linear(12, 50)
    hidden_NH = torch.zeros(0, 12, requires_grad=True)
    (logp_N,) = token_stats(layer, hidden_NH, torch.zeros(0, dtype=torch.long), Readout(), 50)
    logp_N.sum().backward()
    assert logp_N.shape == (0,) and layer.weight.grad.abs().sum() == 0


def test_autocast_computes_in_half_precision_and_sums_in_full():
    torch.manual_seed(0)
    layer = nn.Linear(64, 50, bias=False)
    hidden_NH, target_N = torch.randn(9, 64, requires_grad=True), torch.randint(0, 50, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        logp_N, entropy_N = token_stats(
            layer, hidden_NH, target_N, Readout(extras=("entropy",), grads=("entropy",)), 50
        )
    expected = naive(F.linear(hidden_NH.bfloat16(), layer.weight.bfloat16()), target_N, Readout())
    assert logp_N.dtype == torch.float32
    torch.testing.assert_close(logp_N, expected[0])
    torch.testing.assert_close(entropy_N, expected[1])
    (logp_N.sum() + entropy_N.sum()).backward()
    assert layer.weight.grad.dtype == torch.float32 and hidden_NH.grad.dtype == torch.float32
    ours = layer.weight.grad.clone()
    layer.weight.grad = None
    exact = naive(layer(hidden_NH.detach()), target_N, Readout())
    (exact[0].sum() + exact[1].sum()).backward()
    torch.testing.assert_close(ours, layer.weight.grad, atol=0.05, rtol=0.05)


def test_impossible_tokens_do_not_poison_the_entropy():
    """A logit of minus infinity (a masked vocabulary entry) has p log p = 0."""
    layer = nn.Linear(4, 50)
    layer.bias.data[7] = -torch.inf
    hidden_NH = torch.randn(3, 4, requires_grad=True)
    logp_N, entropy_N = token_stats(
        layer, hidden_NH, torch.tensor([1, 2, 3]), Readout(extras=("entropy",), grads=("entropy",)), 50
    )
    (logp_N.sum() + entropy_N.sum()).backward()
    assert torch.isfinite(entropy_N).all() and torch.isfinite(hidden_NH.grad).all()


MEASURE = """
import sys, threading, torch, psutil, os
from torch import nn
from trl.engine.head import Readout, token_stats
torch.set_num_threads(1)
count, frozen = int(sys.argv[1]), sys.argv[2] == "frozen"
layer = nn.Linear(64, 16384, bias=False).requires_grad_(not frozen)
layer.weight.grad = None if frozen else torch.zeros_like(layer.weight)
def run(count):
    hidden = torch.randn(count, 64, requires_grad=True)
    readout = Readout(extras=("entropy",), grads=("entropy",))
    out = token_stats(layer, hidden, torch.randint(0, 16384, (count,)), readout, 16384)
    (out[0].sum() + out[1].sum()).backward()
run(256)
process, peak, stop = psutil.Process(os.getpid()), [0], threading.Event()
def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], process.memory_info().rss)
        stop.wait(0.002)
before = process.memory_info().rss
thread = threading.Thread(target=watch); thread.start()
run(count)
stop.set(); thread.join()
print((peak[0] - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["frozen", "trained"])
def test_memory_is_flat_in_the_number_of_tokens(kind):
    """512 to 16,384 tokens: full logits would take 32 MiB and 1 GiB. What grows is [N, H] alone."""

    def growth(count):
        out = subprocess.run(
            [sys.executable, "-c", MEASURE, str(count), kind], capture_output=True, text=True, check=True
        )
        return float(out.stdout)

    few, many = growth(512), growth(16384)
    per_token = 16384 * 64 * 4 / 2**20  # one [N, H] tensor in MiB
    assert many - max(few, 0) < 8 * per_token + 100, (few, many)
