"""Matroska and WebM (RFC 9559): facts from the header, exact times from the header of every block.

A scan has to hop from block to block, because nothing lists them; clusters are independent, though, so all of them are walked side by side,
one numpy step for the j-th element of every cluster. An hour of video takes some hundred steps instead of some hundred thousand.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ..limits import Limits
from .source import Damaged, Source
from .track import NotOurs, Track

_CODECS = {
    b"V_MPEG4/ISO/AVC": "h264",
    b"V_MPEGH/ISO/HEVC": "hevc",
    b"V_VP8": "vp8",
    b"V_VP9": "vp9",
    b"V_AV1": "av1",
}
_SEGMENT, _INFO, _TRACKS, _CLUSTER, _CUES, _SEEK_HEAD = 0x18538067, 0x1549A966, 0x1654AE6B, 0x1F43B675, 0x1C53BB6B, 0x114D9B74
_MAX_HEADER = 1 << 26
_GATHER = np.arange(24)
# Length in bytes of a variable-size integer by its first byte; 9 is not a length.
_LENGTH = np.array([9 - value.bit_length() if value else 9 for value in range(256)], np.int64)


@dataclass
class _Header:
    scale: int = 1_000_000  # nanoseconds per tick
    duration: float | None = None
    number: int = 0
    codec: str = ""
    width: int = 0
    height: int = 0
    extradata: bytes = b""
    frame_duration: int = 0
    rotation: int = 0
    aspect: Fraction = Fraction(1)
    clusters: list[tuple[int, int]] = field(default_factory=list)  # (start of the body, end)
    cues: list[int] = field(default_factory=list)  # ticks of keyframes
    cut: bool = False
    unknown: tuple[str, ...] = ()


def read_matroska(source: Source, limits: Limits, *, exact: bool = True) -> Track:
    """The first video track; without `exact` no cluster is opened, and `ticks` are those of the keyframes in the cues.

    Raises NotOurs for what libavformat has to read, Damaged for what can't be read.
    """
    header = _read_header(source, walk=exact)
    if not exact:
        ticks = np.unique(np.array(header.cues, np.int64))
        return _track(header, ticks, np.ones(len(ticks), bool), None, None, 0)
    offsets, sizes, times, keys, lost = _scan(source, header, limits)
    return _track(header, times, keys, offsets, sizes, lost or int(header.cut))


def _track(
    header: _Header,
    ticks: NDArray[np.int64],
    sync: NDArray[np.bool_],
    offsets: NDArray[np.int64] | None,
    sizes: NDArray[np.int64] | None,
    missing: int,
) -> Track:
    if len(sync):
        sync[0] = True
    return Track(
        container="matroska",
        codec=header.codec,
        width=header.width,
        height=header.height,
        unit=Fraction(header.scale, 10**9),
        ticks=ticks,
        sync=sync,
        offsets=offsets,
        sizes=sizes,
        extradata=header.extradata,
        rotation=header.rotation,
        pixel_aspect_ratio=header.aspect,
        duration=header.duration,
        missing=missing,
        unknown=header.unknown,
        frame_duration=header.frame_duration / 1e9 if header.frame_duration else None,
    )


def _vint(data: bytes, at: int, *, keep_marker: bool = False) -> tuple[int, int]:
    """(value, position after it) of the variable-size integer at `at`; value -1 for the size "unknown"."""
    if at >= len(data) or not data[at]:
        raise Damaged(f"no EBML integer at byte {at} of an element")
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big")
    if at + length > len(data):
        raise Damaged("an element is cut off")
    if keep_marker:
        return value, at + length
    mask = (1 << 7 * length) - 1
    return (-1 if value & mask == mask else value & mask), at + length


def _children(data: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at < len(data):
        kind, at = _vint(data, at, keep_marker=True)
        size, at = _vint(data, at)
        if size < 0 or at + size > len(data):
            raise Damaged(f"element {kind:#x} overruns its parent")
        found.append((kind, data[at : at + size]))
        at += size
        if len(found) > 1_000_000:
            raise Damaged("too many elements side by side")
    return found


def _element(source: Source, at: int) -> tuple[int, int, int]:
    """(id, start of the body, size or -1) of the element at `at`."""
    head = source.read(at, 12)
    kind, after = _vint(head, 0, keep_marker=True)
    size, after = _vint(head, after)
    return kind, at + after, size


def _read_header(source: Source, walk: bool) -> _Header:
    header = _Header()
    kind, body, size = _element(source, 0)
    if kind != 0x1A45DFA3 or size < 0 or size > 1 << 16:
        raise Damaged("it has no EBML header")
    kind, at, size = _element(source, body + size)
    if kind != _SEGMENT:
        raise NotOurs("no segment after the EBML header")
    first = at
    end = source.size if size < 0 else at + size
    header.cut = end > source.size
    cues_at = None
    seen: set[int] = set()
    while at + 2 <= min(end, source.size):
        try:
            kind, body, size = _element(source, at)
        except Damaged:
            if header.clusters:  # rubbish after clusters: what came before stands, but the file isn't whole
                header.cut = True
                break
            raise
        if kind == _CLUSTER:
            if size < 0:
                raise NotOurs("clusters of unknown size")
            if not walk and header.codec:
                break
            header.clusters.append((body, body + size))
        elif size < 0:
            raise NotOurs("an element of unknown size")
        elif kind in (_INFO, _TRACKS, _CUES, _SEEK_HEAD) and kind not in seen:
            if body + size > source.size or size > _MAX_HEADER:
                raise Damaged("its header is cut off or over 64 MiB")
            seen.add(kind)
            data = source.read(body, size)
            if kind == _INFO:
                _read_info(data, header)
            elif kind == _TRACKS:
                _read_tracks(data, header)
            elif kind == _CUES:
                _read_cues(data, header)
            else:
                cues_at = _seek_to(data, _CUES)
        elif len(header.clusters) == 0 and len(seen) == 0 and body + size > source.size:
            raise Damaged("its first element is cut off")
        at = body + size
    if not walk and not header.cues and cues_at is not None and first + cues_at + 12 < source.size:
        kind, body, size = _element(source, first + cues_at)
        if kind == _CUES and 0 <= size <= _MAX_HEADER:
            _read_cues(source.read(body, size), header)
    if _TRACKS not in seen:
        raise Damaged("it names no tracks")
    if not header.codec:
        raise NotOurs("no video track that we can see")
    if header.duration is not None:
        header.duration *= header.scale / 1e9
    return header


def _read_info(data: bytes, header: _Header) -> None:
    for kind, body in _children(data):
        if kind == 0x2AD7B1:
            header.scale = int.from_bytes(body, "big")
        elif kind == 0x4489:
            header.duration = _float(body)
    if not 0 < header.scale <= 10**9:
        raise Damaged(f"its timestamp scale is {header.scale}")


def _float(body: bytes) -> float:
    value = struct.unpack(">f" if len(body) == 4 else ">d", body)[0] if len(body) in (4, 8) else 0.0
    return value if 0 <= abs(value) < 1e15 else 0.0


def _read_tracks(data: bytes, header: _Header) -> None:
    for kind, entry in _children(data):
        if kind != 0xAE:
            continue
        parts = dict(_children(entry))
        if int.from_bytes(parts.get(0x83, b""), "big") != 1:
            continue
        codec = parts.get(0x86, b"").rstrip(b"\0")
        if codec not in _CODECS:
            raise NotOurs(f"codec {codec!r}")
        if 0x6D80 in parts or 0x56AA in parts or (0x23314F in parts and _float(parts[0x23314F]) != 1.0):
            raise NotOurs("compressed, delayed or stretched blocks")
        header.codec = _CODECS[codec]
        header.number = int.from_bytes(parts.get(0xD7, b""), "big")
        header.extradata = parts.get(0x63A2, b"")
        header.frame_duration = int.from_bytes(parts.get(0x23E383, b""), "big")
        if header.codec in ("h264", "hevc") and not header.extradata:
            raise NotOurs("no codec configuration")
        if not 0 < header.number < 127:
            raise NotOurs(f"track number {header.number}")
        _read_video(dict(_children(parts.get(0xE0, b""))), header)
        return


def _read_video(video: dict[int, bytes], header: _Header) -> None:
    numbers = {kind: int.from_bytes(body, "big") for kind, body in video.items() if len(body) <= 8}
    header.width, header.height = numbers.get(0xB0, 0), numbers.get(0xBA, 0)
    if any(numbers.get(kind) for kind in (0x54AA, 0x54BB, 0x54CC, 0x54DD)):
        raise NotOurs("cropped")
    across, down = numbers.get(0x54B0, header.width), numbers.get(0x54BA, header.height)
    if numbers.get(0x54B2, 0) in (0, 3) and across and down and header.width and header.height:
        header.aspect = Fraction(across * header.height, down * header.width)
    projection = dict(_children(video.get(0x7670, b"")))
    if projection:
        yaw, pitch, roll = (_float(projection.get(kind, bytes(4))) for kind in (0x7673, 0x7674, 0x7675))
        if yaw or pitch or roll % 90 or int.from_bytes(projection.get(0x7671, b""), "big"):
            header.unknown = ("rotation",)
        else:
            header.rotation = int(-roll % 360)


def _read_cues(data: bytes, header: _Header) -> None:
    for kind, point in _children(data):
        if kind == 0xBB:
            parts = _children(point)
            tracks = [int.from_bytes(dict(_children(body)).get(0xF7, b""), "big") for kind, body in parts if kind == 0xB7]
            if not header.number or header.number in tracks:
                header.cues.append(int.from_bytes(dict(parts).get(0xB3, b""), "big"))


def _seek_to(data: bytes, wanted: int) -> int | None:
    for kind, entry in _children(data):
        parts = dict(_children(entry)) if kind == 0x4DBB else {}
        if int.from_bytes(parts.get(0x53AB, b""), "big") == wanted:
            return int.from_bytes(parts.get(0x53AC, b""), "big")
    return None


def _scan(
    source: Source, header: _Header, limits: Limits
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], int]:
    """(offsets, sizes, ticks, keyframe, lost) of the track's blocks in file order."""
    empty = np.zeros(0, np.int64)
    if not header.clusters:
        return empty, empty, empty, np.zeros(0, bool), 0
    starts = np.array([start for start, _ in header.clusters], np.int64)
    ends = np.minimum(np.array([end for _, end in header.clusters], np.int64), source.size)
    lost = sum(end > source.size for _, end in header.clusters)
    with mmap.mmap(source.descriptor, 0, access=mmap.ACCESS_READ) as mapped:
        data = np.frombuffer(mapped, np.uint8)
        try:
            found, spoilt = _walk(data, starts, ends, header.number, limits)
        finally:
            del data
    if not len(found):
        return empty, empty, empty, np.zeros(0, bool), int(lost)
    found = found[:, np.argsort(found[0], kind="stable")]
    offsets, sizes, cluster_times, flags = found
    keys = (flags & 0x80) != 0
    keys[np.searchsorted(offsets, spoilt) - 1] = False  # a block followed by its group's ReferenceBlock
    present = offsets + sizes <= source.size
    lost = int(lost) + int(len(present) - np.count_nonzero(present))
    return offsets[present], sizes[present], cluster_times[present], keys[present], lost


