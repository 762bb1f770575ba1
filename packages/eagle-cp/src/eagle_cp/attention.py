"""Packed attention over a layout, exact in every gradient."""

from __future__ import annotations

import torch

from eagle_cp.backends import Kernel, choose
from eagle_cp.layout import Layout


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, layout: Layout, causal: bool, scale: float, kernel: Kernel):
        out, lse = kernel.forward(q, k, v, layout.segments, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.problem = (layout, causal, scale, kernel)
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        layout, causal, scale, kernel = ctx.problem
        dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, layout.segments, causal, scale)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


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

    `scale` defaults to `D ** -0.5`. Raises ValueError before any work when shapes, heads or dtype don't fit.
    """
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; expected [T, Hq, D], [T, Hk, D], [T, Hk, D]"
        )
    if q.shape[0] != layout.local:
        raise ValueError(f"attention: q has {q.shape[0]} tokens, the layout {layout.local} on this rank; shard it with layout.shard first")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads are no multiple of {k.shape[1]} key/value heads")
    kernel = choose(q.device, q.dtype, q.shape[2], backend)
    return _Attention.apply(q, k, v, layout, causal, scale if scale is not None else q.shape[2] ** -0.5, kernel)
