"""Media in other places than the local file system: addresses whose scheme has an opener (`s3://bucket/talk.mp4`).

Nothing is fetched unless the program registered an opener for the scheme, so this package needs no network library. All readers of the
package open media by the functions here; a path without a registered scheme is a local file.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from .limits import Limits, MediaError, printable

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")
_SMALLEST, _LARGEST = 1 << 16, 1 << 22
_NEAR = 1 << 17
"""Bytes that a sequential reader may skip and still be one: the headers of a tar file are read between small members."""


class MediaFile(Protocol):
    """An open file of `size` bytes. Reads are positional, and threads may share it."""

    size: int

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, fewer only at the file's end. Raises MediaError."""
        ...

    def close(self) -> None: ...


Opener: TypeAlias = Callable[[str], MediaFile]
"""Opens an address; raises MediaError, which names the address, when nothing can be read there."""

_OPENERS: dict[str, Opener] = {}


def register_opener(scheme: str, opener: Opener | None) -> None:
    """Read addresses that begin with `scheme://` by `opener`, in this process; None: not any more.

    Raises ValueError for what no address begins with, TypeError for an opener that cannot be called.
    """
    if not _SCHEME.fullmatch(f"{scheme}://"):
        raise ValueError(f"scheme = {scheme!r}: need a word such as 's3', without '://'")
    if opener is not None and not callable(opener):  # pyright: ignore[reportUnnecessaryComparison]
        raise TypeError(f"opener = {opener!r}: need a function from an address to a MediaFile, or None")
    if opener is None:
        _OPENERS.pop(scheme.lower(), None)
    else:
        _OPENERS[scheme.lower()] = opener


def scheme_of(path: str) -> str | None:
    """`s3` of `s3://bucket/key`, in lower case; None for what is not an address."""
    found = _SCHEME.match(path)
    return found[1].lower() if found else None


def opener_of(path: str | os.PathLike[str]) -> Opener | None:
    """The opener of an address; None for a local path, and for a scheme without one."""
    return _OPENERS.get(scheme_of(path) or "") if isinstance(path, str) else None


def check_regular(path: str) -> None:
    """Raise OSError unless a regular file is at the local `path`: opening a FIFO would wait for a writer."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is not a regular file but a folder, a pipe or a device")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is an address that can be read."""
    return opener_of(path) is not None


def open_remote(path: str | os.PathLike[str]) -> MediaFile | None:
    """The open file of an address; None for a local path, and for a scheme without an opener. Raises MediaError."""
    opener = opener_of(path)
    return None if opener is None else opener(str(path))


def read_whole(path: str | os.PathLike[str], limits: Limits) -> bytes | None:
    """The content of an address; None as `open_remote`. Raises MediaError, also when it is empty or over `limits.max_bytes`."""
    file = open_remote(path)
    if file is None:
        return None
    try:
        limits.check_bytes(file.size, printable(str(path)))
        return file.read(0, file.size)
    finally:
        file.close()


def open_stream(path: str | os.PathLike[str]) -> Any:
    """What libraries that take a path or a binary file can read: a stream of an address, or the local path itself. Raises MediaError."""
    file = open_remote(path)
    return path if file is None else io.BufferedReader(MediaStream(file, str(path)), _SMALLEST)


class MediaStream(io.RawIOBase):
    """A media file as a binary stream. A reader that goes through it in order gets ever larger reads, up to 4 MiB at once."""

    def __init__(self, file: MediaFile, name: str) -> None:
        self.file, self.name = file, name
        self._place = 0
        self._start, self._kept = 0, b""
        self._ahead = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = offset + (0, self._place, self.file.size)[whence]
        if place < 0:
            raise ValueError(f"{self.name}: no byte {place}")
        self._place = place
        return place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        at = self._place - self._start
        if not 0 <= at < len(self._kept):
            self._fill(len(view))
            at = 0
        piece = self._kept[at : at + len(view)]
        view[: len(piece)] = piece
        self._place += len(piece)
        return len(piece)

    def readall(self) -> bytes:
        data = self.file.read(self._place, max(0, self.file.size - self._place))
        self._place += len(data)
        return data

    def _fill(self, wanted: int) -> None:
        if self._place >= self.file.size:
            self._start, self._kept = self._place, b""
            return
        skipped = self._place - self._start - len(self._kept)
        in_order = bool(self._kept) and 0 <= skipped <= _NEAR
        self._ahead = min(max(2 * self._ahead, _SMALLEST), _LARGEST) if in_order else 0
        self._start, self._kept = self._place, self.file.read(self._place, max(wanted, self._ahead))

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def check_local(path: str, what: str) -> None:
    """Raise MediaError when `path` is an address; `what` says why it can't be."""
    if is_remote(path):
        raise MediaError(f"{printable(path)}: {what}; copy it to a local disk and give its path")
