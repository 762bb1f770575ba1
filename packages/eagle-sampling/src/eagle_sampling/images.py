"""Images by reference: a path, bytes, or a key in an LMDB; sizes from the header, pixels within limits.

`image_size` is what the displayed image has (after EXIF orientation); `open_image` leaves the orientation to whoever cuts tiles
(`eagle_tiling.load_rgb` applies it), so that its pixels are the file's.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image, ImageFile, UnidentifiedImageError

from . import lmdb_store
from .image_header import HeaderError, exif_swaps_axes, parse_size
from .limits import DEFAULT_LIMITS, Limits, MediaError

ImageRef: TypeAlias = "str | os.PathLike[str] | bytes | dict[str, Any]"

_HEAD_BYTES = 4096


def describe(ref: ImageRef) -> str:
    """What an error calls this image."""
    if isinstance(ref, (bytes, bytearray, memoryview)):
        return f"<{len(ref)} bytes>"
    if isinstance(ref, dict):
        return f"{ref.get('lmdb_file')}[{ref.get('lmdb_key')!r}]"
    return os.fspath(ref)


def resolve(path: str | os.PathLike[str], root: str | os.PathLike[str] | None) -> str:
    """`path`, below `root` when it is relative and there is a root."""
    return os.fspath(path) if root is None else os.path.join(root, path)


def read_bytes(ref: ImageRef, *, root: str | os.PathLike[str] | None = None, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The encoded image. Raises MediaError when it is missing, empty, unreadable or over `limits.max_bytes`."""
    if isinstance(ref, (bytes, bytearray, memoryview)):
        data = bytes(ref)
    elif isinstance(ref, dict):
        data = lmdb_store.get(resolve(_field(ref, "lmdb_file"), root), _field(ref, "lmdb_key"))
    else:
        path = resolve(ref, root)
        try:
            with open(path, "rb", buffering=0) as file:
                limits.check_bytes(os.fstat(file.fileno()).st_size, path)
                data = file.readall()
        except OSError as error:
            raise MediaError(f"{path}: can't be read: {error.strerror or error}") from error
    limits.check_bytes(len(data), describe(ref))
    return data


def image_size(ref: ImageRef, *, root: str | os.PathLike[str] | None = None) -> tuple[int, int]:
    """(width, height) in pixels as displayed, from the header alone.

    Formats without a parser of ours go through Pillow's lazy open, which decodes nothing either. Sizes aren't held against any limit here,
    so that a planner can say what it refuses. Raises MediaError when the file is missing, or its header is damaged or of no known format.
    """
    if isinstance(ref, (str, os.PathLike)):
        return _file_size(resolve(ref, root))
    data = read_bytes(ref, root=root)
    name = describe(ref)
    return _parsed(data[:_HEAD_BYTES], lambda offset, size: data[offset : offset + size], name) or _pillow_size(io.BytesIO(data), name)


def _file_size(path: str) -> tuple[int, int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise MediaError(f"{path}: can't be read: {error.strerror or error}") from error
    try:
        head = os.read(descriptor, _HEAD_BYTES)
        size = _parsed(head, lambda offset, count: os.pread(descriptor, count, offset), path)
    except OSError as error:
        raise MediaError(f"{path}: can't be read: {error.strerror or error}") from error
    finally:
        os.close(descriptor)
    return size or _pillow_size(path, path)


def _parsed(head: bytes, read: Any, name: str) -> tuple[int, int] | None:
    if not head:
        raise MediaError(f"{name}: is empty (0 bytes)")
    try:
        size = parse_size(head, read)
    except HeaderError as error:
        raise MediaError(f"{name}: no size in its header: {error}") from error
    if size is not None and (size[0] <= 0 or size[1] <= 0):
        raise MediaError(f"{name}: its header says {size[0]} x {size[1]} pixels; the file is damaged")
    return size


def _pillow_size(source: Any, name: str) -> tuple[int, int]:
    with _pillow(source, name) as image:
        size = image.size
        exif = image.info.get("exif", b"")
    exif = exif[6:] if exif[:6] == b"Exif\0\0" else exif
    return (size[1], size[0]) if exif_swaps_axes(exif) else size


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
    image = _pillow(io.BytesIO(data), name)
    limits.check_size(*image.size, name)
    if at_least is not None and image.format == "JPEG":
        image.draft(None, at_least)
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        raise MediaError(f"{name}: can't be decoded: {error}") from error
    return image


def _pillow(source: Any, name: str) -> ImageFile.ImageFile:
    try:
        return Image.open(source)
    except UnidentifiedImageError as error:
        raise MediaError(f"{name}: is not an image of a known format, or is damaged in its first bytes") from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name}: {error} Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise MediaError(f"{name}: can't be opened as an image: {error}") from error


def _field(ref: dict[str, Any], key: str) -> str:
    if key not in ref:
        raise MediaError(f"an LMDB image reference needs 'lmdb_file' and 'lmdb_key'; this one has {sorted(ref)}")
    return ref[key]


def exists(ref: ImageRef, *, root: str | os.PathLike[str] | None = None) -> bool:
    """True when the bytes could be there: a path that exists, an LMDB that holds the key, or bytes."""
    if isinstance(ref, (bytes, bytearray, memoryview)):
        return True
    if isinstance(ref, dict):
        return lmdb_store.has(resolve(_field(ref, "lmdb_file"), root), _field(ref, "lmdb_key"))
    return Path(resolve(ref, root)).is_file()
