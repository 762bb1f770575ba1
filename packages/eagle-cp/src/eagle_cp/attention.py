"""Packed attention over a layout: Ulysses inside, all-gathered keys and values outside, exact in every gradient.

Forward of a rank: exchange tokens for heads (Ulysses) -> whole documents with their own keys, while the keys and values of the shared ones travel
-> pieces of shared documents, a few heads at a time, while the next heads' keys travel -> exchange back. Backward gathers again
rather than keep what was gathered, and sends `dK`, `dV` home with a reduce-scatter in fp32 while the next heads are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from eagle_cp.backends import Kernel, choose
from eagle_cp.collectives import Group
from eagle_cp.heads import HeadChunk, HeadShare, split_heads
from eagle_cp.layout import AttentionPlan, Layout, SharedPlan, agree
from eagle_cp.ulysses import repeats_kv, to_heads, to_tokens

FINE_ROWS = (
    8192  # shared rows a rank from which one key/value head at a time still fills a GPU (7 query heads: 450 tiles of 128 for 132 SMs)
)


class _Problem:
    """What forward and backward of one call share."""

    def __init__(self, layout: Layout, heads: tuple[HeadShare, ...], causal: bool, scale: float, kernels: tuple[Kernel, Kernel]):
        self.layout, self.shares, self.causal, self.scale = layout, heads, causal, scale
        self.whole_kernel, self.shared_kernel = kernels
        self.mesh = layout.mesh
        self.share = heads[self.mesh.ulysses.rank]
        self.plan: AttentionPlan = layout.plan(causal)

    def shared_chunks(self) -> tuple[HeadChunk, ...]:
        shared = self.plan.shared
        return self.share.fine if shared is not None and shared.rows >= FINE_ROWS else self.share.chunks


def _gathered(
    group: Group, k: torch.Tensor, v: torch.Tensor, shared: SharedPlan, chunks: Sequence[HeadChunk]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of all segments for one chunk after the other; the first `next` only starts the collective, and one chunk travels ahead."""

    def start(chunk: HeadChunk):
        rows = k.new_empty((2, shared.rows, chunk.k1 - chunk.k0, k.shape[2]))
        rows[0].copy_(k[: shared.rows, chunk.k0 : chunk.k1])
        rows[1].copy_(v[: shared.rows, chunk.k0 : chunk.k1])
        everything = rows.new_empty((shared.ranks, *rows.shape))
        return rows, everything, group.all_gather(everything, rows)

    travelling = start(chunks[0])
    yield k, v  # started; the caller now computes what needs no gathered rows
    for i in range(len(chunks)):
        rows, everything, work = travelling
        work.wait()
        del rows
        if i + 1 < len(chunks):
            travelling = start(chunks[i + 1])
        picked = everything.flatten(0, 2).index_select(0, shared.index(k.device))
        del everything
        yield picked[: shared.keys], picked[shared.keys :]


