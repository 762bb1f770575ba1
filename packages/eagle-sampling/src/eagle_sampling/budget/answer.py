"""What a budget is asked and what it answers: requests, plans, drops, their words, and the checks on what comes in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import index
from typing import NamedTuple

import numpy as np

CAPS = (12, 8, 6, 4, 2, 1)
STRATEGIES = ("ads", "ads-fill", "uniform")
FRAMES_PER_VIDEO = 32  # of "uniform", when nothing else is asked for
REASONS = ("text_too_long", "images_too_long", "too_few_frames", "too_long")


class VideoRequest(NamedTuple):
    """A video or a document of pages: what it asks for.

    `wanted`: frames at 2 per second, or all pages. `minimum`: fewer than these and the sample is dropped; 1 <= minimum <= wanted
    (the default of the paper is min(8, wanted)). `frame_tokens`: what one frame costs, its tags and time included.
    """

    wanted: int
    minimum: int
    frame_tokens: int


class VisualPlan(NamedTuple):
    """What a sample keeps.

    `cap`: most tiles of an image; `image_caps`: the same per image (above `cap` only under "ads-fill"); `frames`: frames of each
    video; `tokens`: the whole sample, text included; `degradations`: what was given up, e.g. "frames 600->212", "tiles 12->6".
    """

    cap: int
    image_caps: tuple[int, ...]
    frames: tuple[int, ...]
    tokens: int
    degradations: tuple[str, ...]


class Dropped(NamedTuple):
    """Why a sample can't be used at this length: `reason` is one of `REASONS`, `detail` has the numbers."""

    reason: str
    detail: str


def degradations(
    costs: Sequence[Sequence[int]],
    wanted: Sequence[int],
    caps: Sequence[int],
    column: int,
    columns: Sequence[int],
    frames: Sequence[int],
) -> tuple[str, ...]:
    """What a plan gave up, in words; a lower cap that costs no image a tile is no loss."""
    lost = []
    for i, (asked, given) in enumerate(zip(wanted, frames)):
        if given < asked:
            lost.append(f"frames {asked}->{given}" if len(frames) == 1 else f"video {i + 1} frames {asked}->{given}")
    if any(row[c] < row[0] for row, c in zip(costs, columns)):
        raised = sum(c < column for c in columns)
        higher = f" ({raised} of {len(columns)} images higher)" if raised else ""
        lost.append(f"tiles {caps[0]}->{caps[column]}{higher}")
    return tuple(lost)


def dropped(reason: str, text_tokens: int, max_tokens: int, *numbers: int) -> Dropped:
    """The `Dropped` of a reason; `numbers` are what its sentence needs."""
    left = f"{max_tokens - text_tokens} of {max_tokens} tokens are left beside {text_tokens} of text"
    if reason == "text_too_long":
        return Dropped(reason, f"text alone is {text_tokens} tokens, the budget {max_tokens}")
    if reason == "images_too_long":
        least, images, cap = numbers
        return Dropped(reason, f"{images} images need {least} tokens at {cap} tiles each, {left}")
    if reason == "too_few_frames":
        least, frames, needed = numbers
        beside = f" and {least} of images" if least else ""
        return Dropped(reason, f"the fewest frames, {frames}, need {needed} tokens{beside}, {left}")
    (visual,) = numbers
    return Dropped("too_long", f"frames and images need {visual} tokens, {left}")


def check_options(caps: Sequence[int], strategy: str, frames_per_video: int, cap: int | None) -> tuple[int, ...]:
    """The options of `plan` and `plan_many`, checked; returns `caps` as a tuple."""
    caps = tuple(index(c) for c in caps)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is unknown: choose one of {', '.join(STRATEGIES)}")
    if not caps or caps[-1] < 1 or any(a <= b for a, b in pairwise(caps)):
        raise ValueError(f"caps = {caps}: need at least one, falling, none below 1")
    if frames_per_video < 1:
        raise ValueError(f"frames_per_video = {frames_per_video}: need at least 1")
    if cap is not None and cap not in caps:
        raise ValueError(f"cap = {cap} is none of caps = {caps}")
    return caps


def check_image_tokens(costs: np.ndarray, caps: Sequence[int]) -> np.ndarray:
    """Image costs as int64 [M, C]."""
    if costs.ndim != 2 or costs.shape[1] != len(caps):
        raise ValueError(f"image tokens have shape {costs.shape}: need [images, {len(caps)}], one column for each of caps = {tuple(caps)}")
    if costs.dtype.kind not in "iu":
        raise ValueError(f"image tokens are {costs.dtype}: need integers")
    if costs.size and costs.min() < 0:
        raise ValueError(f"image {int(np.argmax((costs < 0).any(axis=1)))} has a negative cost")
    return costs.astype(np.int64, copy=False)


def check_video(i: int, video: VideoRequest) -> VideoRequest:
    wanted, minimum, frame_tokens = (index(number) for number in video)
    if not 1 <= minimum <= wanted or frame_tokens < 1:
        raise ValueError(
            f"video {i}: wanted = {wanted}, minimum = {minimum}, frame_tokens = {frame_tokens}: "
            "need 1 <= minimum <= wanted, frame_tokens >= 1"
        )
    return VideoRequest(wanted, minimum, frame_tokens)
