"""Sizes from headers agree with Pillow; pixels are read within limits, or an error is raised."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from eagle_sampling import Limits, MediaError, image_size, open_image, read_bytes
from eagle_sampling.images import exists
from tests.support.media import random_image

FORMATS = {
    "jpeg": ("JPEG", "RGB", {}),
    "jpeg-grey": ("JPEG", "L", {}),
    "jpeg-cmyk": ("JPEG", "CMYK", {}),
    "jpeg-progressive": ("JPEG", "RGB", {"progressive": True}),
    "png": ("PNG", "RGBA", {}),
    "png-palette": ("PNG", "P", {}),
    "png-16": ("PNG", "I;16", {}),
    "gif": ("GIF", "P", {}),
    "bmp": ("BMP", "RGB", {}),
    "webp": ("WEBP", "RGB", {}),
    "webp-lossless": ("WEBP", "RGB", {"lossless": True}),
    "webp-alpha": ("WEBP", "RGBA", {}),
    "tiff": ("TIFF", "RGB", {}),
    "tiff-lzw": ("TIFF", "L", {"compression": "tiff_lzw"}),
    "tiff-big": ("TIFF", "RGB", {"big_tiff": True}),
    "avif": ("AVIF", "RGB", {}),
    "ppm": ("PPM", "RGB", {}),  # not parsed here: Pillow's lazy open
}


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def encoded(name: str, size: tuple[int, int], orientation: int | None = None) -> bytes:
    form, mode, options = FORMATS[name]
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    image = random_image(size=size)
    image = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
    if orientation is not None:
        options = {**options, "exif": exif(orientation)}
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (37, 23), (640, 4)])
def test_size_agrees_with_pillow(name, size, tmp_path):
    data = encoded(name, size)
    path = tmp_path / "image"
    path.write_bytes(data)
    assert image_size(data) == image_size(path) == image_size("image", root=tmp_path) == size


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "tiff", "avif"])
def test_size_is_that_of_the_displayed_image(name, orientation):
    data = encoded(name, (40, 24), orientation)
    assert image_size(data) == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size


def test_a_jpeg_whose_header_follows_long_segments(tmp_path):
    plain = encoded("jpeg", (33, 21), 6)
    filler = b"".join(b"\xff\xe2" + struct.pack(">H", 65535) + bytes(65533) for _ in range(3))
    data = plain[:2] + filler + plain[2:]
    path = tmp_path / "long.jpg"
    path.write_bytes(data)
    assert image_size(data) == image_size(path) == (21, 33)


def test_sizes_of_jpegs_that_decoders_accept(tmp_path):
    jpeg = encoded("jpeg", (33, 21), 6)
    behind = 4 + struct.unpack_from(">H", jpeg, 4)[0]  # the first segment
    assert jpeg[behind] == 0xFF
    for strange in (b"\0\1\2", b"\xff\0", b"\xff\0\0\0\0", b"\xff" * 5000):
        data = jpeg[:behind] + strange + jpeg[behind:]
        assert open_image(data).size == (33, 21)
        assert image_size(data) == (21, 33)
    with pytest.raises(MediaError, match=r"no size in its header: no JPEG marker at byte 2"):
        image_size(jpeg[:2] + jpeg[4:])


@pytest.mark.parametrize("screen", [(0, 0), (10, 10), (50, 10), (64, 64)])
def test_a_gif_is_as_large_as_its_first_picture(screen, tmp_path):
    gif = encoded("gif", (37, 23))
    at = gif.index(b",", 13 + (3 << (gif[10] & 7) + 1))
    path = tmp_path / "image.gif"
    for place in ((0, 0), (5, 3)):
        for comment in (b"", b"!\xfe" + b"".join(b"\xff" + bytes(255) for _ in range(40)) + b"\0"):
            data = gif[:6] + struct.pack("<HH", *screen) + gif[10:at] + comment + b"," + struct.pack("<HH", *place) + gif[at + 5 :]
            path.write_bytes(data)
            shown = max(screen[0], place[0] + 37), max(screen[1], place[1] + 23)
            assert image_size(data) == image_size(path) == open_image(data).size == shown


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_damaged_headers_give_a_size_or_an_error(name, data):
    content = bytearray(encoded(name, (37, 23)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(200, len(content) - 1)))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(1, len(content)))]
    try:
        width, height = image_size(bytes(content))
    except MediaError as error:
        assert f"<{len(content)} bytes>" in str(error)  # noqa: PT017
    else:
        assert width > 0
        assert height > 0


def test_a_truncated_jpeg_has_a_size_but_no_pixels(tmp_path):
    path = tmp_path / "cut.jpg"
    path.write_bytes(encoded("jpeg", (300, 200))[:9000])
    assert image_size(path) == (300, 200)
    with pytest.raises(MediaError, match=r"cut.jpg: can't be decoded: .*truncated"):
        open_image(path)


def test_limits_hold_before_anything_is_decoded(tmp_path):
    bomb = tmp_path / "bomb.png"  # 900 million pixels in 3 kB
    row = zlib.compress(bytes(3000), 9)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", row) + chunk(b"IEND", b""))
    assert image_size(bomb) == (30_000, 30_000)
    with pytest.raises(MediaError, match=r"bomb.png: .*(900000000|limit)"):
        open_image(bomb)
    tall = tmp_path / "tall.png"
    Image.new("RGB", (1, 20_000)).save(tall)
    assert open_image(tall).size == (1, 20_000)
    with pytest.raises(MediaError, match="side over 10000"):
        open_image(tall, limits=Limits(max_side=10_000))
    with pytest.raises(MediaError, match="bytes is over the limit"):
        open_image(tall, limits=Limits(max_bytes=10))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body


PACKED = zlib.compress(bytes(2 << 20), 9)
BROKEN_CRC = b"\0\0\0\4tEXtab\0c\0\0\0\0"
METADATA = {
    "compressed text": png_chunk(b"zTXt", b"workflow\0\0" + PACKED),
    "international text": png_chunk(b"iTXt", b"workflow\0\1\0\0\0" + PACKED),
    "colour profile": png_chunk(b"iCCP", b"profile\0\0" + PACKED),
    "much text": png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(1 << 20), 9)) * 70,
    "gigabytes of text": png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200 << 20), 9)),
    "text that is not compressed": png_chunk(b"zTXt", b"workflow\0\0abc"),
    "a wrong checksum": BROKEN_CRC,
    "empty chunks": b"".join(png_chunk(kind, b"") for kind in (b"iCCP", b"zTXt", b"iTXt", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"tIME")),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("what", METADATA)
def test_a_png_is_read_whatever_its_metadata_are(what, place, tmp_path):
    """What browsers show: the picture is whole, only data that it does not need are large or broken."""
    image = random_image(3, (37, 23))
    plain = io.BytesIO()
    image.save(plain, "PNG", exif=exif(6))
    data = plain.getvalue()
    at = 33 if place == "before" else len(data) - 12
    path = tmp_path / "picture.png"
    path.write_bytes(data[:at] + METADATA[what] + data[at:])
    opened = open_image(path)
    assert opened.tobytes() == image.tobytes()
    assert image_size(path) == ImageOps.exif_transpose(opened).size == (23, 37)


@pytest.mark.parametrize(
    "extra",
    [
        segment(0xE2, b"MPF\0" + b"\xff" * 40),
        segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"),
        segment(0xE2, b"ICC_PROFILE\0\x09\x02abc"),
        segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\xff\xff\xff\xff"),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"\xff" * 100),
        segment(0xFE, bytes(65533)) * 200,
        segment(0xEE, b"Ado"),
    ],
    ids=["MPF", "MPF directory", "ICC", "Photoshop", "XMP", "13 MB of comments", "short APP14"],
)
def test_a_jpeg_is_read_whatever_its_metadata_are(extra, tmp_path):
    image = random_image(3, (37, 23))
    plain = io.BytesIO()
    image.save(plain, "JPEG", exif=exif(6))
    data = plain.getvalue()
    at = 4 + int.from_bytes(data[4:6], "big")
    path = tmp_path / "picture.jpg"
    path.write_bytes(data[:at] + extra + data[at:])
    opened = open_image(path)
    assert opened.tobytes() == Image.open(io.BytesIO(data)).tobytes()
    assert image_size(path) == (23, 37)


def test_damage_of_the_picture_is_not_read_around(tmp_path):
    plain = encoded("png", (64, 48))
    at = plain.index(b"IDAT") + 10
    broken = plain[:at] + bytes([plain[at] ^ 0xFF]) + plain[at + 1 :]
    for data in (broken, broken[:33] + METADATA["compressed text"] + broken[33:], plain[:-40]):
        with pytest.raises(MediaError):
            open_image(data)


def test_heic_without_its_decoder_names_the_extra(tmp_path, monkeypatch):
    from eagle_sampling.images import heic

    monkeypatch.setattr(heic, "_module", lambda: None)
    path = tmp_path / "IMG_0001.jpg"
    path.write_bytes(struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic") + bytes(100))
    for read in (open_image, image_size):
        with pytest.raises(MediaError, match=r"IMG_0001.jpg: is a HEIC image, .* pip install 'eagle-sampling\[heic\]'"):
            read(path)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_heic(orientation):
    pillow_heif = pytest.importorskip("pillow_heif")
    original = random_image(0, (8, 6)).resize((96, 64))
    data = io.BytesIO()
    pillow_heif.from_pillow(original).save(data, quality=-1, chroma=444, exif=exif(orientation))
    upright = ImageOps.exif_transpose(open_image(data.getvalue()))
    assert image_size(data.getvalue()) == upright.size
    turned = {1: original, 3: original.rotate(180), 6: original.rotate(-90, expand=True), 8: original.rotate(90, expand=True)}[orientation]
    assert upright.size == turned.size
    assert abs(np.asarray(upright).astype(int) - np.asarray(turned)).mean() < 3
    with pytest.raises(MediaError, match="is over the limit"):
        open_image(data.getvalue(), limits=Limits(max_pixels=1000))
    with pytest.raises(MediaError):
        open_image(data.getvalue()[:-2000])


def test_heic_without_exif_is_tiled():
    pillow_heif = pytest.importorskip("pillow_heif")
    tiling = pytest.importorskip("eagle_tiling")
    data = io.BytesIO()
    pillow_heif.from_pillow(random_image(0, (8, 6)).resize((96, 64))).save(data, quality=-1)
    image = open_image(data.getvalue())
    assert tiling.load_rgb(image).size == image_size(data.getvalue()) == (96, 64)


def test_missing_empty_and_foreign_files(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_bytes(b"this is not an image" * 10)
    for name in ("missing.jpg", "empty.jpg", "text.jpg"):
        for call in (image_size, open_image):
            with pytest.raises(MediaError, match=name.replace(".", r"\.")):
                call(tmp_path / name)
    with pytest.raises(MediaError, match="lmdb_key"):
        open_image({"lmdb_file": "x"})


@pytest.mark.parametrize(
    "ref", ["a\0b.jpg", "\ud800.jpg", "iVBORw0KGgo" * 1000, {"lmdb_file": "\0", "lmdb_key": "a"}, {"lmdb_file": 5, "lmdb_key": "a"}]
)
def test_invalid_references(ref, tmp_path):
    """All of these are valid JSON; the errors can be printed and have less than 1000 bytes."""
    for call in (image_size, open_image, read_bytes):
        for root in (None, tmp_path):
            with pytest.raises(MediaError) as caught:
                call(ref, root=root)
            assert len(str(caught.value).encode()) < 1000
    if isinstance(ref, str):
        assert not exists(ref)


@pytest.mark.parametrize("address", ["http://example.com/a.jpg", "https://example.com/a.jpg", "s3://bucket/a.jpg", "file:///tmp/a.jpg"])
def test_addresses_are_refused_by_name(address, tmp_path):
    for call in (image_size, open_image, read_bytes):
        for root in (None, tmp_path):
            with pytest.raises(MediaError, match=r"a\.jpg: is an address; media are read from files: download it first") as caught:
                call(address, root=root)
            assert caught.value.exit_code == 3
    assert not exists(address)


def test_a_file_may_be_named_like_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:" / "bucket").mkdir(parents=True)
    (tmp_path / "s3:" / "bucket" / "a.png").write_bytes(encoded("png", (5, 4)))
    assert image_size("s3://bucket/a.png") == open_image("s3://bucket/a.png").size == (5, 4)


def test_other_types_are_refused_by_name():
    for call in (image_size, open_image, read_bytes, exists):
        with pytest.raises(
            TypeError, match=r"BytesIO is not accepted here: need the path of an image, its bytes, .*lmdb_key.*pass its bytes"
        ):
            call(io.BytesIO(encoded("png", (5, 4))))
        with pytest.raises(TypeError, match="int is not accepted here"):
            call(7)


def test_every_exception_of_a_decoder_is_a_media_error():
    dds = io.BytesIO()
    Image.new("RGB", (8, 8)).save(dds, "DDS")
    foreign = dds.getvalue()[:80] + b"\4\0\0\0WHAT" + dds.getvalue()[88:]  # NotImplementedError
    tiff = bytearray(encoded("tiff", (20, 10)))
    tiff[tiff.index(struct.pack("<H", 257))] = 0  # no height: TypeError
    for data in (foreign, bytes(tiff)):
        for call in (image_size, open_image):
            with pytest.raises(MediaError, match="bytes>: "):
                call(data)
    if features.check("avif"):
        avif = encoded("avif", (64, 48))
        for at in range(200, len(avif) - 30, 29):
            with contextlib.suppress(MediaError):  # libavif: RuntimeError at some of these
                open_image(avif[:at] + bytes(30) + avif[at + 30 :])
    huge = struct.pack("<2sHHHQ", b"II", 43, 8, 0, (1 << 64) - 8)  # a BigTIFF directory beyond any file, not an OverflowError
    with pytest.raises(MediaError, match="no size in its header"):
        image_size(huge)


def test_draft_decodes_a_smaller_jpeg_that_is_large_enough():
    data = encoded("jpeg", (1600, 1200))
    assert open_image(data).size == (1600, 1200)
    assert open_image(data, at_least=(448, 336)).size == (800, 600)
    assert open_image(data, at_least=(400, 300)).size == (400, 300)
    assert open_image(data, at_least=(1000, 100)).size == (1600, 1200)
    assert open_image(encoded("png", (64, 64)), at_least=(4, 4)).size == (64, 64)


def test_the_orientation_is_not_applied():
    assert open_image(encoded("jpeg", (40, 24), 6)).size == (40, 24)


def test_bytes_are_what_the_file_holds(tmp_path):
    data = encoded("png", (5, 4))
    (tmp_path / "a.png").write_bytes(data)
    assert read_bytes("a.png", root=tmp_path) == read_bytes(data) == data


def test_sizes_are_read_fast(tmp_path):
    """20 000 per second on a free core (see benchmarks); a tenth of it is required here, on a busy machine."""
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded("jpeg", (640, 480), 6))
    began = time.process_time()
    for _ in range(1000):
        image_size(path)
    assert time.process_time() - began < 0.5


def test_sizes_of_members_are_read_from_their_heads(tmp_path, monkeypatch):
    """Also where the header is long, orientation counts, or Pillow has to look; a member that is cut off has no size."""
    import tarfile

    from eagle_sampling.images import read

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {"a.jpg": {"exif": exif}, "b.png": {}, "c.webp": {}, "d.ppm": {}, "e.jpg": {"comment": b"x" * 60_000}, "f.tif": {}}
    sizes = {}
    for name, options in kinds.items():
        picture.save(tmp_path / name, **options)
        sizes[name] = image_size(tmp_path / name)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name in kinds:
            tar.add(tmp_path / name, name)
    with tarfile.open(tmp_path / "all.tar") as tar:
        places = {member.name: (member.offset_data, member.size) for member in tar}
    whole = []
    monkeypatch.setattr(read, "read_bytes", lambda ref, **options: whole.append(ref["member"]) or read_bytes(ref, **options))
    for name, (offset, size) in places.items():
        for more in ({}, {"offset": offset, "size": size}):
            assert image_size({"tar": str(tmp_path / "all.tar"), "member": name, **more}) == sizes[name]
    assert set(whole) <= {"d.ppm"}
    last = max(places, key=lambda name: places[name])
    os.truncate(tmp_path / "all.tar", sum(places[last]) - 1)
    with pytest.raises(MediaError, match="is cut off"):
        image_size({"tar": str(tmp_path / "all.tar"), "member": last, "offset": places[last][0], "size": places[last][1]})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
@pytest.mark.parametrize("read", ["image_size", "open_image", "page_count", "pdf_size", "whole_pages", "animation_times"])
def test_a_pipe_is_refused_instead_of_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    # in a process, which can be ended where the call waits for a writer
    code = f"import eagle_sampling\ntry:\n    eagle_sampling.{read}('pipe.png')\nexcept eagle_sampling.MediaError as e:\n    print(e)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "pipe.png" in done.stdout, done
    assert "it is not a regular file but a folder, a pipe or a device" in done.stdout


@pytest.mark.parametrize("at_least", [5, (0, 1), (1,), (float("nan"), 1), ("a", "b")])
def test_sides_of_at_least_are_checked(at_least, tmp_path):
    Image.new("RGB", (64, 40)).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"^at_least = .*: need \(width, height\) in pixels") as caught:
        open_image(tmp_path / "a.jpg", at_least=at_least)
    assert not isinstance(caught.value, MediaError)  # which says that the file is bad
