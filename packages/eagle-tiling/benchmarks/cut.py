"""Cost of `tile_image` over Pillow's own two resizes (tiles and thumbnail), measured in turn.

    python packages/eagle-tiling/benchmarks/cut.py [--pairs 25] [--out FILE.json]

Each round runs every contender once, in rotating order. `of_pillow` is the median of the rounds' ratios to Pillow, with its quartiles.
"ours, out=" writes into an existing array.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from benchmarks.timing import interleaved_seconds, medians, quartiles, ratios
from eagle_tiling import select_grid, tile_image

S = 448
SIZES = [(224, 224), (300, 300), (640, 480), (480, 640), (800, 600), (1024, 768), (1280, 720), (1920, 1080), (1654, 2339), (4000, 3000)]
METRICS = {
    "ms": Metric("ms", "lower"),
    "of_pillow": Metric("", "lower"),
    "lower_quartile": Metric("", "none"),
    "upper_quartile": Metric("", "none"),
}


def measure(result: Result, image: Image.Image, pairs: int) -> None:
    grid = select_grid(*image.size, tile_size=S)
    sizes = [(grid.cols * S, grid.rows * S)] + ([(S, S)] if grid != (1, 1) else [])
    batch = tile_image(image, grid, tile_size=S)
    contenders = {
        "Pillow's resizes": lambda: [image.resize(size, Image.Resampling.BICUBIC) for size in sizes],
        "ours": lambda: tile_image(image, grid, tile_size=S),
        "ours, out=": lambda: tile_image(image, grid, tile_size=S, out=batch),
    }
    samples = interleaved_seconds(contenders, pairs)
    for name, seconds in medians(samples).items():
        low, middle, high = quartiles(ratios(samples[name], samples["Pillow's resizes"]))
        case = f"{image.width} x {image.height}, grid {grid.cols} x {grid.rows}"
        result.add(case, name, ms=seconds * 1e3, of_pillow=middle, lower_quartile=low, upper_quartile=high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=25, help="rounds (default: 25)")
    add_out(parser)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    result = Result("eagle-tiling/cut", environment(("numpy", "pillow")), METRICS, settings={"pairs": options.pairs})
    for width, height in SIZES:
        measure(result, Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)), options.pairs)
    report(result, options.out)


if __name__ == "__main__":
    main()
