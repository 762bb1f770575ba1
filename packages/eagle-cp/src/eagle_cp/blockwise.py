"""Packed attention from kernels that only know dense blocks with a top-left causal mask (torch's CPU flash kernel, cuDNN through torch).

A segment is cut into a square on the diagonal (causal) and the rectangle of keys before it (full); where both exist the results are merged by
their log-sum-exps. Squares of similar length share one padded batch: with a top-left causal mask no real query sees a padded key to its
right, so right padding is exact. The backward of each block gets the merged output and log-sum-exp, which makes the sum over blocks exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from eagle_cp.segments import Segments


class Batch(NamedTuple):
    """Blocks of one shape run as one dense call: `rows_q`, `rows_k` are rows of the packed tensors, `slots_*` where they sit in `[blocks * length]`."""

    blocks: int
    length_q: int
    length_k: int
    causal: bool
    rows_q: torch.Tensor
    rows_k: torch.Tensor
    slots_q: torch.Tensor
    slots_k: torch.Tensor
    dense: bool  # every slot is a real row


# forward(q, k, v [B, H, L, D], causal, scale) -> out, lse [B, H, L]; backward(dout, q, k, v, out, lse, causal, scale) -> dq, dk, dv
DenseForward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool, float], tuple[torch.Tensor, torch.Tensor]]
DenseBackward = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def bucket_length(n: int) -> int:
    """The padded length for `n` rows: exact up to 8, then at most an eighth more, so that a pack has few distinct shapes."""
    if n <= 8:
        return n
    step = 1 << max(0, (n - 1).bit_length() - 4)
    return -(-n // step) * step


def make_batches(segments: Segments, causal: bool, device: torch.device, max_rows: int = 1 << 16) -> list[Batch]:
    """Cuts `segments` into dense blocks and groups them; at most `max_rows` padded rows a batch (more only for a single longer block)."""
    squares: dict[int, list[tuple[int, int, int]]] = {}
    rectangles: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for q0, k0, nq, nk in zip(segments.cu_q, segments.cu_k, segments.lengths_q, segments.lengths_k):
        if causal:
            squares.setdefault(bucket_length(nq), []).append((q0, k0 + nk - nq, nq))
            if nk > nq:
                rectangles.setdefault((nq, nk - nq), []).append((q0, k0))
        else:
            rectangles.setdefault((nq, nk), []).append((q0, k0))
    batches = []
    for length, items in sorted(squares.items()):
        per_batch = max(1, max_rows // length)
        for first in range(0, len(items), per_batch):
            part = items[first : first + per_batch]
            batches.append(_square_batch(part, length, device))
    for (nq, nk), items in rectangles.items():
        per_batch = max(1, max_rows // max(nq, nk))
        for first in range(0, len(items), per_batch):
            part = torch.tensor(items[first : first + per_batch])
            rows_q = (part[:, :1] + torch.arange(nq)).flatten().to(device)
            rows_k = (part[:, 1:] + torch.arange(nk)).flatten().to(device)
            n = len(part)
            batches.append(
                Batch(n, nq, nk, False, rows_q, rows_k, torch.arange(n * nq, device=device), torch.arange(n * nk, device=device), True)
            )
    return batches


def _square_batch(items: list[tuple[int, int, int]], length: int, device: torch.device) -> Batch:
    starts = torch.tensor(items)
    inside = torch.arange(length) < starts[:, 2:]
    slots = inside.flatten().nonzero().flatten()
    rows_q = (starts[:, :1] + torch.arange(length))[inside]
    rows_k = (starts[:, 1:2] + torch.arange(length))[inside]
    n = len(items)
    slots = slots.to(device)
    return Batch(n, length, length, True, rows_q.to(device), rows_k.to(device), slots, slots, len(slots) == n * length)


def _batches(segments: Segments, causal: bool, device: torch.device) -> list[Batch]:
    key = ("blockwise", causal, device)
    if key not in segments.cache:
        segments.cache[key] = make_batches(segments, causal, device)
    return segments.cache[key]


def _pick(x: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, batch: Batch, length: int) -> torch.Tensor:
    """Rows of `x: [T, H, D]` as a (zero-padded) dense batch `[B, H, L, D]`."""
    picked = x.index_select(0, rows)
    if not batch.dense:
        padded = x.new_zeros((batch.blocks * length, *x.shape[1:]))
        picked = padded.index_copy_(0, slots, picked)
    return picked.view(batch.blocks, length, *x.shape[1:]).transpose(1, 2)


def _flat(x: torch.Tensor, slots: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The real rows of a dense `[B, H, L, D]` as `[rows, H, D]`."""
    flat = x.transpose(1, 2).flatten(0, 1)
    return flat if batch.dense else flat.index_select(0, slots)


