"""Generated videos with known cuts, and an encoder for tests."""

from pathlib import Path

import numpy as np
import pytest

from eagle_train.curate.encoders import Encoder
from tests.support import media


def scene(seed: int, frames: int, size: tuple[int, int] = (96, 64)) -> list[np.ndarray]:
    """A smooth coloured picture that drifts by one pixel per frame: uint8 [h, w, 3] each."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    base, swing = rng.uniform(40, 215, 3), rng.uniform(10, 40, 3)
    waves = rng.uniform(0.05, 0.2, (3, 2))
    return [
        np.stack([(base[c] + swing[c] * np.sin(waves[c, 0] * (x + t) + waves[c, 1] * y)) for c in range(3)], -1)
        .clip(0, 255)
        .astype(np.uint8)
        for t in range(frames)
    ]


def film(path: Path, lengths: list[int], fps: int = 10, first_seed: int = 0) -> Path:
    """Scenes of these numbers of frames with hard cuts between them."""
    frames = [frame for index, length in enumerate(lengths) for frame in scene(first_seed + index, length)]
    return media.write_video(path, frames, fps, {"g": "25", "preset": "ultrafast"})


def mean_colours(device: str) -> Encoder:
    """Mean colours of a 4 x 4 grid, around the middle grey: 48 values."""

    def encode(frames: np.ndarray) -> np.ndarray:
        cells = frames.reshape(len(frames), 4, 8, 4, 8, 3).mean(axis=(2, 4))
        return (cells.reshape(len(frames), -1) - 127.3).astype(np.float32)

    return Encoder(32, encode)


ENCODER = f"{__name__}:mean_colours"


@pytest.fixture
def three_videos(tmp_path: Path) -> Path:
    """A folder with videos of 3, 2 and 1 scenes."""
    folder = tmp_path / "videos"
    folder.mkdir()
    film(folder / "a.mp4", [30, 20, 40], first_seed=0)
    film(folder / "b.mp4", [25, 35], first_seed=10)
    film(folder / "c.mp4", [50], first_seed=20)
    return folder
