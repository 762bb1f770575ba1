"""MPEG transport streams (ISO/IEC 13818-1): a pass over the 188-byte packets, 7.5 MB at a time, finds each frame and its time.

Size and codec are not in the transport's headers, so libavformat reads them from the file's beginning; the scan is checked against its
first packets. A stream that differs (two fields in two packets, frames without times, lost packets) is read by libavformat.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import islice

import av
import numpy as np
from numpy.typing import NDArray

from ...limits import Limits
from ..libav import open_container
from .demux import choose_stream
from .source import Damaged, Source
from .track import Track, Unsupported

PACKET = 188
_CHUNK = PACKET * 40_000  # 7.5 MB
_VERIFIED = 120  # packets compared with libavformat: four seconds at 30 a second
_DELIMITERS = {"h264": b"\0\0\1\x09", "hevc": b"\0\0\1\x46"}


def looks_like_ts(head: bytes) -> bool:
    """`head`: the first bytes of the file."""
    return len(head) >= 3 * PACKET and head[0] == head[PACKET] == head[2 * PACKET] == 0x47


def read_mpegts(source: Source, limits: Limits) -> Track:
    """The video track that players show. Raises Unsupported for what libavformat has to read, Damaged for what cannot be read."""
    try:
        with open_container(source.path) as container:
            stream = choose_stream(container)
            context, pid = stream.codec_context, stream.id
            packets = (packet for packet in container.demux(stream) if packet.size)
            expected = [(packet.pts, packet.is_keyframe) for packet in islice(packets, _VERIFIED)]
            codec, width, height = context.name, context.width, context.height
            aspect = stream.sample_aspect_ratio or Fraction(1)
            unit = stream.time_base
    except (av.FFmpegError, OSError) as error:
        raise Damaged(f"can't be read as a video: {error}") from error
    if codec not in _DELIMITERS or unit != Fraction(1, 90_000):
        raise Unsupported(f"codec {codec}")
    ticks, keys, offsets = _scan(source, pid, limits)
    if [(int(tick), bool(key)) for tick, key in zip(ticks[: len(expected)], keys)] != expected or not len(ticks):
        raise Unsupported("packets that libavformat splits differently")
    if len(ticks) > 1 and int(ticks.max() - ticks.min()) > 1 << 32:
        raise Unsupported("times that wrap around")
    ends = np.append(offsets[1:], source.size // PACKET * PACKET)
    delimiter = _DELIMITERS[codec]

    def gather(source: Source, sample: int) -> bytes:
        payload = _payload(source.read(int(offsets[sample]), int(ends[sample] - offsets[sample])), pid)
        if payload.count(delimiter) != 1 or not payload[:5].endswith(delimiter):
            raise Unsupported("a packet that is not one access unit")
        return payload

    for sample in range(min(len(ticks), 8)):
        gather(source, sample)
    return Track(
        container="mpegts",
        codec=codec,
        width=width,
        height=height,
        unit=Fraction(1, 90_000),
        ticks=ticks,
        sync=keys,
        pixel_aspect_ratio=aspect,
        missing=int(source.size % PACKET != 0),
        scattered=gather,
    )


def _scan(source: Source, pid: int, limits: Limits) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """(ticks, keyframe, offset of the first packet) of every frame of stream `pid`, in file order."""
    ticks: list[NDArray[np.int64]] = []
    keys: list[NDArray[np.bool_]] = []
    offsets: list[NDArray[np.int64]] = []
    counter = None
    count = 0
    for base in range(0, source.size // PACKET * PACKET, _CHUNK):
        data = np.frombuffer(source.read(base, min(_CHUNK, source.size // PACKET * PACKET - base)), np.uint8).reshape(-1, PACKET)
        if (data[:, 0] != 0x47).any():
            raise Unsupported("lost synchronisation")
        ids = (data[:, 1].astype(np.int32) & 0x1F) << 8 | data[:, 2]
        rows = np.flatnonzero(ids == pid)
        if not len(rows):
            continue
        second, fourth = data[rows, 1], data[rows, 3]
        if (second & 0x80).any() or (fourth & 0xC0).any():
            raise Unsupported("transport errors or scrambling")
        paid = (fourth & 0x10) != 0
        counters = fourth[paid] & 0x0F
        expected = np.append(counters[:1] if counter is None else counter + 1 & 0x0F, counters[:-1] + 1 & 0x0F)
        if (counters != expected).any():
            raise Unsupported("lost packets")
        if len(counters):
            counter = int(counters[-1])
        begins = rows[((second & 0x40) != 0) & paid]
        adapted = (data[begins, 3] & 0x20) != 0
        length = np.where(adapted, data[begins, 4].astype(np.int64) + 1, 0)
        keys.append(adapted & (length > 1) & ((data[begins, 5] & 0x40) != 0))
        at = 4 + length
        if (at > PACKET - 14).any():
            raise Unsupported("a PES header spread over packets")
        head = data[begins[:, None], at[:, None] + np.arange(14)].astype(np.int64)
        if ((head[:, 0] != 0) | (head[:, 1] != 0) | (head[:, 2] != 1) | ((head[:, 7] & 0x80) == 0)).any():
            raise Unsupported("packets without a time")
        ticks.append(head[:, 9] >> 1 << 30 & 7 << 30 | head[:, 10] << 22 | head[:, 11] >> 1 << 15 | head[:, 12] << 7 | head[:, 13] >> 1)
        offsets.append(base + begins.astype(np.int64) * PACKET)
        count += len(begins)
        limits.check_frames(count, source.path)
    if not ticks:
        raise Unsupported("no packets of the video track")
    return np.concatenate(ticks), np.concatenate(keys), np.concatenate(offsets)


def _payload(data: bytes, pid: int) -> bytes:
    """The elementary stream bytes of `pid` in `data`, whole transport packets that begin with the frame's first."""
    parts = []
    high, low = pid >> 8, pid & 0xFF
    for at in range(0, len(data) - PACKET + 1, PACKET):
        if data[at + 2] == low and data[at + 1] & 0x1F == high and data[at + 3] & 0x10:
            start = at + 4 + (data[at + 4] + 1 if data[at + 3] & 0x20 else 0)
            if not parts:
                start += 9 + data[start + 8]  # the PES header
            parts.append(data[start : at + PACKET])
    return b"".join(parts)
