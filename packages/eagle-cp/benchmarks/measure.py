"""Timing of one attention layer over ranks: CUDA events and NCCL, or wall clock and gloo on a CPU; the slowest rank counts."""

from __future__ import annotations

import datetime
import os
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.results import Metric

METRICS = {
    "forward_ms": Metric("ms", "lower"),
    "both_ms": Metric("ms", "lower"),
    "forward_tflops": Metric("per GPU", "higher"),
    "backward_tflops": Metric("per GPU", "higher"),
    "both_tflops": Metric("per GPU", "higher"),
    "peak_gib": Metric("GiB", "lower"),
    "needed_gib": Metric("GiB", "none"),
    "peak_over_needed": Metric("", "lower"),
}


class Shape(NamedTuple):
    """Of the tensors: query heads, key/value heads, head dim, type, and where they are."""

    heads: int = 28
    kv_heads: int = 4
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    def inputs(self, *before: int, axis: int = -2, kv_heads: int | None = None) -> list[torch.Tensor]:
        """Random q, k, v that learn: sizes `before` and the head dim, with the heads at `axis` (-2 or -3)."""
        made = []
        for heads in (self.heads, *[kv_heads or self.kv_heads] * 2):
            sizes = [*before, heads, self.dim] if axis == -2 else [*before[:-1], heads, before[-1], self.dim]
            made.append(torch.randn(sizes, device=self.device, dtype=self.dtype).requires_grad_())
        return made


class Unavailable(Exception):
    """A contender does not take such a pack, or not on so many ranks."""


Step = Callable[..., torch.Tensor]


def start(device: str) -> int:
    """Join the ranks that torch.distributed.run started; their number."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        here = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group("nccl", timeout=datetime.timedelta(seconds=60), device_id=here)
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
    return dist.get_world_size()


def log(*args: object) -> None:
    if dist.get_rank() == 0:
        print(*args, flush=True)


def slowest(value: float, device: str = "cuda") -> float:
    x = torch.tensor([value], device=device, dtype=torch.float64)
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x.item()


def time_ms(function: Callable[[], object], seconds: float, device: str = "cuda") -> float:
    """Median time in ms. Each repetition is timed after a barrier; 2 to 20 repetitions, as many as fit `seconds`, after one warm-up."""
    first = slowest(_once(function, device), device)
    repetitions = int(max(2, min(20, seconds * 1e3 / max(first, 0.01))))
    return slowest(statistics.median(_once(function, device) for _ in range(repetitions)), device)


def _once(function: Callable[[], object], device: str) -> float:
    dist.barrier()
    if device == "cpu":
        begin = time.perf_counter()
        function()
        return (time.perf_counter() - begin) * 1e3
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def measure(step: Step, inputs: list[torch.Tensor], pairs: int, world: int, seconds: float, shape: Shape) -> dict[str, float]:
    """Metrics of one layer. TFLOP/s per GPU = (4 forward, 10 backward) x attended pairs x query heads x head dim / GPUs / time."""
    dout = torch.randn_like(step(*inputs))

    def forward():
        with torch.no_grad():
            step(*inputs)

    def both():
        torch.autograd.grad(step(*inputs), inputs, dout)

    both()
    # At the end of the backward these exist: inputs, their gradients, the output and its gradient.
    needed = 2 * sum(x.numel() * x.element_size() for x in inputs) + 2 * dout.numel() * dout.element_size()
    memory = {"needed_gib": needed / 2**30}
    if shape.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        both()
        torch.cuda.synchronize()
        peak = int(slowest(torch.cuda.max_memory_allocated()))
        memory |= {"peak_gib": peak / 2**30, "peak_over_needed": peak / needed}
    forward_ms, both_ms = time_ms(forward, seconds / 3, shape.device), time_ms(both, seconds, shape.device)
    flops = 4 * pairs * shape.heads * shape.dim / world
    return {
        "forward_ms": forward_ms,
        "both_ms": both_ms,
        "forward_tflops": flops / forward_ms / 1e9,
        "backward_tflops": 2.5 * flops / max(both_ms - forward_ms, 1e-3) / 1e9,
        "both_tflops": 3.5 * flops / both_ms / 1e9,
    } | memory


def attempt(make: Callable[[], tuple[Any, list[torch.Tensor]]], pairs: int, world: int, seconds: float, shape: Shape) -> dict | str:
    """The metrics of a contender, or why there are none. pairs: attended pairs of one head."""
    step = inputs = None
    try:
        step, inputs = make()
        return measure(step, inputs, pairs, world, seconds, shape)
    except Unavailable as error:
        return f"does not run: {error}"
    except Exception as error:  # the failure of a rival is a result
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        if hasattr(step, "close"):
            step.close()
        step = inputs = None
        if shape.device == "cuda":
            torch.cuda.empty_cache()


def ceilings(world: int) -> dict[str, float]:
    """Measured ceilings of this machine: copies, matrix products, and NCCL between the ranks (GB/s that leave a GPU)."""
    n = 1 << 28
    a, b = torch.randn(n, device="cuda", dtype=torch.bfloat16), torch.empty(n, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    gathered = torch.empty(world * n // 4, device="cuda", dtype=torch.bfloat16)
    part = torch.randn(n // 4, device="cuda", dtype=torch.bfloat16)
    wide = torch.randn(world * n // 8, device="cuda")
    mine = torch.empty(n // 8, device="cuda")
    copy_ms = time_ms(lambda: b.copy_(a), 0.2)
    result = {"copy_gb_s": 2 * a.nbytes / copy_ms / 1e6, "matmul_tflops": 2 * 8192**3 / time_ms(lambda: x @ x, 0.3) / 1e9}
    if world > 1:
        result["all_gather_gb_s"] = part.nbytes * (world - 1) / time_ms(lambda: dist.all_gather_into_tensor(gathered, part), 0.2) / 1e6
        result["all_to_all_gb_s"] = a.nbytes * (world - 1) / world / time_ms(lambda: dist.all_to_all_single(b, a), 0.2) / 1e6
        result["reduce_scatter_gb_s"] = mine.nbytes * (world - 1) / time_ms(lambda: dist.reduce_scatter_tensor(mine, wide), 0.2) / 1e6
    return result
