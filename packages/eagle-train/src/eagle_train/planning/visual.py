"""The visual plan of every row at one context length: columns of facts in, `eagle_model.visual` does the arithmetic."""

from typing import Any

from eagle_model.visual import SamplePlan, VisualPlans, VisualSpec, plan_columns, row_plan
from eagle_train.config import Config
from eagle_train.data.facts import Facts

from .trees import media_groups, plan_groups


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

    share_media: rows with the same media get the same frames and tiles (`packing.share_media`). reserve: `packing.reserve`."""
    plans = plan_columns(facts.columns(), max_tokens, spec, facts.frame_costs)
    return plan_groups(facts, plans, media_groups(facts), spec, reserve) if share_media else plans


def sample_plan(facts: Facts, plans: VisualPlans, row: int, spec: VisualSpec) -> SamplePlan:
    """The plan of one row: the grid of each image, the frames of each video. Raises ValueError for a row that was dropped."""
    return row_plan(plans, row, *facts.media(row), spec)
