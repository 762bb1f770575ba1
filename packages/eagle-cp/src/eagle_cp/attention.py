"""Packed attention over a layout, exact in every gradient: Ulysses is the inner level, all-gather of keys and values the outer one.

A branch of a tree (`trees.py`) attends to itself as any document does, and to its prefix in kernel calls of its own, which are merged in.

Steps of a rank: exchange tokens for heads within the Ulysses group (`ulysses.py`), compute the attention of the all-gather rank for these
heads (`all_gather.py`), exchange back. The backward does the reverse steps.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from eagle_cp.all_gather import Problem, rank_backward, rank_forward
from eagle_cp.backends import KERNELS, choose
from eagle_cp.heads import HeadShare, split_heads
from eagle_cp.kernels.kernel import Kernel
from eagle_cp.layout import Layout
from eagle_cp.segments import Segments, score_factor
from eagle_cp.ulysses import repeats_kv, to_heads, to_tokens


def _split(x: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return x[:, :heads], x[:, heads : heads + kv_heads], x[:, heads + kv_heads :]


class _AttentionCtx(FunctionCtx):
    problem: Problem
    saved_tensors: tuple[Tensor, ...]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _AttentionCtx, q: Tensor, k: Tensor, v: Tensor, p: Problem) -> Tensor:
        ctx.problem = p
        ulysses, share = p.mesh.ulysses, p.share
        if ulysses.size == 1:
            out, lses = rank_forward(p, q, k, v)
            ctx.save_for_backward(q, k, v, out, *lses)
            return out
        qkv = to_heads(ulysses, p.shares, (q, k, v), "qkk")
        out, lses = rank_forward(p, *_split(qkv, share.num_q, share.num_kv))
        ctx.save_for_backward(qkv, out, *lses)
        local = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        to_tokens(ulysses, p.shares, out, "q", (local,))
        return local

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _AttentionCtx, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        p = ctx.problem
        ulysses, share, shares = p.mesh.ulysses, p.share, p.shares
        if dout.stride(-1) != 1 or 0 in dout.stride():  # for example of `out.sum()`: copied once, not by every kernel call
            dout = dout.contiguous()
        if ulysses.size == 1:
            q, k, v, out, *lses = ctx.saved_tensors
            dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
            rank_backward(p, dout, q, k, v, out, lses, dq, dk, dv)
            return dq, dk, dv, None
        qkv, out, *lses = ctx.saved_tensors
        q, k, v = _split(qkv, share.num_q, share.num_kv)
        dout = to_heads(ulysses, shares, (dout,), "q")
        local, dim = p.layout.local, q.shape[2]
        dq_local = q.new_empty((local, shares[-1].q1, dim))
        if repeats_kv(shares):  # summed over the ranks that have the same key/value head: sent in float32
            wide = torch.float64 if q.dtype == torch.float64 else torch.float32
            dq = q.new_empty(q.shape)
            dkv = torch.empty((k.shape[0], 2 * share.num_kv, dim), dtype=wide, device=q.device)
            rank_backward(p, dout, q, k, v, out, lses, dq, dkv[:, : share.num_kv], dkv[:, share.num_kv :])
            dk_local, dv_local = (torch.empty((local, shares[-1].k1, dim), dtype=wide, device=q.device) for _ in "kv")
            to_tokens(ulysses, shares, dq, "q", (dq_local,))
            to_tokens(ulysses, shares, dkv, "kk", (dk_local, dv_local))
            return dq_local, dk_local.to(k.dtype), dv_local.to(v.dtype), None
        grads = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        rank_backward(p, dout, q, k, v, out, lses, *_split(grads, share.num_q, share.num_kv))
        dk_local, dv_local = (q.new_empty((local, shares[-1].k1, dim)) for _ in "kv")
        to_tokens(ulysses, shares, grads, "qkk", (dq_local, dk_local, dv_local))
        return dq_local, dk_local, dv_local, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention inside each document of the pack, and of branches over their prefixes. `q: [T_local, Hq, D]`, `k`, `v: [T_local, Hk, D]` ->
    `[T_local, Hq, D]`.

    The rows are those of `layout.shard`. The output of pad rows is zero.

    causal: a token attends to itself and to earlier tokens of its document; False: to its whole document. A token of a branch attends to
        its whole prefix too.
    scale: factor of the scores, finite and above 0; default: `D ** -0.5`.
    backend: a name in `eagle_cp.backends.KERNELS`; default: the fastest that can run. Attention over prefixes has no causal mask; a named
        kernel that needs one (cuDNN) leaves that part to the fastest kernel that can run.

    Raises ValueError, before any collective, for shapes, heads or dtypes that do not fit, and when no kernel can run."""
    problem: str | None = None
    kernels: tuple[Kernel, Kernel, Kernel] | None = None
    heads, factor = layout.heads, 0.0
    try:
        heads = _check(q, k, v, layout)
        factor = score_factor("attention", scale, q.shape[2])
        rank = layout.rank_attention(causal)
        pieces = rank.pieces.segments if rank.pieces is not None else None
        where = q.device, q.dtype, q.shape[2], causal, backend
        whole, cut = choose(*where, rank.whole), choose(*where, pieces)
        kernels = whole, cut, _prefix_kernel(q, layout, backend, rank.prefix_segments) if layout.prefixes else whole
    except ValueError as error:
        problem = str(error)
    layout.check("attention", problem, (q.dtype, q.shape, k.shape, causal, scale), "dtype, shapes, causal or scale")
    assert kernels is not None
    assert heads is not None
    made = Problem(layout, heads, causal, factor, kernels, q.shape[2])
    return cast(Tensor, _Attention.apply(q, k, v, made))  # pyright: ignore[reportUnknownMemberType]


def _prefix_kernel(q: Tensor, layout: Layout, backend: str | None, segments: Segments | None) -> Kernel:
    """The kernel of branches over their prefixes."""
    where = q.device, q.dtype, q.shape[2]
    if backend is not None and KERNELS[backend].unsupported(*where, False):
        backend = None
    return choose(*where, False, backend, segments)


def _check(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[HeadShare, ...]:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected [T, Hq, D], [T, Hk, D], [T, Hk, D] without a"
            " batch dimension: pack the batch into one sequence"
        )
    if q.shape[0] != layout.local:
        raise ValueError(
            f"attention: q has {q.shape[0]} tokens, the layout has {layout.local} on this rank; pass it through layout.shard first"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(f"attention: q, k, v must agree in dtype and device, got {q.dtype}, {k.dtype}, {v.dtype}; cast them first")
    if layout.heads is None:
        return split_heads(q.shape[1], k.shape[1], 1)
    expected = layout.heads[-1].q1, layout.heads[-1].k1
    if (q.shape[1], k.shape[1]) != expected:
        raise ValueError(f"attention: {q.shape[1]}/{k.shape[1]} heads, but the layout was built for {expected[0]}/{expected[1]}")
    return layout.heads
