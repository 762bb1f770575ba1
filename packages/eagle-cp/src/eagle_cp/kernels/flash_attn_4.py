"""flash-attn-4 on packed segments, and its gradients of keys and values before they are rounded.

With grouped queries its backward sums dK and dV in float32 accumulators, tile by tile in the order of the matrix unit's fragments, and
rounds them at the end. Gradients that are summed over ranks should be rounded after that sum, so a TorchFunctionMode records the
accumulators when the package allocates them with `torch.zeros`, and `flash_attn_4_accumulators.py` reads them. The order of the numbers
is measured once, with zero gradients and accumulators that hold their own positions. If the result is not a known order, a warning is
logged and the rounded gradients are used.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from eagle_cp.kernels.kernel import AddGradients, Kernel, find, needs_cuda_half, rounded_gradients
from eagle_cp.segments import Segments

log = logging.getLogger("eagle_cp")
TILES = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256)  # rows that a kernel may sum in one tile


def interface() -> Any:
    """The package's module with its kernels, or None."""
    return find("flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd")


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool) -> str | None:
    reason = needs_cuda_half(device, dtype, 9, "for its backward")
    if reason is None and (head_dim % 8 or head_dim > 128):
        reason = f"head dim {head_dim} is not a multiple of 8 up to 128"
    if reason is None and interface() is None:
        reason = "flash-attn-4 is not installed (pip install 'eagle-cp[flash-attn-4]')"
    return reason


def _dense(segments: Segments) -> bool:
    return len(segments) == 1


def _arguments(segments: Segments, *tensors: Tensor) -> tuple[list[Tensor], dict[str, Tensor | int]]:
    """`tensors` and lengths as the kernel takes them. One segment becomes a batch of one: on an H200, 624 instead of 614 TFLOP/s packed
    (128K tokens, 28/4 heads, forward and backward)."""
    if _dense(segments):
        return [x.unsqueeze(0) for x in tensors], {}
    cu_q, cu_k = segments.on(tensors[0].device)
    return list(tensors), {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": segments.max_q, "max_seqlen_k": segments.max_k}


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float, out: Tensor) -> Tensor:
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    (q, k, v, out, given_lse), lengths = _arguments(segments, q, k, v, out, lse)
    interface()._flash_attn_fwd(q, k, v, softmax_scale=scale, causal=causal, return_lse=True, out=out, lse=given_lse, **lengths)
    return lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, causal: bool, scale: float,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    (q, k, v, out, dout, lse, dq, dk, dv), lengths = _arguments(segments, q, k, v, out, dout, lse, dq, dk, dv)
    deterministic = torch.are_deterministic_algorithms_enabled()
    interface()._flash_attn_bwd(q, k, v, out, dout, lse, scale, causal, dq=dq, dk=dk, dv=dv, deterministic=deterministic, **lengths)


def backward_wide(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, causal: bool, scale: float, dq: Tensor
) -> AddGradients:
    group = q.shape[1] // k.shape[1]
    order = None
    if group > 1:  # with as many key/value as query heads it has no accumulators
        order = accumulator_order(
            q.device, q.dtype, q.shape[2], group, causal, _dense(segments), torch.are_deterministic_algorithms_enabled()
        )
    if order is None:
        return rounded_gradients(backward, dout, q, k, v, out, lse, segments, causal, scale, dq)
    unused = torch.empty(k.shape, dtype=k.dtype, device=k.device)  # the rounded gradients, dK and then dV over it
    with _RecordAccumulators() as recorded:
        backward(dout, q, k, v, out, lse, segments, causal, scale, dq, unused, unused)
    sums = [x.view(k.shape[1], -1) for x in recorded.tensors]
    tile_rows = None if _dense(segments) else _tile_rows(segments, order.tile, q.device)

    def add_to(dk: Tensor, dv: Tensor, rows: Tensor | None = None, unique: bool = True) -> None:
        from eagle_cp.kernels.flash_attn_4_accumulators import add_accumulator  # needs Triton

        for target, accumulator, factor in zip((dk, dv), sums, (scale, 1.0), strict=True):
            add_accumulator(target, accumulator, factor, order.tile, order.stride, order.table, segments.total_k, tile_rows, rows, unique)

    return add_to


