"""Facts about a video from its container's headers: size, rotation, exact presentation times, keyframes.

Nothing is decoded, except one frame of a MOV or Matroska file that libavformat reads: it carries the rotation.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import is_remote
from ..limits import DEFAULT_LIMITS, Limits, MediaError, path_text, unreadable
from ..time_table import TimeTable
from .beginning import settle
from .containers.avi import looks_like_avi, read_avi
from .containers.demux import read_packets
from .containers.matroska import read_matroska
from .containers.matroska_parts import Part, read_matroska_parts
from .containers.mp4 import read_mp4
from .containers.mpegts import looks_like_ts, read_mpegts
from .containers.source import Damaged, Source
from .containers.track import Track, Unsupported
from .containers.webp import looks_like_webp, read_webp

_EBML = b"\x1a\x45\xdf\xa3"
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof", b"pnot")
_STILLS = (b"avif", b"heic", b"heix", b"mif1")  # brands of images in the MP4 format; sequences are avis, hevc, msf1 and have a track


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a video. A fact that is not known is None and named in `unknown`.

    width, height: as displayed, after rotation, in stored pixels (multiply the width by `pixel_aspect_ratio` for its true shape).
    rotation: degrees clockwise already accounted for in width and height.
    fps: frames / duration, an average; duration: seconds from the first frame's appearance to the last one's end.
    times: exact presentation times on the file's own timeline (an MPEG-TS may begin at 1.4 s); keyframe_times: where decoding can begin.
    variable_frame_rate: True when frames last unequally by more than the container's rounding.
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
    def from_track(cls, path: str, track: Track) -> VideoInfo:
        """Facts of an exact track. Raises MediaError when it shows no frame."""
        ticks = track.presentation_ticks()
        count = len(ticks)
        if not count:
            raise MediaError(f"{path}: its video track has no frames")
        table = TimeTable.from_ticks(ticks, track.unit)
        first, last = (float(value) for value in track.at(ticks[[0, -1]]))
        if count == 1:
            duration = track.duration or track.frame_duration
        elif table.constant:
            duration = last - first + (last - first) / (count - 1)
        else:
            # The length of the last frame is not stored: the median length, or what the header states if that is longer.
            usual = float(np.median(np.diff(ticks))) * float(track.unit)
            duration = max(last - first + usual, track.duration or 0.0)
        shown = track.sync if track.shown is None else track.sync & track.shown
        return cls(
            path=path,
            **_size(track),
            fps=count / duration if duration else None,
            duration=duration,
            frame_count=count,
            times=table,
            keyframe_times=np.sort(track.seconds(np.flatnonzero(shown))),
            variable_frame_rate=None if count < 2 else not table.constant,
            unknown=track.unknown + (("variable_frame_rate",) if count < 2 else ()) + (() if duration else ("duration", "fps")),
        )

    @classmethod
    def from_header(cls, path: str, track: Track) -> VideoInfo:
        """Facts of a header whose track's times were not read: `ticks` are those of the keyframes in its index, if it has one."""
        missing = {"times", "frame_count", "variable_frame_rate"}
        fps = 1 / track.frame_duration if track.frame_duration else None
        missing |= {name for name, value in (("fps", fps), ("duration", track.duration), ("keyframe_times", len(track.ticks))) if not value}
        return cls(
            path=path,
            **_size(track),
            fps=fps,
            duration=track.duration,
            frame_count=None,
            times=None,
            keyframe_times=track.seconds(np.arange(len(track.ticks))) if len(track.ticks) else None,
            variable_frame_rate=None,
            unknown=track.unknown + tuple(sorted(missing)),
        )


def _size(track: Track) -> dict[str, Any]:
    width, height = (track.height, track.width) if track.rotation in (90, 270) else (track.width, track.height)
    return {
        "width": width,
        "height": height,
        "rotation": track.rotation,
        "codec": track.codec,
        "container": track.container,
        "pixel_aspect_ratio": track.pixel_aspect_ratio,
    }


def probe(path: str | os.PathLike[str], *, exact: bool = True, limits: Limits = DEFAULT_LIMITS, partial: bool = False) -> VideoInfo:
    """Facts about the video track of `path` that players show: the default one; covers and previews are not videos.

    Args:
        path: a video file.
        exact: read the presentation time of every frame. False: only the header of a Matroska file is read (3 ms instead of a scan of all
            blocks); fps and duration are then those of the header, and the rest is None and named in `unknown`. MP4 is exact either way.
        limits: bounds on pixels and frames.
        partial: accept a file that was cut off and describe the frames that it still holds.

    Raises:
        MediaError: the file is missing, an address without an opener, not a video, damaged, cut off (unless `partial`), or over the limits.
        TypeError: `path` is not a path.
    """
    name = path_text(path, "the path of a video file")
    if not exact:
        track = _header_track(name, limits)
        if track is not None:
            return VideoInfo.from_header(name, track)
    track = read_track(name, limits=limits, positions=False)
    if track.missing and not partial:
        raise MediaError(
            f"{name}: is cut off: at least {track.missing} frames of its header are not in the file, {len(track.ticks)} are; "
            "copy it again, or use the frames that are there with partial=True"
        )
    return VideoInfo.from_track(name, track)


