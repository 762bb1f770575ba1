"""Peak memory of a training step, computed before it runs: `plan_memory`, the sizes that it takes, and what fits (`fill_memory`)."""

from eagle_kernels.memory.kept import ATTENTION, MLP, NOTHING, PROJECTIONS, Kept, fill_memory
from eagle_kernels.memory.plan import MemoryPlan, plan_memory
from eagle_kernels.memory.shapes import DecoderShape, Training, VisionShape

__all__ = [
    "ATTENTION",
    "MLP",
    "NOTHING",
    "PROJECTIONS",
    "DecoderShape",
    "Kept",
    "MemoryPlan",
    "Training",
    "VisionShape",
    "fill_memory",
    "plan_memory",
]
