"""Matrix products whose result accumulates in float32 for every dtype of the operands. Weight gradients are made of them."""

import torch
from torch import Tensor

from eagle_kernels.dispatch import register

SLICE_ROWS = 8192  # bounds the temporary of the CPU path to 8192 rows of the result


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over values of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _accumulate_(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=0.0 if first else 1.0, out=out)
    elif out.is_cuda:
        if first:
            torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        else:
            torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        # CPU matmuls have no result wider than their operands. Products of low-precision values are exact in float32, so wider operands
        # give the same sums.
        wide = b.to(out.dtype)
        for start in range(0, out.shape[0], SLICE_ROWS):
            part = a[start : start + SLICE_ROWS].to(out.dtype) @ wide
            if first:
                out[start : start + SLICE_ROWS] = part
            else:
                out[start : start + SLICE_ROWS] += part


# A registered operator, because torch 2.11 cannot trace matmuls whose result is wider than their operands.
register("accumulate_(Tensor(a!) out, Tensor a, Tensor b, bool first) -> ()", _accumulate_, lambda out, a, b, first: None)


def accumulate_(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """`out = a @ b` (first) or `out += a @ b`. out: [M, N] float32 (or a's dtype), a: [M, K], b: [K, N]. No temporary on CUDA."""
    torch.ops.eagle_kernels.accumulate_(out, a, b, first)


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` as float32 (float64 for float64). a: [M, K], b: [K, N] -> [M, N].

    For a long inner dimension (a vocabulary) cuBLAS splits the product and adds the parts in the result's dtype: in bf16 this loses more
    accuracy than all other steps of linear cross-entropy.
    """
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.ops.aten.mm.dtype(a, b, torch.float32)
    return a @ b
