"""Peak memory of a training step, computed before it runs: `plan_memory` and the sizes that it takes."""

from eagle_kernels.memory.plan import MemoryPlan, plan_memory
from eagle_kernels.memory.shapes import DecoderShape, Training, VisionShape

__all__ = ["DecoderShape", "MemoryPlan", "Training", "VisionShape", "plan_memory"]
