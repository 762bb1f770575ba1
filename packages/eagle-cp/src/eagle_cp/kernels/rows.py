"""Rows of branches: their attention over prefixes merged into that over themselves, and gradients of queries added, in place.

On a GPU one kernel reads and writes each number once; torch makes copies of the rows and float32 intermediate results.
"""

# Triton's language has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportMissingTypeStubs=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _places(
    target, added, rows, first, count, target_row, target_head, added_row, added_head,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """One program is ROWS rows of `added` in one head: (its rows, which are real, their rows in `target`), then for the numbers of these
    rows (pointers into `target`, which are real, the numbers of `target`, those of `added`), both in float32."""
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    real = i < count
    inside = real[:, None] & (d < DIM)[None, :]
    row = tl.load(rows + i, mask=real, other=0) if PICKED else first + i.to(tl.int64)
    place = target + row[:, None] * target_row + head * target_head + d[None, :]
    own = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(added + i.to(tl.int64)[:, None] * added_row + head * added_head + d[None, :], mask=inside, other=0.0).to(tl.float32)
    return i, real, row, place, inside, own, other


@triton.jit
def _merge(
    out, lse, added, added_lse, rows, first, count, out_row, out_head, lse_head, added_row, added_head, added_lse_head,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    i, real, row, place, inside, own, other = _places(
        out, added, rows, first, count, out_row, out_head, added_row, added_head, DIM, BLOCK, ROWS, PICKED
    )
    head = tl.program_id(1).to(tl.int64)
    own_lse = tl.load(lse + head * lse_head + row, mask=real, other=0.0)
    other_lse = tl.load(added_lse + head * added_lse_head + i, mask=real, other=0.0)
    larger = tl.maximum(own_lse, other_lse)
    merged = larger + tl.log(tl.exp(own_lse - larger) + tl.exp(other_lse - larger))
    mixed = own * tl.exp(own_lse - merged)[:, None] + other * tl.exp(other_lse - merged)[:, None]
    tl.store(place, mixed.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + head * lse_head + row, merged, mask=real)


@triton.jit
def _add(
    target, added, rows, first, count, target_row, target_head, added_row, added_head,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    _, _, _, place, inside, own, other = _places(
        target, added, rows, first, count, target_row, target_head, added_row, added_head, DIM, BLOCK, ROWS, PICKED
    )
    tl.store(place, (own + other).to(target.dtype.element_ty), mask=inside)


def _launch(kernel: Any, tensors: tuple[Any, ...], strides: tuple[int, ...], rows: slice | torch.Tensor, added: torch.Tensor) -> None:
    count, heads, dim = added.shape
    picked = isinstance(rows, torch.Tensor)
    index, first = (rows, 0) if isinstance(rows, torch.Tensor) else (added, rows.start)
    block = 16
    kernel[(triton.cdiv(count, block), heads)](
        *tensors, index, first, count, *strides, DIM=dim, BLOCK=triton.next_power_of_2(dim), ROWS=block, PICKED=picked
    )


def merge(out: torch.Tensor, lse: torch.Tensor, added: torch.Tensor, added_lse: torch.Tensor, rows: slice | torch.Tensor) -> None:
    """Writes to rows `rows` of `out: [n, heads, D]` and `lse: float32 [heads, n]` the attention over both sets of keys, from what is there
    and from `added: [m, heads, D]` and `added_lse: [heads, m]`. No row is in `rows` twice; the last dimension of all is dense."""
    strides = (*out.stride()[:2], lse.stride(0), *added.stride()[:2], added_lse.stride(0))
    _launch(_merge, (out, lse, added, added_lse), strides, rows, added)


def add(target: torch.Tensor, added: torch.Tensor, rows: slice | torch.Tensor) -> None:
    """`target[rows] += added`, summed in float32 and rounded once. target: [n, heads, D], added: [m, heads, D]; as for `merge`."""
    _launch(_add, (target, added), (*target.stride()[:2], *added.stride()[:2]), rows, added)
