"""RMSNorm kernels: one read and one write per element in each direction.

Forward: a program reads `ROWS` rows and keeps them in registers between the sum of squares and the scaling. Backward: a fixed number of
programs iterates over all rows, each with a float32 weight gradient of its own in registers; a second kernel adds the partial gradients.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
# (kernels are called as kernel[grid](...), and a type checker sees only the function)
import torch
import triton
import triton.language as tl
from torch import Tensor

PIPELINE_BYTES = 110 << 10  # shared memory of one program's pipeline, at most: two programs fit a multiprocessor


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, rstd_ptr, rows, x_stride, residual_stride, eps,
    COLS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < COLS)[None, :]
    weight = tl.load(weight_ptr + col, mask=col < COLS, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + col[None, :], mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row[:, None] * COLS + col[None, :], x, mask=mask)
    x = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / COLS + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = x * rstd[:, None] * weight[None, :]
    tl.store(y_ptr + row[:, None] * COLS + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, rows, dy_stride, x_stride,
    COLS: tl.constexpr, HAS_DTOTAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    col = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + col, mask=col < COLS, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in tl.range(program * ROWS, rows, programs * ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (col < COLS)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        normed = x * rstd[:, None]
        dnormed = dy * weight[None, :]
        mean = tl.sum(normed * dnormed, axis=1) / COLS
        dx = (dnormed - normed * mean[:, None]) * rstd[:, None]
        if HAS_DTOTAL:
            dx += tl.load(dtotal_ptr + row[:, None] * COLS + col[None, :], mask=mask, other=0.0).to(tl.float32)
        dweight += dy * normed
        tl.store(dx_ptr + row[:, None] * COLS + col[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + program.to(tl.int64) * COLS + col, tl.sum(dweight, axis=0), mask=col < COLS)


@triton.jit
def reduce_kernel(partial_ptr, out_ptr, programs, COLS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & (col < COLS)[None, :]
        total += tl.load(partial_ptr + row[:, None] * COLS + col[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + col, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=col < COLS)


def as_rows(x: Tensor) -> Tensor:
    """[..., H] as [rows, H] with unit stride in H, without a copy where the strides allow it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def forward_shape(cols: int) -> tuple[int, int, int]:
    """(rows of a program, columns of a program, warps) of the forward kernel."""
    block = triton.next_power_of_2(cols)
    rows = max(1, min(16, 2048 // block))
    return rows, block, max(1, min(16, rows * block // 1024))


def backward_shape(cols: int, itemsize: int) -> tuple[int, int, int, int, int]:
    """(rows, columns, warps, pipeline stages, programs per multiprocessor) of the backward kernel.

    H200, width 3584: 0.95 of the copy bandwidth with 3 stages and 8 warps per multiprocessor, 0.8 with 32 warps and no pipeline.
    """
    block = triton.next_power_of_2(cols)
    rows = max(1, min(16, 2048 // block))
    # A stage holds a block of up to three inputs (x, dy, dtotal) in shared memory.
    stages = min(3, PIPELINE_BYTES // (3 * rows * block * itemsize))
    if stages < 2:
        warps = max(1, min(32, rows * block // 512))
        return rows, block, warps, 1, max(1, 32 // warps)
    warps = max(2, min(16, rows * block // 1024))
    return rows, block, warps, stages, max(2, 8 // warps)


def multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def launch_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, residual + x or an empty tensor, 1 / root mean square [rows] float32)."""
    rows_of_x, cols = as_rows(x), x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows_of_x.shape[0], dtype=torch.float32, device=x.device)
    total = torch.empty(x.shape if residual is not None else (0,), dtype=x.dtype, device=x.device)
    other = as_rows(residual) if residual is not None else rows_of_x
    if rows_of_x.shape[0] > 0:
        rows, block, warps = forward_shape(cols)
        forward_kernel[(triton.cdiv(rows_of_x.shape[0], rows),)](
            rows_of_x, other, weight.contiguous(), y, total, rstd, rows_of_x.shape[0], rows_of_x.stride(0), other.stride(0), eps,
            COLS=cols, HAS_RESIDUAL=residual is not None, ROWS=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return y, total, rstd


def launch_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(dx in x's dtype, dweight [H] in `weight_dtype`)."""
    rows_of_x, rows_of_dy, cols = as_rows(x), as_rows(dy), x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = torch.empty(cols, dtype=weight_dtype, device=x.device)
    if rows_of_x.shape[0] == 0:
        return dx, dweight.zero_()
    rows, block, warps, stages, resident = backward_shape(cols, x.element_size())
    programs = min(resident * multiprocessors(x), triton.cdiv(rows_of_x.shape[0], rows))
    partial = torch.empty((programs, cols), dtype=torch.float32, device=x.device)
    backward_kernel[(programs,)](
        rows_of_dy, dtotal.contiguous() if dtotal is not None else rows_of_dy, rows_of_x, weight.contiguous(), rstd, dx, partial,
        rows_of_x.shape[0], rows_of_dy.stride(0), rows_of_x.stride(0),
        COLS=cols, HAS_DTOTAL=dtotal is not None, ROWS=rows, BLOCK=block, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    reduce_kernel[(triton.cdiv(cols, 32),)](partial, dweight, programs, COLS=cols, ROWS=64, BLOCK=32, num_warps=4)
    return dx, dweight
