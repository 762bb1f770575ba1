"""Small encodes, made on demand, and the reference for them: libav's decode from the first frame to the last."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

# With weighted prediction six of 60 encodings of one clip differed (x264 in PyAV 18.1), which moves what tests
# damage; without it none did.
X264 = {"preset": "veryfast", "g": "24", "bf": "3", "x264-params": "scenecut=0:weightp=0"}


def moving_pictures(count: int, width: int, height: int) -> list[np.ndarray]:
    """`count` different textured pictures, uint8 [h, w, 3]; each carries its number in the brightness of a corner."""
    rng = np.random.default_rng(width * 1000 + height)
    grid = rng.integers(0, 255, (height // 8 + 8, width // 8 + 8, 3), dtype=np.uint8)
    canvas = np.asarray(Image.fromarray(grid).resize((width + 64, height + 64), Image.Resampling.BICUBIC))
    pictures = []
    for i in range(count):
        picture = canvas[i % 60 : i % 60 + height, 2 * i % 60 : 2 * i % 60 + width].copy()
        picture[: height // 8, : width // 8] = i * 7 % 256
        pictures.append(picture)
    return pictures


def encode_video(
    path: Path,
    *,
    count: int = 60,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pixel_format: str = "yuv420p",
    ticks: list[int] | None = None,
    unit: Fraction | None = None,
    mux: dict[str, str] | None = None,
    fps: int = 30,
) -> Path:
    with av.open(str(path), "w", options=mux or {}) as out:
        stream = out.add_stream(codec, rate=fps, options=X264 if options is None else options)
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        stream.thread_count = 1
        if unit is not None:
            stream.codec_context.time_base = unit
        for i, picture in enumerate(moving_pictures(count, *size)):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            if ticks is not None:
                frame.pts, frame.time_base = ticks[i], unit
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def decode_all(path: Path, size: tuple[int, int] | None = None, rotation: int = 0, mirrored: bool = False) -> dict[int, np.ndarray]:
    """Presentation tick -> picture, for every frame of a plain decode of the whole file, converted as `read_frames` does."""
    return dict(decode_in_order(path, size, rotation, mirrored))


def decode_in_order(
    path: Path, size: tuple[int, int] | None = None, rotation: int = 0, mirrored: bool = False
) -> list[tuple[int, np.ndarray]]:
    """The same as (tick, picture) pairs: ticks of some containers are decoding times, and may repeat."""
    from eagle_sampling.video.decode import Painter

    pictures = []
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "NONE"
        packets = container.demux(video=0)
        while True:
            try:
                packet = next(packets, None)
                frames = [] if packet is None else packet.decode()
            except av.FFmpegError:
                continue  # a damaged file: ffmpeg continues with the next packet
            for frame in frames:
                width, height = size or (frame.width, frame.height)
                if rotation in (90, 270) and size is None:
                    width, height = height, width
                picture = np.zeros((1, height, width, 3), np.uint8)
                Painter(picture, rotation, mirrored, lambda: False).paint(frame, [0])
                pictures.append((frame.pts, picture[0]))
            if packet is None:
                break
    return pictures


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """media(name, **how) encodes once per session and returns the path."""
    folder = tmp_path_factory.mktemp("media")
    made: dict[str, Path] = {}

    def make(name: str, **how: object) -> Path:
        key = repr((name, sorted(how.items(), key=lambda item: item[0])))
        if key not in made:
            made[key] = encode_video(folder / f"{len(made)}-{name}", **how)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def pictures() -> Callable[..., list[np.ndarray]]:
    return moving_pictures


@pytest.fixture(scope="session")
def truth() -> Callable[..., dict[int, np.ndarray]]:
    return decode_all


@pytest.fixture(scope="session")
def shown_in_order() -> Callable[..., list[tuple[int, np.ndarray]]]:
    return decode_in_order


@pytest.fixture(scope="session")
def small_mp4(media: Callable[..., Path]) -> Path:
    """60 frames of 96 x 64 at 30 per second, H.264 with B-frames, keyframes at 0, 24, 48."""
    return media("small.mp4")
