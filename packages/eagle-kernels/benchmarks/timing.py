"""How a figure is made: interleaved rounds, CUDA events, medians, and the two ceilings of the machine measured in the same process."""

import statistics
from collections.abc import Callable

import torch

# Before every timed batch the GPU waits this long (at about 1.9 GHz: 1 ms), so that the CPU is ahead and launches don't show.
HEAD_START_CYCLES = 2_000_000


def batch_ms(function: Callable[[], object], calls: int) -> float:
    """Mean milliseconds of `calls` calls, back to back."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    for _ in range(calls):
        function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / calls


def interleaved_ms(contenders: dict[str, Callable[[], object]], rounds: int = 9, batch: float = 10.0, most: int = 50) -> dict[str, float]:
    """Median milliseconds of each contender: `rounds` rounds in which everyone runs a batch of about `batch` ms in turn."""
    calls = {}
    for name, function in contenders.items():
        function()
        once = batch_ms(function, 2)
        calls[name] = max(1, min(most, int(batch / once)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            times[name].append(batch_ms(function, calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(gib: float = 4.0) -> float:
    """Bytes read plus written per second by a device-to-device copy."""
    source = torch.randn(int(gib * 2**28), device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / interleaved_ms({"copy": lambda: target.copy_(source)}, batch=20.0)["copy"] * 1e3


def matmul(size: int = 8192) -> tuple[Callable[[], object], float]:
    """(a square bf16 product on random data, its operations)."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * size**3


def peak_extra_bytes(function: Callable[[], object]) -> int:
    """Most memory that one call holds beyond what was held before it; what it returns counts."""
    function()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del out
    return peak
