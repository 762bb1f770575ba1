"""What media get at one context length: IAP (which grid, Eq. 1) and ADS (how many tiles and frames, Eq. 2), for columns of rows.

No file is opened and no pixel touched. A single sample is a table of one row, so that its plan is that of training by construction.
Costs in tokens are upper bounds for one tokenizer, so a sample that fits here fits when it is tokenised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from eagle_model.errors import ModelError
from eagle_model.prompt.costs import FrameCosts
from eagle_model.prompt.render import Segment, VideoSpan, render, sampled_fps, shown_times
from eagle_model.prompt.verbatim import render_text
from eagle_model.visual.facts import VideoFacts
from eagle_model.visual.spec import VisualSpec
from eagle_sampling import Dropped, PlanColumns, PlanResult, choose_pages, choose_times, plan_many, wanted_frames
from eagle_sampling.budget import FRAMES_PER_VIDEO, STATUS, STRATEGIES
from eagle_tiling import Grid, select_grid, tile_count, tile_counts

#: The budget of a sample that has none: larger than any sample, small enough for products in int64.
NO_LIMIT = 1 << 40


class BudgetError(ModelError):
    """Media and text that don't fit the budget of tokens. `reason`: one of `eagle_sampling`'s, to count by."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class FactColumns(NamedTuple):
    """Facts of N rows with M images and V videos or documents. Row i has the images `image_offsets[i]:image_offsets[i + 1]`, and videos
    likewise.

    text_tokens: int64 [N]. image_width, image_height: [M], pixels. image_limits: int64 [M], most tiles of each image, or None.
    video_frames: [V], frames or pages there are. video_seconds: float64 [V], NaN: pages, or frames that are all wanted. video_last_time:
    float64 [V], NaN: no times.
    """

    text_tokens: np.ndarray
    image_offsets: np.ndarray
    image_width: np.ndarray
    image_height: np.ndarray
    image_limits: np.ndarray | None
    video_offsets: np.ndarray
    video_frames: np.ndarray
    video_seconds: np.ndarray
    video_last_time: np.ndarray


@dataclass(frozen=True, eq=False)
class VisualPlans:
    """The visual plan of every row at one context length.

    status: int8 [N], 0 when the row fits, else an index into `reasons`.
    tokens: [N] of the whole sample (0 for a dropped row). tiles: [N], images' tiles with thumbnails, and frames.
    image_offsets [N + 1], image_caps int16 [M]: most tiles of each image. image_tiles int32 [M]: tiles it gets, with thumbnail.
    video_offsets [N + 1], frames int32 [V]: frames or pages of each video or document. wanted int32 [V]: frames aimed at.
    result: what `drop_detail` reads; None where it was not kept, since it takes 100 bytes for each image.
    Arrays without a named width are int64, or int32 where that holds their values.
    """

    max_tokens: int
    reasons: tuple[str, ...]
    status: np.ndarray
    tokens: np.ndarray
    tiles: np.ndarray
    image_offsets: np.ndarray
    image_caps: np.ndarray
    image_tiles: np.ndarray
    video_offsets: np.ndarray
    frames: np.ndarray
    wanted: np.ndarray
    result: PlanResult | None = None


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """Frames of one video.

    times: float64 [count], seconds in the file of the frames to read; or indices: int64 [count], 0-based pages, or places among frames
    that are decoded already. shown: float64 [count], seconds that the prompt prints; None: no times. fps: rate at which the frames were
    sampled, None for pages.
    """

    count: int
    times: np.ndarray | None = None
    indices: np.ndarray | None = None
    shown: np.ndarray | None = None
    fps: float | None = None


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """What the media of one sample get, in their order: grids of the images and frames of the videos.

    tokens: length of the sample with its text (upper bound). sizes: (width, height) as displayed, for which the grids were chosen.
    """

    tokens: int
    grids: tuple[Grid, ...]
    sizes: tuple[tuple[int, int], ...]
    videos: tuple[VideoPlan, ...]

    def tile_count(self, spec: VisualSpec) -> int:
        """Tiles of the sample: of its images with thumbnails, frames and pages."""
        return sum(tile_count(grid, thumbnail=spec.thumbnail) for grid in self.grids) + sum(video.count for video in self.videos)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]] | str,
        spec: VisualSpec,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> list[Segment]:
        """The prompt of the sample as segments: messages (`eagle_model.prompt.render`), or a text that is rendered already (`render_text`,
        which takes no options). Raises PromptError."""
        k = spec.tokens_per_tile
        images = [tile_count(grid, thumbnail=spec.thumbnail) * k for grid in self.grids]
        videos = [
            VideoSpan(None if video.shown is None else video.shown.tolist(), video.fps, k, video.count if video.shown is None else None)
            for video in self.videos
        ]
        if isinstance(messages, str):
            return render_text(messages, images=images, videos=videos)
        return render(
            messages,
            images=images,
            videos=videos,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )


