"""What a video holds, from its container's headers: size, rotation, exact presentation times, keyframes. Nothing is decoded."""

from __future__ import annotations

import logging
import os
import struct
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from .containers.demux import read_packets
from .containers.mp4 import read_mp4
from .containers.source import Damaged, Source
from .containers.track import NotOurs, Track
from .limits import DEFAULT_LIMITS, Limits, MediaError
from .time_table import TimeTable


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` knows of a video. What couldn't be known is None and named in `unknown`.

    width, height: as displayed, after rotation, in stored pixels (multiply the width by `pixel_aspect_ratio` for its true shape).
    rotation: degrees clockwise already accounted for in width and height.
    fps: frames / duration, an average; duration: seconds from the first frame's appearance to the last one's end.
    times: exact presentation times on the file's own timeline (an MPEG-TS may begin at 1.4 s); keyframe_times: where decoding can begin.
    variable_frame_rate: True when frames last unequally, beyond the container's rounding.
    """

    path: str
    width: int
    height: int
    rotation: int
    fps: float | None
    duration: float | None
    frame_count: int | None
    codec: str
    container: str
    times: TimeTable | None
    keyframe_times: NDArray[np.float64] | None
    pixel_aspect_ratio: Fraction
    variable_frame_rate: bool | None
    unknown: tuple[str, ...] = ()

    @classmethod
    def from_track(cls, path: str, track: Track, *, exact: bool = True) -> VideoInfo:
        order = track.presentation_order()
        width, height = (track.height, track.width) if track.rotation in (90, 270) else (track.width, track.height)
        table = track.time_table() if exact else None
        count = len(order)
        if not count:
            raise MediaError(f"{path}: its video track has no frames")
        first, last = (float(value) for value in track.seconds(order[[0, -1]]))
        if count > 1:
            step = (last - first) / (count - 1)
            if table is not None and not table.constant:
                step = float(np.median(np.diff(track.ticks[order]))) * float(track.unit)
            # A header that gives the last frame longer than its neighbours is believed; one that cuts frames off isn't.
            duration = max(last - first + step, (track.duration or 0.0) if table is not None and not table.constant else 0.0)
        else:
            duration = track.duration
        keyframes = np.sort(track.seconds(np.flatnonzero(track.sync if track.shown is None else track.sync & track.shown)))
        return cls(
            path=path,
            width=width,
            height=height,
            rotation=track.rotation,
            fps=count / duration if duration else None,
            duration=duration,
            frame_count=count,
            codec=track.codec,
            container=track.container,
            times=table,
            keyframe_times=keyframes,
            pixel_aspect_ratio=track.pixel_aspect_ratio,
            variable_frame_rate=None if table is None or count < 2 else not table.constant,
            unknown=track.unknown + (() if duration else ("duration", "fps")),
        )


def probe(path: str | os.PathLike[str], *, limits: Limits = DEFAULT_LIMITS, partial: bool = False) -> VideoInfo:
    """Facts about the first video track of `path`, exact times included.

    partial: accept a file that was cut off and describe the frames that it still holds.
    Raises MediaError when the file is missing, no video, damaged, cut off (unless `partial`), or over the limits.
    """
    name = os.fspath(path)
    track = read_track(name, limits=limits)
    if track.missing and not partial:
        raise MediaError(
            f"{name}: is cut off: {track.missing} of the {track.missing + len(track.ticks)} frames its header promises aren't in the file; "
            "copy it again, or use what is there with partial=True"
        )
    return VideoInfo.from_track(name, track)


def read_track(path: str, *, limits: Limits = DEFAULT_LIMITS, deadline: float | None = None) -> Track:
    """The first video track of `path`, by our parser for its container, or else by libavformat."""
    try:
        with Source(path) as source:
            track = _parse(source, limits, deadline)
    except OSError as error:
        raise MediaError(f"{path}: can't be read: {error.strerror or error}") from error
    limits.check_frames(len(track.ticks), path)
    limits.check_size(track.width, track.height, path)
    if not len(track.ticks):
        raise MediaError(f"{path}: its video track has no frames")
    return track


def _parse(source: Source, limits: Limits, deadline: float | None) -> Track:
    if source.size == 0:
        raise MediaError(f"{source.path}: is empty (0 bytes)")
    head = source.read(0, 16)
    try:
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof"):
            return read_mp4(source, limits)
    except Damaged as error:
        raise MediaError(f"{source.path}: {error}") from error
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{source.path}: its header is damaged: {error}") from error
    except NotOurs as reason:
        logging.getLogger(__name__).debug("%s: %s; read by libavformat", source.path, reason)
    return read_packets(source.path, limits, deadline)
