"""Bytes of a file by offset, for parsers: reads that end at the file's end, and ISO boxes as (type, body) pairs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

from ...files import MediaFile, check_regular, open_remote


class Damaged(Exception):
    """The file's headers contradict themselves; the caller adds the file's name."""


class Source:
    """An open file. Reads are positional, so that threads may share it.

    window: bytes that a reader of neighbouring parts best reads at once.
    """

    descriptor = -1  # for `__del__` when opening failed
    remote: MediaFile | None = None
    window = 1 << 18  # an hour of 360p has 5 kB a frame, so one read serves many

    def __init__(self, path: str):
        self.path = path
        self.remote = open_remote(path)
        if self.remote is not None:
            self.size = self.remote.size
            self.window = 1 << 22  # a request takes as long as 1 MB
            return
        check_regular(path)
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.size = os.fstat(self.descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`; fewer only at the file's end."""
        if self.remote is not None:
            return self.remote.read(offset, max(0, min(size, self.size - offset)))
        parts = []
        while size > 0 and offset < self.size:
            part = os.pread(self.descriptor, min(size, 1 << 30), offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def copy_whole(self) -> None:
        """Replace a remote file by a local copy without a name, for containers whose index is spread over all of the file."""
        if self.remote is None:
            return
        with tempfile.TemporaryFile() as file:
            for at in range(0, self.size, self.window):
                file.write(self.remote.read(at, min(self.window, self.size - at)))
            file.flush()
            self.close()
            self.descriptor = os.dup(file.fileno())

    def close(self) -> None:
        if self.remote is not None:
            self.remote.close()
            self.remote = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def boxes(data: memoryview, limit: int = 100_000) -> Iterator[tuple[bytes, memoryview]]:
    """Children of an ISO base media box, (type, body). Raises Damaged for a child that overruns its parent."""
    at, end = 0, len(data)
    for _ in range(limit):
        if at + 8 > end:
            return
        size, head = int.from_bytes(data[at : at + 4], "big"), 8
        kind = bytes(data[at + 4 : at + 8])
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        elif size == 0:
            size = end - at
        if size < head or at + size > end:
            raise Damaged(f"box {kind!r} has {size} bytes where {end - at} are left")
        yield kind, data[at + head : at + size]
        at += size
    raise Damaged(f"more than {limit} boxes in one")
