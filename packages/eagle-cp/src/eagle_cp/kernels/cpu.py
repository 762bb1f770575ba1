"""torch's flash kernel for CPUs, through dense blocks. Half precision is computed in float32: most CPUs run that faster too, and blocks
are then merged before they are rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from eagle_cp.kernels.blockwise import DenseKernel, blockwise_kernel, wide_dtype
from eagle_cp.kernels.kernel import HALF, dtype_name


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool) -> str | None:
    if device.type != "cpu":
        return f"needs CPU tensors, got {device.type}"
    if dtype not in (torch.float64, torch.float32, *HALF):
        return f"takes float64, float32, bfloat16 or float16, not {dtype_name(dtype)}"
    return None


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x.to(wide_dtype(x.dtype)) for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # A padded query row has lse 0, out 0 and dout 0, and adds nothing.
    dout, q, k, v, out = (x.to(wide_dtype(x.dtype)) for x in (dout, q, k, v, out))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)


DENSE = DenseKernel(_forward, _backward, same_shapes=False, grouped=False, max_rows=1 << 16)
KERNEL = blockwise_kernel("cpu", DENSE, unsupported)
