"""Containers without a parser here (AVI, FLV, GIF, ...), and files that a parser does not support: one pass over libavformat's packets.

Of MOV and Matroska one frame is decoded, because it carries the rotation; other containers have none. Where packets carry no presentation
times, frames are known by their order only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from ...limits import Limits, MediaError
from ..beginning import FIRST_WITHIN, LEADING, whole_pictures
from ..keyframes import Start, StartOf, start_test
from ..libav import open_container
from .cut_off import is_cut_off
from .track import Track, orientation

# libav's parsers of these report no picture types, and where they run (AVI, WTV, bare streams) every packet is marked as a keyframe.
KEYFRAMES_UNKNOWN = {"h261", "h263"}
_CODECS = {"libdav1d": "av1", "libvpx": "vp8", "libvpx-vp9": "vp9"}  # decoders that libav prefers to its own
_TURNING = ("mov,", "matroska,")  # libavformat's names of the containers that can store a rotation
_FIRST_FRAME_WITHIN = 64  # packets to decode at most to get one frame

# Bare streams without a frame rate, for which libavformat takes 25 frames a second.
_NO_RATE = ("mjpeg", "mjpeg_2000", "obu")

Turn = tuple[int, bool, bool]  # as `orientation` returns it


def codec_name(decoder: str) -> str:
    """The codec of a decoder that libav chose."""
    return _CODECS.get(decoder, decoder)


def choose_stream(container: InputContainer) -> VideoStream:
    """The film: libav's choice (default track, several frames, bit rate), but no cover picture. Raises MediaError when there is none."""
    videos = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not videos:
        cover = ", only a cover picture" if container.streams.video else ""
        raise MediaError(f"{container.name}: has no video track{cover}")
    best = container.streams.best("video") if len(container.streams.video) > 1 else None
    return next((stream for stream in videos if best is not None and stream.index == best.index), videos[0])


def _refuse_pictures(path: str, container: InputContainer) -> None:
    """Raise MediaError for an image, which libavformat opens as a video of one frame, and for a stream whose times it makes up."""
    name = container.format.name
    if name.endswith("_pipe") or name == "image2":
        codec = container.streams.video[0].codec_context if container.streams.video else None
        kind = f" ({codec.name})" if codec is not None else ""
        raise MediaError(f"{path}: is an image{kind}, not a video; give it as an image, or in a list of images that are a video's frames")
    if name in _NO_RATE:
        raise MediaError(f"{path}: is a bare stream ({name}) whose frames have no presentation times; convert it to MP4 or Matroska")


def read_packets(path: str, limits: Limits, deadline: float | None = None) -> Track:
    """The video track from the header fields of every packet. Raises MediaError when there is none, or the time is up."""
    try:
        with open_container(path) as container:
            _refuse_pictures(path, container)
            stream = choose_stream(container)
            context = stream.codec_context
            if context is None:
                raise MediaError(f"{path}: no decoder is known for its video track")
            context.thread_count = 1
            context.thread_type = "NONE"
            ticks: list[int] = []
            sync: list[bool] = []
            shown: list[bool] = []
            turn: Turn | None = None if container.format.name.startswith(_TURNING) else (0, False, False)
            last: av.Packet | None = None
            timed = whole = True
            test = start_test(codec_name(context.name), bytes(context.extradata or b""))
            begins: Start | None = None  # of the first packet
            for packet in container.demux(stream):
                if turn is None and len(ticks) < _FIRST_FRAME_WITHIN:
                    turn = _turn(packet)
                if packet.size == 0:
                    continue
                if packet.pts is None:
                    timed = whole = False
                    break
                last = packet
                found = test(bytes(packet)) if test is not None and (packet.is_keyframe or not ticks) else None
                if not ticks:
                    begins = found
                ticks.append(packet.pts)
                sync.append(packet.is_keyframe and found is not Start.NONE)
                shown.append(not packet.is_discard)
                if len(ticks) & 1023 == 0:
                    limits.check_frames(len(ticks), path)
                    if deadline is not None and time.monotonic() > deadline:
                        raise MediaError(f"{path}: reading its packets took longer than the time limit")
            missing = 0
            if not whole:
                ticks = _decode_times(path, limits, deadline)
            elif last is not None and is_cut_off(container, stream, last.pos):
                if last.is_corrupt:
                    del ticks[-1], sync[-1], shown[-1]
                missing = max(1, stream.frames - len(ticks))
            # Frames are reordered but times rise: the stored times are decoding times (H.264 in AVI, ASF and MXF, MPEG-2 in ASF, packed
            # MPEG-4 in AVI). They are also the frames' times, in the order in which a decoder returns the frames.
            if context.has_b_frames and not all(sync) and (np.diff(ticks) >= 0).all():
                timed = False
            if begins is None:
                begins = Start.OPEN if not sync or sync[0] or not any(sync) else Start.NONE
            silent: frozenset[int] = frozenset()
            leading = not timed or any(tick < ticks[0] for tick in ticks[1:LEADING])
            if ticks and whole and begins is not Start.CLEAN and (begins is not Start.OPEN or leading):
                if timed:
                    begin, given = _first_pictures(path, timed, test, sync, deadline)
                    first = min(given, default=ticks[begin])
                    shown = [
                        seen and i >= begin and (i >= begin + FIRST_WITHIN or tick >= first)
                        for i, (tick, seen) in enumerate(zip(ticks, shown))
                    ]
                    sync = [key and i >= begin for i, key in enumerate(sync)]
                    sync[begin] = True
                else:
                    silent = silent_packets(path, test, sync, deadline)
            if not timed:
                ticks = sorted(tick for tick, seen in zip(ticks, shown) if seen)[len(silent) :] if whole else ticks
                shown = []
            if not timed or (context.name in KEYFRAMES_UNKNOWN and all(sync)):
                sync = [False] * len(ticks)  # only decoding from the start is known to be correct
            if sync and not any(sync):
                sync[0] = True  # decoding has to begin somewhere
            unit = stream.time_base or Fraction(1, av.time_base)
            duration = float(stream.duration * unit) if stream.duration else None
            limits.check_size(context.width, context.height, path)
            rotation, mirrored, odd = turn or (0, False, True)
            return Track(
                container=container.format.name,
                codec=codec_name(context.name),
                width=context.width,
                height=context.height,
                unit=unit,
                ticks=np.array(ticks, np.int64),
                sync=np.array(sync, bool),
                shown=None if all(shown) else np.array(shown, bool),
                rotation=rotation,
                mirrored=mirrored,
                pixel_aspect_ratio=stream.sample_aspect_ratio or Fraction(1),
                duration=None if silent or not all(shown) else duration,
                missing=missing,
                timed=timed,
                whole=whole,
                unknown=("rotation",) if odd else (),
                silent=silent,
                opens=begins is not Start.CLEAN,
            )
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{path}: can't be read as a video: {error}") from error


