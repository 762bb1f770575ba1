"""What one gather rank computes: whole documents with its own keys, pieces of shared ones with keys gathered from all ranks.

The keys and values of shared documents travel while whole documents are computed; then pieces are computed, all heads or one key/value
head after the other. Backward gathers again rather than keep what was gathered. Partial gradients of keys and values stay in fp32 from the
kernel to the reduce-scatter that sends them home, and are rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.distributed import Work

from eagle_cp.backends import Kernel
from eagle_cp.heads import HeadChunk, HeadShare
from eagle_cp.layout import AttentionPlan, Layout
from eagle_cp.shared import SharedPlan

# Shared rows a rank from which keys go one head at a time. On 2 H200, one document, flash-attn-4: 128K tokens (65536 rows) lose 2.5 % of
# the speed by it and need 2.4 GiB instead of 3.5; 256K reach 99 % of one GPU's kernel with it, in 4.8 GiB.
FINE_ROWS = 98304
OVERLAP = 0.05  # share of the compute that gathering may take before it is overlapped


class Problem:
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

        A collective beside a kernel waits for free multiprocessors on both sides while it holds those it has. On 2 H200 over NVLink, where
        the gather takes 1 % of the forward, heads one at a time reach 590 TFLOP/s, the same overlapped 586, all at once 606. So it is
        overlapped where the links are slow against the compute."""
        shared, share = self.plan.shared, self.share
        if shared is None:
            return share.chunks, False
        work = max(self.layout.partition.work)
        compute = 4 * work * share.num_q * dim / 600e12
        travel = (shared.ranks - 1) * shared.rows * 2 * share.num_kv * dim * 2 / (self.mesh.gather_gb_s * 1e9)
        ahead = travel > OVERLAP * compute and shared.rows >= FINE_ROWS // 16
        return share.fine if ahead or shared.rows >= FINE_ROWS else share.chunks, ahead


def _gathered(p: Problem, k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The picked keys and values for one chunk after the other. The call itself starts the first collective, so that it travels
    while whole documents are computed; later ones start one chunk ahead if `p.ahead`."""
    shared = p.plan.shared
    if shared is None:
        return iter(())

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

    def arriving() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for i in range(len(p.chunks)):
            if not travelling:
                travelling.append(start(p.chunks[i]))
            if p.ahead and i + 1 < len(p.chunks):
                travelling.append(start(p.chunks[i + 1]))
            yield receive(*travelling.pop(0))

    return arriving()


def core_forward(p: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`q: [rows, hq, D]`, `k`, `v: [rows, hk, D]` of a gather rank -> out, and the log-sum-exps of every kernel call."""
    plan, shared = p.plan, p.plan.shared
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out[plan.last :].zero_()
    lses = []
    gathered = _gathered(p, k, v)
    if plan.whole is not None:
        rows = slice(plan.first, plan.last)
        for c in p.share.chunks:
            args = q[rows, c.q0 : c.q1], k[rows, c.k0 : c.k1], v[rows, c.k0 : c.k1]
            lses.append(p.whole_kernel.forward(*args, plan.whole, p.causal, p.scale, out=out[rows, c.q0 : c.q1]))
    if shared is None:
        return out, lses
    for c in p.chunks:
        kc, vc = next(gathered)
        for step in shared.steps:
            qs = step.queries, slice(c.q0, c.q1)
            args = q[qs], kc[step.keys], vc[step.keys]
            lses.append(p.shared_kernel.forward(*args, step.segments, p.causal, p.scale, out=out[qs]))
            del args
        del kc, vc
    return out, lses


def core_backward(p: Problem, dout, q, k, v, out, lses: Sequence[torch.Tensor], dq, dk, dv) -> None:
    """Writes `dq: [rows, hq, D]`, `dk`, `dv: [rows, hk, D]`; the latter may be wider than `k`, and are then not rounded."""
    plan, shared, remaining = p.plan, p.plan.shared, list(lses)
    for x in (dq, dk, dv):
        x[plan.last :].zero_()
    gathered = _gathered(p, k, v)
    if plan.whole is not None:
        rows = slice(plan.first, plan.last)
        for c in p.share.chunks:
            qs, ks = (rows, slice(c.q0, c.q1)), (rows, slice(c.k0, c.k1))
            given = dout[qs], q[qs], k[ks], v[ks], out[qs], remaining.pop(0), plan.whole, p.causal, p.scale, dq[qs]
            if dk.dtype == k.dtype:
                p.whole_kernel.backward(*given, dk[ks], dv[ks])
            else:
                dk[ks], dv[ks] = 0, 0
                p.whole_kernel.backward_wide(*given)(dk[ks], dv[ks])
    if shared is None:
        return
    homeward: list[tuple[Work, torch.Tensor, torch.Tensor, HeadChunk]] = []
    for c in p.chunks:
        kc, vc = next(gathered)
        everywhere = _shared_gradients(p, shared, dout, q, kc, vc, out, remaining, dq, c)
        del kc, vc
        mine = torch.empty(everywhere.shape[1:], dtype=everywhere.dtype, device=k.device)
        homeward.append((p.mesh.gather.reduce_scatter(mine, everywhere), everywhere, mine, c))
        del everywhere, mine
        if len(homeward) > p.ahead:
            _arrive(*homeward.pop(0), plan.first, dk, dv)
    for item in homeward:
        _arrive(*item, plan.first, dk, dv)


def _shared_gradients(p: Problem, shared: SharedPlan, dout, q, kc, vc, out, lses: list[torch.Tensor], dq, c: HeadChunk) -> torch.Tensor:
    """Writes `dq` of one chunk; this rank's part of the gradients of all gathered rows, `[gather, 2, rows, heads, D]`. Takes its `lses`."""
    everywhere, rows = None, shared.index(kc.device)  # keys' rows first, then values'
    for step in shared.steps:
        qs = step.queries, slice(c.q0, c.q1)
        given = dout[qs], q[qs], kc[step.keys], vc[step.keys], out[qs], lses.pop(0), step.segments, p.causal, p.scale, dq[qs]
        add_to = p.shared_kernel.backward_wide(*given)
        if everywhere is None:  # not before: what the kernel needed for dQ is gone by now
            everywhere = _zeros(shared, kc)
        # Calls add one after the other, and within a call a key is in at most two segments: the sum has one possible order.
        flat = everywhere.flatten(0, 2)
        add_to(flat, flat[shared.rows :], rows[step.keys], step.unique)
        del add_to
    return _zeros(shared, kc) if everywhere is None else everywhere


def _zeros(shared: SharedPlan, k: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    return torch.zeros((shared.ranks, 2, shared.rows, *k.shape[1:]), dtype=wide, device=k.device)


def _arrive(work: Work, everywhere: torch.Tensor, mine: torch.Tensor, c: HeadChunk, first: int, dk: torch.Tensor, dv: torch.Tensor) -> None:
    work.wait()
    dk[:first, c.k0 : c.k1].copy_(mine[0, :first])
    dv[:first, c.k0 : c.k1].copy_(mine[1, :first])
