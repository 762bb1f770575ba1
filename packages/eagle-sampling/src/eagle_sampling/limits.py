"""How much a file may ask for: bounds on pixels, frames and bytes, and the one error that every media problem raises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class MediaError(ValueError):
    """A media file can't be used. The message names the file, where in it, the reason and, where there is one, the next step."""


class Limits(NamedTuple):
    """Bounds checked before memory is spent; a breach raises `MediaError`.

    max_pixels: width * height of one image or frame; the default is where Pillow itself refuses (0.5 GB once decoded).
    max_bytes: size of an encoded file, an LMDB value or one video packet.
    max_frames: frames of one video, pages of one document.
    max_side: longest side in pixels; None leaves it to `max_pixels`.
    """

    max_pixels: int = 178_956_970
    max_bytes: int = 1 << 30
    max_frames: int = 10_000_000
    max_side: int | None = None

    def check_size(self, width: int, height: int, name: str) -> None:
        """Raise `MediaError` when an image of `width` x `height` pixels is empty or over the limits."""
        if width <= 0 or height <= 0:
            raise MediaError(f"{name}: has no pixels ({width} x {height}); the file is damaged or not an image")
        if width * height > self.max_pixels:
            raise MediaError(
                f"{name}: {width} x {height} = {width * height} pixels is over the limit of {self.max_pixels}; "
                "shrink it, or raise Limits.max_pixels"
            )
        if self.max_side is not None and max(width, height) > self.max_side:
            raise MediaError(f"{name}: {width} x {height} has a side over {self.max_side}; shrink it, or raise Limits.max_side")

    def check_bytes(self, size: int, name: str) -> None:
        """Raise `MediaError` when `size` bytes are none or over the limit."""
        if size == 0:
            raise MediaError(f"{name}: is empty (0 bytes)")
        if size > self.max_bytes:
            raise MediaError(f"{name}: {size} bytes is over the limit of {self.max_bytes}; split it, or raise Limits.max_bytes")

    def check_frames(self, count: int, name: str) -> None:
        """Raise `MediaError` when `count` frames are over the limit."""
        if count > self.max_frames:
            raise MediaError(f"{name}: {count} frames is over the limit of {self.max_frames}; cut it, or raise Limits.max_frames")


@dataclass(frozen=True)
class FrameError:
    """One frame that couldn't be read: which of the wanted ones, the time asked for (seconds), and why."""

    index: int
    time: float
    reason: str


DEFAULT_LIMITS = Limits()
