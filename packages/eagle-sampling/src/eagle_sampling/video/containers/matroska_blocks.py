"""Every block of a Matroska track. The file has no list of them, so a scan goes from block to block.

Clusters are independent, so all are scanned in parallel, one numpy step for the j-th element of every cluster: an hour of video takes a
hundred steps instead of a hundred thousand.
"""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

from ...limits import Limits
from .source import Damaged, Source
from .track import Unsupported

# Length in bytes of a variable-size integer by its first byte; 9 is not a length.
_LENGTH = np.array([9 - value.bit_length() if value else 9 for value in range(256)], np.uint64)
_ONE, _TOP = np.uint64(1), np.uint64(56)
_TIME, _SIMPLE_BLOCK, _GROUP, _BLOCK, _REFERENCE = (np.uint64(kind) for kind in (0xE7, 0xA3, 0xA0, 0xA1, 0xFB))
# Elements per cluster; a damaged file could otherwise take arbitrarily many steps.
_MAX_STEPS = 1_000_000

Blocks = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], int]


def scan_blocks(source: Source, clusters: list[tuple[int, int]], number: int, limits: Limits) -> Blocks:
    """(offsets, sizes, ticks, keyframe, lost) of track `number`'s blocks in file order.

    clusters: (start of the body, end). lost: clusters and blocks that extend beyond the file's end.
    Raises Damaged when an element has no valid size, Unsupported for laced blocks.
    """
    empty = np.zeros(0, np.int64)
    if not clusters:
        return empty, empty, empty, np.zeros(0, bool), 0
    lost = sum(end > source.size for _, end in clusters)
    with mmap.mmap(source.descriptor, 0, access=mmap.ACCESS_READ) as mapped:
        walk = _Walk(mapped, source.size, clusters, number, limits)
        try:
            walk.run()
        finally:
            walk.words = None
    offsets, sizes, ticks, keys = walk.blocks()
    if len(offsets) and int(sizes.min()) < 0:
        raise Damaged("a block is shorter than its header")
    present = offsets + sizes <= source.size
    lost += int(len(present) - np.count_nonzero(present))
    return offsets[present], sizes[present], ticks[present], keys[present], lost


