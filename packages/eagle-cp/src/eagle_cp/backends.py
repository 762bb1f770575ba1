"""Which kernel computes the attention of one rank: one small interface, one place that chooses, and a way to ask.

A `Kernel` is functions over `Segments` that write into tensors given to them, which may be strided slices:
`forward(q, k, v, segments, causal, scale, out) -> lse` (`[Hq, Tq]`, fp32, or fp64 for fp64), and
`backward(dout, q, k, v, out, lse, segments, causal, scale, dq, dk, dv)`. For gradients that are summed further there is
`backward_wide(dout, ..., scale, dq) -> add_to`, and `add_to(dk, dv, rows, unique)` adds the gradient of key `i` to row `rows[i]` of wider
tensors (None: row `i`; `unique`: no row twice), if possible before the kernel rounds it.
Under `torch.use_deterministic_algorithms(True)` kernels add in one order, or can't run.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from eagle_cp import fa2, fa4
from eagle_cp.blockwise import CPU, CUDNN, EFFICIENT, Dense, blockwise_backward, blockwise_backward_wide, blockwise_forward, count_calls
from eagle_cp.segments import Segments

log = logging.getLogger("eagle_cp")
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kernel:
    """`why_not(device, dtype, head_dim, causal)` says why this kernel can't run there, or None."""

    name: str
    forward: Callable[..., torch.Tensor]
    backward: Callable[..., None]
    backward_wide: Callable[..., Callable[..., None]]
    why_not: Callable[[torch.device, torch.dtype, int, bool], str | None]


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _cuda_half(device: torch.device, dtype: torch.dtype, capability: int, why: str) -> str | None:
    if device.type != "cuda":
        return f"needs CUDA tensors, got {device.type}"
    if dtype not in HALF:
        return f"takes bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if _capability(device.index)[0] < capability:
        return f"needs compute capability {capability}.0 {why}, this GPU has {'.'.join(map(str, _capability(device.index)))}"
    return None


def _fa4_why_not(device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool) -> str | None:
    reason = _cuda_half(device, dtype, 9, "for its backward")
    if reason is None and (head_dim % 8 or head_dim > 128):
        reason = f"head dim {head_dim} is not a multiple of 8 up to 128"
    if reason is None and fa4.module() is None:
        reason = "flash-attn-4 is not installed (pip install 'eagle-cp[flash-attn-4]')"
    return reason


def _cudnn_why_not(device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool) -> str | None:
    reason = _cuda_half(device, dtype, 8, "for its flash kernels")
    if reason is None and (head_dim % 8 or head_dim > 128):
        reason = f"head dim {head_dim} is not a multiple of 8 up to 128"
    if reason is None and not torch.backends.cudnn.is_available():
        reason = "this torch has no cuDNN"
    if reason is None and torch.are_deterministic_algorithms_enabled():
        reason = "its backward adds in any order, and torch.use_deterministic_algorithms asks for one"
    if reason is None and not causal:
        reason = "without a causal mask lengths can't be padded, and cuDNN would plan anew for every length"
    return reason


def _aten_why_not(device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool) -> str | None:
    reason = _cuda_half(device, dtype, 8, "for FlashAttention-2")
    if reason is None and (head_dim % 8 or head_dim > 256):
        reason = f"head dim {head_dim} is not a multiple of 8 up to 256"
    return reason


def _fa2_why_not(device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool) -> str | None:
    reason = _aten_why_not(device, dtype, head_dim, causal)
    if reason is None and fa2.fa2_module() is None:
        reason = "flash-attn 2 is not installed (pip install 'eagle-cp[flash-attn]')"
    return reason


def _efficient_why_not(device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool) -> str | None:
    if device.type != "cuda":
        return f"needs CUDA tensors, got {device.type}"
    if dtype not in (torch.float32, *HALF):
        return f"takes float32, bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16 and _capability(device.index)[0] < 8:
        return _cuda_half(device, dtype, 8, "for bfloat16")
    step = 4 if dtype == torch.float32 else 8
    return f"head dim {head_dim} is not a multiple of {step}" if head_dim % step else None


def _cpu_why_not(device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool) -> str | None:
    if device.type != "cpu":
        return f"needs CPU tensors, got {device.type}"
    if dtype not in (torch.float64, torch.float32, *HALF):
        return f"takes float64, float32, bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    return None


def _dense(name: str, dense: Dense, why_not: Callable[[torch.device, torch.dtype, int, bool], str | None]) -> Kernel:
    return Kernel(
        name,
        functools.partial(blockwise_forward, dense),
        functools.partial(blockwise_backward, dense),
        functools.partial(blockwise_backward_wide, dense),
        why_not,
    )


# In order of speed for packs; cuDNN goes before FlashAttention-2 where its blocks are big (`choose`).
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel("flash-attn-4", fa4.forward, fa4.backward, fa4.backward_wide, _fa4_why_not),
        Kernel("torch-flash", fa2.aten_forward, fa2.aten_backward, fa2.aten_backward_wide, _aten_why_not),
        _dense("cudnn", CUDNN, _cudnn_why_not),
        Kernel("flash-attn", fa2.fa2_forward, fa2.fa2_backward, fa2.fa2_backward_wide, _fa2_why_not),
        _dense("torch-efficient", EFFICIENT, _efficient_why_not),
        _dense("cpu", CPU, _cpu_why_not),
    )
}
# Attended pairs per dense call, one head, from which cuDNN's blocks beat FlashAttention-2 on packed segments. On H200: 32 documents of
# 4096 (one call of 268M pairs) 401 against 284 TFLOP/s; a log-normal pack (17M a call) 361 against 299; below 10M not measured.
PAIRS_PER_CALL = 10_000_000


def choose(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    causal: bool = True,
    backend: str | None = None,
    segments: Segments | None = None,
) -> Kernel:
    """The fastest kernel that can run, or `backend` by name. Raises ValueError with every kernel's reason when none can."""
    if backend is not None:
        if backend not in KERNELS:
            raise ValueError(f"attention: no backend {backend!r}; known: {', '.join(KERNELS)}")
        reason = KERNELS[backend].why_not(device, dtype, head_dim, causal)
        if reason:
            raise ValueError(f"attention: backend {backend!r} can't run: {reason}")
        return KERNELS[backend]
    long = segments is not None and _is_long(segments, causal)
    kernel, reasons = _fastest(device, dtype, head_dim, causal, long, torch.are_deterministic_algorithms_enabled())
    if kernel is None:
        raise ValueError(f"attention: no kernel for {str(dtype).removeprefix('torch.')}, head dim {head_dim} on {device.type}. {reasons}")
    return kernel


def _is_long(segments: Segments, causal: bool) -> bool:
    key = ("long", causal)
    if key not in segments.cache:  # asked for in every layer
        segments.cache[key] = segments.pairs(causal) >= PAIRS_PER_CALL * max(1, count_calls(segments, causal, CUDNN))
    return segments.cache[key]


@functools.cache
def _fastest(
    device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool, long: bool, deterministic: bool
) -> tuple[Kernel | None, str]:
    names = list(KERNELS)
    if long:
        names.insert(names.index("torch-flash"), names.pop(names.index("cudnn")))
    reasons = []
    for name in names:
        reason = KERNELS[name].why_not(device, dtype, head_dim, causal)
        if reason is None:
            said = f" ({'; '.join(reasons)})" if reasons else ""
            log.info("attention on %s in %s, %s segments: %s%s", device, dtype, "long" if long else "short", name, said)
            return KERNELS[name], "; ".join(reasons)
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons)
