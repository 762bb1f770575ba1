"""Kernels that round to e4m3: by rows, by columns with a transposition, and SwiGLU with its result rounded by rows.

All are limited by memory bandwidth. A row is read twice, the second time from the cache; scales and rounded values are those of
`reference.py` to the bit, because a scale is a power of 2.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# (kernels are called as kernel[grid](...), and a type checker sees only the function)
import torch
import triton
import triton.language as tl
from torch import Tensor

from eagle_kernels.ops.swiglu.kernel import gradients, read

BLOCK = 2048
WARPS = 8
TILE = 64


@triton.jit
def scale_of(largest):
    """The power of 2 by which a row is divided: `reference.scales_of`."""
    bits = tl.maximum(largest, 1e-12).to(tl.int32, bitcast=True)
    return ((bits + 0x1FFFFF) & -0x800000).to(tl.float32, bitcast=True) * 0.00390625


@triton.jit
def scale_of_row(largest, row, rows):
    """From the absolute values of a row, or of blocks of it; 1 for a row beyond the last one."""
    return tl.where(row < rows, scale_of(tl.max(largest, 0)), 1.0)


@triton.jit
def row_values(x_ptr, up_ptr, at, mask, GATED: tl.constexpr):
    """Numbers of a row: x, or (GATED) `silu(x) * up` rounded to x's dtype as the operator that stores it does; float32."""
    x = read(x_ptr + at, mask)
    if GATED:
        x = (x / (1.0 + tl.exp(-x)) * read(up_ptr + at, mask)).to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def round_row(x_ptr, up_ptr, out_ptr, scales_ptr, rows, cols, x_stride, up_stride, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """One program is one row of `row_values`."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    limit = tl.where(row < rows, cols, 0)  # nothing is read beyond the last row
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        x = row_values(x_ptr + row * x_stride, up_ptr + row * up_stride, start + at, start + at < limit, GATED)
        largest = tl.maximum(largest, tl.abs(x))
    scale = scale_of_row(largest, row, rows)
    factor = tl.div_rn(1.0, scale)  # exact; a plain division may not be
    for start in range(0, cols, BLOCK):
        x = row_values(x_ptr + row * x_stride, up_ptr + row * up_stride, start + at, start + at < limit, GATED)
        tl.store(out_ptr + row * cols + start + at, (x * factor).to(out_ptr.dtype.element_ty), mask=start + at < cols)
    tl.store(scales_ptr + row, scale)


@triton.jit
def round_rows_kernel(x_ptr, out_ptr, scales_ptr, rows, cols, x_stride, BLOCK: tl.constexpr):
    """One program is one row."""
    round_row(x_ptr, x_ptr, out_ptr, scales_ptr, rows, cols, x_stride, x_stride, False, BLOCK)


@triton.jit
def swiglu_rows_kernel(gate_ptr, up_ptr, out_ptr, scales_ptr, rows, cols, gate_stride, up_stride, BLOCK: tl.constexpr):
    """One program is one row of `silu(gate) * up`, which is never written in its own dtype."""
    round_row(gate_ptr, up_ptr, out_ptr, scales_ptr, rows, cols, gate_stride, up_stride, True, BLOCK)


@triton.jit
def largest_kernel(x_ptr, largest_ptr, rows, cols, each, x_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """One program is `each` rows of COLS columns; the maximum does not depend on the order of programs."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    first = tl.program_id(1).to(tl.int64) * each
    largest = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, each, ROWS):
        row = first + start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (col < cols)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    tl.atomic_max(largest_ptr + col, tl.max(largest, 0), mask=col < cols)


@triton.jit
def round_columns_kernel(x_ptr, largest_ptr, out_ptr, scales_ptr, rows, cols, padded, x_stride, TILE: tl.constexpr):
    """One program is a tile of TILE x TILE values, written transposed."""
    # Tiles of one row of tiles are neighbours in time, so that they read whole lines of memory.
    col = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    scale = scale_of(tl.load(largest_ptr + col, mask=col < cols, other=0.0))
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    values = (x * tl.div_rn(1.0, scale)[None, :]).to(out_ptr.dtype.element_ty)
    place = out_ptr + col.to(tl.int64)[:, None] * padded + row[None, :]
    tl.store(place, tl.trans(values), mask=(col < cols)[:, None] & (row < padded)[None, :])
    tl.store(scales_ptr + col, scale, mask=col < tl.where(tl.program_id(1) == 0, cols, 0))


