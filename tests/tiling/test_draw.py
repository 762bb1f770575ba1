"""The picture of a grid shows every tile in its place, and the thumbnail."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from eagle_tiling import draw_grid, select_grid

COLOURS = np.array([[[250, 0, 0], [0, 250, 0], [0, 0, 250]], [[250, 250, 0], [0, 250, 250], [120, 120, 120]]], np.uint8)


def test_tiles_are_separated_and_in_order():
    image = Image.fromarray(COLOURS.repeat(100, axis=0).repeat(100, axis=1))
    drawn = np.asarray(draw_grid(image, (3, 2), tile_size=100, longest=300)).astype(int)
    places = []
    for colour in COLOURS.reshape(-1, 3):
        y, x = np.nonzero(np.abs(drawn - colour).max(axis=2) <= 2)
        tile = x < 340  # the thumbnail is on the right
        assert tile.sum() > 0.6 * 100 * 100
        assert (~tile).sum() > 100
        places.append((y[tile].max(), x[tile].max()))
    rows, cols = np.array(places).T.reshape(2, 2, 3)
    assert (np.diff(cols, axis=1) > 100).all(), "a gap between columns"
    assert (np.diff(rows, axis=0) > 100).all(), "a gap between rows"


def test_one_tile_has_no_thumbnail():
    image = Image.new("RGB", (300, 300), (10, 200, 30))
    one = np.asarray(draw_grid(image, (1, 1), tile_size=64))
    columns = np.flatnonzero((one == (10, 200, 30)).all(axis=2).any(axis=0))
    assert columns.max() - columns.min() <= 64


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (5, 5), (4000, 700)])
def test_any_size(size):
    drawn = draw_grid(Image.new("L", size), select_grid(*size), longest=600)
    assert drawn.mode == "RGB"
    assert max(drawn.size) < 1000


def test_too_small_to_see():
    with pytest.raises(ValueError, match="longest = 20"):
        draw_grid(Image.new("RGB", (9, 9)), (4, 1), longest=20)
