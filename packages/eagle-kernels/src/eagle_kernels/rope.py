"""Rotary position embedding of queries and keys in one launch, with angles that stay exact at millions of tokens."""

from typing import Any

import torch
from torch import Tensor

from eagle_kernels import checks, reference
from eagle_kernels.dispatch import use_triton
from eagle_kernels.registry import register


def _rotate(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    from eagle_kernels.kernels.rope import rotate

    return rotate(q, k, positions, inv_freq, backward)


def _rotate_(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, backward: bool) -> None:
    from eagle_kernels.kernels.rope import rotate_

    rotate_(q, k, positions, inv_freq, backward)


register(
    "rope(Tensor q, Tensor k, Tensor positions, Tensor inv_freq, bool backward) -> (Tensor, Tensor)",
    _rotate,
    lambda q, k, positions, inv_freq, backward: (q.new_empty(q.shape), k.new_empty(k.shape)),
)
register(
    "rope_(Tensor(a!) q, Tensor(b!) k, Tensor positions, Tensor inv_freq, bool backward) -> ()",
    _rotate_,
    lambda q, k, positions, inv_freq, backward: None,
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(positions, inv_freq)
        return torch.ops.eagle_kernels.rope(q, k, positions, inv_freq, False)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        positions, inv_freq = ctx.saved_tensors
        return (*torch.ops.eagle_kernels.rope(dq, dk, positions, inv_freq, True), None, None)


class _RopeInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ctx.save_for_backward(positions, inv_freq)
        torch.ops.eagle_kernels.rope_(q, k, positions, inv_freq, False)
        ctx.mark_dirty(q, k)
        return q, k

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Rope.backward(ctx, dq, dk)


def rope(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, *, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate pairs `(i, i + D/2)` of every head by `position * inv_freq[i]` (Su et al. 2021, in the "rotate_half" order of Llama and Qwen).

    q: [T, Hq, D], k: [T, Hk, D], positions: [T] integers (a packed sequence restarts them), inv_freq: [D/2] float32.
    Angles are taken in float64: cosines and sines are right to 1e-7 for positions below 2^29 (beyond, the product doesn't fit; at 2^40 they
    are off by 2e-4). inplace: write over q and k (declared to autograd; backward needs neither), not under `torch.compile`, which does that
    by itself. Raises ValueError or TypeError on shapes, dtypes or devices that don't fit.
    """
    checks.rope(q, k, positions, inv_freq)
    inplace = inplace and not torch.compiler.is_compiling()
    if use_triton("rope", q):
        if inplace and q.stride(-1) == k.stride(-1) == 1:
            return _RopeInPlace.apply(q, k, positions, inv_freq)
        rotated = _Rope.apply(q, k, positions, inv_freq)
    else:
        rotated = reference.rope(q, k, positions, inv_freq)
    return (q.copy_(rotated[0]), k.copy_(rotated[1])) if inplace else rotated
