"""Packed attention from kernels that only take dense blocks with a top-left causal mask.

A segment is cut into a square on the diagonal (causal) and the rectangle of keys before it (full). Where both exist, the results are
merged by their log-sum-exps. Squares of similar length share one padded batch: with a top-left causal mask no real query attends to a
padded key, because all of these are to its right, so padding is exact. The backward of each block gets the merged output and log-sum-exp,
which makes the sum over blocks exact (Dao et al., FlashAttention-2, section 3.1)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from eagle_cp.kernels.kernel import AddGradients, Kernel, Unsupported, add_rows
from eagle_cp.segments import Segments


class DenseBatch(NamedTuple):
    """Blocks of one shape that run as one dense call. `rows_*`: rows of the packed tensors; `slots_*`: where they go in `[blocks *
    length]`, None if they fill it in order."""

    blocks: int
    length_q: int
    length_k: int
    causal: bool
    rows_q: Tensor
    rows_k: Tensor
    slots_q: Tensor | None
    slots_k: Tensor | None


@dataclass(frozen=True)
class DenseKernel:
    """A kernel for dense blocks.

    forward(q, k, v, causal, scale) on `[B, H, L, D]` -> out `[B, H, L, D]`, lse `[B, H, L]`
    backward(dout, q, k, v, out, lse, causal, scale) -> dq, dk, dv
    same_shapes: block lengths are rounded up to few distinct ones, also those of rectangles, because the kernel prepares itself for every
        new shape.
    grouped: takes fewer key/value heads than query heads.
    max_rows: padded rows in one batch, except where a single block is longer.
    """

    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor]]
    same_shapes: bool
    grouped: bool
    max_rows: int


def blockwise_kernel(name: str, dense: DenseKernel, unsupported: Unsupported) -> Kernel:
    """A kernel over packed segments that computes with `dense`."""
    return Kernel(
        name,
        functools.partial(blockwise_forward, dense),
        functools.partial(blockwise_backward, dense),
        functools.partial(blockwise_backward_wide, dense),
        unsupported,
    )


def bucket_length(n: int, fine: bool = False) -> int:
    """`n` rounded up: exact up to 8, then to within an eighth; `fine`: to multiples of 128 within a thirty-second."""
    if fine:
        step = max(128, 1 << max(0, (n - 1).bit_length() - 6))
    else:
        step = 1 if n <= 8 else 1 << max(0, (n - 1).bit_length() - 4)
    return -(-n // step) * step


def _floor_bucket(n: int) -> int:
    """The largest `bucket_length(..., fine=True)` that is at most `n`, or 0."""
    step = max(128, 1 << max(0, n.bit_length() - 6))
    return n // step * step


Shapes = dict[tuple[int, int], list[tuple[int, int, int, int]]]


def _blocks(segments: Segments, causal: bool, dense: DenseKernel) -> tuple[dict[int, list[tuple[int, int, int, int]]], Shapes]:
    """Squares by length: (first query row, its slot, first key row, keys); rectangles by lengths: (first query row, queries, first key
    row, keys)."""
    squares: dict[int, list[tuple[int, int, int, int]]] = {}
    rectangles: Shapes = {}
    for q0, k0, nq, nk in zip(segments.cu_q, segments.cu_k, segments.lengths_q, segments.lengths_k):
        if not causal:
            rectangles.setdefault((nq, nk), []).append((q0, nq, k0, nk))
            continue
        before = nk - nq
        cut = _floor_bucket(before) if dense.same_shapes else before  # keys of the rectangle; the square takes the rest
        squares.setdefault(bucket_length(nk - cut, dense.same_shapes), []).append((q0, before - cut, k0 + cut, nk - cut))
        if cut:
            rectangles.setdefault((bucket_length(nq, True) if dense.same_shapes else nq, cut), []).append((q0, nq, k0, cut))
    return squares, rectangles


def count_calls(segments: Segments, causal: bool, dense: DenseKernel) -> int:
    """Number of dense calls of the forward of `segments`, not counting that `max_rows` cuts long batches."""
    key = ("calls", dense, causal)
    if key not in segments.cache:
        segments.cache[key] = sum(map(len, _blocks(segments, causal, dense)))
    return segments.cache[key]


def make_batches(segments: Segments, causal: bool, dense: DenseKernel, device: torch.device) -> list[DenseBatch]:
    """Cuts `segments` into dense blocks and groups those of equal shape. Squares come first and write each query row once."""
    squares, rectangles = _blocks(segments, causal, dense)
    batches: list[DenseBatch] = []
    for length, items in sorted(squares.items()):
        per_batch = max(1, dense.max_rows // length)
        for i in range(0, len(items), per_batch):
            part = torch.tensor(items[i : i + per_batch])
            first_q, slot_q, first_k, keys = part.unbind(1)
            rows_q, slots_q = _place(first_q, slot_q, keys - slot_q, length)
            rows_k, slots_k = _place(first_k, torch.zeros_like(first_k), keys, length)
            batches.append(_batch(len(part), length, length, True, rows_q, rows_k, slots_q, slots_k, device))
    for (length_q, length_k), items in rectangles.items():
        per_batch = max(1, dense.max_rows // max(length_q, length_k))
        for i in range(0, len(items), per_batch):
            part = torch.tensor(items[i : i + per_batch])
            first_q, queries, first_k, keys = part.unbind(1)
            rows_q, slots_q = _place(first_q, torch.zeros_like(first_q), queries, length_q)
            rows_k, slots_k = _place(first_k, torch.zeros_like(first_k), keys, length_k)
            batches.append(_batch(len(part), length_q, length_k, False, rows_q, rows_k, slots_q, slots_k, device))
    return batches


def _place(first: Tensor, slot: Tensor, count: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Rows `first[i] + j` and their slots `i * length + slot[i] + j` for `j < count[i]`."""
    inside = torch.arange(length) < count[:, None]
    rows = (first[:, None] + torch.arange(length))[inside]
    slots = (torch.arange(len(first))[:, None] * length + slot[:, None] + torch.arange(length))[inside]
    return rows, slots


