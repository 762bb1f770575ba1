"""flash-attn-4 on packed segments, and its gradients of keys and values before they are rounded.

With grouped queries its backward sums dK and dV in fp32 accumulators, tile by tile in the order of the matrix unit's fragments, and
rounds them at the end. Gradients that will be summed over ranks should be rounded after that sum, so the accumulators are caught as they
are allocated (`torch.zeros` under a TorchFunctionMode) and read here. Which number is where is asked of the kernel itself, once: with
zero gradients and accumulators that hold their own positions. If the answer isn't understood, gradients are taken rounded.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from eagle_cp.fa2 import find
from eagle_cp.gradients import rounded_gradients
from eagle_cp.segments import Segments

log = logging.getLogger("eagle_cp")
TILES = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256)  # rows that a kernel may sum at once


def module() -> Any:
    return find("flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd")


def _dense(segments: Segments) -> bool:
    return len(segments) == 1


def _arguments(segments: Segments, *tensors: torch.Tensor) -> tuple[list[torch.Tensor], dict]:
    """`tensors` and lengths as the kernel takes them: one segment is a batch of one, whose tiles it schedules better than packed ones."""
    if _dense(segments):
        return [x.unsqueeze(0) for x in tensors], {}
    cu_q, cu_k = segments.on(tensors[0].device)
    return list(tensors), {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": segments.max_q, "max_seqlen_k": segments.max_k}


def forward(q, k, v, segments: Segments, causal: bool, scale: float, out: torch.Tensor) -> torch.Tensor:
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    (q, k, v, out, given_lse), lengths = _arguments(segments, q, k, v, out, lse)
    module()._flash_attn_fwd(q, k, v, softmax_scale=scale, causal=causal, return_lse=True, out=out, lse=given_lse, **lengths)
    return lse


def backward(dout, q, k, v, out, lse, segments: Segments, causal: bool, scale: float, dq, dk, dv) -> None:
    (q, k, v, out, dout, lse, dq, dk, dv), lengths = _arguments(segments, q, k, v, out, dout, lse, dq, dk, dv)
    again = torch.are_deterministic_algorithms_enabled()  # the same bits again
    module()._flash_attn_bwd(q, k, v, out, dout, lse, scale, causal, dq=dq, dk=dk, dv=dv, deterministic=again, **lengths)


def backward_wide(dout, q, k, v, out, lse, segments: Segments, causal: bool, scale: float, dq) -> Callable[..., None]:
    group = q.shape[1] // k.shape[1]
    order = None
    if group > 1:  # else it has no accumulators
        order = accumulator_order(
            q.device, q.dtype, q.shape[2], group, causal, _dense(segments), torch.are_deterministic_algorithms_enabled()
        )
    if order is None:
        return rounded_gradients(backward, dout, q, k, v, out, lse, segments, causal, scale, dq)
    unused = torch.empty(k.shape, dtype=k.dtype, device=k.device)  # what the kernel rounds; dK, then dV over it
    with _Accumulators() as caught:
        backward(dout, q, k, v, out, lse, segments, causal, scale, dq, unused, unused)
    sums = [x.view(k.shape[1], -1) for x in caught.tensors]
    tile_rows = None if _dense(segments) else _tile_rows(segments, order.tile, q.device)

    def add_to(dk: torch.Tensor, dv: torch.Tensor, rows: torch.Tensor | None = None, unique: bool = True) -> None:
        from eagle_cp.accumulators import add_accumulator  # needs Triton

        for target, accumulator, factor in zip((dk, dv), sums, (scale, 1.0), strict=True):
            add_accumulator(target, accumulator, factor, order.tile, order.stride, order.table, segments.total_k, tile_rows, rows, unique)

    return add_to


class _Accumulators(TorchFunctionMode):
    """Keeps the fp32 tensors that `torch.zeros` makes (dK, then dV), and fills them with `fill(n)` if given."""

    def __init__(self, fill: Callable[[int, int], torch.Tensor] | None = None):
        super().__init__()
        self.fill = fill
        self.tensors: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.zeros and result.dtype == torch.float32:
            if self.fill is not None:
                result.copy_(self.fill(len(self.tensors), result.numel()).view(result.shape))
            self.tensors.append(result)
        return result


class Order(NamedTuple):
    """Row `r`, column `d` of tile `t` is number `t * stride + table[r, d]` of a head's accumulator; `table: int32 [tile, D]`."""

    tile: int
    stride: int
    table: torch.Tensor


