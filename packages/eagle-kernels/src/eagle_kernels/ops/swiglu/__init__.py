"""SwiGLU and the gated MLP around it."""

from eagle_kernels.ops.swiglu.function import swiglu, swiglu_mlp

__all__ = ["swiglu", "swiglu_mlp"]
