"""The outer level: an all-gather rank computes its whole documents with its own keys, and its pieces of cut documents with keys and values
gathered from all ranks.

The all-gather for cut documents runs while whole documents are computed. Then pieces are computed, all heads at once or one key/value head
after the other. The backward gathers again instead of keeping what was gathered. Partial gradients of keys and values stay in float32 from
the kernel to the reduce-scatter that returns them to their ranks, and are rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed import Work

from eagle_cp.heads import HeadChunk, HeadShare
from eagle_cp.kernels.blockwise import wide_dtype
from eagle_cp.kernels.kernel import AddGradients, Kernel
from eagle_cp.layout import Layout
from eagle_cp.rank_attention import PieceAttention, PrefixCall, RankAttention
from eagle_cp.segments import Segments

# Rows of pieces per rank from which keys are gathered one head at a time. On 2 H200, one document, flash-attn-4: at 128K tokens (65536
# rows) it costs 2.5 % of the speed and needs 2.4 GiB instead of 3.5; 256K tokens reach 99 % of one GPU's kernel with it, in 4.8 GiB.
HEADWISE_ROWS = 98304
BackwardArguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Segments, bool, float, Tensor]  # of `Kernel.backward_wide`
OVERLAP = 0.05  # share of the compute time that an all-gather may take before it is overlapped


class Problem:
    """What the forward and the backward of one call share.

    kernels: for whole documents, for pieces of cut ones, and for branches over their prefixes.
    chunks: head chunks of the pieces.
    overlap: whether collectives run at the same time as the kernels.
    """

    def __init__(
        self, layout: Layout, heads: tuple[HeadShare, ...], causal: bool, scale: float, kernels: tuple[Kernel, Kernel, Kernel], dim: int
    ):
        self.layout, self.shares, self.causal, self.scale = layout, heads, causal, scale
        self.whole_kernel, self.piece_kernel, self.prefix_kernel = kernels
        self.mesh = layout.mesh
        self.share = heads[self.mesh.ulysses.rank]
        self.attention: RankAttention = layout.rank_attention(causal)
        self.chunks, self.overlap = self._schedule(dim)

    def _schedule(self, dim: int) -> tuple[tuple[HeadChunk, ...], bool]:
        """`chunks` and `overlap`, the same on every rank of an all-gather group.

        A collective that runs at the same time as a kernel holds some multiprocessors while it waits for free ones on the other side. On
        2 H200 over NVLink, where the all-gather takes 1 % of the forward, one head at a time reaches 590 TFLOP/s, the same overlapped 586,
        all heads at once 606. So collectives overlap only where the links are slow against the compute."""
        pieces, share = self.attention.pieces, self.share
        if pieces is None:
            return share.chunks, False
        work = max(self.layout.partition.work)
        compute = 4 * work * share.num_q * dim / 600e12
        transfer = (pieces.ranks - 1) * pieces.rows * 2 * share.num_kv * dim * 2 / (self.mesh.all_gather_gb_s * 1e9)
        overlap = transfer > OVERLAP * compute and pieces.rows >= HEADWISE_ROWS // 16
        return share.headwise if overlap or pieces.rows >= HEADWISE_ROWS else share.chunks, overlap


def _gathered(p: Problem, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The selected keys and values of one chunk after the other. The call itself starts the first collective, so that it runs while whole
    documents are computed; later ones start one chunk ahead with `p.overlap`."""
    pieces = p.attention.pieces
    if pieces is None:
        return iter(())

    def start(chunk: HeadChunk) -> tuple[Tensor, Tensor, Work]:
        rows = k.new_empty((2, pieces.rows, chunk.k1 - chunk.k0, k.shape[2]))
        rows[0].copy_(k[: pieces.rows, chunk.k0 : chunk.k1])
        rows[1].copy_(v[: pieces.rows, chunk.k0 : chunk.k1])
        gathered = rows.new_empty((pieces.ranks, *rows.shape))
        return rows, gathered, p.mesh.all_gather.all_gather(gathered, rows)

    def finish(rows: Tensor, gathered: Tensor, work: Work) -> tuple[Tensor, Tensor]:
        work.wait()
        selected = gathered.flatten(0, 2).index_select(0, pieces.index(k.device))
        return selected[: pieces.keys], selected[pieces.keys :]

    in_flight = [start(p.chunks[0])]

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(len(p.chunks)):
            if not in_flight:
                in_flight.append(start(p.chunks[i]))
            if p.overlap and i + 1 < len(p.chunks):
                in_flight.append(start(p.chunks[i + 1]))
            yield finish(*in_flight.pop(0))

    return chunks()


