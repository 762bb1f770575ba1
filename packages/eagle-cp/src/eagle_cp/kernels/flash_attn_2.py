"""FlashAttention-2 of the package flash-attn 2, on packed segments. It masks causally at the bottom right."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from eagle_cp.kernels import torch_flash
from eagle_cp.kernels.kernel import Kernel, find, rounded_gradients
from eagle_cp.segments import Segments


def interface() -> Any:
    """The package's module with its packed kernels, or None."""
    return find("flash_attn.flash_attn_interface", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward")


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool) -> str | None:
    reason = torch_flash.unsupported(device, dtype, head_dim, causal)
    if reason is None and interface() is None:
        reason = "flash-attn 2 is not installed (pip install 'eagle-cp[flash-attn]')"
    return reason


def _lengths(segments: Segments, device: torch.device) -> dict[str, Tensor | int]:
    cu_q, cu_k = segments.on(device)
    return {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": segments.max_q, "max_seqlen_k": segments.max_k}


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float, out: Tensor) -> Tensor:
    result, lse, *_ = interface()._flash_attn_varlen_forward(
        q, k, v, dropout_p=0.0, softmax_scale=scale, causal=causal, **_lengths(segments, q.device)
    )
    out.copy_(result)
    return lse


@torch_flash.in_groups_of_heads
def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, causal: bool, scale: float,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    interface()._flash_attn_varlen_backward(
        dout.contiguous(), q, k, v, out.contiguous(), lse, dq, dk, dv,
        dropout_p=0.0, softmax_scale=scale, causal=causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(), **_lengths(segments, q.device),
    )  # fmt: skip


KERNEL = Kernel("flash-attn", forward, backward, functools.partial(rounded_gradients, backward), unsupported)
