"""torch's memory-efficient attention: the kernel for float32 on GPUs.

Packs of short segments run in one call; where the kernel would keep too much memory for that, dense blocks run instead (`blockwise.py`).
"""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor

from eagle_cp.kernels import blockwise
from eagle_cp.kernels.blockwise import DenseKernel, wide_dtype
from eagle_cp.kernels.kernel import HALF, AddGradients, Kernel, add_rows, capability, dtype_name, needs_cuda_half
from eagle_cp.segments import Segments

LSE_ALIGNMENT = 32  # rows; the kernel's log-sum-exps are padded to a multiple of it
NO_MASK, TOP_LEFT, BOTTOM_RIGHT = 0, 1, 2  # torch's numbers
MOST_SEGMENTS = (1 << 16) - 1  # they are the third dimension of a grid
MOST_ELEMENTS = (1 << 31) - 1  # strides have 32 bits
PADDED_MIB = 64  # that a packed call may keep in all, where that is more than twice the size of its inputs


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool) -> str | None:
    if device.type != "cuda":
        return f"needs CUDA tensors, got {device.type}"
    if dtype not in (torch.float32, *HALF):
        return f"takes float32, bfloat16 or float16, not {dtype_name(dtype)}"
    if dtype == torch.bfloat16 and capability(device.index)[0] < 8:
        return needs_cuda_half(device, dtype, 8, "for bfloat16")
    step = 4 if dtype == torch.float32 else 8
    return f"head dim {head_dim} is not a multiple of {step}" if head_dim % step else None


def _dense_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[:, :, : q.shape[2]]


def _dense_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % LSE_ALIGNMENT), value=torch.inf)  # e^-inf: padding rows add nothing
    seed = _no_seed(q.device)
    grads = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, lse, seed, seed, 0.0, [True, True, True, False], causal, scale=scale
    )
    return grads[:3]


DENSE = DenseKernel(_dense_forward, _dense_backward, same_shapes=False, grouped=False, max_rows=1 << 16)


def _no_seed(device: torch.device) -> Tensor:
    """Of dropout, which is off."""
    return torch.empty((), dtype=torch.int64, device=device)


def is_packed(segments: Segments, heads: int, dim: int) -> bool:
    """Whether one call takes all segments. Its backward keeps a float32 row of each head for every row that a segment would have if all
    were as long as the longest."""
    rows = len(segments) * max(segments.max_q, segments.max_k)
    total = max(segments.total_q, segments.total_k)
    small = rows <= 2 * total or rows * heads * dim * 4 <= PADDED_MIB << 20
    return small and len(segments) <= MOST_SEGMENTS and total * heads * dim <= MOST_ELEMENTS


def _places(segments: Segments, device: torch.device) -> tuple[Tensor, int]:
    """Where the log-sum-exp of each query is in `[segments * length]`, and that length."""
    length = -(-segments.max_q // LSE_ALIGNMENT) * LSE_ALIGNMENT
    key = ("places", device)
    if key not in segments.cache:
        skipped = torch.tensor([i * length - first for i, first in enumerate(segments.cu_q[:-1])])
        places = torch.arange(segments.total_q) + skipped.repeat_interleave(torch.tensor(segments.lengths_q))
        segments.cache[key] = places.to(device, non_blocking=True)
    return segments.cache[key], length


def _mask(segments: Segments, causal: bool) -> int:
    if not causal:
        return NO_MASK
    return TOP_LEFT if segments.cu_q == segments.cu_k else BOTTOM_RIGHT


def _packed_forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, mask: int, scale: float) -> tuple[Tensor, Tensor]:
    """`out: [Tq, H, D]` and `lse: [segments, H, length]`, of as many key heads as query heads."""
    lengths = *segments.on(q.device), segments.max_q, segments.max_k
    out, lse, *_ = torch.ops.aten._efficient_attention_forward(q[None], k[None], v[None], None, *lengths, 0.0, mask, True, scale=scale)
    return out[0], lse


def _packed_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, mask: int, scale: float
) -> list[Tensor]:
    """dq, dk and dv."""
    lengths = *segments.on(q.device), segments.max_q, segments.max_k
    tensors, seed = [x[None] for x in (dout.contiguous(), q, k, v)], _no_seed(q.device)
    grads = torch.ops.aten._efficient_attention_backward(
        *tensors, None, out.contiguous()[None], *lengths, lse, 0.0, seed, seed, mask, False, scale=scale
    )
    return [grad[0] for grad in grads[:3]]


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Segments, causal: bool, scale: float, out: Tensor) -> Tensor:
    heads, dim = q.shape[1:]
    if not is_packed(segments, heads, dim):
        return blockwise.blockwise_forward(DENSE, q, k, v, segments, causal, scale, out)
    result, lse = _packed_forward(q, _repeated(k, heads), _repeated(v, heads), segments, _mask(segments, causal), scale)
    out.copy_(result)
    places, _ = _places(segments, q.device)
    return lse.transpose(0, 1).flatten(1).index_select(1, places)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, causal: bool, scale: float,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    heads, dim = q.shape[1:]
    if not is_packed(segments, heads, dim):
        return blockwise.blockwise_backward(DENSE, dout, q, k, v, out, lse, segments, causal, scale, dq, dk, dv)
    places, length = _places(segments, q.device)
    padded = lse.new_full((heads, len(segments) * length), torch.inf).index_copy_(1, places, lse)
    padded = padded.view(heads, len(segments), length).transpose(0, 1).contiguous()
    k, v = _repeated(k, heads), _repeated(v, heads)
    for target, grad in zip((dq, dk, dv), _packed_backward(dout, q, k, v, out, padded, segments, _mask(segments, causal), scale)):
        if target.shape[1] < heads:  # as between dense blocks: query heads that share a key head are added in float32
            grouped = cast(Tensor, grad.unflatten(1, (target.shape[1], -1)))  # pyright: ignore[reportUnknownMemberType]
            grad = grouped.sum(2, dtype=wide_dtype(grad.dtype))
        target.copy_(grad)


def backward_wide(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments, causal: bool, scale: float, dq: Tensor
) -> AddGradients:
    if not is_packed(segments, *q.shape[1:]):
        return blockwise.blockwise_backward_wide(DENSE, dout, q, k, v, out, lse, segments, causal, scale, dq)
    dk, dv = (torch.empty(x.shape, dtype=wide_dtype(x.dtype), device=x.device) for x in (k, v))
    backward(dout, q, k, v, out, lse, segments, causal, scale, dq, dk, dv)
    return functools.partial(add_rows, (dk, dv))


def _repeated(x: Tensor, heads: int) -> Tensor:
    """One head for each query head: the kernel knows no groups."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


KERNEL = Kernel("torch-efficient", forward, backward, backward_wide, unsupported)
