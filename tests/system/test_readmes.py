"""What the READMEs show runs: their ```python blocks are executed in order, in a folder that holds photo.jpg and talk.mp4."""

import re
from pathlib import Path

import pytest

from tests.support.media import grey_frames, random_image, write_video

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", *sorted((ROOT / "packages").glob("*/README.md"))]


@pytest.fixture
def media_folder(tmp_path, monkeypatch):
    random_image(size=(1280, 720)).save(tmp_path / "photo.jpg")
    write_video(tmp_path / "talk.mp4", grey_frames(100, 2), fps=10)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_readme_examples_run(path, media_folder):
    names: dict = {}
    blocks = python_blocks(path)
    assert blocks, f"{path} shows no example"
    for block in blocks:
        exec(compile(block, str(path), "exec"), names)
