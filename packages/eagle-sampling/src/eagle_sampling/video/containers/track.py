"""The video track of a container, as every parser returns it: the bytes of each frame, and when it is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from .source import Source


class Unsupported(Exception):
    """A file uses a valid feature that its parser does not support; libavformat reads the file instead."""


@dataclass
class Track:
    """One video track in decode order. `n` samples (coded frames); arrays have that length.

    ticks: presentation time of each sample, in `unit` seconds. sync: decoding may begin here.
    shown: False where an edit list hides the frame. offsets, sizes: byte positions (None: only libavformat can find them).
    width, height: stored pixels. rotation: degrees clockwise by which a player rotates it (0, 90, 180, 270), after mirroring it left to
    right if `mirrored`.
    colour: matrix, range and chroma positions of the container, as decoder options: they apply where the stream itself states none.
    missing: samples of the header that the file does not hold.
    first: (offset, size) of the first sample, also where `offsets` were not read.
    opens: decoding begins at a keyframe after which pictures from before it may be named.
    demuxed: the decoder is the one that libavformat sets up for the file (MPEG-4 is decoded by what AVI calls it).
    silent: packets at the beginning of an untimed track that give no frame; the others are its samples, in order.
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
    colour: dict[str, str] = field(default_factory=dict)
    missing: int = 0
    unknown: tuple[str, ...] = ()
    timed: bool = True  # False: a packet's time is not its frame's; sample i is the i-th frame when decoding from the front
    whole: bool = True  # False (then `timed` is False too): some packets hold less than a frame
    frame_duration: float | None = None  # seconds, as the header states it
    first: tuple[int, int] | None = None
    silent: frozenset[int] = frozenset()
    opens: bool = False
    demuxed: bool = False
    # MPEG-TS: a frame's bytes are spread over transport packets; called with (source, sample) instead of reading offsets/sizes.
    scattered: Callable[[Source, int], bytes] | None = None
    _order: NDArray[np.int64] | None = field(default=None, repr=False)

    def presentation_order(self) -> NDArray[np.int64]:
        """Sample numbers of the frames that are shown, in order of presentation, int64 [shown].

        Of frames of one time, only the last is on the screen: the others are not among the video's frames.
        """
        if self._order is None:
            order = np.argsort(self.ticks, kind="stable")
            order = order if self.shown is None else order[self.shown[order]]
            seen = _seen(self.ticks[order])
            self._order = order if seen is None else order[seen]
        return self._order

    def presentation_ticks(self) -> NDArray[np.int64]:
        """Ticks of the frames that are shown, in order, int64 [shown]."""
        ticks = ordered(self.ticks if self.shown is None else self.ticks[self.shown])
        seen = _seen(ticks)
        return ticks if seen is None else ticks[seen]

    def seconds(self, samples: NDArray[np.int64]) -> NDArray[np.float64]:
        """Presentation times of the samples, each correctly rounded."""
        return self.at(self.ticks[samples])

    def at(self, ticks: NDArray[np.int64]) -> NDArray[np.float64]:
        """ticks in seconds."""
        return ticks * np.float64(self.unit.numerator) / np.float64(self.unit.denominator)


def _seen(ticks: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """Which of the sorted ticks are followed by a larger one; None: all."""
    last = ticks[1:] != ticks[:-1]
    return None if last.all() else np.append(last, True)


def ordered(ticks: NDArray[np.int64]) -> NDArray[np.int64]:
    """`np.sort(ticks)`, in linear time where frames are about evenly spaced.

    Then rounding each tick's share of the whole to an index gives every index one frame; rounding keeps the order, so that is a sort.
    """
    n = len(ticks)
    if n > 2:
        first = int(ticks.min())
        span = int(ticks.max()) - first
        if 0 < span < (1 << 61) // n:
            place = ticks - first
            place *= 2 * n - 2
            place += span
            place //= 2 * span
            taken = np.zeros(n, bool)
            taken[place] = True
            if taken.all():
                out = np.empty(n, np.int64)
                out[place] = ticks
                return out
    return np.sort(ticks)


def orientation(matrix: tuple[int, int, int, int]) -> tuple[int, bool, bool]:
    """(rotation clockwise, mirrored first, neither) of the display matrix (a, b, c, d): x' = ax + cy, y' = bx + dy."""
    a, b, c, d = (int(np.sign(value)) if abs(value) > 64 else 0 for value in matrix)
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    rotation = {(1, 0, 0, 1): 0, (0, 1, -1, 0): 90, (-1, 0, 0, -1): 180, (0, -1, 1, 0): 270}.get((a, b, c, d))
    return (0, False, True) if rotation is None else (rotation, mirrored, False)


def colour_options(matrix: int = 2, colour_range: int = 0, chroma: tuple[int, int] = (0, 0)) -> dict[str, str]:
    """Decoder options for a matrix and range (ITU-T H.273; 2 and 0: unspecified) and Matroska's chroma siting (across, down).

    Siting: 1 at the luma sample, 2 half way to the next.
    """
    said = {
        "colorspace": matrix if matrix in (0, 1, 4, 5, 6, 7, 8, 9, 10) else None,
        "color_range": colour_range if colour_range in (1, 2) else None,
        "chroma_sample_location": {(1, 2): 1, (2, 2): 2, (1, 1): 3, (2, 1): 4}.get(chroma),
    }
    return {name: str(value) for name, value in said.items() if value is not None}
