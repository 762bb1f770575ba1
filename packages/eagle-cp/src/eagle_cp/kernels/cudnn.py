"""cuDNN's attention as torch calls it, through dense blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from eagle_cp.kernels.blockwise import DenseKernel, blockwise_kernel
from eagle_cp.kernels.kernel import needs_cuda_half


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool) -> str | None:
    reason = needs_cuda_half(device, dtype, 8, "for its flash kernels")
    if reason is None and (head_dim % 8 or head_dim > 128):
        reason = f"head dim {head_dim} is not a multiple of 8 up to 128"
    if reason is None and not torch.backends.cudnn.is_available():
        reason = "this torch has no cuDNN"
    if reason is None and torch.are_deterministic_algorithms_enabled():
        reason = "its backward is not deterministic, which torch.use_deterministic_algorithms requires"
    if reason is None and not causal:
        reason = "without a causal mask lengths can't be padded, and cuDNN would build an execution plan for every length"
    return reason


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse.reshape(lse.shape[:3])


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # of dropout, which is off
    lse = lse.unsqueeze(-1)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, seed, seed, None, None, None, q.shape[2], k.shape[2], 0.0, causal, scale=scale
    )


DENSE = DenseKernel(_forward, _backward, same_shapes=True, grouped=True, max_rows=1 << 17)
KERNEL = blockwise_kernel("cudnn", DENSE, unsupported)