def rank_forward(p: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
    """`q: [rows, hq, D]`, `k`, `v: [rows, hk, D]` of an all-gather rank -> out `[rows, hq, D]`, and the log-sum-exps of every kernel
    call."""
    rank, pieces = p.attention, p.attention.pieces
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    out[rank.last :].zero_()
    lses: list[Tensor] = []
    gathered = _gathered(p, k, v)
    if rank.whole is not None:
        rows = slice(rank.first, rank.last)
        for c in p.share.chunks:
            args = q[rows, c.q0 : c.q1], k[rows, c.k0 : c.k1], v[rows, c.k0 : c.k1]
            lses.append(p.whole_kernel.forward(*args, rank.whole, p.causal, p.scale, out=out[rows, c.q0 : c.q1]))
            if rank.whole_prefixes is not None:
                lses[-1] = lses[-1].clone()  # selective activation checkpointing may hold the kernel's own result
                _attend_prefix(p, rank.whole_prefixes, *args, out[rows, c.q0 : c.q1], lses[-1])
    if pieces is None:
        return out, lses
    for c in p.chunks:
        kc, vc = next(gathered)
        for call in pieces.calls:
            qs = call.queries, slice(c.q0, c.q1)
            args = q[qs], kc[call.keys], vc[call.keys]
            lses.append(p.piece_kernel.forward(*args, call.segments, p.causal, p.scale, out=out[qs]))
            del args
        if pieces.prefix_calls:
            heads, called = slice(c.q0, c.q1), lses[len(lses) - len(pieces.calls) :]
            lse = _all_rows(pieces, called)
            for call in pieces.prefix_calls:
                _attend_prefix(p, call, q[:, heads], kc, vc, out[:, heads], lse)
            lses[len(lses) - len(called) :] = [lse[:, call.queries].contiguous() for call in pieces.calls]
        del kc, vc
    return out, lses


def _all_rows(pieces: PieceAttention, lses: Sequence[Tensor]) -> Tensor:
    """The log-sum-exps of the kernel calls as those of all rows of pieces, `[heads, rows]`."""
    lse = lses[0].new_empty((lses[0].shape[0], pieces.segments.total_q))
    for call, part in zip(pieces.calls, lses):
        lse[:, call.queries] = part
    return lse


def _attend_prefix(p: Problem, call: PrefixCall, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merges the attention of branches over their prefixes into `out: [rows, hq, D]` and `lse: [hq, rows]`."""
    queries, keys = call.queries.on(q.device), call.keys.on(q.device)
    added = torch.empty((call.segments.total_q, *out.shape[1:]), dtype=out.dtype, device=out.device)
    added_lse = p.prefix_kernel.forward(q[queries], k[keys], v[keys], call.segments, False, p.scale, out=added)
    if _in_place(out, lse):
        from eagle_cp.kernels import rows  # needs Triton

        rows.merge(out, lse, added, added_lse, queries)
        return
    own_out, own_lse = out[queries], lse[:, queries]
    merged = torch.logaddexp(own_lse, added_lse)
    own_share, added_share = ((x - merged).exp().t().unsqueeze(-1) for x in (own_lse, added_lse))
    out[queries] = (own_out * own_share + added * added_share).to(out.dtype)
    lse[:, queries] = merged


def _in_place(x: Tensor, lse: Tensor) -> bool:
    """Whether the kernels of `kernels.rows` take it."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and x.stride(-1) == 1 and lse.stride(-1) == 1


def rank_backward(
    p: Problem, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lses: Sequence[Tensor], dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Writes `dq: [rows, hq, D]`, `dk`, `dv: [rows, hk, D]`. `dk` and `dv` may be wider than `k`, and are then not rounded."""
    rank, pieces, remaining = p.attention, p.attention.pieces, list(lses)
    for x in (dq, dk, dv):
        x[rank.last :].zero_()
    gathered = _gathered(p, k, v)
    if rank.whole is not None:
        rows = slice(rank.first, rank.last)
        for c in p.share.chunks:
            qs, ks = (rows, slice(c.q0, c.q1)), (rows, slice(c.k0, c.k1))
            args = dout[qs], q[qs], k[ks], v[ks], out[qs], remaining.pop(0), rank.whole, p.causal, p.scale, dq[qs]
            if rank.whole_prefixes is not None:
                _whole_trees(p, rank.whole_prefixes, args, dk[ks], dv[ks])
            elif dk.dtype == k.dtype:
                p.whole_kernel.backward(*args, dk[ks], dv[ks])
            else:
                dk[ks], dv[ks] = 0, 0
                p.whole_kernel.backward_wide(*args)(dk[ks], dv[ks])
    if pieces is None:
        return
    pending: list[tuple[Work, Tensor, Tensor, HeadChunk]] = []
    for c in p.chunks:
        kc, vc = next(gathered)
        partial = _piece_gradients(p, pieces, dout, q, kc, vc, out, remaining, dq, c)
        del kc, vc
        mine = torch.empty(partial.shape[1:], dtype=partial.dtype, device=k.device)
        pending.append((p.mesh.all_gather.reduce_scatter(mine, partial), partial, mine, c))
        del partial, mine
        if len(pending) > p.overlap:
            _finish(*pending.pop(0), rank.first, dk, dv)
    for item in pending:
        _finish(*item, rank.first, dk, dv)


def _piece_gradients(
    p: Problem, pieces: PieceAttention, dout: Tensor, q: Tensor, kc: Tensor, vc: Tensor, out: Tensor, lses: list[Tensor], dq: Tensor,
    c: HeadChunk,
) -> Tensor:  # fmt: skip
    """Writes `dq` of one chunk. Returns this rank's part of the gradients of all gathered rows, `[ranks, 2, rows, heads, D]`. Removes its
    log-sum-exps from `lses`."""
    partial, rows = None, pieces.index(kc.device)  # rows of keys, then of values
    heads, lse = slice(c.q0, c.q1), None
    if pieces.prefix_calls:
        lse = _all_rows(pieces, lses[: len(pieces.calls)])
    for call in pieces.calls:
        qs = call.queries, slice(c.q0, c.q1)
        args = dout[qs], q[qs], kc[call.keys], vc[call.keys], out[qs], lses.pop(0), call.segments, p.causal, p.scale, dq[qs]
        add_to = p.piece_kernel.backward_wide(*args)
        if partial is None:  # allocated now, because what the kernel needed for dQ is freed
            partial = _zeros(pieces, kc)
        # Calls add one after the other, and within a call a key is in at most two segments: the sum has one possible order.
        flat = partial.flatten(0, 2)
        add_to(flat, flat[pieces.rows :], rows[call.keys], call.unique)
        del add_to
    for call in pieces.prefix_calls:
        assert partial is not None
        assert lse is not None
        flat = partial.flatten(0, 2)
        args = dout[:, heads], q[:, heads], kc, vc, out[:, heads], lse, dq[:, heads]
        _prefix_gradients(p, call, *args)(flat, flat[pieces.rows :], rows[: pieces.keys][call.keys.on(kc.device)])
    return _zeros(pieces, kc) if partial is None else partial


def _whole_trees(p: Problem, call: PrefixCall, args: BackwardArguments, dk: Tensor, dv: Tensor) -> None:
    """The backward of whole documents of which some are branches: keys of a prefix get gradients from two calls, summed before they are
    rounded."""
    dout, q, k, v, out, lse, *_, dq = args
    wide_k, wide_v = (torch.zeros(x.shape, dtype=wide_dtype(x.dtype), device=x.device) for x in (k, v))
    p.whole_kernel.backward_wide(*args)(wide_k, wide_v)
    add_to = _prefix_gradients(p, call, dout, q, k, v, out, lse, dq)
    keys = call.keys.on(k.device)
    if isinstance(keys, slice):
        add_to(wide_k[keys], wide_v[keys])
    else:
        add_to(wide_k, wide_v, keys)
    dk.copy_(wide_k)
    dv.copy_(wide_v)


def _prefix_gradients(
    p: Problem, call: PrefixCall, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor
) -> AddGradients:
    """Adds to `dq: [rows, hq, D]` what branches get from their prefixes; the result adds the gradients of `call.keys`. `out` and `lse` are
    the merged ones."""
    queries, keys = call.queries.on(q.device), call.keys.on(q.device)
    added = torch.empty((call.segments.total_q, *q.shape[1:]), dtype=q.dtype, device=q.device)
    args = dout[queries], q[queries], k[keys], v[keys], out[queries], lse[:, queries].contiguous()
    add_to = p.prefix_kernel.backward_wide(*args, call.segments, False, p.scale, added)
    if _in_place(dq, lse):
        from eagle_cp.kernels import rows  # needs Triton

        rows.add(dq, added, queries)
    else:
        dq[queries] = dq[queries] + added
    return add_to


def _zeros(pieces: PieceAttention, k: Tensor) -> Tensor:
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    return torch.zeros((pieces.ranks, 2, pieces.rows, *k.shape[1:]), dtype=wide, device=k.device)


def _finish(work: Work, partial: Tensor, mine: Tensor, c: HeadChunk, first: int, dk: Tensor, dv: Tensor) -> None:
    work.wait()
    dk[:first, c.k0 : c.k1].copy_(mine[0, :first])
    dv[:first, c.k0 : c.k1].copy_(mine[1, :first])
