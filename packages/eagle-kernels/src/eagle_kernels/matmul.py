"""Matrix products whose result accumulates in float32, whatever the operands: what exact weight gradients are made of."""

import torch
from torch import Tensor

from eagle_kernels.registry import register

SLICE_ROWS = 8192  # of the fallback: bounds its temporary to 8192 rows of the result


def _accumulate_(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=0.0 if first else 1.0, out=out)
    elif out.is_cuda:
        if first:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        else:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        # CPU matmuls have no mixed result; low-precision products are exact in float32, so widening the operands gives the same sums.
        wide = b.to(out.dtype)
        for start in range(0, out.shape[0], SLICE_ROWS):
            part = a[start : start + SLICE_ROWS].to(out.dtype) @ wide
            if first:
                out[start : start + SLICE_ROWS] = part
            else:
                out[start : start + SLICE_ROWS] += part


# An operator of its own, because torch 2.11 can't trace the matmuls whose result is wider than their operands.
register("accumulate_(Tensor(a!) out, Tensor a, Tensor b, bool first) -> ()", _accumulate_, lambda out, a, b, first: None)


def accumulate_(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """`out = a @ b` (first) or `out += a @ b`. out: [M, N] float32 (or a's dtype), a: [M, K], b: [K, N]; no temporary on CUDA."""
    torch.ops.eagle_kernels.accumulate_(out, a, b, first)


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` as float32 (float64 for float64). A long inner dimension (a vocabulary) makes cuBLAS split it and add the parts in the
    result's dtype: in bf16 that costs more accuracy than everything else in the operator."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.ops.aten.mm.dtype(a, b, torch.float32)
    return a @ b


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which `weight` wants its gradient: `weight.grad_dtype` where the caller set one (torch >= 2.11), else its own."""
    if torch.compiler.is_compiling() or not weight.is_leaf:
        return weight.dtype
    return getattr(weight, "grad_dtype", None) or weight.dtype
