"""Timing on the CPU: contenders run in turn, round by round, so that ratios are taken between neighbours in time."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Samples = dict[str, list[float]]  # contender: one figure per round


def interleaved_seconds(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Seconds of each contender in each of `rounds` rounds, after `warmup` rounds that are not recorded.

    The order rotates by one from round to round. clock: `time.perf_counter` for wall time, `time.process_time` for the process's CPU time.
    Raises ValueError without contenders or with fewer than one round.
    """
    if not contenders or rounds < 1:
        raise ValueError(f"interleaved_seconds: {len(contenders)} contenders and {rounds} rounds, expected at least one of each")
    names = list(contenders)
    samples: Samples = {name: [] for name in names}
    for index in range(-warmup, rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            contenders[name]()
            seconds = clock() - start
            if index >= 0:
                samples[name].append(seconds)
    return samples


def medians(samples: Samples) -> dict[str, float]:
    """Median of each contender."""
    return {name: statistics.median(values) for name, values in samples.items()}


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Ratios of the figures of the same round. Raises ValueError if the numbers of rounds differ."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile (linear interpolation); of one value three times that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