def _walk(
    data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64], number: int, limits: Limits
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Blocks of the track as int64 [4, n] (offset, size, ticks, flags), and the positions of ReferenceBlocks."""
    positions, clusters = starts.copy(), np.arange(len(starts))
    cluster_times = np.zeros(len(starts), np.int64)
    blocks: list[NDArray[np.int64]] = []
    references: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    last = len(data) - 1
    budget = 8 * limits.max_frames
    count = 0
    shifts = 8 * (8 - np.minimum(np.arange(10), 8))
    while True:
        alive = positions < ends[clusters]
        if not alive.all():
            positions, clusters = positions[alive], clusters[alive]
        if not len(positions):
            break
        budget -= len(positions)
        if budget < 0:
            raise Damaged("its clusters hold more elements than any video needs")
        window = data[np.minimum(positions[:, None] + _GATHER, last)]
        kind = window[:, 0].astype(np.int64)
        id_length = _LENGTH[kind]
        wide = id_length > 1
        if wide.any():
            rows = np.flatnonzero(wide)
            if (id_length[rows] > 4).any():
                raise Damaged("a cluster holds bytes that are no element")
            kind[rows] = 0
            for row in rows.tolist():  # rare: two-byte ids inside block groups
                window[row] = data[np.minimum(positions[row] + id_length[row] - 1 + _GATHER, last)]
        length = _LENGTH[window[:, 1]]
        if (length > 8).any():
            raise Damaged("a cluster holds an element without a size")
        raw = np.ascontiguousarray(window[:, 1:9]).view(">u8")[:, 0].astype(np.uint64)
        size = ((raw >> shifts[length].astype(np.uint64)) & ((np.uint64(1) << (7 * length).astype(np.uint64)) - np.uint64(1))).astype(
            np.int64
        )
        body = positions + id_length + length
        if (size > ends[clusters] - body).any():
            past = size > ends[clusters] - body
            if (ends[clusters[past]] < last + 1).any():
                raise Damaged("an element overruns its cluster")
        is_time = kind == 0xE7
        if is_time.any():
            for row in np.flatnonzero(is_time).tolist():
                cluster_times[clusters[row]] = int.from_bytes(bytes(data[body[row] : body[row] + min(int(size[row]), 8)]), "big")
        is_block = (kind == 0xA3) | (kind == 0xA1)
        if is_block.any():
            rows = np.flatnonzero(is_block)
            inner = window[rows[:, None], 1 + length[rows][:, None] + _GATHER[:4]]
            ours = inner[:, 0] == 0x80 | number
            rows, inner = rows[ours], inner[ours].astype(np.int64)
            if len(rows):
                if (inner[:, 3] & 0x06).any():
                    raise NotOurs("laced video blocks")
                relative = ((inner[:, 1] << 8 | inner[:, 2]) ^ 0x8000) - 0x8000
                flags = np.where(kind[rows] == 0xA1, 0x80, inner[:, 3])
                blocks.append(np.stack([body[rows] + 4, size[rows] - 4, cluster_times[clusters[rows]] + relative, flags]))
                count += len(rows)
                if count > limits.max_frames:
                    raise Damaged(f"more than {limits.max_frames} frames")
        if (kind == 0xFB).any():
            references.append(positions[kind == 0xFB])
        positions = np.where(kind == 0xA0, body, body + size)  # a block group is entered, everything else is stepped over
    found = np.concatenate(blocks, axis=1) if blocks else np.zeros((4, 0), np.int64)
    if (found[1] < 0).any():
        raise Damaged("a block is shorter than its header")
    return found, np.concatenate(references)