class _Walk:
    """State of the parallel scan. `words[p]` is the big-endian 64-bit number at byte p of the file, for any p."""

    def __init__(self, mapped: mmap.mmap, size: int, clusters: list[tuple[int, int]], number: int, limits: Limits):
        self.size = size
        self.words: NDArray | None = np.ndarray((max(size - 7, 1),), ">u8", mapped if size >= 8 else bytes(8), strides=(1,))
        self.tail = int.from_bytes(mapped[max(size - 8, 0) :].rjust(8, b"\0"), "big")
        self.starts = np.array([start for start, _ in clusters], np.int64)
        self.ends = np.minimum(np.array([end for _, end in clusters], np.int64), size)
        self.cut = np.array([end > size for _, end in clusters], bool)
        self.times = np.zeros(len(clusters), np.int64)
        self.filled = np.zeros(len(clusters), np.int64)  # blocks found so far in each cluster
        self.number = np.uint64(0x80 | number)
        self.max_blocks = limits.max_frames
        self.found: list[tuple[NDArray[np.int64], ...]] = []  # cluster, rank in it, offset, size, ticks, key
        self.references: list[NDArray[np.int64]] = []

    def gather(self, positions: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The 8 bytes at each position as a number, zeros past the end of the file."""
        assert self.words is not None
        last = len(self.words) - 1
        if not len(positions) or int(positions.max()) <= last:
            return self.words[positions].astype(np.uint64)
        over = np.minimum(np.maximum(positions - last, 0), 8).astype(np.uint64) * np.uint64(8)
        values = self.words[np.minimum(positions, last)].astype(np.uint64)
        return np.where(over >= 64, np.uint64(0), values << np.minimum(over, np.uint64(63)))

    def run(self) -> None:
        positions, rows, ends = self.starts, np.arange(len(self.starts)), self.ends
        for _ in range(_MAX_STEPS):
            alive = positions < ends
            if not alive.all():
                positions, rows, ends = positions[alive], rows[alive], ends[alive]
            if not len(positions):
                return
            positions = self._step(positions, rows, ends)
        raise Damaged(f"a cluster holds more than {_MAX_STEPS} elements")

    def _step(self, positions: NDArray[np.int64], rows: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """One element of each cluster; returns where the next ones begin."""
        word = self.gather(positions)
        kind = word >> _TOP
        id_length = _LENGTH[kind]
        if int(id_length.max()) > 1:  # two-byte ids inside block groups: not needed here
            if int(id_length.max()) > 4:
                raise Damaged("a cluster holds bytes that are not an element")
            kind = np.where(id_length > 1, np.uint64(0), kind)
        sized = self.gather(positions + id_length.astype(np.int64))
        length = _LENGTH[sized >> _TOP]
        if int(length.max()) > 8:
            raise Damaged("a cluster holds an element without a size")
        size = ((sized >> (np.uint64(64) - (length << np.uint64(3)))) & ((_ONE << length * np.uint64(7)) - _ONE)).astype(np.int64)
        body = positions + (id_length + length).astype(np.int64)
        past = size > ends - body
        if past.any() and not self.cut[rows[past]].all():
            raise Damaged("an element overruns its cluster")
        simple, grouped = kind == _SIMPLE_BLOCK, kind == _BLOCK
        block = simple | grouped
        if block.all():
            self._take(body, size, rows, simple)
            return body + size
        if block.any():
            self._take(body[block], size[block], rows[block], simple[block])
        timed = kind == _TIME
        if timed.any():
            value = self.gather(body[timed])
            width = np.clip(size[timed], 1, 8).astype(np.uint64) << np.uint64(3)
            self.times[rows[timed]] = (value >> (np.uint64(64) - width)).astype(np.int64)
        if (kind == _REFERENCE).any():
            self.references.append(positions[kind == _REFERENCE])
        return np.where(kind == _GROUP, body, body + size)  # a block group is entered, other elements are skipped

    def _take(self, body: NDArray[np.int64], size: NDArray[np.int64], rows: NDArray[np.int64], simple: NDArray[np.bool_]) -> None:
        head = self.gather(body)
        selected = head >> _TOP == self.number
        if not selected.all():
            if not selected.any():
                return
            head, body, size, rows, simple = head[selected], body[selected], size[selected], rows[selected], simple[selected]
        flags = (head >> np.uint64(32)).astype(np.int64) & 0xFF
        if (flags & 0x06).any():
            raise Unsupported("laced video blocks")
        relative = ((head >> np.uint64(40)).astype(np.int64) & 0xFFFF ^ 0x8000) - 0x8000
        rank = self.filled[rows]
        self.filled[rows] = rank + 1
        self.max_blocks -= len(rows)
        if self.max_blocks < 0:
            raise Damaged("more frames than the limit allows")
        self.found.append((rows, rank, body + 4, size - 4, self.times[rows] + relative, (flags & 0x80 != 0) | ~simple))

    def blocks(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """(offsets, sizes, ticks, keyframe) in file order."""
        if not self.found:
            empty = np.zeros(0, np.int64)
            return empty, empty, empty, np.zeros(0, bool)
        rows, rank, *columns = (np.concatenate(column) for column in zip(*self.found))
        place = (np.cumsum(self.filled) - self.filled)[rows] + rank
        ordered = []
        for column in columns:
            values = np.empty_like(column)
            values[place] = column
            ordered.append(values)
        offsets, sizes, ticks, keys = ordered
        if self.references:  # a block that its group's ReferenceBlock follows depends on others
            keys[np.searchsorted(offsets, np.concatenate(self.references)) - 1] = False
        return offsets, sizes, ticks, keys
