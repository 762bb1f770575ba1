"""Showing a sample: the prompt, the mask, the tiles and the budget are those of training; the page is safe and self-contained."""

import base64
import html
import io
import re

import pytest
from PIL import Image
from rich.console import Console

from eagle_model.visual import VisualSpec
from eagle_train.config import ConfigError
from eagle_train.data.prepare import prepare
from eagle_train.data.sample import load_sample
from eagle_train.planning.visual import plan_visual, sample_plan
from eagle_train.watching import preview
from eagle_train.watching.show import MOST_PICTURES, to_html, to_terminal, view_sample

SPEC = VisualSpec(tile_size=64, tokens_per_tile=4)


@pytest.fixture
def view(tmp_path, row, picture, write_video, write_jsonl, make_config, tokenizer):
    """A function from a row to its view."""
    (tmp_path / "a.png").write_bytes(picture(300, 130))
    write_video(tmp_path / "v.mp4", frames=30, fps=10)
    write_video(tmp_path / "long.mp4", frames=400, fps=2)

    def make(content, budget=8192, **options):
        write_jsonl(tmp_path / "rows.jsonl", [content])
        facts = prepare(make_config({"s": {"annotation": "rows.jsonl"}}), tokenizer).facts
        plan = sample_plan(facts, plan_visual(facts, budget, SPEC), 0, SPEC)
        sample = options.pop("change", lambda sample: sample)(load_sample(facts.address(0)))
        return view_sample(sample, plan, SPEC, tokenizer, budget=budget, **options)

    return make


def pictures_of(page):
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)]


def test_counts_add_up(view, row):
    shown = view(row("<image>Look at <video> too.", image="a.png", video="v.mp4"))
    assert shown.text + shown.image + shown.frame == shown.length <= shown.planned <= shown.budget
    assert shown.image == sum(piece.tokens for piece in shown.pieces if piece.kind == "image")
    assert shown.frame == 4 * 8
    assert shown.labels == len("A square.") + 1
    labelled = "".join(piece.text for piece in shown.pieces if piece.labelled)
    assert labelled == "A square.<|im_end|>"


def test_page_holds_tiles_frames_and_text(view, row):
    shown = view(row("<image>Look at <video> too.", "It is <b>.", image="a.png", video="v.mp4"))
    page = to_html([shown], title="one")
    image = next(piece for piece in shown.pieces if piece.kind == "image")
    assert len(image.pictures) == image.grid.cols * image.grid.rows + 1
    assert image.pictures[-1].caption == "thumbnail"
    assert len(pictures_of(page)) == len(image.pictures) + 8
    for time in ("0.00 s", "2.90 s"):
        assert f"<figcaption>{time}</figcaption>" in page
    assert re.search(r'<span class="label">It is &lt;b&gt;\.</span>', page)
    assert "Look at " in html.unescape(page)
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_data_cannot_inject_markup(view, row):
    page = to_html([view(row("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'))], title="<i>")
    assert "<script" not in page
    assert "<img" not in page
    assert "<title>&lt;i&gt;</title>" in page


def test_long_videos_are_pictured_in_part(view, row):
    shown = view(row(video="long.mp4"), budget=40000)
    frames = [piece for piece in shown.pieces if piece.kind == "frame"]
    assert len(frames) == 400
    assert sum(bool(frame.pictures) for frame in frames) == MOST_PICTURES
    assert any("96 of 400 frames" in note for note in shown.notes)
    assert len(to_html([shown], title="long")) < 2_000_000


def test_missing_media_are_notes(view, row, tmp_path):
    def forget(sample):
        (tmp_path / "a.png").unlink()
        return sample

    shown = view(row(image="a.png"), change=forget)
    assert any("a.png" in note for note in shown.notes)
    assert "a.png" in to_html([shown], title="t")


def test_a_run_is_shown_with_its_own_limits(colour_run, tmp_path, picture, tokenizer):
    config = colour_run(data={"sources": {"rows": {"annotation": "rows.jsonl"}}, "workers": 1, "limits": {"max_bytes": 100_000}})
    prepare(config, tokenizer)
    (tmp_path / "0.png").write_bytes(picture(300, 300))  # it has grown since it was prepared
    [shown] = preview.view(config, row="rows:1", stage=None, pack=0, evaluation=False).views
    assert any("100000" in note for note in shown.notes)


def test_a_row_in_the_ledger_is_shown_with_its_reason(colour_run, tokenizer):
    config = colour_run()
    annotation = config.data.sources["rows"].annotation
    annotation.write_text(annotation.read_text() + "{\n")
    prepare(config, tokenizer)
    options = {"stage": None, "pack": 0, "evaluation": False}
    with pytest.raises(ConfigError, match=r"rows:26 can't be used: broken-json: "):
        preview.view(config, row="rows:26", **options)
    with pytest.raises(ConfigError, match=r"source rows has no usable row in line 27"):
        preview.view(config, row="rows:27", **options)


def test_documents_show_their_pages(view, row):
    shown = view(row("<document>?", document=["a.png", "a.png"]))
    assert [piece.text for piece in shown.pieces if piece.kind == "frame"] == ["page 1", "page 2"]
    assert len(pictures_of(to_html([shown], title="t"))) == 2


def terminal(views, **options):
    console = Console(width=100, file=io.StringIO(), color_system=None)
    console.print(to_terminal(views, title="t", **options))
    return console.file.getvalue()


def test_terminal_names_frames_and_counts(view, row):
    shown = view(row("<image>Look at <video> too.", image="a.png", video="v.mp4"), pictures=False)
    text = terminal([shown])
    assert "8 frames: 0.00 s" in text
    assert "too." in text
    assert "A square." in text
    assert text.count("Frame ") <= 1
    assert f"{shown.length} of {shown.budget} tokens" in " ".join(text.replace("│", " ").split())


def test_pack_shows_every_sample(view, row):
    views = [view(row("One?")), view(row("Two?"))]
    page = to_html(views, title="pack 3", capacity=1000)
    assert page.count("<section") == 2
    assert f"{sum(shown.length for shown in views)} of 1000 tokens" in page
    assert "2 samples" in terminal(views, capacity=1000)
    assert "1 sample</p>" in to_html(views[:1], title="pack 3", capacity=1000)
    assert re.search(r"1 sample\b", terminal(views[:1], capacity=1000))
