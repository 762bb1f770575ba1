"""Bounds on what a media file may cost, and the error that every unusable file raises."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from operator import index
from typing import ClassVar, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray


class MediaError(ValueError):
    """A media file cannot be used. The message names the file, the place in it, the reason and, where there is one, the next step.

    Base class of the package's own exceptions; `exit_code` is what a command should end with.
    """

    exit_code: ClassVar[int] = 3


class MediaUnavailable(Exception):
    """Storage that can't be reached now, which says nothing about the file; raised by openers of addresses. Not a MediaError, so that a
    network that fails doesn't make good data bad."""


class Limits(NamedTuple):
    """Bounds that are checked before memory is spent; a breach raises `MediaError`.

    max_pixels: width * height of one image or frame; the default is the bound of Pillow (0.5 GB as RGB).
    max_bytes: size of an encoded file, an LMDB value or one video packet.
    max_frames: frames of one video, pages of one document.
    max_side: longest side in pixels. None: only `max_pixels` applies.
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
        """Raise `MediaError` when `size` is 0 or over the limit."""
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
    """One frame that could not be read: its index among the wanted ones, the requested time (seconds), and the reason."""

    index: int
    time: float
    reason: str


DEFAULT_LIMITS = Limits()


def checked_out(out: object, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """`out` as an array of pixels to fill. Raises ValueError when it is not a writable uint8 array of this shape."""
    if not isinstance(out, np.ndarray):
        raise ValueError(f"out is {type(out).__name__}: need a numpy array, uint8 {shape}")
    array = cast("NDArray[np.uint8]", out)
    if array.shape != shape or array.dtype != np.uint8:
        raise ValueError(f"out is {array.dtype} {array.shape}: need uint8 {shape}")
    if not array.flags.writeable:
        raise ValueError(f"out is read-only: need an array that can be written to, uint8 {shape}; pass a copy")
    return array


def whole_number(name: str, value: object) -> int:
    """`value` as a Python integer. Raises TypeError, which names it."""
    try:
        return index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(f"{name} = {value!r}: need a whole number") from None


def path_text(path: object, accepted: str) -> str:
    """`path` as text. Raises TypeError, which names what is `accepted`, when it is not a path."""
    if isinstance(path, str):
        return path
    if isinstance(path, os.PathLike) and isinstance(text := os.fspath(path), str):
        return text
    hint = ""
    if hasattr(path, "read"):
        hint = "; pass its bytes, or write them to a file" if "bytes" in accepted else "; write its content to a file"
    raise TypeError(f"{type(path).__name__} is not accepted here: need {accepted}{hint}")


def printable(name: str) -> str:
    """A path or key that any stream can print: no zero bytes or lone surrogates, at most 300 characters (it may be megabytes of base64)."""
    name = name if len(name) <= 300 else f"{name[:300]}... ({len(name)} characters)"
    return name.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def unreadable(path: str, error: OSError | ValueError) -> MediaError:
    """The MediaError of a file that cannot be opened. ValueError: a path that no file can have (a zero byte, a lone surrogate)."""
    name = printable(path)
    if "://" in path and isinstance(error, OSError):
        return MediaError(f"{name}: is an address; media are read from files: download it first and give its path")
    reason = (error.strerror or error) if isinstance(error, OSError) else f"it can't be a file's name ({error})"
    hint = "; is it base64? Images are given as paths, bytes or LMDB keys" if getattr(error, "errno", None) == errno.ENAMETOOLONG else ""
    return MediaError(f"{name}: can't be read: {reason}{hint}")
