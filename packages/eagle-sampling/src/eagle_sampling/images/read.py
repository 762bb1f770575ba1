"""Sizes of images from their headers, and pixels within limits.

`image_size` is the size of the displayed image (after EXIF orientation). `open_image` does not apply the orientation, so that its pixels
are the file's; `eagle_tiling.load_rgb` applies it. The orientation is that of the EXIF block in the format's own place, as in browsers:
not XMP's, not one stored as PNG text. Pillow may raise any exception on damaged files; here it becomes a MediaError.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image, ImageFile, UnidentifiedImageError

from ..files import check_regular, is_remote, open_remote, open_stream
from ..limits import DEFAULT_LIMITS, Limits, MediaError, MediaUnavailable, printable, unreadable
from .ancillary import without_ancillary
from .header import HeaderError, Reader, exif_orientation, parse_size
from .heic import is_heic, open_heic, require_heic
from .reference import ImageRef, describe, read_bytes, resolve
from .tar import find_member

_HEAD_BYTES = 4096


def image_size(ref: ImageRef, *, root: str | os.PathLike[str] | None = None) -> tuple[int, int]:
    """(width, height) in pixels as displayed, from the header alone.

    Formats that `header` does not parse, and headers that it cannot read, go through Pillow's lazy open, which decodes nothing either.
    No limit applies here, so that a planner can report what it refuses.

    Raises:
        MediaError: the file is missing or an address, or its header is damaged or of no known format.
        TypeError: `ref` is not a reference, for example an open file.
    """
    if isinstance(ref, (str, os.PathLike)):
        return _file_size(resolve(ref, root))
    if isinstance(ref, dict) and "tar" in ref and (size := _member_size(ref, root)) is not None:
        return size
    data = read_bytes(ref, root=root)
    size, problem = _parsed(data[:_HEAD_BYTES], lambda offset, count: data[offset : offset + count], lambda: len(data), describe(ref))
    return size or _pillow_size(io.BytesIO(data), describe(ref), problem)


def _file_size(path: str) -> tuple[int, int]:
    if is_remote(path):
        with open_stream(path) as file:  # the parts of a PNG are read in order, and so ahead

            def read(offset: int, count: int) -> bytes:
                file.seek(offset)
                return file.read(count)

            size, problem = _parsed(read(0, _HEAD_BYTES), read, lambda: file.seek(0, os.SEEK_END), path)
        return size or _pillow_size(path, printable(path), problem)
    try:
        # A FIFO without a writer is empty instead of a wait; regular files are as without the flag.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            head = os.read(descriptor, _HEAD_BYTES)
            if not head:
                check_regular(path)
            size, problem = _parsed(
                head, lambda offset, count: os.pread(descriptor, count, offset), lambda: os.lseek(descriptor, 0, os.SEEK_END), path
            )
        finally:
            os.close(descriptor)
    except MediaError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    return size or _pillow_size(path, printable(path), problem)


def _member_size(ref: dict[str, Any], root: str | os.PathLike[str] | None) -> tuple[int, int] | None:
    """From the head of a member alone; None where that isn't enough."""
    path, start, length = find_member(ref, root)
    if (remote := open_remote(path)) is not None:

        def fetch(offset: int, count: int) -> bytes:
            return remote.read(start + offset, max(min(count, length - offset), 0))

        try:
            return _parsed(fetch(0, _HEAD_BYTES), fetch, lambda: length, describe(ref))[0]
        finally:
            remote.close()

    def read(offset: int, count: int) -> bytes:
        return os.pread(descriptor, max(min(count, length - offset), 0), start + offset)

    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            return _parsed(read(0, _HEAD_BYTES), read, lambda: length, describe(ref))[0]
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unreadable(path, error) from error