def _core_forward(p: _Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`q: [rows, hq, D]`, `k`, `v: [rows, hk, D]` of a gather rank -> out, and the log-sum-exps of whole documents, then of shared ones, per chunk."""
    plan = p.plan
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out[plan.last :].zero_()
    lses = []
    gathered = _gathered(p.mesh.gather, k, v, plan.shared, p.shared_chunks()) if plan.shared is not None else None
    if gathered is not None:
        next(gathered)
    if plan.whole is not None:
        rows = slice(plan.first, plan.last)
        for c in p.share.chunks:
            args = q[rows, c.q0 : c.q1], k[rows, c.k0 : c.k1], v[rows, c.k0 : c.k1]
            lses.append(p.whole_kernel.forward(*args, plan.whole, p.causal, p.scale, out=out[rows, c.q0 : c.q1]))
    if gathered is not None and plan.shared is not None:
        rows = slice(0, plan.first)
        for c, (kc, vc) in zip(p.shared_chunks(), gathered):
            if plan.first:
                target = out[rows, c.q0 : c.q1]
                lses.append(p.shared_kernel.forward(q[rows, c.q0 : c.q1], kc, vc, plan.shared.segments, p.causal, p.scale, out=target))
    return out, lses


def _core_backward(p: _Problem, dout, q, k, v, out, lses: Sequence[torch.Tensor], dq, dk, dv) -> None:
    """Writes `dq: [rows, hq, D]`, `dk`, `dv: [rows, hk, D]`."""
    plan, shared, remaining = p.plan, p.plan.shared, list(lses)
    for x in (dq, dk, dv):
        x[plan.last :].zero_()
    gathered = _gathered(p.mesh.gather, k, v, shared, p.shared_chunks()) if shared is not None else None
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
    rows, homeward = slice(0, plan.first), []
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    for c, (kc, vc) in zip(p.shared_chunks(), gathered):
        everywhere = torch.zeros((shared.ranks, 2, shared.rows, c.k1 - c.k0, k.shape[2]), dtype=wide, device=k.device)
        if plan.first:
            grads = torch.empty(
                (2 * shared.keys, *kc.shape[1:]), dtype=wide if p.shared_kernel.wide_gradients else k.dtype, device=k.device
            )
            qs = (rows, slice(c.q0, c.q1))
            given = dout[qs], q[qs], kc, vc, out[qs], remaining.pop(0), shared.segments, p.causal, p.scale
            p.shared_kernel.backward(*given, dq[qs], grads[: shared.keys], grads[shared.keys :])
            everywhere.flatten(0, 2).index_add_(0, shared.index(k.device), grads.to(wide))
            del grads
        del kc, vc
        mine = torch.empty(everywhere.shape[1:], dtype=wide, device=k.device)
        work = p.mesh.gather.reduce_scatter(mine, everywhere)
        if homeward:
            _arrive(*homeward.pop(), plan.first, dk, dv)
        homeward.append((work, everywhere, mine, c))
    _arrive(*homeward.pop(), plan.first, dk, dv)


def _arrive(work, everywhere: torch.Tensor, mine: torch.Tensor, c: HeadChunk, first: int, dk: torch.Tensor, dv: torch.Tensor) -> None:
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
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: _Problem):
        ctx.problem = p
        ulysses, share = p.mesh.ulysses, p.share
        if ulysses.size == 1:
            out, lses = _core_forward(p, q, k, v)
            ctx.save_for_backward(q, k, v, out, *lses)
            return out
        qkv = to_heads(ulysses, p.shares, (q, k, v), "qkk")
        out, lses = _core_forward(p, *qkv.split((share.num_q, share.num_kv, share.num_kv), dim=1))
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
        kinds = (share.num_q, share.num_kv, share.num_kv)
        q, k, v = qkv.split(kinds, dim=1)
        dout = to_heads(ulysses, shares, (dout,), "q")
        local, dim = p.layout.local, q.shape[2]
        dq_local = q.new_empty((local, shares[-1].q1, dim))
        if repeats_kv(shares):  # summed over the ranks that share a key/value head, so sent in full precision
            wide = torch.float64 if q.dtype == torch.float64 else torch.float32
            dq = q.new_empty(q.shape)
            dkv = torch.empty((k.shape[0], 2 * share.num_kv, dim), dtype=wide, device=q.device)
            _core_backward(p, dout, q, k, v, out, lses, dq, *dkv.split(share.num_kv, dim=1))
            dk_local, dv_local = (torch.empty((local, shares[-1].k1, dim), dtype=wide, device=q.device) for _ in "kv")
            to_tokens(ulysses, shares, dq, "q", (dq_local,))
            to_tokens(ulysses, shares, dkv, "kk", (dk_local, dv_local))
            return dq_local, dk_local.to(k.dtype), dv_local.to(v.dtype), None
        grads = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        _core_backward(p, dout, q, k, v, out, lses, *grads.split(kinds, dim=1))
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

    Rows are those of `layout.shard`. `scale` defaults to `D ** -0.5`; `backend` is a name in `eagle_cp.backends.KERNELS` (default: the fastest
    that can run). The output of pad rows is zero. Raises ValueError, before any collective, when shapes, heads or dtype don't fit.
    """
    problem, kernels, heads = None, None, layout.heads
    try:
        heads = _check(q, k, v, layout)
        plan = layout.plan(causal)
        kernels = tuple(
            choose(q.device, q.dtype, q.shape[2], backend, segments)
            for segments in (plan.whole, plan.shared.segments if plan.shared is not None else None)
        )
    except ValueError as error:
        problem = str(error)
    if layout.verify:
        layout.verify = False
        facts = f"{q.dtype} {tuple(q.shape)} {tuple(k.shape)} {causal} {scale}"
        agree(layout.mesh, problem, facts, "attention: dtype, shapes, causal or scale")
    if problem is not None or kernels is None or heads is None:
        raise ValueError(problem)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return _Attention.apply(q, k, v, _Problem(layout, heads, causal, scale, kernels))


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> tuple[HeadShare, ...]:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected [T, Hq, D], [T, Hk, D], [T, Hk, D] without a batch"
            " dimension: pack the batch into one sequence"
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
