"""Small images and videos for tests."""

import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import av
import numpy as np
from PIL import Image


def random_pixels(seed: int = 0, size: tuple[int, int] = (50, 40)) -> np.ndarray:
    """uint8 [height, width, 3] for a `size` of (width, height)."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def random_image(seed: int = 0, size: tuple[int, int] = (50, 40)) -> Image.Image:
    return Image.fromarray(random_pixels(seed, size))


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def grey_frames(count: int, step: int, size: tuple[int, int] = (96, 64)) -> Iterator[np.ndarray]:
    """Frames of one grey each; that of frame `i` is `i * step`."""
    for index in range(count):
        yield np.full((size[1], size[0], 3), index * step, dtype=np.uint8)


def write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    fps: int = 10,
    options: Mapping[str, str] | None = None,
    mux: Mapping[str, str] | None = None,
    codec: str = "libx264",
) -> Path:
    """H.264, or another codec, of `frames`, uint8 [height, width, 3] each. `options`: of the encoder; `mux`: of the container."""
    frames = iter(frames)
    first = next(frames)
    with av.open(str(path), "w", options=dict(mux or {})) as container:
        stream = container.add_stream(codec, rate=fps, options=dict(options or {}))
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p"
        for pixels in (first, *frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path
