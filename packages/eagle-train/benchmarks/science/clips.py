"""Videos with needles, made by `eagle needle build`, and rows about the colours on their cards.

The builder writes multiple choice about colours and shapes; here the answers are the colours alone, which a small model learns soonest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eagle_train.evaluation.needle.build import Settings, build
from eagle_train.evaluation.options import options_of

FPS = 4
SIDE = 32
STILL, FIRST, LAST, ORDER = ("What is on the card?", "What is on the first card?", "What is on the last card?", "In what order?")
SECOND, DESCRIBE = "What is on the second card?", "What is in the video?"
"""Questions of rows with short and with long answers; no other rows have them."""


class Batch(NamedTuple):
    """`number` videos of `kind` (still: one card; order: three), `frames` long, with cards of `card` frames, in `folder`."""

    folder: Path
    kind: str
    frames: int
    card: int
    number: int
    seed: int


class Clip(NamedTuple):
    """A video and the colours on its cards, in order."""

    path: str
    colours: tuple[str, ...]


def write_clips(batch: Batch) -> None:
    """Build the videos of a batch; their cards lie at depths drawn from the seed."""
    # Not 0 and 1: the first and the last frame are read at any number of frames.
    depths = (1 + np.random.default_rng(batch.seed).permutation(99)[: batch.number]) / 100
    kinds, lengths = (batch.kind,), (batch.frames / FPS,)
    count = -(-batch.number // len(depths))
    build(batch.folder, Settings(kinds, lengths, tuple(depths.tolist()), count, 1, batch.card / FPS, SIDE, FPS, (), batch.seed))


def read_clips(batch: Batch, root: Path) -> list[Clip]:
    """The clips of a batch; paths are relative to `root`."""
    clips = []
    for line in (batch.folder / "rows.jsonl").read_text().splitlines()[: batch.number]:
        row = json.loads(line)
        question, answer = (turn["value"] for turn in row["conversations"])
        options = options_of(question)
        assert options is not None
        shown = options.texts["ABCD".index(answer)].split(", ")
        colours = tuple(scene.split()[1] for scene in shown)  # a red circle
        clips.append(Clip(str((batch.folder / row["video"]).relative_to(root)), colours))
    return clips


def turns(clip: Clip) -> list[tuple[str, str]]:
    """All questions about a clip; the last is the one that is evaluated."""
    if len(clip.colours) == 1:
        return [(STILL, clip.colours[0])]
    return [(FIRST, clip.colours[0]), (LAST, clip.colours[-1]), (ORDER, ", ".join(clip.colours))]


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
