"""Speed of grid selection on one core: `select_grid` for new and cached sizes, `select_grids` for sizes that all differ.

python packages/eagle-tiling/benchmarks/grid.py [--sizes 1000000] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))  # the repository root, where the package `benchmarks` is
from benchmarks.environment import environment
from benchmarks.results import Metric, Result, add_out, report
from benchmarks.timing import interleaved_seconds, medians
from eagle_tiling import select_grid, select_grids
from eagle_tiling.grid import _select

METRICS = {"us": Metric("us per image", "lower"), "million_per_s": Metric("million images/s", "higher")}


def scalar(max_tiles: int, sizes: list[tuple[int, int]]) -> tuple[float, float]:
    """Microseconds for a new size and for a cached one."""
    select_grid(1, 1, max_tiles=max_tiles)  # builds the table
    _select.cache_clear()
    took = []
    for _ in range(2):
        start = time.perf_counter()
        for width, height in sizes:
            select_grid(width, height, max_tiles=max_tiles)
        took.append((time.perf_counter() - start) / len(sizes) * 1e6)
    return took[0], took[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=int, default=1_000_000, help="different image sizes (default: 1000000), a twentieth for select_grid"
    )
    add_out(parser)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    pairs = np.unique(rng.integers(0, 20000 * 20000, options.sizes + options.sizes // 10))  # no two sizes are the same
    rng.shuffle(pairs)
    pairs = pairs[: options.sizes]
    widths, heights = pairs // 20000 + 1, pairs % 20000 + 1
    few = max(1, options.sizes // 20)
    sizes = list(zip(widths[:few].tolist(), heights[:few].tolist()))

    result = Result("eagle-tiling/grid", environment(("numpy",)), METRICS, settings={"sizes": options.sizes})
    for max_tiles in (6, 12, 24, 40, 64):
        new, cached = scalar(max_tiles, sizes)
        result.add(f"select_grid, new size, max_tiles {max_tiles}", us=new)
        result.add(f"select_grid, cached size, max_tiles {max_tiles}", us=cached)
        run = {"ours": lambda max_tiles=max_tiles: select_grids(widths, heights, max_tiles=max_tiles)}
        seconds = medians(interleaved_seconds(run, 7, warmup=0))["ours"]
        result.add(f"select_grids, max_tiles {max_tiles}", million_per_s=len(widths) / seconds / 1e6)
    report(result, options.out)


if __name__ == "__main__":
    main()
