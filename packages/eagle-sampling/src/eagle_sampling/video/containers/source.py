"""Bytes of a file by offset, for parsers: reads that end at the file's end, and ISO boxes as (type, body) pairs."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator


class Damaged(Exception):
    """The file's headers contradict themselves; the caller adds the file's name."""


class Source:
    """An open file. Reads are positional, so that threads may share it."""

    descriptor = -1  # for `__del__` when opening failed

    def __init__(self, path: str):
        self.path = path
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for a writer
            raise OSError("it is not a regular file but a folder, a pipe or a device")
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.size = os.fstat(self.descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`; fewer only at the file's end."""
        parts = []
        while size > 0 and offset < self.size:
            part = os.pread(self.descriptor, min(size, 1 << 30), offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
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
