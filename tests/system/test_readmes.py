"""What the READMEs show runs: their ```python blocks are executed in order, in a folder that holds photo.jpg and talk.mp4."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", *sorted((ROOT / "packages").glob("*/README.md"))]


@pytest.fixture
def media_folder(tmp_path, monkeypatch):
    import av

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (720, 1280, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg")
    with av.open(str(tmp_path / "talk.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(100):
            picture = np.full((64, 96, 3), 2 * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
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
