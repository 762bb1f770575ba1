"""Tile grid selection (Image Area Preservation) and tile extraction for images, with numpy and Pillow only."""

from eagle_tiling.color import load_rgb
from eagle_tiling.cut import tile_image
from eagle_tiling.draw import draw_grid
from eagle_tiling.grid import Grid, select_grid, select_grids, tile_count, tile_counts, tile_tokens

__version__ = "0.1.0"

__all__ = [
    "Grid",
    "draw_grid",
    "load_rgb",
    "select_grid",
    "select_grids",
    "tile_count",
    "tile_counts",
    "tile_image",
    "tile_tokens",
]
