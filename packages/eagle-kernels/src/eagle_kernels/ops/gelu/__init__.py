"""Linear layer followed by GELU."""

from eagle_kernels.ops.gelu.function import gelu_linear

__all__ = ["gelu_linear"]
