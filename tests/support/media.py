"""Small images and videos for tests."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import av
import numpy as np
from PIL import Image


def random_pixels(width: int, height: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]"""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def random_image(width: int = 50, height: int = 40, seed: int = 0) -> Image.Image:
    return Image.fromarray(random_pixels(width, height, seed))


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def write_video(
    path: Path, frames: Iterable[np.ndarray], fps: int = 10, options: Mapping[str, str] | None = None, mux: Mapping[str, str] | None = None
) -> Path:
    """H.264 of `frames`, uint8 [height, width, 3] each. `options`: of the encoder; `mux`: of the container."""
    frames = iter(frames)
    first = next(frames)
    with av.open(str(path), "w", options=dict(mux or {})) as container:
        stream = container.add_stream("libx264", rate=fps, options=dict(options or {}))
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p"
        for pixels in (first, *frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path
