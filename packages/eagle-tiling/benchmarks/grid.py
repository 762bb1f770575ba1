"""Speed of grid selection on one core: `select_grid` for new and cached sizes, `select_grids` for sizes that all differ.

    python packages/eagle-tiling/benchmarks/grid.py [--no-write]

Writes results/grid.{json,md}.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from report import write

from eagle_tiling import select_grid, select_grids
from eagle_tiling.grid import _select


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


def vector(max_tiles: int, widths: np.ndarray, heights: np.ndarray, repeats: int = 7) -> float:
    """Million images per second, median."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        select_grids(widths, heights, max_tiles=max_tiles)
        times.append(time.perf_counter() - start)
    return len(widths) / float(np.median(times)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    pairs = np.unique(rng.integers(0, 20000 * 20000, 1_100_000))  # sizes, no two the same
    rng.shuffle(pairs)
    pairs = pairs[:1_000_000]
    widths, heights = pairs // 20000 + 1, pairs % 20000 + 1
    sizes = list(zip(widths[:50_000].tolist(), heights[:50_000].tolist()))

    figures = []
    lines = ["| max_tiles | new size (us) | cached (us) | arrays, all sizes different (million/s) |", "|---|---|---|---|"]
    for max_tiles in (6, 12, 24, 40, 64):
        new, cached = scalar(max_tiles, sizes)
        rate = vector(max_tiles, widths, heights)
        figures.append({"max_tiles": max_tiles, "new_us": round(new, 2), "cached_us": round(cached, 2), "million_per_s": round(rate, 2)})
        lines.append(f"| {max_tiles} | {new:.1f} | {cached:.2f} | {rate:.1f} |")
    write("grid", "Choosing grids", "\n".join(lines), figures, save=not options.no_write)


if __name__ == "__main__":
    main()
