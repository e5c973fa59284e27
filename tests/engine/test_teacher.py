"""Divergences from a teacher's predictions: values and gradients of every kind of head, and memory."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from tests.trainer.helpers import tiny, tiny_config
from trl.data.batching.collate import Branch, Tree
from trl.engine import head
from trl.engine.divergence import divergence, divergence_slope
from trl.engine.head import Readout, token_stats
from trl.engine.measures import Comparison
from trl.engine.probe import attach
from trl.engine.score import score
from trl.engine.teacher import predictions

BETAS = (0.0, 0.1, 0.5, 1.0)
MEASURES = ("divergence", "other_logp")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of seven tokens, so that every test crosses several."""
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", 7 * 50)


def naive(logits_NV, teacher_NV, beta):
    """The divergence by its definition, in float64."""
    q, p = logits_NV.double().softmax(-1), teacher_NV.double().softmax(-1)
    if beta == 0:
        return (p * (p / q).log()).sum(-1)
    if beta == 1:
        return (q * (q / p).log()).sum(-1)
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("trains", ["hidden", "both"])
@pytest.mark.parametrize("readout", [Readout(), Readout(scale=0.5, softcap=2.0, temperature=0.7)])
def test_values_and_gradients_equal_full_logits(readout, trains, beta):
    torch.manual_seed(0)
    layer, teacher = nn.Linear(12, 50), nn.Linear(9, 50, bias=False)
    layer.requires_grad_(trains == "both")
    hidden_NH, other_NH = torch.randn(23, 12, requires_grad=True), torch.randn(23, 9)
    target_N, weight_N = torch.randint(0, 50, (23,)), torch.randn(23)
    theirs_NV = Readout(softcap=3.0, temperature=0.7).logits(teacher(other_NH)).detach()
    comparison = Comparison(lambda span: theirs_NV[span], beta=beta)
    extras = Readout(
        scale=readout.scale, softcap=readout.softcap, temperature=readout.temperature,
        extras=MEASURES, grads=("divergence",), comparison=comparison,
    )  # fmt: skip
    logp_N, found_N, other_N = token_stats(layer, hidden_NH, target_N, extras, 50)
    logits_NV = readout.logits(layer(hidden_NH))
    expected_N = naive(logits_NV, theirs_NV, beta)
    torch.testing.assert_close(found_N, expected_N.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other_N, theirs_NV.log_softmax(-1).gather(1, target_N[:, None])[:, 0])
    assert not other_N.requires_grad
    wanted = [tensor for tensor in (hidden_NH, *layer.parameters()) if tensor.requires_grad]
    own_N = logits_NV.log_softmax(-1).gather(1, target_N[:, None])[:, 0]
    ours = torch.autograd.grad((found_N * weight_N).sum() + logp_N.sum(), wanted)
    theirs = torch.autograd.grad((expected_N * weight_N).sum() + own_N.sum(), wanted)
    for mine, full in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 5, 50])
