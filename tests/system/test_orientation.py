"""One rule for orientation: the size that planning takes from a header is that of the picture that training and serving cut."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from eagle_sampling import image_size, open_image
from eagle_sampling.images.header import exif_orientation
from eagle_tiling import color, load_rgb

WIDE, TALL = (12, 8), (8, 12)
PICTURE = Image.linear_gradient("L").resize(WIDE).convert("RGB")
BYTE, ASCII, SHORT, LONG, SSHORT, SLONG = 1, 2, 3, 4, 8, 9
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def entry(order: str, tag: int, kind: int, value: int, count: int = 1) -> bytes:
    """One entry of a TIFF directory, its value inside."""
    form = {BYTE: "B", ASCII: "B", SHORT: "H", LONG: "I", SSHORT: "h", SLONG: "i"}[kind]
    content = struct.pack(order + form * min(count, 4 // struct.calcsize(form)), *[value] * min(count, 4 // struct.calcsize(form)))
    return struct.pack(order + "HHI", tag, kind, count) + content.ljust(4, b"\0")


def exif_block(order: str = "<", kind: int = SHORT, value: int = 6, count: int = 1) -> bytes:
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 12) + bytes(4)  # the directory needn't stand at once
    entries = entry(order, 0x0112 - 1, SHORT, 0x0112), entry(order, 0x0112, kind, value, count)
    return start + struct.pack(order + "H", 2) + b"".join(entries) + bytes(12)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(before: bytes = b"", behind: bytes = b"", chunk_size: int = 1 << 16, size: tuple[int, int] = WIDE) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    data = zlib.compress((b"\0" + bytes(3 * size[0])) * size[1], 0)
    parts = [chunk(b"IDAT", data[at : at + chunk_size]) for at in range(0, len(data), chunk_size)]
    return b"\x89PNG\r\n\x1a\n" + header + before + b"".join(parts) + behind + chunk(b"IEND", b"")


def tiff(order: str, *extra: bytes, behind: bytes = b"") -> bytes:
    """A grey TIFF of 12 x 8; the directory stands in front, `behind` at byte 400."""
    fields = [(256, 12), (257, 8), (258, 8), (259, 1), (262, 1), (273, 300), (277, 1), (278, 8), (279, 96)]
    entries = sorted(
        [*(entry(order, tag, SHORT, value) for tag, value in fields), *extra], key=lambda e: struct.unpack_from(order + "H", e)
    )
    directory = struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8) + directory
    return head.ljust(400, b"\x55") + behind


def saved(form: str, **options: object) -> bytes:
    out = io.BytesIO()
    PICTURE.save(out, form, **options)
    return out.getvalue()


ENCODINGS = [
    (order, kind, value, count)
    for order in "<>"
    for kind, counts in ((BYTE, (1,)), (ASCII, (1, 4)), (SHORT, (1, 2)), (LONG, (1,)), (SSHORT, (1,)), (SLONG, (1,)))
    for count in counts
    for value in range(10)
]
CONTAINERS = {
    "jpeg": lambda block: saved("JPEG", exif=b"Exif\0\0" + block),
    "jpeg, a second block": lambda block: (
        saved("JPEG", exif=b"Exif\0\0" + block)[:2]
        + b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in (block, exif_block(value=3)))
        + saved("JPEG")[2:]
    ),
    "png": lambda block: png(chunk(b"eXIf", block)),
    "png, behind the data": lambda block: png(behind=chunk(b"tEXt", b"Title\0x") + chunk(b"eXIf", block)),
    "webp": lambda block: saved("WEBP", exif=block),
    "webp, with prefix": lambda block: saved("WEBP", exif=block).replace(block, b"Exif\0\0" + block[:-6]),
}


def agreed(data: bytes, tmp_path=None) -> tuple[int, int]:
    """The size by header and by picture, opened by us and by Pillow, from bytes and from a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about strange entries
        sizes = [image_size(data), load_rgb(open_image(data)).size, load_rgb(Image.open(io.BytesIO(data))).size]
        if tmp_path is not None:
            (tmp_path / "image").write_bytes(data)
            sizes.append(image_size(tmp_path / "image"))
    assert len(set(sizes)) == 1, sizes
    return sizes[0]


