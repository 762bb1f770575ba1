"""Pages of PDFs (as pictures and as tiles) and of multi-page TIFFs, pictures of animations."""

import contextlib
import warnings

import numpy as np
import pytest
from PIL import Image

from eagle_sampling import (
    Limits,
    MediaError,
    animation_times,
    page_count,
    page_sizes,
    pdf_size,
    probe,
    read_frames,
    read_pages,
    render_pages,
)

RGB = [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)]


@pytest.fixture
def sheets():
    return [Image.new("RGB", (200 + 10 * i, 280), (80 * i, 40, 200)) for i in range(3)]


def test_pdf_pages_at_a_chosen_size(sheets, tmp_path):
    pytest.importorskip("pypdfium2")
    path = tmp_path / "a.pdf"
    sheets[0].save(path, save_all=True, append_images=sheets[1:], resolution=72.0)
    assert page_count(path) == 3
    assert page_sizes(path, dpi=72) == [(200, 280), (210, 280), (220, 280)]
    pages = read_pages(path, [2, 0], size=560)
    assert [page.size for page in pages] == [(440, 560), (400, 560)]
    assert np.abs(np.asarray(pages[0])[100, 100].astype(int) - (160, 40, 200)).max() < 6
    with pytest.raises(MediaError, match="page 3 does not exist \\(pages 0 to 2 do\\)"):
        read_pages(path, [3])
    with pytest.raises(MediaError, match="over the limit"):
        read_pages(path, dpi=1e5)
    with pytest.raises(MediaError, match="frames is over the limit"):
        page_count(path, limits=Limits(max_frames=2))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(MediaError, match=r"a.pdf: can't be read as a PDF"):
        page_count(path)


@pytest.fixture
def pdf(tmp_path):
    pytest.importorskip("pypdfium2")
    pages = [Image.new("RGB", (200, 300), colour) for colour in RGB]
    pages[0].save(tmp_path / "d.pdf", save_all=True, append_images=pages[1:], resolution=72)
    return tmp_path / "d.pdf"


def test_pages_become_tiles(pdf):
    assert pdf_size(pdf) == pdf_size(str(pdf)) == (4, 200, 300)
    tiles = render_pages(pdf, np.array([2, 0]), 32)
    assert (tiles.shape, tiles.dtype) == ((2, 32, 32, 3), np.uint8)
    assert np.abs(tiles.reshape(2, -1, 3).mean(axis=1) - [RGB[2], RGB[0]]).max() < 6
    batch = np.zeros((5, 32, 32, 3), np.uint8)
    assert render_pages(pdf, [2, 0], 32, out=batch[1:3]) is not None
    assert np.array_equal(batch[1:3], tiles)
    assert not batch[[0, 3, 4]].any()


def test_a_thin_page_takes_no_more_than_eight_tiles(tmp_path, monkeypatch):
    pypdfium2 = pytest.importorskip("pypdfium2")
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 %s]>>"
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R 4 0 R]/Count 2>>", page % b"100 200", page % b"1 14400"]
    body = b"".join(b"%d 0 obj%sendobj\n" % (number, content) for number, content in enumerate(objects, start=1))
    (tmp_path / "thin.pdf").write_bytes(b"%PDF-1.4\n" + body + b"trailer<</Root 1 0 R>>")
    scales = []
    render = pypdfium2.PdfPage.render
    monkeypatch.setattr(pypdfium2.PdfPage, "render", lambda self, scale: scales.append(scale) or render(self, scale=scale))
    assert render_pages(str(tmp_path / "thin.pdf"), np.array([0, 1]), 32).shape == (2, 32, 32, 3)
    assert scales == [pytest.approx(32 / 100), pytest.approx(8 * 32 / 14400)]


def test_damaged_pdfs_are_named(pdf, tmp_path):
    for page in (9, 4, -1):
        with pytest.raises(MediaError, match=rf"d\.pdf: page {page} does not exist \(pages 0 to 3 do\)"):
            render_pages(pdf, [0, page], 32)
    for out in (np.zeros((1, 32, 32, 3), np.uint8), np.zeros((2, 32, 32, 3), np.float32)):
        with pytest.raises(ValueError, match=r"need uint8 \(2, 32, 32, 3\)"):
            render_pages(pdf, [0, 1], 32, out=out)
    with pytest.raises(MediaError, match="4 frames is over the limit of 3"):
        pdf_size(pdf, limits=Limits(max_frames=3))
    pdf.write_bytes(b"%PDF-1.4 and nothing else")
    for read in (pdf_size, lambda path: render_pages(path, [0], 32)):
        with pytest.raises(MediaError, match=r"d\.pdf: can't be read as a PDF"):
            read(pdf)
        for name in (tmp_path / "missing.pdf", "a\0.pdf"):
            with pytest.raises(MediaError, match=r"\.pdf: can't be read"):
                read(name)


