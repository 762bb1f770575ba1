"""Exact frames by presentation time, straight into one array."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import ArrayLike, NDArray

from .frames import TIME_EPSILON
from .limits import DEFAULT_LIMITS, FrameError, Limits, MediaError
from .probe import read_track
from .probe.track import Track
from .video_linear import decode_linear


@dataclass(frozen=True)
class Frames:
    """pixels: uint8 [n, h, w, 3] RGB; times: float64 [n], the true presentation times; errors: what couldn't be read, when asked to skip."""

    pixels: NDArray[np.uint8]
    times: NDArray[np.float64]
    errors: tuple[FrameError, ...] = ()


def read_frames(
    path: str | os.PathLike[str],
    times: ArrayLike,
    size: int | tuple[int, int] | None = None,
    *,
    workers: int = 1,
    tolerance: float = 0.0,
    on_error: Literal["raise", "skip"] = "raise",
    timeout: float | None = None,
    out: NDArray[np.uint8] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Frames:
    """The frames on the screen at `times` (seconds on the file's own timeline, any order, repeats allowed), in that order.

    size: side of a square, or (width, height), that every frame is resized to (bicubic), or None for the displayed size.
    """
    name = os.fspath(path)
    deadline = None if timeout is None else time.monotonic() + timeout
    track = read_track(name, limits=limits, deadline=deadline)
    order = track.presentation_order()
    seconds = track.seconds(order)
    asked = np.atleast_1d(np.asarray(times, np.float64))
    position = np.searchsorted(seconds, asked + TIME_EPSILON, side="right") - 1
    outside = np.flatnonzero(position < 0)
    errors = [FrameError(int(i), float(asked[i]), f"lies before the first frame at {seconds[0]:.6f} s") for i in outside]
    wanted = track.ticks[order[np.maximum(position, 0)]]
    width, height = _displayed(track) if size is None else (size, size) if isinstance(size, int) else size
    limits.check_size(width, height, name)
    if out is None:
        out = np.empty((len(asked), height, width, 3), np.uint8)
    elif out.shape != (len(asked), height, width, 3) or out.dtype != np.uint8:
        raise ValueError(f"out must be uint8 [{len(asked)}, {height}, {width}, 3], not {out.dtype} {list(out.shape)}")
    places: dict[int, list[int]] = {}
    for i, tick in enumerate(wanted.tolist()):
        if position[i] >= 0:
            places.setdefault(tick, []).append(i)

    def check() -> None:
        if deadline is not None and time.monotonic() > deadline:
            raise MediaError(f"{name}: decoding took longer than the limit of {timeout} s")

    reformatter = VideoReformatter()
    failure = None
    try:
        for tick, frame in decode_linear(name, set(places), check):
            rgb = reformatter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1)
            pixels = rgb.to_ndarray()
            for i in places.pop(tick):
                out[i] = pixels
    except MediaError as error:
        failure = error
    for indices in places.values():
        errors += [FrameError(i, float(asked[i]), str(failure or "the decoder gave no such frame")) for i in indices]
    if errors and on_error == "raise":
        first = min(errors, key=lambda error: error.index)
        raise MediaError(f"{name}: the frame at {first.time:.3f} s can't be read: {first.reason}")
    bad = {error.index for error in errors}
    keep = [i for i in range(len(asked)) if i not in bad]
    shown = seconds[np.maximum(position, 0)]
    if bad:
        return Frames(out[keep], shown[keep], tuple(sorted(errors, key=lambda error: error.index)))
    return Frames(out, shown)


def _displayed(track: Track) -> tuple[int, int]:
    return (track.height, track.width) if track.rotation in (90, 270) else (track.width, track.height)


__all__ = ["Frames", "read_frames"]
