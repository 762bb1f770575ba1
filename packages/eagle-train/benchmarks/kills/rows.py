"""The data of `run.py`: text alone, one long video, and rows of hundreds of images, all generated; and the configuration of the run."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

WORDS = ("red", "green", "blue", "large", "small", "round", "old", "new", "left", "right", "above", "below", "near", "far", "open", "shut")


@dataclass(frozen=True)
class Size:
    """tokens: of the longest pack; seconds: of the video, of which two frames each are requested; images: of a row; texts: rows of text,
    of at most `words` words; every: steps between checkpoints."""

    preset: str
    tokens: int
    seconds: int
    images: int
    texts: int
    words: int
    pixels: int
    every: int
    model: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)


_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {
    "tiny": Size(
        "tiny", 4096, 120, 200, 48, 300, 256, 4, model={"overrides": {"vision_config": _VISION, "text_config": _TEXT}}, stage={"lr": 1e-3}
    ),
    "1b": Size("1b", 32768, 80, 120, 96, 3000, 448, 10),
    "8b": Size("8b", 131072, 300, 400, 160, 6000, 448, 10, model={"weights": "bfloat16"}, stage={"optimizer": "adamw8bit"}),
}


def write_rows(folder: Path, size: Size) -> None:
    """tokenizer/, media/, text.jsonl, video.jsonl and images.jsonl."""
    import av
    from PIL import Image

    from eagle_model.tokenizer import train_tokenizer

    media, draw, pixels = folder / "media", random.Random(0), np.random.default_rng(0)
    media.mkdir()

    def noise(edge: int) -> np.ndarray:
        return pixels.integers(0, 256, (edge // 8, edge // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)

    def words(most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(most // 10, most)))

    with av.open(str(media / "film.mp4"), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=Fraction(4))
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for _ in range(4 * size.seconds):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise(320)[:240], format="rgb24")))
        container.mux(stream.encode())
    for index in range(size.images):
        Image.fromarray(noise(size.pixels)).save(media / f"{index}.png")
    many = {"image": [f"media/{index}.png" for index in range(size.images)]}
    lines = {
        "text": [_row({}, words(size.words), words(size.words)) for _ in range(size.texts)],
        "video": [_row({"video": "media/film.mp4"}, f"<video>part {part}?", words(20)) for part in range(2)],
        "images": [_row(many, "<image>" * size.images + f"which is {part}?", words(20)) for part in range(2)],
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_tokenizer([" ".join(WORDS) + " which is part 0?"] * 4, vocab_size=400).save_pretrained(folder / "tokenizer")


def _row(media: dict[str, Any], question: str, answer: str) -> dict[str, Any]:
    return media | {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def configuration(name: str, size: Size, ranks: int, steps: int) -> dict[str, Any]:
    """Two stages, of half and of all tokens; four ranks share a pack in both ways where there are as many, else two."""
    ulysses, all_gather = 2 if ranks % 4 == 0 else 1, 2 if ranks % 2 == 0 else 1
    common = {"packs_per_step": ranks // (ulysses * all_gather)} | size.stage
    stages = [("half", size.tokens // 2, steps // 2), ("whole", size.tokens, steps - steps // 2)]
    return {
        "run": {"name": name, "deterministic": True},
        "model": {"preset": size.preset, "tokenizer": "tokenizer"} | size.model,
        "data": {"sources": {source: {"annotation": f"{source}.jsonl"} for source in ("text", "video", "images")}, "workers": 1},
        "stages": [{"name": stage, "max_tokens": tokens, "steps": count} | common for stage, tokens, count in stages if count],
        "parallel": {"ulysses": ulysses, "all_gather": all_gather},
        "loader": {"workers": 1, "prefetch": "1MiB"},  # so that media are read all the time, not only at the start
        "checkpoint": {"every": size.every, "keep": 2},
    }