def _groups(k: torch.Tensor, groups: int) -> torch.Tensor:
    return k if groups == 1 else k.repeat_interleave(groups, dim=1)


def blockwise_forward(
    forward: DenseForward, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`q: [Tq, Hq, D]`, `k`, `v: [Tk, Hk, D]` -> `out: [Tq, Hq, D]`, `lse: [Hq, Tq]` (fp32, or fp64 for fp64 inputs)."""
    groups = q.shape[1] // k.shape[1]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((q.shape[0], q.shape[1]), float("-inf"), dtype=lse_dtype, device=q.device)
    for batch in _batches(segments, causal, q.device):
        qb = _pick(q, batch.rows_q, batch.slots_q, batch, batch.length_q)
        kb = _groups(_pick(k, batch.rows_k, batch.slots_k, batch, batch.length_k), groups)
        vb = _groups(_pick(v, batch.rows_k, batch.slots_k, batch, batch.length_k), groups)
        block_out, block_lse = forward(qb, kb, vb, batch.causal, scale)
        block_out = _flat(block_out, batch.slots_q, batch)
        block_lse = _flat(block_lse.unsqueeze(-1), batch.slots_q, batch).squeeze(-1).to(lse_dtype)
        if batch.causal or not causal:  # squares come first and touch each row once
            out.index_copy_(0, batch.rows_q, block_out)
            lse.index_copy_(0, batch.rows_q, block_lse)
            continue
        old_out, old_lse = out.index_select(0, batch.rows_q), lse.index_select(0, batch.rows_q)
        new_lse = torch.logaddexp(old_lse, block_lse)
        merged = old_out * (old_lse - new_lse).exp().unsqueeze(-1) + block_out * (block_lse - new_lse).exp().unsqueeze(-1)
        out.index_copy_(0, batch.rows_q, merged.to(out.dtype))
        lse.index_copy_(0, batch.rows_q, new_lse)
    return out, lse.t()


def blockwise_backward(
    backward: DenseBackward,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    segments: Segments,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `q`, `k`, `v` in their dtypes, summed over blocks in fp32 (fp64 for fp64)."""
    heads, kv_heads = q.shape[1], k.shape[1]
    groups = heads // kv_heads
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    lse_rows = lse.t().unsqueeze(-1)
    for batch in _batches(segments, causal, q.device):
        qb = _pick(q, batch.rows_q, batch.slots_q, batch, batch.length_q)
        kb = _groups(_pick(k, batch.rows_k, batch.slots_k, batch, batch.length_k), groups)
        vb = _groups(_pick(v, batch.rows_k, batch.slots_k, batch, batch.length_k), groups)
        ob = _pick(out, batch.rows_q, batch.slots_q, batch, batch.length_q)
        gb = _pick(dout, batch.rows_q, batch.slots_q, batch, batch.length_q)
        lb = _pick(lse_rows, batch.rows_q, batch.slots_q, batch, batch.length_q).squeeze(-1).contiguous()
        dqb, dkb, dvb = backward(gb, qb, kb, vb, ob, lb, batch.causal, scale)
        dq.index_add_(0, batch.rows_q, _flat(dqb, batch.slots_q, batch).to(wide))
        for total, part in ((dk, dkb), (dv, dvb)):
            part = _flat(part, batch.slots_k, batch).to(wide)
            total.index_add_(0, batch.rows_k, part.unflatten(1, (kv_heads, groups)).sum(2))
    return dq.to(q.dtype), dk, dv


def cpu_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's CPU flash kernel on one dense batch. fp64, fp32, bf16, fp16."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def cpu_backward(dout, q, k, v, out, lse, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its backward; half precision is raised to fp32 first, which most CPUs also run faster."""
    if q.dtype in (torch.bfloat16, torch.float16):
        dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)
