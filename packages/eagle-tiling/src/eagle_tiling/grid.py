"""Tile grid selection: Image Area Preservation, Eq. (1) of Eagle 2.5, exact for one size and for arrays of sizes.

Of all grids with `min_tiles <= c*r <= max_tiles` the one is chosen that maximises

    min(c*r*s^2 / (W*H), 0.6) * min(t/o, o/t)      t = c/r,  o = W/H

With `n0` the fewest tiles that reach the 0.6, the best grid with fewer than `n0` tiles and the best with `n0` or more each depend on the
aspect alone, and both change only where `(W/H)^2` passes a small fraction. So a table, built once with integers, gives the grid with one
search and one comparison, for scalars and arrays. Ties are exact: distinct fractions this small are distinct as floats.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from operator import index
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

MOST_TILES = 64  # products in _build stay below 2^63 up to here
_EXACT_SIDE = 1 << 19  # up to here float64 distinguishes (W/H)^2 from every cut of a 64-tile table
_CHUNK = 1 << 14  # 20 temporaries of 128 KiB stay in the second-level cache


class Grid(NamedTuple):
    """Columns and rows of tiles."""

    cols: int
    rows: int


class _Table(NamedTuple):
    grids: list[Grid]  # G grids in order of preference among equals: fewer tiles, then more columns
    cuts: NDArray[np.float64]  # float64 [B]: values of (W/H)^2 at which a choice changes
    cuts_list: list[float]
    cells: int  # 2B + 1: cell 2i is the open interval below cut i, cell 2i + 1 the cut itself
    small: NDArray[np.int16]  # int16 [(max - min + 2) * cells]: best grid with fewer than n0 tiles
    large: NDArray[np.int16]  # int16, likewise: best grid with n0 tiles or more
    small_list: list[int]
    large_list: list[int]
    cols: NDArray[np.int64]  # int64 [G]
    rows: NDArray[np.int64]  # int64 [G]
    aspect: NDArray[np.float64]  # float64 [G]: c/r
    tiles: NDArray[np.float64]  # float64 [G]: c*r


def select_grid(width: int, height: int, *, min_tiles: int = 1, max_tiles: int = 12, tile_size: int = 448) -> Grid:
    """The grid of Image Area Preservation (Eagle 2.5, Eq. 1) for an image of `width` x `height` pixels, as displayed.

    Ties go to fewer tiles, then to more columns. The result is that of exact rational arithmetic and is cached per size.

    Eq. (1) does not bound enlargement: an image of 10 x 15 pixels with `max_tiles=6` gets 2 x 3 tiles. To bound the enlarged area to `u`
    times the image's, pass `max_tiles=max(1, min(max_tiles, int(u * width * height / tile_size**2)))`.

    Raises:
        ValueError: a side or `tile_size` below 1, or limits without 1 <= min_tiles <= max_tiles <= 64.
        TypeError: an argument that is not an integer.
    """
    try:
        return _select(index(width), index(height), index(min_tiles), index(max_tiles), index(tile_size))
    except TypeError:
        given = {"width": width, "height": height, "min_tiles": min_tiles, "max_tiles": max_tiles, "tile_size": tile_size}
        for name, value in given.items():
            whole_number(name, value)
        raise


def select_grids(
    widths: npt.ArrayLike, heights: npt.ArrayLike, *, min_tiles: int = 1, max_tiles: int = 12, tile_size: int = 448
) -> NDArray[np.int64]:
    """`select_grid` for arrays: `widths` and `heights` [N] in pixels, integers -> int64 [N, 2] of (columns, rows).

    Raises:
        ValueError: arrays of different lengths, a side below 1 or beyond 2^63 - 1 (its position is named), or limits as in `select_grid`.
        TypeError: arrays that are not of integers.
    """
    w, h = _sides(widths, heights)
    min_tiles, max_tiles, tile_size = _limits(min_tiles, max_tiles, tile_size)
    table = _table(min_tiles, max_tiles)
    chosen = _choose_many(w, h, table, min_tiles, max_tiles, tile_size)
    grids = np.empty((len(w), 2), np.int64)
    np.take(table.cols, chosen, out=grids[:, 0])
    np.take(table.rows, chosen, out=grids[:, 1])
    return grids


def tile_count(grid: tuple[int, int], *, thumbnail: bool = True) -> int:
    """Tiles that `tile_image` makes for `grid` = (columns, rows): their product, plus the thumbnail when there is more than one tile.

    Raises:
        ValueError: a side below 1, or not two of them.
        TypeError: not two integers.
    """
    cols, rows = grid_sides(grid)
    tiles = cols * rows
    return tiles + 1 if thumbnail and tiles > 1 else tiles


def grid_sides(grid: tuple[int, int]) -> tuple[int, int]:
    """`grid` as two Python integers of at least 1. Raises as `tile_count`."""
    try:
        cols, rows = grid
        cols, rows = index(cols), index(rows)
    except (TypeError, ValueError) as error:
        raise type(error)(f"grid = {grid!r}: need two whole numbers, (columns, rows)") from None
    if cols < 1 or rows < 1:
        raise ValueError(f"grid {cols} x {rows}: a grid has at least one column and one row")
    return cols, rows


def whole_number(name: str, value: int) -> int:
    """`value` as a Python integer. Raises TypeError, which names it."""
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"{name} = {value!r}: need a whole number") from None


def tile_counts(
    widths: npt.ArrayLike,
    heights: npt.ArrayLike,
    *,
    min_tiles: int = 1,
    max_tiles: int = 12,
    tile_size: int = 448,
    thumbnail: bool = True,
) -> NDArray[np.int64]:
    """`tile_count` of the selected grid of every size: `widths` and `heights` [N] in pixels -> int64 [N]. Raises as `select_grids`."""
    w, h = _sides(widths, heights)
    min_tiles, max_tiles, tile_size = _limits(min_tiles, max_tiles, tile_size)
    table = _table(min_tiles, max_tiles)
    per_grid = np.array([tile_count(grid, thumbnail=thumbnail) for grid in table.grids], np.int64)
    return per_grid[_choose_many(w, h, table, min_tiles, max_tiles, tile_size)]


def tile_tokens(grid: tuple[int, int], k: int, *, thumbnail: bool = True) -> int:
    """Visual tokens of an image with this `grid` at `k` tokens per tile, thumbnail included.

    Raises:
        ValueError: `k` below 1, or a grid as in `tile_count`.
        TypeError: `k` or the grid is not of integers.
    """
    k = whole_number("k", k)
    if k < 1:
        raise ValueError(f"k = {k}: a tile has at least one token")
    return k * tile_count(grid, thumbnail=thumbnail)


def _limits(min_tiles: int, max_tiles: int, tile_size: int) -> tuple[int, int, int]:
    min_tiles, max_tiles = whole_number("min_tiles", min_tiles), whole_number("max_tiles", max_tiles)
    tile_size = whole_number("tile_size", tile_size)
    if not 1 <= min_tiles <= max_tiles <= MOST_TILES:
        raise ValueError(f"min_tiles = {min_tiles}, max_tiles = {max_tiles}: need 1 <= min_tiles <= max_tiles <= {MOST_TILES}")
    if tile_size < 1:
        raise ValueError(f"tile_size = {tile_size}: need at least 1")
    return min_tiles, max_tiles, tile_size


def _sides(widths: npt.ArrayLike, heights: npt.ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    w, h = np.asarray(widths), np.asarray(heights)
    if w.ndim != 1 or w.shape != h.shape:
        raise ValueError(f"widths {w.shape} and heights {h.shape}: need two arrays of the same length")
    if w.size == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if w.dtype.kind not in "iu" or h.dtype.kind not in "iu":
        raise TypeError(f"widths are {w.dtype}, heights {h.dtype}: sizes are whole pixels; pass integer arrays")
    if w.min() < 1 or h.min() < 1:
        at = int(np.argmax((w < 1) | (h < 1)))
        raise ValueError(f"image {at} is {w[at]} x {h[at]} pixels: both sides must be at least 1")
    if max(w.max(), h.max()) > np.iinfo(np.int64).max:
        at = int(np.argmax((w > np.iinfo(np.int64).max) | (h > np.iinfo(np.int64).max)))
        raise ValueError(f"image {at} is {w[at]} x {h[at]} pixels: a side is beyond 2^63 - 1; a negative number stored as uint64?")
    return w.astype(np.int64, copy=False), h.astype(np.int64, copy=False)


@lru_cache(maxsize=1 << 16)
def _select(width: int, height: int, min_tiles: int, max_tiles: int, tile_size: int) -> Grid:
    _limits(min_tiles, max_tiles, tile_size)
    if width < 1 or height < 1:
        raise ValueError(f"image is {width} x {height} pixels: both sides must be at least 1")
    table = _table(min_tiles, max_tiles)
    n0 = -(-3 * width * height // (5 * tile_size * tile_size))  # fewest tiles with n s^2 >= 0.6 W H
    row = min(max(n0, min_tiles), max_tiles + 1) - min_tiles
    if max(width, height) <= _EXACT_SIDE:
        squared = (width * width) / (height * height)
        at = bisect_left(table.cuts_list, squared)
        cell = 2 * at + (at < len(table.cuts_list) and table.cuts_list[at] == squared)
        flat = row * table.cells + cell
        small, large = table.grids[table.small_list[flat]], table.grids[table.large_list[flat]]
        return large if _better(large, small, width, height, tile_size) else small
    best = table.grids[0]
    for grid in table.grids[1:]:
        if _better(grid, best, width, height, tile_size):
            best = grid
    return best


def _better(a: Grid, b: Grid, width: int, height: int, tile_size: int) -> bool:
    """Whether `a` scores strictly higher than `b` in Eq. (1), in integers: both scores times 5 W H and cross-multiplied."""
    area = 5 * tile_size * tile_size
    enough = 3 * width * height
    a_wide, a_high = a.cols * height, a.rows * width
    b_wide, b_high = b.cols * height, b.rows * width
    left = min(a.cols * a.rows * area, enough) * min(a_wide, a_high) * max(b_wide, b_high)
    right = min(b.cols * b.rows * area, enough) * min(b_wide, b_high) * max(a_wide, a_high)
    return left > right


def _choose_many(
    w: NDArray[np.int64], h: NDArray[np.int64], table: _Table, min_tiles: int, max_tiles: int, tile_size: int
) -> NDArray[np.intp]:
    """w, h: int64 [N] -> intp [N], indices into `table.grids`."""
    chosen = np.empty(len(w), np.intp)
    plain = tile_size <= _EXACT_SIDE and (len(w) == 0 or max(w.max(), h.max()) <= _EXACT_SIDE)
    if not plain:
        place = {grid: i for i, grid in enumerate(table.grids)}
        sizes, back = np.unique(np.stack([w, h], axis=1), axis=0, return_inverse=True)
        answers = [place[_select(a, b, min_tiles, max_tiles, tile_size)] for a, b in sizes.tolist()]
        return np.array(answers, np.intp)[back.reshape(-1)]
    for start in range(0, len(w), _CHUNK):
        part = slice(start, start + _CHUNK)
        chosen[part] = _choose_chunk(w[part], h[part], table, min_tiles, max_tiles, tile_size)
    return chosen


def _choose_chunk(
    w: NDArray[np.int64], h: NDArray[np.int64], table: _Table, min_tiles: int, max_tiles: int, tile_size: int
) -> NDArray[np.intp]:
    wide, high = w.astype(np.float64), h.astype(np.float64)
    squared = (wide * wide) / (high * high)
    at = np.searchsorted(table.cuts[:-1], squared)  # the last cut is a sentinel (infinity), so that cuts[at] exists
    cell = 2 * at + (table.cuts[at] == squared)
    area = 5 * tile_size * tile_size
    enough = 3 * (w * h)
    n0 = -(-enough // area)
    flat = (np.clip(n0, min_tiles, max_tiles + 1) - min_tiles) * table.cells + cell
    small, large = table.small[flat], table.large[flat]
    ratio = high / wide
    of_small, of_large = table.aspect[small] * ratio, table.aspect[large] * ratio
    score_small = (table.tiles[small] * area) * np.minimum(of_small, 1 / of_small)
    score_large = enough * np.minimum(of_large, 1 / of_large)
    chosen = np.where(score_large > score_small, large, small).astype(np.intp)
    # Without small (or without large) grids both tables hold the same grid. Scores within 1e-12 are compared again, as integers.
    close = np.flatnonzero((np.abs(score_large - score_small) <= 1e-12 * score_large) & (small != large))
    for i in close.tolist():
        grid = _better(table.grids[int(large[i])], table.grids[int(small[i])], int(w[i]), int(h[i]), tile_size)
        chosen[i] = large[i] if grid else small[i]
    return chosen


@lru_cache(maxsize=64)
def _table(min_tiles: int, max_tiles: int) -> _Table:
    """The best grids by aspect. Scores are compared squared, as fractions in int64: at (W/H)^2 = p/q a grid's aspect term squared is
    min(a, b) / max(a, b) with a = p r^2, b = q c^2.
    """
    grids = [Grid(n // r, r) for n in range(min_tiles, max_tiles + 1) for r in range(1, n + 1) if n % r == 0]
    p, q = _cuts(grids)
    # Cells in order: interval, cut, interval, ..., interval. An interval is represented by the mediant of its ends (0/1 and 1/0 outside).
    ends_p, ends_q = np.concatenate([[0], p, [1]]), np.concatenate([[1], q, [0]])
    cells_p, cells_q = np.empty(2 * len(p) + 1, np.int64), np.empty(2 * len(p) + 1, np.int64)
    cells_p[0::2], cells_q[0::2] = ends_p[:-1] + ends_p[1:], ends_q[:-1] + ends_q[1:]
    cells_p[1::2], cells_q[1::2] = p, q

    levels = max_tiles - min_tiles + 2  # n0 = min_tiles .. max_tiles + 1
    small = np.zeros((levels, len(cells_p)), np.int16)
    large = np.zeros((levels, len(cells_p)), np.int16)
    best = _Champion(cells_p, cells_q, by_area=True)
    for i, grid in enumerate(grids):
        best.challenge(i, grid, wins_ties=False)
        small[grid.cols * grid.rows - min_tiles + 1 :] = best.index
    best = _Champion(cells_p, cells_q, by_area=False)
    for i in reversed(range(len(grids))):
        best.challenge(i, grids[i], wins_ties=True)
        large[: grids[i].cols * grids[i].rows - min_tiles + 1] = best.index
    small[0], large[-1] = large[0], small[-1]

    both = np.concatenate([small, large])
    differs = (both[:, 1::2] != both[:, 0:-1:2]) | (both[:, 1::2] != both[:, 2::2])
    keep = np.flatnonzero(differs.any(axis=0))
    kept_cells = np.concatenate([[0], np.stack([2 * keep + 1, 2 * keep + 2], axis=1).reshape(-1)]).astype(np.intp)
    cuts = np.concatenate([p[keep] / q[keep], [np.inf]])
    small, large = (np.ascontiguousarray(best[:, kept_cells]).reshape(-1) for best in (small, large))
    return _Table(
        grids=grids,
        cuts=cuts,
        cuts_list=cuts[:-1].tolist(),
        cells=len(kept_cells),
        small=small,
        large=large,
        small_list=small.tolist(),
        large_list=large.tolist(),
        cols=np.array([grid.cols for grid in grids], np.int64),
        rows=np.array([grid.rows for grid in grids], np.int64),
        aspect=np.array([grid.cols / grid.rows for grid in grids]),
        tiles=np.array([float(grid.cols * grid.rows) for grid in grids]),
    )


def _cuts(grids: list[Grid]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All p/q in rising order at which two scores can cross: aspect terms alone at c c'/(r r'), weighted with c r at (c/r')^2."""
    shapes = np.array(grids, np.int64)
    cols, rows = shapes[:, 0], shapes[:, 1]
    c, r = np.unique(cols), np.unique(rows)
    p = np.concatenate([np.multiply.outer(cols, cols).reshape(-1), np.repeat(c * c, len(r))])
    q = np.concatenate([np.multiply.outer(rows, rows).reshape(-1), np.tile(r * r, len(c))])
    common = np.gcd(p, q)
    p, q = np.unique(np.stack([p // common, q // common]), axis=1)
    order = np.argsort(p / q)
    return p[order], q[order]


class _Champion:
    """The best grid so far in every cell, scores as exact fractions."""

    def __init__(self, p: NDArray[np.int64], q: NDArray[np.int64], *, by_area: bool) -> None:
        self.p, self.q, self.by_area = p, q, by_area
        self.index = np.zeros(len(p), np.int16)
        self.above, self.below = np.full(len(p), -1, np.int64), np.ones(len(p), np.int64)

    def challenge(self, i: int, grid: Grid, *, wins_ties: bool) -> None:
        a, b = self.p * grid.rows**2, self.q * grid.cols**2
        above, below = np.minimum(a, b), np.maximum(a, b)
        if self.by_area:
            above = above * (grid.cols * grid.rows) ** 2
        left, right = above * self.below, self.above * below
        wins = left >= right if wins_ties else left > right
        self.index[wins] = i
        self.above[wins], self.below[wins] = above[wins], below[wins]