def plan_columns(
    facts: FactColumns,
    max_tokens: int,
    spec: VisualSpec,
    frame_costs: FrameCosts,
    *,
    video_specs: Sequence[VisualSpec] | None = None,
) -> VisualPlans:
    """Tiles and frames of every row under a budget of `max_tokens` tokens (Eq. 1 and 2); a pure function.

    video_specs: [V], rates and frame limits of single videos where they aren't those of `spec`.
    """
    k, caps = spec.tokens_per_tile, spec.caps
    limits = np.full(len(facts.image_width), spec.max_tiles, np.int64)
    if facts.image_limits is not None:
        limits = np.minimum(facts.image_limits, limits)
    tiles = _tiles_by_cap(facts.image_width, facts.image_height, limits, spec)
    wanted = _wanted(facts.video_seconds, facts.video_frames, spec)
    minimum = np.minimum(wanted, spec.min_frames)
    for place, own in enumerate(video_specs or ()):
        one = slice(place, place + 1)
        wanted[one] = _wanted(facts.video_seconds[one], facts.video_frames[one], own)
        minimum[one] = np.minimum(wanted[one], own.min_frames)
    result = plan_many(
        PlanColumns(
            text_tokens=facts.text_tokens,
            image_offsets=facts.image_offsets,
            image_tokens=tiles * k,
            video_offsets=facts.video_offsets,
            wanted=wanted,
            minimum=minimum,
            frame_tokens=frame_costs.overhead(wanted, facts.video_last_time) + k,
        ),
        max_tokens=max_tokens,
        caps=caps,
        strategy=spec.strategy,
        # `wanted` has the limit of every video already; the budget's own must not be below it.
        frames_per_video=max(int(wanted.max(initial=1)), spec.max_frames or FRAMES_PER_VIDEO),
    )
    fits = result.status == 0
    column = np.maximum(result.image_cap_index, 0).astype(np.int64)  # -1 in dropped rows
    image_caps = np.maximum(np.minimum(np.asarray(caps)[column], limits), spec.min_tiles)
    image_tiles = np.where(result.image_cap_index < 0, 0, tiles[np.arange(len(tiles)), column])
    row_tiles = _row_sums(image_tiles, facts.image_offsets) + _row_sums(result.frames, facts.video_offsets)
    return VisualPlans(
        max_tokens,
        STATUS,
        result.status,
        np.where(fits, result.tokens, 0),
        np.where(fits, row_tiles, 0),
        facts.image_offsets,
        image_caps.astype(np.int16),
        image_tiles.astype(np.int32),
        facts.video_offsets,
        result.frames.astype(np.int32),
        wanted.astype(np.int32),
        result,
    )


def plan_sample(
    text_tokens: int,
    sizes: Sequence[tuple[int, int]],
    videos: Sequence[VideoFacts],
    spec: VisualSpec,
    frame_costs: FrameCosts,
    *,
    max_tokens: int | None = None,
    image_limits: Sequence[int] | None = None,
    video_specs: Sequence[VisualSpec] | None = None,
) -> SamplePlan:
    """The plan of one sample; `max_tokens` None gives every medium all that it wants.

    sizes: (width, height) of its images. image_limits: most tiles of each image. video_specs: see `plan_columns`.
    Raises BudgetError when the sample can't fit.
    """
    facts = FactColumns(
        text_tokens=np.array([text_tokens], np.int64),
        image_offsets=np.array([0, len(sizes)], np.int64),
        image_width=np.array([width for width, _ in sizes], np.int64),
        image_height=np.array([height for _, height in sizes], np.int64),
        image_limits=None if image_limits is None else np.asarray(image_limits, np.int64),
        video_offsets=np.array([0, len(videos)], np.int64),
        video_frames=np.array([video.frames for video in videos], np.int64),
        video_seconds=_floats(video.seconds for video in videos),
        video_last_time=_floats(video.last_time for video in videos),
    )
    plans = plan_columns(facts, NO_LIMIT if max_tokens is None else max_tokens, spec, frame_costs, video_specs=video_specs)
    if plans.status[0]:
        reason = plans.reasons[plans.status[0]]
        raise BudgetError(f"the prompt doesn't fit {max_tokens} tokens ({reason}): {drop_detail(plans, 0)}", reason)
    return row_plan(plans, 0, sizes, videos, spec, video_specs=video_specs)


