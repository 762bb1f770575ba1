"""Any picture that Pillow can open becomes upright RGB of 8 bits: orientation, transparency on white, palettes, deep and foreign modes."""

from __future__ import annotations

import struct

import numpy as np
from PIL import ExifTags, Image

_TURN = {
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
    """`image` as upright RGB: EXIF orientation applied, transparency composited on white, every mode brought to 8 bits.

    16-bit grey is scaled (not clipped) to 8 bits. Modes `I` and `F` say nothing about their range, so their values decide: within
    0..255 they are taken as they are (`F` within 0..1 as fractions of white), within 0..65535 as 16 bits, and anything else is
    stretched from its least to its greatest value. An image that is upright RGB already is returned itself, not a copy.

    Raises:
        TypeError: not a Pillow image.
        ValueError: an image without pixels, or a mode that can't become RGB.
        OSError: the file behind the image is damaged (Pillow's own message).
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"load_rgb takes a Pillow image, not {type(image).__name__}; arrays can go to tile_image directly")
    if image.width < 1 or image.height < 1:
        raise ValueError(f"image is {image.width} x {image.height} pixels: both sides must be at least 1")
    image.load()  # before the orientation is read: a TIFF applies it while loading and then has none
    turn = _TURN.get(_orientation(image))
    rgb = _to_rgb(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
        rgb.info = {}  # the orientation lives there too and must not be applied a second time
    return rgb


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return 1  # a damaged EXIF block says nothing about the picture, whose pixels may be fine


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
        raise ValueError(f"an image of mode {mode} can't become RGB: {error}") from error


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return rgba.convert("RGB")
    white = Image.new("RGB", rgba.size, (255, 255, 255))
    white.paste(rgba.convert("RGB"), mask=alpha)
    return white


def _to_grey(image: Image.Image) -> np.ndarray:
    """Modes I;16*, I and F -> uint8 [H, W]."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        return scale_16_bit(values)
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        values = values * 255
    elif low < 0 or high > 65535:
        values = (values - low) * 255 / (high - low) if high > low else np.zeros_like(values)
    elif high > 255:
        values = values / 257
    return np.rint(values).astype(np.uint8)


def scale_16_bit(values: np.ndarray) -> np.ndarray:
    """uint16 of any shape -> uint8, 65535 to 255, rounded to nearest."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
