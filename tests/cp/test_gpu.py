"""On a GPU: every kernel that can run there against float64, also with strided slices and fewer queries than keys; and attention on one
rank.

Several GPUs: packages/eagle-cp/benchmarks/check.py, under torchrun.
"""

import pytest
import torch

from eagle_cp import Layout, attention
from eagle_cp.backends import KERNELS, choose
from eagle_cp.kernels import torch_efficient
from eagle_cp.segments import Segments
from tests.support.attention import cumulative, reference_gradients, tree_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def relative(x, ref):
    return ((x.double() - ref).norm() / ref.norm()).item()


def available(name, causal):
    """The kernel, and the GPU to run it on; skips where it can't run."""
    kernel, device = KERNELS[name], torch.device("cuda", torch.cuda.current_device())
    reason = kernel.unsupported(device, torch.bfloat16, 128, causal)
    if reason:
        pytest.skip(reason)
    return kernel, device


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", [n for n in KERNELS if n != "cpu"])
def test_kernel(name, causal):
    kernel, device = available(name, causal)
    segments = Segments([0, 1, 4, 134, 600, 1624, 1688], [0, 1, 6, 136, 836, 2884, 2948])

    def half(rows, heads, fill=None):  # a slice of a tensor with twice the heads
        wide = torch.randn(rows, 2 * heads, 128, device=device, dtype=torch.bfloat16)
        return (wide if fill is None else wide.fill_(fill))[:, heads:]

    q, dout = half(segments.total_q, 14), half(segments.total_q, 14)
    k, v = half(segments.total_k, 2), half(segments.total_k, 2)
    out, dq, dk, dv = (half(x.shape[0], x.shape[1], torch.nan) for x in (q, q, k, v))
    lse = kernel.forward(q, k, v, segments, causal, 128**-0.5, out=out)
    kernel.backward(dout, q, k, v, out, lse, segments, causal, 128**-0.5, dq, dk, dv)
    for x, wanted in zip((out, dq, dk, dv), reference_gradients(q, k, v, dout, segments.cu_q, segments.cu_k, causal=causal)):
        assert relative(x, wanted) < 4e-3


@pytest.mark.parametrize("lengths", [[(300, 300), (64, 200), (130, 1000), (1, 1)], [(700, 900)]])
@pytest.mark.parametrize("name", [n for n in KERNELS if n != "cpu"])
def test_gradients_that_are_rounded_later(name, lengths):
    """`backward_wide` adds to the given rows, to some of them twice, and more precisely than the kernel rounds, where it can."""
    kernel, device = available(name, True)
    segments = Segments(*(cumulative(n) for n in zip(*lengths)))
    make = lambda rows, heads: torch.randn(rows, heads, 128, device=device, dtype=torch.bfloat16)
    q, dout, k, v = make(segments.total_q, 14), make(segments.total_q, 14), make(segments.total_k, 2), make(segments.total_k, 2)
    out, dq, narrow_k, narrow_v = torch.empty_like(q), torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    lse = kernel.forward(q, k, v, segments, True, 128**-0.5, out=out)
    given = dout, q, k, v, out, lse, segments, True, 128**-0.5, dq
    kernel.backward(*given, narrow_k, narrow_v)
    _, *wanted = reference_gradients(q, k, v, dout, segments.cu_q, segments.cu_k)
    order = torch.randperm(segments.total_k, device=device)
    for rows, unique in ((order, True), (order // 2, False)):
        dk, dv = (torch.ones(segments.total_k, 2, 128, device=device) for _ in "kv")
        kernel.backward_wide(*given)(dk, dv, rows, unique)
        assert relative(dq, wanted[0]) < 4e-3
        for x, narrow, want in ((dk, narrow_k, wanted[1]), (dv, narrow_v, wanted[2])):
            placed = torch.zeros_like(x, dtype=torch.float64).index_add_(0, rows, want)
            assert relative(x - 1, placed) < 4e-3
            if unique and name != "flash-attn":
                assert relative(x - 1, placed) < 0.95 * relative(narrow, want)


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_float32(packed, causal, dim, monkeypatch):
    """The dtype of evaluation, chat and small runs on a GPU."""
    kernel = choose(torch.device("cuda", torch.cuda.current_device()), torch.float32, dim, causal)
    assert kernel.name == "torch-efficient"
    segments = Segments([0, 1, 4, 134, 600, 1624, 1688], [0, 1, 6, 136, 836, 2884, 2948])
    monkeypatch.setattr(torch_efficient, "PADDED_MIB", 1024 if packed else 0)
    assert torch_efficient.is_packed(segments, 14, dim) == packed
    q, dout = (torch.randn(segments.total_q, 14, dim, device="cuda") for _ in range(2))
    k, v = (torch.randn(segments.total_k, 2, dim, device="cuda") for _ in range(2))
    out, dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, q, k, v))
    lse = kernel.forward(q, k, v, segments, causal, dim**-0.5, out=out)
    kernel.backward(dout, q, k, v, out, lse, segments, causal, dim**-0.5, dq, dk, dv)
    for x, wanted in zip((out, dq, dk, dv), reference_gradients(q, k, v, dout, segments.cu_q, segments.cu_k, causal=causal)):
        assert relative(x, wanted) < 1e-5


