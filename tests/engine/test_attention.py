"""Attention by segment against a written-out softmax, and the choice of kernel."""

import pytest
import torch
from torch import nn

from tests.engine import families
from trl.engine import attention, device, kernel
from trl.engine.attention import Scoring, by_segment
from trl.engine.device import standing_for
from trl.engine.forest import flat


def dense(query, key, value, spans, scoring):
    """The same attention with one dense mask over the row, in float64."""
    starts, at = [], 0
    for length, _ in spans:
        starts.append(at)
        at += length
    visible = torch.zeros(at, at, dtype=torch.bool)
    for number, (length, root) in enumerate(spans):
        before = spans[root][0] if root >= 0 else 0
        for offset in range(length):
            position = before + offset
            for other in range(position + 1):
                if scoring.window is not None and other <= position - scoring.window:
                    continue
                column = starts[root] + other if other < before else starts[number] + other - before
                visible[starts[number] + offset, column] = True
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.double().repeat_interleave(repeats, 1) for tensor in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if scoring.sinks is not None:
        sinks = scoring.sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return (torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ value).float()
    return (scores.softmax(-1) @ value).float()


SPANS = [(5, -1), (1, -1), (300, -1), (4, 2), (150, 2), (1, 2), (17, -1)]


@pytest.mark.parametrize("window", [None, 3, 130, 400])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks"])
def test_segments_equal_a_dense_mask(window, extra):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(length for length, _ in SPANS)
    query, key, value = (torch.randn(1, heads, tokens, 8, generator=generator).requires_grad_() for heads in (6, 2, 2))
    scoring = Scoring(
        scale=0.3,
        window=window,
        softcap=2.0 if extra == "softcap" else None,
        sinks=torch.randn(6, generator=generator) if extra == "sinks" else None,
    )
    ours, theirs = by_segment(query, key, value, SPANS, scoring), dense(query, key, value, SPANS, scoring)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weight = torch.randn(ours.shape, generator=generator)
    for mine, expected in zip(
        torch.autograd.grad((ours * weight).sum(), (query, key, value)),
        torch.autograd.grad((theirs * weight).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


def test_no_score_matrix_of_the_row_exists(monkeypatch):
    """Every SDPA call sees one segment's queries and the keys it can reach."""
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **kwargs):
        calls.append((query.shape[2], key.shape[2], None if attn_mask is None else tuple(attn_mask.shape)))
        return original(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    tokens = sum(length for length, _ in SPANS)
    query = key = value = torch.randn(1, 2, tokens, 8)
    by_segment(query, key, value, SPANS, Scoring(scale=1.0))
    assert calls == [(5, 5, None), (1, 1, None), (300, 300, None), (4, 304, (4, 304)), (150, 450, (150, 450)),
                     (1, 301, None), (17, 17, None)]  # fmt: skip
    calls.clear()
    by_segment(query, key, value, [(300, -1), (178, 0)], Scoring(scale=1.0, window=128))
    assert [keys for _, keys, _ in calls] == [128, 255, 171, 255, 177]


def reference_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False,
                     return_aux=None):  # fmt: skip
    """The kernel's contract, written out: causal to the end of the keys, (left, right) window, grouped heads."""
    assert query.dim() == 3 and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert max_q == int(cu_seq_q.diff().max()) and max_k == int(cu_seq_k.diff().max())
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    out, lse = torch.empty_like(query), torch.empty(query.shape[1], query.shape[0])
    left, right = window_size
    assert right == 0 or window_size == (-1, -1)
    bounds = zip(
        cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), cu_seq_k[:-1].tolist(), cu_seq_k[1:].tolist(), strict=True
    )
    for q0, q1, k0, k1 in bounds:
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1].float(), key[k0:k1].float()) * scale
        position = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        other = torch.arange(k1 - k0)
        hidden = ((right == 0) & (other > position)) | ((left >= 0) & (other < position - left))
        scores = scores.masked_fill(hidden, -torch.inf)
        weights, lse[:, q0:q1] = scores.softmax(-1), scores.logsumexp(-1)
        out[q0:q1] = torch.einsum("hqk,khd->qhd", weights, value[k0:k1].float()).to(query.dtype)
    return (out, lse) if return_aux is not None and return_aux.lse else out


@pytest.mark.parametrize("groups", [True, False])
@pytest.mark.parametrize("window", [None, 6])
def test_the_variable_length_kernel_is_called_by_its_contract(monkeypatch, window, groups):
    """CUDA's path with the kernel replaced by its contract equals the CPU's, shared prompts and windows included."""
    monkeypatch.setattr(kernel, "_GROUPS_HEADS", groups)
    monkeypatch.setattr(kernel, "varlen_attn", reference_varlen)
    segments = flat(families.forest())["segments"]
    tokens = sum(length for length, _ in segments["spans"])
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, tokens, 8, generator=generator).bfloat16() for heads in (4, 2, 2))
    expected, _ = attention.segment_attention(
        nn.Module(), query, key, value, None, scaling=0.4, segments=segments, sliding_window=window
    )
    monkeypatch.setattr(attention, "by_segment", None)  # must not be reached
    with standing_for("cuda"):
        got, _ = attention.segment_attention(
            nn.Module(), query, key, value, None, scaling=0.4, segments=segments, sliding_window=window
        )
    torch.testing.assert_close(got.float(), expected.float(), atol=3e-2, rtol=3e-2)


def test_what_the_variable_length_kernel_does_not_serve(monkeypatch):
    def serves(dtype=torch.bfloat16, size=64, value_size=None, kind="cuda", **scoring):
        query = torch.zeros(1, 2, 3, size, dtype=dtype)
        value = torch.zeros(1, 2, 3, value_size or size, dtype=dtype)
        with standing_for(kind):
            return kernel.serves(query, value, Scoring(scale=1.0, **scoring))

    assert serves()
    assert serves(window=4)
    assert serves(dtype=torch.float16, size=256)
    assert not serves(kind="cpu")
    assert not serves(dtype=torch.float32)
    assert not serves(size=512)
    assert not serves(size=20)
    assert not serves(value_size=32)
    assert not serves(dropout=0.1)
    assert not serves(softcap=30.0)
    assert serves(sinks=torch.zeros(2))
    assert not serves(sinks=torch.zeros(2), softcap=30.0)
    card = torch.device("cuda")
    for capability in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        device._card_serves.cache_clear()
        assert device.has_flash_attention(card) is (capability >= (8, 0))
    device._card_serves.cache_clear()
    assert not device.has_flash_attention(torch.device("cpu"))


def test_a_window_without_mask_or_segments_is_applied_by_position():
    """A user's own call of an attached model: no padding mask, longer than the window."""
    query = key = value = torch.randn(2, 2, 20, 8)
    got, _ = attention.segment_attention(nn.Module(), query, key, value, None, scaling=1.0, sliding_window=4)
    for row in range(2):
        expected = dense(query[row : row + 1], key[row : row + 1], value[row : row + 1], [(20, -1)],
                         Scoring(scale=1.0, window=4))  # fmt: skip
        torch.testing.assert_close(got[row].transpose(0, 1)[None], expected, atol=1e-5, rtol=1e-5)
