"""What is measured of a step: its time, and the peak of memory at every moment."""

import gc
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.results import Metric
from eagle_model import PackedBatch

GIB = 1 << 30
METRICS = {
    "ms": Metric("ms", "lower"),
    "tokens_per_s": Metric("", "higher"),
    "over_recompute": Metric("", "none"),
    "speedup_over_bf16": Metric("", "higher"),
    "mfu": Metric("", "higher"),
    "peak_gib": Metric("GiB", "lower"),
    "reserved_gib": Metric("GiB", "lower"),
    "planned_gib": Metric("GiB", "none"),
    "plan_error": Metric("", "none"),
    "host_gib": Metric("GiB", "none"),
    "loss": Metric("", "none"),
    "rows_per_s": Metric("", "higher"),
    "tree_speedup": Metric("", "higher"),
}


def log(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, flush=True)


def release() -> None:
    """Give back the memory of models and packs that are no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Moments:
    """The allocator's peak between marks, and the overall one. Without a GPU: none."""

    def __init__(self, model: Any) -> None:
        self.peaks: dict[str, int] = {}
        self.reserved = 0
        self.current: str | None = None
        self._watch(model)

    def begin(self) -> None:
        """Forget the peaks so far, before a step that is measured by itself."""
        release()
        self.peaks, self.reserved, self.current = {}, 0, None

    def mark(self, name: str | None) -> None:
        if not torch.cuda.is_available():
            return
        if self.current is not None:
            self.peaks[self.current] = max(self.peaks.get(self.current, 0), torch.cuda.max_memory_allocated())
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        self.current = name

    def _watch(self, model: Any) -> None:
        """Mark where the parts of the model begin, in forward and in backward."""
        layers = model.blocks("language")

        def at(tensor: torch.Tensor, name: str) -> None:
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self.mark(name))

        def connector(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            self.mark("decoder forward")
            at(output, "backward of the vision side")

        def before_layer(index: int) -> Any:
            return lambda _, args: at(args[0], f"backward of layer {index - 1}" if index else "backward of the embedding")

        def before_norm(_: nn.Module, args: Any) -> None:
            self.mark("loss")
            at(args[0], f"backward of layer {len(layers) - 1}")

        model.parts()["connector"].register_forward_hook(connector)
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(before_layer(index))
        model.language_model.model.norm.register_forward_pre_hook(before_norm)


def milliseconds(function: Callable[[], object]) -> float:
    """Of one call, the device's work included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    begin = time.perf_counter()
    function()
    wait()
    return (time.perf_counter() - begin) * 1e3


def step(model: Any, moments: Moments, inputs: PackedBatch, optimizer: torch.optim.Optimizer | None) -> tuple[float, float]:
    """(milliseconds, loss) of one step; the gradients are freed."""
    losses: list[torch.Tensor] = []

    def whole() -> None:
        moments.mark("vision forward")
        loss = model(inputs).loss
        losses.append(loss.detach())
        moments.mark("backward of the head")
        loss.backward()
        moments.mark("optimizer")
        if optimizer is not None:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        moments.mark(None)

    ms = milliseconds(whole)
    model.zero_grad(set_to_none=True)
    return ms, losses[0].item()


def kernel_times(function: Callable[[], object]) -> dict[str, float]:
    """Milliseconds that each kernel takes in one call, the longest first; names are cut."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        function()
    times: dict[str, float] = {}
    for event in profiler.key_averages():
        name = event.key[:100]
        times[name] = times.get(name, 0.0) + event.self_device_time_total / 1e3
    longest = sorted(((name, spent) for name, spent in times.items() if spent > 0), key=lambda one: -one[1])
    return dict(longest[:60])
