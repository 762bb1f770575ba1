"""Peak rates and memory of GPUs by name, for MFU and for predictions before one is rented. Dense bf16 by the makers' data sheets."""

from __future__ import annotations

import re
from typing import NamedTuple

CONTEXT_GIB = 0.5
"""Memory of the CUDA context and of libraries' workspaces, which plans leave out."""
FRAGMENTATION = 1.08
"""Reserved over allocated memory, at least: what does not fit with this factor is refused, and not kept."""


class Gpu(NamedTuple):
    """name: of the model. tflops: dense bf16 with float32 sums, in 10^12 FLOP/s. gib: memory that a program can allocate, in GiB.
    capability: CUDA's compute capability."""

    name: str
    tflops: float
    gib: float
    capability: tuple[int, int]


GPUS: tuple[Gpu, ...] = (
    Gpu("B300", 2250.0, 268.0, (10, 3)),
    Gpu("B200", 2250.0, 178.0, (10, 0)),
    Gpu("GH200", 989.4, 94.5, (9, 0)),
    Gpu("H200", 989.4, 139.8, (9, 0)),
    Gpu("H100 NVL", 835.0, 93.1, (9, 0)),
    Gpu("H100 PCIe", 756.0, 79.1, (9, 0)),
    Gpu("H100", 989.4, 79.1, (9, 0)),
    Gpu("H800", 989.4, 79.1, (9, 0)),
    Gpu("H20", 148.0, 95.0, (9, 0)),
    Gpu("A100 40GB", 312.0, 39.4, (8, 0)),
    Gpu("A100", 312.0, 79.1, (8, 0)),
    Gpu("A800", 312.0, 79.1, (8, 0)),
    Gpu("L40S", 362.0, 44.4, (8, 9)),
    Gpu("L40", 181.0, 44.4, (8, 9)),
    Gpu("L4", 121.0, 22.0, (8, 9)),
    Gpu("A40", 149.7, 44.4, (8, 6)),
    Gpu("A10", 125.0, 22.0, (8, 6)),
    Gpu("RTX 6000 Ada", 364.0, 47.4, (8, 9)),
    Gpu("RTX A6000", 154.8, 47.4, (8, 6)),
    Gpu("RTX 5090", 209.5, 31.3, (12, 0)),
    Gpu("RTX 4090", 165.2, 23.6, (8, 9)),
    Gpu("RTX 3090", 71.0, 23.6, (8, 6)),
)
"""More special names come before those that they contain."""


def find_gpu(name: str) -> Gpu | None:
    """The row of a GPU as a driver or a user names it (`NVIDIA H100 80GB HBM3`, `h200`); None when it is not in the table."""
    words = re.sub(r"[^A-Z0-9]+", " ", name.upper()).split()
    for gpu in GPUS:
        if all(part in words for part in gpu.name.upper().split()):
            return gpu
    return None


def largest_plan(gib: float) -> float:
    """The largest plan, in GiB, that runs on a GPU of which `gib` GiB are free."""
    return (gib - CONTEXT_GIB) / FRAGMENTATION
