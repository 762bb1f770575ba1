"""Shot boundaries from small frames, in numpy: hysteresis on changes of colour histograms and of pixels.

The change over `span` frames is compared with the usual change over as many frames nearby, which is motion. Where the difference exceeds
`LOW * high` a candidate begins, and it is a boundary when its peak exceeds `high`. A span of one frame finds cuts, longer spans find cuts
with a mixed frame, dissolves and fades. A dissolve mixes two pictures linearly: the frame in the middle is close to the mean of the frames
at both ends, which motion is not.

The thresholds were chosen on spliced footage and on two films (`benchmarks/curate.py` measures them next to PySceneDetect).
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 48, 27
"""Pixels of a small frame, as in TransNetV2."""
PLANES = (WIDTH * HEIGHT, (WIDTH // 2) * ((HEIGHT + 1) // 2), (WIDTH // 2) * ((HEIGHT + 1) // 2))
"""Values of Y, U and V in a small frame: chroma has half the width and height."""
BINS = (16, 32, 32)
"""Bins of the histograms of Y, U and V. Chroma stays near 128, so that it needs narrower bins."""
HISTOGRAM_WEIGHT = 60.0
"""Grey levels that a histogram distance of 1 (nothing in common) is worth."""
HISTOGRAM_LIMIT = 3.0
"""Most grey levels that a histogram distance counts for, per grey level of difference between the pixels: when a flat picture fades, all of
its pixels enter the next bin at once, which is a distance of 1 for a difference of a few levels."""
LOW = 0.5
"""Share of `high` at which a candidate begins."""


class Scale(NamedTuple):
    """span: frames; high: threshold in grey levels; motion: factor of the usual change; window: frames on each side that give it.

    blend: largest distance of the middle frame from the mean of the ends, relative to the distance of the ends; None: not compared.
    """

    span: int
    high: float
    motion: float
    window: int
    blend: float | None


SCALES = (Scale(1, 14.0, 2.0, 4, None), Scale(3, 24.0, 1.5, 4, None), Scale(8, 16.0, 1.5, 8, 0.3), Scale(16, 20.0, 1.5, 12, 0.3))
LONGEST_SPAN = max(scale.span for scale in SCALES)


class Boundary(NamedTuple):
    """frame: the first frame of the new shot (0-based; of a gradual transition its middle). span: frames over which it was seen."""

    frame: int
    span: int


class Changes(NamedTuple):
    """Per scale, for every frame: the change that is centred in front of it (float32 [n]), and the blend ratio there.

    The ratio is inf where the change is below `LOW * high`, where no candidate is, and for scales that do not use it.
    """

    change: list[NDArray[np.float32]]
    blend: list[NDArray[np.float32]]


def shot_boundaries(chunks: Iterable[NDArray[np.uint8]]) -> tuple[int, list[Boundary]]:
    """(number of frames, boundaries in order) of small frames that come in chunks of uint8 [n, sum(PLANES)].

    Memory: one chunk, and 6 floats a frame.
    """
    count, changes = measure_changes(chunks)
    return count, find_boundaries(changes)


def measure_changes(chunks: Iterable[NDArray[np.uint8]]) -> tuple[int, Changes]:
    """(number of frames, changes) of frames in chunks. How the frames are divided into chunks does not change the result."""
    change: list[list[NDArray[np.float32]]] = [[] for _ in SCALES]
    blend: list[list[NDArray[np.float32]]] = [[] for _ in SCALES]
    count = 0
    for frames, known in _overlapping(chunks):
        histograms = _histograms(frames)
        for index, scale in enumerate(SCALES):
            first = max(known - scale.span, 0)  # pairs that end in a known frame are measured already
            here = _change(frames[first:], histograms[first:], scale.span)
            change[index].append(here)
            if scale.blend is not None:
                blend[index].append(_blend(frames[first:], scale.span, here >= LOW * scale.high))
        count += len(frames) - known

    def series(parts: list[NDArray[np.float32]], span: int, outside: float) -> NDArray[np.float32]:
        row = np.full(count, outside, np.float32)
        values = np.concatenate([np.empty(0, np.float32), *parts])
        start = (span + 1) // 2
        row[start : start + len(values)] = values
        return row

    return count, Changes(
        [series(parts, scale.span, 0.0) for parts, scale in zip(change, SCALES)],
        [series(parts, scale.span, np.inf) for parts, scale in zip(blend, SCALES)],
    )


def find_boundaries(changes: Changes) -> list[Boundary]:
    """Boundaries of all scales; a longer span adds only what a shorter one did not find within its span."""
    found: list[Boundary] = []
    for scale, change, blend in zip(SCALES, changes.change, changes.blend):
        excess = _excess(change.astype(np.float64), scale)
        for frame in _peaks(excess, LOW * scale.high, scale.high):
            if scale.blend is not None and blend[max(frame - 2, 0) : frame + 3].min() > scale.blend:
                continue
            if all(abs(frame - other.frame) > max(scale.span, other.span) for other in found):
                found.append(Boundary(frame, scale.span))
    return sorted(found)


def _overlapping(chunks: Iterable[NDArray[np.uint8]]) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """Chunks with up to LONGEST_SPAN frames from before in front of them, and how many these are."""
    tail: NDArray[np.uint8] | None = None
    for chunk in chunks:
        if len(chunk):
            frames = chunk if tail is None else np.concatenate([tail, chunk])
            yield frames, len(frames) - len(chunk)
            tail = frames[-LONGEST_SPAN:].copy()


def _histograms(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Histograms of the three planes side by side, each with a sum of 1: float32 [n, sum(BINS)]."""
    every, counts = sum(BINS), []
    for first in range(0, len(frames), BLOCK):
        part = frames[first : first + BLOCK]
        bins = ((part >> _SHIFTS) + _FIRST_BINS).astype(np.uint16)
        bins += (every * np.arange(len(part), dtype=np.uint16))[:, None]
        counts.append(np.bincount(bins.ravel(), minlength=len(part) * every).reshape(len(part), every))
    return np.concatenate(counts).astype(np.float32) / np.repeat(np.array(PLANES, np.float32), BINS)


