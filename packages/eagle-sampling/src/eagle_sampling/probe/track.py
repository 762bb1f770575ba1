"""What a container's header says of its video track, the same from every parser: which bytes are a frame, and when it is shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ..limits import MediaError
from ..time_table import TimeTable


class NotOurs(Exception):
    """A parser meets something legal that it doesn't handle; libavformat reads the file instead."""


@dataclass
class Track:
    """One video track in decode order. `n` samples (coded frames); arrays have that length.

    ticks: presentation time of each sample, in `unit` seconds. sync: decoding may begin here.
    shown: False where an edit list hides the frame. offsets, sizes: where its bytes lie (absent: only libavformat can find them).
    width, height: stored pixels. rotation: degrees clockwise that a player turns it (0, 90, 180, 270), after mirroring it left to right if `mirrored`.
    missing: samples that the header promises but the file doesn't hold.
    """

    container: str
    codec: str
    width: int
    height: int
    unit: Fraction
    ticks: NDArray[np.int64]
    sync: NDArray[np.bool_]
    shown: NDArray[np.bool_] | None = None
    offsets: NDArray[np.int64] | None = None
    sizes: NDArray[np.int64] | None = None
    extradata: bytes = b""
    rotation: int = 0
    mirrored: bool = False
    pixel_aspect_ratio: Fraction = Fraction(1)
    duration: float | None = None
    missing: int = 0
    unknown: tuple[str, ...] = ()
    # MPEG-TS: a frame's bytes are spread over transport packets; called with (descriptor, sample) instead of reading offsets/sizes.
    scattered: object | None = None
    _order: NDArray[np.int64] | None = field(default=None, repr=False)

    def presentation_order(self) -> NDArray[np.int64]:
        """Sample numbers of the frames that are shown, in order of presentation, int64 [shown]."""
        if self._order is None:
            order = np.argsort(self.ticks, kind="stable")
            self._order = order if self.shown is None else order[self.shown[order]]
        return self._order

    def time_table(self) -> TimeTable:
        return TimeTable.from_ticks(self.ticks[self.presentation_order()], self.unit)

    def seconds(self, samples: NDArray[np.int64]) -> NDArray[np.float64]:
        """Presentation times of the samples, each correctly rounded."""
        return self.ticks[samples] * np.float64(self.unit.numerator) / np.float64(self.unit.denominator)


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` knows of a video. What couldn't be known is None and named in `unknown`.

    width, height: as displayed, after rotation, in stored pixels (multiply the width by `pixel_aspect_ratio` for its true shape).
    rotation: degrees clockwise already accounted for in width and height.
    fps: frames / duration, an average; duration: seconds from the first frame's appearance to the last one's end.
    times: exact presentation times on the file's own timeline (an MPEG-TS may begin at 1.4 s); keyframe_times: where decoding can begin.
    variable_frame_rate: True when frames last unequally, beyond the container's rounding.
    """

    path: str
    width: int
    height: int
    rotation: int
    fps: float | None
    duration: float | None
    frame_count: int | None
    codec: str
    container: str
    times: TimeTable | None
    keyframe_times: NDArray[np.float64] | None
    pixel_aspect_ratio: Fraction
    variable_frame_rate: bool | None
    unknown: tuple[str, ...] = ()

    @classmethod
    def from_track(cls, path: str, track: Track, *, exact: bool = True) -> VideoInfo:
        order = track.presentation_order()
        width, height = (track.height, track.width) if track.rotation in (90, 270) else (track.width, track.height)
        table = track.time_table() if exact else None
        count = len(order)
        if not count:
            raise MediaError(f"{path}: its video track has no frames")
        first, last = (float(value) for value in track.seconds(order[[0, -1]]))
        if count > 1:
            step = (last - first) / (count - 1)
            if table is not None and not table.constant:
                step = float(np.median(np.diff(track.ticks[order]))) * float(track.unit)
            # A header that gives the last frame longer than its neighbours is believed; one that cuts frames off isn't.
            duration = max(last - first + step, (track.duration or 0.0) if table is not None and not table.constant else 0.0)
        else:
            duration = track.duration
        keyframes = np.sort(track.seconds(np.flatnonzero(track.sync if track.shown is None else track.sync & track.shown)))
        return cls(
            path=path,
            width=width,
            height=height,
            rotation=track.rotation,
            fps=count / duration if duration else None,
            duration=duration,
            frame_count=count,
            codec=track.codec,
            container=track.container,
            times=table,
            keyframe_times=keyframes,
            pixel_aspect_ratio=track.pixel_aspect_ratio,
            variable_frame_rate=None if table is None or count < 2 else not table.constant,
            unknown=track.unknown + (() if duration else ("duration", "fps")),
        )