def test_pdf_pages_have_the_chosen_size(tmp_path):
    pdfium = pytest.importorskip("pypdfium2")
    path = tmp_path / "a.pdf"
    document = pdfium.PdfDocument.new()
    for width, height in ((612.2, 792.1), (10.1, 20.6), (595.276, 841.89)):
        document.new_page(width, height)
    document.new_page(200.2, 100.3).set_rotation(90)
    document.save(path)
    for dpi in (72, 100, 144):
        assert page_sizes(path, dpi=dpi) == [page.size for page in read_pages(path, dpi=dpi)]
    assert page_sizes(path)[:2] == [(1225, 1585), (21, 42)]
    for size in range(50, 90):
        assert {max(page.size) for page in read_pages(path, size=size)} == {size}


def test_multi_page_tiff(sheets, tmp_path):
    path = tmp_path / "a.tiff"
    sheets[0].save(path, save_all=True, append_images=sheets[1:])
    assert page_count(path) == 3
    assert page_sizes(path) == [(200, 280), (210, 280), (220, 280)]
    assert [page.getpixel((5, 5)) for page in read_pages(path, [1, 2])] == [(80, 40, 200), (160, 40, 200)]


def test_animations_are_read_as_videos(tmp_path):
    pictures = [Image.new("RGB", (40, 30), (0, 80 * i, 0)) for i in range(4)]
    for suffix in ("gif", "webp"):
        path = tmp_path / f"a.{suffix}"
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[100, 200, 300, 400], loop=0, lossless=True)
        assert page_count(path) == 4
        assert animation_times(path).tolist() == pytest.approx([0.0, 0.1, 0.3, 0.6])
        greens = [np.asarray(page.convert("RGB"))[5, 5, 1] for page in read_pages(path)]
        assert np.abs(np.array(greens, int) - [0, 80, 160, 240]).max() <= 8
    times = probe(tmp_path / "a.gif").times.times()
    assert times.tolist() == pytest.approx([0.0, 0.1, 0.3, 0.6])
    frames = read_frames(tmp_path / "a.gif", times)
    assert np.abs(frames.pixels[:, 5, 5, 1].astype(int) - [0, 80, 160, 240]).max() <= 8


def test_damaged_pictures_are_media_errors(sheets, tmp_path):
    """Cut, or one byte inverted, at 50 places each: Pillow raises TypeError, KeyError, IndexError, SyntaxError and OSError."""
    for suffix in ("tiff", "gif"):
        whole = tmp_path / f"whole.{suffix}"
        sheets[0].resize((10, 14)).save(whole, save_all=True, append_images=[sheet.resize((10, 14)) for sheet in sheets[1:]])
        content = whole.read_bytes()
        path = tmp_path / f"damaged.{suffix}"
        for at in range(4, len(content), len(content) // 50):
            for damaged in (content[:at], content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]):
                path.write_bytes(damaged)
                for call in (page_count, page_sizes, read_pages, animation_times):
                    with contextlib.suppress(MediaError), warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        call(path)


def test_other_files(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    for name in ("a.txt", "missing.pdf"):
        with pytest.raises(MediaError, match=name):
            page_count(tmp_path / name)
    for name in ("a\0.pdf", "\ud800.pdf"):
        with pytest.raises(MediaError, match="can't be read"):
            page_count(name)


def test_a_missing_document_is_named_with_the_reason(tmp_path):
    for read in (pdf_size, lambda path: render_pages(path, [0], 8)):
        with pytest.raises(MediaError, match=r"nope\.pdf: can't be read: No such file or directory$"):
            read(tmp_path / "nope.pdf")


@pytest.mark.parametrize("pages", [[0.5], ["0"], [True], 0, [[0]], [10**30]])
def test_pages_are_whole_numbers(pages, pdf):
    for read in (lambda: render_pages(pdf, pages, 8), lambda: read_pages(pdf, pages)):
        with pytest.raises(ValueError, match=r"^pages are .*: need a list of whole numbers, 0-based"):
            read()


@pytest.mark.parametrize("side", [0, -1])
def test_sides_are_positive(side, pdf):
    with pytest.raises(ValueError, match=f"^side = {side}: need at least 1 pixel"):
        render_pages(pdf, [0], side)
    with pytest.raises(ValueError, match=f"^size = {side}: need at least 1 pixel"):
        read_pages(pdf, [0], size=side)


def test_a_size_that_is_not_a_whole_number_is_refused(pdf):
    with pytest.raises(TypeError, match=r"^size = 1\.5: need a whole number"):  # it was searched for without end
        read_pages(pdf, [0], size=1.5)


@pytest.mark.parametrize("dpi", [0, -1, float("nan"), float("inf"), None])
def test_resolutions_are_positive(dpi, pdf):
    for read in (page_sizes, read_pages):
        with pytest.raises(ValueError, match=r"^dpi = .*: need a number of pixels per inch above 0"):
            read(pdf, dpi=dpi)


def test_tiles_of_pages_are_written_to_a_writable_array(pdf):
    out = np.zeros((1, 8, 8, 3), np.uint8)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        render_pages(pdf, [0], 8, out)
