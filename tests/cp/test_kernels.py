"""Packed kernels against the float64 reference: segments with fewer queries than keys, padding, and the rounded shapes for cuDNN."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_cp import Layout, attention
from eagle_cp.backends import KERNELS, choose
from eagle_cp.kernels import cpu, torch_efficient, torch_flash
from eagle_cp.kernels.blockwise import DenseKernel, blockwise_backward, blockwise_forward, blockwise_kernel, bucket_length
from eagle_cp.segments import Segments
from tests.support.attention import cumulative, make_inputs, reference_gradients

lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 300)), min_size=1, max_size=8)


@pytest.mark.parametrize("same_shapes", [False, True])
@settings(deadline=None, max_examples=25)
@given(lengths, st.booleans(), st.sampled_from([(4, 2), (3, 3), (6, 1)]), st.integers(0, 99))
def test_blockwise_segments(same_shapes, pairs, causal, heads, seed):
    dense = dataclasses.replace(cpu.DENSE, same_shapes=same_shapes and causal, max_rows=256)
    segments = Segments(cumulative([a for a, _ in pairs]), cumulative([a + b for a, b in pairs]))
    torch.manual_seed(seed)
    q, dout = (torch.randn(segments.total_q, heads[0], 8, dtype=torch.float64) for _ in "qd")
    k, v = (torch.randn(segments.total_k, heads[1], 8, dtype=torch.float64) for _ in "kv")
    out, dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, q, k, v))
    lse = blockwise_forward(dense, q, k, v, segments, causal, 0.3, out)
    blockwise_backward(dense, dout, q, k, v, out, lse, segments, causal, 0.3, dq, dk, dv)
    expected = reference_gradients(q, k, v, dout, segments.cu_q, segments.cu_k, causal=causal, scale=0.3)
    for got, want in zip((out, dq, dk, dv), expected):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def by_segments(q, k, v, segments, causal, scale):
    """Attention of each segment by itself, `[Tq, H, D]`, and its log-sum-exps, `[H, Tq]`."""
    outs, sums = [], []
    for q0, q1, k0, k1 in zip(segments.cu_q, segments.cu_q[1:], segments.cu_k, segments.cu_k[1:]):
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], k[k0:k1]) * scale
        if causal:
            later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + (k1 - k0) - (q1 - q0))
            scores = scores.masked_fill(later, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[k0:k1]))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(sums, dim=1)


def padded(lse, segments):
    """`[segments, H, longest]`, as torch's kernel returns log-sum-exps, with numbers that mean nothing behind those of a segment."""
    length = -(-segments.max_q // torch_efficient.LSE_ALIGNMENT) * torch_efficient.LSE_ALIGNMENT
    rows = torch.full((len(segments), len(lse), length), 77.0, dtype=lse.dtype)
    for i, (first, last) in enumerate(itertools.pairwise(segments.cu_q)):
        rows[i, :, : last - first] = lse[:, first:last]
    return rows


@settings(deadline=None, max_examples=25)
@given(lengths, st.booleans(), st.booleans(), st.sampled_from([(4, 2), (3, 3), (6, 1)]), st.integers(0, 99))
def test_packs_in_one_call(pairs, whole, causal, heads, seed):
    """What surrounds torch's memory-efficient kernel, whose place a plain one takes here: it needs a GPU."""
    pairs = [(a, 0 if whole else b) for a, b in pairs]
    segments = Segments(cumulative([a for a, _ in pairs]), cumulative([a + b for a, b in pairs]))
    torch.manual_seed(seed)
    q, dout = (torch.randn(segments.total_q, heads[0], 8, dtype=torch.float64) for _ in "qd")
    k, v = (torch.randn(segments.total_k, heads[1], 8, dtype=torch.float64) for _ in "kv")
    masks = {(True, True): torch_efficient.TOP_LEFT, (True, False): torch_efficient.BOTTOM_RIGHT}

    def plain_forward(q, k, v, segments, mask, scale):
        assert mask == (masks[True, segments.cu_q == segments.cu_k] if causal else torch_efficient.NO_MASK)
        out, lse = by_segments(q, k, v, segments, causal, scale)
        return out, padded(lse, segments)

    def plain_backward(dout, q, k, v, out, lse, segments, mask, scale):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        wanted, wanted_lse = by_segments(*leaves, segments, causal, scale)
        torch.testing.assert_close(out, wanted.detach())
        real = padded(wanted_lse.detach(), segments)
        torch.testing.assert_close(lse, torch.where(real == 77.0, torch.inf, real))
        return list(torch.autograd.grad(wanted, leaves, dout))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_efficient, "_packed_forward", plain_forward)
        patch.setattr(torch_efficient, "_packed_backward", plain_backward)
        kernel = torch_efficient.KERNEL
        out, dq, dk, dv, wide_q = (torch.full_like(x, torch.nan) for x in (q, q, k, v, q))
        lse = kernel.forward(q, k, v, segments, causal, 0.3, out)
        kernel.backward(dout, q, k, v, out, lse, segments, causal, 0.3, dq, dk, dv)
        wide_k, wide_v = torch.ones_like(k), torch.ones_like(v)
        kernel.backward_wide(dout, q, k, v, out, lse, segments, causal, 0.3, wide_q)(wide_k, wide_v)
    expected = reference_gradients(q, k, v, dout, segments.cu_q, segments.cu_k, causal=causal, scale=0.3)
    for got, want in zip((out, dq, dk, dv, wide_q, wide_k - 1, wide_v - 1), (*expected, *expected[1:])):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_what_one_call_takes():
    """Many short segments next to a long one would keep a hundred times their size."""
    packed = lambda lengths, heads=8, dim=64: torch_efficient.is_packed(Segments(cumulative(lengths), cumulative(lengths)), heads, dim)
    assert packed([30] * 20 + [900])  # 38 MiB: small in any case
    assert packed([4096] * 200)
    assert not packed([131072] + [100] * 200)
    assert not packed([1] * 70000)
    assert not packed([1 << 20] * 4, heads=28, dim=128)


