"""Differentiable `shard` and `unshard` of a layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from eagle_cp.layout import Layout


class Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, layout: Layout, dim: int, fill: float):
        ctx.layout, ctx.dim, ctx.size = layout, dim, x.shape
        tokens = layout.local_tokens(x.device)
        if layout.pad == 0:
            return x.index_select(dim, tokens)
        local = x.index_select(dim, tokens.clamp(min=0))
        pad = (tokens < 0).view([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])
        return local.masked_fill(pad, fill)

    @staticmethod
    def backward(ctx, grad):
        tokens = ctx.layout.local_tokens(grad.device)
        if ctx.layout.pad:
            real = _real_rows(ctx.layout, grad.device)
            tokens, grad = tokens.index_select(0, real), grad.index_select(ctx.dim, real)
        return grad.new_zeros(ctx.size).index_copy(ctx.dim, tokens, grad), None, None, None


class Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, layout: Layout, dim: int):
        ctx.layout, ctx.dim = layout, dim
        rows = x.movedim(dim, 0).contiguous()
        gathered = rows.new_empty((layout.mesh.size, *rows.shape))
        layout.mesh.context.all_gather(gathered, rows).wait()
        return gathered.flatten(0, 1).index_select(0, layout.inverse(x.device)).movedim(0, dim)

    @staticmethod
    def backward(ctx, grad):
        layout = ctx.layout
        grad = grad.movedim(ctx.dim, 0)
        rows = grad.new_zeros((layout.mesh.size * layout.local, *grad.shape[1:]))
        rows.index_copy_(0, layout.inverse(grad.device), grad)
        mine = rows.new_empty((layout.local, *grad.shape[1:]))
        layout.mesh.context.reduce_scatter(mine, rows.unflatten(0, (layout.mesh.size, layout.local))).wait()
        return mine.movedim(0, ctx.dim), None, None


def _real_rows(layout: Layout, device: torch.device) -> torch.Tensor:
    """Local rows that hold a token, from the host's copy: no synchronisation."""
    return (layout.local_tokens() >= 0).nonzero().flatten().to(device, non_blocking=True)