@pytest.mark.parametrize("add_tail", [True, False])
@pytest.mark.parametrize("beta", BETAS)
def test_the_most_likely_tokens_alone(beta, add_tail, top_k):
    """Against the definition on the chosen outcomes, differentiated by torch."""
    torch.manual_seed(1)
    logits_NV, theirs_NV = torch.randn(9, 50, dtype=torch.float64, requires_grad=True), torch.randn(9, 50).double()
    chosen = [logits_NV] * (beta > 0) + [theirs_NV] * (beta < 1)
    inside = torch.zeros(9, 50, dtype=torch.bool)
    for each in chosen:
        inside.scatter_(1, each.topk(top_k).indices, True)
    outcomes = []
    for each in (logits_NV, theirs_NV):
        p = each.softmax(-1) * inside
        rest = 1 - p.sum(-1, keepdim=True)
        outcomes.append(torch.cat([p, rest.clamp(min=0)], -1) if add_tail else p / p.sum(-1, keepdim=True))
    (q, p), m = outcomes, beta * outcomes[1] + (1 - beta) * outcomes[0]
    logs = {id(each): each.clamp(min=1e-300).log() for each in (p, q, m)}
    kl = lambda a, b: (a * (logs[id(a)] - logs[id(b)])).sum(-1)  # noqa: E731
    expected = kl(p, q) if beta == 0 else kl(q, p) if beta == 1 else beta * kl(p, m) + (1 - beta) * kl(q, m)
    settings = {"beta": beta, "top_k": top_k, "add_tail": add_tail}
    lq, lp = logits_NV.log_softmax(-1).detach(), theirs_NV.log_softmax(-1)
    torch.testing.assert_close(divergence(lq, lp, **settings), expected.detach(), atol=1e-9, rtol=1e-7)
    (gradient,) = torch.autograd.grad(expected.sum(), logits_NV)
    torch.testing.assert_close(divergence_slope(lq, lp, **settings), gradient, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("beta", BETAS)
def test_impossible_tokens_and_equal_distributions(beta):
    """Entries that both models mask add nothing, and equal distributions have neither divergence nor gradient."""
    torch.manual_seed(2)
    logits_NV, theirs_NV = torch.randn(4, 50), torch.randn(4, 50)
    logits_NV[:, 7] = theirs_NV[:, 7] = -torch.inf
    lq, lp = logits_NV.log_softmax(-1), theirs_NV.log_softmax(-1)
    found, slope = divergence(lq, lp, beta=beta), divergence_slope(lq, lp, beta=beta)
    assert torch.isfinite(found).all() and torch.isfinite(slope).all() and (slope[:, 7] == 0).all()
    torch.testing.assert_close(divergence(lq, lq, beta=beta), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(divergence_slope(lq, lq, beta=beta), torch.zeros(4, 50), atol=1e-6, rtol=0)


def test_the_mixture_is_half_way_between_its_limits():
    """Divided by beta and by 1 - beta, the divergence goes to the forward and the reverse KL."""
    torch.manual_seed(3)
    lq, lp = torch.randn(6, 30).double().log_softmax(-1), torch.randn(6, 30).double().log_softmax(-1)
    forward, reverse = divergence(lq, lp, beta=0.0), divergence(lq, lp, beta=1.0)
    torch.testing.assert_close(divergence(lq, lp, beta=1e-7) / 1e-7, forward, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(divergence(lq, lp, beta=1 - 1e-7) / 1e-7, reverse, atol=1e-5, rtol=1e-5)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(small_path):
    return AutoTokenizer.from_pretrained(small_path)


def trees():
    torch.manual_seed(4)
    ids = torch.randint(5, 500, (40,)).tolist()
    branches = (Branch(ids[6:11], [True] * 5), Branch(ids[11:14], [True, False, True]))
    return [Tree(Branch(ids[:6], [False] * 6), branches), Tree(Branch(ids[14:], [False] * 4 + [True] * 22))]


def full_logits(model, batch):
    """Logits of the trained tokens, by the model's own forward on each sequence alone."""
    found = []
    for tree in trees():
        for branch in tree.branches or (None,):
            ids = [*tree.root.ids, *(branch.ids if branch else ())]
            mask = [*tree.root.mask, *(branch.mask if branch else ())]
            logits = model(torch.tensor([ids])).logits[0].float()
            found.append(torch.stack([logits[place - 1] for place, each in enumerate(mask) if each]))
    return torch.cat(found)


def larger(tokenizer, kind):
    if kind == "gemma2":  # softcaps on scores and logits: padded rows
        fields = tiny_config(tokenizer).to_dict()
        names = ("vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "pad_token_id")
        torch.manual_seed(7)
        return Gemma2ForCausalLM(
            Gemma2Config(**{name: fields[name] for name in names}, hidden_size=48, intermediate_size=64, head_dim=12,
                         final_logit_softcapping=3.0)
        )  # fmt: skip
    model = tiny(tokenizer, seed=7, hidden_size=48) if kind != "bfloat16" else tiny(tokenizer, 7).bfloat16()
    if kind == "lora":
        import peft

        targets = ["q_proj", "lm_head"]
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    return model


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("kind", ["larger", "gemma2", "lora", "full logits", "bfloat16"])
def test_teachers_of_another_kind(tokenizer, kind, layout):
    student, teacher = tiny(tokenizer), larger(tokenizer, kind).requires_grad_(False)
    both = attach(student), attach(teacher)
    if kind == "full logits":
        teacher._trl_attachment.head_reason = "the test says so"
    if layout == "padded" or not all(each.is_flat for each in both):
        both[0].is_flat = False
    batch = both[0].batch(trees())
    temperature, beta = 0.8, 0.3
    with torch.no_grad():
        theirs_NV = full_logits(copy.deepcopy(teacher).eval(), batch) / temperature
    comparison = Comparison(predictions(teacher, batch, temperature=temperature), beta=beta)
    stats = score(student, batch, comparison=comparison, temperature=temperature)
    stats.divergence_N.sum().backward()
    ours = {name: each.grad.clone() for name, each in student.named_parameters()}
    student.zero_grad()
    expected_N = naive(full_logits(student, batch) / temperature, theirs_NV, beta)
    tolerance = 0.05 if kind == "bfloat16" else 1e-5
    torch.testing.assert_close(stats.divergence_N, expected_N.float(), atol=tolerance, rtol=tolerance)
    expected_N.sum().backward()
    for name, each in student.named_parameters():
        torch.testing.assert_close(ours[name], each.grad, atol=tolerance, rtol=tolerance, msg=name)


def test_a_student_with_full_logits_or_an_adapter_on_its_head(tokenizer):
    import peft

    teacher = larger(tokenizer, "larger").requires_grad_(False)
    attach(teacher)
    results = []
    for kind in ("plain", "full logits", "lora"):
        student = tiny(tokenizer)
        if kind == "lora":
            student = peft.get_peft_model(student, peft.LoraConfig(target_modules=["lm_head"]))
        attachment = attach(student)
        if kind == "full logits":
            attachment.head_reason = "the test says so"
        batch = attachment.batch(trees())
        stats = score(student, batch, comparison=Comparison(predictions(teacher, batch), beta=0.5))
        stats.divergence_N.sum().backward()
        results.append((stats.divergence_N.detach(), [p for p in student.parameters() if p.requires_grad]))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[2][0], results[0][0])
    assert all(parameter.grad is not None for _, parameters in results for parameter in parameters)
    for mine, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-5)


def test_autocast_computes_in_half_precision_and_compares_in_full(tokenizer):
    torch.manual_seed(0)
    layer, teacher = nn.Linear(64, 50, bias=False), nn.Linear(32, 50, bias=False)
    hidden_NH, other_NH = torch.randn(9, 64, requires_grad=True), torch.randn(9, 32)
    theirs_NV = F.linear(other_NH.bfloat16(), teacher.weight.bfloat16()).float().detach()
    readout = Readout(extras=MEASURES, grads=("divergence",), comparison=Comparison(lambda span: theirs_NV[span]))
    with torch.autocast("cpu", torch.bfloat16):
        found_N = token_stats(layer, hidden_NH, torch.zeros(9, dtype=torch.long), readout, 50)[1]
    exact_N = naive(F.linear(hidden_NH.bfloat16(), layer.weight.bfloat16()).float(), theirs_NV, 0.5)
    assert found_N.dtype == torch.float32
    torch.testing.assert_close(found_N, exact_N.float(), atol=1e-5, rtol=1e-5)
    found_N.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    ours, layer.weight.grad = layer.weight.grad, None
    naive(layer(hidden_NH), theirs_NV, 0.5).sum().backward()
    torch.testing.assert_close(ours, layer.weight.grad, atol=0.05, rtol=0.05)


def test_no_trained_token_gives_zero_gradients(tokenizer):
    student, teacher = tiny(tokenizer), larger(tokenizer, "larger")
    batch = attach(student).batch([])
    attach(teacher)
    stats = score(student, batch, comparison=Comparison(predictions(teacher, batch)))
    stats.divergence_N.sum().backward()
    assert stats.divergence_N.shape == (0,)
    assert all(parameter.grad.abs().sum() == 0 for parameter in student.parameters())


MEASURE = """
import sys, threading, torch, psutil, os
from torch import nn
from torch.nn import functional as F
from trl.engine.head import Readout, token_stats
from trl.engine.measures import Comparison
torch.set_num_threads(1)
count, frozen = int(sys.argv[1]), sys.argv[2] == "frozen"
layer = nn.Linear(64, 16384, bias=False).requires_grad_(not frozen)
teacher = nn.Linear(64, 16384, bias=False).requires_grad_(False)
layer.weight.grad = None if frozen else torch.zeros_like(layer.weight)
def run(count):
    hidden, other = torch.randn(count, 64, requires_grad=True), torch.randn(count, 64)
    comparison = Comparison(lambda span: F.linear(other[span], teacher.weight))
    readout = Readout(extras=("divergence",), grads=("divergence",), comparison=comparison)
    out = token_stats(layer, hidden, torch.randint(0, 16384, (count,)), readout, 16384)
    out[1].sum().backward()
run(512)
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
    """512 to 16,384 tokens: full logits would take 64 MiB and 2 GiB. What grows is [N, H] alone."""

    def growth(count):
        out = subprocess.run(
            [sys.executable, "-c", MEASURE, str(count), kind], capture_output=True, text=True, check=True
        )
        return float(out.stdout)

    few, many = growth(512), growth(16384)
    per_token = 16384 * 64 * 4 / 2**20  # one [N, H] tensor in MiB
    assert many - max(few, 0) < 8 * per_token + 100, (few, many)
