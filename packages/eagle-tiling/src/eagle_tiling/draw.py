"""A picture of a grid: the tiles as the model gets them, separated and numbered, the thumbnail next to them, the numbers below."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw, ImageFont

from eagle_tiling.color import load_rgb
from eagle_tiling.grid import grid_sides, tile_count, whole_number

_PAPER, _INK, _FAINT, _FRAME, _BADGE = (255, 255, 255), (33, 37, 41), (108, 117, 125), (214, 51, 132), (214, 51, 132)


def draw_grid(
    image: Image.Image, grid: tuple[int, int], *, tile_size: int = 448, thumbnail: bool = True, longest: int = 1024
) -> Image.Image:
    """Draws the tiles of `image` for `grid` = (columns, rows) as an RGB picture, whose tiled part has at most `longest` pixels a side.

    Tiles are numbered in the order of `tile_image` (the thumbnail is last). The caption gives the grid, the number of tiles, the sizes
    before and after, the share of the image's area that is kept (columns x rows x s^2 / (W x H)) and the change of its aspect.

    Raises:
        ValueError: a grid, `tile_size` or `longest` too small to be drawn, or an image that `load_rgb` refuses.
        TypeError: a grid, `tile_size` or `longest` that is not of integers.
    """
    tiles = tile_count(grid, thumbnail=thumbnail)
    cols, rows = grid_sides(grid)
    tile_size, longest = whole_number("tile_size", tile_size), whole_number("longest", longest)
    if tile_size < 1:
        raise ValueError(f"tile_size = {tile_size}: need at least 1")
    side = min(tile_size, longest // max(cols, rows))
    if side < 8:
        raise ValueError(f"longest = {longest}: {max(cols, rows)} tiles need at least {8 * max(cols, rows)} pixels, 8 each")
    picture = load_rgb(image)
    gap, margin = max(3, side // 40), max(16, side // 12)
    title, body = ImageFont.load_default(22), ImageFont.load_default(16)
    has_thumbnail = tiles > cols * rows
    shown = max(side, min(160, tile_size)) if has_thumbnail else 0

    headline, lines = _caption(picture.size, cols, rows, tiles, tile_size, has_thumbnail)
    tiled = (cols * side + (cols - 1) * gap, rows * side + (rows - 1) * gap)
    thumbnail_width = shown + 2 * margin if has_thumbnail else 0
    wide = max([title.getlength(headline), *(body.getlength(line) for line in lines)])
    width = 2 * margin + max(tiled[0] + thumbnail_width, math.ceil(wide))
    high = max(tiled[1], shown + 28)
    height = margin + high + margin + 30 + 22 * len(lines) + margin // 2
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)

    whole = picture.resize((cols * side, rows * side), Image.Resampling.BICUBIC)
    for i in range(cols * rows):
        row, col = divmod(i, cols)
        tile = whole.crop((col * side, row * side, (col + 1) * side, (row + 1) * side))
        _place(canvas, draw, tile, margin + col * (side + gap), margin + row * (side + gap), i + 1)
    if has_thumbnail:
        left = margin + tiled[0] + 2 * margin
        draw.line([(left - margin, margin), (left - margin, margin + high)], fill=(222, 226, 230), width=1)
        _place(canvas, draw, picture.resize((shown, shown), Image.Resampling.BICUBIC), left, margin, tiles)
        draw.text((left, margin + shown + 6), "thumbnail", font=body, fill=_FAINT)

    below = margin + high + margin
    draw.text((margin, below), headline, font=title, fill=_INK)
    for i, line in enumerate(lines):
        draw.text((margin, below + 30 + 22 * i), line, font=body, fill=_FAINT)
    return canvas


def _place(canvas: Image.Image, draw: ImageDraw.ImageDraw, tile: Image.Image, x: int, y: int, number: int) -> None:
    canvas.paste(tile, (x, y))
    side = tile.width
    draw.rectangle([x, y, x + side - 1, y + side - 1], outline=_FRAME, width=1 if side < 120 else 2)
    size = max(8, min(20, side // 4))
    font = ImageFont.load_default(size)
    text = str(number)
    box = (x, y, x + math.ceil(font.getlength(text)) + size * 2 // 3, y + math.ceil(size * 1.35))
    draw.rectangle(box, fill=_BADGE)
    draw.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), text, font=font, fill=_PAPER, anchor="mm")


def _caption(size: tuple[int, int], cols: int, rows: int, tiles: int, s: int, has_thumbnail: bool) -> tuple[str, list[str]]:
    width, height = size
    area = cols * rows * s * s / (width * height)
    aspect = (cols * height) / (rows * width)
    aspect = min(aspect, 1 / aspect)
    count = f"{cols * rows} tile{'s' if cols * rows > 1 else ''}"
    headline = f"grid {cols} x {rows}: {count}{' + thumbnail = ' + str(tiles) if has_thumbnail else ''}"
    kept = f"area kept {100 * min(area, 1):.0f} %" + (f" (enlarged {area:.1f} times)" if area > 1.05 else "")
    score = min(area, 0.6) * aspect
    return headline, [
        f"{width} x {height} -> {cols * s} x {rows * s} pixels, tile side {s}",
        f"{kept}, aspect kept {100 * aspect:.0f} %, score of Eq. (1) {score:.3f}",
    ]
