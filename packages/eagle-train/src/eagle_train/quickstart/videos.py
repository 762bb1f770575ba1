"""Videos for the quickstart: real H.264, an easy-VQA image every half second, and questions about their order.

At two frames a second the model gets each image once. Its answer about the order counts the images as the prompt counts the frames
(`1 red circle, 2 teal triangle, 3 red square`), so that each can be found by its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image

from eagle_train.executors import cpus, map_items

from .easy_vqa_data import TURNS, Split, Turn, conversation, description

FPS = 4
"""Frames a second of the files."""
FRAMES_PER_SCENE = 2
SIDE = 64
AT_END = "what is shown at the end?"
AT_START = "what is shown at the start?"
IN_ORDER = "in what order?"
LONGEST_ORDER = 5
"""Longest clip, in scenes, with a question about the order: one wrong shape makes the whole answer wrong."""
WRITTEN_TOGETHER = 40
"""Clips that a process encodes at a time, in about 0.2 s."""
MOST_PROCESSES = 16
"""All clips take one process about 15 s, and a process one second to start."""


class Clip(NamedTuple):
    """A video file and what its scenes show, in order."""

    path: Path
    scenes: tuple[str, ...]


class Drawn(NamedTuple):
    """A clip that is not written yet, and its pictures: files, and the numbers of `TURNS` that they are shown in."""

    clip: Clip
    pictures: tuple[tuple[str, int], ...]


def encode(path: Path, images: Sequence[Image.Image]) -> None:
    """Each image for `FRAMES_PER_SCENE` frames, `FPS` a second, H.264 in MP4."""
    with av.open(str(path), "w") as container:
        # Nearly lossless, since the questions are about colours.
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "12", "g": str(FPS * 4)})
        # 300 clips take 1.5 s with one thread and 2.3 s with 24. The files are the same.
        stream.codec_context.thread_count = 1
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for image in images:
            frame = av.VideoFrame.from_image(image)
            for _ in range(FRAMES_PER_SCENE):
                frame.pts = None
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def draw_clips(split: Split, folder: Path, lengths: Sequence[int], rng: np.random.Generator, positions: int = 1) -> list[Drawn]:
    """One clip of each length (in scenes), of images drawn at random among those whose questions state what they show.

    positions: how many of `TURNS` an image is shown in, one of them at random.
    """
    described = {number: text for number, turns in split.turns.items() if (text := description(turns))}
    numbers = np.array(sorted(described))
    drawn = []
    for index, length in enumerate(lengths):
        chosen = rng.choice(numbers, length, replace=False).tolist()
        pictures = tuple((split.paths[number], int(rng.integers(positions))) for number in chosen)
        drawn.append(Drawn(Clip(folder / f"{index:04d}.mp4", tuple(described[number] for number in chosen)), pictures))
    return drawn


def write_clips(drawn: Sequence[Drawn]) -> None:
    """Encode clips on all CPUs. Raises WorkerError when a process dies."""
    for folder in {one.clip.path.parent for one in drawn}:
        folder.mkdir(parents=True, exist_ok=True)
    groups = [drawn[start : start + WRITTEN_TOGETHER] for start in range(0, len(drawn), WRITTEN_TOGETHER)]
    processes = min(cpus(), MOST_PROCESSES)
    for _ in map_items(_write, groups, workers=processes, name=lambda group: group[0].clip.path.name, advice="run the quickstart again"):
        pass


def _write(drawn: Sequence[Drawn]) -> None:
    for one in drawn:
        encode(one.clip.path, [_picture(*picture) for picture in one.pictures])


def _picture(path: str, position: int) -> Image.Image:
    with Image.open(path) as file:
        image, turn = file.convert("RGB"), TURNS[position]
    return image if turn is None else image.transpose(turn)


def in_order(scenes: Sequence[str]) -> str:
    """The answer about the order."""
    return ", ".join(f"{number} {scene.removeprefix('a ')}" for number, scene in enumerate(scenes, 1))


def turns_about(clip: Clip) -> list[Turn]:
    """The questions of a clip."""
    turns = [Turn(AT_END, clip.scenes[-1]), Turn(AT_START, clip.scenes[0])]
    if len(clip.scenes) <= LONGEST_ORDER:
        turns.append(Turn(IN_ORDER, in_order(clip.scenes)))
    return turns


def video_row(clip: Clip, turns: Sequence[Turn], root: Path) -> dict[str, Any]:
    """One row about one clip."""
    return {"video": str(clip.path.relative_to(root)), "conversations": conversation(turns, "<video>")}
