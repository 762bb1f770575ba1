"""The `moof` boxes of a fragmented MP4: samples in runs, with defaults from the fragment and the track (ISO/IEC 14496-12, 8.8)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .source import Damaged, boxes
from .track import Unsupported

_NOT_SYNC = 0x10000 | 0x1000000  # sample_is_non_sync_sample, or it depends on others


@dataclass
class Fragments:
    """Samples read so far. defaults: (duration, size, flags) of `trex`."""

    track_id: int
    defaults: tuple[int, int, int]
    max_samples: int
    parts: list[tuple[NDArray, NDArray, NDArray, NDArray]] = field(default_factory=list)
    next_time: int = 0
    count: int = 0

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
        """(composition times, sync, offsets, sizes), each [n] in decode order."""
        if not self.parts:
            empty = np.zeros(0, np.int64)
            return empty, np.zeros(0, bool), empty, empty
        times, sync, offsets, sizes = (np.concatenate(column) for column in zip(*self.parts))
        return times, sync, offsets, sizes


def read_fragment(moof: bytes, offset: int, found: Fragments) -> None:
    """Add the samples of one `moof` (bytes with its header) that begins at `offset`."""
    implicit = offset  # without a base, data follows the previous track fragment's
    for kind, traf in boxes(memoryview(moof)[8:]):
        if kind == b"traf":
            implicit = _read_traf(list(boxes(traf)), offset, implicit, found)


def _read_traf(parts: list[tuple[bytes, memoryview]], moof: int, implicit: int, found: Fragments) -> int:
    tfhd = next((body for kind, body in parts if kind == b"tfhd"), None)
    if tfhd is None or len(tfhd) < 8:
        raise Damaged("a fragment has no header")
    selected = int.from_bytes(tfhd[4:8], "big") == found.track_id
    flags = int.from_bytes(tfhd[1:4], "big")
    at = 8
    base = moof if flags & 0x20000 else implicit
    if flags & 0x01:
        base = int.from_bytes(tfhd[at : at + 8], "big")
        at += 8
    at += 4 * bool(flags & 0x02)
    duration, size, sample_flags = found.defaults
    if flags & 0x08:
        duration, at = int.from_bytes(tfhd[at : at + 4], "big"), at + 4
    if flags & 0x10:
        size, at = int.from_bytes(tfhd[at : at + 4], "big"), at + 4
    if flags & 0x20:
        sample_flags = int.from_bytes(tfhd[at : at + 4], "big")
    position = base
    for kind, body in parts:
        if kind == b"tfdt" and selected:
            found.next_time = int.from_bytes(body[4:12] if body[0] == 1 else body[4:8], "big")
        elif kind == b"trun":
            position = _read_trun(body, base, position, (duration, size, sample_flags), found if selected else None)
        elif kind == b"senc" and selected:
            raise Unsupported("encrypted")
    return position


def _read_trun(trun: memoryview, base: int, position: int, defaults: tuple[int, int, int], found: Fragments | None) -> int:
    """Add one run of samples; returns the offset at which its data end."""
    flags, n = int.from_bytes(trun[1:4], "big"), int.from_bytes(trun[4:8], "big")
    at = 8
    if flags & 0x01:
        position, at = base + int.from_bytes(trun[at : at + 4], "big", signed=True), at + 4
    first_flags = None
    if flags & 0x04:
        first_flags, at = int.from_bytes(trun[at : at + 4], "big"), at + 4
    columns = [bit for bit in (0x100, 0x200, 0x400, 0x800) if flags & bit]
    if at + 4 * n * len(columns) > len(trun) or (not columns and n > 1 << 20):
        raise Damaged("a run of samples is shorter than its count")
    table = np.frombuffer(trun, ">u4", n * len(columns), at).reshape(n, len(columns)).astype(np.int64)
    values = {bit: table[:, i] for i, bit in enumerate(columns)}
    sizes = values.get(0x200, np.full(n, defaults[1], np.int64))
    end = position + int(sizes.sum())
    if found is None or n == 0:
        return end
    found.count += n
    if found.count > found.max_samples:
        raise Damaged(f"more than {found.max_samples} samples")
    durations = values.get(0x100, np.full(n, defaults[0], np.int64))
    sample_flags = values.get(0x400, np.full(n, defaults[2], np.int64)).copy()
    if first_flags is not None:
        sample_flags[0] = first_flags
    times = found.next_time + np.cumsum(durations) - durations
    found.next_time += int(durations.sum())
    if 0x800 in values:
        times = times + values[0x800].astype(np.int32)
    found.parts.append((times, (sample_flags & _NOT_SYNC) == 0, position + np.cumsum(sizes) - sizes, sizes))
    return end
