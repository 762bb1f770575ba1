"""Media to tokens, in four steps: how (`spec`), what a medium is (`facts`), what it gets (`plan`), and its pixels (`read`).

Prepare, training, evaluation, `eagle show`, `eagle chat`, export and the processor call these functions, so that a model is served
exactly what it was trained on. Nothing here imports torch or transformers.
"""

from eagle_model.visual.facts import (
    ClipError,
    ImageRef,
    VideoFacts,
    VideoRef,
    as_video,
    load_image,
    measure_image,
    measure_video,
    size_of,
)
from eagle_model.visual.plan import (
    BudgetError,
    FactColumns,
    SamplePlan,
    VideoPlan,
    VisualPlans,
    drop_detail,
    plan_columns,
    plan_sample,
    row_plan,
)
from eagle_model.visual.read import (
    FRAMES_TIMEOUT,
    Concealed,
    MediaChanged,
    describe_concealed,
    read_image,
    read_tiles,
    read_tiles_into,
    read_video,
)
from eagle_model.visual.spec import VisualSpec

__all__ = [
    "FRAMES_TIMEOUT",
    "BudgetError",
    "ClipError",
    "Concealed",
    "FactColumns",
    "ImageRef",
    "MediaChanged",
    "SamplePlan",
    "VideoFacts",
    "VideoPlan",
    "VideoRef",
    "VisualPlans",
    "VisualSpec",
    "as_video",
    "describe_concealed",
    "drop_detail",
    "load_image",
    "measure_image",
    "measure_video",
    "plan_columns",
    "plan_sample",
    "read_image",
    "read_tiles",
    "read_tiles_into",
    "read_video",
    "row_plan",
    "size_of",
]
