"""Pages of PDFs and multi-page TIFFs, pictures of animations."""

import contextlib
import warnings

import numpy as np
import pytest
from PIL import Image

from eagle_sampling import Limits, MediaError, animation_times, page_count, page_sizes, probe, read_frames, read_pages


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
    with pytest.raises(MediaError, match="no page 3"):
        read_pages(path, [3])
    with pytest.raises(MediaError, match="over the limit"):
        read_pages(path, dpi=1e5)
    with pytest.raises(MediaError, match="frames is over the limit"):
        page_count(path, limits=Limits(max_frames=2))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(MediaError, match=r"a.pdf: can't be read as a PDF"):
        page_count(path)


def test_pdf_pages_have_the_size_that_was_told(tmp_path):
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


def test_animations_are_films(tmp_path):
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
    """Cut, or a byte turned over, at 50 places each: Pillow raises TypeError, KeyError, IndexError, SyntaxError and OSError."""
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


def test_what_is_no_document(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    for name in ("a.txt", "missing.pdf"):
        with pytest.raises(MediaError, match=name):
            page_count(tmp_path / name)
    for name in ("a\0.pdf", "\ud800.pdf"):
        with pytest.raises(MediaError, match="can't be read"):
            page_count(name)
