"""FlashAttention-2 inside torch, on packed segments. It masks causally at the bottom right."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from eagle_cp.kernels.kernel import AddGradients, Backward, Kernel, add_rows, needs_cuda_half
from eagle_cp.segments import Segments


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool) -> str | None:
    reason = needs_cuda_half(device, dtype, 8, "for FlashAttention-2")
    if reason is None and (head_dim % 8 or head_dim > 256):
        reason = f"head dim {head_dim} is not a multiple of 8 up to 256"
    return reason


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float, out: Tensor) -> Tensor:
    cu_q, cu_k = segments.on(q.device)
    result, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, segments.max_q, segments.max_k, 0.0, causal, False, scale=scale
    )
    out.copy_(result)
    return lse


MOST_ELEMENTS = 1 << 31
"""Of the kernel's float32 sum of dq, `[Tq + 128 n, H, D]` with D rounded up: it finds them with 32 bits. One H200 reported an illegal
memory access for 1054720 tokens of 28 heads of 128."""


def in_groups_of_heads(backward: Backward) -> Backward:
    """`backward` of FlashAttention 2, as often as `MOST_ELEMENTS` needs, each time for some of the heads.

    Raises ValueError where one key head with its query heads has more.
    """

    @functools.wraps(backward)
    def grouped(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, causal: bool, scale: float,
        dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> None:  # fmt: skip
        group, step = q.shape[1] // k.shape[1], 32 if q.shape[2] <= 128 else 64
        each = (q.shape[0] + 128 * len(segments)) * group * (-(-q.shape[2] // step) * step)
        if each > MOST_ELEMENTS:
            raise ValueError(
                f"attention: FlashAttention 2 can't compute the gradients of {q.shape[0]} tokens with {group} query heads of {q.shape[2]} "
                f"for each key head: its sum of them has {each} elements, and at most {MOST_ELEMENTS} are possible; use another backend, "
                "or more ranks"
            )
        count = MOST_ELEMENTS // each
        if count >= k.shape[1]:
            return backward(dout, q, k, v, out, lse, segments, causal, scale, dq, dk, dv)
        for first in range(0, k.shape[1], count):
            some = slice(first, first + count)
            heads = slice(first * group, (first + count) * group)
            given = dout[:, heads], q[:, heads], k[:, some], v[:, some], out[:, heads], lse[heads], segments, causal, scale
            backward(*given, dq[:, heads], dk[:, some], dv[:, some])

    return grouped


@in_groups_of_heads
def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, causal: bool, scale: float,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    cu_q, cu_k = segments.on(q.device)
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, which is off
    grads = torch.ops.aten._flash_attention_backward(
        dout.contiguous(), q, k, v, out.contiguous(), lse, cu_q, cu_k, segments.max_q, segments.max_k, 0.0, causal, seed, seed, scale=scale
    )
    for x, grad in zip((dq, dk, dv), grads):
        x.copy_(grad)


def backward_wide(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, causal: bool, scale: float, dq: Tensor
) -> AddGradients:
    """One key/value head at a time, expanded to its query heads without a copy. The kernel rounds the gradient of each query head, as it
    always does, but not the sum over query heads."""
    group, parts = q.shape[1] // k.shape[1], [torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (k, v)]
    for h in range(k.shape[1]):
        heads = slice(h * group, (h + 1) * group)
        kh, vh = (x[:, h : h + 1].expand(-1, group, -1) for x in (k, v))
        dk, dv = (torch.empty(kh.shape, dtype=k.dtype, device=k.device) for _ in "kv")
        backward(dout[:, heads], q[:, heads], kh, vh, out[:, heads], lse[heads], segments, causal, scale, dq[:, heads], dk, dv)
        for part, grad in zip(parts, (dk, dv)):
            torch.sum(grad, 1, dtype=torch.float32, out=part[:, h])
    return functools.partial(add_rows, parts)


KERNEL = Kernel("torch-flash", forward, backward, backward_wide, unsupported)
