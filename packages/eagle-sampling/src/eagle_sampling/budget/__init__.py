"""Token budgets: how many tiles and frames of a sample fit a context length (Automatic Degradation Sampling and other strategies).

Costs are numbers, overhead included; nothing here depends on a tokenizer, a grid or a file.
"""

from .columns import STATUS, PlanColumns, PlanResult, row_sums
from .planning import plan, plan_many
from .sample import CAPS, FRAMES_PER_VIDEO, REASONS, Dropped, VideoRequest, VisualPlan, tile_caps
from .strategies import STRATEGIES, Choice, Options, Strategy, register_strategy

__all__ = [
    "CAPS",
    "FRAMES_PER_VIDEO",
    "REASONS",
    "STATUS",
    "STRATEGIES",
    "Choice",
    "Dropped",
    "Options",
    "PlanColumns",
    "PlanResult",
    "Strategy",
    "VideoRequest",
    "VisualPlan",
    "plan",
    "plan_many",
    "register_strategy",
    "row_sums",
    "tile_caps",
]
