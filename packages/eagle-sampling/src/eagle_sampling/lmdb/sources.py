"""Images of folders, tar and Parquet shards under their keys, always in the same order.

A file is an image by its content, whatever its name. Nothing is skipped silently: a file that is named like an image and cannot be read
gives a MediaError in place of its value, any other file a NotAnImage, and a shard that cannot be read to its end raises a MediaError.
"""

from __future__ import annotations

import importlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from ..limits import MediaError

Value: TypeAlias = "bytes | MediaError"

_HEAD = 4096
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
#: Of icons, whose pictures may lie behind the bytes that are looked at.
_ICON = b"\0\0\1\0"
_BRANDS = frozenset((b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix"))
_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))


class NotAnImage(MediaError):
    """A file whose name and content are not those of an image: it is counted, not a problem."""


def read_sources(names: Iterable[str], column: str | None = None) -> Iterator[tuple[str, str, Value]]:
    """(source, key, encoded image or the error in its place) of all files. Raises MediaError for a source that cannot be read.

    A source without an image gives one MediaError under its own name: it is probably the wrong folder.
    column: that of the images in Parquet shards; needed where several could be.
    """
    for name in names:
        nothing = True
        for key, value in _source(Path(name), column):
            nothing = nothing and isinstance(value, NotAnImage)
            yield name, key, value
        if nothing:
            yield name, name, MediaError("holds no image; images are files of any name whose content is one, or Parquet rows")


def _source(path: Path, column: str | None) -> Iterator[tuple[str, Value]]:
    if path.is_dir():
        return _folder(str(path), "", frozenset())
    if path.suffix == ".tar" and path.is_file():
        return _tar(path)
    if path.suffix == ".parquet" and path.is_file():
        return _parquet(path, column)
    if path.is_file() and not isinstance(value := _file(str(path)), NotAnImage):
        return iter([(path.name, value)])
    raise MediaError(
        f"{path}: " + ("is not a folder, image, .tar or .parquet file" if path.exists() else "there is no such file or folder")
    )


def _is_image(name: str, head: bytes) -> bool:
    """head: the first 4 KiB. Pillow decides on formats without a signature here, from their headers; it decodes nothing."""
    if os.path.splitext(name)[1].lower() in _SUFFIXES or head.startswith((*_SIGNATURES, _ICON)):
        return True
    if (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or (head[4:8] == b"ftyp" and head[8:12] in _BRANDS):
        return True
    try:
        with Image.open(io.BytesIO(head)):
            return True
    except Exception:  # anything else is not an image; damaged headers make Pillow raise various exceptions
        return False


def _content(name: str, file: Any) -> Value:
    """The bytes of an open file, of which only the first are read when it is not an image."""
    head = file.read(_HEAD)
    return head + file.read() if _is_image(name, head) else NotAnImage("is not an image")


def _file(path: str) -> Value:
    try:
        with open(path, "rb") as file:
            return _content(path, file)
    except OSError as error:  # stops the build, which continues here once the disk or the permission is repaired
        raise MediaError(f"{path}: can't be read: {error.strerror or error}") from error


def _folder(path: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, Value]]:
    """Files by name, links followed except those back to a parent folder. above: device and inode of the parent folders."""
    try:
        here = os.stat(path)
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise MediaError(f"{path}: can't be listed: {error.strerror or error}") from error
    identity = (here.st_dev, here.st_ino)
    if identity in above:
        return
    for entry in entries:
        key = prefix + entry.name
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            is_folder = is_file = False
        if is_folder:
            yield from _folder(entry.path, key + "/", above | {identity})
        else:
            yield key, _file(entry.path) if is_file else MediaError("is a link to nothing, or not a regular file")


