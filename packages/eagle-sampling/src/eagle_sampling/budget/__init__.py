"""What of a sample fits the context: Automatic Degradation Sampling and its rivals.

Costs come in as numbers, overhead included, so nothing here knows a tokenizer, a grid or a file. `sample.py` plans one sample,
`columns.py` millions of rows with the same answers.
"""

from .answer import CAPS, FRAMES_PER_VIDEO, REASONS, STRATEGIES, Dropped, VideoRequest, VisualPlan
from .columns import STATUS, PlanColumns, PlanResult, plan_many
from .sample import plan

__all__ = [
    "CAPS",
    "FRAMES_PER_VIDEO",
    "REASONS",
    "STATUS",
    "STRATEGIES",
    "Dropped",
    "PlanColumns",
    "PlanResult",
    "VideoRequest",
    "VisualPlan",
    "plan",
    "plan_many",
]
