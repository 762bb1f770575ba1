"""Packed attention over a layout: Ulysses inside, all-gathered keys and values outside, exact in every gradient.

A rank's way: exchange tokens for heads within the Ulysses group (`ulysses`), compute the gather rank's attention for these heads (`core`),
exchange back. Backward makes the same way in the opposite direction. With several key/value heads a rank these three overlap: the exchange
of one head's stage travels while another's is computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from eagle_cp.backends import choose
from eagle_cp.core import Problem, core_backward, core_forward
from eagle_cp.heads import HeadShare, repeats_kv, split_heads, stages
from eagle_cp.layout import Layout, agree
from eagle_cp.ulysses import to_heads, to_tokens


def _split(x: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x[:, :heads], x[:, heads : heads + kv_heads], x[:, heads + kv_heads :]


class _Attention(torch.autograd.Function):
    """`problems`: one for each stage of heads; without a Ulysses group there is just one."""

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problems: tuple[Problem, ...]) -> torch.Tensor:
        ctx.problems = problems
        ulysses = problems[0].mesh.ulysses
        if ulysses.size == 1:
            out, lses = core_forward(problems[0], q, k, v)
            ctx.save_for_backward(q, k, v, out, *lses)
            return out
        ctx.saved, saved = [], []
        local = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        leaving = None
        for p, arrive in _one_ahead(problems, lambda p: to_heads(ulysses, p.shares, (q, k, v), "qkk")):
            qkv = arrive()
            del arrive
            out, lses = core_forward(p, *_split(qkv, p.share.num_q, p.share.num_kv))
            if leaving is not None:
                leaving()
            leaving = to_tokens(ulysses, p.shares, out, "q", (local,))
            ctx.saved.append(2 + len(lses))
            saved += [qkv, out, *lses]
        if leaving is not None:
            leaving()
        ctx.save_for_backward(*saved)
        return local

    @staticmethod
    def backward(ctx, dout: torch.Tensor):
        problems: tuple[Problem, ...] = ctx.problems
        ulysses, heads = problems[0].mesh.ulysses, problems[-1].shares[-1]
        if ulysses.size == 1:
            q, k, v, out, *lses = ctx.saved_tensors
            dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
            core_backward(problems[0], dout, q, k, v, out, lses, dq, dk, dv)
            return dq, dk, dv, None
        saved = list(ctx.saved_tensors)
        local, dim, dtype = *dout.shape[::2], dout.dtype
        shared = repeats_kv(problems[0].shares)  # summed over the ranks that share a key/value head, so sent in full precision
        wide = torch.promote_types(dtype, torch.float32) if shared else dtype
        dq_local = dout.new_empty((local, heads.q1, dim))
        dk_local, dv_local = (torch.empty((local, heads.k1, dim), dtype=wide, device=dout.device) for _ in "kv")
        leaving: list[Callable[[], None]] = []
        for (p, arrive), count in zip(_one_ahead(problems, lambda p: to_heads(ulysses, p.shares, (dout,), "q")), ctx.saved):
            (qkv, out, *lses), saved = saved[:count], saved[count:]
            num_q, num_kv = p.share.num_q, p.share.num_kv
            given = p, arrive(), *_split(qkv, num_q, num_kv), out, lses
            del arrive
            if shared:
                dq = dout.new_empty((qkv.shape[0], num_q, dim))
                dkv = torch.empty((qkv.shape[0], 2 * num_kv, dim), dtype=wide, device=dout.device)
                core_backward(*given, dq, dkv[:, :num_kv], dkv[:, num_kv:])
                sent = {"q": (dq, (dq_local,)), "kk": (dkv, (dk_local, dv_local))}
            else:
                grads = torch.empty(qkv.shape, dtype=dtype, device=dout.device)
                core_backward(*given, *_split(grads, num_q, num_kv))
                sent = {"qkk": (grads, (dq_local, dk_local, dv_local))}
            del given
            for finish in leaving:
                finish()
            leaving = [to_tokens(ulysses, p.shares, x, kinds, wholes) for kinds, (x, wholes) in sent.items()]
            del sent
        for finish in leaving:
            finish()
        return dq_local, dk_local.to(dtype), dv_local.to(dtype), None


def _one_ahead(problems: tuple[Problem, ...], start: Callable[[Problem], Callable[[], torch.Tensor]]):
    """Each problem with its exchange, started while the problem before was not yet computed."""
    travelling = [start(problems[0])]
    for i, p in enumerate(problems):
        if i + 1 < len(problems):
            travelling.append(start(problems[i + 1]))
        yield p, travelling.pop(0)  # kept nowhere else: it holds what was sent


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
    problems = tuple(Problem(layout, shares, causal, factor, kernels, q.shape[2]) for shares in stages(heads))
    return _Attention.apply(q, k, v, problems)


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
