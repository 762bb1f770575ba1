"""PDF documents: pages counted, planned like frames, rendered as tiles."""

import numpy as np
import pytest
from PIL import Image

from eagle_sampling import MediaError
from eagle_train.config import SamplingConfig, TilingConfig
from eagle_train.data.documents import pdf_size, render_pages
from eagle_train.data.prepare import prepare
from eagle_train.planning.visual import ModelFacts, plan_visual, sample_plan

COLOURS = ["red", "green", "blue", "white"]
RGB = [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)]


@pytest.fixture
def pdf(tmp_path):
    pages = [Image.new("RGB", (200, 300), colour) for colour in COLOURS]
    pages[0].save(tmp_path / "d.pdf", save_all=True, append_images=pages[1:], resolution=72)
    return tmp_path / "d.pdf"


def test_pages_become_tiles(pdf):
    assert pdf_size(str(pdf)) == (4, 200, 300)
    tiles = render_pages(str(pdf), np.array([2, 0]), 32)
    assert (tiles.shape, tiles.dtype) == ((2, 32, 32, 3), np.uint8)
    assert np.abs(tiles.reshape(2, -1, 3).mean(axis=1) - [RGB[2], RGB[0]]).max() < 6


def test_a_thin_page_takes_no_more_than_eight_tiles(tmp_path, monkeypatch):
    import pypdfium2

    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 %s]>>"
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R 4 0 R]/Count 2>>", page % b"100 200", page % b"1 14400"]
    body = b"".join(b"%d 0 obj%sendobj\n" % (number, content) for number, content in enumerate(objects, start=1))
    (tmp_path / "thin.pdf").write_bytes(b"%PDF-1.4\n" + body + b"trailer<</Root 1 0 R>>")
    scales = []
    render = pypdfium2.PdfPage.render
    monkeypatch.setattr(pypdfium2.PdfPage, "render", lambda self, scale: scales.append(scale) or render(self, scale=scale))
    assert render_pages(str(tmp_path / "thin.pdf"), np.array([0, 1]), 32).shape == (2, 32, 32, 3)
    assert scales == [pytest.approx(32 / 100), pytest.approx(8 * 32 / 14400)]


def test_damage_is_named(pdf):
    with pytest.raises(MediaError, match=r"page 10 of 4 is gone"):
        render_pages(str(pdf), np.array([9]), 32)
    pdf.write_bytes(b"%PDF-1.4 and nothing else")
    with pytest.raises(MediaError, match=r"d\.pdf: can't be read as a PDF"):
        pdf_size(str(pdf))


def test_pages_are_planned_like_frames(pdf, tmp_path, row, make_config, write_jsonl, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", [row("<document> What colours?", document="d.pdf")])
    facts = prepare(make_config({"s": {"annotation": "rows.jsonl"}}), tokenizer).facts
    options = {"sampling": SamplingConfig(min_frames=2), "tiling": TilingConfig()}
    model = ModelFacts(32, 4)
    for budget, pages in ((4096, [0, 1, 2, 3]), (int(facts.column("text_tokens")[0]) + 44, [0, 3])):
        planned = sample_plan(facts, plan_visual(facts, budget, model, **options), 0, model, **options)
        assert planned.videos[0].pages.tolist() == pages
        assert planned.videos[0].times is None