def row_plan(
    plans: VisualPlans,
    row: int,
    sizes: Sequence[tuple[int, int]],
    videos: Sequence[VideoFacts],
    spec: VisualSpec,
    *,
    video_specs: Sequence[VisualSpec] | None = None,
) -> SamplePlan:
    """Grids and frame times of one row of the columns, from its facts. Raises ValueError for a row that was dropped."""
    if plans.status[row] != 0:
        raise ValueError(f"row {row} was dropped at {plans.max_tokens} tokens ({plans.reasons[plans.status[row]]})")
    caps = plans.image_caps[slice(*plans.image_offsets[row : row + 2])].tolist()
    counts = plans.frames[slice(*plans.video_offsets[row : row + 2])].tolist()
    grids = tuple(
        select_grid(width, height, min_tiles=spec.min_tiles, max_tiles=cap, tile_size=spec.tile_size)
        for (width, height), cap in zip(sizes, caps, strict=True)
    )
    specs = video_specs or [spec] * len(counts)
    chosen = tuple(_video_plan(video, count, own) for video, count, own in zip(videos, counts, specs, strict=True))
    return SamplePlan(int(plans.tokens[row]), grids, tuple(sizes), chosen)


def _video_plan(video: VideoFacts, count: int, spec: VisualSpec) -> VideoPlan:
    if video.seconds is None:
        indices = choose_pages(video.frames, count)
        shown = None if video.frame_times is None else np.asarray(video.frame_times, np.float64)[indices]
        return VideoPlan(count, indices=indices, shown=shown, fps=None if video.fps is None else video.fps * count / video.frames)
    assert video.times is not None
    times = choose_times(video.times, count, start=video.start, end=video.end, placement=spec.placement)
    return VideoPlan(count, times=times, shown=shown_times(times, video.start), fps=sampled_fps(count, video.seconds))


def _wanted(seconds: np.ndarray, available: np.ndarray, spec: VisualSpec) -> np.ndarray:
    """Frames to aim at, int64 [V]: `fps` a second, at least `min_frames`, and all pages; `max_frames` (default: 32) with a strategy that
    doesn't go by the length of a video."""
    by_rate = STRATEGIES[spec.strategy].by_rate
    return wanted_frames(
        np.asarray(seconds, np.float64),
        spec.fps if by_rate else None,
        spec.max_frames if by_rate else spec.max_frames or FRAMES_PER_VIDEO,
        min_frames=spec.min_frames if by_rate else 1,
        available=np.asarray(available, np.int64),
    )


def drop_detail(plans: VisualPlans, row: int) -> str:
    """Why a row was dropped, with its numbers. Raises ValueError for a row that was not, and for plans without their `result`."""
    if plans.result is None:
        raise ValueError("the plans were made without their result; plan the dropped rows again with plan_columns")
    answer = plans.result.row(row)
    if not isinstance(answer, Dropped):
        raise ValueError(f"row {row} was not dropped at {plans.max_tokens} tokens")
    return answer.detail


def _tiles_by_cap(widths: np.ndarray, heights: np.ndarray, limits: np.ndarray, spec: VisualSpec) -> np.ndarray:
    """Tiles with thumbnail of each image at each cap, int64 [M, C]; each distinct size is computed once."""
    if not len(widths):
        return np.zeros((0, len(spec.caps)), np.int64)
    keys, inverse = np.unique(widths.astype(np.int64) << 32 | heights, return_inverse=True)
    counts: dict[int, np.ndarray] = {}

    def at(cap: int) -> np.ndarray:
        if cap not in counts:
            counts[cap] = tile_counts(
                keys >> 32, keys & 0xFFFFFFFF, min_tiles=spec.min_tiles, max_tiles=cap, tile_size=spec.tile_size, thumbnail=spec.thumbnail
            )
        return counts[cap]

    different = np.unique(limits)
    tiles = np.empty((len(widths) if len(different) > 1 else 0, len(spec.caps)), np.int64)
    for limit in different:
        # [sizes, C]: an image's counts are one copy of a row, which is faster than a strided column for each cap.
        table = np.stack([at(max(min(cap, int(limit)), spec.min_tiles)) for cap in spec.caps], axis=1)
        if len(different) == 1:
            return table[inverse]
        some = np.flatnonzero(limits == limit)
        tiles[some] = table[inverse[some]]
    return tiles


def _row_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    total = np.concatenate([[0], np.cumsum(values)])
    return total[offsets[1:]] - total[offsets[:-1]]


def _floats(values: Any) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], np.float64)