def _batch(
    blocks: int, length_q: int, length_k: int, causal: bool, rows_q: Tensor, rows_k: Tensor, slots_q: Tensor, slots_k: Tensor,
    device: torch.device,
) -> DenseBatch:  # fmt: skip
    placed = [None if len(s) == blocks * n else s.to(device) for s, n in ((slots_q, length_q), (slots_k, length_k))]
    return DenseBatch(blocks, length_q, length_k, causal, rows_q.to(device), rows_k.to(device), *placed)


def _batches(segments: Segments, causal: bool, dense: DenseKernel, device: torch.device) -> list[DenseBatch]:
    key = (dense, causal, device)
    if key not in segments.cache:
        segments.cache[key] = make_batches(segments, causal, dense, device)
    return segments.cache[key]


def _pick(x: Tensor, rows: Tensor, slots: Tensor | None, blocks: int, length: int) -> Tensor:
    """Rows of `x: [T, H, D]` as a (zero-padded) dense batch `[B, H, L, D]`."""
    picked = x.index_select(0, rows)
    if slots is not None:
        picked = x.new_zeros((blocks * length, *x.shape[1:])).index_copy_(0, slots, picked)
    return picked.view(blocks, length, *x.shape[1:]).transpose(1, 2)


def _flat(x: Tensor, slots: Tensor | None) -> Tensor:
    """The real rows of a dense `[B, H, L, D]` as `[rows, H, D]`."""
    flat = x.transpose(1, 2).flatten(0, 1)
    return flat if slots is None else flat.index_select(0, slots)


