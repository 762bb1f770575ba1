"""The budget of one sample: Automatic Degradation Sampling (Eagle 2.5, Eq. 2), in whole tokens and plain integers.

Text is kept whole. What is left buys frames first (phase 1, with every image at the smallest cap), then tiles (phase 2, the largest cap
that still fits). `columns.plan_many` gives the same answers for millions of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import numpy as np
import numpy.typing as npt

from .answer import (
    CAPS,
    FRAMES_PER_VIDEO,
    Dropped,
    VideoRequest,
    VisualPlan,
    check_image_tokens,
    check_options,
    check_video,
    degradations,
    dropped,
)


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
    videos = [check_video(i, video) for i, video in enumerate(videos)]
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
