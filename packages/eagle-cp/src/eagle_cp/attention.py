"""Packed attention over a layout: Ulysses inside, all-gathered keys and values outside, exact in every gradient.

Forward of a rank: exchange tokens for heads (Ulysses) -> whole documents with their own keys, while the keys and values of the shared ones
travel -> pieces of shared documents, all heads or one key/value head after the other -> exchange back. Backward gathers again rather than
keep what was gathered, and sends `dK`, `dV` home with a reduce-scatter in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.distributed import Work

from eagle_cp.backends import Kernel, choose
from eagle_cp.heads import HeadChunk, HeadShare, split_heads
from eagle_cp.layout import AttentionPlan, Layout, SharedPlan, agree
from eagle_cp.ulysses import repeats_kv, to_heads, to_tokens

# Shared rows a rank from which keys go one head at a time. On 2 H200, one document, flash-attn-4: 128K tokens (65536 rows) lose 1 % of
# the speed by it and need 2.6 GiB instead of 4.2; 256K lose 1 % and need 5.3 GiB instead of 8.3.
FINE_ROWS = 98304
OVERLAP = 0.05  # share of the compute that gathering may take before it is overlapped


class _Problem:
    """What forward and backward of one call share."""

    def __init__(self, layout: Layout, heads: tuple[HeadShare, ...], causal: bool, scale: float, kernels: tuple[Kernel, Kernel], dim: int):
        self.layout, self.shares, self.causal, self.scale = layout, heads, causal, scale
        self.whole_kernel, self.shared_kernel = kernels
        self.mesh = layout.mesh
        self.share = heads[self.mesh.ulysses.rank]
        self.plan: AttentionPlan = layout.plan(causal)
        self.chunks, self.ahead = self._pace(dim)

    def _pace(self, dim: int) -> tuple[tuple[HeadChunk, ...], bool]:
        """Head chunks of shared documents, and whether collectives run beside the kernels. The same on every rank of a gather group.

        A collective beside a kernel waits for free multiprocessors on both sides while it holds those it has: on 2 H200 over NVLink,
        where the gather takes 1 % of the forward, overlapping it cost 4 %. So it is overlapped where the links are slow against the
        compute."""
        shared, share = self.plan.shared, self.share
        if shared is None:
            return share.chunks, False
        work = max(self.layout.partition.work)
        compute = 4 * work * share.num_q * dim / 600e12
        travel = (shared.ranks - 1) * shared.rows * 2 * share.num_kv * dim * 2 / (self.mesh.gather_gb_s * 1e9)
        ahead = travel > OVERLAP * compute and shared.rows >= FINE_ROWS // 16
        return share.fine if ahead or shared.rows >= FINE_ROWS else share.chunks, ahead


def _gathered(p: _Problem, k: torch.Tensor, v: torch.Tensor, shared: SharedPlan) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of all segments for one chunk after the other. The first `next` only starts the first collective, so that it travels
    while whole documents are computed; later ones start one chunk ahead if `p.ahead`."""

    def start(chunk: HeadChunk):
        rows = k.new_empty((2, shared.rows, chunk.k1 - chunk.k0, k.shape[2]))
        rows[0].copy_(k[: shared.rows, chunk.k0 : chunk.k1])
        rows[1].copy_(v[: shared.rows, chunk.k0 : chunk.k1])
        everything = rows.new_empty((shared.ranks, *rows.shape))
        return rows, everything, p.mesh.gather.all_gather(everything, rows)

    def receive(rows, everything, work):
        work.wait()
        picked = everything.flatten(0, 2).index_select(0, shared.index(k.device))
        return picked[: shared.keys], picked[shared.keys :]

    travelling = [start(p.chunks[0])]
    yield k, v  # started
    for i in range(len(p.chunks)):
        if not travelling:
            travelling.append(start(p.chunks[i]))
        if p.ahead and i + 1 < len(p.chunks):
            travelling.append(start(p.chunks[i + 1]))
        yield receive(*travelling.pop(0))


