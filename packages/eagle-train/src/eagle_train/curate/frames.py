"""Every frame of a video, small: what shot detection reads. Nothing is kept in full size."""

from collections.abc import Iterator, Sequence
from typing import Literal

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from eagle_sampling import MediaError
from eagle_sampling.video.libav import at_rest, open_container

CHUNK = 256
"""Frames of a chunk: 0.5 MB at 48 x 27 pixels."""
SAMPLED = 4
"""A frame of at least so many times the width of a small one is sampled at twice that width before it is averaged: 0.09 instead of 0.43 ms
for a frame of 1280 x 720, of which 16 pixels remain for one of 48 x 27."""


class NoTimes(MediaError):
    """A video whose frames carry no times, so that a clip of it has no start."""


def times_of_frames(decoded: Sequence[NDArray[np.float64]], table: NDArray[np.float64], path: str) -> NDArray[np.float64]:
    """Seconds from the first frame of all decoded frames, float64 [n], rising.

    decoded: what `small_frames` gave; table: sorted times of the container's packets. The decoder's times are taken where they rise. An AVI
    file stores decoding times alone, and what is derived from them is wrong behind two B-frames in a row (XviD): then the n-th frame has
    the n-th time of the table. Raises NoTimes when that is not possible either, and MediaError without any frame.
    """
    if not decoded:
        raise MediaError(f"{path}: no frame of it can be decoded")
    for times in (np.concatenate(decoded), table):
        if len(times) == sum(map(len, decoded)) and np.isfinite(times).all() and (np.diff(times) > 0).all():
            return times - times[0]
    raise NoTimes(f"{path}: the times of its frames do not rise and can't be derived; write the file again with rising times")


def small_frames(
    path: str, width: int, height: int, *, colour: Literal["yuv", "rgb"] = "yuv", threads: int = 1
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float64]]]:
    """(pixels, times) in chunks; pixels uint8 [n, height, width, 3] for "rgb".

    For "yuv" pixels are uint8 [n, v], the planes Y (height x width), U and V (half of both, rounded up) one after the other.
    Frames are decoded without the loop filter (0.73 of the time on 720p H.264) and reduced by averaging, which hides its absence. Rotation
    is not applied. times: float64 [n], seconds on the file's own timeline as the decoder states them, NaN where it states none. Raises
    MediaError for a file that can't be opened or decoded to its end.
    """
    reduce = _Reducer(width, height, colour)
    times: list[float] = []
    count = 0
    try:
        with open_container(path) as container:
            if not container.streams.video:
                raise MediaError(f"{path}: has no video track")
            stream = container.streams.video[0]
            with at_rest(stream.codec_context) as context:
                context.thread_count = threads
                context.thread_type = "FRAME" if threads > 1 else "NONE"
                context.options = {"skip_loop_filter": "all", "flags2": "+fast"}
                for frame in container.decode(stream):
                    reduce.add(frame)
                    time = frame.time
                    times.append(np.nan if time is None else time)
                    count += 1
                    if len(times) == CHUNK:
                        yield reduce.take(), np.array(times)
                        times = []
    except av.FFmpegError as error:
        at = f"after {count} frames" if count else "before its first frame"
        raise MediaError(f"{path}: can't be decoded {at}: {error.strerror or error}") from error
    except OSError as error:
        raise MediaError(f"{path}: can't be read: {error.strerror or error}") from error
    if times:
        yield reduce.take(), np.array(times)


class _Reducer:
    """Reduces frames and collects them. The bytes of a plane are copied with their padding, which is cut off from a whole chunk at once."""

    def __init__(self, width: int, height: int, colour: Literal["yuv", "rgb"]) -> None:
        self.width, self.height, self.colour = width, height, colour
        self._kind = "yuv420p" if colour == "yuv" else "rgb24"
        self._sample, self._average = VideoReformatter(), VideoReformatter()
        self._planes: list[list[bytes]] = []
        self._strides: list[int] = []

    def add(self, frame: av.VideoFrame) -> None:
        width, height = self.width, self.height
        if frame.width >= SAMPLED * width and frame.height >= SAMPLED * height:
            frame = self._sample.reformat(frame, 2 * width, 2 * height, "yuv420p", interpolation=Interpolation.FAST_BILINEAR, threads=1)
        planes = self._average.reformat(frame, width, height, self._kind, interpolation=Interpolation.AREA, threads=1).planes
        if not self._strides:
            self._strides = [plane.line_size for plane in planes]
        self._planes.append([bytes(plane) for plane in planes])  # type: ignore[arg-type]

    def take(self) -> NDArray[np.uint8]:
        """What was added since the last call."""
        width, height, count = self.width, self.height, len(self._planes)
        half = ((height + 1) // 2, (width + 1) // 2)
        shapes = [(height, width), half, half] if self.colour == "yuv" else [(height, 3 * width)]
        parts = []
        for number, (rows, columns) in enumerate(shapes):
            lines = np.frombuffer(b"".join([planes[number] for planes in self._planes]), np.uint8)
            parts.append(lines.reshape(count, -1, self._strides[number])[:, :rows, :columns].reshape(count, -1))
        self._planes = []
        return np.concatenate(parts, axis=1) if self.colour == "yuv" else parts[0].reshape(count, height, width, 3)
