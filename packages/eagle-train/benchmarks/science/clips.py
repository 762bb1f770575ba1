"""Videos with needles, made by `eagle needle build`, and rows about them with open questions.

The builder writes multiple choice; here the right option is the answer itself, which a small model learns sooner than letters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from eagle_train.evaluation.needle import build
from eagle_train.evaluation.needle.build import Settings
from eagle_train.evaluation.needle.cards import KINDS
from eagle_train.evaluation.options import options_of

FPS = 4
SIDE = 64
DEPTHS = tuple(round(depth, 3) for depth in np.linspace(0, 1, 21).tolist())
FIRST, SECOND, LAST, ORDER, STILL = (
    "What is on the first card?",
    "What is on the second card?",
    "What is on the last card?",
    "What is on the cards?",
    "What is on the card?",
)


class Batch(NamedTuple):
    """`count` videos of `kind` (still: one card; order: three), `frames` long, with cards of `card` frames, in `folder`."""

    folder: Path
    kind: str
    frames: int
    card: int
    count: int
    seed: int


class Clip(NamedTuple):
    """A video and what its cards show, in order."""

    path: str
    scenes: tuple[str, ...]


def write_clips(batch: Batch) -> None:
    """Build the videos of a batch; their cards lie at depths drawn from the seed."""
    depths = np.random.default_rng(batch.seed).choice(DEPTHS, min(batch.count, len(DEPTHS)), replace=False)
    count = -(-batch.count // len(depths))
    kinds, lengths = (batch.kind,), (batch.frames / FPS,)
    settings = Settings(kinds, lengths, tuple(depths.tolist()), count, 1, batch.card / FPS, SIDE, FPS, (), batch.seed)
    build(batch.folder, settings)


def read_clips(batch: Batch, root: Path) -> list[Clip]:
    """The clips of a batch; paths are relative to `root`."""
    clips = []
    for line in (batch.folder / "rows.jsonl").read_text().splitlines()[: batch.count]:
        row = json.loads(line)
        question, answer = (turn["value"] for turn in row["conversations"])
        options = options_of(question)
        assert options is not None
        scenes = tuple(options.texts["ABCD".index(answer)].split(", "))
        clips.append(Clip(str((batch.folder / row["video"]).relative_to(root)), scenes))
    return clips


def card_rows(folder: Path, root: Path, count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Images of single cards, so that their colours and shapes are learned before they have to be found in videos."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        needle = KINDS["still"](rng, SIDE, 1)
        path = folder / f"{number}.jpg"
        Image.fromarray(needle.clips[0][0]).save(path, quality=int(rng.integers(70, 96)))
        turn = [{"from": "human", "value": f"<image>{STILL}"}, {"from": "gpt", "value": needle.options[0]}]
        rows.append({"image": str(path.relative_to(root)), "conversations": turn})
    return rows


def turns(clip: Clip) -> list[tuple[str, str]]:
    """All questions about a clip; the last is the one that is evaluated."""
    if len(clip.scenes) == 1:
        return [(STILL, clip.scenes[0])]
    first, second, last = clip.scenes
    return [(FIRST, first), (SECOND, second), (LAST, last), (ORDER, ", ".join(clip.scenes))]


def row(clip: Clip | None, asked: Sequence[tuple[str, str]], before: str = "") -> dict[str, Any]:
    """One row: text (optional), the video, and its turns."""
    first = f"{before}<video>" if clip is not None else before
    conversation = []
    for number, (question, answer) in enumerate(asked):
        conversation += [{"from": "human", "value": (first if number == 0 else "") + question}, {"from": "gpt", "value": answer}]
    return ({"video": clip.path} if clip is not None else {}) | {"conversations": conversation}


def training_row(clip: Clip, rng: np.random.Generator) -> dict[str, Any]:
    """All questions about a clip in any order, since each has to be answered from the video and not from the turns before it."""
    asked = turns(clip)
    return row(clip, [asked[index] for index in rng.permutation(len(asked))])


def test_row(clip: Clip) -> dict[str, Any]:
    """The question of a clip that is evaluated."""
    return row(clip, turns(clip)[-1:])
