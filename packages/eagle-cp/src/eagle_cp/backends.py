"""Which kernel computes the attention of one rank: one small interface, one place that chooses, and a way to ask.

A `Kernel` is two functions over `Segments`. `forward(q, k, v, segments, causal, scale)` gives `out: [Tq, Hq, D]` and `lse: [Hq, Tq]` (fp32, or fp64 for
fp64); `backward(dout, q, k, v, out, lse, segments, causal, scale)` gives `dq` and `dk`, `dv` (either in the input dtype or wider).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from eagle_cp.blockwise import blockwise_backward, blockwise_forward, cpu_backward, cpu_forward
from eagle_cp.segments import Segments

Forward = Callable[..., tuple[torch.Tensor, torch.Tensor]]
Backward = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Kernel:
    """`why_not(device, dtype, head_dim)` says why this kernel can't run there, or None."""

    name: str
    forward: Forward
    backward: Backward
    why_not: Callable[[torch.device, torch.dtype, int], str | None]


def _cpu_forward(q, k, v, segments: Segments, causal: bool, scale: float):
    return blockwise_forward(cpu_forward, q, k, v, segments, causal, scale)


def _cpu_backward(dout, q, k, v, out, lse, segments: Segments, causal: bool, scale: float):
    return blockwise_backward(cpu_backward, dout, q, k, v, out, lse, segments, causal, scale)


def _cpu_why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cpu":
        return f"tensors are on {device}, this kernel runs on cpu"
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return f"no kernel for {dtype}"
    return None


KERNELS: dict[str, Kernel] = {"cpu": Kernel("cpu", _cpu_forward, _cpu_backward, _cpu_why_not)}


def choose(device: torch.device, dtype: torch.dtype, head_dim: int, backend: str | None = None) -> Kernel:
    """The first kernel, in order of speed, that can run; or `backend` by name. Raises ValueError with every reason when none can."""
    if backend is not None:
        if backend not in KERNELS:
            raise ValueError(f"attention: no backend {backend!r}; known: {', '.join(KERNELS)}")
        reason = KERNELS[backend].why_not(device, dtype, head_dim)
        if reason:
            raise ValueError(f"attention: backend {backend!r} can't run: {reason}")
        return KERNELS[backend]
    reasons = []
    for kernel in KERNELS.values():
        reason = kernel.why_not(device, dtype, head_dim)
        if reason is None:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise ValueError(f"attention: no kernel for {dtype}, head dim {head_dim} on {device}. " + "; ".join(reasons))
