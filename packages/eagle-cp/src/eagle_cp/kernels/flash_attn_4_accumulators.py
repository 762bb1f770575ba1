"""Adds flash-attn-4's tiled float32 accumulators, in the order that `flash_attn_4.accumulator_order` measured, to rows of a tensor."""

# Triton's language has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportMissingTypeStubs=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _add_rows(
    target, accumulator, table, tile_rows, rows, count, factor, target_row, target_head, head_stride, stride,
    TILE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    MAPPED: tl.constexpr, PICKED: tl.constexpr, UNIQUE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    real = i < count
    row = tl.load(tile_rows + i, mask=real, other=0) if MAPPED else i
    inside = real[:, None] & (d < DIM)[None, :]
    place = tl.load(table + (row % TILE)[:, None] * DIM + d[None, :], mask=inside, other=0)
    source = accumulator + head * head_stride + (row // TILE).to(tl.int64)[:, None] * stride + place
    value = tl.load(source, mask=inside, other=0.0) * factor
    to = tl.load(rows + i, mask=real, other=0) if PICKED else i.to(tl.int64)
    destination = target + to[:, None] * target_row + head * target_head + d[None, :]
    if UNIQUE:
        tl.store(destination, tl.load(destination, mask=inside, other=0.0) + value, mask=inside)
    else:
        tl.atomic_add(destination, value, mask=inside, sem="relaxed")


def add_accumulator(
    target: torch.Tensor,
    accumulator: torch.Tensor,
    factor: float,
    tile: int,
    stride: int,
    table: torch.Tensor,
    count: int,
    tile_rows: torch.Tensor | None,
    rows: torch.Tensor | None,
    unique: bool,
) -> None:
    """Adds `factor` times row `i < count` of `accumulator: float32 [heads, tiles * stride]` to row `rows[i]` (None: `i`) of
    `target: float32 [n, heads, D]`.

    Row `i` is row `tile_rows[i]` (None: `i`) of the accumulator. Within a tile of `tile` rows, `table: int32 [tile, D]` holds the position
    of each number. `unique`: no two `rows` are the same, so that atomic additions are not needed."""
    heads, dim = target.shape[1:]
    block = 16  # rows a program: the matrix unit's fragments interleave this many
    kernel: Any = _add_rows[(triton.cdiv(count, block), heads)]
    kernel(
        target, accumulator, table, table if tile_rows is None else tile_rows, table if rows is None else rows, count, factor,
        target.stride(0), target.stride(1), accumulator.stride(0), stride,
        TILE=tile, DIM=dim, BLOCK=triton.next_power_of_2(dim), ROWS=block,
        MAPPED=tile_rows is not None, PICKED=rows is not None, UNIQUE=unique,
    )  # fmt: skip
