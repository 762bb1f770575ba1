"""A slow reference of Eq. (1), and images."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image


def exact_grid(width: int, height: int, min_tiles: int = 1, max_tiles: int = 12, tile_size: int = 448) -> tuple[int, int]:
    """The best of all grids, with scores as fractions; ties: fewer tiles, then more columns."""
    best, best_score = (0, 0), Fraction(-1)
    for tiles in range(min_tiles, max_tiles + 1):
        for cols in range(tiles, 0, -1):
            if tiles % cols:
                continue
            rows = tiles // cols
            area = Fraction(tiles * tile_size * tile_size, width * height)
            bend = Fraction(cols, rows) / Fraction(width, height)
            score = min(area, Fraction(6, 10)) * min(bend, 1 / bend)
            if score > best_score:
                best, best_score = (cols, rows), score
    return best


def exact_grids(widths: np.ndarray, heights: np.ndarray, max_tiles: int, tile_size: int) -> np.ndarray:
    """The same for arrays in int64, [N, 2]. No product reaches 2^63 for 12 tiles of 448 and sides up to 20000: the first factor is
    at most 5 * 12 * 448^2, the other two at most 12 * 20000."""
    enough = 3 * widths * heights
    best = np.zeros((len(widths), 2), np.int64)
    above, below = np.zeros(len(widths), np.int64), np.ones(len(widths), np.int64)
    for tiles in range(1, max_tiles + 1):
        for cols in range(tiles, 0, -1):
            if tiles % cols:
                continue
            rows = tiles // cols
            area = np.minimum(5 * tiles * tile_size * tile_size, enough)
            wide, high = cols * heights, rows * widths
            low, top = np.minimum(wide, high), np.maximum(wide, high)
            better = area * low * below > above * top
            best[better] = cols, rows
            above[better], below[better] = (area * low)[better], top[better]
    return best


@pytest.fixture(scope="session", name="exact_grid")
def _exact_grid() -> Callable[..., tuple[int, int]]:
    return exact_grid


@pytest.fixture(scope="session", name="exact_grids")
def _exact_grids() -> Callable[..., np.ndarray]:
    return exact_grids


def noise(width: int, height: int, bands: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, bands]: half smooth, half noise, so that a shift, a swap or a clip changes it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([(x * (b + 1) + y * (3 - b)) % 256 for b in range(bands)], axis=2)
    return np.where(rng.random((height, width, 1)) < 0.5, smooth, rng.integers(0, 256, (height, width, bands))).astype(np.uint8)


@pytest.fixture(scope="session", name="noise")
def _noise() -> Callable[..., np.ndarray]:
    return noise


@pytest.fixture(scope="session")
def pillow_tiles() -> Callable[..., np.ndarray]:
    """Tiles by Pillow only: resize, crop, stack."""

    def cut(image: Image.Image, cols: int, rows: int, s: int, thumbnail: bool = True) -> np.ndarray:
        whole = image.resize((cols * s, rows * s), Image.Resampling.BICUBIC)
        tiles = [whole.crop((c * s, r * s, (c + 1) * s, (r + 1) * s)) for r in range(rows) for c in range(cols)]
        if thumbnail and len(tiles) > 1:
            tiles.append(image.resize((s, s), Image.Resampling.BICUBIC))
        return np.stack([np.asarray(tile) for tile in tiles])

    return cut
