"""```python blocks of the documentation run, page by page and in order, in a folder with photo.jpg, talk.mp4 and a small model my-eagle."""

import re
from pathlib import Path

import pytest

from tests.support.media import grey_frames, random_image, write_video

DOCS = Path(__file__).parents[2] / "docs"


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)


PAGES = [path for path in sorted(DOCS.rglob("*.md")) if python_blocks(path)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from eagle_model import EagleForConditionalGeneration, EagleProcessor, preset
    from eagle_model.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("docs")
    random_image(size=(128, 96)).save(folder / "photo.jpg")
    write_video(folder / "talk.mp4", grey_frames(40, 6), fps=4)
    tokenizer = train_tokenizer(["What is in this picture?"], vocab_size=400)
    config = preset("tiny", tokenizer=tokenizer)
    EagleForConditionalGeneration(config).save_pretrained(folder / "my-eagle")
    EagleProcessor.for_config(tokenizer, config).save_pretrained(folder / "my-eagle")
    return folder


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_blocks_run(path, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names: dict = {}
    for block in python_blocks(path):
        exec(compile(block, str(path), "exec"), names)
