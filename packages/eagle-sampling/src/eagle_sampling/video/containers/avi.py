"""AVI by its index (`idx1`, or OpenDML's `indx`), for remote files: without it libavformat goes through all of the file.

libavformat reads the index. A frame's time is its number, so the index tells all times if every byte of the media lists belongs to an
entry. That is checked, as are the first packets. Keyframes are those that the index states; readers test those at which they begin.
"""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray

from ...limits import Limits
from ..beginning import start_of
from ..keyframes import Start, start_test
from ..libav import open_container
from .demux import KEYFRAMES_UNKNOWN, choose_stream, codec_name, silent_packets
from .source import Damaged, Source
from .track import Track, Unsupported

_VERIFIED, _VERIFIED_BYTES = 24, 1 << 20
_MAX_CHUNKS = 1000  # outside of media lists
_MAX_GAPS = 64  # between chunks of the index

Chunks = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(byte of the chunk's header, bytes of its body) of index entries."""


def looks_like_avi(head: bytes) -> bool:
    """`head`: the first bytes of the file."""
    return head[:4] == b"RIFF" and head[8:12] == b"AVI "


def read_avi(source: Source, limits: Limits, deadline: float | None = None) -> Track:
    """The video track by the file's index. Raises Unsupported where the file has to be read as a whole."""
    try:
        with open_container(source.path) as container:
            return _indexed(container, source, limits, deadline)
    except (av.FFmpegError, OSError) as error:
        raise Unsupported(f"can't be read by its index: {error}") from error


def _indexed(container: InputContainer, source: Source, limits: Limits, deadline: float | None) -> Track:
    stream = choose_stream(container)
    context, unit = stream.codec_context, stream.time_base
    if container.format.name != "avi" or context is None or unit is None:
        raise Unsupported("no decoder, or no frame rate")
    codec = codec_name(context.name)
    limits.check_frames(len(stream.index_entries), source.path)
    entries = [(entry.pos, entry.size, entry.timestamp, entry.is_keyframe) for entry in stream.index_entries]
    if not entries or codec in KEYFRAMES_UNKNOWN:
        raise Unsupported("no index of the video, or one that can't be right")
    places, sizes, ticks, keys = (np.array(column) for column in zip(*entries))
    others = [(entry.pos, entry.size) for one in container.streams if one.index != stream.index for entry in one.index_entries]
    more = np.array(others, np.int64).reshape(-1, 2)
    if (np.diff(ticks) < 1).any() or (np.diff(places) < 1).any():
        raise Unsupported("an index out of order")
    _check_complete(source, stream.index, (places, sizes), (more[:, 0], more[:, 1]), ticks)
    timed = not context.has_b_frames or bool(keys.all())  # otherwise the times are decoding times, as in `read_packets`
    if not timed and codec != "h264":
        raise Unsupported("frames whose times libavformat makes of their types")
    test = start_test(codec, bytes(context.extradata or b""))
    begins = start_of(test, source, int(places[0]) + 8, int(sizes[0])) if test is not None else None
    if begins in (Start.NONE, Start.REFRESH) or not keys[0]:
        raise Unsupported("it doesn't begin with a keyframe")
    duration = float(stream.duration * unit) if stream.duration else None
    size, aspect, extradata = (context.width, context.height), stream.sample_aspect_ratio or Fraction(1), bytes(context.extradata or b"")
    read = late = 0
    for number, packet in enumerate(packet for packet in container.demux(stream) if packet.size):
        place, length = int(places[number]) + 8, int(sizes[number])
        if not number and codec == "h264" and packet.pts is not None and (np.diff(ticks) == 1).all():
            late = packet.pts - int(ticks[0])  # libavformat shows H.264 in AVI one frame later
        told = (ticks[number] + late, keys[number], source.read(place, length))
        if told != (packet.pts, packet.is_keyframe, bytes(packet)) or packet.is_discard:
            raise Unsupported("packets that the index doesn't describe")
        read += length
        if number + 1 in (_VERIFIED, len(ticks)) or read > _VERIFIED_BYTES:
            break
    silent: frozenset[int] = frozenset()
    if not timed and begins is not Start.CLEAN:
        silent = silent_packets(source.path, test, keys.tolist(), deadline)
    ticks = ticks + late
    if not timed:
        ticks, keys = ticks[len(silent) :], np.arange(len(ticks) - len(silent)) == 0
    return Track(
        container="avi",
        codec=codec,
        width=size[0],
        height=size[1],
        unit=unit,
        ticks=ticks.astype(np.int64),
        sync=keys.astype(bool),
        offsets=places.astype(np.int64) + 8 if timed else None,
        sizes=sizes.astype(np.int64) if timed else None,
        extradata=extradata,
        pixel_aspect_ratio=aspect,
        duration=None if silent else duration,
        timed=timed,
        silent=silent,
        opens=begins is not Start.CLEAN,
        demuxed=True,
    )


def _check_complete(source: Source, stream: int, video: Chunks, others: Chunks, ticks: NDArray[np.int64]) -> None:
    """Raise Unsupported unless the entries' chunks fill the media lists, except for padding, OpenDML's indexes, and the empty chunks that
    the ticks count: a frame that is not stored is 8 bytes in the file."""
    starts, sizes = np.append(video[0], others[0]), np.append(video[1], others[1])
    order = np.argsort(starts, kind="stable")
    starts = starts[order]
    ends = starts + 8 + (sizes[order] + 1) // 2 * 2
    lists = _media_lists(source)
    bounds = [np.searchsorted(starts, end) for _, end in lists]
    if not lists or bounds[-1] != len(starts):
        raise Unsupported("an index of chunks that are elsewhere")
    pieces = list(zip(lists, [0, *bounds], bounds))
    befores = np.concatenate([np.append(begin, ends[first:last]) for (begin, _), first, last in pieces])
    afters = np.concatenate([np.append(starts[first:last], end) for (_, end), first, last in pieces])
    gaps = np.flatnonzero(befores != afters)
    following = np.searchsorted(video[0], afters[gaps])  # the next frame
    empty = np.append(np.diff(ticks, prepend=-1) - 1, 0)
    explained = np.bincount(following, weights=(afters - befores)[gaps], minlength=len(empty)) == 8 * empty
    found = np.where(explained, empty, 0)
    rest = gaps[~explained[following]]
    if (befores > afters).any() or len(rest) > _MAX_GAPS:
        raise Unsupported("an index that doesn't agree with the chunks")
    for gap in rest.tolist():
        found[np.searchsorted(video[0], afters[gap])] += _empty_chunks(source, int(befores[gap]), int(afters[gap]), b"%02d" % stream)
    if (found != empty)[:-1].any():  # empty chunks behind the last frame don't matter
        raise Unsupported("an index whose times don't agree with the chunks")


def _empty_chunks(source: Source, at: int, end: int, stream: bytes) -> int:
    """How many chunks between two bytes are empty ones of the stream. Raises Unsupported for content other than padding and indexes."""
    empty = 0
    for _ in range(_MAX_GAPS):
        if at >= end:
            break
        head = source.read(at, 8)
        kind, size = head[:4], int.from_bytes(head[4:], "little")
        if size and not (kind == b"JUNK" or kind[:2] == b"ix" or kind[2:] == b"ix"):
            raise Unsupported("an index that doesn't name all chunks")
        empty += int(not size and kind[:2] == stream)
        at += 8 + size + (size & 1)
    if at != end:
        raise Unsupported("an index that doesn't agree with the chunks")
    return empty


def _media_lists(source: Source) -> list[tuple[int, int]]:
    """(first chunk, end) of every `movi` list. Raises Unsupported for one that extends beyond the file's end."""
    found: list[tuple[int, int]] = []
    at = 0
    for _ in range(_MAX_CHUNKS):
        head = source.read(at, 12)
        if len(head) < 12:
            return found
        size = int.from_bytes(head[4:8], "little")
        if head[:4] == b"RIFF":
            at += 12
            continue
        if not size:
            raise Unsupported("a recording that was interrupted")
        if head[:4] == b"LIST" and head[8:] == b"movi":
            if at + 8 + size > source.size:
                raise Unsupported("it is cut off")
            found.append((at + 12, at + 8 + size + (size & 1)))
        at += 8 + size + (size & 1)
    raise Damaged(f"more than {_MAX_CHUNKS} chunks next to the media")