@pytest.mark.parametrize("name", CONTAINERS)
def test_exif_blocks(name, tmp_path):
    for order, kind, value, count in ENCODINGS:
        data = CONTAINERS[name](exif_block(order, kind, value, count))
        turned = kind in (SHORT, LONG) and count == 1 and 5 <= value <= 8
        assert agreed(data, tmp_path) == (TALL if turned else WIDE), (order, kind, value, count)
        if kind == SHORT and count == 1:  # the orientation in EXIF
            assert agreed(data) == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size


def test_tiff_turned_as_pillow_turns_it(tmp_path):
    """Pillow applies a TIFF's own orientation while decoding; no later step can find it."""
    for order, kind, value, count in ENCODINGS:
        if kind != ASCII:  # with which Pillow refuses the file
            size = agreed(tiff(order, entry(order, 0x0112, kind, value, count)), tmp_path)
            assert kind not in (SHORT, LONG) or size == (TALL if 5 <= value <= 8 else WIDE), (order, kind, value, count)
    packet = struct.pack("<HHII", 700, BYTE, len(XMP), 400)
    assert agreed(tiff("<", packet, behind=XMP), tmp_path) == TALL
    assert agreed(tiff("<", packet, entry("<", 0x0112, SHORT, 1), behind=XMP), tmp_path) == WIDE


def test_avif(tmp_path):
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    for value in range(1, 9):
        data = saved("AVIF", exif=exif_block(value=value), speed=10)
        assert agreed(data, tmp_path) == (TALL if value >= 5 else WIDE)


def test_what_is_no_exif_block_does_not_count(tmp_path):
    text = b"\nexif\n%8d\n%s\n" % (len(exif_block()) + 6, (b"Exif\0\0" + exif_block()).hex().encode())
    cases = {
        "png, ImageMagick's text": png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))),
        "png, XMP": png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
        "jpeg, XMP": saved("JPEG", xmp=XMP),
        "webp, XMP": saved("WEBP", xmp=XMP),
    }
    for name, data in cases.items():
        assert agreed(data, tmp_path) == WIDE, name
    with Image.open(io.BytesIO(cases["jpeg, XMP"])) as image:
        assert ImageOps.exif_transpose(image).size == TALL, "Pillow reads it from XMP"


@pytest.mark.parametrize("chunk_size", [100, 1000, 4096, 8192, 10_000, 1 << 20])
@pytest.mark.parametrize("trailer", [0, 5000])
def test_exif_behind_many_chunks_of_data(chunk_size, trailer, tmp_path):
    size = (60, 190)  # 34 kB
    for last in (b"", chunk(b"tEXt", b"a\0" + bytes(trailer))):
        data = png(behind=chunk(b"eXIf", exif_block()) + last, chunk_size=chunk_size, size=size)
        assert agreed(data, tmp_path) == (190, 60)
        assert agreed(png(behind=last, chunk_size=chunk_size, size=size), tmp_path) == size


@settings(deadline=None, max_examples=500)
@given(st.sampled_from("<>"), st.sampled_from([SHORT, LONG]), st.integers(0, 9), st.data())
def test_both_readers_agree_on_damaged_blocks(order, kind, value, data):
    block = bytearray(b"Exif\0\0" * data.draw(st.integers(0, 3)) + exif_block(order, kind, value))
    for _ in range(data.draw(st.integers(0, 3))):
        block[data.draw(st.integers(0, len(block) - 1))] = data.draw(st.integers(0, 255))
    block = bytes(block[: data.draw(st.integers(0, len(block)))])
    assert exif_orientation(block) == color.exif_orientation(block)
    assert 1 <= exif_orientation(block) <= 8
