"""Tiles of an image: resized once (Pillow's bicubic), cut row by row, the thumbnail last.

Pillow images, numpy arrays and tensors on the CPU are resized by Pillow, so they give the same bytes. A tensor on another device stays
there (`tensor.py`).
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
from typing import IO, Any, TypeAlias, cast, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eagle_tiling.color import load_rgb, scale_16_bit
from eagle_tiling.grid import grid_sides, tile_count, whole_number
from eagle_tiling.tensor import tile_tensor

Tiles: TypeAlias = NDArray[np.uint8]
"""uint8 [tiles, s, s, 3]."""
_Array: TypeAlias = NDArray[Any]


@overload
def tile_image(
    image: Image.Image | _Array,
    grid: tuple[int, int],
    *,
    tile_size: int = 448,
    thumbnail: bool = True,
    out: Tiles | None = None,
) -> Tiles: ...
@overload
def tile_image(image: Any, grid: tuple[int, int], *, tile_size: int = 448, thumbnail: bool = True, out: Any = None) -> Any: ...
def tile_image(image: Any, grid: tuple[int, int], *, tile_size: int = 448, thumbnail: bool = True, out: Any = None) -> Any:
    """Cuts `image` into `grid` = (columns, rows) tiles: uint8 [N, s, s, 3], row by row, N = `tile_count(grid, thumbnail=thumbnail)`.

    `image` is a Pillow image of any mode (see `load_rgb`); a numpy array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8, uint16 or
    bool; or a torch tensor of uint8, [C, H, W] or [H, W, C] with C = 1, 3 or 4, on any device: then the tiles are a tensor on that
    device. A shape that fits both ways is read as [C, H, W]. The whole image is resized to `(columns * s, rows * s)`, bicubic; the
    thumbnail, `s x s`, comes last and only when there is more than one tile.

    `out`, a numpy array of the result's shape and dtype, is filled and returned (not for tensors), so that the tiles of many images are
    written into one batch without a copy.

    Raises:
        TypeError: an image of another type or dtype, `out` with a tensor, or a grid or `tile_size` that is not of integers.
        ValueError: no pixels, another shape, a grid or `tile_size` below 1, a mode that cannot be converted to RGB, or an `out` of another
            shape or dtype, or that is read-only.
        MemoryError: the tiles do not fit in memory.
    """
    tiles = tile_count(grid, thumbnail=thumbnail)
    cols, rows = grid_sides(grid)
    tile_size = whole_number("tile_size", tile_size)
    if tile_size < 1:
        raise ValueError(f"tile_size = {tile_size}: need at least 1")
    shape = (tiles, tile_size, tile_size, 3)
    torch = sys.modules.get("torch")  # if torch is not imported, `image` is not a tensor
    if torch is not None and isinstance(image, torch.Tensor):
        if out is not None:
            raise TypeError("out is only for Pillow images and numpy arrays; the tiles of a tensor are a new tensor")
        pixels = _tensor_pixels(image, torch)
        if pixels.device.type != "cpu":
            return tile_tensor(pixels, cols, rows, tiles, tile_size)
        picture = _from_array(pixels.permute(1, 2, 0).contiguous().numpy())
        return torch.from_numpy(_cut(picture, cols, rows, new_tiles(shape)))
    target = new_tiles(shape) if out is None else _checked_out(out, shape)
    if isinstance(image, Image.Image):
        picture = load_rgb(image)
    elif isinstance(image, np.ndarray):
        picture = _from_array(cast(_Array, image))
    else:
        raise TypeError(f"tile_image takes a Pillow image, a numpy array or a torch tensor, not {type(image).__name__}")
    return _cut(picture, cols, rows, target)


def _checked_out(out: object, shape: tuple[int, ...]) -> Tiles:
    if not isinstance(out, np.ndarray):
        raise ValueError(f"out is {type(out).__name__}: need a numpy array, uint8 {shape}")
    array = cast(_Array, out)
    if array.shape != shape or array.dtype != np.uint8:
        raise ValueError(f"out is {array.dtype} {array.shape}: need a numpy array, uint8 {shape}")
    if not array.flags.writeable:
        raise ValueError(f"out is read-only: need a numpy array that can be written to, uint8 {shape}; pass a copy")
    return array


_HUGE_PAGE = 2 << 20


def new_tiles(shape: tuple[int, ...]) -> Tiles:
    """An uninitialised uint8 array; a large one is mapped with huge pages where the system has them (Linux; up to 2 MiB unused).

    Memory of malloc for 13 tiles is returned to the system and faulted in again at every call: 12 ms of 73 for 640 x 480 to 12 tiles,
    0.6 ms here (Linux 6.18, transparent huge pages on madvise).
    """
    size = math.prod(shape)
    if size < 2 * _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(shape, np.uint8)
    try:
        memory = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no memory for tiles of shape {shape}, {size / 1e9:.1f} GB; a smaller grid or tile_size needs less") from error
    with contextlib.suppress(OSError):  # a kernel without huge pages uses ordinary ones
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, size).reshape(shape)


def _cut(picture: Image.Image, cols: int, rows: int, out: Tiles) -> Tiles:
    """picture: RGB -> out: uint8 [tiles, s, s, 3], filled."""
    s = out.shape[1]
    _save_tiles(picture.resize((cols * s, rows * s), Image.Resampling.BICUBIC), cols, rows, out[: cols * rows])
    if len(out) > cols * rows:
        _save_tiles(picture.resize((s, s), Image.Resampling.BICUBIC), 1, 1, out[-1:])
    return out


def _save_tiles(picture: Image.Image, cols: int, rows: int, tiles: Tiles) -> None:
    picture.save(cast(IO[bytes], _TileFile(picture.size, cols, rows, tiles)), "PPM")  # which only calls write


class _TileFile:
    """A file to save a PPM into, which stores its pixels as tiles.

    Pillow writes 64 KiB at a time, still in the cache: 4.4 ms for 1792 x 1344, where crops take 11.5 ms and one array of the whole takes
    longer (measured on a busy core; the resize before it took 107 ms).
    """

    def __init__(self, size: tuple[int, int], cols: int, rows: int, tiles: Tiles) -> None:
        s = tiles.shape[1]
        self.tiles = tiles.reshape(rows, cols, s, s, 3)
        self.header = len(b"P6\n%d %d\n255\n" % size)
        self.line = 0

    def write(self, data: bytes) -> None:
        if self.header > 0:
            self.header -= len(data)
            return
        cols, s = self.tiles.shape[1:3]
        lines = np.frombuffer(data, np.uint8).reshape(-1, cols, s, 3)  # the raw encoder writes whole lines
        done = 0
        while done < len(lines):
            row, top = divmod(self.line, s)
            now = min(len(lines) - done, s - top)
            self.tiles[row, :, top : top + now] = lines[done : done + now].swapaxes(0, 1)
            done += now
            self.line += now


def _from_array(array: _Array) -> Image.Image:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ValueError(f"an array of shape {array.shape} is not an image: need [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]")
    if array.size == 0:
        raise ValueError(f"image is {array.shape[1]} x {array.shape[0]} pixels: both sides must be at least 1")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype == np.uint16:
        array = scale_16_bit(array)
    elif array.dtype != np.uint8:
        raise TypeError(f"pixels are {array.dtype}: need uint8, uint16 or bool; scale others to 0..255 first")
    if array.shape[2] == 1:
        array = array[:, :, 0]
    return load_rgb(Image.fromarray(np.ascontiguousarray(array)))


def _tensor_pixels(image: Any, torch: Any) -> Any:
    """A tensor image -> uint8 [C, H, W], C = 1, 3 or 4."""
    if image.dtype != torch.uint8:
        raise TypeError(f"pixels are {image.dtype}: need torch.uint8; scale others to 0..255 first")
    shape = tuple(image.shape)
    if image.ndim == 3 and shape[0] in (1, 3, 4):
        pixels = image
    elif image.ndim == 3 and shape[2] in (1, 3, 4):
        pixels = image.permute(2, 0, 1)
    else:
        raise ValueError(f"a tensor of shape {shape} is not an image: need [C, H, W] or [H, W, C] with C = 1, 3 or 4")
    if pixels.numel() == 0:
        raise ValueError(f"image is {pixels.shape[2]} x {pixels.shape[1]} pixels: both sides must be at least 1")
    return pixels.detach()
