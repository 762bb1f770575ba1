"""Image Area Preservation in the data pipeline of another vision-language model, with eagle-tiling alone (numpy, Pillow; no torch).

A LLaVA-style pipeline turns a row into text with image tokens and an array of crops. Only two of its steps know about tiling: how many
tokens an image costs, and which crops it becomes. Here both come from eagle_tiling, with the tile size and the tokens per tile of the other
model.
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from eagle_tiling import load_rgb, select_grid, tile_counts, tile_image, tile_tokens

TILE = 336  # pixels, for example CLIP-L/336
TOKENS_PER_TILE = 144  # (336 / 14)^2 patches, 2 x 2 of them merged
MAX_TILES = 6
IMAGE_TOKEN = "<image_pad>"


class Item(NamedTuple):
    """One row of a batch: prompt with one IMAGE_TOKEN per visual token, and its crops, float32 [n, 3, TILE, TILE] in [-1, 1]."""

    prompt: str
    crops: np.ndarray


def process(image: Image.Image, question: str) -> Item:
    """What the other pipeline's `__getitem__` does with a row."""
    image = load_rgb(image)  # EXIF orientation applied, alpha on white, any mode to RGB
    grid = select_grid(*image.size, tile_size=TILE, max_tiles=MAX_TILES)
    tiles = tile_image(image, grid, tile_size=TILE)  # uint8 [n, TILE, TILE, 3]: row by row, then the thumbnail
    tokens = tile_tokens(grid, TOKENS_PER_TILE)
    assert tokens == len(tiles) * TOKENS_PER_TILE
    crops = (tiles.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)
    return Item(f"{IMAGE_TOKEN * tokens}\n{question}", crops)


def batches_by_cost(sizes: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Indices of images grouped so that a batch costs at most `budget` visual tokens; sizes int [n, 2], no image is opened."""
    costs = tile_counts(sizes[:, 0], sizes[:, 1], tile_size=TILE, max_tiles=MAX_TILES) * TOKENS_PER_TILE
    start, spent = 0, 0
    for index, cost in enumerate(costs.tolist()):
        if spent + cost > budget and index > start:
            yield np.arange(start, index)
            start, spent = index, 0
        spent += cost
    yield np.arange(start, len(costs))


def main() -> None:
    """Process three images of different shapes, then group 10 000 sizes into batches."""
    rng = np.random.default_rng(0)
    for width, height in ((640, 480), (1280, 400), (300, 900)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        item = process(image, "What is in this picture?")
        print(f"{width} x {height}: {len(item.crops)} crops, {item.prompt.count(IMAGE_TOKEN)} visual tokens")

    sizes = rng.integers(100, 3000, (10_000, 2))
    batches = list(batches_by_cost(sizes, budget=8192))
    print(f"{len(sizes)} images in {len(batches)} batches of at most 8192 visual tokens")
    assert sum(map(len, batches)) == len(sizes)
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
