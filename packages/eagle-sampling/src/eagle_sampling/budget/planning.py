"""`plan` for one sample and `plan_many` for columns: options checked, the strategy applied, dropped rows marked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ..limits import whole_number
from .columns import OK, TEXT_TOO_LONG, PlanColumns, PlanResult
from .sample import CAPS, FRAMES_PER_VIDEO, Dropped, VideoRequest, VisualPlan
from .strategies import Options, find_strategy


def plan(
    text_tokens: int,
    images: npt.ArrayLike,
    videos: Sequence[VideoRequest],
    *,
    max_tokens: int,
    caps: Sequence[int] = CAPS,
    strategy: str = "ads",
    frames_per_video: int = FRAMES_PER_VIDEO,
    cap: int | None = None,
) -> VisualPlan | Dropped:
    """Frames and tiles for one sample, never more than `max_tokens` with its text: `plan_many` of one row.

    Args:
        text_tokens: length of the text, which is kept whole.
        images: [M, C], tokens of each image at each of the C `caps`.
        videos: one request per video or document.
        max_tokens: budget of the sample, text included.
        caps: most tiles of an image, falling; the last is the paper's t = 1.
        strategy: name in `STRATEGIES`: "ads" (Eq. 2), "ads-fill" (then single images are raised), "uniform" (fixed sizes or dropped).
        frames_per_video: frames of every video under "uniform".
        cap: cap of every image under "uniform". Default: the first of `caps`.

    Raises:
        ValueError: an unknown strategy, caps that do not fall, a shape other than [M, C], negative token counts, a request without
            1 <= minimum <= wanted and frame_tokens >= 1, or more than 2^62 tokens.
        TypeError: an option that is not a whole number.
    """
    columns = PlanColumns.from_rows([(text_tokens, images, videos)], caps=caps)
    return plan_many(columns, max_tokens=max_tokens, caps=caps, strategy=strategy, frames_per_video=frames_per_video, cap=cap).row(0)


def plan_many(
    columns: PlanColumns,
    *,
    max_tokens: int,
    caps: Sequence[int] = CAPS,
    strategy: str = "ads",
    frames_per_video: int = FRAMES_PER_VIDEO,
    cap: int | None = None,
) -> PlanResult:
    """Frames and tiles for every row of `columns`, each within `max_tokens`; arguments as in `plan`. `PlanResult.row(i)` describes row i.

    Raises:
        ValueError: an unknown strategy, caps that do not fall, image tokens without one column per cap, or more than 2^62 tokens.
        TypeError: an option that is not a whole number.
    """
    chosen = find_strategy(strategy)
    options = _check_options(columns, caps, frames_per_video, cap)
    max_tokens = whole_number("max_tokens", max_tokens)
    if abs(max_tokens) > 1 << 62:
        raise ValueError(f"max_tokens = {max_tokens}: need at most 2^62; for no limit, give the largest number of tokens that you expect")
    room = max_tokens - columns.text_tokens
    status, cap_index, image_cap_index, frames, left = chosen.choose(columns, room, options)
    status[room < 0] = TEXT_TOO_LONG
    ok = status == OK
    if not ok.all():
        cap_index[~ok] = -1
        image_cap_index[np.repeat(~ok, np.diff(columns.image_offsets))] = -1
        frames = np.where(np.repeat(ok, np.diff(columns.video_offsets)), frames, 0)
    tokens = np.where(ok, max_tokens - left, 0)
    return PlanResult(status, cap_index, frames, tokens, image_cap_index, left, columns, options.caps, max_tokens)


def _check_options(columns: PlanColumns, caps: Sequence[int], frames_per_video: int, cap: int | None) -> Options:
    caps = tuple(whole_number("a cap", c) for c in caps)
    frames_per_video = whole_number("frames_per_video", frames_per_video)
    if not caps or caps[-1] < 1 or any(a <= b for a, b in pairwise(caps)):
        raise ValueError(f"caps = {caps}: need at least one, falling, none below 1")
    if frames_per_video < 1:
        raise ValueError(f"frames_per_video = {frames_per_video}: need at least 1")
    if cap is not None and cap not in caps:
        raise ValueError(f"cap = {cap} is not one of caps = {caps}")
    if columns.image_tokens.shape[1] != len(caps):
        shape = columns.image_tokens.shape
        raise ValueError(f"image tokens have shape {shape}: need [images, {len(caps)}], one column for each of caps = {caps}")
    return Options(caps, frames_per_video, cap)
