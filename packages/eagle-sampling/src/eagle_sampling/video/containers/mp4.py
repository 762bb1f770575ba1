"""MP4 and MOV (ISO/IEC 14496-12): the sample tables of `moov`, anywhere in the file, and of every `moof` of a fragmented file.

Edit lists are applied as libavformat and players do: empty edits delay the start, one ordinary edit hides the frames outside it, and the
first frame shown appears when the edit begins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...limits import Limits
from .mp4_fragments import Fragments, read_fragment
from .source import Damaged, Source, boxes
from .track import Track, Unsupported, colour_options, orientation

MAX_HEADER = 1 << 28  # a `moov` of 256 MiB describes about 20 million frames
_CODECS = {
    b"avc1": ("h264", b"avcC"),
    b"avc3": ("h264", b"avcC"),
    b"hvc1": ("hevc", b"hvcC"),
    b"hev1": ("hevc", b"hvcC"),
    b"vp08": ("vp8", b""),
    b"vp09": ("vp9", b""),
    b"av01": ("av1", b"av1C"),
}


@dataclass
class _Header:
    """Fields of `moov` about a video track."""

    movie_scale: int = 0
    track_id: int = 0
    enabled: bool = True  # not a preview, a chapter picture or an alternative
    scale: int = 0
    duration: int = 0
    matrix: tuple[int, int, int, int] = (65536, 0, 0, 65536)
    tables: dict[bytes, memoryview] = field(default_factory=dict)
    edits: list[tuple[int, int, int]] = field(default_factory=list)  # (duration in movie units, media time, rate in 1/65536)
    defaults: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # `trex`: track -> (duration, size, flags)
    fragmented: bool = False


def read_mp4(source: Source, limits: Limits, *, positions: bool = True) -> Track:
    """The only enabled video track; without `positions` its offsets are read only when they are needed to see that the file is cut off.

    Raises Unsupported for what libavformat has to read, Damaged for what cannot be read.
    """
    moov, fragments, cut = _top_level(source)
    if moov is None:
        raise Damaged("its index (the moov box) is missing; the recording or the copy was cut off" if cut else "it has no moov box")
    header = _read_moov(moov)
    codec, width, height, aspect, extradata, colour = _description(header.tables.get(b"stsd"))
    samples = _tables(header, limits, None if positions else source.size, source.path)
    if fragments:
        if len(samples[0]):
            raise Unsupported("samples both in moov and in fragments")
        found = Fragments(header.track_id, header.defaults.get(header.track_id, (0, 0, 0)), limits.max_frames)
        for offset, size in fragments:
            read_fragment(source.read(offset, size), offset, found)
        samples = (*found.arrays(), None)
    composition, sync, offsets, sizes, first = samples
    shown = None
    if header.edits:
        composition, shown = _apply_edits(header, composition, bool(fragments))
    missing = 0
    if offsets is not None and sizes is not None:
        present = offsets + sizes <= source.size
        missing = int(len(present) - np.count_nonzero(present))
        present &= sizes > 0  # a sample without bytes has no frame: the one before stays on the screen, as in libavformat
        if not present.all():
            composition, sync, offsets, sizes = composition[present], sync[present], offsets[present], sizes[present]
            shown = None if shown is None else shown[present]
        first = (int(offsets[0]), int(sizes[0])) if len(offsets) else None
    rotation, mirrored, odd = orientation(header.matrix)
    return Track(
        container="mp4",
        codec=codec,
        width=width,
        height=height,
        unit=Fraction(1, header.scale),
        ticks=composition,
        sync=sync,
        shown=shown,
        offsets=offsets,
        sizes=sizes,
        extradata=extradata,
        rotation=rotation,
        mirrored=mirrored,
        pixel_aspect_ratio=aspect,
        colour=colour,
        duration=header.duration / header.scale if header.duration else None,
        missing=missing or int(cut and bool(fragments)),
        unknown=("rotation",) if odd else (),
        first=first,
    )


def _top_level(source: Source) -> tuple[memoryview | None, list[tuple[int, int]], bool]:
    """(moov's body, (offset, size) of every moof, whether the last box overruns the file's end)."""
    at = 0
    moov: memoryview | None = None
    fragments: list[tuple[int, int]] = []
    while at + 8 <= source.size:
        head = source.read(at, 16)
        size, skip, kind = int.from_bytes(head[:4], "big"), 8, head[4:8]
        if size == 1:
            size, skip = int.from_bytes(head[8:16], "big"), 16
        elif size == 0:
            size = source.size - at
        if size < skip:
            return moov, fragments, True
        if at + size > source.size and kind in (b"moov", b"moof"):
            return moov, fragments, True
        if kind == b"moov" and moov is None:
            if size > MAX_HEADER:
                raise Damaged(f"its index has {size} bytes, over the limit of {MAX_HEADER}")
            moov = memoryview(source.read(at + skip, size - skip))
        elif kind == b"moof":
            fragments.append((at, size))
            if len(fragments) > 1_000_000 or size > MAX_HEADER:
                raise Damaged("its fragments are too many or too large")
        at += size
    return moov, fragments, at > source.size


def _read_moov(moov: memoryview) -> _Header:
    header = _Header()
    tracks: list[_Header] = []
    for kind, body in boxes(moov):
        if kind == b"mvhd":
            header.movie_scale = int.from_bytes(body[20:24] if body[0] else body[12:16], "big")
        elif kind == b"trak":
            track = _read_trak(body)
            if track is not None:
                tracks.append(track)
        elif kind == b"mvex":
            header.fragmented = True
            for child, trex in boxes(body):
                if child == b"trex" and len(trex) >= 24:
                    numbers = np.frombuffer(trex, ">u4", 5, 4)
                    header.defaults[int(numbers[0])] = (int(numbers[2]), int(numbers[3]), int(numbers[4]))
        elif kind == b"cmov":
            raise Unsupported("a compressed header")
    if not tracks:
        raise Unsupported("no video track that is supported")
    enabled = [track for track in tracks if track.enabled] or tracks
    if len(enabled) > 1:
        raise Unsupported("several video tracks")
    found = enabled[0]
    found.movie_scale, found.defaults, found.fragmented = header.movie_scale, header.defaults, header.fragmented
    if found.scale <= 0 or (found.edits and found.movie_scale <= 0):
        raise Damaged("its time scale is zero")
    return found


def _read_trak(trak: memoryview) -> _Header | None:
    """The track, or None when it holds no video."""
    header = _Header()
    for kind, body in boxes(trak):
        if kind == b"tkhd":
            long = body[0] == 1
            header.enabled = bool(body[3] & 1)
            at = 20 if long else 12
            header.track_id = int.from_bytes(body[at : at + 4], "big")
            numbers = np.frombuffer(body, ">i4", 9, 52 if long else 40).tolist()
            header.matrix = (numbers[0], numbers[1], numbers[3], numbers[4])
        elif kind == b"edts":
            for child, elst in boxes(body):
                if child == b"elst":
                    header.edits = _read_elst(elst)
        elif kind == b"mdia":
            for child, inner in boxes(body):
                if child == b"mdhd":
                    at, width = (20, 8) if inner[0] == 1 else (12, 4)
                    header.scale = int.from_bytes(inner[at : at + 4], "big")
                    header.duration = int.from_bytes(inner[at + 4 : at + 4 + width], "big")
                    if header.duration == (1 << 8 * width) - 1:
                        header.duration = 0  # all ones: not known
                elif child == b"hdlr":
                    if bytes(inner[8:12]) != b"vide":
                        return None
                elif child == b"minf":
                    for part, table in boxes(inner):
                        if part == b"stbl":
                            header.tables = dict(boxes(table))
    return header


def _read_elst(elst: memoryview) -> list[tuple[int, int, int]]:
    count = int.from_bytes(elst[4:8], "big")
    entry = np.dtype([("d", ">u8"), ("t", ">i8"), ("r", ">i4")]) if elst[0] == 1 else np.dtype([("d", ">u4"), ("t", ">i4"), ("r", ">i4")])
    count = min(count, (len(elst) - 8) // entry.itemsize, 4096)
    return [tuple(row) for row in np.frombuffer(elst, entry, count, 8).tolist()]


def _description(stsd: memoryview | None) -> tuple[str, int, int, Fraction, bytes, dict[str, str]]:
    """(codec, width, height, pixel aspect ratio, extradata, colour) of the only sample description."""
    if stsd is None:
        raise Damaged("its video track has no sample description")
    entries = list(boxes(stsd[8:]))
    if len(entries) != 1:
        raise Unsupported(f"{len(entries)} sample descriptions")
    kind, body = entries[0]
    if kind not in _CODECS:
        raise Unsupported(f"codec {kind!r}")
    codec, wanted = _CODECS[kind]
    width, height = int.from_bytes(body[24:26], "big"), int.from_bytes(body[26:28], "big")
    inner = list(boxes(body[78:])) if len(body) >= 78 else []
    parts = dict(inner)
    if wanted and wanted not in parts:
        raise Unsupported(f"no {wanted.decode()} box")
    aspect = Fraction(1)
    if len(parts.get(b"pasp", b"")) >= 8:
        across, down = int.from_bytes(parts[b"pasp"][:4], "big"), int.from_bytes(parts[b"pasp"][4:8], "big")
        aspect = Fraction(across, down) if across and down else aspect
    if b"dvcC" in parts or b"sinf" in parts:
        raise Unsupported("Dolby Vision or encrypted")
    colour = {}
    for name, part in inner:
        if name == b"colr" and bytes(part[:4]) in (b"nclx", b"nclc") and len(part) >= 10:
            full = 1 + (part[10] >> 7) if bytes(part[:4]) == b"nclx" and len(part) > 10 else 0
            colour = colour_options(int.from_bytes(part[8:10], "big"), full)
    return codec, width, height, aspect, bytes(parts[wanted]) if wanted else b"", colour


# An hour of video has 100 000 frames. Allocating an array of that length takes longer than filling it, so arrays are few and used in place.
# glibc returns freed memory to the system above twice the largest block freed so far; after this line it keeps what a file needs.
np.empty(4 << 20, np.uint8)


def _entries(table: memoryview | None, fields: int, start: int = 4) -> NDArray[np.uint32]:
    """The [n, fields] 32-bit entries of a counted table, big-endian as in the file; the count is at byte `start`."""
    if table is None:
        return np.zeros((0, fields), np.uint32)
    count = int.from_bytes(table[start : start + 4], "big")
    if start + 4 + count * 4 * fields > len(table):
        raise Damaged("a sample table is shorter than its count")
    return np.frombuffer(table, ">u4", count * fields, start + 4).reshape(count, fields)


def _column(table: memoryview | None, fields: int, start: int = 4) -> NDArray[np.int64]:
    """The same as int64."""
    return _entries(table, fields, start).astype(np.int64)


def _tables(
    header: _Header, limits: Limits, within: int | None, name: str
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64] | None, NDArray[np.int64] | None, tuple[int, int] | None]:
    """(composition times, sync, offsets, sizes), each [n] in decode order, from the tables of `stbl`, and the first (offset, size).

    within: the file's size, if offsets and sizes are wanted only when samples lie beyond it or are empty (otherwise they are None).
    None: always.
    """
    tables = header.tables
    stsz = tables.get(b"stsz")
    if stsz is None:
        raise Unsupported("no stsz table")
    n = int.from_bytes(stsz[8:12], "big")
    fixed = int.from_bytes(stsz[4:8], "big")
    limits.check_frames(n, name)
    empty = np.zeros(0, np.int64)
    if n == 0:
        return empty, np.zeros(0, bool), empty, empty, None
    durations = _column(tables.get(b"stts"), 2)
    if len(durations) == 1 and durations[0, 0] == n:
        decode = np.arange(n, dtype=np.int64)
        decode *= durations[0, 1]
    else:
        decode = np.zeros(n, np.int64)
        np.cumsum(_repeated(durations[:, 0], durations[:, 1], n, "stts")[:-1], out=decode[1:])
    if b"ctts" in tables:
        shifts = _entries(tables[b"ctts"], 2)
        decode += _repeated(shifts[:, 0], shifts[:, 1].astype(np.int32), n, "ctts")
    sync = np.ones(n, bool)
    numbers = _column(tables.get(b"stss"), 1)[:, 0] - 1
    if len(numbers):  # without a table, or with an empty one, any frame may be a keyframe: `keyframes` decides
        sync[:] = False
        sync[numbers[(numbers >= 0) & (numbers < n)]] = True
    chunks = _column(tables.get(b"stco"), 1)[:, 0]
    if b"co64" in tables:
        table = tables[b"co64"]
        chunks = np.frombuffer(table, ">u8", min(int.from_bytes(table[4:8], "big"), (len(table) - 8) // 8), 8).astype(np.int64)
    sizes = np.full(n, fixed, np.int64) if fixed else _entries(stsz, 1, 8)[:, 0]
    runs = _column(tables.get(b"stsc"), 3)
    if not len(runs) or not len(chunks) or runs[0, 0] != 1 or (runs[:, 2] != 1).any() or (np.diff(runs[:, 0]) <= 0).any():
        raise Unsupported("an irregular chunk table")
    ends_inside = within is not None and int(chunks.max()) == chunks[-1] and chunks[-1] + int(sizes[-int(runs[-1, 1]) :].sum()) <= within
    if ends_inside and sizes.all():  # even a full last chunk ends inside, and no sample is empty
        return decode, sync, None, None, (int(chunks[0]), int(sizes[0]))
    sizes = sizes.astype(np.int64)
    if len(runs) == 1 and runs[0, 1] == 1 and len(chunks) >= n:
        return decode, sync, chunks[:n], sizes, None
    per_chunk = np.repeat(runs[:, 1], np.diff(np.append(runs[:, 0], max(len(chunks) + 1, int(runs[-1, 0]) + 1))))[: len(chunks)]
    if int(per_chunk.sum()) < n:
        raise Damaged("its chunks hold fewer frames than its sizes")
    before = np.cumsum(sizes) - sizes
    first = np.cumsum(per_chunk) - per_chunk
    used = first < n
    base = chunks[used] - before[first[used]]
    return decode, sync, np.repeat(base, per_chunk[used])[:n] + before, sizes, None


def _repeated(counts: NDArray[Any], values: NDArray[Any], n: int, name: str) -> NDArray[Any]:
    """`np.repeat(values, counts)` of length n, several times as fast where runs are short. Raises Unsupported for another length."""
    if int(counts.sum()) != n:
        raise Unsupported(f"{name} covers {int(counts.sum())} of {n} samples")
    if 4 * len(counts) < n or int(counts.min()) == 0:
        return np.repeat(values, counts)
    out = np.zeros(n, values.dtype)
    starts = np.cumsum(counts, dtype=np.int64)
    starts -= counts
    out[starts] = np.diff(values, prepend=values.dtype.type(0))  # differences may wrap, and so do their sums
    return np.cumsum(out, dtype=out.dtype, out=out)


def _apply_edits(header: _Header, composition: NDArray[np.int64], fragmented: bool) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    """(ticks on the presentation's timeline, which frames are shown; None: all)."""
    edits = header.edits
    empty = 0
    while edits and edits[0][1] == -1:
        empty += _rescale(edits[0][0], header.scale, header.movie_scale)
        edits = edits[1:]
    if not edits:
        return composition + empty, None
    if len(edits) > 1 or edits[0][1] < 0 or edits[0][2] not in (65536, 0):
        raise Unsupported("an edit list of several parts")
    start = edits[0][1]
    if fragmented:  # as in libavformat, frames are shifted, and none is hidden
        return composition - start + empty, None
    length = _rescale(edits[0][0], header.scale, header.movie_scale)
    lowest, highest = int(composition.min()), int(composition.max())
    if lowest >= start and (not length or highest < start + length):
        composition -= lowest - empty
        return composition, None
    shown = composition >= start
    if length:
        shown &= composition < start + length
    if not shown.any():
        raise Unsupported("an edit list that shows nothing")
    composition = composition - int(composition[shown].min()) + empty
    return composition, None if shown.all() else shown


def _rescale(value: int, to: int, per: int) -> int:
    return (2 * value * to + per) // (2 * per)