def _core_forward(p: _Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`q: [rows, hq, D]`, `k`, `v: [rows, hk, D]` of a gather rank -> out, and the log-sum-exps of whole documents, then of shared ones,
    per chunk."""
    plan, shared = p.plan, p.plan.shared
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out[plan.last :].zero_()
    lses = []
    gathered = _gathered(p, k, v, shared) if shared is not None else None
    if gathered is not None:
        next(gathered)
    if plan.whole is not None:
        rows = slice(plan.first, plan.last)
        for c in p.share.chunks:
            args = q[rows, c.q0 : c.q1], k[rows, c.k0 : c.k1], v[rows, c.k0 : c.k1]
            lses.append(p.whole_kernel.forward(*args, plan.whole, p.causal, p.scale, out=out[rows, c.q0 : c.q1]))
    if gathered is None or shared is None:
        return out, lses
    rows = slice(0, plan.first)
    for c in p.chunks:
        kc, vc = next(gathered)
        if plan.first:
            target = out[rows, c.q0 : c.q1]
            lses.append(p.shared_kernel.forward(q[rows, c.q0 : c.q1], kc, vc, shared.segments, p.causal, p.scale, out=target))
        del kc, vc
    return out, lses


def _core_backward(p: _Problem, dout, q, k, v, out, lses: Sequence[torch.Tensor], dq, dk, dv) -> None:
    """Writes `dq: [rows, hq, D]`, `dk`, `dv: [rows, hk, D]`."""
    plan, shared, remaining = p.plan, p.plan.shared, list(lses)
    for x in (dq, dk, dv):
        x[plan.last :].zero_()
    gathered = _gathered(p, k, v, shared) if shared is not None else None
    if gathered is not None:
        next(gathered)
    if plan.whole is not None:
        rows = slice(plan.first, plan.last)
        for c in p.share.chunks:
            qs, ks = (rows, slice(c.q0, c.q1)), (rows, slice(c.k0, c.k1))
            given = dout[qs], q[qs], k[ks], v[ks], out[qs], remaining.pop(0), plan.whole, p.causal, p.scale
            _into(p.whole_kernel, given, dq[qs], dk[ks], dv[ks])
    if gathered is None or shared is None:
        return
    rows = slice(0, plan.first)
    homeward: list[tuple[Work, torch.Tensor, torch.Tensor, HeadChunk]] = []
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    narrow = wide if p.shared_kernel.wide_gradients else k.dtype
    for c in p.chunks:
        kc, vc = next(gathered)
        grads = torch.empty((2, *kc.shape), dtype=narrow, device=k.device)
        if plan.first:
            qs = (rows, slice(c.q0, c.q1))
            given = dout[qs], q[qs], kc, vc, out[qs], remaining.pop(0), shared.segments, p.causal, p.scale
            p.shared_kernel.backward(*given, dq[qs], grads[0], grads[1])
        del kc, vc
        everywhere = torch.zeros((shared.ranks, 2, shared.rows, *grads.shape[2:]), dtype=wide, device=k.device)
        # A key is in at most two segments of a rank, so the order of these additions can't change the sum.
        for grad, index in zip(grads, shared.index(k.device).unflatten(0, (2, shared.keys))):
            everywhere.flatten(0, 2).index_add_(0, index, grad.to(wide))
        del grads
        mine = torch.empty(everywhere.shape[1:], dtype=wide, device=k.device)
        homeward.append((p.mesh.gather.reduce_scatter(mine, everywhere), everywhere, mine, c))
        del everywhere, mine
        if len(homeward) > p.ahead:
            _arrive(*homeward.pop(0), plan.first, dk, dv)
    for item in homeward:
        _arrive(*item, plan.first, dk, dv)


def _split(x: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x[:, :heads], x[:, heads : heads + kv_heads], x[:, heads + kv_heads :]


def _arrive(work: Work, everywhere: torch.Tensor, mine: torch.Tensor, c: HeadChunk, first: int, dk: torch.Tensor, dv: torch.Tensor) -> None:
    work.wait()
    dk[:first, c.k0 : c.k1].copy_(mine[0, :first])
    dv[:first, c.k0 : c.k1].copy_(mine[1, :first])


def _into(kernel: Kernel, given: tuple, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> None:
    """Runs the backward into `dk`, `dv`, also where these are wider than the kernel writes."""
    q = given[1]
    if kernel.wide_gradients or dk.dtype == q.dtype:
        kernel.backward(*given, dq, dk, dv)
        return
    narrow = [torch.empty(x.shape, dtype=q.dtype, device=q.device) for x in (dk, dv)]
    kernel.backward(*given, dq, *narrow)
    dk.copy_(narrow[0])
    dv.copy_(narrow[1])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: _Problem) -> torch.Tensor:
        ctx.problem = p
        ulysses, share = p.mesh.ulysses, p.share
        if ulysses.size == 1:
            out, lses = _core_forward(p, q, k, v)
            ctx.save_for_backward(q, k, v, out, *lses)
            return out
        qkv = to_heads(ulysses, p.shares, (q, k, v), "qkk")
        out, lses = _core_forward(p, *_split(qkv, share.num_q, share.num_kv))
        ctx.save_for_backward(qkv, out, *lses)
        local = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        to_tokens(ulysses, p.shares, out, "q", (local,))
        return local

    @staticmethod
    def backward(ctx, dout: torch.Tensor):
        p: _Problem = ctx.problem
        ulysses, share, shares = p.mesh.ulysses, p.share, p.shares
        if ulysses.size == 1:
            q, k, v, out, *lses = ctx.saved_tensors
            dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
            _core_backward(p, dout, q, k, v, out, lses, dq, dk, dv)
            return dq, dk, dv, None
        qkv, out, *lses = ctx.saved_tensors
        q, k, v = _split(qkv, share.num_q, share.num_kv)
        dout = to_heads(ulysses, shares, (dout,), "q")
        local, dim = p.layout.local, q.shape[2]
        dq_local = q.new_empty((local, shares[-1].q1, dim))
        if repeats_kv(shares):  # summed over the ranks that share a key/value head, so sent in full precision
            wide = torch.float64 if q.dtype == torch.float64 else torch.float32
            dq = q.new_empty(q.shape)
            dkv = torch.empty((k.shape[0], 2 * share.num_kv, dim), dtype=wide, device=q.device)
            _core_backward(p, dout, q, k, v, out, lses, dq, dkv[:, : share.num_kv], dkv[:, share.num_kv :])
            dk_local, dv_local = (torch.empty((local, shares[-1].k1, dim), dtype=wide, device=q.device) for _ in "kv")
            to_tokens(ulysses, shares, dq, "q", (dq_local,))
            to_tokens(ulysses, shares, dkv, "kk", (dk_local, dv_local))
            return dq_local, dk_local.to(k.dtype), dv_local.to(v.dtype), None
        grads = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        _core_backward(p, dout, q, k, v, out, lses, *_split(grads, share.num_q, share.num_kv))
        dk_local, dv_local = (q.new_empty((local, shares[-1].k1, dim)) for _ in "kv")
        to_tokens(ulysses, shares, grads, "qkk", (dq_local, dk_local, dv_local))
        return dq_local, dk_local, dv_local, None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention inside each document of the pack. `q: [T_local, Hq, D]`, `k`, `v: [T_local, Hk, D]` -> `[T_local, Hq, D]`.

    Rows are those of `layout.shard`. `scale` defaults to `D ** -0.5`; `backend` is a name in `eagle_cp.backends.KERNELS` (default: the
    fastest that can run). The output of pad rows is zero. Raises ValueError, before any collective, when shapes, heads or dtype don't
    fit."""
    problem, kernels, heads = None, None, layout.heads
    try:
        heads = _check(q, k, v, layout)
        plan = layout.plan(causal)
        shared = plan.shared.segments if plan.shared is not None else None
        where = q.device, q.dtype, q.shape[2], causal, backend
        kernels = choose(*where, plan.whole), choose(*where, shared)
    except ValueError as error:
        problem = str(error)
    if layout.verify:
        layout.verify = False
        facts = f"{q.dtype} {tuple(q.shape)} {tuple(k.shape)} {causal} {scale}"
        agree(layout.mesh, problem, facts, "attention: dtype, shapes, causal or scale")
    if problem is not None or kernels is None or heads is None:
        raise ValueError(problem)
    factor = float(q.shape[2] ** -0.5 if scale is None else scale)
    return _Attention.apply(q, k, v, _Problem(layout, heads, causal, factor, kernels, q.shape[2]))


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> tuple[HeadShare, ...]:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected [T, Hq, D], [T, Hk, D], [T, Hk, D] without a"
            " batch dimension: pack the batch into one sequence"
        )
    if q.shape[0] != layout.local:
        raise ValueError(
            f"attention: q has {q.shape[0]} tokens, the layout {layout.local} on this rank; pass it through layout.shard first"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(f"attention: q, k, v must agree in dtype and device, got {q.dtype}, {k.dtype}, {v.dtype}; cast them first")
    if layout.heads is None:
        return split_heads(q.shape[1], k.shape[1], 1)
    expected = layout.heads[-1].q1, layout.heads[-1].k1
    if (q.shape[1], k.shape[1]) != expected:
        raise ValueError(f"attention: {q.shape[1]}/{k.shape[1]} heads, but the layout was built for {expected[0]}/{expected[1]}")
    return layout.heads
