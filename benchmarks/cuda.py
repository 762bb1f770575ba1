"""Timing with CUDA events, peak memory of a call, and the ceilings of the GPU, all measured in the same process."""

import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.timing import Samples, medians

CYCLES_PER_MS = 2_000_000


def batch_ms(function: Callable[[], object], calls: int, head_start_ms: float = 1.0) -> float:
    """Mean milliseconds of `calls` calls, back to back. The GPU sleeps for `head_start_ms` first, so that launches are queued."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(head_start_ms * CYCLES_PER_MS))
    start.record()
    for _ in range(calls):
        function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / calls


def interleaved_ms(contenders: Mapping[str, Callable[[], object]], rounds: int = 9, batch: float = 10.0, most: int = 50) -> Samples:
    """Milliseconds per call of each contender in each round: a batch of about `batch` ms and at most `most` calls, contenders in turn.

    The time that the CPU needs to launch a batch is measured, and the GPU sleeps for it first: launching a backward of 0.2 ms can take 0.3.
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
        # For a function that waits for the device, host_ms includes the wait; the limit keeps the sleep short.
        head_start[name] = min(30.0, 1.0 + 1.3 * host_ms * calls[name])
    samples: Samples = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            samples[name].append(batch_ms(function, calls[name], head_start[name]))
    return samples


def peak_extra_bytes(function: Callable[[], object]) -> int:
    """Peak memory during one call beyond the memory allocated before it, including its results."""
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


def copy_bandwidth(gib: float = 4.0) -> float:
    """Bytes read plus bytes written per second by a copy of `gib` GiB on the device."""
    source = torch.randn(int(gib * 2**28), device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / medians(interleaved_ms({"copy": lambda: target.copy_(source)}, batch=20.0))["copy"] * 1e3


def matmul(size: int = 8192) -> tuple[Callable[[], object], float]:
    """(a product of two random bf16 matrices of size x size, its number of operations)."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * size**3


def ceilings() -> dict[str, float]:
    """Copy bandwidth in TB/s and rate of bf16 matmuls of 8192^3 in TFLOP/s, measured now."""
    product, operations = matmul()
    rate = operations / medians(interleaved_ms({"matmul": product}, batch=40.0))["matmul"] * 1e3
    return {"copy_tb_per_s": copy_bandwidth() / 1e12, "matmul_tflops": rate / 1e12}
