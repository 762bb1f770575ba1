"""Gradients of keys and values that are summed further (over segments, ranks, heads) before they are rounded.

A kernel's `backward_wide` returns a function `add_to(dk, dv, rows, unique)`: these are the two ways to make it for a kernel that gives
tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch


def rounded_gradients(backward: Callable[..., None], dout, q, k, v, *rest) -> Callable[..., None]:
    """The wide gradients of a kernel that can only round them: `add_to(dk, dv, rows, unique)` adds them to rows `rows` (None: in order)."""
    dk, dv = torch.empty(k.shape, dtype=k.dtype, device=k.device), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    backward(dout, q, k, v, *rest, dk, dv)
    return functools.partial(add_rows, (dk, dv))


def add_rows(
    parts: Sequence[torch.Tensor], dk: torch.Tensor, dv: torch.Tensor, rows: torch.Tensor | None = None, unique: bool = True
) -> None:
    for target, part in zip((dk, dv), parts):
        if rows is None:
            target.add_(part)
        else:
            target.index_add_(0, rows, part.to(target.dtype))
