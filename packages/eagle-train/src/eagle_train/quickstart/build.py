"""Everything the quickstart trains on, in one folder: images in LMDBs, videos, annotation files, a tokenizer, and the run's YAML file.

Built under another name and renamed, so that an interrupted build is never taken for a whole one.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from .easy_vqa_data import (
    Split,
    Turn,
    comparison_rows,
    description_rows,
    load_split,
    question_rows,
    sentence_rows,
    test_rows,
    write_images,
    write_rows,
)
from .videos import LONGEST_ORDER, draw_clips, turns_about, video_row, write_clips

VERSION = 12


MODEL = {
    "vision_config": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4},
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.12,
    },
    "downsample_ratio": 0.25,
    "patch_initializer_range": 0.25,
}
"""0.4 M parameters, small enough for two cores. The usual initializer_range of 0.02 is made for
widths in the thousands; with it this model did not learn the shapes in 1000 steps, with about 1 / sqrt(width) it does in 600.
With three vision layers the loss of descriptions had reached 0.13 after 800 steps, with four 0.09, and with five or six the same. A tile
is 4 tokens instead of 16, which is learned as fast, and leaves room for more frames. The tower alone, of three layers, trained on shapes
for 1000 steps, gets 0.93 of them right with this patch embedding and 0.78 with a third of it."""


DESCRIBED_POSITIONS = 2
"""Positions of an image that are described. Shapes are learned after a plateau, which is shorter with fewer rows that come again: the
loss of descriptions alone fell to 0.12 in 600 steps with all four positions, and to 0.05 with two. Questions and clips show the others
later."""


SOURCES = ("descriptions", "sentences", "comparisons", "questions", "videos")


class Size(NamedTuple):
    """How much of the data is used; the defaults are the quickstart, tests take less."""

    images: int | None = None
    positions: int = 4
    train_clips: int = 3000
    test_clips: int = 120


class TrainingSettings(NamedTuple):
    """How the stages train. tokens: of a pack, one of which is a step. lr: of the first stage, and of the others."""

    steps: tuple[int, int, int]
    tokens: tuple[int, int, int]
    lr: tuple[float, float]
    reading_processes: int
    answered_together: int


ON_CPU = TrainingSettings((800, 480, 200), (1024, 2048, 4096), (2.0e-3, 3.0e-3), reading_processes=0, answered_together=128)
"""A step takes as long as its tokens. On two cores a process that reads takes turns with the threads that compute, and they wait for each
other: reading in this process takes a seventh of the time, and 14 000 tokens a second were seen; next to another one about 12 000."""
ON_GPU = TrainingSettings((400, 420, 180), (2048, 4096, 8192), (2.8e-3, 4.2e-3), reading_processes=1, answered_together=1024)
"""A step takes as long as its operations are many, so there are fewer steps of twice the tokens."""


def settings_for(device: str) -> TrainingSettings:
    """Of a kind of device, cpu or cuda."""
    return ON_GPU if device == "cuda" else ON_CPU


def build(folder: Path, size: Size, seed: int = 0) -> dict[str, int]:
    """Make `folder` unless it is there already; returns counts of what is in it."""
    made = json.dumps({"version": VERSION, "size": list(size), "seed": seed})
    stamp = folder / "made.json"
    if stamp.is_file() and json.loads(stamp.read_text())["from"] == made:
        return json.loads(stamp.read_text())["counts"]
    temporary = folder.with_name(folder.name + ".building")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    counts = _build(temporary, size, np.random.default_rng(seed))
    (temporary / "made.json").write_text(json.dumps({"from": made, "counts": counts}))
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    return counts


def _build(folder: Path, size: Size, rng: np.random.Generator) -> dict[str, int]:
    train, test = (_first(load_split(name), size.images) for name in ("train", "test"))
    videos = folder / "videos"
    clips = draw_clips(train, videos / "train", _scenes(size.train_clips, rng), rng, size.positions)
    held_out = draw_clips(test, videos / "test", _scenes(size.test_clips, rng), rng)
    with ThreadPoolExecutor(1) as background:
        written = background.submit(write_clips, clips + held_out)
        write_images(train, folder / "train.lmdb", size.positions)
        write_images(test, folder / "test.lmdb", 1)
        rows: dict[str, list[dict[str, Any]]] = {
            "descriptions": description_rows(train, "train.lmdb", min(size.positions, DESCRIBED_POSITIONS)),
            "sentences": sentence_rows(train, rng),
            "comparisons": comparison_rows(train, "train.lmdb", range(0, size.positions, 2), rng),
            "questions": question_rows(train, "train.lmdb", size.positions, rng),
            "videos": [video_row(one.clip, _shuffled(turns_about(one.clip), rng), folder) for one in clips],
            "test_questions": test_rows(test, "test.lmdb"),
            "test_videos": [video_row(one.clip, [turn], folder) for one in held_out for turn in turns_about(one.clip)],
        }
        _train_tokenizer([row for name in SOURCES for row in rows[name]], folder / "tokenizer")
        counts = {name: write_rows(folder / f"{name}.jsonl", content) for name, content in rows.items()}
        written.result()
    return counts


def _first(split: Split, images: int | None) -> Split:
    if images is None:
        return split
    numbers = sorted(split.paths)[:images]
    return Split({number: split.paths[number] for number in numbers}, {number: split.turns[number] for number in numbers})


def _shuffled(turns: list[Turn], rng: np.random.Generator) -> list[Turn]:
    """In any order, since each may be the first question of a conversation."""
    return [turns[index] for index in rng.permutation(len(turns))]


def _scenes(count: int, rng: np.random.Generator) -> list[int]:
    """Scenes of each clip: most are short, and every sixtieth is long enough to be thinned out in the middle stage."""
    return [int(rng.integers(36, 44)) if index % 60 == 59 else int(rng.integers(2, LONGEST_ORDER + 1)) for index in range(count)]


def _train_tokenizer(rows: list[dict[str, Any]], folder: Path) -> None:
    from eagle_model.tokenizer import train_tokenizer

    texts = [turn["value"] for row in rows[:20000] for turn in row["conversations"]]
    frames = [f"Frame {number} sample at {number / 2:.2f}s: " for number in range(1, 60)]
    fixed = ["system\nYou are a helpful assistant.\n", "user\n", "assistant\n", "<image 1>", "The first video sampled with 2.00 fps: "]
    tokenizer = train_tokenizer([*texts, *(frames + fixed) * 20], 448)
    tokenizer.save_pretrained(folder)


def configuration(folder: Path, settings: TrainingSettings = ON_CPU) -> dict[str, Any]:
    """The run's configuration as a user would write it; paths are relative to the run's parent folder."""
    data = folder.name
    names = ("short", "middle", "long")
    sources = (
        {"descriptions": 2.0, "sentences": 0.5},
        {"comparisons": 0.2, "questions": 0.3, "videos": 1.7},
        {"questions": 0.2, "videos": 1.7},
    )
    stages = []
    for index, name in enumerate(names):
        stages.append(
            {
                "name": name,
                "max_tokens": settings.tokens[index],
                "steps": settings.steps[index],
                "packs_per_step": 1,
                "sources": sources[index],
                "loss_weighting": "token",
                "optimizer": "muon",
                "lr": settings.lr[min(index, 1)],
                "schedule": "cosine" if index == 2 else "constant",
                "final_lr_ratio": 0.02 if index == 2 else 0.0,
                "warmup_ratio": 0.05 if index == 0 else 0.0,
                "betas": [0.9, 0.99],
            }
        )
    return {
        "run": {"name": "quickstart", "dir": ".", "log_every": 5},
        "model": {
            "preset": "tiny",
            "tokenizer": f"{data}/tokenizer",
            "overrides": MODEL,
        },
        "data": {
            "sources": {name: {"annotation": f"{data}/{name}.jsonl"} for name in SOURCES},
            "eval_sources": {name: {"annotation": f"{data}/{name}.jsonl"} for name in ("test_questions", "test_videos")},
            "verify": "header",
        },
        "sampling": {"min_frames": 1},
        "stages": stages,
        "checkpoint": {"every": 400, "keep": 1},
        "parallel": {"dtype": "float32"},
        "loader": {"workers": settings.reading_processes},
        # The validation loss of all held-out rows would be a second pass over 10 000 of them at the end.
        "eval": {"limit": 60, "batch_size": settings.answered_together, "max_new_tokens": 32, "loss": False, "answer_after": "so "},
    }


def write_configuration(path: Path, content: dict[str, Any]) -> None:
    """YAML with a line on what it is."""
    head = "# The quickstart's configuration. `eagle train` with this file does the same; `eagle init` writes one for your own data.\n"
    path.write_text(head + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
