"""How a figure is made: interleaved rounds, CUDA events, medians, and the two ceilings of the machine measured in the same process."""

import statistics
import time
from collections.abc import Callable

import torch

CYCLES_PER_MS = 2_000_000


def batch_ms(function: Callable[[], object], calls: int, head_start_ms: float = 1.0) -> float:
    """Mean milliseconds of `calls` calls, back to back. The GPU waits for `head_start_ms` first, so that the CPU is ahead of it."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(head_start_ms * CYCLES_PER_MS))
    start.record()
    for _ in range(calls):
        function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / calls


def interleaved_ms(contenders: dict[str, Callable[[], object]], rounds: int = 9, batch: float = 10.0, most: int = 50) -> dict[str, float]:
    """Median milliseconds of each contender: `rounds` rounds in which everyone runs a batch of about `batch` ms in turn.

    What the CPU needs to launch a batch is measured and given as a head start: a backward of 0.2 ms takes 0.3 ms to launch on a slow day.
    """
    calls, head_start = {}, {}
    for name, function in contenders.items():
        function()
        once = batch_ms(function, 2)
        calls[name] = max(1, min(most, int(batch / once)))
        torch.cuda.synchronize()
        torch.cuda._sleep(100 * CYCLES_PER_MS)
        begin = time.perf_counter()
        for _ in range(min(5, calls[name])):
            function()
        host_ms = (time.perf_counter() - begin) * 1e3 / min(5, calls[name])
        torch.cuda.synchronize()
        # A function that waits for the device shows the whole wait here; no head start can help it.
        head_start[name] = min(30.0, 1.0 + 1.3 * host_ms * calls[name])
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            times[name].append(batch_ms(function, calls[name], head_start[name]))
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