def read_track(path: str, *, limits: Limits = DEFAULT_LIMITS, deadline: float | None = None, positions: bool = True) -> Track:
    """The video track of `path`, by the parser of its container, otherwise by libavformat.

    positions: False when only times are wanted, and no byte offsets.
    """
    with _opened(path) as source:
        track = damage = None

        def check() -> None:
            if deadline is not None and time.monotonic() > deadline:
                raise MediaError(f"{path}: looking for its first frame took longer than the time limit")

        try:
            head = source.read(0, 1024)
            if b"%PDF-" in head:
                raise MediaError(f"{path}: is a PDF, not a video; give it as a document, with a name that ends in .pdf")
            if head[4:8] in _MP4_BOXES:
                track, damage = _tolerant_mp4(source, limits, positions)
                if track is None and head[4:8] == b"ftyp" and head[8:12] in _STILLS:  # libavformat shows one of its tiles
                    raise MediaError(f"{path}: is an image ({head[8:12].decode()}), not a video; give it as an image")
            elif head[:4] == _EBML:
                source.copy_whole()
                track = read_matroska(source, limits)
            elif looks_like_ts(head):
                track = read_mpegts(source, limits)
            elif looks_like_avi(head) and source.remote is not None:
                track = read_avi(source, limits, deadline)
            elif looks_like_webp(head):
                track = read_webp(source, limits)
            if track is not None and track.container not in ("avi", "webp"):
                track = settle(track, source, limits, check, lambda: read_mp4(source, limits))
        except Unsupported as reason:
            logging.getLogger(__name__).debug("%s: %s; read by libavformat", path, reason)
        if track is None:
            try:
                track = read_packets(path, limits, deadline)
            except MediaError:
                if damage is None:
                    raise
                raise Damaged(damage) from None  # more specific than the reason of libavformat
    limits.check_frames(len(track.ticks), path)
    limits.check_size(track.width, track.height, path)
    if not len(track.ticks):
        raise MediaError(f"{path}: its video track has no frames" + (" left: the file is cut off" if track.missing else ""))
    return track


def read_parts(path: str, seconds: NDArray[np.float64], tolerance: float, limits: Limits = DEFAULT_LIMITS) -> list[Part] | None:
    """Of a remote Matroska file only the parts with the frames at `seconds`, and keyframes up to `tolerance` from them.

    None for other files, and where the file has to be read as a whole (`read_track`). Raises MediaError when the file can't be opened.
    """
    if not is_remote(path) or not len(seconds) or not np.isfinite(seconds).all():
        return None
    with _opened(path) as source:
        if source.read(0, 4) != _EBML:
            return None
        try:
            parts = read_matroska_parts(source, limits, seconds, tolerance)
        except MediaError:
            raise
        except (Unsupported, Damaged, struct.error, IndexError, OverflowError, ValueError) as reason:
            logging.getLogger(__name__).debug("%s: %s; read as a whole", path, reason)
            return None
    for part in parts:
        limits.check_size(part.track.width, part.track.height, path)
    return parts


def _tolerant_mp4(source: Source, limits: Limits, positions: bool) -> tuple[Track | None, str | None]:
    """(track, None), or (None, damage): old muxers write variants of `moov` that only libavformat reads."""
    try:
        return read_mp4(source, limits, positions=positions), None
    except MediaError:
        raise
    except Damaged as error:
        return None, str(error)
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        return None, f"its header is damaged: {error}"


def _header_track(path: str, limits: Limits) -> Track | None:
    """The track of the header alone, for Matroska; None for containers whose header holds everything."""
    with _opened(path) as source:
        if source.read(0, 4) != _EBML:
            return None
        try:
            track = read_matroska(source, limits, exact=False)
        except Unsupported:
            return None
    limits.check_size(track.width, track.height, path)
    return track


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Source]:
    """The open file; an exception of a parser inside becomes a MediaError that names the file."""
    try:
        source = Source(path)
    except MediaError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    try:
        with source:
            if source.size == 0:
                raise MediaError(f"{path}: is empty (0 bytes)")
            yield source
    except OSError as error:
        raise MediaError(f"{path}: can't be read: {error.strerror or error}") from error
    except Damaged as error:
        raise MediaError(f"{path}: {error}") from error
    except MediaError:
        raise
    except (struct.error, IndexError, OverflowError, ValueError, MemoryError) as error:
        # Parsers index and unpack without checks; only a damaged header makes that fail.
        raise MediaError(f"{path}: its header is damaged: {error}") from error
