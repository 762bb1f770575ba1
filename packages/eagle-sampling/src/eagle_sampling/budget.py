"""What of one sample fits the context: Automatic Degradation Sampling (Eagle 2.5, Eq. 2), in whole tokens.

Text is kept whole. What is left buys frames first (phase 1, with every image at the smallest cap), then tiles (phase 2, the largest cap
that still fits). Costs come in as numbers, overhead included, so nothing here knows a tokenizer, a grid or a file.
`budget_columns.plan_many` gives the same answers for millions of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import index
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

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


def plan(
    text_tokens: int,
    images: npt.ArrayLike | Sequence[Sequence[int]],
    videos: Sequence[VideoRequest],
    *,
    max_tokens: int,
    caps: Sequence[int] = CAPS,
    strategy: str = "ads",
    frames_per_video: int = FRAMES_PER_VIDEO,
    cap: int | None = None,
) -> VisualPlan | Dropped:
    """Frames and tiles for one sample, never more than `max_tokens` with its text.

    `images` [M, C]: tokens of each image at each of the C `caps` (falling, the last one being the paper's t = 1). Strategies:

    - "ads": Eq. (2). Phase 1 gives all videos what they want if it fits beside all images at the last cap. Else each gets frames in
      proportion to what it wanted, none below its minimum: with `x` the largest real number for which
      `sum frame_tokens * max(minimum, x * wanted)` fits, everyone gets the whole part, and single frames go round by falling
      fraction (then by position) until no video can take one more. With equal frame costs these are exactly the paper's
      `n* = floor(left / frame_tokens)` frames. Phase 2 takes the first of `caps` at which all images fit beside the frames.
    - "ads-fill": then, one at a time, the image whose cap can be raised for the most tokens (tiles) that still fit is raised.
    - "uniform": `frames_per_video` frames of every video (or all it has), every image at `cap` (default: the first), or dropped.

    Raises:
        ValueError: unknown strategy, caps that don't fall, a shape other than [M, C], negative costs, or a request with not
            1 <= minimum <= wanted or frame_tokens < 1.
    """
    caps = check_options(caps, strategy, frames_per_video, cap)
    costs = np.asarray(images)
    costs = check_image_tokens(costs if costs.size else np.zeros((0, len(caps)), np.int64), caps).tolist()
    videos = [_checked(i, video) for i, video in enumerate(videos)]
    text_tokens, max_tokens = index(text_tokens), index(max_tokens)
    if text_tokens < 0:
        raise ValueError(f"text_tokens = {text_tokens}: a length can't be negative")

    room = max_tokens - text_tokens
    if room < 0:
        return dropped("text_too_long", text_tokens, max_tokens)
    if strategy == "uniform":
        frames = [min(video.wanted, frames_per_video) for video in videos]
        column = caps.index(cap) if cap is not None else 0
        visual = sum(row[column] for row in costs) + sum(n * video.frame_tokens for n, video in zip(frames, videos))
        if visual > room:
            return dropped("too_long", text_tokens, max_tokens, visual)
        return _planned(text_tokens, costs, videos, caps, column, [column] * len(costs), frames)

    least = sum(row[-1] for row in costs)
    if least > room:
        return dropped("images_too_long", text_tokens, max_tokens, least, len(costs), caps[-1])
    needed = sum(video.minimum * video.frame_tokens for video in videos)
    if needed > room - least:
        return dropped("too_few_frames", text_tokens, max_tokens, least, sum(video.minimum for video in videos), needed)
    frames = share_frames(videos, room - least)
    room -= sum(n * video.frame_tokens for n, video in zip(frames, videos))
    column = next(c for c in range(len(caps)) if c == len(caps) - 1 or sum(row[c] for row in costs) <= room)
    columns = [column] * len(costs)
    if strategy == "ads-fill":
        _fill(costs, columns, room - sum(row[column] for row in costs))
    return _planned(text_tokens, costs, videos, caps, column, columns, frames)


def share_frames(videos: Sequence[VideoRequest], room: int) -> list[int]:
    """Frames of each video within `room` tokens, which must hold the minimum of each (see `plan` for the rule)."""
    if sum(video.wanted * video.frame_tokens for video in videos) <= room:
        return [video.wanted for video in videos]
    # x = above / below. Who would get less than the minimum is fixed at it; that lowers x for the others, so again until nobody is.
    free = list(range(len(videos)))
    above, below = room, sum(video.wanted * video.frame_tokens for video in videos)
    while low := [i for i in free if above * videos[i].wanted < videos[i].minimum * below]:
        above -= sum(videos[i].minimum * videos[i].frame_tokens for i in low)
        below -= sum(videos[i].wanted * videos[i].frame_tokens for i in low)
        free = [i for i in free if i not in low]
    frames = [video.minimum for video in videos]
    fraction = [-1] * len(videos)  # who was lifted to the minimum has had more than the share already
    for i in free:
        frames[i], fraction[i] = divmod(above * videos[i].wanted, below)
    room -= sum(n * video.frame_tokens for n, video in zip(frames, videos))
    turn = sorted(range(len(videos)), key=lambda i: (-fraction[i], i))
    gave = True
    while gave:
        gave = False
        for i in turn:
            if frames[i] < videos[i].wanted and videos[i].frame_tokens <= room:
                frames[i] += 1
                room -= videos[i].frame_tokens
                gave = True
    return frames


def _fill(costs: list[list[int]], columns: list[int], room: int) -> None:
    """Raises single images in `columns`, dearest raise that fits first (equal ones: first image, largest cap)."""
    while True:
        best = (0, 0, 0)  # gain, image, column
        for i, row in enumerate(costs):
            for c in range(columns[i]):
                gain = row[c] - row[columns[i]]
                if best[0] < gain <= room:
                    best = (gain, i, c)
        gain, i, c = best
        if gain == 0:
            return
        columns[i] = c
        room -= gain


def _planned(
    text_tokens: int,
    costs: list[list[int]],
    videos: Sequence[VideoRequest],
    caps: tuple[int, ...],
    column: int,
    columns: Sequence[int],
    frames: Sequence[int],
) -> VisualPlan:
    tokens = text_tokens
    tokens += sum(row[c] for row, c in zip(costs, columns)) + sum(n * video.frame_tokens for n, video in zip(frames, videos))
    given_up = degradations(costs, [video.wanted for video in videos], caps, column, columns, frames)
    return VisualPlan(caps[column], tuple(caps[c] for c in columns), tuple(frames), tokens, given_up)


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


def _checked(i: int, video: VideoRequest) -> VideoRequest:
    wanted, minimum, frame_tokens = (index(number) for number in video)
    if not 1 <= minimum <= wanted or frame_tokens < 1:
        raise ValueError(
            f"video {i}: wanted = {wanted}, minimum = {minimum}, frame_tokens = {frame_tokens}: "
            "need 1 <= minimum <= wanted, frame_tokens >= 1"
        )
    return VideoRequest(wanted, minimum, frame_tokens)
