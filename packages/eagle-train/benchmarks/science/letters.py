"""Large images with one small letter on them, and InternVL's tiling rule for comparison.

Letters are blocks of 3 x 5 cells, so nothing needs a font. Where an image is reduced so far that a cell is less than a pixel, letters look
alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

TILE = 32
LETTERS = {
    "C": ("111", "100", "100", "100", "111"),
    "E": ("111", "100", "111", "100", "111"),
    "H": ("101", "101", "111", "101", "101"),
    "L": ("100", "100", "100", "100", "111"),
    "O": ("111", "101", "101", "101", "111"),
    "T": ("111", "010", "010", "010", "010"),
}
ASPECTS = {"1x1": (1, 1), "3x2": (3, 2), "16x9": (16, 9), "5x1": (5, 1)}
LARGE = 45.0
"""Area of a large image in tiles."""
HEIGHTS = (10.0, 20.0)
"""Height of a letter in pixels of the large image, which either rule reduces to 0.34 to 0.67 of its size."""
TILE_HEIGHTS, REDUCED = (14.0, 26.0), (0.33, 0.75)
"""Of single tiles: height of a letter, and to how much of its size either side is reduced then. Few are too small to be read."""


class Picture(NamedTuple):
    """An image file, and the letter on it."""

    path: str
    letter: str


def draw(width: int, height: int, heights: tuple[float, float], rng: np.random.Generator) -> tuple[Image.Image, str]:
    """An image with soft light patches and a dark letter anywhere on it, of a height in pixels drawn from `heights`."""
    patches = Image.fromarray(rng.integers(150, 256, (4, 4, 3)).astype(np.uint8))
    image = patches.resize((width, height), Image.Resampling.BICUBIC)
    letter = str(rng.choice(list(LETTERS)))
    high = round(float(rng.uniform(*heights)))
    wide = round(0.7 * high)
    cells = np.array([[255 * int(cell) for cell in line] for line in LETTERS[letter]], np.uint8)
    mask = Image.fromarray(cells).resize((wide, high), Image.Resampling.NEAREST)
    colour = tuple(int(value) for value in rng.integers(0, 60, 3))
    image.paste(colour, (int(rng.integers(1, width - wide)), int(rng.integers(1, height - high))), mask)
    return image, letter


def draw_tile(rng: np.random.Generator) -> tuple[Image.Image, str]:
    """A single tile with a letter in the sizes that letters have in the tiles of large images."""
    width, height = (round(TILE / float(rng.uniform(*REDUCED))) for _ in range(2))
    image, letter = draw(width, height, TILE_HEIGHTS, rng)
    return image.resize((TILE, TILE), Image.Resampling.BICUBIC), letter


def size_of(aspect: tuple[int, int], tiles: float) -> tuple[int, int]:
    """Width and height of an image with the area of `tiles` tiles."""
    ratio = aspect[0] / aspect[1]
    side = TILE * math.sqrt(tiles)
    return round(side * math.sqrt(ratio)), round(side / math.sqrt(ratio))


def internvl_grid(width: int, height: int, max_tiles: int, tile: int = TILE) -> tuple[int, int]:
    """Columns and rows of InternVL 1.5's `find_closest_aspect_ratio`: the aspect decides, and the area only between equal aspects."""
    grids = sorted(
        {(cols, rows) for cols in range(1, max_tiles + 1) for rows in range(1, max_tiles + 1) if cols * rows <= max_tiles},
        key=lambda grid: grid[0] * grid[1],
    )
    best, least = (1, 1), float("inf")
    for cols, rows in grids:
        difference = abs(width / height - cols / rows)
        if difference < least:
            best, least = (cols, rows), difference
        elif difference == least and width * height > 0.5 * tile * tile * cols * rows:
            best = (cols, rows)
    return best


def for_internvl(image: Image.Image, max_tiles: int) -> Image.Image:
    """The image in the size of InternVL's grid. IAP gives such an image exactly that grid, so nothing else of the pipeline changes."""
    cols, rows = internvl_grid(*image.size, max_tiles)
    return image.resize((cols * TILE, rows * TILE), Image.Resampling.BICUBIC)


def save(image: Image.Image, path: Path) -> None:
    """PNG, since letters are a few pixels large."""
    image.save(path, compress_level=1)


QUESTION = "What is in the pictures?"


def answer(letters: Sequence[str]) -> str:
    """Letters by the number of their image, as the prompt counts images."""
    return ", ".join(f"{number} {letter}" for number, letter in enumerate(letters, 1))