def _tar(path: Path) -> Iterator[tuple[str, Value]]:
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isdir():
                    yield member.name, _member(archive, member)
            assert archive.fileobj is not None
            _require_end(archive.fileobj, archive.offset, path)
    except MediaError:
        raise
    except Exception as error:  # a damaged header makes tarfile raise various exceptions
        raise MediaError(f"{path}: can't be read as a tar file: {error}") from error


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Value:
    try:
        file = archive.extractfile(member)
    except (KeyError, RecursionError):
        file = None
    if file is None:
        what = (
            f"a link to {member.linkname!r}, which is not a file in this tar" if member.islnk() or member.issym() else "not a regular file"
        )
        return MediaError(f"is {what}")
    return _content(member.name, file)


def _require_end(file: Any, offset: int, path: Path) -> None:
    """Raise MediaError unless zeros follow from `offset`, where listing ended, to the file's end.

    tarfile ends its list without an error at a damaged header, at one that is cut off, and at the first end mark of concatenated tars.
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise MediaError(f"{path}: ends at byte {offset} without an end mark (zeros), so it may be cut off; copy or pack it again")
    if any(block):
        raise MediaError(f"{path}: the header at byte {offset} is damaged, so that later members can't be found; copy or pack it again")
    while block:
        if block.count(0) < len(block):
            raise MediaError(f"{path}: data follow its end mark at byte {offset}; if it is several tars in one file, give them one by one")
        block = file.read(1 << 20)


def _parquet(path: Path, column: str | None) -> Iterator[tuple[str, Value]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        types = importlib.import_module("pyarrow").types
    except ImportError as error:
        raise MediaError(f"{path}: reading Parquet needs pyarrow; install it with: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            yield from _rows(file, types, path, column)
    except MediaError:
        raise
    except Exception as error:  # ArrowInvalid, OSError, UnicodeDecodeError and others, depending on which bytes are damaged
        raise MediaError(f"{path}: can't be read as a Parquet file: {error}") from error


def _rows(file: Any, types: Any, path: Path, column: str | None) -> Iterator[tuple[str, Value]]:
    image = _image_column(file, types, path, column)
    schema = file.schema_arrow
    keys = next((name for name in ("key", "path", "name", "id") if name in schema.names), None)
    wanted = [name for name in (image, keys) if name is not None]
    row = 0
    for batch in file.iter_batches(batch_size=64, columns=wanted):
        for item in batch.to_pylist():
            value = item[wanted[0]]
            inner = value if isinstance(value, dict) else {"bytes": value}
            key = inner.get("path") if keys is None else item[keys]
            yield f"{path.stem}:{row}" if key is None or key == "" else str(key), inner["bytes"] or b""
            row += 1


def _image_column(file: Any, types: Any, path: Path, column: str | None) -> str:
    """The column of images: `column`, or the only one of bytes (or structs with `bytes`) whose first value is an image.

    Raises MediaError when there is none, or when several could be and `column` does not say which.
    """

    def binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    def nested(kind: Any) -> bool:
        return types.is_struct(kind) and any(child.name == "bytes" and binary(child.type) for child in kind)

    schema = file.schema_arrow
    found = [field.name for field in schema if binary(field.type) or nested(field.type)]
    if column is not None:
        if column not in found:
            raise MediaError(f"{path}: has no column {column!r} of bytes; its columns of bytes are {', '.join(found) or 'none'}")
        return column
    if not found:
        raise MediaError(f"{path}: has no column of bytes; its columns are {', '.join(schema.names)}")
    if len(found) > 1:
        rows = next(file.iter_batches(batch_size=16, columns=found), None)
        if rows is not None:
            images = [name for name in found if _holds_images(rows.column(name).to_pylist())]
            found = images or found
    if len(found) > 1:
        raise MediaError(
            f"{path}: the columns {', '.join(found)} could each be that of the images; say which: eagle lmdb build --column {found[0]}"
        )
    return found[0]


def _holds_images(values: list[Any]) -> bool:
    """Whether the first value that is not empty is an image."""
    for value in values:
        data = value.get("bytes") if isinstance(value, dict) else value
        if data:
            return _is_image("", data)
    return False
