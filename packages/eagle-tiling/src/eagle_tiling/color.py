"""Conversion of any Pillow image to upright 8-bit RGB: orientation, transparency on white, palettes, 16 bits, other color spaces."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WITH_ALPHA = {"RGBA", "LA", "PA", "La", "RGBa"}


def load_rgb(image: Image.Image) -> Image.Image:
    """`image` as upright RGB: EXIF orientation applied, transparency composited on white, every mode converted to 8 bits.

    The orientation is that of the EXIF block in the format's own place (`image.info["exif"]`), as in browsers. The orientation of XMP, or
    of EXIF stored as PNG text, is not used: few programs follow it, and planners that read headers do not see it.

    16-bit grey is scaled (not clipped) to 8 bits. Modes `I` and `F` have no defined range, so it is inferred from the values: within 0..255
    they are used unchanged (`F` within 0..1 as fractions of white), within 0..65535 as 16 bits, and other values are scaled from their
    minimum to their maximum. An image that is already upright RGB is returned itself, not a copy.

    Raises:
        TypeError: not a Pillow image.
        ValueError: an image without pixels, or a mode that cannot be converted to RGB.
        OSError: the image's file is damaged (Pillow's own message).
    """
    if not isinstance(image, Image.Image):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"load_rgb takes a Pillow image, not {type(image).__name__}; pass arrays to tile_image directly")
    if image.width < 1 or image.height < 1:
        raise ValueError(f"image is {image.width} x {image.height} pixels: both sides must be at least 1")
    image.load()  # before the orientation is read: a TIFF applies it while loading and then has none; HEIC without EXIF has exif=None
    transpose = _TRANSPOSE.get(exif_orientation(image.info.get("exif") or b""))
    rgb = _to_rgb(image)
    if transpose is not None:
        rgb = rgb.transpose(transpose)
        rgb.info = {}  # it holds the orientation, which must not be applied a second time
    return rgb


def exif_orientation(exif: bytes) -> int:
    """The orientation (1-8) that an EXIF block states, with or without its prefix; 1 when it states none.

    Tag 274 of the first directory, one value of type SHORT (as EXIF requires) or LONG (as some programs write). `eagle_sampling.images`
    has the same function, so that the planned size is the size of the tiled picture; `tests/system` compares the two.
    """
    exif = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
    if exif[:4] == b"II*\0":
        order, short, long = "little", b"\x12\1\3\0\1\0\0\0", b"\x12\1\4\0\1\0\0\0"
    elif exif[:4] == b"MM\0*":
        order, short, long = "big", b"\1\x12\0\3\0\0\0\1", b"\1\x12\0\4\0\0\0\1"
    else:
        return 1
    first = int.from_bytes(exif[4:8], order) + 2
    stop = first + 12 * int.from_bytes(exif[first - 2 : first], order)
    for entry, size in ((short, 2), (long, 4)):
        at = exif.find(entry, first, stop)
        while at >= 0 and (at - first) % 12:
            at = exif.find(entry, at + 1, stop)
        if at >= 0:
            value = int.from_bytes(exif[at + 8 : at + 8 + size], order)
            return value if 1 <= value <= 8 else 1
    return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16") or mode in ("I", "F"):
        return Image.fromarray(_to_grey(image)).convert("RGB")
    if mode in _WITH_ALPHA or "transparency" in image.info:
        return _on_white(image)
    if mode == "RGB":
        return image
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"an image of mode {mode} can't be converted to RGB: {error}") from error


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return rgba.convert("RGB")
    white = Image.new("RGB", rgba.size, (255, 255, 255))
    white.paste(rgba.convert("RGB"), mask=alpha)
    return white


def _to_grey(image: Image.Image) -> NDArray[np.uint8]:
    """Modes I;16*, I and F -> uint8 [H, W]."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        clear = image.info.get("transparency")  # the transparent 16-bit grey of a PNG
        return scale_16_bit(values if clear is None else np.where(values == clear, 65535, values))
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        values = values * 255
    elif low < 0 or high > 65535:
        values = (values - low) * 255 / (high - low) if high > low else np.zeros_like(values)
    elif high > 255:
        values = values / 257
    return np.rint(values).astype(np.uint8)


def scale_16_bit(values: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """uint16 of any shape -> uint8, 65535 to 255, rounded to nearest."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
