"""PDF documents: pages are planned like frames."""

import pytest
from PIL import Image

from eagle_model.visual import VisualSpec
from eagle_train.data.prepare import prepare
from eagle_train.planning.visual import plan_visual, sample_plan

COLOURS = ["red", "green", "blue", "white"]


@pytest.fixture
def pdf(tmp_path):
    pages = [Image.new("RGB", (200, 300), colour) for colour in COLOURS]
    pages[0].save(tmp_path / "d.pdf", save_all=True, append_images=pages[1:], resolution=72)
    return tmp_path / "d.pdf"


def test_pages_are_planned_like_frames(pdf, tmp_path, row, make_config, write_jsonl, tokenizer):
    write_jsonl(tmp_path / "rows.jsonl", [row("<document> What colours?", document="d.pdf")])
    facts = prepare(make_config({"s": {"annotation": "rows.jsonl"}}), tokenizer).facts
    spec = VisualSpec(tile_size=32, tokens_per_tile=4, min_frames=2)
    for budget, pages in ((4096, [0, 1, 2, 3]), (int(facts.column("text_tokens")[0]) + 44, [0, 3])):
        planned = sample_plan(facts, plan_visual(facts, budget, spec), 0, spec)
        assert planned.videos[0].indices.tolist() == pages
        assert planned.videos[0].times is None