def test_gradients_in_groups_of_heads(monkeypatch):
    """FlashAttention 2's sum of dq may have so many elements that it takes only some heads at a time."""
    segments = Segments([0, 5, 12], [0, 9, 20])
    q, dout = (torch.randn(12, 6, 8) for _ in "qd")
    k, v = (torch.randn(20, 3, 8) for _ in "kv")
    out, calls = torch.empty_like(q), []

    def backward(dout, q, *rest):
        calls.append(q.shape[1])
        KERNELS["cpu"].backward(dout, q, *rest)

    grouped = torch_flash.in_groups_of_heads(backward)
    lse = KERNELS["cpu"].forward(q, k, v, segments, True, 0.3, out)
    found = {}
    rows = (12 + 2 * 128) * 2 * 32  # of two query heads
    for limit in (rows * 3, rows * 3 - 1, rows):
        monkeypatch.setattr(torch_flash, "MOST_ELEMENTS", limit)
        found[limit] = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        grouped(dout, q, k, v, out, lse, segments, True, 0.3, *found[limit])
    assert calls == [6, 4, 2, 2, 2, 2]
    first, *others = found.values()
    for got in others:
        for x, y in zip(first, got):
            torch.testing.assert_close(x, y)
    monkeypatch.setattr(torch_flash, "MOST_ELEMENTS", rows - 1)
    with pytest.raises(ValueError, match=r"FlashAttention 2 can't compute the gradients of 12 tokens with 2 query heads of 8"):
        grouped(dout, q, k, v, out, lse, segments, True, 0.3, *first)


@settings(max_examples=200)
@given(st.integers(1, 1 << 18), st.booleans())
def test_buckets_are_few_and_tight(n, fine):
    length = bucket_length(n, fine)
    assert length >= n
    assert length - n < max(128, n / 16) if fine else (length - n) * 8 < max(8, n) + 8
    assert bucket_length(length, fine) == length


def test_segments_of_documents_shorter_than_their_queries():
    with pytest.raises(ValueError, match="3 queries and 2 keys"):
        Segments([0, 3], [0, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_single_rank_precision(dtype, causal):
    """One rank in fp32 and bf16: as close to float64 as torch's own attention, document by document."""
    lengths = [1, 7, 130, 64, 65, 3]
    case = {"lengths": lengths, "heads": 6, "kv_heads": 2, "dim": 32, "seed": 0, "dtype": str(dtype).split(".")[1]}
    q, k, v, dout = make_inputs(case)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    cu = cumulative(lengths)

    def torch_own(q, k, v):
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                *(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), is_causal=causal, enable_gqa=True
            )[0].transpose(0, 1)
            for a, b in itertools.pairwise(cu)
        ]
        return torch.cat(parts)

    def errors(function):
        out = function(*inputs)
        got = (out, *torch.autograd.grad(out, inputs, dout))
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, wanted)]

    wanted = reference_gradients(q, k, v, dout, cu, causal=causal)
    ours = errors(lambda *x: attention(*x, Layout.single(cu), causal=causal))
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, errors(torch_own)):
        assert a <= 1.2 * b + 1e-7, f"{name}: {a:.2e}, torch's own {b:.2e}"


def test_the_choice_gives_reasons():
    assert choose(torch.device("cpu"), torch.float64, 64).name == "cpu"
    assert list(KERNELS) == ["flash-attn-4", "torch-flash", "cudnn", "flash-attn", "torch-efficient", "cpu"]
    with pytest.raises(ValueError, match=r"backend 'cudnn' can't run: needs CUDA tensors, got cpu"):
        choose(torch.device("cpu"), torch.float32, 64, backend="cudnn")
    with pytest.raises(ValueError, match=r"no backend 'flash'; known: flash-attn-4"):
        choose(torch.device("cpu"), torch.float32, 64, backend="flash")
    with pytest.raises(ValueError, match=r"no kernel for int64.*cpu: takes float64"):
        choose(torch.device("cpu"), torch.int64, 64)


def plain_forward(q, k, v, causal, scale):
    scores = q @ k.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def plain_backward(dout, q, k, v, out, lse, causal, scale):
    scores = q @ k.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    p = (scores - lse.unsqueeze(-1)).exp()
    ds = p * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.mT @ q, p.mT @ dout


def test_a_new_kernel_is_one_row(monkeypatch):
    """A kernel for dense blocks in plain torch: packed attention, the choice and its messages follow from a row of the table."""
    dense = DenseKernel(plain_forward, plain_backward, same_shapes=False, grouped=False, max_rows=64)
    kernel = blockwise_kernel("plain", dense, lambda device, dtype, head_dim, causal: "has an odd head dim" if head_dim % 2 else None)
    monkeypatch.setitem(KERNELS, "plain", kernel)
    q, k, v, dout = make_inputs({"lengths": [5, 40, 9], "heads": 4, "kv_heads": 2, "dim": 8, "seed": 0})
    cu = cumulative([5, 40, 9])
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, Layout.single(cu), backend="plain")
    for got, want in zip((out, *torch.autograd.grad(out, inputs, dout)), reference_gradients(q, k, v, dout, cu)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="backend 'plain' can't run: has an odd head dim"):
        choose(torch.device("cpu"), torch.float64, 7, backend="plain")
    with pytest.raises(ValueError, match=r"known: .*, cpu, plain"):
        choose(torch.device("cpu"), torch.float64, 8, backend="plane")
