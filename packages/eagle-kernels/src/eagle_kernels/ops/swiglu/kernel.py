"""SwiGLU kernels. They are elementwise and limited by memory bandwidth: one program is one block of elements, read with wide loads."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# (kernels are called as kernel[grid](...), and a type checker sees only the function)
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
WARPS, BACKWARD_WARPS = 4, 8  # the fastest of nine shapes on an H200, by 1 %


@triton.jit
def read(pointers, mask):
    """The numbers there in float32; 0 where the mask is false."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def gradients(dout, gate, up):
    """Gradients of gate and up, and `silu(gate) * up`; all float32."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    return dout * up * (sigmoid + silu * (1.0 - sigmoid)), dout * silu, silu * up


@triton.jit
def forward_kernel(gate_ptr, up_ptr, out_ptr, cols, blocks, gate_stride, up_stride, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    col = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = col < cols
    gate = read(gate_ptr + row * gate_stride + col, mask)
    up = read(up_ptr + row * up_stride + col, mask)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * cols + col, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, out_ptr, cols, blocks, dout_stride, gate_stride, up_stride,
    REBUILD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    col = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = col < cols
    dout = read(dout_ptr + row * dout_stride + col, mask)
    gate = read(gate_ptr + row * gate_stride + col, mask)
    up = read(up_ptr + row * up_stride + col, mask)
    dgate, dup, out = gradients(dout, gate, up)
    offset = row * cols + col
    tl.store(dgate_ptr + offset, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + offset, dup.to(dup_ptr.dtype.element_ty), mask=mask)
    if REBUILD:
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


def streams(*tensors: Tensor) -> tuple[list[Tensor], int, int]:
    """The tensors as [rows, cols] with unit stride in the last dimension: one long row when all are contiguous."""
    if all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors], 1, tensors[0].numel()
    flat = [x.reshape(-1, x.shape[-1]) for x in tensors]
    flat = [x if x.stride(1) == 1 else x.contiguous() for x in flat]
    return flat, flat[0].shape[0], flat[0].shape[1]


def launch_forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel() == 0:
        return out
    (g, u), rows, cols = streams(gate, up)
    blocks = triton.cdiv(cols, BLOCK)
    forward_kernel[(rows * blocks,)](g, u, out, cols, blocks, g.stride(0), u.stride(0), BLOCK=BLOCK, num_warps=WARPS)
    return out


def launch_backward(dout: Tensor, gate: Tensor, up: Tensor, rebuild: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dgate, dup, silu(gate) * up or an empty tensor). rebuild: recompute the activation in the same pass."""
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    out = torch.empty(gate.shape if rebuild else (0,), dtype=gate.dtype, device=gate.device)
    if gate.numel() == 0:
        return dgate, dup, out
    (d, g, u), rows, cols = streams(dout, gate, up)
    blocks = triton.cdiv(cols, BLOCK)
    backward_kernel[(rows * blocks,)](
        d, g, u, dgate, dup, out, cols, blocks, d.stride(0), g.stride(0), u.stride(0),
        REBUILD=rebuild, BLOCK=BLOCK, num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return dgate, dup, out
