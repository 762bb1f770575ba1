"""Runs that are repeated bit for bit on a GPU: sums are computed in one order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch.utils import deterministic as settings


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Torch's deterministic algorithms, if `wanted`; attention kernels follow them, and operators that can't raise RuntimeError."""
    if not wanted:
        yield
        return
    # cuBLAS is deterministic only with this setting, which it reads before its first matmul.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, filling = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # finds bugs, but costs bandwidth
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