BLOCK = 512
"""Frames whose bins are counted at once: their numbers fit in 16 bits, which takes half the time of 64."""
_SHIFTS = np.repeat(np.array([8 - bins.bit_length() + 1 for bins in BINS], np.uint8), PLANES)
_FIRST_BINS = np.repeat(np.cumsum((0, *BINS[:-1])).astype(np.uint8), PLANES)


def _change(frames: NDArray[np.uint8], histograms: NDArray[np.float32], span: int) -> NDArray[np.float32]:
    """Mean absolute difference of the pixels, summed over the planes, plus the weighted distance of the histograms: [n - span]."""
    pixels = _sums(_difference(frames[span:], frames[:-span]))
    apart = np.abs(histograms[span:] - histograms[:-span]).sum(axis=1) / (2 * len(BINS))
    return pixels + np.minimum(np.float32(HISTOGRAM_WEIGHT) * apart, np.float32(HISTOGRAM_LIMIT) * pixels)


def _blend(frames: NDArray[np.uint8], span: int, where: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Distance of the middle frame from the mean of the ends, over the distance of the ends: [n - span]; inf except `where`."""
    ratio = np.full(len(where), np.inf, np.float32)
    low = np.flatnonzero(where)
    first, middle, last = (frames[low + shift].astype(np.int16) for shift in (0, span // 2, span))
    ratio[low] = _sums(np.abs(2 * middle - first - last)) / (2 * _sums(np.abs(last - first)) + np.float32(2))
    return ratio


def _difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.maximum(a, b) - np.minimum(a, b)


def _sums(values: NDArray[np.uint8] | NDArray[np.int16]) -> NDArray[np.float32]:
    """Means over each plane of non-negative values [n, sum(PLANES)], added up: [n]. Sums of integers, so that chunks change nothing."""
    total = np.zeros(len(values), np.float32)
    first = 0
    for count in PLANES:
        total += values[:, first : first + count].sum(axis=1, dtype=np.uint32).astype(np.float32) / np.float32(count)
        first += count
    return total


def _excess(change: NDArray[np.float64], scale: Scale) -> NDArray[np.float64]:
    """What a change exceeds the usual one by; -inf where there is nothing to compare with.

    The frames within one span are not counted as usual: they see the same transition.
    """
    total = np.concatenate([[0.0], np.cumsum(change)])
    at = np.arange(len(change))
    begin = (scale.span + 1) // 2  # changes are measured from here on
    end = max(len(change) - scale.span, 0) + begin

    def side(first: NDArray[np.int64], stop: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        first, stop = (np.clip(edge, begin, max(end, begin)) for edge in (first, stop))
        first, stop = (np.minimum(edge, len(change)) for edge in (first, stop))
        return (total[stop] - total[first]) / np.maximum(stop - first, 1), stop > first

    before, some_before = side(at - scale.span - scale.window + 1, at - scale.span + 1)
    after, some_after = side(at + scale.span, at + scale.span + scale.window)
    sides = some_before.astype(int) + some_after
    usual = (before * some_before + after * some_after) / np.maximum(sides, 1)
    return np.where(sides > 0, change - scale.motion * usual, -np.inf)


def _peaks(values: NDArray[np.float64], low: float, high: float) -> Iterator[int]:
    """Places of the maxima of all runs above `low` that reach `high`."""
    on = np.concatenate([[False], values >= low, [False]])
    edges = np.flatnonzero(on[1:] != on[:-1])
    for first, stop in zip(edges[::2], edges[1::2]):
        if values[first:stop].max() >= high:
            yield int(first + np.argmax(values[first:stop]))
