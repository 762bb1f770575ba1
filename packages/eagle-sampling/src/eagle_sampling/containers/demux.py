"""Any container that libavformat reads (AVI, FLV, GIF, ...), and whatever our parsers pass on: one pass over the packets, no decoding."""

from __future__ import annotations

import time
from fractions import Fraction

import av
import numpy as np

from ..limits import Limits, MediaError
from .track import Track


def read_packets(path: str, limits: Limits, deadline: float | None = None) -> Track:
    """The video track by reading every packet's header fields. Raises MediaError when there is none, or the time is up."""
    try:
        with av.open(path, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise MediaError(f"{path}: has no video track")
            stream = container.streams.video[0]
            context = stream.codec_context
            if context is None:
                raise MediaError(f"{path}: no decoder is known for its video track")
            ticks: list[int] = []
            sync: list[bool] = []
            shown: list[bool] = []
            timed = True
            for packet in container.demux(stream):
                if packet.size == 0:
                    continue
                if packet.pts is None:
                    timed = False
                    break
                ticks.append(packet.pts)
                sync.append(packet.is_keyframe)
                shown.append(not packet.is_discard)
                if len(ticks) & 1023 == 0:
                    limits.check_frames(len(ticks), path)
                    if deadline is not None and time.monotonic() > deadline:
                        raise MediaError(f"{path}: reading its packets took longer than the time limit")
            if not timed:
                ticks, sync, shown = _decode_times(path, limits, deadline)
            unit = stream.time_base or Fraction(1, av.time_base)
            duration = float(stream.duration * unit) if stream.duration else None
            limits.check_size(context.width, context.height, path)
            return Track(
                container=container.format.name,
                codec=context.name,
                width=context.width,
                height=context.height,
                unit=unit,
                ticks=np.array(ticks, np.int64),
                sync=np.array(sync, bool),
                shown=None if all(shown) else np.array(shown, bool),
                pixel_aspect_ratio=stream.sample_aspect_ratio or Fraction(1),
                duration=duration,
                timed=timed,
                unknown=("rotation",),
            )
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{path}: can't be read as a video: {error}") from error


def _decode_times(path: str, limits: Limits, deadline: float | None) -> tuple[list[int], list[bool], list[bool]]:
    """Times of a container that gives its packets none (H.264 with B-frames in AVI): only decoding tells."""
    ticks: list[int] = []
    sync: list[bool] = []
    with av.open(path, metadata_errors="ignore") as container:
        for frame in container.decode(video=0):
            if frame.pts is None:
                raise MediaError(f"{path}: its frames have no presentation times; convert it to MP4 or Matroska")
            ticks.append(frame.pts)
            sync.append(not sync)  # only a decode from the start is known to be right
            limits.check_frames(len(ticks), path)
            if deadline is not None and time.monotonic() > deadline:
                raise MediaError(f"{path}: decoding its times took longer than the time limit")
    return ticks, sync, [True] * len(ticks)
