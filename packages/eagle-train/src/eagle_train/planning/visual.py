"""What each row gets at one context length: IAP (which grid) and ADS (how many tiles and frames) over columns of facts.

No file is opened and no pixel touched. Costs in tokens are upper bounds that hold for the tokenizer of the facts, so a sample
that fits here fits when it is tokenised. Repeated image sizes and numbers of digits are looked up once, the rest is arithmetic.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from eagle_model.prompt import sampled_fps, shown_times
from eagle_sampling import CAPS, Dropped, PlanColumns, PlanResult, TimeTable, choose_times, plan_many
from eagle_sampling.budget import FRAMES_PER_VIDEO, STATUS
from eagle_tiling import Grid, select_grid, tile_counts
from eagle_train.config import SamplingConfig, TilingConfig
from eagle_train.data.facts import Facts


class ModelFacts(NamedTuple):
    """What planning must know of a model: side of a tile in pixels, and `k`, the tokens of one tile."""

    tile_size: int
    tokens_per_tile: int


@dataclass(frozen=True, eq=False)
class VisualColumns:
    """The visual plan of every row of the facts at one context length.

    status: int8 [N], 0 when the row fits, else an index into `reasons`.
    tokens: int64 [N] of the whole sample (0 for a dropped row). tiles: int64 [N], images' tiles with thumbnails, and frames.
    image_offsets int64 [N + 1], image_caps int16 [M]: most tiles of each image. image_tiles int32 [M]: tiles it gets, with thumbnail.
    video_offsets int64 [N + 1], frames int32 [V]: frames or pages of each video or document. wanted int32 [V]: what was asked for.
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
    result: PlanResult


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """Frames of one video: `times` to read (seconds in the file) and `shown` (seconds that the prompt prints), float64 [count].

    A document has neither; it has `pages`, int64 [count], 0-based. `fps` is the rate at which the frames were sampled.
    """

    count: int
    times: np.ndarray | None = None
    shown: np.ndarray | None = None
    fps: float | None = None
    pages: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """One sample of a pack: its row in the facts, its length in tokens (upper bound), its grids and frames, in the row's order.

    `sizes` are those that the grids were chosen for, (width, height) as displayed.
    """

    row: int
    tokens: int
    label_tokens: int
    grids: tuple[Grid, ...]
    sizes: tuple[tuple[int, int], ...]
    videos: tuple[VideoPlan, ...]


def plan_visual(facts: Facts, max_tokens: int, model: ModelFacts, *, sampling: SamplingConfig, tiling: TilingConfig) -> VisualColumns:
    """Tiles and frames of every row under a budget of `max_tokens` (Eq. 1 and 2); a pure function."""
    k = model.tokens_per_tile
    widths, heights, image_offsets = _images(facts)
    caps = caps_of(tiling)
    limits = _image_limits(facts, image_offsets, tiling)
    tiles = _tiles(widths, heights, limits, caps, model.tile_size, tiling)

    video_offsets, available = facts.lists("video_frames")
    seconds = facts.lists("video_seconds")[1]
    wanted = wanted_column(seconds, available, sampling)
    overhead = facts.frame_costs.overhead(wanted, facts.lists("video_end")[1])
    result = plan_many(
        PlanColumns(
            text_tokens=facts.column("text_tokens").astype(np.int64),
            image_offsets=image_offsets,
            image_tokens=tiles * k,
            video_offsets=video_offsets,
            wanted=wanted,
            minimum=np.minimum(wanted, sampling.min_frames),
            frame_tokens=overhead + k,
        ),
        max_tokens=max_tokens,
        caps=caps,
        strategy=sampling.strategy,
        frames_per_video=sampling.max_frames or FRAMES_PER_VIDEO,
    )
    fits = result.status == 0
    column = np.maximum(result.image_cap_index, 0).astype(np.int64)  # -1 in dropped rows
    image_caps = np.maximum(np.minimum(np.asarray(caps)[column], limits), tiling.min_tiles)
    image_tiles = np.where(result.image_cap_index < 0, 0, tiles[np.arange(len(tiles)), column])
    row_tiles = _row_sums(image_tiles, image_offsets) + _row_sums(result.frames, video_offsets)
    return VisualColumns(
        max_tokens,
        STATUS,
        result.status,
        np.where(fits, result.tokens, 0),
        np.where(fits, row_tiles, 0),
        image_offsets,
        image_caps.astype(np.int16),
        image_tiles.astype(np.int32),
        video_offsets,
        result.frames.astype(np.int32),
        wanted.astype(np.int32),
        result,
    )


def caps_of(tiling: TilingConfig) -> tuple[int, ...]:
    """The caps that ADS tries, largest first: those of the paper below `max_tiles`, and `max_tiles` itself."""
    return (tiling.max_tiles, *(cap for cap in CAPS if tiling.min_tiles <= cap < tiling.max_tiles))


