"""Tiles of a tensor on its own device: Pillow's bicubic as two matrix products, with methods of the tensor only (torch is not imported).

Pillow resizes one axis, rounds to 8 bits, then resizes the other, and widens the kernel when it shrinks (antialias). The same weights,
order and rounding give its pixels to within 2 of 255, most of them exactly.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

_PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])
_A = -0.5  # Pillow's and Keys' bicubic parameter
_SUPPORT = 2.0


@lru_cache(maxsize=64)
def bicubic_taps(size: int, new_size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Pillow's antialiased bicubic along one axis: indices int64 and weights float32, both [new_size, taps]; each row of weights sums to 1.

    The indices of a row differ and are in 0..size-1; taps that Pillow does not use have weight 0.
    """
    scale = size / new_size
    stretch = max(scale, 1.0)
    support = _SUPPORT * stretch
    centre = (np.arange(new_size) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), size)  # one past the end
    taps = int((last - first).max())
    place = np.minimum(first, size - taps)[:, None] + np.arange(taps)
    inside = (place >= first[:, None]) & (place < last[:, None])
    weights = np.where(inside, _bicubic((place - centre[:, None] + 0.5) / stretch), 0.0)
    return place, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def tile_tensor(pixels: Any, cols: int, rows: int, tiles: int, s: int) -> Any:
    """pixels: uint8 [C, H, W] on any device -> uint8 [tiles, s, s, 3] there."""
    rgb = _rgb(pixels.float())
    out = pixels.new_empty((tiles, s, s, 3))
    whole = _resize(rgb, cols * s, rows * s).reshape(3, rows, s, cols, s).permute(1, 3, 2, 4, 0)
    out[: cols * rows].view(rows, cols, s, s, 3).copy_(whole)
    if tiles > cols * rows:
        out[-1].copy_(_resize(rgb, s, s).permute(1, 2, 0))
    return out


def _rgb(values: Any) -> Any:
    """float [C, H, W] in 0..255 -> float [3, H, W]: grey repeated, alpha on white."""
    if values.shape[0] == 1:
        return values.expand(3, -1, -1)
    if values.shape[0] == 4:
        alpha = values[3:] / 255
        return (values[:3] * alpha + 255 * (1 - alpha)).round()
    return values


def _resize(rgb: Any, width: int, height: int) -> Any:
    """float [3, H, W] -> float [3, height, width] of whole numbers in 0..255."""
    if _vertical_first(rgb.shape[2], rgb.shape[1], width, height):
        return _across(_down(rgb, height), width)
    return _down(_across(rgb, width), height)


def _across(rgb: Any, width: int) -> Any:
    if rgb.shape[2] == width:
        return rgb
    return (rgb @ _matrix(rgb, rgb.shape[2], width).T).round().clamp(0, 255)


def _down(rgb: Any, height: int) -> Any:
    if rgb.shape[1] == height:
        return rgb
    return (_matrix(rgb, rgb.shape[1], height) @ rgb).round().clamp(0, 255)


def _matrix(like: Any, size: int, new_size: int) -> Any:
    """The weights as a float matrix [new_size, size] on the device of `like`; only the taps are copied there."""
    place, weights = bicubic_taps(size, new_size)
    places = like.new_zeros(()).long().new_tensor(place)
    return like.new_zeros((new_size, size)).scatter_(1, places, like.new_tensor(weights))


def _vertical_first(width: int, height: int, new_width: int, new_height: int) -> bool:
    """Order of Pillow's passes; it matters because overshoot is clipped between them (measured on 11.0, 12.1, 12.2 and 13.0)."""
    if _PILLOW >= (13, 0):
        return new_height < height and height - new_height > 2 * (width - new_width)
    if _PILLOW >= (12, 2):
        return new_height < height and height > 100 * width
    return False
