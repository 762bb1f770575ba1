"""A small data set and its configuration, for `eagle init --example`: drawn shapes with a question each, a tokenizer, a run of 30 steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from eagle_model.tokenizer import train_tokenizer

COLOURS = {"red": (210, 40, 40), "green": (40, 170, 70), "blue": (50, 70, 210), "yellow": (230, 210, 50)}
SHAPES = ("circle", "square")
QUESTION = "What is in the image?"

CONFIGURATION = """\
# A run that trains for seconds on a CPU: eagle train FILE. eagle init FILE writes a file with every key.
run: {name: example}
model: {preset: tiny, tokenizer: tokenizer}
data:
  sources:
    shapes: {annotation: train.jsonl}       # one JSON object per line; media paths are relative to the file
  eval_sources:
    held_out: {annotation: held_out.jsonl}
stages:
  - {name: short, max_tokens: 1K, steps: 30, packs_per_step: 1, lr: 1.0e-3}
loader: {workers: 0}
"""


def write_example(folder: Path, *, seed: int = 0) -> Path:
    """Write images, `train.jsonl`, `held_out.jsonl`, `tokenizer/` and `run.yaml` to `folder`; returns the path of `run.yaml`."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = {name: [_row(folder, f"{name}-{number}", rng) for number in range(count)] for name, count in (("train", 48), ("held_out", 8))}
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    texts = [turn["value"] for content in rows.values() for row in content for turn in row["conversations"]]
    train_tokenizer([*texts, "system\nYou are a helpful assistant.\n", "user\n", "assistant\n", "<image 1>"], 400).save_pretrained(
        folder / "tokenizer"
    )
    path = folder / "run.yaml"
    path.write_text(CONFIGURATION, encoding="utf-8")
    return path


def _row(folder: Path, name: str, rng: np.random.Generator) -> dict[str, Any]:
    """A row, and its image of 96 x 64 pixels."""
    colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
    image = Image.new("RGB", (96, 64), (128, 128, 128))
    side = int(rng.integers(28, 48))
    x, y = (int(rng.integers(2, limit - side)) for limit in image.size)
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)((x, y, x + side, y + side), fill=COLOURS[colour])
    image.save(folder / "images" / f"{name}.png")
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": f"a {colour} {shape}"}]
    return {"image": f"images/{name}.png", "conversations": turns}