def wanted_column(seconds: np.ndarray, available: np.ndarray, sampling: SamplingConfig) -> np.ndarray:
    """Frames to aim at, int64 [V]: `fps` a second (`eagle_sampling.wanted_frames` over columns), all pages of a document.

    Never fewer than `min_frames` where the video has them, as in the original, and at most `max_frames` and what there is.
    The strategy "uniform" asks for `max_frames` (32 unless told) of every video, whatever its length.
    """
    if sampling.strategy == "uniform":
        return np.minimum(available, sampling.max_frames or FRAMES_PER_VIDEO).astype(np.int64)
    document = np.isnan(seconds)
    by_rate = np.maximum(np.floor(np.where(document, 0.0, seconds) * sampling.fps + 1e-6), 1)
    wanted = np.where(document, available, np.maximum(by_rate, sampling.min_frames)).astype(np.int64)
    if sampling.max_frames is not None:
        wanted = np.minimum(wanted, sampling.max_frames)
    return np.minimum(wanted, available)


def sample_plan(
    facts: Facts, visual: VisualColumns, row: int, model: ModelFacts, *, sampling: SamplingConfig, tiling: TilingConfig
) -> SamplePlan:
    """The plan of one row: the grid of each image, the frames of each video. Raises ValueError for a row that was dropped."""
    if visual.status[row] != 0:
        raise ValueError(f"row {row} of the facts was dropped at {visual.max_tokens} tokens ({visual.reasons[visual.status[row]]})")
    first, last = visual.image_offsets[row : row + 2]
    sizes = tuple(zip(*(facts.table.column(name)[row].as_py() for name in ("image_width", "image_height"))))
    grids = tuple(
        select_grid(width, height, min_tiles=tiling.min_tiles, max_tiles=int(cap), tile_size=model.tile_size)
        for (width, height), cap in zip(sizes, visual.image_caps[first:last])
    )
    videos = []
    first, last = visual.video_offsets[row : row + 2]
    if last > first:
        columns = (facts.table.column(f"video_{name}")[row].as_py() for name in ("frames", "seconds", "start", "stop", "times"))
        for count, available, seconds, start, stop, table in zip(visual.frames[first:last], *columns):
            videos.append(_video_plan(int(count), available, seconds, start, stop, table, sampling))
    return SamplePlan(row, int(visual.tokens[row]), facts.table.column("label_tokens")[row].as_py(), grids, sizes, tuple(videos))


def _video_plan(
    count: int, available: int, seconds: float | None, start: float | None, stop: float | None, table: list[int], sampling: SamplingConfig
) -> VideoPlan:
    if seconds is None:
        return VideoPlan(count, pages=spread(available, count))
    times = choose_times(TimeTable.from_list(table), count, start=start, end=stop, placement=sampling.placement)
    return VideoPlan(count, times, shown_times(times, start), sampled_fps(count, seconds))


def spread(available: int, count: int) -> np.ndarray:
    """`count` of `available` pages, first to last, int64 [count]."""
    return np.round(np.linspace(0, available - 1, count)).astype(np.int64) if count > 1 else np.zeros(count, np.int64)


def drop_detail(visual: VisualColumns, row: int) -> str:
    """Why a row was dropped, with its numbers."""
    answer = visual.result.row(row)
    if not isinstance(answer, Dropped):
        raise ValueError(f"row {row} was not dropped at {visual.max_tokens} tokens")
    return f"{answer.detail}; raise the stage's max_tokens, or shorten the row"


def _images(facts: Facts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    offsets, widths = facts.lists("image_width")
    return widths, facts.lists("image_height")[1], offsets


def _image_limits(facts: Facts, image_offsets: np.ndarray, tiling: TilingConfig) -> np.ndarray:
    """Most tiles of each image by its source, int64 [M]."""
    limits = np.full(int(image_offsets[-1]), tiling.max_tiles, np.int64)
    for source in facts.sources:
        if source.max_dynamic_tiles is not None:
            limits[image_offsets[source.first] : image_offsets[source.first + source.rows]] = min(
                source.max_dynamic_tiles, tiling.max_tiles
            )
    return limits


def _tiles(
    widths: np.ndarray, heights: np.ndarray, limits: np.ndarray, caps: tuple[int, ...], tile_size: int, tiling: TilingConfig
) -> np.ndarray:
    """Tiles with thumbnail of each image at each cap, int64 [M, C]; each distinct size is computed once."""
    if not len(widths):
        return np.zeros((0, len(caps)), np.int64)
    keys, inverse = np.unique(widths.astype(np.int64) << 32 | heights, return_inverse=True)
    counts: dict[int, np.ndarray] = {}

    def at(cap: int) -> np.ndarray:
        if cap not in counts:
            counts[cap] = tile_counts(
                keys >> 32, keys & 0xFFFFFFFF, min_tiles=tiling.min_tiles, max_tiles=cap, tile_size=tile_size, thumbnail=tiling.thumbnail
            )
        return counts[cap]

    tiles = np.empty((len(widths), len(caps)), np.int64)
    for limit in np.unique(limits):
        some = slice(None) if limit == limits.min() == limits.max() else np.flatnonzero(limits == limit)
        for column, cap in enumerate(caps):
            tiles[some, column] = at(max(min(cap, int(limit)), tiling.min_tiles))[inverse[some]]
    return tiles


def _row_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    total = np.concatenate([[0], np.cumsum(values)])
    return total[offsets[1:]] - total[offsets[:-1]]
