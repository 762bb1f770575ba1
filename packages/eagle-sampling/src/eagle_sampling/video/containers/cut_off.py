"""Whether a file ends before its container does, for AVI, FLV and MOV, which libavformat reads up to any end without an error.

Decided from headers and the last packet: a few reads, independent of the file's length. Other containers (MPEG-PS, ASF, Ogg) are not
recognised.
"""

from __future__ import annotations

from av.container import InputContainer
from av.video.stream import VideoStream

from .source import Source

_MAX_CHUNKS = 10_000
_FLV_TAGS = (8, 9, 18)  # audio, video, script data


def is_cut_off(container: InputContainer, stream: VideoStream, last: int | None) -> bool:
    """last: byte offset of the last video packet."""
    kind = container.format.name
    with Source(container.name) as source:
        if kind == "avi":
            return _avi(source)
        if kind == "flv":
            return last is not None and _flv(source, last)
        if kind.startswith("mov,"):
            return any(entry.pos + entry.size > source.size for entry in stream.index_entries)
    return False


def _avi(source: Source) -> bool:
    """A `movi` list of any RIFF chunk (files over 1 GB have several) extends beyond the file's end."""
    at, end = 0, 0
    for _ in range(_MAX_CHUNKS):
        head = source.read(at, 12)
        size = int.from_bytes(head[4:8], "little")
        if len(head) < 12 or size == 0:  # an interrupted recorder leaves zeros
            return False
        if head[:4] == b"RIFF":
            end = at + 8 + size
            at += 12
        elif head[:4] == b"LIST" and head[8:] == b"movi" and at + 8 + size > source.size:
            return True
        else:
            at += 8 + size + (size & 1)
        if at >= end and source.read(at, 4) != b"RIFF":
            return False
    return False


def _flv(source: Source, at: int) -> bool:
    """The last tag, found by following them from the one at byte `at`, extends beyond the file's end."""
    for _ in range(_MAX_CHUNKS):
        head = source.read(at, 11)
        if not head or head[0] not in _FLV_TAGS:
            return False
        size = int.from_bytes(head[1:4], "big")
        if len(head) < 11 or at + 11 + size > source.size:
            return True
        at += 11 + size + 4
    return False
