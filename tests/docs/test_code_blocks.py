"""```python blocks of the documentation run, page by page and in order, in a folder with photo.jpg, talk.mp4 and a small model my-eagle."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DOCS = Path(__file__).parents[2] / "docs"


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)


PAGES = [path for path in sorted(DOCS.rglob("*.md")) if python_blocks(path)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import av

    from eagle_model import EagleForConditionalGeneration, EagleProcessor, preset
    from eagle_model.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("docs")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(folder / "photo.jpg")
    with av.open(str(folder / "talk.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(40):
            picture = np.full((64, 96, 3), 6 * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
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
