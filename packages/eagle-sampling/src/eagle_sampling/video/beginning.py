"""Frames at the beginning of a file that no decoder can show: they are not among the video's frames.

A recording or a copy may begin between keyframes (captures of broadcasts and cameras), or at a keyframe of an open GOP, whose leading
pictures refer to the frames before it. Players show such a file from the first picture on that a decoder gives whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import av
import numpy as np

from ..limits import Limits, MediaError
from .containers.source import Source
from .containers.track import Track
from .keyframes import Start, StartOf, start_test

LEADING = 64  # samples after a keyframe among which its leading pictures are looked for; encoders use up to 16
FIRST_WITHIN = 300  # samples decoded in one step to find the first picture
_HEAD = 4096  # bytes of a sample that usually hold its headers

DEFERRED = 32  # samples from an H.264 I-frame on whose errors are checked by their pictures; a picture refers to at most 16 others

DECODERS = {"av1": "libdav1d"}


def settle(track: Track, source: Source, limits: Limits, check: Callable[[], None], indexed: Callable[[], Track]) -> Track:
    """The track with `sync` set where decoding begins, and without the frames before the first one that can be shown.

    check: called per packet; raises when the time is up. indexed: the track with byte offsets; called where samples have to be decoded.
    Files that begin with a keyframe and without leading pictures cost one read; others decode up to the second keyframe.
    """
    if not len(track.ticks) or track.silent:
        return track
    test = start_test(track.codec, track.extradata)
    start = None
    if test is not None and track.scattered is not None:
        start = test(track.scattered(source, 0))
    elif test is not None and track.first is not None:
        start = start_of(test, source, *track.first)
    if start is None:
        start = Start.OPEN if track.sync[0] or not track.sync.any() else Start.NONE
    if start is Start.CLEAN or (start is Start.OPEN and not (track.ticks[1:LEADING] < track.ticks[0]).any()):
        track.sync[0] = True
        track.opens = start is not Start.CLEAN
        return track
    if track.offsets is None and track.scattered is None:
        track = indexed()
    begin = _first_start(track, source, test)
    hidden = np.zeros(len(track.ticks), bool)
    hidden[:begin] = True
    first = _first_shown(track, source, begin, test, limits, check)
    if first is not None:
        hidden[: begin + FIRST_WITHIN] |= track.ticks[: begin + FIRST_WITHIN] < first
    track.sync[:begin] = False
    track.sync[begin] = True
    track.opens = True
    if not hidden.any():
        return track
    shown = ~hidden if track.shown is None else track.shown & ~hidden
    if not shown.any():
        raise MediaError(f"{source.path}: has no keyframe, so that none of its {len(hidden)} frames can be shown")
    return dataclasses.replace(track, shown=shown, duration=None, _order=None)


def start_of(test: StartOf, source: Source, offset: int, size: int) -> Start | None:
    """The test's result for the sample of `size` bytes at `offset`: from its first 4 KiB, or from all of it where those do not tell."""
    found = test(source.read(offset, min(size, _HEAD)))
    return test(source.read(offset, size)) if found is None and size > _HEAD else found


def sample_start(track: Track, source: Source, test: StartOf, sample: int) -> Start | None:
    """The same by the sample's number; None when the track has no byte offsets."""
    if track.scattered is not None:
        return test(track.scattered(source, sample))
    if track.offsets is None or track.sizes is None:
        return None
    return start_of(test, source, int(track.offsets[sample]), int(track.sizes[sample]))


def _first_start(track: Track, source: Source, test: StartOf | None) -> int:
    """The first sample at which decoding can begin; the container's first keyframe where the codec has no test."""
    if test is not None:
        for sample in range(len(track.ticks)):
            found = sample_start(track, source, test, sample)
            if found is None:
                break
            if found is not Start.NONE:
                return sample
        else:
            raise MediaError(f"{source.path}: has no keyframe, so that none of its {len(track.ticks)} frames can be shown")
    keys = np.flatnonzero(track.sync)
    return int(keys[0]) if len(keys) else 0


def _first_shown(track: Track, source: Source, begin: int, test: StartOf | None, limits: Limits, check: Callable[[], None]) -> int | None:
    """Tick of the first whole picture of a decoder that begins at sample `begin`; None when there is none among the next ones."""
    context = av.CodecContext.create(DECODERS.get(track.codec, track.codec), "r")
    assert isinstance(context, av.VideoCodecContext)
    if track.extradata:
        context.extradata = track.extradata

    def packets() -> Iterator[tuple[av.Packet, bool]]:
        for sample in range(begin, len(track.ticks)):
            check()
            packet = packet_of(sample_bytes(track, source, sample, limits))
            packet.pts, packet.time_base = int(track.ticks[sample]), track.unit
            yield packet, bool(track.sync[sample])

    return min(whole_pictures(context, packets()), default=None)


def whole_pictures(context: av.VideoCodecContext, packets: Iterable[tuple[av.Packet, bool]]) -> list[int]:
    """`pts` of the whole pictures that a decoder gives of (packet, is a keyframe), up to the next keyframe or 300 packets."""
    context.thread_count, context.thread_type = 1, "NONE"
    found: list[int] = []

    def decode(packet: av.Packet | None) -> None:
        try:
            found.extend(frame.pts for frame in context.decode(packet) if frame.pts is not None and not frame.is_corrupt)
        except av.FFmpegError:  # of a picture that refers to a missing one; a decoder continues with the next
            return

    for number, (packet, key) in enumerate(packets):
        if number == FIRST_WITHIN or (found and key):
            break
        decode(packet)
    decode(None)
    return found


def packet_of(data: bytes) -> av.Packet:
    """A packet of a copy of `data` with the zero bytes behind it that libav's decoders read.

    `av.Packet(data)` refers to `data` itself, and what is behind it in memory decides whether MPEG-4 frames are found to be damaged.
    """
    packet = av.Packet(len(data))
    if data:
        packet.update(data)
    return packet


def sample_bytes(track: Track, source: Source, sample: int, limits: Limits) -> bytes:
    """The encoded bytes of a sample of a track with byte offsets."""
    if track.scattered is not None:
        return track.scattered(source, sample)
    assert track.offsets is not None
    assert track.sizes is not None
    offset, size = int(track.offsets[sample]), int(track.sizes[sample])
    limits.check_bytes(size, f"{source.path}: the video packet at byte {offset}")
    return source.read(offset, size)
