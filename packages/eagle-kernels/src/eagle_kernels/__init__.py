"""Fused operators for long-context training with a plain-torch reference for each, activation offload, and a memory planner."""

__version__ = "0.1.0"

from eagle_kernels import reference
from eagle_kernels.dispatch import implementation, use_implementation
from eagle_kernels.hugging_face import apply_to
from eagle_kernels.memory import DecoderShape, Kept, MemoryPlan, Training, VisionShape, fill_memory, plan_memory
from eagle_kernels.modules import LinearCrossEntropy, RMSNorm, SwiGLUMLP
from eagle_kernels.offload import OffloadEngine, offload_checkpoint
from eagle_kernels.ops.float8 import float8_hardware, float8_linear, float8_linears, float8_mlp
from eagle_kernels.ops.gelu import gelu_linear
from eagle_kernels.ops.linear_cross_entropy import LinearCrossEntropyResult, linear_cross_entropy
from eagle_kernels.ops.rms_norm import add_rms_norm, rms_norm
from eagle_kernels.ops.rope import rope
from eagle_kernels.ops.swiglu import swiglu, swiglu_mlp
from eagle_kernels.recompute import Recompute

__all__ = [
    "DecoderShape",
    "Kept",
    "LinearCrossEntropy",
    "LinearCrossEntropyResult",
    "MemoryPlan",
    "OffloadEngine",
    "RMSNorm",
    "Recompute",
    "SwiGLUMLP",
    "Training",
    "VisionShape",
    "add_rms_norm",
    "apply_to",
    "fill_memory",
    "float8_hardware",
    "float8_linear",
    "float8_linears",
    "float8_mlp",
    "gelu_linear",
    "implementation",
    "linear_cross_entropy",
    "offload_checkpoint",
    "plan_memory",
    "reference",
    "rms_norm",
    "rope",
    "swiglu",
    "swiglu_mlp",
    "use_implementation",
]