@functools.cache
def accumulator_order(
    device: torch.device, dtype: torch.dtype, dim: int, group: int, causal: bool, dense: bool, deterministic: bool = False
) -> Order | None:
    """The order of the accumulators, from three backward passes over zeros; None when they are not what is expected.

    deterministic: torch's setting, by which the kernel picks its tiles."""
    lengths = [400] if dense else [300, 170, 90]
    cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    segments, total = Segments(cu, cu), cu[-1]
    zeros = functools.partial(torch.zeros, dtype=dtype, device=device)
    q, k, lse = zeros(total, group, dim), zeros(total, 1, dim), torch.zeros(group, total, device=device)
    digits = []
    for powers in ((0, 1), (2, 0), (1, 2)):  # of 128, so that half precision keeps every digit; dK and dV both see all three

        def fill(i: int, n: int, powers=powers) -> torch.Tensor:
            return (torch.arange(n, device=device) // 128 ** powers[i % 2] % 128).float()

        dk, dv = torch.empty_like(k), torch.empty_like(k)
        with _Accumulators(fill) as caught:
            backward(q, q, k, k, q, lse, segments, causal, 1.0, torch.empty_like(q), dk, dv)
        if len(caught.tensors) != 2 or caught.tensors[0].numel() >= 128**3:
            log.warning("flash-attn-4: its accumulators of dK and dV are not where they were; partial gradients are rounded to %s", dtype)
            return None
        digits.append((dk[:, 0].long(), dv[:, 0].long()))
    (a0, b1), (a2, b0), (a1, b2) = digits
    place = a0 + 128 * a1 + 128**2 * a2
    order = find_order(place.cpu(), segments, dense) if torch.equal(place, b0 + 128 * b1 + 128**2 * b2) else None
    if order is None:
        log.warning("flash-attn-4: the order of its accumulators is not understood; partial gradients of keys are rounded to %s", dtype)
        return None
    return order._replace(table=order.table.to(device))


def find_order(place: torch.Tensor, segments: Segments, dense: bool) -> Order | None:
    """The order that explains `place: int64 [keys, D]`, the number of each row and column in a head's accumulator."""
    for tile in TILES:
        if tile >= segments.lengths_k[0]:
            return None
        stride = int(place[tile, 0] - place[0, 0])
        table = place[:tile]
        if stride < table.numel() or table.min() < 0 or table.max() >= stride or table.unique().numel() != table.numel():
            continue
        rows = torch.arange(len(place)) if dense else _tile_rows(segments, tile, torch.device("cpu")).long()
        if torch.equal(rows.div(tile, rounding_mode="floor")[:, None] * stride + table[rows % tile], place):
            return Order(tile, stride, table.to(torch.int32))
    return None


def _tile_rows(segments: Segments, tile: int, device: torch.device) -> torch.Tensor:
    """Each packed key's row in the accumulators, `int32 [keys]`: every segment starts a tile."""
    key = ("tile rows", tile, device)
    if key not in segments.cache:
        starts = torch.tensor(segments.cu_k[:-1])
        padded = (starts + torch.arange(len(segments)) * tile) // tile * tile
        shift = (padded - starts).repeat_interleave(torch.tensor(segments.lengths_k))
        segments.cache[key] = (torch.arange(segments.total_k) + shift).to(torch.int32).to(device, non_blocking=True)
    return segments.cache[key]
