"""How well a step uses the device: model FLOPs utilisation (MFU), and memory."""

from __future__ import annotations

import sys

import torch

from eagle_train.planning.gpus import find_gpu


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Peak FLOP/s of the device in bfloat16; None for a CPU, for float32 and for a GPU that is not in the table."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.tflops * 1e12 if gpu is not None else None


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes in use now, and at the peak since the process began: reserved by torch on a GPU, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize(), peak
    except OSError:  # no /proc: macOS
        return peak, peak
