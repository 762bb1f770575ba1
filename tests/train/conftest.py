"""A byte tokenizer with Eagle's tokens, small media files, and facts without files for tests of planning."""

import json
import subprocess
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerFast

from eagle_model.prompt.costs import FrameCosts
from eagle_sampling import TimeTable
from eagle_train.cli.main import main
from eagle_train.config import Config, parse_config
from eagle_train.data.facts import SCHEMA, Facts, FactsSource
from tests.support import media, runs
from tests.support.models import byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def row() -> Callable[..., dict[str, Any]]:
    """A row with one question and one answer, and whatever media it is given."""

    def make(question: str = "What is it?", answer: str = "A square.", **media: Any) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **media}

    return make


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, Sequence[Any]], Path]:
    """Rows (dictionaries, or bytes as they are) as a JSONL file."""

    def write(path: Path, rows: Sequence[Any]) -> Path:
        lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """An encoded image of random pixels."""

    def make(width: int = 64, height: int = 48, format: str = "PNG", seed: int = 0) -> bytes:
        return media.encoded(media.random_image(seed, (width, height)), format)

    return make


@pytest.fixture(scope="session")
def write_video() -> Callable[..., Path]:
    """An H.264 file of random frames, with its index in front of them."""

    def write(path: Path, frames: int = 30, fps: int = 10, size: tuple[int, int] = (64, 48)) -> Path:
        pixels = (media.random_pixels(index, size) for index in range(frames))
        return media.write_video(path, pixels, fps, {"g": "10", "preset": "ultrafast"}, {"movflags": "faststart"})

    return write


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """A configuration in the test's folder, one process, the given sources and further sections."""

    def make(sources: dict[str, Any], **sections: Any) -> Config:
        data = {"sources": sources, "workers": 1, **sections.pop("data", {})}
        return parse_config({"run": {"name": "test"}, "data": data, **sections}, base=tmp_path)

    return make


@pytest.fixture(scope="session")
def make_facts() -> Callable[..., Facts]:
    """Facts from a list of rows `{"text": tokens, "images": [(w, h)], "videos": [(frames, fps) or pages], "group": media_group}`,
    without any file."""

    def make(rows: Sequence[dict[str, Any]], sources: Sequence[FactsSource] | None = None) -> Facts:
        columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        for number, content in enumerate(rows):
            columns["line"].append(number + 1)
            columns["offset"].append(number * 100)
            columns["size"].append(99)
            columns["text_tokens"].append(content["text"])
            columns["label_tokens"].append(content.get("labels", 1))
            columns["media_group"].append(content.get("group", 0))
            columns["image_width"].append([width for width, _ in content.get("images", ())])
            columns["image_height"].append([height for _, height in content.get("images", ())])
            videos: list[dict[str, Any]] = []
            for video in content.get("videos", ()):
                facts = {"start": None, "end": None, "fps": None, "width": 64, "height": 48}
                if isinstance(video, int):
                    videos.append({**facts, "frames": video, "seconds": None, "last_time": None, "times": []})
                else:
                    frames, fps = video
                    table = TimeTable.from_ticks(range(frames), Fraction(1, fps))
                    known = {"frames": frames, "seconds": frames / fps, "last_time": (frames - 1) / fps, "times": table.to_list()}
                    videos.append(facts | known)
            for name in ("frames", "seconds", "last_time", "start", "end", "fps", "width", "height", "times"):
                columns[f"video_{name}"].append([video[name] for video in videos])
        if sources is None:
            sources = [FactsSource("all", Path("all.jsonl"), Path("."), 0, len(rows), 0, 1.0, 1.0, None)]
        costs = FrameCosts(tuple(tuple(20 + row + column for column in range(8)) for row in range(8)))
        return Facts(pa.table(columns, schema=SCHEMA), tuple(sources), costs, None, "key")

    return make


@pytest.fixture
def colour_run(tmp_path: Path, colour_run_in: Callable[..., Config]) -> Callable[..., Config]:
    """`colour_run_in` the test's folder."""
    return partial(colour_run_in, tmp_path)


@pytest.fixture(scope="session")
def colour_run_in(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Config]:
    """A small run of a tiny model in a folder."""

    def make(folder: Path, rows: int = 24, **sections: Any) -> Config:
        return runs.colour_run_in(folder, tokenizer, rows, **sections)

    return make


@pytest.fixture
def eagle_here(capsys, monkeypatch):
    """The command `eagle` in this process, which has torch already; for what doesn't depend on being a process."""
    monkeypatch.setenv("COLUMNS", "80")
    for name, value in (("TQDM_DISABLE", "1"), ("OMP_WAIT_POLICY", "PASSIVE")):  # verbs set them; so they are taken back
        monkeypatch.setenv(name, value)

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        return subprocess.CompletedProcess(arguments, ended.value.code or 0, *capsys.readouterr())

    return run