def silent_packets(path: str, test: StartOf | None, sync: list[bool], deadline: float | None) -> frozenset[int]:
    """Packets at the beginning of an untimed track that give no frame: those before the first keyframe, and its leading pictures."""
    begin, given = _first_pictures(path, False, test, sync, deadline)
    leads = next((number for number in range(begin + 1, len(sync)) if number in given), begin + 1) - begin - 1
    return frozenset([*range(begin), *range(begin + 1, begin + 1 + leads)])


def _first_pictures(path: str, timed: bool, test: StartOf | None, sync: list[bool], deadline: float | None) -> tuple[int, set[int]]:
    """(number of the packet at which decoding can begin, which of the packets from there on give whole pictures).

    Packets are named by their times, or by their numbers where they have none of their own. Raises MediaError without a keyframe.
    """
    begin = -1

    def packets(container: InputContainer, stream: VideoStream) -> Iterator[tuple[av.Packet, bool]]:
        nonlocal begin
        real = (packet for packet in container.demux(stream) if packet.size and (timed or not packet.is_discard))
        for number, packet in enumerate(real):
            if deadline is not None and time.monotonic() > deadline:
                raise MediaError(f"{path}: looking for its first keyframe took longer than the time limit")
            if begin < 0:
                found = test(bytes(packet)) if test is not None else None
                if found is Start.NONE or (found is None and not packet.is_keyframe and any(sync)):
                    continue
                begin = number
            if not timed:
                packet.pts = number
            yield packet, packet.is_keyframe

    with open_container(path) as container:
        stream = choose_stream(container)
        given = whole_pictures(stream.codec_context, packets(container, stream))
    if begin < 0:
        raise MediaError(f"{path}: has no keyframe, so that none of its {len(sync)} frames can be shown")
    return begin, set(given)


def _turn(packet: av.Packet) -> Turn | None:
    """Rotation of the first frame that `packet` gives; None when it gives none."""
    try:
        frames = packet.decode()
    except av.FFmpegError:  # reported when this frame is wanted
        return None
    if not frames or not isinstance(frames[0], av.VideoFrame):
        return None
    matrix = frames[0].side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0, False, False
    a, b, _, c, d = np.frombuffer(memoryview(matrix), np.int32, 5).tolist()  # type: ignore[arg-type]
    return orientation((a, b, c, d))


def _decode_times(path: str, limits: Limits, deadline: float | None) -> list[int]:
    """Times by decoding, for containers in which only some packets have one (fields of H.264 in a transport stream)."""
    ticks: list[int] = []
    with open_container(path) as container:
        for frame in container.decode(choose_stream(container)):
            if frame.pts is None:
                raise MediaError(f"{path}: its frames have no presentation times; convert it to MP4 or Matroska")
            ticks.append(frame.pts)
            limits.check_frames(len(ticks), path)
            if deadline is not None and time.monotonic() > deadline:
                raise MediaError(f"{path}: decoding its times took longer than the time limit")
    return sorted(ticks)
