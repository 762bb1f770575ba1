"""Cost of `tile_image` over Pillow's own two resizes (tiles and thumbnail), measured in turn.

    python packages/eagle-tiling/benchmarks/cut.py [--pairs 25] [--no-write]

Each round runs all once, in turning order; a ratio is the median of the rounds' ratios. `out=` writes into an existing array.
Writes results/cut.{json,md}.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from PIL import Image
from report import write

from eagle_tiling import select_grid, tile_image

S = 448
SIZES = [(224, 224), (300, 300), (640, 480), (480, 640), (800, 600), (1024, 768), (1280, 720), (1920, 1080), (1654, 2339), (4000, 3000)]


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(image: Image.Image, pairs: int) -> dict:
    grid = select_grid(*image.size, tile_size=S)
    sizes = [(grid.cols * S, grid.rows * S)] + ([(S, S)] if grid != (1, 1) else [])

    def pillow() -> list[Image.Image]:
        return [image.resize(size, Image.Resampling.BICUBIC) for size in sizes]

    def ours() -> np.ndarray:
        return tile_image(image, grid, tile_size=S)

    batch = ours()

    def into_batch() -> np.ndarray:
        return tile_image(image, grid, tile_size=S, out=batch)

    rivals = (pillow, ours, into_batch)
    took = {function: [] for function in rivals}
    for i in range(-1, pairs):
        for j in range(3):
            function = rivals[(i + j) % 3]
            seconds = timed(function)
            if i >= 0:  # the first round warms up
                took[function].append(seconds)
    theirs, our, kept = (np.array(took[function]) for function in rivals)
    ratios = our / theirs
    return {
        "size": list(image.size),
        "grid": list(grid),
        "pillow_ms": round(float(np.median(theirs)) * 1e3, 2),
        "tile_image_ms": round(float(np.median(our)) * 1e3, 2),
        "ratio": round(float(np.median(ratios)), 3),
        "ratio_into_batch": round(float(np.median(kept / theirs)), 3),
        "quarter": [round(float(np.quantile(ratios, q)), 3) for q in (0.25, 0.75)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    figures = []
    lines = [
        "| image | grid | Pillow's resizes (ms) | tile_image (ms) | ratio (quartiles) | ratio with `out=` |",
        "|---|---|---|---|---|---|",
    ]
    for width, height in SIZES:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        f = measure(image, options.pairs)
        figures.append(f)
        low, high = f["quarter"]
        grid = f"{f['grid'][0]} x {f['grid'][1]}"
        times = f"{f['pillow_ms']:.1f} | {f['tile_image_ms']:.1f}"
        lines.append(f"| {width} x {height} | {grid} | {times} | {f['ratio']:.2f} ({low:.2f}-{high:.2f}) | {f['ratio_into_batch']:.2f} |")
    write("cut", "Cutting against Pillow's own resizes", "\n".join(lines), figures, save=not options.no_write)


if __name__ == "__main__":
    main()
