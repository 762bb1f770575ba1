"""Rotary position embedding of queries and keys in one launch, with angles that stay exact at millions of tokens."""

from typing import Any

import torch
from torch import Tensor

from eagle_kernels import checks
from eagle_kernels.dispatch import declare, register, use_triton
from eagle_kernels.ops.rope import reference

declare("rope")


def _check(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> None:
    checks.floating("rope", q=q, k=k)
    for name, x in (("q", q), ("k", k)):
        if x.ndim < 3 or x.shape[-1] % 2:
            raise ValueError(f"rope: {name} has shape {tuple(x.shape)}, expected [..., heads, D] with an even head dimension D")
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"rope: q is {tuple(q.shape)} and k {tuple(k.shape)}; tokens and head dimension must agree")
    checks.integers("rope", "positions", positions)
    checks.shape("rope", "positions", positions, tuple(q.shape[:-2]), "one per token")
    if inv_freq.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rope: inv_freq is {inv_freq.dtype}, expected torch.float32 (lower precision makes the angles wrong)")
    checks.shape("rope", "inv_freq", inv_freq, (q.shape[-1] // 2,), "half the head dimension")
    checks.same_device("rope", q=q, positions=positions, inv_freq=inv_freq)


def _rotate(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    from eagle_kernels.ops.rope.kernel import rotate

    return rotate(q, k, positions, inv_freq, backward)


def _rotate_(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, backward: bool) -> None:
    from eagle_kernels.ops.rope.kernel import rotate_

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


def _rotated(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    if not torch.is_grad_enabled():
        return torch.ops.eagle_kernels.rope(q, k, positions, inv_freq, False)
    return _Rope.apply(q, k, positions, inv_freq)


def rope(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor, *, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate pairs `(i, i + D/2)` of every head by `position * inv_freq[i]` (Su et al. 2021, in the "rotate_half" order of Llama and Qwen).

    q: [..., Hq, D], k: [..., Hk, D], positions: [...] integers (restart at 0 for every sample of a pack), inv_freq: [D/2] float32.
    Several leading dimensions, such as [batch, length], are flattened: a view where the strides allow it, else a copy.
    Angles are computed in float64: cosines and sines are right to 1e-7 for positions below 2^29. Beyond that the product is rounded; at
    2^40 they are off by 2e-4.
    inplace: write the results over q and k. Backward does not need the old values. Only [T, heads, D] avoids an intermediate result. No
    effect under `torch.compile`, which plans memory itself.
    Raises ValueError or TypeError for shapes, dtypes or devices that do not match.
    """
    _check(q, k, positions, inv_freq)
    inplace = inplace and not torch.compiler.is_compiling()
    if not use_triton(q):
        rotated = reference.rope(q, k, positions, inv_freq)
    elif q.ndim == 3:
        if inplace and q.stride(-1) == k.stride(-1) == 1:
            return _RopeInPlace.apply(q, k, positions, inv_freq)
        rotated = _rotated(q, k, positions, inv_freq)
    else:
        flat = _rotated(q.flatten(0, -3), k.flatten(0, -3), positions.flatten(), inv_freq)
        rotated = flat[0].view(q.shape), flat[1].view(k.shape)
    return (q.copy_(rotated[0]), k.copy_(rotated[1])) if inplace else rotated
