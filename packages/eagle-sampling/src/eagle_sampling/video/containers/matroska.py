"""Matroska and WebM (RFC 9559): facts from the header; exact times from the header of every block (`matroska_blocks`)."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from ...limits import Limits
from .matroska_blocks import scan_blocks
from .source import Damaged, Source
from .track import Track, Unsupported, colour_options

_CODECS = {
    b"V_MPEG4/ISO/AVC": "h264",
    b"V_MPEGH/ISO/HEVC": "hevc",
    b"V_VP8": "vp8",
    b"V_VP9": "vp9",
    b"V_AV1": "av1",
}
_SEGMENT, _INFO, _TRACKS, CLUSTER, _CUES, _SEEK_HEAD = 0x18538067, 0x1549A966, 0x1654AE6B, 0x1F43B675, 0x1C53BB6B, 0x114D9B74
_MAX_HEADER = 1 << 26


@dataclass
class Header:
    """What the elements before the clusters state about the video track, and where clusters are."""

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
    colour: dict[str, str] = field(default_factory=dict)
    clusters: list[tuple[int, int]] = field(default_factory=list)  # (start of the body, end)
    cues: list[int] = field(default_factory=list)  # ticks of keyframes
    cue_data: bytes = b""  # the body of the cues
    segment: int = 0  # start of the segment's body, to which positions are relative
    segment_end: int = 0
    cut: bool = False
    unknown: tuple[str, ...] = ()


def read_matroska(source: Source, limits: Limits, *, exact: bool = True) -> Track:
    """The only default video track; without `exact` no cluster is opened, and `ticks` are those of the keyframes in the cues.

    Raises Unsupported for what libavformat has to read, Damaged for what cannot be read.
    """
    header = read_header(source, walk=exact)
    if not exact:
        ticks = np.unique(np.array(header.cues, np.int64))
        return track_of(header, ticks, np.ones(len(ticks), bool), None, None, 0)
    offsets, sizes, times, keys, lost = scan_blocks(source, header.clusters, header.number, limits)
    return track_of(header, times, keys, offsets, sizes, lost or int(header.cut))


def track_of(
    header: Header,
    ticks: NDArray[np.int64],
    sync: NDArray[np.bool_],
    offsets: NDArray[np.int64] | None,
    sizes: NDArray[np.int64] | None,
    missing: int,
) -> Track:
    """The track of a header and of blocks, whose arrays have one length."""
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
        colour=header.colour,
        duration=header.duration,
        missing=missing,
        unknown=header.unknown,
        frame_duration=header.frame_duration / 1e9 if header.frame_duration else None,
        first=(int(offsets[0]), int(sizes[0])) if offsets is not None and sizes is not None and len(offsets) else None,
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


def children(data: bytes) -> list[tuple[int, bytes]]:
    """(id, body) of the elements in `data`. Raises Damaged for one that overruns it."""
    found, at = [], 0
    while at < len(data):
        kind, at = _vint(data, at, keep_marker=True)
        size, at = _vint(data, at)
        if size < 0 or at + size > len(data):
            raise Damaged(f"element {kind:#x} overruns its parent")
        found.append((kind, data[at : at + size]))
        at += size
        if len(found) > 1_000_000:
            raise Damaged("more than a million elements in one")
    return found


def element(source: Source, at: int) -> tuple[int, int, int]:
    """(id, start of the body, size or -1) of the element at `at`."""
    return element_of(os.pread(source.descriptor, 12, at) if source.remote is None else source.read(at, 12), at)


def element_of(head: bytes, at: int) -> tuple[int, int, int]:
    """The same by the element's first 12 bytes, fewer only at the file's end."""
    if head[:4] == b"\x1f\x43\xb6\x75" and head[4:5] > b"\x01":  # a cluster of known size: an hour has a thousand
        length = 9 - head[4].bit_length()
        size = int.from_bytes(head[4 : 4 + length], "big") ^ 1 << 7 * length
        if size != (1 << 7 * length) - 1 and len(head) == 12:
            return CLUSTER, at + 4 + length, size
    kind, after = _vint(head, 0, keep_marker=True)
    size, after = _vint(head, after)
    return kind, at + after, size


def read_header(source: Source, walk: bool) -> Header:
    """walk: go from cluster to cluster and note all; otherwise the first cluster ends it, and the cues are read."""
    header = Header()
    kind, body, size = element(source, 0)
    if kind != 0x1A45DFA3 or size < 0 or size > 1 << 16:
        raise Damaged("it has no EBML header")
    kind, at, size = element(source, body + size)
    if kind != _SEGMENT:
        raise Unsupported("no segment after the EBML header")
    first = header.segment = at
    end = header.segment_end = source.size if size < 0 else at + size
    header.cut = end > source.size
    cues_at = None
    seen: set[int] = set()
    while at + 2 <= min(end, source.size):
        try:
            kind, body, size = element(source, at)
        except Damaged:
            if header.clusters:  # invalid bytes after clusters: those before are used, but the file is incomplete
                header.cut = True
                break
            raise
        if kind == CLUSTER:
            if size < 0:
                raise Unsupported("clusters of unknown size")
            if not walk and header.codec:
                break
            header.clusters.append((body, body + size))
        elif size < 0:
            raise Unsupported("an element of unknown size")
        elif kind in (_INFO, _TRACKS, _CUES, _SEEK_HEAD) and kind not in seen:
            if body + size > source.size or size > _MAX_HEADER:
                raise Damaged("its header is cut off or over 64 MiB")
            seen.add(kind)
            data = source.read(body, size)
            if kind == _INFO:
                _read_info(data, header)
            elif kind == _TRACKS:
                _read_tracks(data, header)
            elif kind == _CUES and not walk:
                _read_cues(data, header)
            elif kind == _SEEK_HEAD:
                cues_at = _seek_to(data, _CUES)
        elif len(header.clusters) == 0 and len(seen) == 0 and body + size > source.size:
            raise Damaged("its first element is cut off")
        at = body + size
    if not walk and not header.cues and cues_at is not None and first + cues_at + 12 < source.size:
        kind, body, size = element(source, first + cues_at)
        if kind == _CUES and 0 <= size <= _MAX_HEADER:
            _read_cues(source.read(body, size), header)
    if _TRACKS not in seen:
        raise Damaged("it names no tracks")
    if not header.codec:
        raise Unsupported("no video track that is supported")
    if header.duration is not None:
        header.duration *= header.scale / 1e9
    return header


def _read_info(data: bytes, header: Header) -> None:
    for kind, body in children(data):
        if kind == 0x2AD7B1:
            header.scale = int.from_bytes(body, "big")
        elif kind == 0x4489:
            header.duration = _float(body)
    if not 0 < header.scale <= 10**9:
        raise Damaged(f"its timestamp scale is {header.scale}")


def _float(body: bytes) -> float:
    value = struct.unpack(">f" if len(body) == 4 else ">d", body)[0] if len(body) in (4, 8) else 0.0
    return value if 0 <= abs(value) < 1e15 else 0.0


def _read_tracks(data: bytes, header: Header) -> None:
    videos: list[dict[int, bytes]] = []
    for kind, entry in children(data):
        parts = dict(children(entry)) if kind == 0xAE else {}
        if int.from_bytes(parts.get(0x83, b""), "big") == 1:
            videos.append(parts)
    for flag in (0xB9, 0x88):  # enabled, default: 1 unless stated
        videos = [parts for parts in videos if parts.get(flag, b"\1") != b"\0"] or videos
    if len(videos) > 1:
        raise Unsupported("several video tracks")
    for parts in videos:
        codec = parts.get(0x86, b"").rstrip(b"\0")
        if codec not in _CODECS:
            raise Unsupported(f"codec {codec!r}")
        if 0x6D80 in parts or 0x56AA in parts or (0x23314F in parts and _float(parts[0x23314F]) != 1.0):
            raise Unsupported("compressed, delayed or stretched blocks")
        header.codec = _CODECS[codec]
        header.number = int.from_bytes(parts.get(0xD7, b""), "big")
        header.extradata = parts.get(0x63A2, b"")
        header.frame_duration = int.from_bytes(parts.get(0x23E383, b""), "big")
        if header.codec in ("h264", "hevc") and not header.extradata:
            raise Unsupported("no codec configuration")
        if not 0 < header.number < 127:
            raise Unsupported(f"track number {header.number}")
        _read_video(dict(children(parts.get(0xE0, b""))), header)


def _read_video(video: dict[int, bytes], header: Header) -> None:
    numbers = {kind: int.from_bytes(body, "big") for kind, body in video.items() if len(body) <= 8}
    header.width, header.height = numbers.get(0xB0, 0), numbers.get(0xBA, 0)
    if any(numbers.get(kind) for kind in (0x54AA, 0x54BB, 0x54CC, 0x54DD)):
        raise Unsupported("cropped")
    across, down = numbers.get(0x54B0, header.width), numbers.get(0x54BA, header.height)
    if numbers.get(0x54B2, 0) in (0, 3) and across and down and header.width and header.height:
        header.aspect = Fraction(across * header.height, down * header.width)
    if 0x55B0 in video:
        said = {kind: int.from_bytes(body, "big") for kind, body in children(video[0x55B0]) if len(body) <= 8}
        header.colour = colour_options(said.get(0x55B1, 2), said.get(0x55B9, 0), (said.get(0x55B7, 0), said.get(0x55B8, 0)))
    projection = dict(children(video.get(0x7670, b"")))
    if projection:
        yaw, pitch, roll = (_float(projection.get(kind, bytes(4))) for kind in (0x7673, 0x7674, 0x7675))
        if yaw or pitch or roll % 90 or int.from_bytes(projection.get(0x7671, b""), "big"):
            header.unknown = ("rotation",)
        else:
            header.rotation = int(-roll % 360)


def _read_cues(data: bytes, header: Header) -> None:
    header.cue_data = data
    number, end = header.number, len(data)
    at = 6 if data[:2] == b"\xbf\x84" else 0  # a CRC-32
    found: list[int] = []
    while at + 9 < end:  # as muxers write them: point, time, positions, track, all with one-byte sizes
        time_end = at + 4 + (data[at + 3] & 0x7F)
        if data[at] != 0xBB or data[at + 2] != 0xB3 or not data[at + 1] & data[at + 3] & 0x80 or time_end + 4 >= end:
            break
        if data[time_end] != 0xB7 or data[time_end + 2 : time_end + 4] != b"\xf7\x81":
            break
        if not number or data[time_end + 4] == number:
            found.append(int.from_bytes(data[at + 4 : time_end], "big"))
        at += 2 + (data[at + 1] & 0x7F)
    for kind, point in children(data[at:]):  # points that are written differently
        if kind == 0xBB:
            parts = children(point)
            tracks = [int.from_bytes(dict(children(body)).get(0xF7, b""), "big") for inner, body in parts if inner == 0xB7]
            if not number or number in tracks:
                found.append(int.from_bytes(dict(parts).get(0xB3, b""), "big"))
    header.cues += found


def _seek_to(data: bytes, wanted: int) -> int | None:
    for kind, entry in children(data):
        parts = dict(children(entry)) if kind == 0x4DBB else {}
        if int.from_bytes(parts.get(0x53AB, b""), "big") == wanted:
            return int.from_bytes(parts.get(0x53AC, b""), "big")
    return None
