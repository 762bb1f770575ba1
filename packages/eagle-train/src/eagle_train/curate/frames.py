"""Every frame of a video, small: what shot detection reads. Nothing is kept in full size."""

import os
from collections.abc import Iterator
from typing import Literal

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from eagle_sampling import MediaError

CHUNK = 256
"""Frames of a chunk: 1 MB at 48 x 27 pixels."""


class NoTimes(MediaError):
    """A video whose frames carry no times, so that a clip of it has no start."""


def small_frames(
    path: str, width: int, height: int, *, colour: Literal["yuv", "rgb"] = "yuv", threads: int = 1
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float64]]]:
    """(pixels, times) in chunks: uint8 [n, 3, height, width] for "yuv", [n, height, width, 3] for "rgb"; times float64 [n], seconds on the
    file's own timeline.

    Frames are decoded without the loop filter (0.73 of the time on 720p H.264) and reduced by averaging, which hides its absence. Rotation
    is not applied. Raises MediaError for a file that can't be opened or decoded to its end, and NoTimes.
    """
    resize = VideoReformatter()
    kind = "yuv444p" if colour == "yuv" else "rgb24"
    pixels: list[NDArray[np.uint8]] = []
    times: list[float] = []
    last = -np.inf
    try:
        with av.open(os.path.abspath(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise MediaError(f"{path}: has no video track")
            stream = container.streams.video[0]
            context = stream.codec_context
            context.thread_count = threads
            context.thread_type = "FRAME" if threads > 1 else "NONE"
            context.options = {"skip_loop_filter": "all", "flags2": "+fast"}
            for frame in container.decode(stream):
                if frame.pts is None or frame.time_base is None:
                    raise NoTimes(f"{path}: its frames have no times; put the stream into an MP4 or Matroska file first")
                time = float(frame.pts * frame.time_base)
                if time <= last:
                    raise NoTimes(f"{path}: the frame after {last:.3f} s has the time {time:.3f} s; write the file again with rising times")
                last = time
                small = resize.reformat(frame, width, height, kind, interpolation=Interpolation.AREA, threads=1)
                pixels.append(_planes(small) if colour == "yuv" else _packed(small))
                times.append(time)
                if len(times) == CHUNK:
                    yield np.stack(pixels), np.array(times)
                    pixels, times = [], []
    except av.FFmpegError as error:
        at = f"after {last:.3f} s" if np.isfinite(last) else "before its first frame"
        raise MediaError(f"{path}: can't be decoded {at}: {error.strerror or error}") from error
    except OSError as error:
        raise MediaError(f"{path}: can't be read: {error.strerror or error}") from error
    if times:
        yield np.stack(pixels), np.array(times)


def _planes(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """uint8 [3, h, w]."""
    rows = (np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size) for plane in frame.planes)  # type: ignore[arg-type]
    return np.stack([plane[: frame.height, : frame.width] for plane in rows])


def _packed(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """uint8 [h, w, 3]."""
    plane = frame.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)  # type: ignore[arg-type]
    return rows[: frame.height, : 3 * frame.width].reshape(frame.height, frame.width, 3).copy()
