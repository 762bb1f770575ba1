"""Every mode and orientation of a file is converted to upright RGB as displayed."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from eagle_tiling import load_rgb, tile_image


def saved(image: Image.Image, kind: str, **options) -> Image.Image:
    """The image saved to a file and opened again."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return Image.open(buffer)


def pixels(image: Image.Image) -> np.ndarray:
    rgb = load_rgb(image)
    assert rgb.mode == "RGB"
    return np.asarray(rgb).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_orientation(noise, orientation, kind):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = saved(Image.fromarray(noise(40, 24)), kind, exif=exif)
    upright = load_rgb(image)
    assert upright.size == ((24, 40) if orientation >= 5 else (40, 24))
    assert np.array_equal(np.asarray(upright), np.asarray(ImageOps.exif_transpose(image).convert("RGB")))
    assert np.array_equal(np.asarray(load_rgb(upright)), np.asarray(upright)), "a second call must not turn it again"
    assert np.array_equal(tile_image(image, (2, 1), tile_size=16), tile_image(np.asarray(upright), (2, 1), tile_size=16))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08"])
def test_damaged_exif_leaves_the_picture(noise, exif):
    image = saved(Image.fromarray(noise(40, 24)), "PNG", exif=exif)
    assert np.array_equal(pixels(image), noise(40, 24))


def test_no_exif_may_be_stated_as_none(noise):
    image = Image.fromarray(noise(8, 8))
    image.info["exif"] = None  # as pillow-heif does
    assert np.array_equal(pixels(image), noise(8, 8))


def test_upright_rgb_is_not_copied(noise):
    image = Image.fromarray(noise(8, 8))
    assert load_rgb(image) is image


def test_alpha_on_white():
    colour = np.zeros((1, 3, 4), np.uint8)
    colour[0, :, 0] = 200
    colour[0, :, 3] = [0, 51, 255]
    image = saved(Image.fromarray(colour), "PNG")
    assert pixels(image)[0].tolist() == [[255, 255, 255], [244, 204, 204], [200, 0, 0]]
    opaque = colour.copy()
    opaque[..., 3] = 255
    assert pixels(Image.fromarray(opaque))[0].tolist() == [[200, 0, 0]] * 3


def test_grey_alpha():
    image = Image.merge("LA", [Image.new("L", (2, 1), 100), Image.frombytes("L", (2, 1), b"\0\xff")])
    assert pixels(saved(image, "PNG"))[0].tolist() == [[255] * 3, [100] * 3]


def test_premultiplied():
    image = Image.frombytes("RGBA", (1, 1), bytes([200, 100, 0, 51])).convert("RGBa")
    assert np.abs(pixels(image)[0, 0] - [244, 224, 204]).max() <= 2


def test_palettes():
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert pixels(saved(image, "PNG"))[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert pixels(saved(image, "GIF", transparency=1))[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    some = saved(image, "PNG", transparency=bytes([255, 51, 0]))
    assert some.mode == "P"
    assert pixels(some)[0].tolist() == [[255, 0, 0], [204, 255, 204], [255, 255, 255]]
    assert pixels(image.convert("PA"))[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_transparent_colour():
    image = saved(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), "PNG", transparency=(1, 2, 3))
    assert image.mode == "RGB"
    assert pixels(image)[0].tolist() == [[255, 255, 255], [4, 5, 6]]
    grey = saved(Image.frombytes("L", (2, 1), b"\x07\x08"), "PNG", transparency=7)
    assert pixels(grey)[0].tolist() == [[255] * 3, [8] * 3]


def test_transparent_grey_of_16_bits():
    deep = np.array([[0, 699, 700, 65535]], np.uint16)
    image = saved(Image.fromarray(deep), "PNG", transparency=700)
    assert (image.mode, image.info["transparency"]) == ("I;16", 700)
    assert pixels(image)[0].tolist() == [[0] * 3, [3] * 3, [255] * 3, [255] * 3]


def test_one_bit():
    assert pixels(saved(Image.fromarray(np.array([[True, False]])), "PNG"))[0].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    deep = np.array([[0, 128, 129, 256, 32768, 65407, 65535]], np.uint16)
    image = saved(Image.fromarray(deep), kind)
    assert image.mode == "I;16"
    assert pixels(image)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255, 255]
    assert np.array_equal(pixels(image)[0, :, 0], np.rint(deep[0] * (255 / 65535)))


def test_16_bit_of_either_byte_order():
    deep = np.array([[0, 0x1234, 65535]], np.uint16)
    for mode, order in (("I;16", "<u2"), ("I;16B", ">u2")):
        assert pixels(Image.frombytes(mode, (3, 1), deep.astype(order).tobytes()))[0, :, 0].tolist() == [0, 18, 255]


def test_i_and_f_by_their_range():
    def grey(values, dtype) -> list[int]:
        return pixels(Image.fromarray(np.array([values], dtype)))[0, :, 0].tolist()

    assert grey([0, 7, 255], np.int32) == [0, 7, 255]
    assert grey([0, 257, 65535], np.int32) == [0, 1, 255]
    assert grey([-100, 0, 100], np.int32) == [0, 128, 255]
    assert grey([0, 10**6], np.int32) == [0, 255]
    assert grey([70000, 70000], np.int32) == [0, 0]
    assert grey([0, 0.5, 1], np.float32) == [0, 128, 255]
    assert grey([0, 0.5, 200.4], np.float32) == [0, 0, 200]
    assert grey([np.nan, np.inf, 1], np.float32) == [0, 0, 255]


def test_other_colour_spaces(noise):
    rgb = Image.fromarray(np.full((4, 4, 3), (200, 120, 40), np.uint8))
    for mode, off in (("YCbCr", 2), ("CMYK", 0), ("HSV", 4)):
        assert np.abs(pixels(rgb.convert(mode)) - (200, 120, 40)).max() <= off, mode
    jpeg = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    assert jpeg.mode == "CMYK"
    assert np.abs(pixels(jpeg) - (255, 0, 0)).max() <= 3
    lab = Image.frombytes("LAB", (1, 1), bytes([137, 81, 70]))  # about (255, 0, 0) at L 53.6
    red = pixels(lab)[0, 0]
    assert red[0] > 200
    assert red[1] < 60


def test_refusals():
    with pytest.raises(TypeError, match="ndarray"):
        load_rgb(np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="0 x 5"):
        load_rgb(Image.new("RGB", (0, 5)))


def test_truncated_file_is_an_error(noise):
    buffer = io.BytesIO()
    Image.fromarray(noise(200, 200)).save(buffer, "JPEG")
    with pytest.raises(OSError, match="truncated"):
        load_rgb(Image.open(io.BytesIO(buffer.getvalue()[:3000])))