@triton.jit
def swiglu_backward_rows_kernel(
    dout_ptr, gate_ptr, up_ptr, dup_ptr, out_ptr, dgate_8_ptr, dup_8_ptr, dgate_scales_ptr, dup_scales_ptr,
    rows, cols, gate_stride, up_stride, REBUILD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program is one row: both gradients in their own dtype and rounded; that of gate takes the place of dout."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    limit = tl.where(row < rows, cols, 0)
    largest_dgate, largest_dup = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        mask = start + at < limit
        dout = read(dout_ptr + row * cols + start + at, mask)
        gate = read(gate_ptr + row * gate_stride + start + at, mask)
        up = read(up_ptr + row * up_stride + start + at, mask)
        dgate, dup, out = gradients(dout, gate, up)
        dgate, dup = dgate.to(dout_ptr.dtype.element_ty), dup.to(dout_ptr.dtype.element_ty)
        tl.store(dout_ptr + row * cols + start + at, dgate, mask=mask)
        tl.store(dup_ptr + row * cols + start + at, dup, mask=mask)
        if REBUILD:
            tl.store(out_ptr + row * cols + start + at, out.to(out_ptr.dtype.element_ty), mask=mask)
        largest_dgate = tl.maximum(largest_dgate, tl.abs(dgate.to(tl.float32)))
        largest_dup = tl.maximum(largest_dup, tl.abs(dup.to(tl.float32)))
    dgate_scale = scale_of_row(largest_dgate, row, rows)
    dup_scale = scale_of_row(largest_dup, row, rows)
    dgate_factor, dup_factor = tl.div_rn(1.0, dgate_scale), tl.div_rn(1.0, dup_scale)
    tl.debug_barrier()  # what other threads of the program have stored is read
    for start in range(0, cols, BLOCK):
        mask, place = start + at < limit, row * cols + start + at
        dgate = read(dout_ptr + place, mask)
        dup = read(dup_ptr + place, mask)
        tl.store(dgate_8_ptr + place, (dgate * dgate_factor).to(dgate_8_ptr.dtype.element_ty), mask=start + at < cols)
        tl.store(dup_8_ptr + place, (dup * dup_factor).to(dup_8_ptr.dtype.element_ty), mask=start + at < cols)
    tl.store(dgate_scales_ptr + row, dgate_scale)
    tl.store(dup_scales_ptr + row, dup_scale)


def _rows_in_memory(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _rounded_rows(rows: int, cols: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, cols, dtype=torch.float8_e4m3fn, device=device), torch.empty(rows, 1, device=device)


def launch_rows(x: Tensor, padded: int) -> tuple[Tensor, Tensor]:
    """As `reference.rows`."""
    x = _rows_in_memory(x)
    out, scales = _rounded_rows(padded, x.shape[1], x.device)
    if out.numel():
        round_rows_kernel[(padded,)](x, out, scales, x.shape[0], x.shape[1], x.stride(0), BLOCK=BLOCK, num_warps=WARPS)
    return out, scales


def launch_columns(x: Tensor, padded: int) -> tuple[Tensor, Tensor]:
    """As `reference.columns`."""
    x = _rows_in_memory(x)
    rows, cols = x.shape
    out, scales = _rounded_rows(cols, padded, x.device)
    largest = torch.zeros(cols, device=x.device)
    if rows:
        each = 512
        grid = (triton.cdiv(cols, 128), triton.cdiv(rows, each))
        largest_kernel[grid](x, largest, rows, cols, each, x.stride(0), ROWS=16, COLS=128, num_warps=4)
    if cols:
        grid = (triton.cdiv(cols, TILE), max(1, triton.cdiv(padded, TILE)))
        round_columns_kernel[grid](x, largest, out, scales, rows, cols, padded, x.stride(0), TILE=TILE, num_warps=4)
    return out, scales


def launch_swiglu_rows(gate: Tensor, up: Tensor, padded: int) -> tuple[Tensor, Tensor]:
    """`reference.rows` of `silu(gate) * up`. gate, up: [M, K] -> [padded, K] and [padded, 1]."""
    gate, up = _rows_in_memory(gate), _rows_in_memory(up)
    rows, cols = gate.shape
    out, scales = _rounded_rows(padded, cols, gate.device)
    if out.numel():
        strides = gate.stride(0), up.stride(0)
        swiglu_rows_kernel[(padded,)](gate, up, out, scales, rows, cols, *strides, BLOCK=BLOCK, num_warps=WARPS)
    return out, scales


def launch_swiglu_backward_rows(
    dout: Tensor, gate: Tensor, up: Tensor, rebuild: bool, padded: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient of gate [M, K] into `dout`, which must be contiguous; that of up, and `silu(gate) * up` (rebuild) or an empty tensor.

    Then both gradients as `reference.rows`: values and scales of gate's, values and scales of up's.
    """
    gate, up = _rows_in_memory(gate), _rows_in_memory(up)
    rows, cols = gate.shape
    dup = torch.empty(rows, cols, dtype=gate.dtype, device=gate.device)
    out = torch.empty((rows, cols) if rebuild else (0,), dtype=gate.dtype, device=gate.device)
    (dgate_8, dgate_scales), (dup_8, dup_scales) = (_rounded_rows(padded, cols, gate.device) for _ in range(2))
    if dgate_8.numel():
        swiglu_backward_rows_kernel[(padded,)](
            dout, gate, up, dup, out, dgate_8, dup_8, dgate_scales, dup_scales, rows, cols, gate.stride(0), up.stride(0),
            REBUILD=rebuild, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return dup, out, dgate_8, dgate_scales, dup_8, dup_scales
