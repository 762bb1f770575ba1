"""Images by reference: a path, bytes, or a key in an LMDB; sizes from the header, pixels within limits.

`image_size` is what the displayed image has (after EXIF orientation); `open_image` leaves the orientation to whoever cuts tiles
(`eagle_tiling.load_rgb` applies it), so that its pixels are the file's. The orientation is that of the EXIF block in the format's own
place, as in browsers: not XMP's, not one kept as PNG text. Pillow may raise anything on damaged files; here it is a MediaError.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from PIL import Image, ImageFile, UnidentifiedImageError

from . import lmdb_store
from .image_header import HeaderError, Reader, exif_orientation, parse_size
from .limits import DEFAULT_LIMITS, Limits, MediaError

ImageRef: TypeAlias = "str | os.PathLike[str] | bytes | dict[str, Any]"

_HEAD_BYTES = 4096


def describe(ref: ImageRef) -> str:
    """What an error calls this image: text that any stream can print."""
    if isinstance(ref, (bytes, bytearray, memoryview)):
        return f"<{len(ref)} bytes>"
    if isinstance(ref, dict):
        return _printable(f"{ref.get('lmdb_file')}[{ref.get('lmdb_key')!r}]")
    return _printable(os.fspath(ref))


def _printable(name: str) -> str:
    """A path or key as any stream can print it: no lone surrogates, and not megabytes of base64 that stand in a path's place."""
    name = name if len(name) <= 300 else f"{name[:300]}... ({len(name)} characters)"
    return name.encode("utf-8", "backslashreplace").decode()


def resolve(path: str | os.PathLike[str], root: str | os.PathLike[str] | None) -> str:
    """`path`, below `root` when it is relative and there is a root."""
    return os.fspath(path) if root is None else os.path.join(root, path)


def read_bytes(ref: ImageRef, *, root: str | os.PathLike[str] | None = None, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The encoded image. Raises MediaError when it is missing, empty, unreadable or over `limits.max_bytes`."""
    if isinstance(ref, (bytes, bytearray, memoryview)):
        data = bytes(ref)
    elif isinstance(ref, dict):
        data = _from_lmdb(ref, root, lmdb_store.get)
    else:
        path = resolve(ref, root)
        try:
            with open(path, "rb", buffering=0) as file:
                limits.check_bytes(os.fstat(file.fileno()).st_size, _printable(path))
                data = file.readall()
        except MediaError:
            raise
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from error
    limits.check_bytes(len(data), describe(ref))
    return data


def unreadable(path: str, error: OSError | ValueError) -> MediaError:
    """ValueError: a path that no file can have, with a zero byte or a lone surrogate."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    hint = "; is it base64? Images are given as paths, bytes or LMDB keys" if getattr(error, "errno", None) == errno.ENAMETOOLONG else ""
    return MediaError(f"{_printable(path)}: can't be read: {reason}{hint}")


def _from_lmdb(ref: dict[str, Any], root: str | os.PathLike[str] | None, look: Callable[[str, str | bytes], Any]) -> Any:
    if "lmdb_file" not in ref or "lmdb_key" not in ref:
        raise MediaError(f"an LMDB image reference needs 'lmdb_file' and 'lmdb_key'; this one has {sorted(ref)}")
    if not isinstance(ref["lmdb_file"], (str, os.PathLike)):
        raise MediaError(f"{describe(ref)}: 'lmdb_file' must be a path")
    try:
        return look(resolve(ref["lmdb_file"], root), ref["lmdb_key"])
    except MediaError:
        raise
    except ValueError as error:  # a path with a zero byte or a lone surrogate
        raise MediaError(f"{describe(ref)}: can't be opened: {error}") from error


def image_size(ref: ImageRef, *, root: str | os.PathLike[str] | None = None) -> tuple[int, int]:
    """(width, height) in pixels as displayed, from the header alone.

    Formats without a parser of ours, and headers that ours don't understand, go through Pillow's lazy open, which decodes nothing either.
    Sizes aren't held against any limit here, so that a planner can say what it refuses. Raises MediaError when the file is missing, or its
    header is damaged or of no known format.
    """
    if isinstance(ref, (str, os.PathLike)):
        return _file_size(resolve(ref, root))
    data = read_bytes(ref, root=root)
    size, problem = _parsed(data[:_HEAD_BYTES], lambda offset, count: data[offset : offset + count], lambda: len(data))
    return size or _pillow_size(io.BytesIO(data), describe(ref), problem)


def _file_size(path: str) -> tuple[int, int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            head = os.read(descriptor, _HEAD_BYTES)
            size, problem = _parsed(
                head, lambda offset, count: os.pread(descriptor, count, offset), lambda: os.lseek(descriptor, 0, os.SEEK_END)
            )
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    return size or _pillow_size(path, _printable(path), problem)


def _parsed(head: bytes, read: Reader, file_size: Callable[[], int]) -> tuple[tuple[int, int] | None, str]:
    """The size, or None and why our parsers have none ("" for a format without one)."""
    if not head:
        return None, "is empty (0 bytes)"
    try:
        return parse_size(head, read, file_size), ""
    except HeaderError as error:
        return None, f"no size in its header: {error}"


def _pillow_size(source: Any, name: str, problem: str) -> tuple[int, int]:
    try:
        with open_lazily(source, name) as image:
            size, exif = image.size, image.info.get("exif", b"")
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
    """The decoded image, as the file stores it (EXIF orientation not applied, mode unchanged), closed to its file.

    at_least: (width, height) in the stored orientation; a JPEG is decoded at 1/2, 1/4 or 1/8 of its size when both sides stay at least
    this large (libjpeg's scaled decoding), other formats ignore it.
    Raises MediaError when the file is missing, truncated, damaged, of no known format, or over the limits (checked before decoding).
    """
    name = describe(ref)
    data = read_bytes(ref, root=root, limits=limits)
    image = open_lazily(io.BytesIO(data), name)
    limits.check_size(*image.size, name)
    with decoding(f"{name}: can't be decoded"):
        if at_least is not None and image.format == "JPEG":
            image.draft(None, at_least)
        image.load()
    return image


@contextmanager
def decoding(problem: str) -> Iterator[None]:
    """Whatever Pillow raises here becomes a MediaError that begins with `problem`.

    Its decoders raise OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, RuntimeError, NotImplementedError and
    DecompressionBombError on damaged files, so far.
    """
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        said = str(error) if isinstance(error, (OSError, SyntaxError, ValueError)) else f"{type(error).__name__}: {error}"
        raise MediaError(f"{problem}: {said}") from error


def open_lazily(source: Any, name: str) -> ImageFile.ImageFile:
    with decoding(f"{name}: can't be opened as an image"):
        try:
            return Image.open(source)
        except UnidentifiedImageError as error:
            raise MediaError(f"{name}: is not an image of a known format, or is damaged in its first bytes") from error
        except Image.DecompressionBombError as error:
            raise MediaError(f"{name}: {error} Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS") from error


def exists(ref: ImageRef, *, root: str | os.PathLike[str] | None = None) -> bool:
    """True when the bytes could be there: a path that exists, an LMDB that holds the key, or bytes."""
    if isinstance(ref, (bytes, bytearray, memoryview)):
        return True
    if isinstance(ref, dict):
        return _from_lmdb(ref, root, lmdb_store.has)
    return os.path.isfile(resolve(ref, root))
