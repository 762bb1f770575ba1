"""Blocks of remote files on a local disk, shared by all processes of a host.

One sparse file for each version of a remote file: a table with a slot of 8 bytes for each block, then the blocks at their places. A slot is
written after its block and holds the block's checksum, so a process that is killed, or a disk that loses power, leaves slots that are
empty or don't agree, and the block is fetched again. Processes write the same bytes to the same places, so they need no lock; the one that
removes files holds one. Its size is that of the blocks that the files hold.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import time
import zlib
from pathlib import Path

logger = logging.getLogger(__name__)

BLOCK = 1 << 16
_SLOT = struct.Struct("<II")
_FULL = 0xEA61E
_PAGE = 4096
_TOUCHED = 60.0
"""Seconds after which a use is noted again."""
_STEP = 32
"""A process looks at the size of the cache whenever it has written this part of it."""


class BlockCache:
    """The cache of a folder, at most `limit` bytes (and what each process writes between two looks, 1/32 of it)."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._written = limit  # look before the first block: an earlier run may have had a larger limit
        self._warned = False

    def entry(self, address: str, size: int, version: str) -> Entry:
        """The blocks of one version of a file."""
        name = hashlib.blake2b(f"{address}\n{size}\n{version}".encode(), digest_size=20).hexdigest()
        return Entry(self, self.folder / name[:2] / name, size)

    def wrote(self, size: int) -> None:
        self._written += size
        if self._written >= self.limit // _STEP:
            self._written = 0
            self._shrink()

    def failed(self, error: OSError) -> None:
        """Reading goes on without the cache."""
        if not self._warned:
            self._warned = True
            logger.warning("%s: can't keep what was fetched (%s); it is fetched again each time", self.folder, error.strerror or error)

    def _shrink(self) -> None:
        """Remove the files that were not used for longest until the others fit; nothing when another process does it just now."""
        try:
            with open(self.folder / ".lock", "ab") as lock:
                if not _try_lock(lock):
                    return
                files: list[tuple[float, int, Path]] = []
                for folder in os.scandir(self.folder):
                    if folder.is_dir(follow_symlinks=False):
                        for file in os.scandir(folder.path):
                            stat = file.stat(follow_symlinks=False)
                            files.append((stat.st_mtime, stat.st_blocks * 512, Path(file.path)))
                used = sum(size for _, size, _ in files)
                if used <= self.limit:
                    return
                for _, size, path in sorted(files):
                    path.unlink(missing_ok=True)
                    used -= size
                    if used <= self.limit * 0.9:
                        return
        except OSError as error:
            self.failed(error)


class Entry:
    """The blocks of one file. Not for several threads at once."""

    def __init__(self, cache: BlockCache, path: Path, size: int) -> None:
        self.cache, self.path, self.size = cache, path, size
        blocks = -(-size // BLOCK)
        self.first_byte = -(-blocks * _SLOT.size // _PAGE) * _PAGE  # of the blocks, behind the table
        self.descriptor = -1

    def load(self, first: int, stop: int) -> list[bytes | None]:
        """Blocks first ... stop - 1; None for those that are not there."""
        missing: list[bytes | None] = [None] * (stop - first)
        try:
            if not self._open(create=False):
                return missing
            table = os.pread(self.descriptor, (stop - first) * _SLOT.size, first * _SLOT.size)
            slots = list(_SLOT.iter_unpack(table[: len(table) // _SLOT.size * _SLOT.size]))
            for place, (checksum, mark) in enumerate(slots):
                if mark != _FULL:
                    continue
                at = (first + place) * BLOCK
                block = os.pread(self.descriptor, min(BLOCK, self.size - at), self.first_byte + at)
                if zlib.crc32(block) == checksum:
                    missing[place] = block
        except OSError as error:
            self.cache.failed(error)
        return missing

    def store(self, first: int, data: bytes) -> None:
        """Keep blocks from `first` on."""
        try:
            if not self._open(create=True):
                return
            view = memoryview(data)
            _write(self.descriptor, view, self.first_byte + first * BLOCK)
            slots = b"".join(_SLOT.pack(zlib.crc32(view[at : at + BLOCK]), _FULL) for at in range(0, len(data), BLOCK))
            _write(self.descriptor, memoryview(slots), first * _SLOT.size)
        except OSError as error:
            self.cache.failed(error)
            return
        self.cache.wrote(len(data))

    def _open(self, *, create: bool) -> bool:
        """Whether the file is open; one that was removed meanwhile is given up, so that its blocks are freed."""
        if self.descriptor >= 0:
            if os.fstat(self.descriptor).st_nlink:
                return True
            self.close()
        if create:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
        except FileNotFoundError:
            return False
        stat = os.fstat(self.descriptor)
        if stat.st_size != self.first_byte + self.size:
            os.ftruncate(self.descriptor, self.first_byte + self.size)
        elif time.time() - stat.st_mtime > _TOUCHED:
            os.utime(self.descriptor)
        return True

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __del__(self) -> None:
        self.close()


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


def _try_lock(file: object) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[arg-type]
    except BlockingIOError:
        return False
    return True
