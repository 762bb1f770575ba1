"""Large images with small digits on them, in seven segments, and InternVL's tiling rule for comparison.

An image shows digits in different colours; the question names a colour. Nothing needs a font.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

TILE = 64
COLOURS = {"red": (200, 20, 20), "green": (10, 120, 30), "blue": (20, 40, 210), "black": (10, 10, 10)}
#: Segments of the digits 0 to 9: top, upper left, upper right, middle, lower left, lower right, bottom.
SEGMENTS = ("1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011")
ASPECTS = {"1x1": (1, 1), "3x2": (3, 2), "16x9": (16, 9), "5x1": (5, 1)}


class Picture(NamedTuple):
    """An image file, and the digit in each colour."""

    path: str
    digits: dict[str, str]


def draw(
    width: int, height: int, heights: tuple[float, float], rng: np.random.Generator, colours: tuple[str, ...] = ()
) -> tuple[Image.Image, dict[str, str]]:
    """An image with a digit in each of `colours` (none: two of them), of heights in pixels drawn from `heights`, next to each other."""
    patches = Image.fromarray(rng.integers(150, 256, (4, 4, 3)).astype(np.uint8))
    image = patches.resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    digits: dict[str, str] = {}
    taken: list[tuple[float, float, float, float]] = []
    for colour in colours or tuple(rng.permutation(list(COLOURS))[:2].tolist()):
        high = float(rng.uniform(*heights))
        wide = 0.55 * high
        for _ in range(100):
            x, y = float(rng.uniform(1, width - wide - 1)), float(rng.uniform(1, height - high - 1))
            if all(x > right or x + wide < left or y > bottom or y + high < top for left, top, right, bottom in taken):
                break
        taken.append((x - 2, y - 2, x + wide + 2, y + high + 2))
        digits[colour] = str(rng.integers(10))
        _digit(pen, int(digits[colour]), x, y, wide, high, COLOURS[colour])
    return image, digits


def _digit(pen: ImageDraw.ImageDraw, digit: int, x: float, y: float, w: float, h: float, colour: tuple[int, int, int]) -> None:
    line = max(1.0, h / 8)
    middle, right, bottom = y + (h - line) / 2, x + w - line, y + h - line
    boxes = (
        (x, y, x + w, y + line),
        (x, y, x + line, middle + line),
        (right, y, right + line, middle + line),
        (x, middle, x + w, middle + line),
        (x, middle, x + line, y + h),
        (right, middle, right + line, y + h),
        (x, bottom, x + w, bottom + line),
    )
    for on, box in zip(SEGMENTS[digit], boxes):
        if on == "1":
            pen.rectangle((round(box[0]), round(box[1]), round(box[2]) - 1, round(box[3]) - 1), fill=colour)


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
    """JPEG without colour subsampling, since colours are the questions."""
    image.save(path, quality=95, subsampling=0)


def question(colour: str) -> str:
    """About one digit."""
    return f"Which digit is {colour}?"
