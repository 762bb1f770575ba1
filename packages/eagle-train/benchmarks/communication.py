"""How much of a step is communication, from a profile: collectives as a share of the step, and what no computation hides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

Interval = tuple[float, float]


class Communication(NamedTuple):
    """Shares of the step's time. busy: some collective runs, which includes waiting for the slowest rank; exposed: and nothing else does;
    idle: nothing runs at all."""

    busy: float
    exposed: float
    idle: float


def profiled(function: Callable[[], object], device: torch.device) -> tuple[Communication, dict[str, float]]:
    """Of one call on this rank: the shares, and the milliseconds of the 40 longest kernels (on a CPU: operators) by name.

    On a CPU collectives of gloo are counted, and everything else is taken for computation.
    """
    gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        function()
    kind = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    # Annotations span kernels and the gaps between them.
    found = [event for event in profiler.events() if event.device_type == kind and not getattr(event, "is_user_annotation", False)]
    events = [(event.name, event.time_range.start, event.time_range.end) for event in found]
    times: dict[str, float] = {}
    for name, start, stop in events:
        times[name[:100]] = times.get(name[:100], 0.0) + (stop - start) / 1e3
    longest = dict(sorted(times.items(), key=lambda one: -one[1])[:40])
    collective = [(start, stop) for name, start, stop in events if is_collective(name)]
    other = [(start, stop) for name, start, stop in events if not is_collective(name)]
    return shares(collective, other), longest


def is_collective(name: str) -> bool:
    """Kernels of NCCL, and what gloo records."""
    return name.startswith(("nccl", "gloo:", "c10d::"))


def shares(collective: Iterable[Interval], other: Iterable[Interval]) -> Communication:
    """From the intervals of collectives and of everything else; the step is from the first one's start to the last one's end."""
    busy, working = union(collective), union(other)
    both = union([*busy, *working])
    if not both:
        return Communication(0.0, 0.0, 0.0)
    whole = both[-1][1] - both[0][0]
    return Communication(length(busy) / whole, (length(both) - length(working)) / whole, 1.0 - length(both) / whole)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint intervals in order that cover the same time."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        elif stop > start:
            merged.append((start, stop))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    return sum(stop - start for start, stop in intervals)