def _inputs(batch: DenseBatch, q: Tensor, k: Tensor, v: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    qb = _pick(q, batch.rows_q, batch.slots_q, batch.blocks, batch.length_q)
    kb, vb = (_pick(x, batch.rows_k, batch.slots_k, batch.blocks, batch.length_k) for x in (k, v))
    return (qb, kb, vb) if groups == 1 else (qb, kb.repeat_interleave(groups, dim=1), vb.repeat_interleave(groups, dim=1))


def blockwise_forward(
    dense: DenseKernel, q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float, out: Tensor
) -> Tensor:
    """`q: [Tq, Hq, D]`, `k`, `v: [Tk, Hk, D]`; writes `out: [Tq, Hq, D]`, returns `lse: [Hq, Tq]` (float32, float64 for float64)."""
    groups = 1 if dense.grouped else q.shape[1] // k.shape[1]
    wide = wide_dtype(q.dtype)
    lse = torch.empty((q.shape[0], q.shape[1]), dtype=wide, device=q.device)
    batches = _batches(segments, causal, dense, q.device)
    merges = causal and any(not batch.causal for batch in batches)
    total = torch.empty(q.shape, dtype=wide, device=q.device) if merges and out.dtype != wide else out  # rounded once, after merging
    for batch in batches:
        block_out, block_lse = dense.forward(*_inputs(batch, q, k, v, groups), batch.causal, scale)
        block_out = _flat(block_out, batch.slots_q)
        block_lse = _flat(block_lse.unsqueeze(-1), batch.slots_q).squeeze(-1).to(wide)
        if causal and not batch.causal:  # a rectangle: its square is done
            old_lse = lse.index_select(0, batch.rows_q)
            new_lse = torch.logaddexp(old_lse, block_lse)
            old_out = total.index_select(0, batch.rows_q) * (old_lse - new_lse).exp().unsqueeze(-1)
            block_out = old_out + block_out * (block_lse - new_lse).exp().unsqueeze(-1)
            block_lse = new_lse
        total.index_copy_(0, batch.rows_q, block_out.to(total.dtype))
        lse.index_copy_(0, batch.rows_q, block_lse)
    if total is not out:
        out.copy_(total)
    return lse.t().contiguous()


def blockwise_backward(
    dense: DenseKernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Writes `dq`, `dk`, `dv` (of any floating dtype), summed over blocks in float32 (float64 for float64).

    Where `dk` is wider than `k`, the query heads of a group are summed here too, because grouped kernels round that sum."""
    wide = wide_dtype(q.dtype)
    groups = 1 if dense.grouped and dk.dtype == k.dtype else q.shape[1] // k.shape[1]
    batches = _batches(segments, causal, dense, q.device)
    targets = (dq, dk, dv)
    # Rows are in several blocks only where there are squares and rectangles; elsewhere each is written once, without a sum in float32.
    merges = causal and any(not batch.causal for batch in batches)
    totals = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in targets] if merges else targets
    lse_rows = lse.t().unsqueeze(-1)
    for batch in batches:
        ob, gb = (_pick(x, batch.rows_q, batch.slots_q, batch.blocks, batch.length_q) for x in (out, dout))
        lb = _pick(lse_rows, batch.rows_q, batch.slots_q, batch.blocks, batch.length_q).squeeze(-1).contiguous()
        grads = dense.backward(gb, *_inputs(batch, q, k, v, groups), ob, lb, batch.causal, scale)
        for i, (total, grad) in enumerate(zip(totals, grads)):
            rows, slots = (batch.rows_k, batch.slots_k) if i else (batch.rows_q, batch.slots_q)
            part = _flat(grad, slots)
            if i and groups > 1:
                grouped = cast(Tensor, part.unflatten(1, (-1, groups)))  # pyright: ignore[reportUnknownMemberType]
                part = grouped.sum(2, dtype=wide)
            if merges:
                total.index_add_(0, rows, part.to(wide))
            else:
                total.index_copy_(0, rows, part.to(total.dtype))
    if merges:
        for x, total in zip(targets, totals):
            x.copy_(total)


def blockwise_backward_wide(
    dense: DenseKernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, causal: bool,
    scale: float, dq: Tensor,
) -> AddGradients:  # fmt: skip
    """Writes `dq`; the returned function adds the gradients of keys and values to wider tensors.

    One key/value head at a time, which is repeated for its query heads: their gradients are summed here, in float32."""
    group = q.shape[1] // k.shape[1]
    dk, dv = (torch.empty(x.shape, dtype=wide_dtype(x.dtype), device=x.device) for x in (k, v))
    for h in range(k.shape[1]):
        a, b = slice(h * group, (h + 1) * group), slice(h, h + 1)
        given = dout[:, a], q[:, a], k[:, b], v[:, b], out[:, a], lse[a], segments, causal, scale
        blockwise_backward(dense, *given, dq[:, a], dk[:, b], dv[:, b])
    return functools.partial(add_rows, (dk, dv))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