@pytest.mark.parametrize("name", [n for n in KERNELS if n != "cpu"])
def test_more_than_32_bits_of_elements(name):
    """The last documents of a pack get what they get alone, although their queries are behind element 2^31."""
    kernel, device = available(name, True)
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(device)[0] < 100 << 30:
        pytest.skip("needs 100 GiB of free GPU memory")
    each, documents, heads = 1024, 520, 32
    pack, end = (Segments(cumulative([each] * n), cumulative([each] * n)) for n in (documents, 4))
    make = lambda count: torch.randn(each * documents, count, 128, device=device, dtype=torch.bfloat16)
    q, dout, k, v = make(heads), make(heads), make(4), make(4)
    assert q.numel() > 1 << 31

    def computed(segments):
        given = [x[-segments.total_q :] for x in (dout, q, k, v)]
        out, *grads = (torch.empty_like(x) for x in (given[1], *given[1:]))
        lse = kernel.forward(*given[1:], segments, True, 128**-0.5, out)
        kernel.backward(*given, out, lse, segments, True, 128**-0.5, *grads)
        return [x[-end.total_q :].clone() for x in (out, *grads)]

    for x, wanted in zip(computed(pack), computed(end)):
        assert relative(x, wanted.double()) < 4e-3


@pytest.mark.parametrize("lengths", [[8192], [5000, 300, 2892]], ids=["one document", "three"])
@pytest.mark.parametrize("name", [n for n in KERNELS if n not in ("cpu", "cudnn")])
def test_the_same_bits_again(name, lengths):
    """Under torch's deterministic algorithms. Without them, the order of additions depends on the multiprocessors."""
    kernel, device = available(name, True)
    cu = cumulative(lengths)
    segments = Segments(cu, cu)
    q, dout, k, v = (torch.randn(cu[-1], heads, 128, device=device, dtype=torch.bfloat16) for heads in (14, 14, 2, 2))
    out = torch.empty_like(q)
    lse = kernel.forward(q, k, v, segments, True, 128**-0.5, out=out)

    def gradients():
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        kernel.backward(dout, q, k, v, out, lse, segments, True, 128**-0.5, dq, dk, dv)
        wide_q, wide_k, wide_v = torch.empty_like(q), *(torch.zeros(x.shape, device=device) for x in (k, v))
        kernel.backward_wide(dout, q, k, v, out, lse, segments, True, 128**-0.5, wide_q)(wide_k, wide_v)
        return dq, dk, dv, wide_q, wide_k, wide_v

    usual = gradients()
    torch.use_deterministic_algorithms(True)
    try:
        first = gradients()
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, gradients()))
        with pytest.raises(ValueError, match=r"cudnn.*deterministic"):
            choose(device, torch.bfloat16, 128, backend="cudnn")
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, usual):
        assert relative(a, b.double()) < 4e-3


def test_the_fastest_kernel_end_to_end():
    cu = [0, 700, 701, 1500]
    q, k, v = (torch.randn(1500, h, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (28, 4, 4))
    out = attention(q, k, v, Layout.single(cu))
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for x, y in zip((out, *grads), reference_gradients(q, k, v, dout, cu)):
        assert relative(x.detach(), y) < 4e-3


@pytest.mark.parametrize("name", [n for n in KERNELS if n != "cpu"])
def test_the_gradient_of_a_sum(name):
    """The gradient of `out.sum()` is one number with strides of 0."""
    available(name, True)
    cu = [0, 300, 301, 700]
    q, k, v = (torch.randn(700, h, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (8, 2, 2))
    out = attention(q, k, v, Layout.single(cu), backend=name)
    _, *wanted = reference_gradients(q, k, v, torch.ones_like(q), cu)
    for x, y in zip(torch.autograd.grad(out.sum(), (q, k, v)), wanted):
        assert relative(x, y) < 1e-2


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", [n for n in KERNELS if n != "cpu"])
def test_trees(name, deterministic):
    """Branches over their prefixes, a plain document among them. Two roundings of bfloat16 where a kernel has one."""
    lengths, prefixes = [700, 64, 1, 130, 300, 257, 33, 40], [-1, 0, 0, 0, -1, -1, 5, 5]
    torch.use_deterministic_algorithms(deterministic)
    try:
        _, device = available(name, True)
        make = lambda heads: torch.randn(sum(lengths), heads, 128, device=device, dtype=torch.bfloat16)
        q, k, v, dout = make(14), make(2), make(2), make(14)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, Layout.single(cumulative(lengths), prefixes), backend=name)
        got = [out, *torch.autograd.grad(out, leaves, dout)]
    finally:
        torch.use_deterministic_algorithms(False)
    for x, wanted in zip(got, tree_reference(q, k, v, dout, lengths, prefixes)):
        assert relative(x, wanted) < 5e-3
