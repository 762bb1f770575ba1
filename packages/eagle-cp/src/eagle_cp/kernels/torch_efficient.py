"""torch's memory-efficient attention, through dense blocks: the kernel for float32 on GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from eagle_cp.kernels.blockwise import DenseKernel, blockwise_kernel
from eagle_cp.kernels.kernel import HALF, capability, dtype_name, needs_cuda_half

LSE_ALIGNMENT = 32  # rows; the kernel's log-sum-exps are padded to a multiple of it


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool) -> str | None:
    if device.type != "cuda":
        return f"needs CUDA tensors, got {device.type}"
    if dtype not in (torch.float32, *HALF):
        return f"takes float32, bfloat16 or float16, not {dtype_name(dtype)}"
    if dtype == torch.bfloat16 and capability(device.index)[0] < 8:
        return needs_cuda_half(device, dtype, 8, "for bfloat16")
    step = 4 if dtype == torch.float32 else 8
    return f"head dim {head_dim} is not a multiple of {step}" if head_dim % step else None


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[:, :, : q.shape[2]]


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # of dropout, which is off
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % LSE_ALIGNMENT), value=torch.inf)  # e^-inf: padding rows add nothing
    grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, lse, seed, seed, 0.0, [True, True, True, False], causal, scale=scale
    )
    return grads[:3]


DENSE = DenseKernel(_forward, _backward, same_shapes=False, grouped=False, max_rows=1 << 16)
KERNEL = blockwise_kernel("torch-efficient", DENSE, unsupported)
