"""The grid of Eq. (1): scalars, arrays and exact arithmetic agree, ties included."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eagle_tiling import Grid, select_grid, select_grids, tile_count, tile_counts, tile_tokens

sides = st.one_of(st.integers(1, 20000), st.integers(1, 60), st.integers(1, 45).map(lambda n: 448 * n))
limits = st.tuples(st.integers(1, 64), st.integers(1, 64)).map(sorted)
tile_sizes = st.one_of(st.sampled_from([14, 224, 384, 448, 512]), st.integers(1, 3000))


@settings(deadline=None, max_examples=120)
@given(width=sides, height=sides, limits=limits, tile_size=tile_sizes)
@example(width=1, height=20000, limits=[1, 12], tile_size=448)
@example(width=20000, height=1, limits=[7, 7], tile_size=448)
@example(width=448, height=448, limits=[2, 3], tile_size=448)
def test_scalar_and_vector_are_exact(exact_grid, width, height, limits, tile_size):
    options = {"min_tiles": limits[0], "max_tiles": limits[1], "tile_size": tile_size}
    truth = exact_grid(width, height, **options)
    assert select_grid(width, height, **options) == truth
    assert tuple(select_grids([width], [height], **options)[0].tolist()) == truth


@settings(deadline=None, max_examples=60)
@given(a=st.integers(1, 64), b=st.integers(1, 64), scale=st.integers(1, 300), limits=limits, tile_size=st.integers(1, 40))
def test_ties_of_aspect(exact_grid, a, b, scale, limits, tile_size):
    # The aspect of a grid, or of columns of one over rows of another: exactly where two scores cross.
    options = {"min_tiles": limits[0], "max_tiles": limits[1], "tile_size": tile_size}
    truth = exact_grid(a * scale, b * scale, **options)
    assert select_grid(a * scale, b * scale, **options) == truth
    assert tuple(select_grids([a * scale], [b * scale], **options)[0].tolist()) == truth


@pytest.mark.parametrize(("max_tiles", "tile_size"), [(12, 5), (12, 15), (12, 30), (6, 20), (9, 448), (40, 25)])
def test_every_small_size(exact_grids, max_tiles, tile_size):
    # With small tiles, 300 x 300 sizes contain every kind of tie: n s^2 = 0.6 W H, equal aspects, transposed grids.
    heights, widths = (axis.reshape(-1) + 1 for axis in np.mgrid[0:300, 0:300])
    expected = exact_grids(widths, heights, max_tiles, tile_size)
    assert np.array_equal(select_grids(widths, heights, max_tiles=max_tiles, tile_size=tile_size), expected)
    for i in np.random.default_rng(1).choice(len(widths), 300, replace=False).tolist():
        grid = select_grid(int(widths[i]), int(heights[i]), max_tiles=max_tiles, tile_size=tile_size)
        assert grid == tuple(expected[i].tolist())


def test_small_sizes_contain_ties():
    # Without ties the test above would be weak: n s^2 = 0.6 W H exactly, and two grids with equal scores.
    heights, widths = (axis.reshape(-1) + 1 for axis in np.mgrid[0:300, 0:300])
    assert sum(int((5 * n * 15 * 15 == 3 * widths * heights).sum()) for n in range(1, 13)) > 100
    assert select_grid(30, 30, min_tiles=2, max_tiles=2, tile_size=30) == (2, 1)


def test_large_sizes(exact_grids):
    rng = np.random.default_rng(2)
    widths, heights = rng.integers(1, 20001, 300_000), rng.integers(1, 20001, 300_000)
    assert np.array_equal(select_grids(widths, heights), exact_grids(widths, heights, 12, 448))


def test_beyond_float(exact_grid):
    # Sides beyond 2^19 are not looked up in the table of floats; a size one pixel off a tie is still distinguished.
    for width, height in [(10**9, 10**9 + 1), (10**9 + 1, 10**9), (3 * 10**12, 2 * 10**12), (2**31, 2**29), (1 << 19, (1 << 19) + 1)]:
        truth = exact_grid(width, height, 1, 24, 448)
        assert select_grid(width, height, max_tiles=24) == truth
        if width * height < 2**62:
            assert tuple(select_grids([width], [height], max_tiles=24)[0].tolist()) == truth
    assert select_grid(5, 7, tile_size=10**9) == exact_grid(5, 7, 1, 12, 10**9)
    assert select_grids([5], [7], tile_size=10**9).tolist() == [list(exact_grid(5, 7, 1, 12, 10**9))]


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((448, 448), (1, 1)),
        ((640, 480), (4, 3)),
        ((1920, 1080), (4, 2)),
        ((300, 300), (1, 1)),
        ((1, 20000), (1, 12)),
        ((4000, 700), (6, 1)),
    ],
)
def test_known_grids(size, grid):
    assert select_grid(*size) == grid


@settings(deadline=None, max_examples=100)
@given(width=sides, height=sides, tile_size=tile_sizes, factor=st.integers(2, 9), max_tiles=st.integers(1, 64))
def test_laws(width, height, tile_size, factor, max_tiles):
    grid = select_grid(width, height, tile_size=tile_size, max_tiles=max_tiles)
    assert grid == select_grid(width * factor, height * factor, tile_size=tile_size * factor, max_tiles=max_tiles)
    # Rotated by 90 degrees: the rotated grid, or one with the same score.
    turned = select_grid(height, width, tile_size=tile_size, max_tiles=max_tiles)
    assert turned.cols * turned.rows == grid.cols * grid.rows
    # A higher cap never gives fewer tiles: ADS relies on it.
    counts = [tile_count(select_grid(width, height, tile_size=tile_size, max_tiles=cap)) for cap in (1, 2, 4, 6, 8, 12)]
    assert counts == sorted(counts)


def test_counts_and_tokens():
    assert [tile_count(Grid(1, 1)), tile_count((2, 1)), tile_count((4, 3)), tile_count((4, 3), thumbnail=False)] == [1, 3, 13, 12]
    assert tile_tokens((4, 3), 256) == 13 * 256
    assert tile_tokens((1, 1), 256) == 256
    widths, heights = np.array([448, 640, 1]), np.array([448, 480, 20000])
    assert tile_counts(widths, heights).tolist() == [1, 13, 13]
    assert tile_counts(widths, heights, max_tiles=6).tolist() == [
        tile_count(select_grid(w, h, max_tiles=6)) for w, h in zip(widths, heights)
    ]
    assert tile_counts(widths, heights, thumbnail=False).tolist() == [1, 12, 12]


def test_array_kinds():
    wide, high = [640, 1920, 31], [480, 1080, 7000]
    expected = [list(select_grid(w, h)) for w, h in zip(wide, high)]
    for dtype in (np.uint16, np.int32, np.uint64, np.int64):
        assert select_grids(np.array(wide, dtype), np.array(high, dtype)).tolist() == expected
    strided = np.stack([wide, high], axis=1)
    assert select_grids(strided[:, 0], strided[:, 1]).tolist() == expected
    assert select_grids([], []).shape == (0, 2)
    assert select_grid(np.int32(640), np.uint16(480)) == (4, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: select_grid(0, 10), ValueError, "0 x 10"),
        (lambda: select_grid(10, -1), ValueError, "10 x -1"),
        (lambda: select_grid(10.5, 10), TypeError, "width = 10.5"),
        (lambda: select_grid(10, 10, min_tiles=0), ValueError, "min_tiles = 0"),
        (lambda: select_grid(10, 10, min_tiles=5, max_tiles=4), ValueError, "max_tiles = 4"),
        (lambda: select_grid(10, 10, max_tiles=65), ValueError, "64"),
        (lambda: select_grid(10, 10, tile_size=0), ValueError, "tile_size = 0"),
        (lambda: select_grids([1, 2, 0], [1, 2, 3]), ValueError, "image 2 is 0 x 3"),
        (lambda: select_grids([1, 2], [1]), ValueError, "same length"),
        (lambda: select_grids([1.0], [2.0]), TypeError, "float64"),
        (lambda: tile_count((0, 3)), ValueError, "0 x 3"),
        (lambda: tile_tokens((1, 1), 0), ValueError, "k = 0"),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_does_not_import_torch():
    code = "import sys, eagle_tiling; assert not {'torch', 'torchvision', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("grid", [(1.5, 2), (float("nan"), 1), (2.0, 2), (None, 1), ("2", "3"), 5])
def test_grids_that_are_not_of_whole_numbers_are_refused(grid):
    for call in (tile_count, lambda grid: tile_tokens(grid, 256)):
        with pytest.raises(TypeError, match=r"^grid = .*: need two whole numbers, \(columns, rows\)"):
            call(grid)


@pytest.mark.parametrize("grid", [(1,), (1, 2, 3)])
def test_a_grid_has_two_sides(grid):
    with pytest.raises(ValueError, match="need two whole numbers"):
        tile_count(grid)


@pytest.mark.parametrize("k", [1.5, float("nan"), None])
def test_tokens_are_whole_numbers(k):
    with pytest.raises(TypeError, match=r"^k = .*: need a whole number"):
        tile_tokens((2, 2), k)


def test_small_integers_of_numpy_do_not_wrap_around():
    assert tile_count((np.int8(100), np.int8(100))) == 10001
    assert tile_tokens((2, 2), np.int8(100)) == 500


def test_a_scalar_that_is_not_a_whole_number_is_named():
    with pytest.raises(TypeError, match=r"^height = 2\.5: need a whole number"):
        select_grid(4, 2.5)
    with pytest.raises(TypeError, match=r"^tile_size = None"):
        select_grids([4], [2], tile_size=None)


def test_sides_beyond_int64_are_refused():
    with pytest.raises(ValueError, match=r"^image 1 is 18446744073709551615 x 2 pixels"):
        select_grids(np.array([1, 2**64 - 1], np.uint64), np.array([1, 2], np.uint64))