def _parsed(head: bytes, read: Reader, file_size: Callable[[], int], name: str) -> tuple[tuple[int, int] | None, str]:
    """The size, or None and the reason ("" for a format that is not parsed). Raises MediaError for HEIC that could not be decoded."""
    if not head:
        return None, "is empty (0 bytes)"
    if head[4:8] == b"ftyp" and is_heic(head):
        require_heic(printable(name))
    try:
        return parse_size(head, read, file_size), ""
    except HeaderError as error:
        return None, f"no size in its header: {error}"


def _pillow_size(source: Any, name: str, problem: str) -> tuple[int, int]:
    try:
        with open_lazily(source, name) as image:
            size, exif = image.size, image.info.get("exif") or b""
    except MediaError as error:
        if not problem:
            raise
        raise MediaError(f"{name}: {problem}") from error
    return (size[1], size[0]) if exif_orientation(exif) >= 5 else size


def open_image(
    ref: ImageRef,
    *,
    root: str | os.PathLike[str] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    at_least: tuple[int, int] | None = None,
) -> Image.Image:
    """The decoded image as the file stores it: EXIF orientation not applied, mode unchanged, independent of the file.

    at_least: (width, height) in the stored orientation; a JPEG is decoded at 1/2, 1/4 or 1/8 of its size when both sides stay at least
    this large (libjpeg's scaled decoding); it has no effect on other formats.

    Of a PNG or JPEG that Pillow refuses for its metadata (over Pillow's limits, or broken), the picture is read without them.

    Raises:
        MediaError: the file is missing, an address, truncated, damaged, of no known format, or over the limits (checked before decoding).
        ValueError: `at_least` is not two numbers above 0.
        TypeError: `ref` is not a reference, for example an open file.
    """
    if at_least is not None:
        _check_sides(at_least)
    name = describe(ref)
    data = read_bytes(ref, root=root, limits=limits)
    try:
        return _decoded(data, name, limits, at_least)
    except MediaError as error:
        reduced = without_ancillary(data) if error.__cause__ is not None else None  # not what is over the limits
        if reduced is None or len(reduced) == len(data):
            raise
        try:
            return _decoded(reduced, name, limits, at_least)
        except MediaError:
            raise error from error.__cause__


def _check_sides(at_least: tuple[int, int]) -> None:
    try:
        width, height = at_least
        right = width > 0 and height > 0
    except (TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(f"at_least = {at_least!r}: need (width, height) in pixels, both above 0")


def _decoded(data: bytes, name: str, limits: Limits, at_least: tuple[int, int] | None) -> Image.Image:
    if is_heic(data[:_HEAD_BYTES]):
        with decoding(f"{name}: can't be decoded"):
            return open_heic(data, name, limits)
    image = open_lazily(io.BytesIO(data), name)
    limits.check_size(*image.size, name)
    with decoding(f"{name}: can't be decoded"):
        if at_least is not None and image.format == "JPEG":
            image.draft(None, at_least)
        image.load()
    return image


@contextmanager
def decoding(problem: str) -> Iterator[None]:
    """Turns any exception inside into a MediaError that begins with `problem`.

    On damaged files Pillow's decoders were seen to raise OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError,
    RuntimeError, NotImplementedError and DecompressionBombError.
    """
    try:
        yield
    except (MediaError, MediaUnavailable):
        raise
    except Exception as error:
        said = str(error) if isinstance(error, (OSError, SyntaxError, ValueError)) else f"{type(error).__name__}: {error}"
        raise MediaError(f"{problem}: {said}") from error


def open_lazily(source: Any, name: str) -> ImageFile.ImageFile:
    """Pillow's image of a path, an address or a binary file, not decoded yet. Raises MediaError."""
    with decoding(f"{name}: can't be opened as an image"):
        try:
            opened = open_stream(source) if isinstance(source, str) else source
            if isinstance(opened, str):
                check_regular(opened)
            return Image.open(opened)
        except UnidentifiedImageError as error:
            raise MediaError(f"{name}: is not an image of a known format, or is damaged in its first bytes") from error
        except Image.DecompressionBombError as error:
            raise MediaError(f"{name}: {error} Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS") from error
