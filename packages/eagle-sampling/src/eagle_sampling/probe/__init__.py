"""What a video holds, from its container's headers: size, rotation, exact presentation times, keyframes. Nothing is decoded."""

from __future__ import annotations

import os

from ..limits import DEFAULT_LIMITS, Limits, MediaError
from .demux import read_packets
from .track import NotOurs, Track, VideoInfo

__all__ = ["VideoInfo", "probe", "read_track"]


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
        size = os.stat(path).st_size
    except OSError as error:
        raise MediaError(f"{path}: can't be read: {error.strerror or error}") from error
    if size == 0:
        raise MediaError(f"{path}: is empty (0 bytes)")
    track = read_packets(path, limits, deadline)
    limits.check_frames(len(track.ticks), path)
    if not len(track.ticks):
        raise MediaError(f"{path}: its video track has no frames")
    return track
