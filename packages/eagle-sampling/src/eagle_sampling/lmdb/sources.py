"""Images of folders, tar and Parquet shards under their keys, always in the same order.

Nothing is skipped silently: a file that is named like an image and cannot be read gives a MediaError in place of its value, and a shard
that cannot be read to its end raises one.
"""

from __future__ import annotations

import importlib
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from ..limits import MediaError

Value: TypeAlias = "bytes | MediaError"

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))


def read_sources(names: Iterable[str]) -> Iterator[tuple[str, str, Value]]:
    """(source, key, encoded image or the error in its place) of all images. Raises MediaError for a source that cannot be read.

    A source without an image gives one MediaError under its own name: it is probably the wrong folder.
    """
    for name in names:
        nothing = True
        for key, value in _source(Path(name)):
            nothing = False
            yield name, key, value
        if nothing:
            yield name, name, MediaError(f"holds no image; images are files that end in {', '.join(sorted(_SUFFIXES))}, or Parquet rows")


def _source(path: Path) -> Iterator[tuple[str, Value]]:
    if path.is_dir():
        return _folder(str(path), "", frozenset())
    if path.suffix == ".tar" and path.is_file():
        return _tar(path)
    if path.suffix == ".parquet" and path.is_file():
        return _parquet(path)
    if _is_image(path.name) and path.is_file():
        return iter([(path.name, _file(str(path)))])
    raise MediaError(
        f"{path}: " + ("is not a folder, image, .tar or .parquet file" if path.exists() else "there is no such file or folder")
    )


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _SUFFIXES


def _file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
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
        elif _is_image(entry.name):
            yield key, _file(entry.path) if is_file else MediaError("is a link to nothing, or not a regular file")


def _tar(path: Path) -> Iterator[tuple[str, Value]]:
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if (member.isfile() or member.islnk() or member.issym()) and _is_image(member.name):
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
        return MediaError(f"is a link to {member.linkname!r}, which is not a file in this tar")
    return file.read()


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


def _parquet(path: Path) -> Iterator[tuple[str, Value]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        types = importlib.import_module("pyarrow").types
    except ImportError as error:
        raise MediaError(f"{path}: reading Parquet needs pyarrow; install it with: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            yield from _rows(file, types, path)
    except MediaError:
        raise
    except Exception as error:  # ArrowInvalid, OSError, UnicodeDecodeError and others, depending on which bytes are damaged
        raise MediaError(f"{path}: can't be read as a Parquet file: {error}") from error


def _rows(file: Any, types: Any, path: Path) -> Iterator[tuple[str, Value]]:
    schema = file.schema_arrow

    def binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    column = next((f.name for f in schema if binary(f.type)), None)
    nested = next((f.name for f in schema if types.is_struct(f.type) and any(c.name == "bytes" and binary(c.type) for c in f.type)), None)
    if column is None and nested is None:
        raise MediaError(f"{path}: has no column of bytes; its columns are {', '.join(schema.names)}")
    keys = next((name for name in ("key", "path", "name", "id") if name in schema.names), None)
    wanted = [name for name in (column or nested, keys) if name is not None]
    row = 0
    for batch in file.iter_batches(batch_size=64, columns=wanted):
        for item in batch.to_pylist():
            value = item[wanted[0]]
            inner = value if isinstance(value, dict) else {"bytes": value}
            key = inner.get("path") if keys is None else item[keys]
            yield f"{path.stem}:{row}" if key is None or key == "" else str(key), inner["bytes"] or b""
            row += 1
