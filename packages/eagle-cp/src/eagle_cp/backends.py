"""The attention kernels that exist, and the choice between them.

To add a kernel: write one file in `eagle_cp/kernels/` that defines `KERNEL` (a `Kernel`: forward, two backwards, and `unsupported`, which
says where it can't run), and add one row to `KERNELS` below. `attention(..., backend=name)`, the automatic choice, the message about
kernels that can't run and the tests on GPUs (`tests/cp/test_gpu.py`, for every row) follow from the row. A kernel that only takes dense
blocks `[B, H, L, D]` gets its packing from `kernels/blockwise.py`; `kernels/cpu.py` is an example of 40 lines.
"""

from __future__ import annotations

import functools
import logging

import torch

from eagle_cp.kernels import cpu, cudnn, flash_attn_2, flash_attn_4, torch_efficient, torch_flash
from eagle_cp.kernels.blockwise import count_calls
from eagle_cp.kernels.kernel import Kernel, dtype_name
from eagle_cp.segments import Segments

log = logging.getLogger("eagle_cp")

# In order of speed for packs. cuDNN goes before FlashAttention-2 where its blocks are big (`choose`).
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        flash_attn_4.KERNEL,
        torch_flash.KERNEL,
        cudnn.KERNEL,
        flash_attn_2.KERNEL,
        torch_efficient.KERNEL,
        cpu.KERNEL,
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
    """The fastest kernel that can run, or the kernel named `backend`.

    `segments`: what will be computed; long segments change the order of speed. Raises ValueError for an unknown name, and with the reason
    of every kernel when none can run."""
    if backend is not None:
        if backend not in KERNELS:
            raise ValueError(f"attention: no backend {backend!r}; known: {', '.join(KERNELS)}")
        reason = KERNELS[backend].unsupported(device, dtype, head_dim, causal)
        if reason:
            raise ValueError(f"attention: backend {backend!r} can't run: {reason}")
        return KERNELS[backend]
    long = segments is not None and _is_long(segments, causal)
    kernel, reasons = _fastest(device, dtype, head_dim, causal, long, torch.are_deterministic_algorithms_enabled())
    if kernel is None:
        raise ValueError(f"attention: no kernel for {dtype_name(dtype)}, head dim {head_dim} on {device.type}. {reasons}")
    return kernel


def _is_long(segments: Segments, causal: bool) -> bool:
    key = ("long", causal)
    if key not in segments.cache:  # needed in every layer
        segments.cache[key] = segments.pairs(causal) >= PAIRS_PER_CALL * max(1, count_calls(segments, causal, cudnn.DENSE))
    return segments.cache[key]


@functools.cache
def _fastest(
    device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool, long: bool, deterministic: bool
) -> tuple[Kernel | None, str]:
    names = list(KERNELS)
    if long:
        names.insert(names.index("torch-flash"), names.pop(names.index("cudnn")))
    reasons: list[str] = []
    for name in names:
        reason = KERNELS[name].unsupported(device, dtype, head_dim, causal)
        if reason is None:
            skipped = f" ({'; '.join(reasons)})" if reasons else ""
            log.info("attention on %s in %s, %s segments: %s%s", device, dtype, "long" if long else "short", name, skipped)
            return KERNELS[name], "; ".join(reasons)
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons)
