"""Pages of PDFs and multi-page TIFFs, pictures of animations."""

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


def test_what_is_no_document(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    for name in ("a.txt", "missing.pdf"):
        with pytest.raises(MediaError, match=name):
            page_count(tmp_path / name)
