"""Frames that a request shows, as JPEG files."""

import io
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eagle_sampling import MediaError, probe, read_frames

from .answers import NoAnswer


class Shown(NamedTuple):
    """Frames that a request shows. content: hash of the video file; times: seconds from its first frame; side: longer side in pixels."""

    video: str
    content: str
    times: tuple[float, ...]
    side: int


def jpegs(shown: Shown) -> list[bytes]:
    """The frames of a request as JPEG files. Raises NoAnswer("bad-frames")."""
    try:
        info = probe(shown.video)
        scale = min(1.0, shown.side / max(info.width, info.height))
        size = (max(round(info.width * scale), 1), max(round(info.height * scale), 1))
        origin = 0.0 if info.times is None else float(info.times.times()[0])
        frames = read_frames(shown.video, [origin + time for time in shown.times], size)
    except MediaError as error:
        raise NoAnswer("bad-frames", str(error)) from error
    return [jpeg(pixels) for pixels in frames.pixels]


def jpeg(pixels: NDArray[np.uint8], quality: int = 85) -> bytes:
    """uint8 [h, w, 3] as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
