"""Tiles made by tensor methods: within 2 of 255 of Pillow's, on the CPU and, where there is one, on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eagle_tiling import tile_count, tile_image
from eagle_tiling.tensor import bicubic_taps, tile_tensor


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 300), new_size=st.integers(1, 300))
def test_weights_are_those_of_pillow(size, new_size):
    # One row of mode F is resized by Pillow without rounding.
    row = np.random.default_rng(size).random((1, size)).astype(np.float32)
    expected = np.asarray(Image.fromarray(row).resize((new_size, 1), Image.Resampling.BICUBIC))[0]
    place, weights = bicubic_taps(size, new_size)
    assert len(place) == new_size
    assert place.min() >= 0
    assert place.max() < size
    np.testing.assert_allclose((weights * row[0][place]).sum(axis=1), expected, atol=2e-5)


@settings(deadline=None, max_examples=40)
@given(
    width=st.integers(1, 250),
    height=st.integers(1, 250),
    cols=st.integers(1, 4),
    rows=st.integers(1, 4),
    s=st.integers(1, 60),
    bands=st.sampled_from([1, 3, 4]),
)
def test_like_pillow(noise, width, height, cols, rows, s, bands):
    array = noise(width, height, bands)
    count = tile_count((cols, rows))
    tiles = tile_tensor(torch.from_numpy(array).permute(2, 0, 1), cols, rows, count, s)
    expected = tile_image(array, (cols, rows), tile_size=s)
    assert tiles.dtype == torch.uint8
    assert tiles.shape == expected.shape
    assert np.abs(tiles.numpy().astype(int) - expected).max() <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(640, 480), (4000, 3000), (1, 20000), (448, 448), (37, 1213)])
def test_like_pillow_on_the_gpu(noise, size):
    array = noise(*size)
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            tiles = tile_image(torch.from_numpy(array).cuda().permute(2, 0, 1), (4, 3))
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        assert tiles.is_cuda
        assert np.abs(tiles.cpu().numpy().astype(int) - tile_image(array, (4, 3))).max() <= 2
