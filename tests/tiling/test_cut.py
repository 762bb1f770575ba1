"""Tiles are Pillow's pixels in the right order, for every type of input."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eagle_tiling import select_grid, tile_count, tile_image


@settings(deadline=None, max_examples=60)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    cols=st.integers(1, 5),
    rows=st.integers(1, 5),
    s=st.integers(1, 40),
    thumbnail=st.booleans(),
)
def test_is_pillow_cut_by_rows(noise, pillow_tiles, width, height, cols, rows, s, thumbnail):
    image = Image.fromarray(noise(width, height))
    tiles = tile_image(image, (cols, rows), tile_size=s, thumbnail=thumbnail)
    assert tiles.dtype == np.uint8
    assert tiles.shape == (tile_count((cols, rows), thumbnail=thumbnail), s, s, 3)
    assert np.array_equal(tiles, pillow_tiles(image, cols, rows, s, thumbnail))


def test_order_is_row_by_row_and_thumbnail_last():
    colours = np.array([[[10, 0, 0], [20, 0, 0], [30, 0, 0]], [[40, 0, 0], [50, 0, 0], [60, 0, 0]]], np.uint8)
    image = Image.fromarray(colours.repeat(32, axis=0).repeat(32, axis=1))
    tiles = tile_image(image, (3, 2), tile_size=32)
    assert [int(tile[16, 16, 0]) for tile in tiles[:-1]] == [10, 20, 30, 40, 50, 60]
    assert tiles[-1][4, 4, 0] < 20 < 50 < tiles[-1][-4, -4, 0]


def test_many_large_tiles_are_an_ordinary_array(noise, pillow_tiles):
    """Large results are mapped with huge pages; they behave like other arrays."""
    image = Image.fromarray(noise(300, 200))
    tiles = tile_image(image, (4, 3))
    expected = pillow_tiles(image, 4, 3, 448, True)
    assert tiles.nbytes > 4 << 20
    assert tiles.flags.c_contiguous
    assert np.array_equal(tiles, expected)
    view = tiles[2:4]
    del tiles
    other = tile_image(image, (3, 4))  # may reuse memory of the same size, which no array may still refer to
    assert np.array_equal(view, expected[2:4])
    assert np.array_equal(pickle.loads(pickle.dumps(other)), pillow_tiles(image, 3, 4, 448, True))
    other[:] = 1
    assert (torch.from_numpy(other) == 1).all()


def test_numpy_and_tensors_give_the_bytes_of_pillow(noise):
    array = noise(150, 90)
    expected = tile_image(Image.fromarray(array), (2, 1), tile_size=64)
    assert np.array_equal(tile_image(array, (2, 1), tile_size=64), expected)
    assert np.array_equal(tile_image(array[::1, ::-1][:, ::-1], (2, 1), tile_size=64), expected)
    tensor = torch.from_numpy(array)
    for form in (tensor, tensor.permute(2, 0, 1), tensor.permute(2, 0, 1).contiguous()):
        tiles = tile_image(form, (2, 1), tile_size=64)
        assert isinstance(tiles, torch.Tensor)
        assert tiles.dtype == torch.uint8
        assert np.array_equal(tiles.numpy(), expected)


def test_array_forms(noise):
    grey = noise(40, 30, 1)
    expected = tile_image(np.repeat(grey, 3, axis=2), (2, 1), tile_size=16)
    for form in (grey, grey[:, :, 0], torch.from_numpy(grey), torch.from_numpy(grey).permute(2, 0, 1), grey.astype(np.uint16) * 257):
        assert np.array_equal(np.asarray(tile_image(form, (2, 1), tile_size=16)), expected)
    bits = grey > 127
    assert np.array_equal(tile_image(bits, (1, 1), tile_size=16), tile_image(bits.astype(np.uint8) * 255, (1, 1), tile_size=16))
    colour = noise(40, 30, 4)
    expected = tile_image(Image.fromarray(colour), (2, 1), tile_size=16)
    assert np.array_equal(tile_image(colour, (2, 1), tile_size=16), expected)
    assert np.array_equal(tile_image(torch.from_numpy(colour), (2, 1), tile_size=16).numpy(), expected)


def test_extreme_shapes(pillow_tiles):
    for size in ((1, 20000), (20000, 1), (1, 1)):
        image = Image.new("RGB", size, (9, 99, 199))
        grid = select_grid(*size)
        tiles = tile_image(image, grid)
        assert len(tiles) == tile_count(grid)
        assert (tiles == (9, 99, 199)).all()


def test_input_is_not_modified(noise):
    image = Image.fromarray(noise(50, 40))
    before = image.tobytes()
    tiles = tile_image(image, (1, 1), tile_size=40)
    tiles[:] = 0
    same = tile_image(Image.fromarray(noise(40, 40)), (1, 1), tile_size=40)  # no resize, but the result is not a view of the image
    assert image.tobytes() == before
    assert same.flags.writeable
    assert same.flags.owndata


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        ("a.png", TypeError, "str"),
        (np.zeros((4, 4, 3)), TypeError, "float64"),
        (np.zeros((4, 4, 2), np.uint8), ValueError, r"\(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "4 x 0"),
        (np.zeros((1, 2, 3, 4), np.uint8), ValueError, "not an image"),
        (torch.zeros(3, 4, 4), TypeError, "float32"),
        (torch.zeros(2, 5, 5, dtype=torch.uint8), ValueError, r"\(2, 5, 5\)"),
        (torch.zeros(3, 0, 4, dtype=torch.uint8), ValueError, "4 x 0"),
    ],
)
def test_refuses_other_inputs(image, error, words):
    with pytest.raises(error, match=words):
        tile_image(image, (1, 1))


def test_refuses_bad_grids():
    image = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match="0 x 1"):
        tile_image(image, (0, 1))
    with pytest.raises(ValueError, match="tile_size = 0"):
        tile_image(image, (1, 1), tile_size=0)


def test_into_a_batch(noise):
    batch = np.full((5, 20, 20, 3), 7, np.uint8)
    array = noise(50, 20)
    part = batch[1:4]
    assert tile_image(array, (2, 1), tile_size=20, out=part) is part
    assert np.array_equal(batch[1:4], tile_image(array, (2, 1), tile_size=20))
    assert (batch[[0, 4]] == 7).all()
    for wrong in (batch[:2], batch[1:4, :10], batch[1:4].astype(float), batch.tolist()):
        with pytest.raises(ValueError, match="out is"):
            tile_image(array, (2, 1), tile_size=20, out=wrong)
    with pytest.raises(TypeError, match="out is only for"):
        tile_image(torch.from_numpy(array), (2, 1), tile_size=20, out=part)


def test_out_that_is_read_only_is_refused():
    out = np.zeros((3, 8, 8, 3), np.uint8)
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"^out is read-only"):
        tile_image(Image.new("RGB", (16, 8)), (2, 1), tile_size=8, out=out)


@pytest.mark.parametrize("tile_size", [1.5, 8.0, None, "8"])
def test_a_tile_size_that_is_not_a_whole_number_is_named(tile_size):
    with pytest.raises(TypeError, match=r"^tile_size = .*: need a whole number"):
        tile_image(Image.new("RGB", (16, 8)), (2, 1), tile_size=tile_size)


def test_tiles_that_do_not_fit_in_memory():
    with pytest.raises(MemoryError, match=r"no memory for tiles of shape \(1, 1000000000, 1000000000, 3\)"):
        tile_image(Image.new("RGB", (16, 8)), (1, 1), tile_size=10**9)
