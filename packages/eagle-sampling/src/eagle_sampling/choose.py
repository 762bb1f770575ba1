"""Which frames and pages: by rate, by count, per chapter. Functions of presentation times and counts; no file is opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .limits import whole_number
from .time_table import TimeTable

if TYPE_CHECKING:
    from .video.probe import VideoInfo

__all__ = ["choose_chapters", "choose_pages", "choose_times", "clip_range", "wanted_frames"]

# A time written with six decimals still denotes its frame; frames are never this close together.
TIME_EPSILON = 1e-6


@overload
def wanted_frames(
    duration: float, fps: float | None = 2.0, max_frames: int | None = None, *, min_frames: int = 1, available: int | None = None
) -> int: ...
@overload
def wanted_frames(
    duration: NDArray[np.floating[Any]],
    fps: float | None = 2.0,
    max_frames: int | None = None,
    *,
    min_frames: int = 1,
    available: NDArray[np.integer[Any]] | None = None,
) -> NDArray[np.int64]: ...
def wanted_frames(
    duration: float | NDArray[np.floating[Any]],
    fps: float | None = 2.0,
    max_frames: int | None = None,
    *,
    min_frames: int = 1,
    available: int | NDArray[np.integer[Any]] | None = None,
) -> int | NDArray[np.int64]:
    """Frames that a video of `duration` seconds wants: `fps` a second, at least `min_frames`, at most `max_frames` and `available`.

    Numbers give an int, arrays [V] an int64 array. A duration of NaN means that there is no rate (pages of a document, frames without
    times): all `available` are wanted, up to `max_frames`. `fps=None` means the same for every entry.

    Raises:
        ValueError: a duration that is negative or infinite, no rate and no `available`, fps that is not positive, or `min_frames`,
            `max_frames` or `available` below 1 or not of whole numbers.
    """
    seconds = np.asarray(duration, np.float64)
    if fps is not None and not (np.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be positive, not {fps}")
    for name, value in (("min_frames", min_frames), ("max_frames", max_frames), ("available", available)):
        if value is None or not np.size(value):
            continue
        if np.asarray(value).dtype.kind not in "iu":
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if np.min(value) < 1:
            raise ValueError(f"{name} must be at least 1, not {np.min(value)}")
    without_rate = np.isnan(seconds) if fps is not None else np.ones(seconds.shape, bool)
    bad = ~((np.isfinite(seconds) & (seconds >= 0)) | (np.isnan(seconds) & (available is not None)))
    if bad.any():
        raise ValueError(f"duration must be a number of seconds >= 0 (NaN, with available: no rate), not {seconds[bad].flat[0]}")
    if available is None and without_rate.any():
        raise ValueError("fps is None, so that all frames are wanted: give available, how many there are")
    with np.errstate(over="ignore"):
        by_rate = np.floor(np.where(without_rate, 0.0, seconds) * (fps or 0.0) + 1e-6)
    wanted = by_rate.clip(min_frames, 2.0**53).astype(np.int64)  # a float beyond int64 would become a negative number
    if available is not None:
        wanted = np.minimum(np.where(without_rate, available, wanted), available)
    if max_frames is not None:
        wanted = np.minimum(wanted, max_frames)
    return int(wanted) if wanted.ndim == 0 else wanted.astype(np.int64, copy=False)


def clip_range(times: ArrayLike | TimeTable | VideoInfo, start: float | None = None, end: float | None = None) -> tuple[int, int]:
    """(first, stop): frames `first` ... `stop - 1` are on the screen during [start, end) seconds; at least one.

    times: presentation times in seconds, sorted, a TimeTable or a VideoInfo. The frame that is on the screen at `start` belongs to the
    clip; a frame that appears at `end` does not.
    Raises ValueError when there are no frames, times are not finite or not in order, a border is NaN, or the clip is empty, ends before
    the first frame or starts after the video's end.
    """
    seconds = _seconds(times)
    n = len(seconds)
    if n == 0:
        raise ValueError("there are no frames to choose from")
    for name, border in (("start", start), ("end", end)):
        if border is not None and np.isnan(border):
            raise ValueError(f"the clip's {name} is NaN: give seconds, or None for the video's own")
    if start is not None and end is not None and end <= start:
        raise ValueError(f"the clip from {start} to {end} s is empty: its end must be after its start")
    if end is not None and end <= seconds[0]:
        raise ValueError(f"the clip ends at {end} s, before the first frame at {seconds[0]:.3f} s")
    if start is not None and start > _end(seconds) + TIME_EPSILON and n > 1:
        raise ValueError(f"the clip starts at {start} s, after the video's end at {_end(seconds):.3f} s")
    first = 0 if start is None else max(int(np.searchsorted(seconds, start + TIME_EPSILON, side="right")) - 1, 0)
    stop = n if end is None else int(np.searchsorted(seconds, end - TIME_EPSILON, side="left"))
    return first, max(stop, first + 1)


def choose_times(
    times: ArrayLike | TimeTable | VideoInfo,
    count: int,
    *,
    start: float | None = None,
    end: float | None = None,
    placement: Literal["linspace", "center"] = "linspace",
) -> NDArray[np.float64]:
    """`count` presentation times, float64 [count], strictly increasing, out of `times` (sorted seconds, a TimeTable or a VideoInfo).

    "linspace": the first and the last frame of the clip and, evenly in time between them, the nearest frames, as in the original.
    "center": the clip is divided into `count` equal parts, and the frame on the screen at the centre of each is chosen.
    Even in time, not in frame number, so that a variable frame rate does not favour its dense parts.
    Raises ValueError when `count` is below 1 or above the number of frames in the clip, and as `clip_range`; TypeError when `count` is
    not a whole number.
    """
    count = whole_number("count", count)
    seconds = _seconds(times)
    first, stop = clip_range(seconds, start, end)
    clip = seconds[first:stop]
    n = len(clip)
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    if count > n:
        raise ValueError(f"count = {count}, but the clip has {n} frames; choose at most {n} (wanted_frames(..., available={n}))")
    if placement == "linspace":
        wanted = np.linspace(clip[0], clip[-1], count) if count > 1 else clip[:1]
        right = np.clip(np.searchsorted(clip, wanted, side="left"), 1, max(n - 1, 1))
        left = right - 1
        right = np.minimum(right, n - 1)
        index = np.where(clip[right] - wanted < wanted - clip[left], right, left)
    elif placement == "center":
        wanted = clip[0] + (np.arange(count) + 0.5) * (_end(clip) - clip[0]) / count
        index = np.searchsorted(clip, wanted + TIME_EPSILON, side="right") - 1
    else:
        raise ValueError(f"placement must be 'linspace' or 'center', not {placement!r}")
    # Where frames are sparse, two targets may have the same nearest frame; the next ones are taken so that all are different.
    order = np.arange(count)
    index = np.maximum.accumulate(index - order) + order
    index = np.minimum(index, n - count + order)
    return clip[index]


def choose_pages(available: int, count: int) -> NDArray[np.int64]:
    """`count` of `available` pages, evenly from the first to the last, 0-based, int64 [count], strictly increasing; one page: the first.

    Raises ValueError unless 1 <= count <= available, and TypeError for numbers that are not whole.
    """
    available, count = whole_number("available", available), whole_number("count", count)
    if not 1 <= count <= available:
        raise ValueError(f"{count} of {available} pages: need 1 <= count <= available")
    return np.round(np.linspace(0, available - 1, count)).astype(np.int64)


def choose_chapters(
    times: ArrayLike | TimeTable | VideoInfo, chapters: Sequence[tuple[float, float]], *, fps: float = 2.0, max_frames: int | None = 50
) -> list[NDArray[np.float64]]:
    """Presentation times per chapter (start, end) in seconds: `fps` frames a second, at most `max_frames` per chapter.

    Of a chapter that extends beyond the video, the part inside counts. The default of 50 is that of the top-down recipe of Eagle 2.5.
    Raises ValueError as `clip_range`.
    """
    seconds = _seconds(times)
    chosen = []
    for start, end in chapters:
        first, stop = clip_range(seconds, start, end)
        length = max(0.0, min(end, _end(seconds)) - max(start, float(seconds[0])))
        count = min(wanted_frames(length, fps, max_frames), stop - first)
        chosen.append(choose_times(seconds, count, start=start, end=end))
    return chosen


def _seconds(times: ArrayLike | TimeTable | VideoInfo) -> NDArray[np.float64]:
    if hasattr(times, "keyframe_times"):  # a VideoInfo: its class is not imported here, because that loads the video libraries
        info = cast("VideoInfo", times)
        if info.times is None:
            raise ValueError(f"{info.path}: the times of its frames are not known: probe it with exact=True")
        times = info.times
    if isinstance(times, TimeTable):
        return times.times()
    seconds = np.asarray(cast(ArrayLike, times), dtype=np.float64)
    if seconds.ndim != 1:
        raise ValueError(f"times must be one-dimensional, not of shape {seconds.shape}")
    bad = ~np.isfinite(seconds)
    bad[1:] |= seconds[1:] < seconds[:-1]
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(f"times must be finite seconds in rising order, but times[{at}] is {seconds[at]}; sort them first")
    return seconds


def _end(seconds: NDArray[np.float64]) -> float:
    """End of the last frame if it lasts as long as the average one."""
    return float(seconds[-1] + (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1))