class _RecordAccumulators(TorchFunctionMode):
    """Records the float32 tensors that `torch.zeros` makes (dK, then dV). `fill(i, n)`: the `n` numbers that tensor `i` starts with
    (default: zeros)."""

    def __init__(self, fill: Callable[[int, int], Tensor] | None = None):
        super().__init__()
        self.fill = fill
        self.tensors: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.zeros and result.dtype == torch.float32:
            if self.fill is not None:
                result.copy_(self.fill(len(self.tensors), result.numel()).view(result.shape))
            self.tensors.append(result)
        return result


class AccumulatorOrder(NamedTuple):
    """Row `r`, column `d` of tile `t` is number `t * stride + table[r, d]` of a head's accumulator; `table: int32 [tile, D]`."""

    tile: int
    stride: int
    table: Tensor


@functools.cache
def accumulator_order(
    device: torch.device, dtype: torch.dtype, dim: int, group: int, causal: bool, dense: bool, deterministic: bool = False
) -> AccumulatorOrder | None:
    """The order of the accumulators, measured with three backward passes over zeros; None when they are not what is expected.

    deterministic: torch's setting; the kernel chooses its tile size by it."""
    lengths = [400] if dense else [300, 170, 90]
    cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    segments, total = Segments(cu, cu), cu[-1]
    zeros = functools.partial(torch.zeros, dtype=dtype, device=device)
    q, k, lse = zeros(total, group, dim), zeros(total, 1, dim), torch.zeros(group, total, device=device)
    digits: list[tuple[Tensor, Tensor]] = []
    for powers in ((0, 1), (2, 0), (1, 2)):  # of 128, so that half precision keeps every digit; dK and dV both see all three

        def fill(i: int, n: int, powers: tuple[int, int] = powers) -> Tensor:
            return (torch.arange(n, device=device) // 128 ** powers[i % 2] % 128).float()

        dk, dv = torch.empty_like(k), torch.empty_like(k)
        with _RecordAccumulators(fill) as recorded:
            backward(q, q, k, k, q, lse, segments, causal, 1.0, torch.empty_like(q), dk, dv)
        if len(recorded.tensors) != 2 or recorded.tensors[0].numel() >= 128**3:
            log.warning(
                "flash-attn-4: its backward does not allocate the expected accumulators of dK and dV; partial gradients are rounded to %s",
                dtype,
            )
            return None
        digits.append((dk[:, 0].long(), dv[:, 0].long()))
    (a0, b1), (a2, b0), (a1, b2) = digits
    place = a0 + 128 * a1 + 128**2 * a2
    order = find_order(place.cpu(), segments, dense) if torch.equal(place, b0 + 128 * b1 + 128**2 * b2) else None
    if order is None:
        log.warning("flash-attn-4: the order of its accumulators is unknown; partial gradients of keys and values are rounded to %s", dtype)
        return None
    return order._replace(table=order.table.to(device))


def find_order(place: Tensor, segments: Segments, dense: bool) -> AccumulatorOrder | None:
    """The order that explains `place: int64 [keys, D]`, the number of each row and column in a head's accumulator."""
    for tile in TILES:
        if tile >= segments.lengths_k[0]:
            return None
        stride = int(place[tile, 0] - place[0, 0])
        table = place[:tile]
        if stride < table.numel() or table.min() < 0 or table.max() >= stride or table.flatten().sort().values.diff().eq(0).any():
            continue
        rows = torch.arange(len(place)) if dense else _tile_rows(segments, tile, torch.device("cpu")).long()
        if torch.equal(rows.div(tile, rounding_mode="floor")[:, None] * stride + table[rows % tile], place):
            return AccumulatorOrder(tile, stride, table.to(torch.int32))
    return None


def _tile_rows(segments: Segments, tile: int, device: torch.device) -> Tensor:
    """Row of each packed key in the accumulators, `int32 [keys]`: every segment starts a new tile."""
    key = ("tile rows", tile, device)
    if key not in segments.cache:
        starts = torch.tensor(segments.cu_k[:-1])
        padded = (starts + torch.arange(len(segments)) * tile) // tile * tile
        shift = (padded - starts).repeat_interleave(torch.tensor(segments.lengths_k))
        segments.cache[key] = (torch.arange(segments.total_k) + shift).to(torch.int32).to(device, non_blocking=True)
    return segments.cache[key]


KERNEL = Kernel("flash-attn-4", forward, backward, backward_wide, unsupported)
