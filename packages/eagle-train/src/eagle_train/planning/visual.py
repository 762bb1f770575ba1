"""The visual plan of every row at one context length: columns of facts in, `eagle_model.visual` does the arithmetic."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from eagle_model.visual import SamplePlan, VisualPlans, VisualSpec, drop_detail, plan_columns, row_plan
from eagle_sampling.budget import STATUS
from eagle_train.config import Config
from eagle_train.data.facts import Facts
from eagle_train.executors import in_threads

from .packing import narrowed
from .trees import GroupTexts, media_groups

BLOCK = 1 << 17
"""Rows that are planned at once: about 60 MB of temporary arrays in each thread."""


def visual_spec(config: Config, described: Any) -> VisualSpec:
    """How media become tiles in a run: tile size and `k` of the model (an EagleConfig), the rest from `sampling` and `tiling`."""
    sampling, tiling = config.sampling, config.tiling
    return VisualSpec(
        tile_size=described.tile_size,
        tokens_per_tile=described.tokens_per_tile,
        min_tiles=tiling.min_tiles,
        max_tiles=tiling.max_tiles,
        thumbnail=tiling.thumbnail,
        strategy=sampling.strategy,
        fps=sampling.fps,
        min_frames=sampling.min_frames,
        max_frames=sampling.max_frames,
        placement=sampling.placement,
    )


def plan_visual(facts: Facts, max_tokens: int, spec: VisualSpec, *, share_media: bool = False, reserve: float = 0.0) -> VisualPlans:
    """Tiles and frames of every row under a budget of `max_tokens` tokens (Eq. 1 and 2); a pure function.

    share_media: rows with the same media get the same frames and tiles (`packing.share_media`). reserve: `packing.reserve`.
    Without `result`; see `drop_details`. Rows are planned in blocks, which threads of this process share: the plan of a row depends on no
    other row."""
    plans = _empty_plans(facts, max_tokens)
    _fill(plans, facts, spec)
    if share_media:
        own = facts.column("text_tokens").astype(np.int64)
        groups = GroupTexts(own, plans.status, media_groups(facts), int(reserve * max_tokens))
        _fill(plans, facts, spec, groups.texts(), groups.member)
        while groups.give_up_room(plans.status):
            _fill(plans, facts, spec, groups.texts(), groups.member)
    return plans


def drop_details(facts: Facts, plans: VisualPlans, rows: np.ndarray, spec: VisualSpec) -> Iterator[str]:
    """Why rows (int64, rising) were dropped, with their numbers: each block that has one is planned again."""
    for first, batch in facts.batches(BLOCK):
        begin, end = np.searchsorted(rows, (first, first + len(batch)))
        if begin < end:
            block = plan_columns(facts.columns(first, batch), plans.max_tokens, spec, facts.frame_costs)
            yield from (drop_detail(block, int(row) - first) for row in rows[begin:end])


def _empty_plans(facts: Facts, max_tokens: int) -> VisualPlans:
    """Plans to be filled, with the offsets of the facts."""
    count, batches = len(facts), [batch for _, batch in facts.batches(BLOCK)]
    offsets = []
    for name in ("image_width", "video_frames"):
        sizes = [np.diff(batch.column(name).offsets.to_numpy(zero_copy_only=False)) for batch in batches]
        ends = np.concatenate([np.zeros(1, np.int64), *sizes])
        offsets.append(narrowed(np.cumsum(ends, dtype=np.int64)))
    images, videos = (int(ends[-1]) for ends in offsets)
    width = np.dtype(np.int32 if max_tokens < 1 << 31 else np.int64)
    return VisualPlans(
        max_tokens,
        STATUS,
        np.zeros(count, np.int8),
        np.zeros(count, width),
        np.zeros(count, width),
        offsets[0],
        np.zeros(images, np.int16),
        np.zeros(images, np.int32),
        offsets[1],
        np.zeros(videos, np.int32),
        np.zeros(videos, np.int32),
    )


def _fill(plans: VisualPlans, facts: Facts, spec: VisualSpec, text: np.ndarray | None = None, member: np.ndarray | None = None) -> None:
    """Plan all rows; with `text` (int64 [N]) those blocks again that have a row of `member` (bool [N]), as if it was theirs."""

    def run(place: tuple[int, Any]) -> None:
        first, batch = place
        columns = facts.columns(first, batch)
        rows = slice(first, first + len(batch))
        more = np.zeros(len(batch), np.int64)
        if text is not None and member is not None:
            if not member[rows].any():
                return
            more = text[rows] - columns.text_tokens
            columns = columns._replace(text_tokens=text[rows])
        block = plan_columns(columns, plans.max_tokens, spec, facts.frame_costs)
        images, videos = (slice(*offsets[[rows.start, rows.stop]]) for offsets in (plans.image_offsets, plans.video_offsets))
        plans.status[rows], plans.tokens[rows], plans.tiles[rows] = block.status, block.tokens - more, block.tiles
        plans.image_caps[images], plans.image_tiles[images] = block.image_caps, block.image_tiles
        plans.frames[videos], plans.wanted[videos] = block.frames, block.wanted

    in_threads(run, facts.batches(BLOCK))


def sample_plan(facts: Facts, plans: VisualPlans, row: int, spec: VisualSpec) -> SamplePlan:
    """The plan of one row: the grid of each image, the frames of each video. Raises ValueError for a row that was dropped."""
    return row_plan(plans, row, *facts.media(row), spec)
